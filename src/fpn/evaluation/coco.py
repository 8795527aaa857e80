"""The COCO evaluation on arrays: overlaps, which detection finds which object, precision and recall.

The rules are those of Lin et al. 2014 and its reference code, pycocotools, whose numbers come out to 1e-15. All images
are looked at together: first the best detection of each takes its pick, at all IoUs and for all sizes of object at
once, then the second best. So time grows with detections and objects, not with images times classes.

A group is what belongs together, a class in an image. Detections (n) stand by group and then score, the highest first,
objects (M) by group; S is the number of sizes of object.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

IOUS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)
_REACHED = np.minimum(IOUS, 1 - 1e-10)[:, None, None]  # a perfect box must not fail by rounding
_AT_ONCE = 2**17  # pairs whose overlap is worked out at once: about 15 MB


@dataclass(frozen=True)
class Pairs:
    """The P pairs of a detection and an object of its group whose overlap is the lowest of `IOUS` or more."""

    detections: Int[np.ndarray, " P"]
    objects: Int[np.ndarray, " P"]
    overlaps: Float[np.ndarray, " P"]


@dataclass(frozen=True)
class Found:
    """What each of the F detections that find anything finds, by IoU and size: an object or, where nothing, -1."""

    finders: Int[np.ndarray, " F"]
    objects: Int[np.ndarray, "10 S F"]


def best_of_each(
    groups: Int[np.ndarray, " n"], scores: Float[np.ndarray, " n"], limit: int
) -> tuple[Int[np.ndarray, " m"], Int[np.ndarray, " m"]]:
    """The rows of the `limit` best of each group, by group and then score, and the place of each in its group."""
    rows = np.lexsort((-scores, groups))  # of equal ones the first stays first
    ranks = _places(groups[rows])
    return rows[ranks < limit], ranks[ranks < limit]


def _places(groups: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    return np.arange(len(groups)) - np.searchsorted(groups, groups)


def box_pairs(
    groups: Int[np.ndarray, " n"],
    boxes: Float[np.ndarray, "n 4"],
    of: Int[np.ndarray, " M"],
    objects: Float[np.ndarray, "M 4"],
    crowd: Bool[np.ndarray, " M"],
) -> Pairs:
    """The pairs of detections and objects (x, y, width, height), the latter in the groups `of`.

    The overlap with a crowd is the part of the detection that lies on it.
    """
    firsts, lasts = np.searchsorted(of, groups), np.searchsorted(of, groups, side="right")
    ours, theirs = np.ascontiguousarray(boxes.T), np.ascontiguousarray(objects.T)
    rows = np.flatnonzero(lasts > firsts)
    parts = np.split(rows, np.flatnonzero(np.diff(np.cumsum((lasts - firsts)[rows]) // _AT_ONCE)) + 1)
    pairs = [_box_pairs(part, firsts[part], lasts[part], ours, theirs, crowd) for part in parts]
    return Pairs(*(np.concatenate(column) for column in zip(*pairs, strict=True)))


def _box_pairs(
    rows: Int[np.ndarray, " r"],
    firsts: Int[np.ndarray, " r"],
    lasts: Int[np.ndarray, " r"],
    boxes: Float[np.ndarray, "4 n"],
    objects: Float[np.ndarray, "4 M"],
    crowd: Bool[np.ndarray, " M"],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    counts = lasts - firsts
    d = np.repeat(rows, counts)
    g = np.arange(len(d)) + np.repeat(firsts - np.cumsum(counts) + counts, counts)
    (x, y, w, h), (gx, gy, gw, gh) = boxes[:, d], objects[:, g]
    width = np.minimum(x + w, gx + gw) - np.maximum(x, gx)
    height = np.minimum(y + h, gy + gh) - np.maximum(y, gy)
    both = width.clip(0) * height.clip(0)
    union = np.where(crowd[g], w * h, w * h + gw * gh - both)
    overlap = np.divide(both, union, out=np.zeros_like(both), where=both > 0)
    kept = overlap >= _REACHED[0, 0, 0]
    return d[kept], g[kept], overlap[kept]


def mask_pairs(
    groups: Int[np.ndarray, " n"],
    mask: Callable[[int], dict],
    of: Int[np.ndarray, " M"],
    outline: Callable[[int], dict],
    crowd: Bool[np.ndarray, " M"],
) -> Pairs:
    """As `box_pairs`, by the overlap of masks. `mask` and `outline` give run lengths, of a detection and an object."""
    from faster_coco_eval.core import mask as api

    found = [(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))]
    for group in np.intersect1d(groups, of).tolist():
        d, g = (np.arange(*np.searchsorted(side, (group, group + 1))) for side in (groups, of))
        masks, outlines = [mask(row) for row in d.tolist()], [outline(row) for row in g.tolist()]
        overlap = np.asarray(api.iou(masks, outlines, crowd[g].astype(int).tolist()))
        rows, columns = np.nonzero(overlap >= _REACHED[0, 0, 0])
        found.append((d[rows], g[columns], overlap[rows, columns]))
    return Pairs(*(np.concatenate(column) for column in zip(*found, strict=True)))


def find(
    pairs: Pairs, groups: Int[np.ndarray, " n"], crowd: Bool[np.ndarray, " M"], left_out: Bool[np.ndarray, "S M"]
) -> Found:
    """Each detection takes the free object that it overlaps most, if by the IoU or more; of equals the last.

    A crowd can be taken any number of times. Objects that are left out, as crowds and those of other sizes are, are
    taken only by detections that find no other.
    """
    candidates, candidate = np.unique(pairs.detections, return_inverse=True)
    taken = np.zeros((len(IOUS), *left_out.shape), dtype=bool)
    turns = _places(groups[candidates])[candidate]
    # Pairs of a turn together, those of a detection together with the best last, so that a pair's place is its worth.
    order = np.lexsort((pairs.objects, pairs.overlaps, candidate, turns))
    finders, found = [candidates[:0]], [np.zeros((*taken.shape[:2], 0), np.int64)]
    for rows in np.split(order, np.flatnonzero(np.diff(turns[order])) + 1) if len(order) else ():
        theirs = pairs.objects[rows]
        free = (pairs.overlaps[rows] >= _REACHED) & (crowd[theirs] | ~taken[:, :, theirs])
        worth = np.where(free, np.arange(len(rows)) + len(rows) * ~left_out[:, theirs], -1)
        firsts = np.flatnonzero(np.diff(candidate[rows], prepend=-1))
        best = np.maximum.reduceat(worth, firsts, axis=2)
        picks = np.where(best >= 0, theirs[best % len(rows)], -1)
        iou, size, place = np.nonzero(picks >= 0)
        taken[iou, size, picks[iou, size, place]] = True
        successful = np.unique(place)
        finders.append(pairs.detections[rows[firsts[successful]]])
        found.append(picks[:, :, successful])
    return Found(np.concatenate(finders), np.concatenate(found, axis=2))


def precision_and_recall(
    found: Found,
    scores: Float[np.ndarray, " n"],
    ranks: Int[np.ndarray, " n"],
    inside: Bool[np.ndarray, "S n"],
    left_out: Bool[np.ndarray, "S M"],
    limits: tuple[int, ...],
) -> tuple[Float[np.ndarray, "10 101 S"], Float[np.ndarray, "10 S L"]]:
    """Precision at each of `RECALLS`, and the recall that the best of each group reach within each of the limits.

    Of one class. ranks: place of a detection in its group. inside: whether a detection is of the size, without which it
    is wrong only where it is on an object. -1 for sizes that no object is of.
    """
    order = np.argsort(-scores, kind="stable")
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    by_score = np.argsort(place[found.finders])
    rows, objects = found.finders[by_score], found.objects[:, :, by_score]
    on_something = objects >= 0
    right = on_something & ~left_out[np.arange(len(left_out))[:, None], objects]

    # Only where a detection is right can precision turn up, and these are among `rows`.
    true = np.cumsum(right, axis=2)
    false = np.cumsum(inside[:, order], axis=1)[:, place[rows]] - np.cumsum(on_something & inside[:, rows], axis=2)
    precision = true / np.maximum(false + true, 1)
    precision = np.maximum.accumulate(precision[:, :, ::-1], axis=2)[:, :, ::-1]

    present = (~left_out).sum(axis=1)
    at_recalls = _at(precision, true, np.stack([_needed(n) for n in present.tolist()]))
    reached = [right[:, :, ranks[rows] < limit].sum(axis=2) / np.maximum(present, 1) for limit in limits]
    none = present[:, None] == 0
    return np.where(none, -1.0, at_recalls).transpose(0, 2, 1), np.where(none, -1.0, np.stack(reached, axis=2))


def _needed(objects: int) -> Int[np.ndarray, " 101"]:
    """How many of the objects have to be found for each of `RECALLS`; at least one, for there to be a precision."""
    return np.maximum(np.searchsorted(np.arange(objects + 1) / max(objects, 1), RECALLS), 1)


def _at(
    precision: Float[np.ndarray, "10 S F"], true: Int[np.ndarray, "10 S F"], needed: Int[np.ndarray, "S 101"]
) -> Float[np.ndarray, "10 S 101"]:
    """The precision where the needed number of objects is found, 0 where it never is."""
    ious, sizes, last = true.shape
    row = np.arange(ious * sizes).reshape(ious, sizes, 1)
    # Each row counts from a higher number, so that one search serves all.
    highest = max(last, int(needed.max())) + 1
    place = np.searchsorted((true + highest * row).ravel(), needed + highest * row) - last * row
    padded = np.concatenate([precision, np.zeros((ious, sizes, 1))], axis=2)
    return np.take_along_axis(padded, np.minimum(place, last), axis=2)
