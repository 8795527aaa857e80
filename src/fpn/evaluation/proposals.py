"""Proposals -> average recall: how many objects have a region on them, of whatever class (COCO's AR; Table 1)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fpn.data.dataset import Split, class_agnostic
from fpn.evaluation.metrics import SIZES, Kind, Metrics, Results, evaluated
from fpn.words import some_of

LIMITS = (100, 1000)  # proposals an image, as in the paper
IMAGES = 500  # scored at a time: the evaluation takes some hundred bytes for each proposal


def average_recall(
    split: Split, results: Results, limits: tuple[int, ...] = LIMITS, kind: Kind = "bbox"
) -> dict[str, float]:
    """AR100, AR1000 and, of the last limit, AR1000_small, _medium and _large, from 0 to 1; -1 without an object.

    The part of the objects that one of the best `limits` proposals of an image overlaps, averaged over IoUs of 0.50 to
    0.95; classes do not count, crowds are no objects. It is what pycocotools gives with `useCats` 0. kind: "segm"
    measures the overlap of masks.
    """
    found, objects = np.zeros((10, 1 + len(SIZES), len(limits))), np.zeros(1 + len(SIZES))
    for first in range(0, len(results.images), IMAGES):
        part, some = _part(class_agnostic(split), results, results.images[first : first + IMAGES])
        areas = part.areas[~part.ignore]
        here = np.array([len(areas), *(((areas >= low) & (areas <= high)).sum() for low, high in SIZES.values())])
        found += np.maximum(evaluated(part, some, limits, kind)[1][:, 0], 0) * here[:, None]
        objects += here
    recall = np.where(objects > 0, found.mean(0).T / np.maximum(objects, 1), -1.0)  # (limits, 1 + sizes)
    by_size = {f"AR{limits[-1]}_{size}": float(recall[-1, n]) for n, size in enumerate(SIZES, 1)}
    return {f"AR{limit}": float(recall[n, 0]) for n, limit in enumerate(limits)} | by_size


def score_proposals(split: Split, results: Results, limits: tuple[int, ...] = LIMITS) -> Metrics:
    """`average_recall` of boxes, and of masks where both have some; what counts is the AR of masks, else of boxes."""
    notes, masks = [], None
    missing = np.setdiff1d(np.arange(len(split)), results.images)
    if len(missing):
        files = [str(file) for file in split.files[missing]]
        notes.append(f"{len(missing)} of {len(split)} images of split {split.name!r} are not scored: {some_of(files)}")
    numbers = average_recall(split, results, limits)
    undefined = [name for name, value in numbers.items() if value < 0]
    if undefined:
        notes.append(f"{', '.join(undefined)}: -1, for split {split.name!r} has no such object to find")
    if results.masks is not None and split.outlines is not None:
        masks = Metrics(average_recall(split, results, limits, "segm"), {}, notes)
    return Metrics(numbers, {}, notes, masks, f"{'mask_' if masks else ''}AR{limits[-1]}")


def _part(split: Split, results: Results, images: np.ndarray) -> tuple[Split, Results]:
    """Some images of a split alone, and the proposals on them, all of one class."""
    split, place = replace(split, regions=None), np.full(len(split), -1)
    place[images] = np.arange(len(images))
    kept = place[results.indices] >= 0
    masks = None if results.masks is None else [results.masks[row] for row in np.flatnonzero(kept).tolist()]
    return split.select(images, split.name), replace(
        results,
        images=np.arange(len(images)),
        indices=place[results.indices[kept]],
        boxes=results.boxes[kept],
        scores=results.scores[kept],
        labels=np.zeros(int(kept.sum()), dtype=np.int64),
        masks=masks,
        levels=None,
    )
