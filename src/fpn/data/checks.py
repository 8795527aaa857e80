"""A split as a reader found it -> a `Split` that is safe to use; whatever had to be left out or changed is listed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from fpn.data.dataset import Problem, Split
from fpn.data.images import image_size
from fpn.data.outlines import Outlines
from fpn.errors import DataError, ImageError
from fpn.words import printable

ROUNDING = 0.5  # pixels that a box may reach over the border without being listed: tools round coordinates
LONGEST_NAME = 500  # characters of a class name


@dataclass(frozen=True)
class RawSplit:
    """What an annotation file says, unchecked. I images, M boxes in any order.

    `files` exist, but need not be readable. `sizes` are 0 where the annotation has none. `boxes` are x1, y1, x2, y2 in
    pixels, or in fractions of width and height where `normalised`; NaN where a number is missing. `areas` are NaN where
    they are to be those of the boxes. `refused` holds the rows whose class the reader rejects, with the reason.
    `where` names a row: the file, the item in it, and a detail for the end of the message (or ""). `outlines` are those
    of the boxes, in the same units, and `broken` says what is wrong with some of them, by row.
    """

    name: str
    root: Path
    classes: tuple[str, ...]
    category_ids: np.ndarray  # (K,) int64
    files: list[str]
    image_ids: np.ndarray  # (I,) int64
    sizes: np.ndarray  # (I, 2) int64
    image_of: np.ndarray  # (M,) int64: position of each box's image
    boxes: np.ndarray  # (M, 4) float64
    labels: np.ndarray  # (M,) int64
    ignore: np.ndarray  # (M,) bool
    areas: np.ndarray  # (M,) float64
    refused: dict[int, str]
    where: Callable[[int], tuple[str, str, str]]
    normalised: bool = False
    outlines: Outlines | None = None
    broken: dict[int, str] = field(default_factory=dict)


def check_classes(names: Iterable[str], file: Path) -> None:
    """Refuses names that could not be shown or written into a checkpoint.

    Raises:
        DataError: a name is empty, very long, or holds control characters or half a surrogate pair.
    """
    for name in names:
        if not name.strip() or len(name) > LONGEST_NAME or printable(name) != name:
            start = repr(name[:40]) + "..." * (len(name) > 40)
            raise DataError(
                f"{file}: {start} cannot be the name of a class; a name has 1 to {LONGEST_NAME} characters, all of "
                "them printable; rename it"
            )


def check(raw: RawSplit, problems: list[Problem]) -> Split:
    """The usable images and boxes of `raw`, grouped by image; appends to `problems` all that is wrong."""
    sizes = _complete_sizes(raw, problems)
    usable_image = np.all(sizes > 0, axis=1)
    boxes = raw.boxes
    if raw.normalised:
        with np.errstate(over="ignore", invalid="ignore"):
            boxes = boxes * sizes[raw.image_of][:, [1, 0, 1, 0]]
    boxes, usable_box = _check_boxes(raw, boxes, sizes, usable_image, problems)

    outlines = _check_outlines(raw, sizes, usable_box, problems)

    rows = np.flatnonzero(usable_box)
    rows = rows[np.argsort(raw.image_of[rows], kind="stable")]
    kept = np.flatnonzero(usable_image)
    counts = np.bincount(raw.image_of[rows], minlength=len(raw.files))[kept]
    boxes, areas = boxes[rows], raw.areas[rows]
    own_areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    return Split(
        name=raw.name,
        classes=raw.classes,
        category_ids=raw.category_ids.astype(np.int64),
        root=raw.root,
        files=np.array(raw.files, dtype=np.str_)[kept],
        image_ids=raw.image_ids[kept].astype(np.int64),
        sizes=sizes[kept],
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        boxes=boxes,
        labels=raw.labels[rows].astype(np.int64),
        ignore=raw.ignore[rows].astype(bool),
        areas=np.where(np.isfinite(areas) & (areas > 0), areas, own_areas),
        outlines=outlines and outlines.select(rows),
    )


def _complete_sizes(raw: RawSplit, problems: list[Problem]) -> np.ndarray:
    """(I, 2) int64 sizes, read from the image's header where the annotation has none; 0 where that fails too."""
    sizes = raw.sizes.reshape(-1, 2).astype(np.int64)
    unknown = np.flatnonzero((sizes <= 0).any(axis=1))
    sizes[unknown] = 0

    def measure(index: int) -> tuple[int, int] | ImageError:
        try:
            return image_size(raw.root / raw.files[index])
        except ImageError as error:
            return error

    with ThreadPoolExecutor(8) as pool:
        found = tqdm(
            pool.map(measure, unknown.tolist()), f"{raw.name}: image sizes", len(unknown), delay=1, leave=False
        )
        for index, size in zip(unknown, found, strict=True):
            if isinstance(size, ImageError):
                text = str(size).removeprefix(f"{raw.root / raw.files[index]}: ")
                problems.append(Problem(raw.files[index], "", f"{text}; the image is left out", "unreadable-image"))
            else:
                sizes[index] = size
    return sizes


