"""The rows (a) to (f) of the paper's Tables 1 to 3, as options of `fpn.build`.

Rows take parts of the FPN away or put others in their place; all else stays as it is, so that the difference between
two rows is what the part is worth (sections 5.1.1 and 5.2.1).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fpn.errors import OptionError

WHOLE = {"neck": "fpn", "top_down": True, "lateral": True, "finest": False, "box_head": "layers"}
VGG_HIDDEN = 4096  # of fc6 and fc7


@dataclass(frozen=True)
class Variant:
    """A row: `name` as in the paper's tables, `words` for what is different in it."""

    name: str
    words: str


VARIANTS: dict[str, Variant] = {
    "a": Variant("baseline on C4", "C4 alone, as it is, with anchors of all sizes; conv5 is the head of its regions"),
    "b": Variant("baseline on C5", "C5 alone, as it is, with anchors of all sizes; two layers are the head"),
    "c": Variant("FPN", "the whole pyramid: lateral connections and the top-down pathway"),
    "d": Variant("bottom-up pyramid", "a pyramid whose levels are each made from their own C, nothing coming down"),
    "e": Variant("top-down without lateral", "a pyramid made by upsampling C5, nothing entering from the side"),
    "f": Variant("only finest level", "the whole pathway, but only P2 is used, with anchors of all sizes"),
}


def options(letter: str, base: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The options of `fpn.build` for a row of the tables, from those of row (c), the FPN.

    base: what row (c) is built with, such as `model`, `backbone`, `width`, `anchor_sizes` or `proposals`; nothing for
    the paper's own Faster R-CNN. It may be of any scale: rows on one level have the anchors of all its levels there,
    and before NMS as many candidates as its levels have together. The models rpn, fast_rcnn and faster_rcnn have all
    rows; where another has not, or a backbone has no stage 5 that can be a head (row (a)), `fpn.build` says so. On a
    VGG that head is two layers, of 4096 where `base` has no `hidden`, as in Fast R-CNN (Girshick 2015).

    Raises OptionError for a letter that is no row, and for a base that is no whole FPN.
    """
    row = {"model": "faster_rcnn", "backbone": "resnet50", **(base or {})}
    wrong = [f"{name} {row[name]!r}" for name, usual in WHOLE.items() if row.get(name, usual) != usual]
    if wrong:
        raise OptionError(f"{', '.join(wrong)}: the rows of the tables are made from the FPN as it is, row (c)")
    match letter:
        case "a":
            return with_head_on_c4(without_neck(row, 4))
        case "b":
            return without_neck(row, 5)
        case "c":
            return row
        case "d":
            return without(row, "fuse") | {"top_down": False}
        case "e":
            return without(row, "fuse") | {"lateral": False}
        case "f":
            lowest = {"levels": (row["levels"][0],) * 2} if row.get("levels") else {}
            return on_one_level(row) | lowest | {"finest": True}
    raise OptionError(f"row {letter!r}: the tables have {', '.join(VARIANTS)}")


def without_neck(row: Mapping[str, Any], level: int) -> dict[str, Any]:
    """Rows (a) and (b): everything on one of the backbone's levels, as it is."""
    return without(on_one_level(row), "width", "norm", "fuse") | {"neck": "none", "levels": (level, level)}


def on_one_level(row: Mapping[str, Any]) -> dict[str, Any]:
    """All sizes of anchors where one was, and the candidates of all levels; the paper has 15 anchors a place there."""
    lowest, highest = row.get("levels") or (2, 6)
    sizes = row.get("anchor_sizes") or tuple(8.0 * 2**level for level in range(lowest, highest + 1))
    scales = [size / sizes[0] * scale for size in sizes for scale in row.get("anchor_scales") or (1.0,)]
    changed: dict[str, Any] = {"anchor_sizes": (float(sizes[0]),), "anchor_scales": tuple(scales)}
    if "proposals_per_level" in row:
        changed["proposals_per_level"] = tuple(len(sizes) * count for count in row["proposals_per_level"])
    return without(row, "extra", "extra_relu", "extra_norm", "rpn_shared") | changed


def with_head_on_c4(row: Mapping[str, Any]) -> dict[str, Any]:
    """Row (a): stage 5 is the head of regions twice as fine, as it halves them; a VGG's has no weights."""
    if row["model"] == "rpn":
        return dict(row)
    if str(row["backbone"]).startswith("vgg"):
        return {"hidden": VGG_HIDDEN, **row}
    finer = {"pooled_size": 2 * row["pooled_size"]} if "pooled_size" in row else {}
    return without(row, "hidden", "box_convolutions", "box_norm") | finer | {"box_head": "stage"}


def without(row: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """A row without options that would have no effect in it."""
    return {name: value for name, value in row.items() if name not in names}
