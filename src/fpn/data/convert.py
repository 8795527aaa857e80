"""`convert`: a data set in another format, and in words what that format could not hold."""

from __future__ import annotations

import os

import numpy as np

from fpn.data.copies import new_folder
from fpn.data.dataset import Data
from fpn.data.splits import ORDER
from fpn.data.writers import WRITERS, image_names
from fpn.errors import OptionError
from fpn.words import counted

# What the readers do not read, so that no writer can write it; the second of those that were asked for outlines.
_UNREAD = {
    "coco": (
        "masks, keypoints, annotation ids and other fields of COCO beside the boxes",
        "keypoints, annotation ids and other fields of COCO beside boxes and masks",
    ),
    "voc": ("pose, truncated, parts and other fields of VOC beside the boxes",) * 2,
    "yolo": ("outlines (they become the boxes around them) and keypoints", "keypoints"),
}


def convert(data: Data, out: str | os.PathLike[str], to: str) -> list[str]:
    """Writes a data set, images and annotations, in the format `to` (coco, voc or yolo) into the new folder `out`.

    Boxes, labels, the order of the classes, splits and sizes come back from `load(out, draw=False)` as they are in
    `data` (boxes to 1e-9 pixels), from COCO the outlines too, where they were loaded. Images are hard links to the
    originals, or copies on another disk. Where anything fails, or on Ctrl-C, nothing stays.

    Returns:
        What the format cannot hold and the copy therefore lacks, a sentence each.

    Raises:
        OptionError: `out` is not empty or lies inside the data, or there is no such format.
        DataError: the format cannot hold the data: a class name, or (YOLO) images whose size is not the annotated one.
        FpnError: the disk refuses.
    """
    if to not in WRITERS:
        raise OptionError(f"there is no format {to!r} to convert to; it is one of {', '.join(WRITERS)}")
    with new_folder(out, data) as folder:
        WRITERS[to](data, folder)
    return not_kept(data, to)


def not_kept(data: Data, to: str) -> list[str]:
    """What of `data` a copy in the format `to` lacks, a sentence each."""
    known = [split.outlines.known for split in data.values() if split.outlines is not None]
    found = [_UNREAD[data.format][len(known) > 0]] if data.format in _UNREAD else []
    outlines = sum(int(rows.sum()) for rows in known)
    if outlines and to != "coco":
        found.append(f"outlines of {counted(outlines, 'object')}: only their boxes are written in this format")
    if to != "coco":
        found += _lost_numbers(data, to)
    ignored = sum(int(split.ignore.sum()) for split in data.values())
    if to == "yolo" and ignored:
        boxes = counted(ignored, "ignored box", "ignored boxes")
        found.append(f"{boxes} (crowd or difficult): YOLO has no mark for them, left out")
    others = [name for name in data if name not in ORDER]
    if to == "yolo" and others:
        text = f"the split {', '.join(others)}: written, but readers of YOLO look for train, val and test only"
        found.append(text)
    return found + _renamed(data, to)


def _lost_numbers(data: Data, to: str) -> list[str]:
    first = 0 if to == "yolo" else 1
    last = first + len(data.classes) - 1
    found = []
    ids = {name: split.category_ids.tolist() for name, split in data.items()}
    if any(own != list(range(first, last + 1)) for own in ids.values()):
        old = [number for own in ids.values() for number in own]
        found.append(f"category ids: {min(old)} to {max(old)} become {first} to {last}, in the order of the classes")
    if data.format == "coco":
        found.append("image ids: they are numbered anew when read")
    areas = 0
    for split in data.values():
        x1, y1, x2, y2 = split.boxes.T
        areas += int((~np.isclose(split.areas, (x2 - x1) * (y2 - y1), rtol=1e-6)).sum())
    if areas:
        found.append(f"areas of {counted(areas, 'mask')}: the areas of the boxes take their place")
    return found


def _renamed(data: Data, to: str) -> list[str]:
    names = image_names(data, to)
    pairs = [pair for name, split in data.items() for pair in zip(split.files.tolist(), names[name], strict=True)]
    changed = [(old, new) for old, new in pairs if not f"/{old}".replace(os.sep, "/").endswith(f"/{new}")]
    if not changed:
        return []
    reason = "names must be unique, without sub-folders" if to == "voc" else "names must be unique"
    return [f"names of {counted(len(changed), 'image')} ({reason}), such as {changed[0][0]}, now {changed[0][1]}"]
