"""Large images as tiles of one size: where the tiles lie, and a split of tiles to train on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from fpn.data.augment import MIN_SIDE, MIN_VISIBLE
from fpn.data.batching import DetectionDataset
from fpn.data.dataset import Split
from fpn.data.outlines import Move, Outlines
from fpn.errors import OptionError

SMALLEST = 32  # pixels of a tile: what one cell of P5 sees
EMPTY = 0.25  # tiles without an object, for each one with some: they teach what is none
WHOLE = 0.999  # of an object's area: what is left is no rounding


@dataclass(frozen=True)
class Grid:
    """The tiles of an image, all of one (height, width): a row for each of `tops`, a column for each of `lefts`."""

    tops: tuple[int, ...]
    lefts: tuple[int, ...]
    size: tuple[int, int]

    def __len__(self) -> int:
        return len(self.tops) * len(self.lefts)

    @property
    def windows(self) -> Int64[np.ndarray, "t 4"]:
        """Top, left, height and width of every tile, row by row."""
        return np.array([(top, left, *self.size) for top in self.tops for left in self.lefts], dtype=np.int64)


def grid(size: tuple[int, int], tile: int, overlap: float) -> Grid:
    """The tiles of an image of this (height, width), of `tile` pixels a side, or of the image's where that is less.

    Neighbours share at least `overlap` of a tile, all along an axis about the same. Raises OptionError for a tile or
    an overlap that cannot work.
    """
    check_tiles(tile, overlap)
    height, width = size
    tops, lefts = (tuple(starts(side, tile, overlap)) for side in size)
    return Grid(tops, lefts, (min(tile, height), min(tile, width)))


def starts(length: int, tile: int, overlap: float) -> list[int]:
    """Where the tiles along one axis of an image begin, spread evenly from its first pixel to its last."""
    if length <= tile:
        return [0]
    step = max(1, int(tile * (1 - overlap)))
    steps = -(-(length - tile) // step)
    return [n * (length - tile) // steps for n in range(steps + 1)]


def check_tiles(tile: int, overlap: float) -> None:
    """Raises OptionError for a tile or an overlap that cannot work."""
    if tile < SMALLEST:
        raise OptionError(f"tile is {tile}: it must be {SMALLEST} pixels or more, such as 800")
    if not 0 <= overlap <= 0.9:
        raise OptionError(f"overlap is {overlap}: it must be from 0 to 0.9 of a tile, such as 0.2")


@dataclass(frozen=True, kw_only=True)
class Tiles(Split):
    """A split whose images are tiles of the images of another, `whole`; boxes and sizes are those in the tiles.

    `files` are those of the whole images. Read them with `TileDataset`.
    """

    whole: Split
    owners: np.ndarray  # (I,) int64: position in `whole` of the image that each is a tile of
    windows: np.ndarray  # (I, 4) int64: top, left, height and width in that image

    def select(self, indices: np.ndarray, name: str) -> Tiles:
        part = super().select(indices, name)
        return Tiles(**vars(part), whole=self.whole, owners=self.owners[indices], windows=self.windows[indices])


class TileDataset(DetectionDataset):
    """The samples of `Tiles`. Each reads its whole image, so that workers need no more memory than for that."""

    split: Tiles

    @cached_property
    def images(self) -> DetectionDataset:
        return DetectionDataset(self.split.whole)

    def _read(self, index: int) -> UInt8[Tensor, "3 H W"]:
        top, left, height, width = self.split.windows[index].tolist()
        return self.images._read(int(self.split.owners[index]))[:, top : top + height, left : left + width]


def whole_of(split: Split) -> Split:
    """The images that a split is of as they are, without tiles."""
    return split.whole if isinstance(split, Tiles) else split


def tiles_of(split: Split, tile: int, overlap: float, seed: int = 0) -> Tiles:
    """The tiles of a split's images that are worth training on.

    Those with an object; of those without, drawn by `seed`, EMPTY for each of them; images no larger than a tile; and
    whole images in which an object is longer than the overlap, as it is looked for there. Objects that a border cuts
    are learnt by what is left of them, or ignored where that is too little (as in `fpn.data.augment`). Raises
    OptionError for a tile or an overlap that cannot work.
    """
    windows = [_looks(split, index, tile, overlap) for index in range(len(split))]
    every, owners = np.concatenate(windows), np.repeat(np.arange(len(split)), [len(each) for each in windows])
    look, row = _seen(split, windows)
    boxes, share = _cut(split.boxes[row], every[look])
    small = (boxes[:, 2:] - boxes[:, :2]).min(axis=1, initial=np.inf) < MIN_SIDE
    ignore = split.ignore[row] | ((share < WHOLE) & (small | (share < MIN_VISIBLE)))
    kept = _worth(owners, look[~ignore], seed)
    mine = np.isin(look, kept)
    counts = np.bincount(look, minlength=len(every))[kept]
    look, row = look[mine], row[mine]
    return Tiles(
        name=split.name,
        classes=split.classes,
        category_ids=split.category_ids,
        root=split.root,
        files=split.files[owners[kept]],
        image_ids=np.arange(1, len(kept) + 1),
        sizes=every[kept, 2:],
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        boxes=boxes[mine],
        labels=split.labels[row],
        ignore=ignore[mine],
        areas=split.areas[row] * share[mine],
        outlines=split.outlines and _moved(split.outlines.select(row), every[look]),
        whole=split,
        owners=owners[kept],
        windows=every[kept],
    )


def _looks(split: Split, index: int, tile: int, overlap: float) -> Int64[np.ndarray, "t 4"]:
    """The tiles of an image, and the whole of it where that is looked at as well and shows what tiles may cut."""
    height, width = split.sizes[index].tolist()
    tiles = grid((height, width), tile, overlap).windows
    boxes = split.boxes[split.rows(index)][~split.ignore[split.rows(index)]]
    longest = (boxes[:, 2:] - boxes[:, :2]).max(initial=0)
    if len(tiles) == 1 or longest <= overlap * tile:
        return tiles
    return np.concatenate([tiles, [(0, 0, height, width)]])


def _seen(
    split: Split, windows: Sequence[Int64[np.ndarray, "_ 4"]]
) -> tuple[Int64[np.ndarray, " p"], Int64[np.ndarray, " p"]]:
    """Which objects lie in which windows, if only in part: the number of the window over all images, and the row."""
    looks, rows, first = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], 0
    for index, here in enumerate(windows):
        own = split.rows(index)
        corners = here[:, None, 1::-1]  # left and top
        low = np.maximum(split.boxes[own, :2], corners)
        high = np.minimum(split.boxes[own, 2:], corners + here[:, None, :1:-1])
        look, row = np.nonzero((high > low).all(axis=2))
        looks.append(first + look)
        rows.append(own.start + row)
        first += len(here)
    return np.concatenate(looks), np.concatenate(rows)


def _cut(
    boxes: Float[np.ndarray, "p 4"], windows: Int64[np.ndarray, "p 4"]
) -> tuple[Float[np.ndarray, "p 4"], Float[np.ndarray, " p"]]:
    """Boxes as they are in windows, cut at the borders of these, and the share that is left of each."""
    moved = boxes - windows[:, [1, 0, 1, 0]]
    cut = np.minimum(np.maximum(moved, 0), windows[:, [3, 2, 3, 2]])
    left, whole = ((each[:, 2:] - each[:, :2]).prod(axis=1) for each in (cut, moved))
    return cut, left / np.maximum(whole, 1e-9)


def _worth(owners: Int64[np.ndarray, " w"], with_object: Int64[np.ndarray, "_"], seed: int) -> Int64[np.ndarray, " k"]:
    """Which windows are trained on, of those of each image (`owners`) and those in which there is an object."""
    kept = np.bincount(owners)[owners] == 1
    kept[with_object] = True
    empty = np.flatnonzero(~kept)
    most = round(EMPTY * len(np.unique(with_object)))
    kept[np.random.default_rng(seed).permutation(empty)[:most]] = True
    return np.flatnonzero(kept)


def _moved(outlines: Outlines, windows: Int64[np.ndarray, "m 4"]) -> Outlines:
    """The outlines of objects, each as it is in a window of its image."""

    def move(top: int, left: int, height: int, width: int) -> Move:
        return Move(lambda points: points - (left, top), lambda mask: mask[top : top + height, left : left + width])

    return outlines.changed({row: move(*window) for row, window in enumerate(windows.tolist())})
