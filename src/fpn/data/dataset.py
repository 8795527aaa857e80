"""The annotations of a data set, in arrays: a `Data` maps split names to `Split`s.

Arrays rather than objects, so that 100,000 images take megabytes and worker processes share them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from fpn.data.outlines import Outlines
from fpn.errors import DataError
from fpn.words import printable

# The kinds of defects that the readers list, and what each says.
KINDS = {
    "missing-image": "an annotation speaks of an image that is not there",
    "unreadable-image": "the header of an image cannot be read",
    "missing-annotation": "a list names an image that has no annotation file",
    "missing-folder": "a configuration names a folder or list that is not there",
    "path-outside": "a path leads out of the data set's folder",
    "broken-annotation": "an annotation file, an entry or a line of it cannot be understood",
    "unknown-image": "a box belongs to an image that the annotations do not have",
    "unknown-class": "a box has no class, or one that the data set does not define",
    "duplicate-class": "several classes have the same name",
    "duplicate-id": "the id of an annotation is used more than once",
    "clashing-id": "several image files have one id, so that it is not known whose boxes are whose",
    "class-sets": "a split does not have all the classes of the others",
    "duplicate-entry": "an image is listed more than once in one split",
    "id-not-integer": "ids of images are not whole numbers",
    "box-not-finite": "a coordinate is missing or not a finite number",
    "box-zero-size": "a width or height is zero or negative",
    "box-outside": "a box lies wholly outside its image",
    "box-cut": "a box reached over the border of its image and was cut there",
    "outline-broken": "an outline, or a part of it, cannot be used; where nothing of it is left its box stands in",
    "outline-size": "an outline is a mask of another size than its image; its box stands in",
}


@dataclass(frozen=True)
class Problem:
    """One defect, in words: the file, the item in it, what is wrong and what was done about it.

    `kind` is a short name for programs; those that the readers give are in `KINDS`.
    """

    file: str
    item: str
    text: str
    kind: str = ""

    def __post_init__(self) -> None:
        for name in ("file", "item", "text"):
            object.__setattr__(self, name, printable(getattr(self, name)))

    def __str__(self) -> str:
        return f"{self.file}: {self.item} {self.text}" if self.item else f"{self.file}: {self.text}"


def rows_of(offsets: np.ndarray, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rows of the given images, one image after the other, and the offsets of the images among these rows."""
    counts = np.diff(offsets)[indices]
    starts = np.repeat(offsets[indices], counts)
    rows = starts + np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return rows, np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


@dataclass(frozen=True)
class SavedRegions:
    """Where objects may be in the images of a split: in image i the rows offsets[i]:offsets[i+1], best first."""

    offsets: np.ndarray  # (I + 1,) int64
    boxes: np.ndarray  # (P, 4) float32: x1, y1, x2, y2 in pixels of the original images
    scores: np.ndarray  # (P,) float32

    def of(self, index: int) -> np.ndarray:
        """(R, 4): the boxes of one image."""
        return self.boxes[self.offsets[index] : self.offsets[index + 1]]

    def select(self, indices: np.ndarray) -> SavedRegions:
        """Those of the given images, in the given order."""
        rows, offsets = rows_of(self.offsets, indices)
        return SavedRegions(offsets, self.boxes[rows], self.scores[rows])


@dataclass(frozen=True)
class Split:
    """The I images of one split with their M boxes; those of image i are the rows offsets[i]:offsets[i+1]."""

    name: str
    classes: tuple[str, ...]
    category_ids: np.ndarray  # (K,) int64: the id each class has in the data's own numbering (COCO's has gaps)
    root: Path
    files: np.ndarray  # (I,) str: image files relative to root
    image_ids: np.ndarray  # (I,) int64: the data's own ids, or 1.. where it has none
    sizes: np.ndarray  # (I, 2) int64: height, width
    offsets: np.ndarray  # (I + 1,) int64
    boxes: np.ndarray  # (M, 4) float64: x1, y1, x2, y2 in pixels
    labels: np.ndarray  # (M,) int64: 0..K-1
    ignore: (
        np.ndarray
    )  # (M,) bool: COCO's iscrowd, VOC's difficult; not trained on, scored as pycocotools scores crowds
    areas: np.ndarray  # (M,) float64: square pixels as COCO gives them (of the mask), else of the box
    outlines: Outlines | None = None  # of the M objects, where they were asked for and any object of the data has one
    regions: SavedRegions | None = None  # another detector's proposals, see `fpn.data.with_regions`

    def __len__(self) -> int:
        return len(self.files)

    def path(self, index: int) -> Path:
        return self.root / str(self.files[index])

    def rows(self, index: int) -> slice:
        """The rows of `boxes`, `labels`, `ignore` and `areas` that belong to image `index`."""
        return slice(int(self.offsets[index]), int(self.offsets[index + 1]))

    @property
    def image_of(self) -> np.ndarray:
        """(M,) int64: the position of each box's image."""
        return np.repeat(np.arange(len(self)), np.diff(self.offsets))

    def evenly(self, most: int) -> Split:
        """At most so many of its images, evenly spaced."""
        if len(self) <= most:
            return self
        return self.select(np.linspace(0, len(self) - 1, most).round().astype(int), self.name)

    def select(self, indices: np.ndarray, name: str) -> Split:
        """The split made of the given images, in the given order."""
        rows, offsets = rows_of(self.offsets, indices)
        return Split(
            name=name,
            classes=self.classes,
            category_ids=self.category_ids,
            root=self.root,
            files=self.files[indices],
            image_ids=self.image_ids[indices],
            sizes=self.sizes[indices],
            offsets=offsets,
            boxes=self.boxes[rows],
            labels=self.labels[rows],
            ignore=self.ignore[rows],
            areas=self.areas[rows],
            outlines=self.outlines and self.outlines.select(rows),
            regions=self.regions and self.regions.select(indices),
        )


OBJECT = "object"  # the one class of what is only told from background


def class_agnostic(split: Split) -> Split:
    """The split with one class, "object", for all of its objects."""
    return replace(
        split, classes=(OBJECT,), category_ids=np.ones(1, dtype=np.int64), labels=np.zeros_like(split.labels)
    )


@dataclass(frozen=True)
class Data(Mapping[str, Split]):
    """A data set: its splits by name, in the order train, val, test, then others as the data has them."""

    path: Path
    format: str  # "coco", "voc" or "yolo"
    classes: tuple[str, ...]
    splits: dict[str, Split]
    problems: list[Problem] = field(default_factory=list)  # defects left out while reading
    notes: list[str] = field(default_factory=list)  # what was decided for the user, such as a split made by us

    def __getitem__(self, name: str) -> Split:
        if name not in self.splits:
            raise DataError(f"{self.path}: no split {name!r}; it has {', '.join(self.splits)}")
        return self.splits[name]

    # Mapping's own two rely on KeyError, which is not what a missing split raises.
    def __contains__(self, name: object) -> bool:
        return name in self.splits

    def get(self, name: str, default: Any = None) -> Any:
        return self.splits.get(name, default)

    def __iter__(self) -> Iterator[str]:
        return iter(self.splits)

    def __len__(self) -> int:
        return len(self.splits)
