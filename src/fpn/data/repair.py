"""A copy of a data set without the defects that a program can mend, and a list of what was changed."""

from __future__ import annotations

import dataclasses
import os
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from fpn.data.convert import not_kept
from fpn.data.copies import new_folder
from fpn.data.dataset import Data, Split
from fpn.data.defects import KINDS, Defect, find_defects, spellings
from fpn.data.images import image_size
from fpn.data.load import load
from fpn.data.outlines import Move, fitted, resized
from fpn.data.scan import PATIENCE, exif_orientation
from fpn.data.writers import write_coco
from fpn.errors import DataError
from fpn.words import counted, printable

_UNUSABLE_IMAGES = {"missing-image", "unreadable-image", "damaged-image", "huge-image"}
_SECOND_IMAGES = {"leak", "duplicate-image"}  # not those that are nearly the same: two frames of a film may be wanted
_REMOVED_BOXES = {"tiny-box", "huge-box", "duplicate-box"}
FOR_PEOPLE = {"near-leak", "near-duplicate", "untrained-class", "no-boxes", "clashing-id"}  # what `repair` leaves


@dataclass(frozen=True)
class Change:
    """What was done about one defect, or followed from it."""

    kind: str
    split: str
    file: str
    item: str
    text: str

    def __str__(self) -> str:
        place = " ".join(filter(None, (f"{printable(self.file)}:" * bool(self.file), self.item)))
        return f"{place} {self.text}"


@dataclass(frozen=True)
class Repair:
    """What `repair` found, did, could not carry over, and left."""

    defects: list[Defect]
    changes: list[Change]
    lost: list[str]  # what the copy does not hold of the original, a sentence each
    remaining: list[Defect]  # of the copy


def repair(
    data: Data,
    out: str | os.PathLike[str],
    *,
    ignore: Collection[str] = (),
    workers: int | None = None,
    patience: float = PATIENCE,
) -> Repair:
    """Writes a mended copy of a data set in COCO format into the new folder `out`, and checks the copy.

    Images that cannot be used are left out, of the same picture in two splits the one in train (before val, before
    test); boxes that cannot be used are left out, others cut at the border; sizes, EXIF rotations, classes without
    boxes and twice-spelt classes are corrected. Image files stay as they are (hard links, or copies on another disk).

    Args:
        data: as `load` gives it with draw=False.
        out: a new folder outside the data. It is there whole or not at all.
        ignore: kinds of defects to leave as they are and not to report.
        workers, patience: as `find_defects` takes them.

    Raises:
        OptionError: `out` is not empty or lies inside the data.
        DataError: nothing usable would remain.
        FpnError: the disk refuses.
    """
    with new_folder(out, data) as folder:  # refused before the images are decoded, which may take minutes
        defects = [d for d in find_defects(data, workers=workers, patience=patience) if d.kind not in ignore]
        mended, changes = mend(data, defects)
        write_coco(mended, folder)
    # The copy has no trace of an id that clashed; its boxes are lost all the same until a person has sorted them.
    remaining = [defect for defect in defects if defect.kind == "clashing-id"]
    again = find_defects(load(out, draw=False, outlines=True), workers=workers, patience=patience)
    remaining += [defect for defect in again if defect.kind not in ignore]
    return Repair(defects, changes, not_kept(data, "coco"), remaining)


def mend(data: Data, defects: list[Defect]) -> tuple[Data, list[Change]]:
    """The data without the given defects, as far as they can be mended, and what was done.

    Raises:
        DataError: nothing usable would remain.
    """
    changes = [Change(d.kind, d.split, d.file, d.item, d.text) for d in defects if _met_in_reading(d)]
    of_split: dict[str, list[Defect]] = defaultdict(list)
    for defect in defects:
        of_split[defect.split].append(defect)
    splits = {name: _mend_split(split, of_split[name], changes) for name, split in data.items()}
    for name in [name for name, split in splits.items() if not len(split)]:
        del splits[name]
        changes.append(Change("empty-split", name, "", name, "has no image left and is left out"))
    if not sum(len(split.boxes) for split in splits.values()):
        raise DataError(f"{data.path}: no box would be left in a repaired copy; see what fpn data check lists")
    splits = _mend_classes(data, splits, defects, changes)
    classes = next(iter(splits.values())).classes
    order = {kind: rank for rank, kind in enumerate(KINDS)}
    changes.sort(key=lambda change: order.get(change.kind, len(order)))
    return dataclasses.replace(data, classes=classes, splits=splits, problems=[], notes=[]), changes


