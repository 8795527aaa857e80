"""A data set in one picture: classes, sizes and shapes of boxes, objects an image, and what the anchors reach."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np

from fpn.data.dataset import Data
from fpn.data.fit import SMALL, Fit, objects_by_image
from fpn.errors import OptionError
from fpn.writing import replacing

FORMATS = ("png", "svg", "pdf", "jpg")
# Told apart by all kinds of colour vision (Okabe and Ito 2008), and by lightness in print.
BLUE, SKY, ORANGE, INK, FAINT = "#0072b2", "#8cc7ea", "#d55e00", "#30343a", "#d9dce0"
CLASSES = 25  # bars; more cannot be read
LETTERS = 22


def save_overview(data: Data, fit: Fit, out: str | Path) -> None:
    """Draw the picture and write it to `out` in the format that its name ends in (png, svg, pdf, jpg).

    Raises OptionError for another ending.
    """
    import matplotlib
    from matplotlib.figure import Figure

    out = Path(out)
    kind = out.suffix.lower().removeprefix(".")
    if kind not in FORMATS:
        raise OptionError(f"{out}: the picture's name must end in {', '.join(f'.{name}' for name in FORMATS)}")
    look: dict[Any, Any] = {"font.size": 10, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": FAINT}
    look |= {"xtick.color": INK, "ytick.color": INK, "axes.titlesize": 11.5, "axes.titleweight": "bold"}
    with matplotlib.rc_context(look), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*Glyph")  # class names in scripts that the font lacks become boxes
        figure = Figure(figsize=(14, 7.6), layout="constrained")
        panels = figure.subplot_mosaic(
            [["classes", "sizes", "shapes"], ["classes", "objects", "recall"]], width_ratios=[1, 1.25, 1.25]
        )
        figure.get_layout_engine().set(w_pad=0.15, h_pad=0.12)  # pyright: ignore
        images, boxes = sum(map(len, data.values())), len(fit.boxes)
        figure.suptitle(
            _plain(f"{data.path.resolve().name}: {images:,} images, {boxes:,} boxes, {len(data.classes):,} classes"),
            fontsize=14,
            fontweight="bold",
        )
        for name, draw in PANELS.items():
            _frame(panels[name])
            draw(panels[name], data, fit)
        with replacing(out) as unfinished:
            figure.savefig(unfinished, format=kind, dpi=130, facecolor="white")


def _frame(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(length=0)
    axes.set_axisbelow(True)
    axes.grid(axis="y", color=FAINT, lw=0.7)


def _classes(axes: Any, data: Data, fit: Fit) -> None:
    """Boxes by class, the most frequent first, with those of the train split darker."""
    counts = {
        name: np.bincount(split.labels[~split.ignore], minlength=len(data.classes)) for name, split in data.items()
    }
    total = np.sum(list(counts.values()), axis=0)
    order = np.argsort(-total, kind="stable")[:CLASSES]
    train = (counts["train"] if "train" in counts else np.zeros_like(total))[order]
    rows, rest = np.arange(len(order)), total[order] - train
    axes.barh(rows, train, color=BLUE, label="train")
    axes.barh(rows, rest, left=train, color=SKY, label="other splits")
    for row, label in enumerate(order):
        axes.text(total[label], row, f" {total[label]:,}", va="center", fontsize=8.5)
    axes.set_yticks(rows, [_plain(_short(data.classes[label])) for label in order])
    axes.set_ylim(max(len(order), 6) - 0.4, -0.6)
    axes.set_xlim(0, 1.18 * max(1, total.max(initial=0)))
    axes.set_xticks([])
    axes.grid(visible=False)
    axes.spines["bottom"].set_visible(False)
    if train.any() and rest.any():
        axes.legend(frameon=False, loc="lower right", fontsize=9)
    more = len(data.classes) - len(order)
    axes.set_title("Boxes by class" + (f" ({more} rarer classes left out)" if more else ""), loc="left")


def _sizes(axes: Any, data: Data, fit: Fit) -> None:
    axes.set_title("Box sizes at the training size", loc="left")
    axes.set_xlabel(f"square root of the area in pixels, shorter side {fit.short}")
    if not len(fit.sides):
        return _nothing(axes)
    anchors = {f"P{level}\n{size:g}": size for level, size in fit.anchors.sizes.items()}
    low, high = max(1.0, np.quantile(fit.sides, 0.001)), max(fit.sides.max(), 2.0)
    _log_histogram(axes, fit.sides, min(low, 0.7 * min(anchors.values())), max(high, 1.5 * max(anchors.values())))
    if axes.get_xlim()[0] < SMALL:
        axes.axvspan(axes.get_xlim()[0], SMALL, color=ORANGE, alpha=0.09, lw=0, zorder=0)
        axes.text(0.97 * SMALL, 0.97, "tiny", transform=axes.get_xaxis_transform(), ha="right", va="top", color=ORANGE)
    _marks(axes, anchors, "anchors")
    axes.set_ylabel("boxes")


def _shapes(axes: Any, data: Data, fit: Fit) -> None:
    axes.set_title("Box shapes", loc="left")
    axes.set_xlabel("height / width (left: wide, right: tall)")
    if not len(fit.ratios):
        return _nothing(axes)
    reach = float(np.clip(np.quantile(np.exp(np.abs(np.log(fit.ratios))), 0.999), 4, 50))
    _log_histogram(axes, fit.ratios, 1 / reach, reach)
    _marks(axes, {f"{ratio:g}": ratio for ratio in fit.anchors.ratios}, "anchors")
    axes.set_ylabel("boxes")


def _objects(axes: Any, data: Data, fit: Fit) -> None:
    axes.set_title("Objects an image", loc="left")
    axes.set_xlabel("objects")
    counts = np.concatenate([objects_by_image(split) for split in data.values()])
    if not len(counts):
        return _nothing(axes)
    step = max(1, -(-(int(counts.max()) + 1) // 40))
    axes.hist(counts, np.arange(0, counts.max() + step + 1, step) - 0.5, color=BLUE, rwidth=0.9)
    axes.set_ylim(0, 1.3 * axes.get_ylim()[1])  # room for the words
    axes.set_ylabel("images")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.text(
        0.98,
        0.95,
        f"median {np.median(counts):g}, most {counts.max():,}\n{(counts == 0).sum():,} images without objects",
        transform=axes.transAxes,
        ha="right",
        va="top",
        fontsize=9,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 2},
    )


def _recall(axes: Any, data: Data, fit: Fit) -> None:
    axes.set_title("Share of the boxes that an anchor fits", loc="left")
    if not len(fit.best):
        return _nothing(axes)
    groups = {f"P{level}": fit.best[fit.levels == level] for level in fit.anchors.sizes}
    groups = {"all": fit.best, **groups}
    for place, (iou, colour) in enumerate(((0.5, SKY), (0.7, BLUE))):
        heights = [float((best >= iou).mean()) if len(best) else 0.0 for best in groups.values()]
        x = np.arange(len(groups)) + 0.4 * (place - 0.5)
        axes.bar(x, heights, 0.38, color=colour, label=f"IoU {iou} or more")
        for left, height, best in zip(x, heights, groups.values(), strict=True):
            if len(best):
                axes.text(left, height + 0.015, f"{100 * height:.0f}", ha="center", fontsize=8.5)
    axes.set_xticks(range(len(groups)), [f"{name}\n{len(best):,}" for name, best in groups.items()])
    axes.set_xlabel("level, and the number of boxes that it fits best")
    axes.set_ylim(0, 1.22)
    axes.set_yticks([0, 0.5, 1], ["0", "50 %", "100 %"])
    axes.legend(frameon=False, ncols=2, loc="upper right", fontsize=9, borderaxespad=0)


PANELS = {"classes": _classes, "sizes": _sizes, "shapes": _shapes, "objects": _objects, "recall": _recall}


def _log_histogram(axes: Any, values: np.ndarray, low: float, high: float) -> None:
    """Bars on a logarithmic axis; what lies beyond its ends is counted in the last bars."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    edges = np.geomspace(low, high, 49)
    axes.hist(np.clip(values, low * (1 + 1e-9), high * (1 - 1e-9)), edges, color=BLUE, rwidth=0.92)
    axes.set_xscale("log", base=2)
    axes.set_xlim(low, high)
    axes.xaxis.set_major_locator(LogLocator(base=2, numticks=14))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}" if value >= 1 else f"1/{1 / value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_ylim(0, 1.25 * axes.get_ylim()[1])  # room for the marks' names


def _marks(axes: Any, marks: dict[str, float], words: str) -> None:
    """A dashed line at each value, with its name at the top."""
    for name, value in marks.items():
        axes.axvline(value, color=ORANGE, lw=1.3, ls=(0, (4, 3)))
        axes.annotate(
            name,
            (value, 1),
            (3, -2),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            color=ORANGE,
            fontsize=8.5,
            va="top",
        )
    axes.plot([], [], color=ORANGE, lw=1.3, ls=(0, (4, 3)), label=words)
    axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), fontsize=9, borderaxespad=0.3)


def _nothing(axes: Any) -> None:
    axes.text(0.5, 0.5, "no boxes", transform=axes.transAxes, ha="center", color=INK)
    axes.set_xticks([])
    axes.set_yticks([])


def _short(name: str) -> str:
    return name if len(name) <= LETTERS else f"{name[: LETTERS - 1]}…"


def _plain(text: str) -> str:
    """Text in which matplotlib sees no formula."""
    return text.replace("$", r"\$")