def _check_boxes(
    raw: RawSplit, boxes: np.ndarray, sizes: np.ndarray, usable_image: np.ndarray, problems: list[Problem]
) -> tuple[np.ndarray, np.ndarray]:
    """The boxes (M, 4) clipped to their images and which of them (M,) can be used."""
    limits = sizes[raw.image_of][:, [1, 0, 1, 0]].astype(np.float64)
    clipped = np.minimum(np.maximum(boxes, 0), limits)  # NaN stays NaN
    finite = np.all(np.isfinite(boxes), axis=1)
    sized = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    inside = (clipped[:, 2] > clipped[:, 0]) & (clipped[:, 3] > clipped[:, 1])
    with np.errstate(invalid="ignore", over="ignore"):
        cut = np.any(np.abs(boxes - clipped) > ROUNDING, axis=1)
    accepted = np.ones(len(boxes), dtype=bool)
    accepted[list(raw.refused)] = False
    here = usable_image[raw.image_of]
    usable = here & accepted & finite & sized & inside

    for row in np.flatnonzero(here & (~usable | cut)).tolist():
        x1, y1, x2, y2 = boxes[row].tolist()
        place, size = f"({x1:g}, {y1:g}, {x2:g}, {y2:g})", f"{limits[row, 0]:g}x{limits[row, 1]:g}"
        if not accepted[row]:
            kind, text = "unknown-class", f"{raw.refused[row]}; left out"
        elif not finite[row]:
            kind = "box-not-finite"
            text = "has a coordinate that is missing or not a finite number; left out, mend or delete it"
        elif not sized[row]:
            kind = "box-zero-size"
            text = f"has width {x2 - x1:g} and height {y2 - y1:g}; left out, mend or delete it"
        elif not inside[row]:
            kind, text = "box-outside", f"{place} lies outside the {size} image; left out, mend or delete it"
        else:
            kind, text = "box-cut", f"{place} reaches outside the {size} image; cut at the border"
        file, item, detail = raw.where(row)
        problems.append(Problem(file, item, f"{text} ({detail})" if detail else text, kind))
    return clipped, usable


def _check_outlines(
    raw: RawSplit, sizes: np.ndarray, usable_box: np.ndarray, problems: list[Problem]
) -> Outlines | None:
    """The outlines in pixels, without those that cannot be of their image; of the boxes that are usable."""
    outlines = raw.outlines
    if outlines is None:
        return None
    if raw.normalised:
        outlines = outlines.scaled(sizes[raw.image_of][:, [1, 0]])
    limits = sizes[raw.image_of]
    around, annotated = outlines.around(), outlines.sizes()
    outside = np.any(around[:, 2:] <= 0, axis=1) | np.any(around[:, :2] >= limits[:, [1, 0]], axis=1)
    other_size = outlines.encoded & outlines.known & np.any(annotated != limits, axis=1)
    removed = np.flatnonzero(outside | other_size)

    faulty = np.union1d(removed, np.array(list(raw.broken), dtype=np.int64))
    for row in faulty[usable_box[faulty]].tolist():
        kind, effect = "outline-broken", "the box stands in for it, mend or delete it"
        (height, width), (own_height, own_width) = limits[row].tolist(), annotated[row].tolist()
        if outside[row]:
            text = f"has an outline that lies outside the {width}x{height} image"
        elif other_size[row]:
            kind = "outline-size"
            text = f"has a mask of {own_width}x{own_height} pixels on an image of {width}x{height}"
        else:
            text = f"has an outline that {raw.broken[row]}"
            effect = "that part is left out, mend or delete it" if outlines.known[row] else effect
        file, item, detail = raw.where(row)
        problems.append(Problem(file, item, f"{text}; {effect}" + f" ({detail})" * bool(detail), kind))
    return outlines.without(removed)
