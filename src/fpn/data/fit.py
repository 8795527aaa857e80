"""How well a detector's input size, anchors and limits fit the boxes of a data set, and what would fit better.

Everything here works on arrays of all boxes at once: 800,000 boxes take seconds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int

from fpn.data.dataset import Split
from fpn.data.sizes import SHORT
from fpn.model.anchors import Anchors, cell_anchors
from fpn.words import listed

MULTIPLE = 32  # images are padded to multiples of this many pixels, see `fpn.data.batching.collate`
SHORT_ON_CPU = 384  # 800 takes four times as long, too long without a GPU
SEARCHED = 4000  # boxes that better anchors are looked for on; how well they do is measured on all

TINY, SMALL = 8.0, 16.0  # sides in pixels: two and four cells of P2
MANY_SMALL = 0.1  # share of small boxes that calls for a larger input
LARGEST_STEP = 2.0  # a larger input than this many times the present one costs too much: cut the images up
UNUSED = 0.005  # a level that fits a smaller share of the boxes than this best is not used
GAIN = {"recall_50": 0.03, "recall_70": 0.1}  # other anchors are worth telling from here on
SIZES = [round(8 * 2 ** (step / 4)) for step in range(29)]  # 8 to 1024 pixels, what anchors are chosen from
DETECTIONS, PROPOSALS = 100, (2000, 1000)  # the detector's own limits an image
CANDIDATES = 1000  # of each level, of one-stage detectors
LIMITS: dict[str, Any] = {"max_detections": DETECTIONS, "proposals": PROPOSALS, "proposals_per_level": PROPOSALS}
STRIDES = (2, 16)  # sides of sensible anchors in strides of their level; 8 in the paper


@dataclass(frozen=True)
class Fit:
    """The M boxes of a data set as the detector sees them, and how well the anchors of each level fit each box.

    boxes: pixels of the resized images. sizes: height and width of the resized image of each box. ious: the highest IoU
    of each box with any anchor of each level.
    """

    short: int
    long: int
    anchors: Anchors
    boxes: Float[np.ndarray, "M 4"]
    sizes: Int[np.ndarray, "M 2"]
    ious: Float[np.ndarray, "M L"]

    @cached_property
    def sides(self) -> Float[np.ndarray, " M"]:
        """Square roots of the boxes' areas in pixels."""
        return np.sqrt(np.prod(self.boxes[:, 2:] - self.boxes[:, :2], axis=1))

    @cached_property
    def ratios(self) -> Float[np.ndarray, " M"]:
        """Height / width of the boxes, as the anchors' ratios."""
        width, height = (self.boxes[:, 2:] - self.boxes[:, :2]).T
        return height / np.maximum(width, 1e-9)

    @cached_property
    def best(self) -> Float[np.ndarray, " M"]:
        """The best IoU of each box with any anchor."""
        return self.ious.max(axis=1)

    @cached_property
    def levels(self) -> Int[np.ndarray, " M"]:
        """The level whose anchors fit each box best."""
        return np.array(list(self.anchors.sizes))[self.ious.argmax(axis=1)]

    def with_anchors(self, anchors: Anchors) -> Fit:
        """The fit of other anchors to the same boxes."""
        return replace(self, anchors=anchors, ious=best_ious(self.boxes, self.sizes, anchors))

    def recall(self, iou: float) -> float:
        """The share of the boxes that some anchor overlaps with at least this IoU."""
        return float((self.best >= iou).mean())

    def as_dict(self) -> dict[str, Any]:
        """The numbers by level and over all, ready for JSON; those of a level are of the boxes that it fits best."""
        rows = {level: self.best[self.levels == level] for level in self.anchors.sizes}
        return {
            "short": self.short,
            "long": self.long,
            "anchors": list(self.anchors.sizes.values()),
            "ratios": list(self.anchors.ratios),
            **_summary(self.best),
            "levels": {
                f"P{level}": {"anchor": self.anchors.sizes[level], **_summary(best)} for level, best in rows.items()
            },
        }


def _summary(best: Float[np.ndarray, " n"]) -> dict[str, Any]:
    if not len(best):
        return {"boxes": 0}
    recalls = {f"recall_{round(100 * iou)}": round(float((best >= iou).mean()), 4) for iou in (0.5, 0.7)}
    return {"boxes": len(best), "mean_iou": round(float(best.mean()), 4), **recalls}


