"""The outlines of objects, COCO's "segmentation": polygons or run lengths, in two flat arrays, made pixels when needed.

Arrays because COCO has 46 million points: 370 MB here, gigabytes as lists. They are read only where they are asked for.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import UInt8

from fpn.errors import DataError
from fpn.rle import mask_of, runs_of, runs_of_mask

FARTHEST = 1e5  # pixels: a corner beyond is a mistake, and drawing a line that far takes memory
_BREAK = (math.nan, math.nan)  # between the rings of an object


@dataclass(frozen=True)
class Move:
    """A change of an image: what becomes of points (n, 2) as x and y in it, and of a mask (H, W)."""

    points: Callable[[np.ndarray], np.ndarray]
    mask: Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Outlines:
    """The outlines of M objects. An object without one has an empty span: its box stands in for it.

    Rows spans[m, 0]:spans[m, 1] of `points` are the corners x, y of its polygons, with NaN between two of them. Or they
    are, read as one row of numbers and where `encoded`, the height and width of an image and runs of 0 and 1 in it,
    column by column.
    """

    points: np.ndarray  # (P, 2) float64, shared by all selections
    spans: np.ndarray  # (M, 2) int64
    encoded: np.ndarray  # (M,) bool

    @property
    def known(self) -> np.ndarray:
        """(M,) bool: which objects have an outline."""
        return self.spans[:, 1] > self.spans[:, 0]

    def around(self) -> np.ndarray:
        """(M, 4) float64: the box around the polygons of each object, NaN where it has none. For `Column.outlines`."""
        boxes = np.full((len(self.spans), 4), np.nan)
        rows = np.flatnonzero(self.known & ~self.encoded)
        if len(rows):
            spans = self.spans[rows].ravel()  # every second of the sections is one between two spans
            boxes[rows, :2] = np.fmin.reduceat(self.points, spans)[::2]
            boxes[rows, 2:] = np.fmax.reduceat(self.points, spans)[::2]
        return boxes

    def sizes(self) -> np.ndarray:
        """(M, 2) int64: height and width that the run lengths are of, 0 for polygons."""
        sizes, rows = np.zeros(self.spans.shape, np.int64), self.known & self.encoded
        sizes[rows] = self.points[self.spans[rows, 0]].clip(0, 2**31)
        return sizes

    def scaled(self, factors: np.ndarray) -> Outlines:
        """The same with the points of object m times factors[m] (x, y); only for polygons of `Column.outlines`."""
        points, (begin, end) = self.points.copy(), self.spans.T
        rows = self.known
        assert not self.encoded.any() and (begin[1:] == end[:-1]).all(), "all points, in the order of the objects"
        points[: end.max(initial=0)] *= np.repeat(factors[rows], (end - begin)[rows], axis=0)
        return Outlines(points, self.spans, self.encoded)

    def select(self, rows: np.ndarray) -> Outlines:
        """Those of the given objects, in the given order."""
        return Outlines(self.points, self.spans[rows], self.encoded[rows])

    def without(self, rows: np.ndarray) -> Outlines:
        """The same, with none for the objects in these rows."""
        spans = self.spans.copy()
        spans[rows] = 0
        return Outlines(self.points, spans, self.encoded)

    def changed(self, moves: Mapping[int, Move]) -> Outlines:
        """The same, after the images of the objects in some rows were turned, scaled or cut."""
        parts, spans, end = [self.points], self.spans.copy(), len(self.points)
        for row, move in moves.items():
            if self.known[row]:
                own = self.points[slice(*self.spans[row].tolist())]
                parts.append(_as_points(move.mask(self._mask_of_runs(row))) if self.encoded[row] else move.points(own))
                spans[row] = end, end + len(parts[-1])
                end += len(parts[-1])
        return Outlines(np.concatenate(parts), spans, self.encoded)

    def segmentation(self, row: int) -> Any:
        """An outline as COCO writes it: a list of polygons, or size and run lengths; None where there is none."""
        if not self.known[row]:
            return None
        if self.encoded[row]:
            height, width, *runs = self._numbers(row).astype(np.int64).tolist()
            return {"size": [height, width], "counts": runs}
        return [ring.ravel().tolist() for ring in self._rings(row)]

    def mask(self, row: int, box: np.ndarray, size: tuple[int, int]) -> UInt8[np.ndarray, "H W"]:
        """1 where the object is, in an image of this size; without an outline, where its box (x1, y1, x2, y2) is."""
        if not self.known[row]:
            return polygon_mask([rectangle(box)], size)
        if not self.encoded[row]:
            return polygon_mask([ring.ravel().tolist() for ring in self._rings(row)], size)
        return fitted(self._mask_of_runs(row), size)

    def _numbers(self, row: int) -> np.ndarray:
        return self.points[slice(*self.spans[row].tolist())].ravel()

    def _rings(self, row: int) -> list[np.ndarray]:
        points = self.points[slice(*self.spans[row].tolist())]
        breaks = np.flatnonzero(np.isnan(points[:, 0]))
        return [ring[~np.isnan(ring[:, 0])] for ring in np.split(points, breaks)]

    def _mask_of_runs(self, row: int) -> UInt8[np.ndarray, "H W"]:
        height, width, *_ = numbers = self._numbers(row)
        return mask_of(numbers[2:], (int(height), int(width)))


def join(parts: Iterable[tuple[Outlines | None, int]]) -> Outlines | None:
    """The outlines of several splits as those of one; each comes with its number of objects. None if none has any."""
    parts = list(parts)
    if all(part is None for part, _ in parts):
        return None
    arrays: dict[int, int] = {}  # where each array of points begins: splits drawn from one share it
    points, spans, encoded, end = [np.zeros((0, 2))], [], [], 0
    for part, number in parts:
        part = nothing(number) if part is None else part
        if id(part.points) not in arrays:
            arrays[id(part.points)] = end
            points.append(part.points)
            end += len(part.points)
        spans.append(np.where(part.known[:, None], part.spans + arrays[id(part.points)], 0))
        encoded.append(part.encoded)
    kept = points[1] if len(arrays) == 1 else np.concatenate(points)
    return Outlines(kept, np.concatenate(spans), np.concatenate(encoded))


def nothing(objects: int) -> Outlines:
    """No outline for any of the objects."""
    return Outlines(np.zeros((0, 2)), np.zeros((objects, 2), np.int64), np.zeros(objects, bool))


def needed(outlines: Outlines | None, where: object) -> Outlines:
    """The outlines. Raises DataError for data that have none, or were read without them."""
    if outlines is None:
        raise DataError(
            f"{where}: has no outlines of objects to learn masks from (COCO's 'segmentation', or polygons in YOLO "
            "labels); take a detector without masks, or, where the files have them, read with load(..., outlines=True)"
        )
    return outlines


def rectangle(box: np.ndarray) -> list[float]:
    """The corners of a box, as one polygon of COCO."""
    x1, y1, x2, y2 = box.tolist()
    return [x1, y1, x2, y1, x2, y2, x1, y2]


def polygon_mask(rings: list[list[float]], size: tuple[int, int]) -> UInt8[np.ndarray, "H W"]:
    """The pixels inside any of the polygons, exactly as pycocotools draws them."""
    from faster_coco_eval.core import mask as api

    return api.decode(api.merge(api.frPyObjects(rings, *size)))  # type: ignore[arg-type]


def fitted(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A mask (h, w) cut, or continued with 0, at the right and bottom to this size."""
    if mask.shape == size:
        return mask
    whole = np.zeros(size, mask.dtype)
    height, width = min(size[0], mask.shape[0]), min(size[1], mask.shape[1])
    whole[:height, :width] = mask[:height, :width]
    return whole


