"""`load`: one call for every format, found out by looking at the folder."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np

from fpn.data import coco, voc, yolo
from fpn.data.dataset import Data, Split
from fpn.data.splits import UNSPLIT, add_missing
from fpn.errors import DataError
from fpn.words import counted, some_of

_READERS = {"coco": coco, "voc": voc, "yolo": yolo}


def load(path: str | os.PathLike[str], seed: int = 0, draw: bool = True, outlines: bool = False) -> Data:
    """Reads a data set: a folder in COCO, Pascal VOC or YOLO format, a COCO JSON file, or a YOLO data.yaml.

    Single defects do not stop the reading; they are in `Data.problems`. Where the data has no val split one is drawn
    with `seed`, and `Data.notes` say so; without `draw` the splits are those of the data, "train" where it has none.
    With `outlines` those of the objects are read too, as far as COCO or YOLO files have them: for detectors with masks.

    Raises:
        DataError: nothing is there, the format is unknown or not clear, an annotation file is cut off, or nothing
            usable remains.
    """
    path = Path(path).expanduser()
    form = _format(path)
    data = voc.read(path) if form == "voc" else _READERS[form].read(path, outlines)
    splits = {name: split for name, split in data.splits.items() if len(split)}
    splits, without = _some_outlines(splits)
    notes = [f"the split {name} has no usable images and is left out" for name in data.splits.keys() - splits.keys()]
    problems = "".join(f"\n  {problem}" for problem in data.problems[:5])
    if not splits:
        raise DataError(f"{path}: {data.format} format, but not one usable image{problems and '; problems:'}{problems}")
    if not data.classes:
        raise DataError(f"{path}: {data.format} format, but it names no classes")
    labels = np.concatenate([split.labels for split in splits.values()])
    counts = np.bincount(labels, minlength=len(data.classes))
    if not counts.sum() and problems:
        raise DataError(f"{path}: not one usable box; problems:{problems}")

    splits, made = add_missing(splits, seed) if draw else (splits, [])
    if UNSPLIT in splits and len(splits) == 1:
        splits = {"train": splits[UNSPLIT]}
    notes = [*data.notes, *notes, *without, *made, *_class_notes(splits, counts)]
    return dataclasses.replace(data, splits=splits, notes=notes)


def _some_outlines(splits: dict[str, Split]) -> tuple[dict[str, Split], list[str]]:
    """The splits, without outlines where no object of the data has one, and notes on where only some have."""
    known = {name: split.outlines.known for name, split in splits.items() if split.outlines is not None}
    if not any(rows.any() for rows in known.values()):
        return {name: dataclasses.replace(split, outlines=None) for name, split in splits.items()}, []
    return splits, [
        f"{(~rows).sum()} of {counted(len(rows), 'object')} of {name} have no usable outline; their boxes stand in"
        for name, rows in known.items()
        if not rows.all()
    ]


def _class_notes(splits: dict[str, Split], counts: np.ndarray) -> list[str]:
    """Which classes have no box at all (`counts` (K,) are those of all boxes), and which have none in one split."""
    notes = []
    classes = next(iter(splits.values())).classes
    unused = [name for name, count in zip(classes, counts, strict=True) if not count]
    if unused:
        notes.append(f"no box has the class {some_of([repr(name) for name in unused])}")
    for split in splits.values():
        here = np.bincount(split.labels, minlength=len(classes))
        absent = [classes[label] for label in np.flatnonzero((here == 0) & (counts > 0))]
        effect = "so it cannot be learnt" if split.name == "train" else "so there is no score for it"
        if absent:
            notes.append(f"no box of {split.name} has the class {some_of([repr(name) for name in absent])}, {effect}")
    return notes


def _format(path: Path) -> str:
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    if path.is_file():
        match path.suffix.lower():
            case ".json":
                return "coco"
            case ".yaml" | ".yml":
                return "yolo"
    if not path.is_dir():
        raise DataError(f"{path}: a data set is a folder, a COCO JSON file or a YOLO data.yaml")
    fitting = [name for name, reader in _READERS.items() if reader.looks_like(path)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise DataError(
            f"{path}: looks like {' and '.join(fitting)} at once; give the COCO JSON file or the YOLO data.yaml "
            "itself, or keep one format a folder"
        )
    entries = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
    names = [entry.name + "/" * entry.is_dir() for entry in entries[:8]] + ["..."] * (len(entries) > 8)
    here = f"it has {', '.join(names)}" if entries else "it is empty"
    folders = [entry for entry in entries if entry.is_dir()]
    inner = [folder for folder in folders if any(reader.looks_like(folder) for reader in _READERS.values())]
    hint = f" Did you mean {inner[0]}?" if inner else ""
    shapes = "".join(f"\n  {reader.SHAPE}" for reader in _READERS.values())
    raise DataError(f"{path}: no data set in a known format; {here}.{hint} Looked for one of:{shapes}")