def _met_in_reading(defect: Defect) -> bool:
    """Those of `Data.problems`: they are about no image or box of the splits, for the reader has mended them."""
    others = ("class-spelling", "unused-class", "untrained-class")
    return not defect.split and defect.image < 0 and defect.kind not in others


@dataclass
class _Draft:
    """A split on its way: its boxes and sizes as they change, and what is to go."""

    split: Split
    boxes: np.ndarray
    areas: np.ndarray
    sizes: np.ndarray
    moves: dict[int, Move] = field(default_factory=dict)  # of outlines, by row
    images_out: set[int] = field(default_factory=set)
    rows_out: set[int] = field(default_factory=set)


def _mend_split(split: Split, defects: list[Defect], changes: list[Change]) -> Split:
    draft = _Draft(split, split.boxes.copy(), split.areas.copy(), split.sizes.copy())
    wrong_sizes = []
    for defect in defects:
        text = ""
        if defect.kind in _UNUSABLE_IMAGES | _SECOND_IMAGES and defect.image >= 0:
            draft.images_out.add(defect.image)
            text = f"{defect.text}: left out{_with_boxes(split, defect.image)}"
        elif defect.kind in _REMOVED_BOXES:
            draft.rows_out.add(defect.box)
            text = f"{defect.text}: the box is left out"
        elif defect.kind == "exif-ignored":
            text = _turn(draft, defect.image)
        elif defect.kind == "image-size":
            wrong_sizes.append(defect)
        if text:
            changes.append(Change(defect.kind, split.name, defect.file, defect.item, text))
    _correct_sizes(draft, wrong_sizes, changes)
    return _finished(draft)


def _with_boxes(split: Split, index: int) -> str:
    number = int(split.offsets[index + 1] - split.offsets[index])
    return f", with its {counted(number, 'box', 'boxes')}" if number else ""


def _turn(draft: _Draft, index: int) -> str:
    """Boxes drawn on the pixels as stored -> on the image as displayed (EXIF 2.32, tag 0x0112, values 5 to 8)."""
    rows = draft.split.rows(index)
    height, width = draft.sizes[index].tolist()
    orientation = exif_orientation(draft.split.path(index))
    x1, y1, x2, y2 = draft.boxes[rows].T
    if orientation in (6, 7):
        y1, y2 = height - y2, height - y1
    if orientation in (7, 8):
        x1, x2 = width - x2, width - x1
    draft.boxes[rows] = np.stack([y1, x1, y2, x2], axis=1)
    draft.sizes[index] = width, height
    draft.moves |= dict.fromkeys(range(rows.start, rows.stop), turning(orientation, (height, width)))
    return f"annotated as {height}x{width} (width x height) as displayed{_with_boxes(draft.split, index)} turned"


def turning(orientation: int, size: tuple[int, int]) -> Move:
    """From the pixels as stored, of this size, to the image as displayed with one of the EXIF values 5 to 8."""
    down, across = (-1 if orientation in (6, 7) else 1), (-1 if orientation in (7, 8) else 1)
    ends = np.array([size[1] if across < 0 else 0, size[0] if down < 0 else 0])
    return Move(
        lambda points: (ends + points * [across, down])[:, ::-1],
        lambda mask: mask[::down, ::across].T,
    )