def resized(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A mask at another size, each pixel that of the old one in which its middle lies."""
    rows, columns = (
        ((np.arange(new) + 0.5) * old / new).astype(int) for old, new in zip(mask.shape, size, strict=True)
    )
    return mask[rows][:, columns]


def _as_points(mask: np.ndarray) -> np.ndarray:
    return _in_pairs([*mask.shape, *runs_of_mask(mask).tolist()])


def _in_pairs(numbers: list[float]) -> np.ndarray:
    return np.array(numbers + [0] * (len(numbers) % 2), dtype=np.float64).reshape(-1, 2)  # a run of 0 changes nothing


class Column:
    """Takes the "segmentation" of one annotation after the other; what is wrong with some is in `broken`, by row."""

    def __init__(self) -> None:
        self.numbers = array("d")
        self.ends: list[int] = []
        self.encoded: list[bool] = []
        self.broken: dict[int, str] = {}

    def add(self, value: Any) -> None:
        encoded = isinstance(value, dict) and bool(value)
        if encoded:
            reason = self._add_runs(value)
        elif isinstance(value, list):
            reason = self._add_rings(value)
        else:
            reason = "is neither polygons nor RLE" if value else ""
        if reason:
            self.broken[len(self.ends)] = reason
        self.ends.append(len(self.numbers) // 2)
        self.encoded.append(encoded)

    def outlines(self) -> Outlines:
        ends = np.array(self.ends, dtype=np.int64)
        spans = np.stack([np.concatenate([[0], ends[:-1]]) if len(ends) else ends, ends], axis=1)
        self.numbers.extend(_BREAK)  # so that every span ends before the last point, see `around`
        points = np.frombuffer(self.numbers, dtype=np.float64).reshape(-1, 2)
        return Outlines(points, spans, np.array(self.encoded, dtype=bool))

    def _add_rings(self, value: list[Any]) -> str:
        """Takes the polygons that can be used, and says what is wrong with the last of the others."""
        reason, begin = "", len(self.numbers)
        for ring in value if value and isinstance(value[0], list) else [value]:
            fault = _fault(ring)
            reason = fault or reason
            if ring and not fault:
                if len(self.numbers) > begin:
                    self.numbers.extend(_BREAK)
                self.numbers.extend(ring)
        return reason

    def _add_runs(self, value: dict[str, Any]) -> str:
        try:
            height, width = (int(side) for side in value["size"])
            counts = value["counts"]
            runs = runs_of(counts) if isinstance(counts, str) else np.array(counts, dtype=np.float64)
            whole = runs.ndim == 1 and bool((runs >= 0).all()) and bool((runs % 1 == 0).all())
            if not whole or min(height, width) < 1 or runs.sum() != height * width:
                return "has runs that do not add up to its size"
            self.numbers.frombytes(_in_pairs([height, width, *runs.tolist()]).tobytes())
            return ""
        except (KeyError, TypeError, ValueError, OverflowError):
            return "is not RLE: that is 'size', a height and a width, and 'counts', numbers or a compressed text"


def _fault(ring: Any) -> str:
    """What is wrong with one polygon; empty for a good one, and for an empty one, as exporters write for none."""
    try:
        if len(ring) % 2:
            return f"has an odd number of coordinates ({len(ring)})"
        if 0 < len(ring) < 6:
            return f"has {len(ring) // 2} points, and needs 3"
        if not all(map(math.isfinite, ring)):
            return "has a coordinate that is not a finite number"
        if ring and not -FARTHEST < min(ring) <= max(ring) < FARTHEST:
            return "has a coordinate far outside of any image"
    except (TypeError, OverflowError):
        return "has a coordinate that is no number"
    return ""
