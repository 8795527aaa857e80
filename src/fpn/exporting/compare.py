"""Two detectors on the same images: which detections both have, and how far these are apart."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from fpn import boxes as box
from fpn.data.sizes import resized_size
from fpn.structures import Detections


@dataclass(frozen=True)
class Bound:
    """What an exported detector may differ by from its original; see `typical` for what is compared with it."""

    missing: float  # share of the detections of both that the other lacks, or has from another level of the pyramid
    score: float
    box: float  # of the sides of a box, in pixels of the image as the detector resizes it
    mask: float  # of the probabilities in a mask
    AP: float  # of any of the numbers by which the detector is judged

    @property
    def margin(self) -> float:
        """How near to the lowest score that is given out a detection must be for chance to decide on it."""
        return min(0.25, 10 * self.score)


@dataclass(frozen=True)
class Tally:
    """One image, or several: detections of the original and of the other, and what they differ in."""

    images: int
    empty: int  # images in which the original finds nothing
    original: int
    exported: int
    missing: int  # those of either that the other lacks
    moved: int  # those of both that come from another level
    scores: Float[Tensor, " M"]  # differences of the M that both have
    boxes: Float[Tensor, " M"]
    masks: Float[Tensor, " _"]  # empty where there are none

    @classmethod
    def total(cls, parts: Iterable[Tally]) -> Tally:
        parts = [NOTHING, *parts]
        values: dict[str, Any] = {name: sum(getattr(part, name) for part in parts) for name in COUNTS}
        values |= {name: torch.cat([getattr(part, name) for part in parts]) for name in DIFFERENCES}
        return cls(**values)


COUNTS = ("images", "empty", "original", "exported", "missing", "moved")
DIFFERENCES = ("scores", "boxes", "masks")
NOTHING = Tally(0, 0, 0, 0, 0, 0, torch.zeros(0), torch.zeros(0), torch.zeros(0))


def compare(
    original: Detections,
    exported: Detections,
    size: tuple[int, int],
    sides: tuple[int, int],
    lowest: float,
    most: int,
    margin: float,
) -> Tally:
    """The detections of one image (height, width) by two detectors that resize it to `sides` (`Spec.sides`).

    lowest, most: the score from which on detections are given out, and how many at most. What one of them has within
    `margin` of where the other's list ends is not missing there.
    """
    pairs = counterparts(original, exported)
    ours = pairs >= 0
    theirs = torch.zeros(len(exported), dtype=torch.bool)
    theirs[pairs[ours]] = True
    end = [list_end(found, lowest, most) + margin for found in (original, exported)]
    lost = (original.scores[~ours] >= end[1]).sum() + (exported.scores[~theirs] >= end[0]).sum()
    a, b = original.take(ours), exported.take(pairs[ours])
    height, width = (new / old for new, old in zip(resized_size(size, *sides), size, strict=True))
    apart = (a.boxes - b.boxes).abs() * torch.tensor([width, height, width, height])
    masks = torch.zeros(0)
    if a.masks is not None and b.masks is not None:
        masks = (a.masks - b.masks).abs().flatten(1).mean(1)
    moved = int((a.levels != b.levels).sum())
    counts = (1, int(not len(original)), len(original), len(exported), int(lost), moved)
    return Tally(*counts, (a.scores - b.scores).abs(), apart.mean(1), masks)


def counterparts(a: Detections, b: Detections) -> Int64[Tensor, " N"]:
    """For each detection of `a` the place of the one in `b` that is the same: of its class, and each overlaps no other
    so much, by half at least. -1 where there is none."""
    if not len(a) or not len(b):
        return torch.full((len(a),), -1)
    overlap = box.iou(a.boxes, b.boxes) * (a.labels[:, None] == b.labels)
    # Proposals cut at the border of the image can be the same box twice, from two levels.
    other = 0.01 * (a.scores[:, None] - b.scores).abs() + 0.001 * (a.levels[:, None] != b.levels)
    place = (overlap - other).argmax(1)
    here = torch.arange(len(a))
    mutual = (overlap - other).argmax(0)[place] == here
    return torch.where(mutual & (overlap[here, place] >= 0.5), place, -1)


def list_end(found: Detections, lowest: float, most: int) -> float:
    """The score below which this list cannot have anything."""
    return float(found.scores.min()) if len(found) >= most else lowest


def best(found: Detections, most: int) -> Detections:
    """The first of one image's detections."""
    return found.take(torch.arange(min(most, len(found))))


def faults(case: str, tally: Tally, bound: Bound) -> list[str]:
    """What of this is above the bound, in words."""
    both = tally.original + tally.exported
    found = []
    for count, what in ((tally.missing, "have no counterpart"), (2 * tally.moved, "come from another level")):
        if count > bound.missing * both:
            found.append(f"{case}: {count} of {both} detections {what} (at most {bound.missing:.0%})")
    for what, values, limit in differences(tally, bound):
        if values.numel() and not (difference := typical(values)) <= limit:  # NaN is a fault too
            found.append(f"{case}: {what} differ by {difference:.3g} (at most {limit:g})")
    return found


def typical(values: Float[Tensor, " M"]) -> float:
    """The median: of two overlapping boxes that score alike either may have stayed, which says nothing of the rest."""
    if values.isnan().any():
        return math.nan
    ordered = values.sort().values
    return float(ordered[[(len(values) - 1) // 2, len(values) // 2]].mean())


def differences(tally: Tally, bound: Bound) -> tuple[tuple[str, Tensor, float], ...]:
    return (
        ("scores", tally.scores, bound.score),
        ("boxes", tally.boxes, bound.box),
        ("masks", tally.masks, bound.mask),
    )