def _correct_sizes(draft: _Draft, defects: list[Defect], changes: list[Change]) -> None:
    """Sets sizes to the real ones.

    The boxes stay where they are in pixels, as training would take them, unless that cannot be: where images have the
    annotated shape and boxes reach over their border, they were made smaller after annotating, and boxes follow.
    """
    real = {defect.image: np.array(image_size(draft.split.path(defect.image))) for defect in defects}
    factors = {index: size / draft.sizes[index] for index, size in real.items()}
    shrunk = [i for i, factor in factors.items() if factor.max() < 1 and np.ptp(factor) <= 1 / draft.sizes[i].min()]
    outside = any((draft.boxes[draft.split.rows(i), 2:] > real[i][::-1] + 1).any() for i in shrunk)
    for defect in defects:
        index, rows = defect.image, draft.split.rows(defect.image)
        old, new = (f"{w}x{h}" for h, w in (draft.sizes[index].tolist(), real[index].tolist()))
        text = f"size corrected from {old} to {new}, boxes kept in pixels"
        new_size = (int(real[index][0]), int(real[index][1]))
        move = Move(np.copy, partial(fitted, size=new_size))
        if outside and index in shrunk:
            down, across = factors[index]
            draft.boxes[rows] *= [across, down, across, down]
            draft.areas[rows] *= across * down
            text = f"size corrected from {old} to {new}, boxes made smaller by as much"
            move = Move(partial(np.multiply, [across, down]), partial(resized, size=new_size))
        draft.moves |= dict.fromkeys(range(rows.start, rows.stop), move)
        draft.sizes[index] = real[index]
        limits = real[index][[1, 0, 1, 0]]
        cut = np.minimum(draft.boxes[rows], limits)
        changed = (cut != draft.boxes[rows]).any(axis=1)
        empty = (cut[:, 2:] <= cut[:, :2]).any(axis=1)
        draft.boxes[rows] = cut
        own = np.prod(cut[:, 2:] - cut[:, :2], axis=1)
        draft.areas[rows] = np.where(changed, own, draft.areas[rows])
        draft.rows_out |= set((np.flatnonzero(empty) + rows.start).tolist())
        text += f", {changed.sum()} cut at the border" * bool(changed.any())
        text += f", {empty.sum()} of them left out" * bool(empty.any())
        changes.append(Change(defect.kind, draft.split.name, defect.file, "", text))


def _finished(draft: _Draft) -> Split:
    split = draft.split
    rows = np.ones(len(split.boxes), dtype=bool)
    rows[list(draft.rows_out)] = False
    image_of = split.image_of[rows]
    counts = np.bincount(image_of, minlength=len(split))
    whole = dataclasses.replace(
        split,
        sizes=draft.sizes,
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        boxes=draft.boxes[rows],
        labels=split.labels[rows],
        ignore=split.ignore[rows],
        areas=draft.areas[rows],
        outlines=split.outlines and split.outlines.changed(draft.moves).select(rows),
    )
    images = np.ones(len(split), dtype=bool)
    images[list(draft.images_out)] = False
    return whole.select(np.flatnonzero(images), split.name)


def _mend_classes(
    data: Data, splits: dict[str, Split], defects: list[Defect], changes: list[Change]
) -> dict[str, Split]:
    """One spelling a class, and no class that had no box before; all splits get the same ids."""
    kinds = {defect.kind for defect in defects}
    counts = _counts(data.classes, splits)
    target = np.arange(len(data.classes))
    names = list(data.classes)
    for same in spellings(data.classes).values() if "class-spelling" in kinds else ():
        labels = [data.classes.index(name) for name in same]
        first = max(labels, key=lambda label: counts[label])
        target[labels] = first
        names[first] = " ".join(names[first].split())
        others = " and ".join(repr(name) for name in same if name != names[first])
        changes.append(Change("class-spelling", "", "", f"class {names[first]!r}", f"takes the place of {others}"))
    splits = {name: dataclasses.replace(split, labels=target[split.labels]) for name, split in splits.items()}
    counts = _counts(data.classes, splits)
    named = {defect.item for defect in defects if defect.kind == "unused-class"}
    kept = []
    for label, name in enumerate(names):
        if target[label] != label:
            continue
        if counts[label] or f"class {data.classes[label]!r}" not in named:
            kept.append(label)
        else:
            changes.append(Change("unused-class", "", "", f"class {name!r}", "has no box and is left out"))
    position = np.zeros(len(names), dtype=np.int64)
    position[kept] = np.arange(len(kept))
    ids = next(iter(splits.values())).category_ids[kept]
    classes = tuple(names[label] for label in kept)
    return {
        name: dataclasses.replace(split, classes=classes, category_ids=ids, labels=position[split.labels])
        for name, split in splits.items()
    }


def _counts(classes: tuple[str, ...], splits: dict[str, Split]) -> np.ndarray:
    """(K,) int64 boxes of each class."""
    return sum((np.bincount(s.labels, minlength=len(classes)) for s in splits.values()), np.zeros(len(classes), int))
