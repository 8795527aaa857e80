"""Fixed proposals: what one detector proposes, saved in a file, for another to look at (paper, section 5.2)."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from fpn.data.dataset import Data, SavedRegions, Split
from fpn.errors import DataError
from fpn.evaluation.metrics import Results
from fpn.words import some_of
from fpn.writing import replacing

KEY, FORMAT = "fpn_regions", 1
SHAPES = {"sizes": (np.int64, (2,)), "offsets": (np.int64, ()), "boxes": (np.float32, (4,)), "scores": (np.float32, ())}
BEYOND = 1e-3  # pixels that rounding may put a region over the border


def write_regions(file: str | os.PathLike[str], split: Split, results: Results) -> Path:
    """Write the proposals on a split, of `detect_split`, to a .safetensors file; it is there whole or not at all.

    Tensors: sizes (I, 2) int64, height and width of the images, whose names are in the metadata; offsets (I + 1,)
    int64; boxes (P, 4) float32, x1, y1, x2, y2 in pixels of the original images, cut at their border; scores (P,)
    float32. Those of image i are the rows offsets[i]:offsets[i+1], best first.
    """
    file = Path(file)
    order = np.lexsort((-results.scores, results.indices))
    counts = np.bincount(results.indices, minlength=len(split))
    tensors = {
        "sizes": split.sizes.astype(np.int64),
        "offsets": np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        "boxes": np.clip(results.boxes, 0, split.sizes[results.indices][:, [1, 0, 1, 0]])[order].astype(np.float32),
        "scores": results.scores[order].astype(np.float32),
    }
    about = {"format": FORMAT, "split": split.name, "files": [str(name) for name in split.files]}
    with replacing(file) as unfinished:
        save_file({name: np.ascontiguousarray(t) for name, t in tensors.items()}, unfinished, {KEY: json.dumps(about)})
    return file


def with_regions(split: Split, file: str | os.PathLike[str]) -> Split:
    """The split with the proposals of a file that `write_regions` made, of the same images or of more.

    Raises DataError where the file cannot be read, lacks an image or has one of another size.
    """
    names, _, tensors = _read(Path(file))
    return _given(split, Path(file), names, tensors)


def _given(split: Split, file: Path, names: list[str], tensors: dict[str, np.ndarray]) -> Split:
    sizes, place = tensors.pop("sizes"), {name: n for n, name in enumerate(names)}
    missing = [name for name in map(str, split.files) if name not in place]
    if missing:
        raise DataError(
            f"{file}: no proposals for {len(missing):,} of the {len(split):,} images of split {split.name!r}: "
            f"{some_of(missing)}; they must be made on this very split"
        )
    rows = np.array([place[str(name)] for name in split.files], dtype=np.int64)
    other = np.flatnonzero((sizes[rows] != split.sizes).any(axis=1))
    if len(other):
        name, (height, width), (h, w) = split.files[other[0]], split.sizes[other[0]], sizes[rows[other[0]]]
        raise DataError(
            f"{file}: {name} has {width}x{height} pixels, but its proposals were made when it had {w}x{h}; make them "
            "anew"
        )
    return replace(split, regions=SavedRegions(**tensors).select(rows))


def attach(data: Data, files: Sequence[str | os.PathLike[str]]) -> Data:
    """The data with the proposals of these files, each for the split that it was made on; see `with_regions`.

    Raises DataError where a file is of a split that the data has not, or of one that another file is of.
    """
    splits, owner = dict(data.splits), {}
    for file in map(Path, files):
        names, name, tensors = _read(file)
        if name in owner:
            raise DataError(f"{file}: of the split {name!r}, as {owner[name]} is: give one file for each split")
        owner[name] = file
        splits[name] = _given(data[name], file, names, tensors)
    return replace(data, splits=splits)


def _read(file: Path) -> tuple[list[str], str, dict[str, np.ndarray]]:
    """The names of the images and of their split, and the tensors; all that `with_regions` counts on is made sure."""
    if not file.is_file():
        raise DataError(f"{file}: no such file of proposals; fpn.data.write_regions makes one")
    try:
        with safe_open(file, framework="numpy") as content:
            about = json.loads((content.metadata() or {})[KEY])
            tensors = {name: content.get_tensor(name) for name in SHAPES}
        names, split = [str(name) for name in about["files"]], str(about["split"])
    except (SafetensorError, OSError, ValueError, TypeError, LookupError, MemoryError, RecursionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{file}: not a whole file of proposals ({reason}); make it anew with write_regions") from error
    if fault := _fault(about, names, **tensors):
        raise DataError(f"{file}: {fault}; make it anew with write_regions")
    return names, split, tensors


def _fault(
    about: dict[str, Any],
    names: list[str],
    sizes: np.ndarray,
    offsets: np.ndarray,
    boxes: np.ndarray,
    scores: np.ndarray,
) -> str | None:
    """What is wrong with the content of a file of proposals."""
    if about.get("format") != FORMAT:
        return f"written in format {about.get('format')}, which this version does not read"
    tensors = {"sizes": sizes, "offsets": offsets, "boxes": boxes, "scores": scores}
    for name, (kind, rest) in SHAPES.items():
        if tensors[name].dtype != kind or tensors[name].shape[1:] != rest or tensors[name].ndim != 1 + len(rest):
            return f"{name} is {tensors[name].dtype} of shape {tensors[name].shape}"
    counts = np.diff(offsets)
    whole = len(offsets) == len(names) + 1 == len(sizes) + 1 and offsets[0] == 0 and (counts >= 0).all()
    if not whole or not offsets[-1] == len(boxes) == len(scores):
        return f"{len(boxes)} proposals with {len(scores)} scores do not divide into {len(names)} images"
    border = np.repeat(sizes[:, ::-1], counts, axis=0)
    inside = (boxes[:, :2] >= -BEYOND).all(1) & (boxes[:, 2:] <= border + BEYOND).all(1)
    good = np.isfinite(boxes).all(1) & np.isfinite(scores) & inside & (boxes[:, 2:] >= boxes[:, :2]).all(1)
    if not good.all():
        row = int(np.flatnonzero(~good)[0])
        image = int(np.searchsorted(offsets, row, side="right")) - 1
        return f"proposal {row - offsets[image]} of {names[image]} is no box inside the image ({boxes[row].tolist()})"
    return None
