"""Detections -> the COCO numbers, per class too, with every number that is undefined explained in words.

The numbers are those of the COCO evaluation (Lin et al. 2014, and its reference code pycocotools). AP is the precision
averaged over 101 recalls, IoU thresholds 0.50 to 0.95 and classes; AR the recall reached with at most 1, 10 or 100
detections of a class in an image, averaged over thresholds and classes. Boxes and scores are rounded as `to_coco`
writes them before they are scored, so that its file gives the same numbers anywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from fpn.data.dataset import Split
from fpn.data.outlines import rectangle
from fpn.errors import OptionError
from fpn.evaluation.coco import best_of_each, box_pairs, find, mask_pairs, precision_and_recall
from fpn.words import some_of

# COCO's three sizes: areas in square pixels of the original image, both ends included.
SIZES = {"small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, 1e5**2)}
_SIZE_WORDS = {"small": "of at most 32x32", "medium": "between 32x32 and 96x96", "large": "of 96x96 or more"}


Kind = Literal["bbox", "segm"]  # what overlap is measured between, as the evaluator calls it


@dataclass(frozen=True)
class Results:
    """All detections on a split, as flat arrays: `n` detections on the `i` images that were looked at.

    Positions are those of images in the split. Only the ground truth of `images` counts, so an image that could not be
    read belongs in neither. Boxes are (x1, y1, x2, y2) in pixels of the image as given; labels run from 0. `masks`, of
    detectors that have them, are compressed run lengths (see `fpn.rle`) in images of the annotated size. `levels` are
    those of the pyramid that the detections were made from, where they are known.
    """

    images: Int[np.ndarray, " i"]
    indices: Int[np.ndarray, " n"]
    boxes: Float[np.ndarray, "n 4"]
    scores: Float[np.ndarray, " n"]
    labels: Int[np.ndarray, " n"]
    masks: list[str] | None = None
    levels: Int[np.ndarray, " n"] | None = None


class Metrics(dict[str, float]):
    """The 12 COCO numbers by name, from 0 to 1, or -1 where there is no object to measure them on.

    `per_class` has AP, AP50, AP75, AR and the number of objects of every class by its name; `notes` says in words why a
    number is -1 and what was left out. `masks` are the same numbers of masks in place of boxes, where there are any.
    `main` is the name, in `with_masks`, of the number that tells a better detector from a worse one.
    """

    def __init__(
        self,
        numbers: dict[str, float],
        per_class: dict[str, dict[str, float]],
        notes: list[str],
        masks: Metrics | None = None,
        main: str = "AP",
    ):
        super().__init__(numbers)
        self.per_class = per_class
        self.notes = notes
        self.masks = masks
        self.main = main

    def as_dict(self) -> dict:
        """Everything in one dictionary that `json` can write: the numbers, "per_class", "notes" and "masks"."""
        masks = {} if self.masks is None else {"masks": {**self.masks, "per_class": self.masks.per_class}}
        return {**self, "per_class": self.per_class, "notes": self.notes, **masks}

    def with_masks(self) -> dict[str, float]:
        """The numbers of boxes, and those of masks as mask_AP and so on."""
        return {**self, **{f"mask_{name}": value for name, value in (self.masks or {}).items()}}

    def summary(self) -> str:
        """One line: AP and AP50, or AR of proposals; AP or AR by size of object, and of masks."""
        name = self.main.removeprefix("mask_")
        whole = "  ".join(f"{n} {_number(self[n])}" for n in [n for n in self if "_" not in n][:2])
        sizes = " ".join(f"{size} {_number(self[f'{name}_{size}'])}" for size in SIZES)
        masks = "" if self.masks is None else f"  masks {_number(self.masks[name])}"
        return f"{whole}  {sizes}{masks}"

    def table(self) -> str:
        """All 12 numbers, then a line for each class; "-" stands for -1, which `notes` explains. Masks after boxes."""
        if self.masks is None:
            return self._table()
        return f"boxes\n{self._table()}\n\nmasks\n{self.masks.table()}"

    def _table(self) -> str:
        column = max(10, *(len(name) + 1 for name in self))
        lines = [f"{name:<{column}}{_number(value):>7}" for name, value in self.items()]
        if not self.per_class:
            return "\n".join(lines)
        columns = [name for name in next(iter(self.per_class.values())) if name != "objects"]
        width = max([len("class"), *map(len, self.per_class)])
        lines += ["", f"{'class':<{width}}{'objects':>9}" + "".join(f"{name:>8}" for name in columns)]
        for name, row in self.per_class.items():
            values = "".join(f"{_number(row[column]):>8}" for column in columns)
            lines.append(f"{name:<{width}}{row['objects']:>9.0f}{values}")
        return "\n".join(lines)


def score(split: Split, results: Results, max_detections: int = 100) -> Metrics:
    """The COCO numbers of detections on a split.

    With masks where both have some; an object without an outline counts as its box, and as everywhere with COCO, areas
    of objects are the annotated ones, those of detected masks their pixels.
    COCO counts at most 100 detections of a class in an image; `max_detections` raises that for dense scenes (and
    AR100 is then called AR500, say). Raises OptionError where it is not above 10, the middle of COCO's three limits.
    """
    if max_detections <= 10:
        raise OptionError(f"max_detections is {max_detections}; it must be more than 10, for AR10 to stay what it is")
    assert not len(results.labels) or 0 <= results.labels.min() <= results.labels.max() < len(split.classes)
    assert np.isin(results.indices, results.images).all(), "detections on an image that is not among `images`"

    counted = np.isin(split.image_of, results.images) & ~split.ignore
    notes, masks = _notes(split, results, counted, max_detections), None
    numbers, per_class = _numbers(split, results, counted, max_detections, "bbox")
    if results.masks is not None and split.outlines is None:
        notes.append(f"masks are not scored: split {split.name!r} has no outlines of its objects, or was read without")
    elif results.masks is not None:
        masks = Metrics(*_numbers(split, results, counted, max_detections, "segm"), notes)
    return Metrics(numbers, per_class, notes, masks)


def _numbers(
    split: Split, results: Results, counted: np.ndarray, max_detections: int, kind: Kind
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """The 12 numbers, and some of them for each class. `counted` tells the objects that take part."""
    precision, recall = evaluated(split, results, (1, 10, max_detections), kind)
    sizes = [f"_{size}" for size in SIZES]
    numbers = {"AP": _mean(precision[..., 0])}
    numbers |= {"AP50": _mean(precision[0, :, :, 0]), "AP75": _mean(precision[5, :, :, 0])}
    numbers |= {f"AP{size}": _mean(precision[..., a]) for a, size in enumerate(sizes, 1)}
    numbers |= {f"AR{limit}": _mean(recall[:, :, 0, m]) for m, limit in enumerate((1, 10, max_detections))}
    numbers |= {f"AR{size}": _mean(recall[:, :, a, 2]) for a, size in enumerate(sizes, 1)}

    objects = np.bincount(split.labels[counted], minlength=len(split.classes))
    per_class = {}
    for label, name in enumerate(split.classes):
        per_class[name] = {
            "AP": _mean(precision[:, :, label, 0]),
            "AP50": _mean(precision[0, :, label, 0]),
            "AP75": _mean(precision[5, :, label, 0]),
            f"AR{max_detections}": _mean(recall[:, label, 0, 2]),
            "objects": float(objects[label]),
        }
    return numbers, per_class


def to_coco(split: Split, results: Results) -> list[dict]:
    """Detections as COCO results: image_id, category_id, bbox (x, y, width, height) to 1/1000 pixel, and score.

    With masks also segmentation (compressed RLE). pycocotools takes the areas of detections from bbox where that is
    there, so for the AP of masks by size of object take bbox out first.
    """
    columns = (split.image_ids[results.indices], split.category_ids[results.labels], *rounded(results))
    rows = zip(*(column.tolist() for column in columns), strict=True)
    entries: list[dict] = [{"image_id": i, "category_id": c, "bbox": b, "score": s} for i, c, b, s in rows]
    for entry, mask in zip(entries, _segmentations(split, results), strict=True) if results.masks is not None else ():
        entry["segmentation"] = mask
    return entries


def _segmentations(split: Split, results: Results) -> list[dict]:
    assert results.masks is not None
    sizes = split.sizes[results.indices].tolist()
    return [{"size": size, "counts": counts} for size, counts in zip(sizes, results.masks, strict=True)]


def ground_truth(split: Split) -> dict:
    """The annotations of a split as a COCO dictionary; ignored boxes get iscrowd 1. Ids of annotations run from 1.

    Where the split has outlines every annotation has a segmentation; without one of its own that is its box.
    """
    images = zip(split.image_ids.tolist(), split.files.tolist(), split.sizes.tolist(), strict=True)
    names = zip(split.category_ids.tolist(), split.classes, strict=True)
    return {
        "images": [{"id": i, "file_name": file, "height": h, "width": w} for i, file, (h, w) in images],
        "annotations": _annotations(split),
        "categories": [{"id": category, "name": name} for category, name in names],
    }


def _annotations(split: Split) -> list[dict]:
    columns = (
        split.image_ids[split.image_of],
        split.category_ids[split.labels],
        as_given(split.boxes),
        split.areas,
        split.ignore.astype(int),
    )
    rows = zip(*(column.tolist() for column in columns), strict=True)
    entries: list[dict] = [
        {"id": n, "image_id": i, "category_id": c, "bbox": b, "area": a, "iscrowd": crowd}
        for n, (i, c, b, a, crowd) in enumerate(rows, 1)
    ]
    for row, entry in enumerate(entries if split.outlines is not None else ()):
        entry["segmentation"] = _segmentation(split, row)
    return entries


def _segmentation(split: Split, row: int) -> Any:
    """The outline of an object as COCO writes it; its box where it has none of its own."""
    assert split.outlines is not None
    return split.outlines.segmentation(row) or [rectangle(split.boxes[row])]


def as_given(boxes: Float[np.ndarray, "n 4"]) -> Float[np.ndarray, "n 4"]:
    """Boxes of objects (x, y, width, height) as an annotation file has them."""
    return np.round(_xywh(boxes), 6)  # x1 + w - x1 is not always w in floating point


def evaluated(
    split: Split, results: Results, limits: tuple[int, ...], kind: Kind
) -> tuple[Float[np.ndarray, "10 101 K 4"], Float[np.ndarray, "10 K 4 L"]]:
    """Precision by IoU, recall, class and size of object (all, then `SIZES`), of the detections within the last limit.

    And recall by IoU, class, size and limit. -1 where they are undefined. limits: how many detections of a class in an
    image count, in ascending order.
    """
    classes = len(split.classes)
    precision, recall = np.full((10, 101, classes, 4), -1.0), np.full((10, classes, 4, len(limits)), -1.0)
    # Images in the order of their ids: of detections with equal scores, the first in it is taken for the better.
    place = np.argsort(np.argsort(split.image_ids, kind="stable"), kind="stable")
    images, images_of = place[results.indices], place[split.image_of]
    scored, (boxes, scores) = np.isin(split.image_of, results.images), rounded(results)
    areas = _pixels(split, results) if kind == "segm" else boxes[:, 2] * boxes[:, 3]
    by_label = zip(range(classes), _by_label(split.labels, classes), _by_label(results.labels, classes), strict=True)
    for label, objects, rows in by_label:
        objects = objects[scored[objects]]
        if split.ignore[objects].all():
            continue
        objects = objects[np.argsort(images_of[objects], kind="stable")]
        best, ranks = best_of_each(images[rows], scores[rows], limits[-1])
        rows = rows[best]
        crowd, groups, groups_of = split.ignore[objects], images[rows], images_of[objects]
        if kind == "segm":
            pairs = mask_pairs(groups, _mask(split, results, rows), groups_of, _outline(split, objects), crowd)
        else:
            pairs = box_pairs(groups, boxes[rows], groups_of, as_given(split.boxes[objects]), crowd)
        left_out = crowd | ~_of_sizes(split.areas[objects])
        found = find(pairs, groups, crowd, left_out)
        precision[:, :, label], recall[:, label] = precision_and_recall(
            found, scores[rows], ranks, _of_sizes(areas[rows]), left_out, limits
        )
    return precision, recall


def _by_label(labels: Int[np.ndarray, " n"], classes: int) -> list[np.ndarray]:
    """The rows of each class, in their order."""
    rows = np.argsort(labels, kind="stable")
    return np.split(rows, np.searchsorted(labels[rows], np.arange(1, classes)))[:classes]


def _of_sizes(areas: Float[np.ndarray, " n"]) -> Bool[np.ndarray, "4 n"]:
    """Whether they are of any size, then of each of `SIZES`."""
    ranges = [(0.0, SIZES["large"][1]), *SIZES.values()]
    return np.stack([(areas >= low) & (areas <= high) for low, high in ranges])


def _mask(split: Split, results: Results, rows: np.ndarray) -> Callable[[int], dict]:
    """The run lengths of the detections in these rows, by their place among them."""
    assert results.masks is not None
    sizes, masks = split.sizes[results.indices[rows]].tolist(), results.masks
    return lambda place: {"size": sizes[place], "counts": masks[rows[place]]}


def _outline(split: Split, rows: np.ndarray) -> Callable[[int], dict]:
    """The run lengths of the objects in these rows, by their place among them."""
    from faster_coco_eval.core import mask as api

    sizes = split.sizes[split.image_of[rows]].tolist()

    def run_lengths(place: int) -> Any:
        drawn = api.frPyObjects(_segmentation(split, int(rows[place])), *sizes[place])
        return api.merge(drawn) if isinstance(drawn, list) else drawn

    return run_lengths


def _pixels(split: Split, results: Results) -> Float[np.ndarray, " n"]:
    """The area of each mask."""
    from faster_coco_eval.core.mask import area

    masks = _segmentations(split, results)
    return np.asarray(area(masks), dtype=np.float64) if masks else np.zeros(0)


def _notes(split: Split, results: Results, counted: np.ndarray, max_detections: int) -> list[str]:
    """What the numbers do not say. `counted` tells the objects that take part from ignored ones and unread images'."""
    where = f"split {split.name!r}"
    notes = []
    missing = np.setdiff1d(np.arange(len(split)), results.images)
    if len(missing):
        files = [str(file) for file in split.files[missing]]
        notes.append(f"{len(missing)} of {len(split)} images of {where} are not scored: {some_of(files)}")
    if not counted.any():
        ignored = f" but {split.ignore.sum()} that are crowd or difficult" if split.ignore.any() else ""
        return [*notes, f"every number is -1: there is no object to find in the images scored of {where}{ignored}"]

    areas = split.areas[counted]
    for size, (low, high) in SIZES.items():
        if not ((areas >= low) & (areas <= high)).any():
            words = _SIZE_WORDS[size]
            notes.append(f"AP_{size} and AR_{size} are -1: no ground-truth object {words} pixels in {where}")
    absent = np.setdiff1d(np.arange(len(split.classes)), split.labels[counted])
    if len(absent):
        names = some_of([split.classes[label] for label in absent])
        extra = int(np.isin(results.labels, absent).sum())
        notes.append(
            f"AP is -1 for {len(absent)} of {len(split.classes)} classes, which have no object in {where} and are left"
            f" out of the means, with the {extra} detections of them: {names}"
        )
    crowded = _most_of_a_class(split.image_of[counted], split.labels[counted], len(split.classes))
    if crowded > max_detections:
        notes.append(
            f"an image of {where} has {crowded} objects of one class, but only the {max_detections} best detections of"
            f" a class in an image count, so recall cannot reach 1: set max_detections to {crowded} or more"
        )
    if max_detections != 100:
        notes.append(
            f"up to {max_detections} detections of a class in an image count; published COCO numbers count up to 100"
        )
    return notes


def _most_of_a_class(images: np.ndarray, labels: np.ndarray, classes: int) -> int:
    return int(np.unique(images * classes + labels, return_counts=True)[1].max(initial=0))


def rounded(results: Results) -> tuple[np.ndarray, np.ndarray]:
    """Boxes (x, y, width, height) and scores as `to_coco` writes them, which is how they are scored."""
    return np.round(_xywh(results.boxes), 3), np.round(results.scores.astype(np.float64), 7)


def _xywh(boxes: np.ndarray) -> np.ndarray:
    boxes = boxes.astype(np.float64)
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)


def _mean(values: np.ndarray) -> float:
    defined = values[values > -1]
    return float(defined.mean()) if defined.size else -1.0


def _number(value: float) -> str:
    return "-" if value < 0 else f"{value:.3f}"
