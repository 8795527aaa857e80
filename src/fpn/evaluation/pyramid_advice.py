"""What to change about a pyramid in the next training, where a level has nothing to do or too much."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch
from jaxtyping import Float

from fpn.data.fit import UNUSED, percent
from fpn.evaluation.pyramid import NOWHERE, Level, PyramidReport, Watch, name_of
from fpn.model.fast_rcnn import FastRCNN
from fpn.model.roi import assign_levels
from fpn.spec import MODELS
from fpn.words import counted, listed

CROWDED = 0.8  # share of the objects on one level that is too much
FEW = 20  # objects on which little can be said
CELLS = 5  # places along a region's side from which 7 x 7 features still differ
WEAK = 0.5  # of the recall of the other levels


def advise(report: PyramidReport, watch: Watch) -> list[str]:
    """One sentence for each thing that would fit the data better; for how levels are judged see `report_of`."""
    if not report.all.objects:
        return [f"no objects in {counted(report.images, 'image')}: there is nothing to judge the levels by"]
    found = [_idle_ends(report, watch), _crowded(report, watch), _unlearnt(report), _weak(report, watch)]
    return [text for text in found if text is not None]


def _idle(report: PyramidReport, level: int) -> bool:
    """Whether a level was given hardly anything by any rule, and found hardly anything."""
    row, least = report.levels[level], UNUSED * report.all.objects
    return max(row.by_region or 0, row.by_anchor or 0, row.objects) < least


def _idle_ends(report: PyramidReport, watch: Watch) -> str | None:
    """Levels at the ends of the pyramid that could be left out.

    At the top only those above the backbone's: without its highest, what that has seen would not come down to the
    others either.
    """
    levels = [level for level in report.levels if level != NOWHERE]
    busy = [level for level in levels if not _idle(report, level)]
    if not busy or len(busy) == len(levels):
        return None
    top = max(busy[-1], max(watch.detector.backbone.channels))  # pyright: ignore[reportArgumentType]
    kept = [level for level in levels if busy[0] <= level <= top]
    idle = [level for level in levels if level not in kept]
    if not idle:
        return None
    rows = [report.levels[level] for level in idle]
    given = max(_given(rows, name) for name in ("by_region", "by_anchor"))
    found = sum(row.found for row in rows)
    text = (
        f"{listed([name_of(level) for level in idle])} {'was' if len(idle) == 1 else 'were'} given {given:,} of "
        f"{counted(report.all.objects, 'object')} and found {found or 'nothing'}: "
        f"--levels {kept[0]} {kept[-1]}{_anchors_of(watch, kept)}"
    )
    if report.all.anchors:
        share = sum(row.anchors or 0 for row in rows) / report.all.anchors
        saved = sum(row.anchors or 0 for row in rows) / report.images
        return f"{text} would save {saved:,.0f} anchors an image, {_share(share)} of all"
    return f"{text} would do without"


def _given(rows: Iterable[Level], name: str) -> int:
    return sum(getattr(row, name) or 0 for row in rows)


def _share(share: float) -> str:
    return percent(share) if share >= 0.01 else f"{100 * share:.1g} %"


def _anchors_of(watch: Watch, levels: list[int]) -> str:
    """The option that keeps the anchors of these levels, where they are not those that the model would take anyway."""
    spec, sizes = watch.detector.spec, getattr(watch.detector.anchors, "sizes", {})
    usual = MODELS[spec.model].get("strides", 0)
    if all(sizes.get(level, 0) == usual * 2**level for level in levels) or not sizes:
        return ""
    return " --anchors " + " ".join(f"{sizes[level]:g}" for level in levels)


def _crowded(report: PyramidReport, watch: Watch) -> str | None:
    """One level that has nearly all objects, where there are several to share them."""
    detector = watch.detector
    two_stages = isinstance(detector, FastRCNN)
    levels, name = (detector.pooled_levels, "by_region") if two_stages else (detector.levels, "by_anchor")
    shares = {level: (getattr(report.levels[level], name) or 0) / report.all.objects for level in levels}
    most = max(levels, key=lambda level: shares[level])
    if len(levels) < 3 or report.all.objects < FEW or shares[most] < CROWDED:
        return None
    sides = watch.sides[np.isfinite(watch.sides)]
    text = f"{name_of(most)} has {percent(shares[most])} of the objects"
    text += f" (median side {np.median(sides):.0f} pixels in the resized images): "
    if two_stages and most == levels[0] and (remedy := _canonical(detector, sides, shares[most])):
        return text + remedy
    if most < levels[1]:
        return f"{text}--short {_rounded(2 * detector.spec.short)} would give part of them to the level above"
    if most >= levels[2]:
        return f"{text}--short {_rounded(detector.spec.short / 2)} would do in a quarter of the time"
    return None


def _canonical(detector: FastRCNN, sides: Float[np.ndarray, " n"], share: float) -> str | None:
    """A canonical size (Eq. 1) that puts the median object in the middle of the levels, where that shares them out.

    Not so small that a region would have less than CELLS places of its map along each side.
    """
    lowest, highest = detector.pooled_levels[0], detector.pooled_levels[-1]
    canonical = max(CELLS * 16.0, float(f"{np.median(sides) * 2 ** (4 - (lowest + highest + 1) / 2):.2g}"))
    boxes = torch.from_numpy(np.pad(sides[:, None].repeat(2, 1), ((0, 0), (2, 0))))
    left = float((assign_levels(boxes, lowest, highest, canonical=canonical) == lowest).double().mean())
    if left > share - 0.1:
        return None
    return f"canonical={canonical:g} in place of {detector.canonical:g} (of fpn.build) would leave it {percent(left)}"


def _rounded(side: float) -> int:
    return max(32, math.ceil(side / 32) * 32)


def _unlearnt(report: PyramidReport) -> str | None:
    """Objects that no anchor or place stands for."""
    row = report.levels.get(NOWHERE)
    count = row.by_anchor if row else 0
    if (count or 0) < UNUSED * report.all.objects or not count:
        return None
    return (
        f"{count:,} of {counted(report.all.objects, 'object')} ({_share(count / report.all.objects)}) would have no "
        "anchor or place of any level to learn them in training: they are too small, or others take all their places; "
        "a larger --short helps"
    )


def _weak(report: PyramidReport, watch: Watch) -> str | None:
    """The lowest level, where it misses far more of its objects than the others."""
    own = report.levels[min(level for level in report.levels if level != NOWHERE)]
    others = report.all.objects - own.objects
    if own.objects < max(FEW, 0.1 * report.all.objects) or others < FEW:
        return None
    mine, theirs = own.found / own.objects, (report.all.found - own.found) / others
    if mine >= WEAK * theirs:
        return None
    return (
        f"{name_of(min(k for k in report.levels if k != NOWHERE))} finds {percent(mine)} of its objects, the other "
        f"levels {percent(theirs)}: its objects measure {own.side:.0f} pixels (median) in the resized images; "
        f"--short {_rounded(2 * watch.detector.spec.short)} would double that, at four times the time an image"
    )
