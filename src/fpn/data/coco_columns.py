"""One COCO JSON file -> columns, entry by entry, so that 100,000 images with outlines take a few hundred megabytes."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fpn.data.json_lists import read_lists
from fpn.data.outlines import Column, Outlines
from fpn.errors import DataError

_CHUNK = 64  # annotations held as parsed at a time; thousands would be slower, as they leave the processor's cache


class ImageEntry(NamedTuple):
    """An entry of "images"; without an id or a file name it cannot be used."""

    id: int | str | None
    file_name: str
    height: Any
    width: Any


@dataclass(frozen=True)
class Annotations:
    """The columns of "annotations"; None and NaN where an entry does not have what it should."""

    ids: list[int | str | None]
    image_ids: list[int | str | None]
    category_ids: list[int | str | None]
    boxes: np.ndarray  # (M, 4) float64: x, y, width, height
    areas: np.ndarray  # (M,) float64
    ignore: np.ndarray  # (M,) bool
    outlines: Outlines | None = None  # only where asked for
    broken: dict[int, str] = field(default_factory=dict)  # what is wrong with the outlines of some rows


@dataclass(frozen=True)
class Content:
    """What one file says."""

    images: list[ImageEntry]
    annotations: Annotations
    categories: list[Any]


def read_columns(file: Path, outlines: bool = False) -> dict[str, Any]:
    """The fields of Content as far as the file has them, and the outlines of objects if asked.

    Raises:
        DataError: the file cannot be read, or is not JSON.
    """
    try:
        take_annotations = partial(_take_annotations, outlines=outlines)
        return read_lists(file, {"images": _take_images, "annotations": take_annotations, "categories": list})
    except json.JSONDecodeError as error:
        raise DataError(
            f"{file}: not valid JSON at line {error.lineno}, column {error.colno} (character {error.pos} of "
            f"{len(error.doc)}): {error.msg}; the file may be cut off, copy or export it again"
        ) from error
    except (ValueError, RecursionError, OSError) as error:
        raise DataError(f"{file}: cannot be read as JSON ({error}); copy or export it again") from error


def _take_images(entries: Iterator[Any]) -> list[ImageEntry]:
    images = []
    for entry in entries:
        known = entry if isinstance(entry, dict) else {}
        name = known.get("file_name")
        name = name.replace("\\", "/") if isinstance(name, str) else ""
        images.append(ImageEntry(to_id(known.get("id")), name, known.get("height"), known.get("width")))
    return images


def _take_annotations(entries: Iterator[Any], outlines: bool) -> Annotations:
    ids, image_ids, category_ids, ignore = [], [], [], []
    column = Column()
    boxes, areas = [np.empty((0, 4))], [np.empty((0, 1))]
    while chunk := list(itertools.islice(entries, _CHUNK)):
        rows = [entry if isinstance(entry, dict) else {} for entry in chunk]
        ids += _to_ids([row.get("id") for row in rows])
        image_ids += _to_ids([row.get("image_id") for row in rows])
        category_ids += _to_ids([row.get("category_id") for row in rows])
        ignore += [row.get("iscrowd") in (1, "1") or row.get("ignore") in (1, "1") for row in rows]
        boxes.append(to_numbers([row.get("bbox") for row in rows], 4))
        areas.append(to_numbers([(row.get("area"),) for row in rows], 1))
        for row in rows if outlines else ():
            column.add(row.get("segmentation"))
    return Annotations(
        ids,
        image_ids,
        category_ids,
        np.concatenate(boxes),
        np.concatenate(areas)[:, 0],
        np.array(ignore, dtype=bool),
        column.outlines() if outlines else None,
        column.broken,
    )


def to_numbers(values: Sequence[Any], width: int) -> np.ndarray:
    """(len(values), width) float64; a row in which something is no number is NaN."""
    try:
        table = np.array(values, dtype=np.float64)
        if table.shape == (len(values), width):
            return table
    except (ValueError, TypeError, OverflowError, RecursionError):
        pass
    if len(values) == 1:
        return np.full((1, width), np.nan)
    rows = [to_numbers([value], width) for value in values]
    return np.concatenate([np.empty((0, width)), *rows])


def _to_ids(values: list[Any]) -> list[int | str | None]:
    return [value if type(value) is int else to_id(value) for value in values]


def to_id(value: Any) -> int | str | None:
    """An id as it may be used to look things up; None for what cannot be one."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int | str) and not isinstance(value, bool) else None
