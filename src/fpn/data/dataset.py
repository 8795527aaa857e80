"""The annotations of a data set, in arrays: a `Data` maps split names to `Split`s.

Arrays rather than objects, so that 100,000 images take megabytes and worker processes share them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fpn.errors import DataError


@dataclass(frozen=True)
class Problem:
    """One defect found while reading, in words: the file, the item in it, what is wrong and what was done about it."""

    file: str
    item: str
    text: str

    def __str__(self) -> str:
        return f"{self.file}: {self.item} {self.text}" if self.item else f"{self.file}: {self.text}"


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

    def __len__(self) -> int:
        return len(self.files)

    def path(self, index: int) -> Path:
        return self.root / str(self.files[index])

    def rows(self, index: int) -> slice:
        """The rows of `boxes`, `labels`, `ignore` and `areas` that belong to image `index`."""
        return slice(int(self.offsets[index]), int(self.offsets[index + 1]))

    def select(self, indices: np.ndarray, name: str) -> Split:
        """The split made of the given images, in the given order."""
        counts = np.diff(self.offsets)[indices]
        starts = np.repeat(self.offsets[indices], counts)
        rows = starts + np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return Split(
            name=name,
            classes=self.classes,
            category_ids=self.category_ids,
            root=self.root,
            files=self.files[indices],
            image_ids=self.image_ids[indices],
            sizes=self.sizes[indices],
            offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            boxes=self.boxes[rows],
            labels=self.labels[rows],
            ignore=self.ignore[rows],
            areas=self.areas[rows],
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
