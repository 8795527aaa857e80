"""Every defect of a data set, by file and item, with its remedy.

What stops a reader is already in `Data.problems`. Here every image is decoded, and boxes, classes and pictures are
compared with each other, which is where the faults lie that no reader trips over and every metric suffers from.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fpn.data.dataset import Data, Split
from fpn.data.duplicates import near_pairs
from fpn.data.scan import PATIENCE, Scan, scan
from fpn.data.sizes import LONG, SHORT
from fpn.words import counted, printable, some_of

Severity = Literal["error", "warning", "note"]

TINY = 2.0  # pixels of a side
HUGE = 0.99  # of the image
SAME_BOX = 0.95  # IoU above which two boxes of a class are one object drawn twice
SHARE = 0.1  # boxes that cover the image are suspicious where at most so many come on one ordinary box of the class
ENOUGH = 50  # ordinary boxes of a class, from which on it is known what is ordinary


@dataclass(frozen=True)
class Kind:
    """What is said once about all defects of a kind."""

    title: str
    remedy: str
    severity: Severity = "error"


# The most important first. Those that the readers give are explained in fpn.data.dataset.KINDS.
KINDS = {
    "leak": Kind("the same picture in two splits", "keep it in one split: scores measured on it are too good"),
    "near-leak": Kind(
        "nearly the same picture in two splits", "keep it in one split: scores measured on it are too good"
    ),
    "missing-image": Kind("image not found", "add the file, or delete its entry"),
    "unreadable-image": Kind("file that is not an image", "replace the file, or delete it and its annotation"),
    "damaged-image": Kind(
        "image cut off or damaged", "copy it again from where it came, or delete it and its annotation"
    ),
    "huge-image": Kind("image too large to decode", "cut it into tiles"),
    "image-size": Kind(
        "annotated size is not the image's", "correct the size; were the images resized, scale their boxes likewise"
    ),
    "exif-ignored": Kind(
        "boxes drawn on the image before its EXIF rotation",
        "turn the boxes; other programs show the image turned and train on wrong boxes",
    ),
    "missing-annotation": Kind("annotation file not found", "add the file, or take the name off the list"),
    "missing-folder": Kind("folder or list not found", "correct the path"),
    "path-outside": Kind("path that leads out of the data set", "move the file into the data set's folder"),
    "broken-annotation": Kind("annotation that cannot be understood", "export it again, or mend it"),
    "unknown-image": Kind("box of an unknown image", "add the image to the annotations, or delete the box"),
    "unknown-class": Kind("box of an unknown class", "give it one of the classes, or delete it"),
    "clashing-id": Kind(
        "image id of several files", "give each image an id of its own, and each box the id of its image"
    ),
    "duplicate-id": Kind("id used twice", "number anew"),
    "duplicate-class": Kind("class defined twice", "keep one of its ids"),
    "class-sets": Kind("classes that only some splits have", "give all splits the same classes"),
    "class-spelling": Kind("class spelt in several ways", "choose one spelling: each is learnt as a class of its own"),
    "untrained-class": Kind(
        "class without a box to learn from", "add images of it to train, or take it out of the others", "warning"
    ),
    "no-boxes": Kind("not a single box", "draw boxes, or look whether the right annotations are there"),
    "unused-class": Kind("class without any box", "delete it, or add boxes", "warning"),
    "box-not-finite": Kind("box with a number missing or not finite", "draw it again, or delete it"),
    "box-zero-size": Kind("box without width or height", "draw it again, or delete it"),
    "box-outside": Kind("box outside its image", "draw it again, or delete it"),
    "box-cut": Kind("box that reaches over the border", "cut it at the border"),
    "outline-broken": Kind("outline that cannot be used, or a part of one", "draw it again, or delete it"),
    "outline-size": Kind("outline that is a mask of another size than its image", "export it again, or delete it"),
    "duplicate-box": Kind("object with two boxes", "delete one"),
    "huge-box": Kind("box around the whole image, of a class that is small elsewhere", "draw it again", "warning"),
    "tiny-box": Kind(f"box with a side under {TINY:g} pixels", "draw it again, or delete it", "warning"),
    "duplicate-image": Kind("the same picture twice in a split", "keep the copy with the better boxes", "warning"),
    "near-duplicate": Kind("nearly the same picture twice in a split", "look at both; keep one", "warning"),
    "duplicate-entry": Kind("image listed twice", "list it once", "warning"),
    "id-not-integer": Kind("ids that are not whole numbers", "number anew", "warning"),
    "unmeasured-class": Kind(
        "class that val does not have", "add images of it to val, or read nothing from it", "note"
    ),
    "small-when-resized": Kind(
        "boxes too small after resizing", "train with a larger --short, or cut the images into tiles", "note"
    ),
    "exif-unclear": Kind(
        "EXIF rotation of which the annotation does not tell whether it was applied",
        "look at some with fpn data show; boxes are taken as drawn on the image as displayed",
        "note",
    ),
}
OTHER = Kind("other defects of the annotations", "mend or delete what is named")  # a kind that has no entry above


@dataclass(frozen=True)
class Defect:
    """One defect: where, what is wrong, what to do. Those of severity "note" are worth knowing and no defects.

    `image` is the position in its split, `box` the row in the split's boxes; -1 where it is not about one.
    """

    kind: str
    split: str
    file: str
    item: str
    text: str
    image: int = -1
    box: int = -1

    @property
    def remedy(self) -> str:
        return KINDS.get(self.kind, OTHER).remedy

    @property
    def severity(self) -> Severity:
        return KINDS.get(self.kind, OTHER).severity

    def __str__(self) -> str:
        place = " ".join(filter(None, (f"{printable(self.file)}:" * bool(self.file), self.item)))
        return f"{place} {self.text}"


def find_defects(
    data: Data, *, short: int = SHORT, long: int = LONG, workers: int | None = None, patience: float = PATIENCE
) -> list[Defect]:
    """All defects of a data set, the most important kind first. Decodes every image on all cores.

    Args:
        data: as `load` gives it.
        short, long: the size for training in pixels, by which boxes are called too small.
        workers: processes that decode; one a core when left out.
        patience: seconds that one image may take.
    """
    place: dict[str, int] = {}  # of each file among those that are decoded, one that is in two splits once
    positions = {
        name: np.array([place.setdefault(str(split.path(i)), len(place)) for i in range(len(split))], dtype=np.int64)
        for name, split in data.items()
    }
    seen = scan(list(place), workers, patience)
    # Readers name a remedy with some defects; here it stands once, below all of a kind.
    found = [Defect(p.kind, "", p.file, p.item, p.text.replace(", mend or delete it", "")) for p in data.problems]
    for name, split in data.items():
        found += _image_defects(split, seen, positions[name], sizes_given=data.format != "yolo")
        found += _box_defects(split)
        found += _small_when_resized(split, short, long)
    found += _same_pictures(data, seen, positions)
    found += _huge_boxes(data)
    found += _class_defects(data)
    importance = {kind: rank for rank, kind in enumerate(KINDS)}
    return sorted(found, key=lambda defect: importance.get(defect.kind, len(KINDS)))


# Images


def _image_defects(split: Split, seen: Scan, positions: np.ndarray, sizes_given: bool) -> Iterator[Defect]:
    """Files that cannot be decoded, and sizes and rotations that do not fit the annotations."""
    unclear: list[str] = []
    for index, (file, position) in enumerate(zip(split.files.tolist(), positions.tolist(), strict=True)):
        if position in seen.errors:
            kind, text = seen.errors[position]
            yield Defect(kind, split.name, file, "", text.rpartition("; ")[0] or text, index)  # without its remedy
            continue
        real, annotated = seen.sizes[position].tolist(), split.sizes[index].tolist()
        orientation = int(seen.orientations[position])
        told_apart = sizes_given and orientation >= 5 and real[0] != real[1]
        if annotated != real and orientation >= 5 and annotated == real[::-1]:
            text = f"EXIF turns it to {_shown(real)}, but it is annotated as {_shown(annotated)}"
            yield Defect("exif-ignored", split.name, file, "", text, index)
        elif annotated != real:
            text = f"is {_shown(real)}, but annotated as {_shown(annotated)} (width x height)"
            yield Defect("image-size", split.name, file, "", text, index)
        elif orientation > 1 and split.offsets[index] < split.offsets[index + 1] and not told_apart:
            unclear.append(file)
    if unclear:
        text = f"{some_of(unclear)}: displayed turned or mirrored, with boxes that fit both ways"
        yield Defect("exif-unclear", split.name, "", split.name, text)


def _shown(size: list[int]) -> str:
    return f"{size[1]}x{size[0]}"


def _same_pictures(data: Data, seen: Scan, positions: dict[str, np.ndarray]) -> Iterator[Defect]:
    """Images that show what another one shows: in another split (leaks), or in their own.

    Of each pair one is named: that in the split which matters less (test before val before train), then the one with
    fewer boxes, then the later one. So a set without the named images has none of these defects.
    """
    splits = list(data.values())
    owner = np.repeat(np.arange(len(splits)), [len(split) for split in splits])
    inside = np.concatenate([np.arange(len(split)) for split in splits])
    where = np.concatenate([positions[split.name] for split in splits])
    weights = np.array([{"test": 0, "val": 1, "train": 3}.get(split.name, 2) for split in splits])[owner]
    boxes = np.concatenate([np.diff(split.offsets) for split in splits])
    ranks = np.lexsort((-boxes, weights))  # the images in the order in which they are to be kept
    ranks = ranks[~np.isin(where[ranks], list(seen.errors))]

    def defect(image: int, other: int, same: bool) -> Defect:
        kinds = ("duplicate-image", "leak") if same else ("near-duplicate", "near-leak")
        split, beside = splits[owner[image]], splits[owner[other]]
        file, its = str(split.files[inside[image]]), printable(str(beside.files[inside[other]]))
        among = f"in {split.name}" if split is beside else f"in {split.name}, the other in {beside.name}"
        text = f"is {'' if same else 'nearly '}the same picture as {its} ({among})"
        if where[image] == where[other]:
            text = f"is listed in {split.name} and in {beside.name}"
        return Defect(kinds[split is not beside], split.name, file, "", text, int(inside[image]))

    first: dict[bytes, int] = {}
    for image in ranks.tolist():
        other = first.setdefault(seen.digests[where[image]].tobytes(), image)
        if other != image and (where[image] != where[other] or owner[image] != owner[other]):
            yield defect(image, other, True)
    kept = np.array(list(first.values()), dtype=np.int64)
    pairs = kept[near_pairs(seen.thumbnails[where[kept]])]  # the first of a pair is the one to be kept
    across = owner[pairs[:, 0]] != owner[pairs[:, 1]]
    named: set[int] = set()
    for other, image in [*pairs[across].tolist(), *pairs[~across].tolist()]:
        if image not in named:
            named.add(image)
            yield defect(image, other, False)


# Boxes


def _box_defects(split: Split) -> Iterator[Defect]:
    """Boxes that are too small, or drawn twice."""
    image_of = split.image_of
    sides = split.boxes[:, 2:] - split.boxes[:, :2]
    for row in np.flatnonzero((sides < TINY).any(axis=1) & ~split.ignore).tolist():
        text = f"is {sides[row, 0]:.3g} x {sides[row, 1]:.3g} pixels"
        yield _of_box("tiny-box", split, int(image_of[row]), row, text)
    for row, other, overlap in _drawn_twice(split, image_of):
        text = "is there twice" if overlap == 1 else f"covers the same as {_place(split, other)} (IoU {overlap:.2f})"
        yield _of_box("duplicate-box", split, int(image_of[row]), row, text)


def _of_box(kind: str, split: Split, image: int, row: int, text: str) -> Defect:
    return Defect(kind, split.name, str(split.files[image]), _place(split, row), text, image, row)


def _place(split: Split, row: int) -> str:
    x1, y1, x2, y2 = split.boxes[row].tolist()
    return f"{printable(split.classes[split.labels[row]])} ({x1:.6g}, {y1:.6g}, {x2:.6g}, {y2:.6g})"


def _drawn_twice(split: Split, image_of: np.ndarray) -> list[tuple[int, int, float]]:
    """(row, earlier row, IoU) of each box that lies upon an earlier one of its image and class.

    Boxes are lined up by image, class and left edge; those far enough apart in it cannot lie upon each other, so that
    5,000 boxes in an image need not be compared all with all.
    """
    left, right = split.boxes[:, :2], split.boxes[:, 2:]
    areas = np.prod(right - left, axis=1)
    order = np.lexsort((left[:, 0], split.ignore, split.labels, image_of))
    group = np.stack([image_of, split.labels, split.ignore], axis=1)[order]
    found: dict[int, tuple[int, float]] = {}
    starts, lag = np.arange(len(order)), 0
    while len(starts):
        lag += 1
        starts = starts[starts + lag < len(order)]
        a, b = order[starts], order[starts + lag]
        reach = (right[a, 0] - left[a, 0]) * (1 / SAME_BOX - 1)
        near = (group[starts] == group[starts + lag]).all(axis=1) & (left[b, 0] - left[a, 0] <= reach)
        starts, a, b = starts[near], a[near], b[near]
        overlap = np.prod(np.clip(np.minimum(right[a], right[b]) - np.maximum(left[a], left[b]), 0, None), axis=1)
        overlap = overlap / (areas[a] + areas[b] - overlap)
        for row, other, value in zip(np.maximum(a, b), np.minimum(a, b), overlap, strict=True):
            if value >= SAME_BOX:
                found.setdefault(int(row), (int(other), float(value)))
    return sorted((row, other, value) for row, (other, value) in found.items())


def _huge_boxes(data: Data) -> Iterator[Defect]:
    """Boxes around the whole image, of a class whose other boxes stay below half of theirs: slips of the mouse.

    A photograph may well show one bowl and nothing else; of blood cells none fills the field of view.
    """
    shares, labels = [], []
    for split in data.values():
        image_of = split.image_of
        shares.append(np.prod(split.boxes[:, 2:] - split.boxes[:, :2], axis=1) / np.prod(split.sizes[image_of], axis=1))
        labels.append(split.labels)
    every_share, every_label = np.concatenate(shares), np.concatenate(labels)
    suspicious = np.zeros(len(data.classes), dtype=bool)
    for label in np.unique(every_label[every_share > HUGE]):
        own = every_share[every_label == label]
        ordinary = own[own <= HUGE]
        rare = len(own) - len(ordinary) <= SHARE * len(ordinary)
        suspicious[label] = len(ordinary) >= ENOUGH and rare and ordinary.max() < 0.5
    for split, share in zip(data.values(), shares, strict=True):
        image_of = split.image_of
        for row in np.flatnonzero((share > HUGE) & suspicious[split.labels] & ~split.ignore).tolist():
            yield _of_box("huge-box", split, int(image_of[row]), row, f"covers {share[row]:.0%} of the image")


def _small_when_resized(split: Split, short: int, long: int) -> Iterator[Defect]:
    """A note where boxes that are large enough in the file shrink below `TINY` at the size for training."""
    smaller, larger = split.sizes.min(axis=1), split.sizes.max(axis=1)
    scales = np.minimum(short / smaller, long / larger)[split.image_of]
    sides = (split.boxes[:, 2:] - split.boxes[:, :2]).min(axis=1)
    number = int(((sides >= TINY) & (sides * scales < TINY) & ~split.ignore).sum())
    if number:
        boxes = "1 box has" if number == 1 else f"{number:,} boxes have"
        text = f"{boxes} a side under {TINY:g} pixels when the images are resized to {short}/{long}"
        yield Defect("small-when-resized", split.name, "", split.name, text)


# Classes


def _class_defects(data: Data) -> Iterator[Defect]:
    counts = {name: np.bincount(split.labels, minlength=len(data.classes)) for name, split in data.items()}
    if not sum(int(own.sum()) for own in counts.values()):
        yield Defect(
            "no-boxes", "", "", "the data", f"have {counted(sum(map(len, data.values())), 'image')} and no box"
        )
        return
    others: set[int] = set()  # spellings beside the usual one, with which their boxes are counted
    for names in spellings(data.classes).values():
        usual, *rest = sorted(map(data.classes.index, names), key=lambda label: -sum(n[label] for n in counts.values()))
        text = f"is beside {', '.join(repr(data.classes[label]) for label in rest)}, the same but for case or blanks"
        if not rest:
            text = "begins or ends with blanks, or has several in a row"
        yield Defect("class-spelling", "", "", f"class {data.classes[usual]!r}", text)
        for own in counts.values():
            own[usual] += own[rest].sum()
        others.update(rest)

    unmeasured = []
    for label, name in enumerate(data.classes):
        having = {split: int(own[label]) for split, own in counts.items() if own[label]}
        if label in others:
            continue
        if not having:
            yield Defect("unused-class", "", "", f"class {name!r}", "has no box")
        elif "train" in data and "train" not in having:
            number = sum(having.values())
            text = f"has {counted(number, 'box', 'boxes')}, all in {' and '.join(having)}"
            yield Defect("untrained-class", "", "", f"class {name!r}", text)
        elif "val" in data and "val" not in having:
            unmeasured.append(name)
    if unmeasured:
        text = f"has no box of {some_of(unmeasured)}: their AP cannot be measured"
        yield Defect("unmeasured-class", "val", "", "val", text)


def spellings(classes: tuple[str, ...]) -> dict[str, list[str]]:
    """The classes that differ only in case and blanks, or have blanks that do not belong there, by what they mean."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in classes:
        groups[" ".join(name.split()).casefold()].append(name)
    return {key: names for key, names in groups.items() if len(names) > 1 or names[0] != " ".join(names[0].split())}
