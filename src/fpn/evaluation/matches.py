"""Which detection finds which object, as the COCO evaluation decides it, and what follows: precision and recall.

For the numbers of a whole split there is `fpn.evaluation.metrics`; here every single match can be asked for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Int

from fpn.data.dataset import Split
from fpn.evaluation.coco import IOUS, RECALLS, best_of_each, box_pairs, find
from fpn.evaluation.metrics import Results, as_given, rounded


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
    (boxes, scores), classes = rounded(results), max(1, len(split.classes))
    groups, groups_of = results.indices * classes + results.labels, split.image_of * classes + split.labels
    rows, _ = best_of_each(groups, scores, limit)
    objects = np.argsort(groups_of, kind="stable")
    crowd = split.ignore[objects]
    pairs = box_pairs(groups[rows], boxes[rows], groups_of[objects], as_given(split.boxes[objects]), crowd)
    taken = find(pairs, groups[rows], crowd, crowd[None])
    iou, place = np.nonzero(taken.objects[:, 0] >= 0)
    ours, theirs = rows[taken.finders[place]], objects[taken.objects[iou, 0, place]]

    finder = np.full((len(IOUS), len(split.boxes)), -1)
    right, counted = np.zeros((2, len(IOUS), len(results.scores)), dtype=bool)
    counted[:, rows] = True
    wanted = ~split.ignore[theirs]
    right[iou, ours] = counted[iou, ours] = wanted
    finder[iou[wanted], theirs[wanted]] = ours[wanted]
    return Matches(finder, right, counted)


def as_written(results: Results) -> Results:
    """The boxes and scores as `fpn.evaluation.metrics.to_coco` rounds them, which is how they are scored."""
    boxes, scores = rounded(results)
    return replace(results, boxes=np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1), scores=scores)


def best_first(split: Split, results: Results) -> Int[np.ndarray, " n"]:
    """The rows of the detections by score, highest first; of equal ones in the order that COCO's code has them in."""
    return np.lexsort((split.image_ids[results.indices], -as_written(results).scores))


def average_precision(right: Bool[np.ndarray, " n"], objects: int) -> float:
    """The precision averaged over 101 recalls, of detections in the order of their scores, highest first."""
    hits = np.cumsum(right)
    precision = np.maximum.accumulate((hits / np.arange(1, len(right) + 1))[::-1])[::-1]
    place = np.searchsorted(hits / objects, RECALLS)
    return float(np.append(precision, 0.0)[place].mean())