def default_short(device: torch.device) -> int:
    """The shorter side of the resized images in pixels, where it is left out of `fpn train`."""
    return SHORT_ON_CPU if device.type == "cpu" else SHORT


def measure(splits: Iterable[Split], short: int, long: int, anchors: Anchors) -> Fit:
    """The fit of anchors to all boxes that are learnt from, with images resized as for training."""
    boxes, sizes = [np.zeros((0, 4))], [np.zeros((0, 2), np.int64)]
    for split in splits:
        rows = split.image_of[~split.ignore]
        resized = resized_sizes(split.sizes, short, long)
        scale = (resized / np.maximum(split.sizes, 1))[rows][:, [1, 0, 1, 0]]
        boxes.append(split.boxes[~split.ignore] * scale)
        sizes.append(resized[rows])
    all_boxes, all_sizes = np.concatenate(boxes), np.concatenate(sizes)
    return Fit(short, long, anchors, all_boxes, all_sizes, best_ious(all_boxes, all_sizes, anchors))


def resized_sizes(sizes: Int[np.ndarray, "I 2"], short: int, long: int) -> Int[np.ndarray, "I 2"]:
    """`fpn.data.sizes.resized_size` of many images at once."""
    smaller, larger = np.maximum(sizes.min(axis=1), 1), sizes.max(axis=1)
    new_smaller, new_larger = np.full(len(sizes), short), (short * larger / smaller).astype(np.int64)
    limited = new_larger > long
    shrunk = np.maximum(1, (long * new_smaller / np.maximum(new_larger, 1)).astype(np.int64))
    new_smaller, new_larger = np.where(limited, shrunk, new_smaller), np.where(limited, long, new_larger)
    tall = sizes[:, 0] > sizes[:, 1]
    return np.stack([np.where(tall, new_larger, new_smaller), np.where(tall, new_smaller, new_larger)], axis=1)


def best_ious(
    boxes: Float[np.ndarray, "M 4"], sizes: Int[np.ndarray, "M 2"], anchors: Anchors
) -> Float[np.ndarray, "M L"]:
    """For each box and level the highest IoU with any of the anchors laid on the box's image, padded by itself."""
    per_level = [
        np.max([_best_iou(boxes, sizes, level, cell, anchors) for cell in _cells(anchors, size)], axis=0)
        for level, size in anchors.sizes.items()
    ]
    return np.stack(per_level, axis=1)


def _cells(anchors: Anchors, size: float) -> list[list[float]]:
    """Width and height of the anchors of a cell."""
    cells = cell_anchors(size, anchors.ratios, anchors.whole_pixels, anchors.scales).double()
    return (cells[:, 2:] - cells[:, :2]).tolist()


