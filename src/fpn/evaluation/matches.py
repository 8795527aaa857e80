"""Which detection finds which object, as the COCO evaluation decides it, and what follows: precision and recall.

For the numbers of a whole split there is `fpn.evaluation.metrics`; here every single match can be asked for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from fpn import boxes as box
from fpn.data.dataset import Split
from fpn.evaluation.metrics import Results, rounded

IOUS = np.linspace(0.5, 0.95, 10)  # COCO's
RECALLS = np.linspace(0, 1, 101)


@dataclass(frozen=True)
class Matches:
    """Who found whom at each of the `IOUS`: M objects of a split, n detections.

    finder: the row of the detection that found the object, -1 where none did. right: whether a detection found an
    object; counted: whether it counts at all, being neither on a crowd nor beyond the limit of detections.
    """

    finder: Int[np.ndarray, "10 M"]
    right: Bool[np.ndarray, "10 n"]
    counted: Bool[np.ndarray, "10 n"]


def matches(split: Split, results: Results, limit: int = 100) -> Matches:
    """The matches of the `limit` best detections of each class in each image.

    Highest score first, each detection takes the free object of its class that it overlaps most, if by the IoU or more.
    One that finds none, but lies on a crowd, does not count.
    """
    results = as_written(results)
    found = Matches(
        np.full((len(IOUS), len(split.boxes)), -1),
        np.zeros((len(IOUS), len(results.scores)), dtype=bool),
        np.ones((len(IOUS), len(results.scores)), dtype=bool),
    )
    classes = max(1, len(split.classes))
    objects, detections = split.image_of * classes + split.labels, results.indices * classes + results.labels
    object_rows = np.argsort(objects, kind="stable")
    rows = np.lexsort((-results.scores, detections))
    groups, starts, counts = np.unique(detections[rows], return_index=True, return_counts=True)
    firsts = np.searchsorted(objects[object_rows], groups)
    lasts = np.searchsorted(objects[object_rows], groups, side="right")
    for start, count, first, last in np.stack([starts, counts, firsts, lasts], axis=1).tolist():
        own = rows[start : start + count]
        found.counted[:, own[limit:]] = False
        if last > first:
            _match(split, results, own[:limit], object_rows[first:last], found)
    return found


def _match(
    split: Split, results: Results, detections: Int[np.ndarray, " d"], objects: Int[np.ndarray, " g"], found: Matches
) -> None:
    """Fill in the matches of one class in one image."""
    crowd = split.ignore[objects]
    overlap = _iou(results.boxes[detections], split.boxes[objects[~crowd]])
    covered = _covered(results.boxes[detections], split.boxes[objects[crowd]]).max(axis=1, initial=0.0)
    objects, wanted = objects[~crowd], np.minimum(IOUS, 1 - 1e-10)  # a perfect box must not fail by rounding
    on_crowd = covered >= wanted[:, None]
    for n in np.flatnonzero(overlap.max(axis=1, initial=0.0) >= wanted[0]).tolist():
        free = np.where(found.finder[:, objects] < 0, overlap[n], -1.0)
        best = free.shape[1] - 1 - free[:, ::-1].argmax(axis=1)  # the last of equals, as in COCO's code
        hit = np.flatnonzero(free[np.arange(len(wanted)), best] >= wanted)
        found.finder[hit, objects[best[hit]]] = detections[n]
        found.right[hit, detections[n]] = True
    found.counted[:, detections] &= found.right[:, detections] | ~on_crowd


def as_written(results: Results) -> Results:
    """The boxes and scores as `fpn.evaluation.metrics.to_coco` rounds them, which is how they are scored."""
    boxes, scores = rounded(results)
    return replace(results, boxes=np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1), scores=scores)


def best_first(split: Split, results: Results) -> Int[np.ndarray, " n"]:
    """The rows of the detections by score, highest first; of equal ones in the order that COCO's code has them in."""
    return np.lexsort((split.image_ids[results.indices], -as_written(results).scores))


def _iou(a: Float[np.ndarray, "n 4"], b: Float[np.ndarray, "m 4"]) -> Float[np.ndarray, "n m"]:
    return box.iou(torch.from_numpy(a), torch.from_numpy(b)).numpy()


def _covered(a: Float[np.ndarray, "n 4"], b: Float[np.ndarray, "m 4"]) -> Float[np.ndarray, "n m"]:
    """How much of each box of `a` lies in each box of `b`: COCO's overlap with crowds."""
    low, high = np.maximum(a[:, None, :2], b[None, :, :2]), np.minimum(a[:, None, 2:], b[None, :, 2:])
    area = np.prod(a[:, 2:] - a[:, :2], axis=1)[:, None]
    return np.prod(np.clip(high - low, 0, None), axis=2) / np.maximum(area, 1e-12)


def average_precision(right: Bool[np.ndarray, " n"], objects: int) -> float:
    """The precision averaged over 101 recalls, of detections in the order of their scores, highest first."""
    hits = np.cumsum(right)
    precision = np.maximum.accumulate((hits / np.arange(1, len(right) + 1))[::-1])[::-1]
    place = np.searchsorted(hits / objects, RECALLS)
    return float(np.append(precision, 0.0)[place].mean())