def _best_iou(
    boxes: Float[np.ndarray, "M 4"],
    sizes: Int[np.ndarray, "M 2"],
    level: int,
    anchor: list[float],
    anchors: Anchors,
) -> Float[np.ndarray, " M"]:
    """The highest IoU of each box with anchors of one width and height on every cell of a level.

    IoU grows with the overlap in x and with that in y, and each is largest at the nearest column and the nearest row.
    """
    overlap = np.ones(len(boxes))
    for axis, side in enumerate(anchor):
        low, high = boxes[:, axis], boxes[:, axis + 2]
        padded = -(-sizes[:, 1 - axis] // MULTIPLE) * MULTIPLE
        cells = -(-padded // 2**level)
        stride = padded // cells if anchors.floor_stride else 2**level
        centre = (low + high) / 2
        nearest = np.clip(np.rint(centre / stride - anchors.offset), 0, cells - 1) + anchors.offset
        distance = np.abs(centre - nearest * stride)
        overlap *= np.clip((high - low + side) / 2 - distance, 0, np.minimum(high - low, side))
    area = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    return overlap / np.maximum(area + anchor[0] * anchor[1] - overlap, 1e-9)


@dataclass(frozen=True)
class Advice:
    """One thing that would fit the data better, in words, and the options that say the same to `fpn.build`."""

    topic: str
    text: str
    options: dict[str, Any] = field(default_factory=dict)


def advise(fit: Fit) -> list[Advice]:
    """What to change about input size and anchors, where it would matter.

    Anchors are advised for the present input size; their sizes for the ratios that are advised, where some are.
    """
    if not len(fit.boxes):
        return []
    size, ratios = _larger_input(fit) or _unused_bottom(fit), _other_ratios(fit)
    if ratios is not None:
        fit = fit.with_anchors(replace(fit.anchors, ratios=tuple(ratios.options["anchor_ratios"])))
    return [advice for advice in (size, ratios, _other_sizes(fit, ratios is not None)) if advice is not None]


def _larger_input(fit: Fit) -> Advice | None:
    small, tiny = (float((fit.sides < side).mean()) for side in (SMALL, TINY))
    if small < MANY_SMALL:
        return None
    low = max(0.1, float(np.quantile(fit.sides, MANY_SMALL)))
    fact = f"{percent(small)} of the boxes are under {SMALL:g} pixels at training size ({percent(tiny)} under {TINY:g})"
    if SMALL / low > LARGEST_STEP:
        parts = math.ceil(SMALL / low)
        return Advice(
            "input size",
            f"{fact}, too small for any practical --short: cut the images into tiles that overlap, about "
            f"{parts}x{parts} of them an image; --short {2 * fit.short} is half a remedy",
            {"short": 2 * fit.short},
        )
    short = math.ceil(fit.short * SMALL / low / MULTIPLE) * MULTIPLE
    left = float((fit.sides * short / fit.short < SMALL).mean())
    return Advice(
        "input size",
        f"{fact}, where there is little to recognise: --short {short} leaves {percent(left)}, at "
        f"{(short / fit.short) ** 2:.1f} times the time and memory an image",
        {"short": short},
    )


def _unused_bottom(fit: Fit) -> Advice | None:
    """The lowest levels have most of the anchors and of the work; large objects alone do not need them."""
    shares = [float((fit.levels == level).mean()) for level in fit.anchors.sizes]
    unused = next((n for n, share in enumerate(shares) if share >= UNUSED), 0)
    short = math.ceil(fit.short / 2**unused / MULTIPLE) * MULTIPLE
    if short > 0.75 * fit.short:
        return None
    names = listed([f"P{level}" for level in list(fit.anchors.sizes)[:unused]])
    verb, them = ("fits", "it") if unused == 1 else ("fit", "them")
    time = percent((short / fit.short) ** 2)
    return Advice(
        "levels",
        f"{names} {verb} hardly any box, though most of the anchors and of the work are there: --short {short} moves "
        f"the boxes down to {them} and takes {time} of the time an image; keep {fit.short} where fine detail tells the "
        "classes apart",
        {"short": short},
    )


def _other_ratios(fit: Fit) -> Advice | None:
    """Ratios that halve thirds of the boxes, so that long boxes get long anchors."""
    count = len(fit.anchors.ratios)
    quantiles = np.quantile(fit.ratios.clip(0.05, 20), (np.arange(count) + 0.5) / count)
    ratios = tuple(sorted({float(f"{ratio:.2g}") for ratio in quantiles}))
    other = fit.with_anchors(replace(fit.anchors, ratios=ratios))
    if not _matters(fit, other):
        return None
    return Advice(
        "anchor ratios",
        f"the boxes are not shaped like the anchors (median height / width {np.median(fit.ratios):.2g}): --ratios "
        f"{' '.join(f'{ratio:g}' for ratio in ratios)} {_gain(fit, other)}",
        {"anchor_ratios": list(ratios)},
    )


def _other_sizes(fit: Fit, with_ratios: bool) -> Advice | None:
    sizes = better_sizes(fit)
    other = fit.with_anchors(replace(fit.anchors, sizes=sizes))
    if not _matters(fit, other):
        return None
    unused = [f"P{level}" for level in fit.anchors.sizes if (fit.levels == level).mean() < UNUSED]
    idle = f"; {listed(unused)} {'fits' if len(unused) == 1 else 'fit'} hardly any box now" if unused else ""
    given = "with these ratios, " if with_ratios else ""
    return Advice(
        "anchor sizes",
        f"{given}--anchors {' '.join(f'{size:g}' for size in sizes.values())} {_gain(fit, other)}{idle}",
        {"anchor_sizes": list(sizes.values())},
    )


def better_sizes(fit: Fit) -> dict[int, float]:
    """Anchor sizes with a higher mean best IoU, one level changed at a time until no change helps.

    A k-medians of sizes with 1 - IoU as distance, on the anchors' real grids: sizes grow from level to level and stay
    within sensible multiples of its stride.
    """
    chosen = np.random.default_rng(0).permutation(len(fit.boxes))[:SEARCHED]
    boxes, sizes, levels = fit.boxes[chosen], fit.sizes[chosen], list(fit.anchors.sizes)
    allowed = {level: [s for s in SIZES if STRIDES[0] <= s / 2**level <= STRIDES[1]] for level in levels}
    tried = {
        (level, float(size)): best_ious(boxes, sizes, replace(fit.anchors, sizes={level: float(size)}))[:, 0]
        for level in levels
        for size in {*allowed[level], fit.anchors.sizes[level]}
    }
    now, before = dict(fit.anchors.sizes), None
    while now != before:
        before = dict(now)
        for level in levels:
            others = np.max([tried[k, now[k]] for k in levels if k != level] or [np.zeros(len(boxes))], axis=0)
            low, high = now.get(level - 1, 0.0), now.get(level + 1, math.inf)
            for size in (s for s in map(float, allowed[level]) if low <= s <= high):
                gain = np.maximum(others, tried[level, size]) - np.maximum(others, tried[level, now[level]])
                if gain.mean() > 1e-4:
                    now[level] = size
    return now


def _matters(fit: Fit, other: Fit) -> bool:
    gains = (other.recall(0.5) - fit.recall(0.5), other.recall(0.7) - fit.recall(0.7))
    return min(gains) > -0.01 and (gains[0] >= GAIN["recall_50"] or gains[1] >= GAIN["recall_70"])


def _gain(fit: Fit, other: Fit) -> str:
    changes = [
        f"from {percent(fit.recall(iou))} to {percent(other.recall(iou))} at IoU {iou}"
        for iou in (0.5, 0.7)
        if other.recall(iou) - fit.recall(iou) > 0.01
    ]
    return f"would raise the share of boxes that an anchor fits {' and '.join(changes)}"


def percent(share: float) -> str:
    """A share from 0 to 1 in words.

    >>> percent(0.718)
    '72 %'
    """
    return f"{100 * share:.0f} %"


def most_boxes(splits: Iterable[Split]) -> tuple[int, str]:
    """The number of objects in the densest image of all splits, and which image that is ("" where there is none)."""
    most, where = 0, ""
    for split in splits:
        counts = objects_by_image(split)
        if counts.max(initial=0) > most:
            most, where = int(counts.max()), str(split.files[counts.argmax()])
    return most, where


def objects_by_image(split: Split) -> Int[np.ndarray, " I"]:
    """How many boxes each image has that are learnt from."""
    rows = split.image_of
    return np.bincount(rows[~split.ignore], minlength=len(split))


def caps(data: Mapping[str, Split], settings: Mapping[str, Any] = LIMITS) -> dict[str, Any]:
    """The limits of a detector that the densest image needs, as settings for `fpn.build`; {} where its own suffice.

    settings: the detector's own, of which those that are too low are raised; see `fpn.spec.all_settings`. Up to 100
    objects the field's 100 detections an image stay, for numbers that compare. Beyond it there is room for a fifth more
    than were ever seen, and for two proposals or candidates a detection.
    """
    most, _ = most_boxes(data.values())
    if most <= DETECTIONS:
        return {}
    detections = round_up(1.2 * most)
    room = round_up(2 * detections)
    needed = {"max_detections": detections, "proposals": room, "proposals_per_level": room, "candidates": room}
    raised = {name: at_least(settings[name], least) for name, least in needed.items() if name in settings}
    return {name: value for name, value in raised.items() if value != settings[name]}


def at_least(limit: Any, least: int) -> Any:
    """A limit, or a pair of them for training and detection, raised to `least` where it is lower."""
    return tuple(max(part, least) for part in limit) if isinstance(limit, tuple) else max(limit, least)


def round_up(number: float) -> int:
    """To two leading digits: 137 -> 140, 6001 -> 6100."""
    unit = 10 ** max(0, math.floor(math.log10(max(number, 1))) - 1)
    return math.ceil(number / unit) * unit
