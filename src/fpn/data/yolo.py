"""YOLO's folders (https://docs.ultralytics.com/datasets/detect/) -> splits.

folder/data.yaml             names: [cat, dog]   train: images/train   val: images/val
folder/images/train/a.jpg
folder/labels/train/a.txt    a line a box: class, centre x, centre y, width, height, in fractions of the image

Folders and lists that data.yaml names must lie in its own folder or in one beside it (../images): a file from elsewhere
must not send a program through the whole disk. The same holds for the images in a list.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from tqdm import tqdm

from fpn.data.checks import RawSplit, check, check_classes
from fpn.data.dataset import Data, Problem, Split
from fpn.data.files import Listing, files_in, images_under, inside, is_image_name
from fpn.data.outlines import Column
from fpn.data.splits import ALIASES, ORDER
from fpn.errors import DataError
from fpn.words import counted

_LARGEST_CONFIG = 1_000_000  # bytes, of YAML that takes seconds to read
Box = tuple[float, float, float, float]
SHAPE = "YOLO: data.yaml (names, train, val), images/train/*.jpg and labels/train/*.txt (class cx cy w h, in fractions)"


def looks_like(path: Path) -> bool:
    """Whether the folder has a data.yaml or another YAML file that names classes and splits."""
    return find_config(path) is not None


def find_config(path: Path) -> Path | None:
    """data.yaml, or else the first YAML file at the top that speaks of `names` and `train`."""
    for name in ("data.yaml", "data.yml"):
        if (path / name).is_file():
            return path / name
    for file in files_in(path, ".yaml", ".yml"):
        with file.open("rb") as stream:
            lines = stream.read(_LARGEST_CONFIG).splitlines()
        if all(any(line.startswith(key) for line in lines) for key in (b"names:", b"train:")):
            return file
    return None


def read(path: Path, outlines: bool = False) -> Data:
    """Reads a folder, or its data.yaml, as YOLO, with the outlines of objects if asked.

    Raises:
        DataError: the YAML file cannot be used, or no image has a label file.
    """
    config_file = path if path.is_file() else find_config(path)
    assert config_file is not None, "only called where looks_like() holds"
    config = _config(config_file)
    names = _names(config, config_file)
    home = os.path.abspath(config_file.parent)
    listing = Listing()
    problems: list[Problem] = []
    splits: dict[str, Split] = {}
    found = {name: _images(name, config, config_file, home, listing, problems) for name in ORDER}
    beside = any(not inside(image, home) for images in found.values() for image in images or ())
    root = os.path.dirname(home) if beside else home
    first_id, labelled = 1, 0
    for name, images in found.items():
        if images is None:
            continue
        labels = [_label_file(image, root, listing) for image in images]
        for label, times in Counter(labels).items():
            if label is not None and times > 1:
                text = f"belongs to {times} images of this name; all are kept, delete all but one"
                problems.append(Problem(label.removeprefix(os.path.join(root, "")), "", text, "duplicate-entry"))
        labelled += sum(label is not None for label in labels)
        splits[name] = _read_split(
            name, root, images, labels, names, first_id, "kpt_shape" in config, outlines, problems
        )
        first_id += len(images)
    if first_id > 1 and not labelled:
        raise DataError(
            f"{path}: none of its {counted(first_id - 1, 'image')} has a label file; "
            "images/train/a.jpg belongs to labels/train/a.txt (or a.txt beside it)"
        )
    return Data(path, "yolo", tuple(names.values()), splits, problems)


def _config(file: Path) -> dict[str, Any]:
    """The keys of a YAML file, with all scalars as text: `names: [no, 007]` speaks of no boolean and no number."""
    try:
        if file.stat().st_size > _LARGEST_CONFIG:
            raise DataError(f"{file}: has more than {_LARGEST_CONFIG} bytes; a data.yaml has names, train and val")
        config = yaml.load(file.read_text(encoding="utf-8-sig"), yaml.BaseLoader)
    except (yaml.YAMLError, ValueError, RecursionError, OSError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{file}: not valid YAML ({reason}); mend it") from error
    if not isinstance(config, dict):
        raise DataError(f"{file}: has no keys; it needs 'names', 'train' and 'val'")
    aliases = {alias: split for alias, split in ALIASES.items() if alias in config and split not in config}
    return config | {split: config[alias] for alias, split in aliases.items()}


def _names(config: dict[str, Any], file: Path) -> dict[int, str]:
    """The class of each number; gaps in a numbered list of names are kept."""
    names = config.get("names")
    pairs = list(names.items() if isinstance(names, dict) else enumerate(names if isinstance(names, list) else []))
    classes: dict[int, str] = {}
    for key, name in pairs:
        number = int(key) if isinstance(key, int) or re.fullmatch(r"[0-9]{1,9}", key) else -1
        if number < 0 or number in classes:
            raise DataError(f"{file}: the keys of 'names' must be class numbers, each once, not {key!r:.40}")
        if not isinstance(name, str):
            raise DataError(f"{file}: the name of class {number} must be text, not a {type(name).__name__}")
        classes[number] = name
    if not classes:
        raise DataError(f"{file}: 'names' gives no classes; write names: [first, second, ...]")
    check_classes(classes.values(), file)
    twice = [name for name, times in Counter(classes.values()).items() if times > 1]
    if twice:
        raise DataError(f"{file}: 'names' has the same class twice ({', '.join(twice):.80}); rename one")
    return dict(sorted(classes.items()))


def _images(
    name: str, config: dict[str, Any], file: Path, home: str, listing: Listing, problems: list[Problem]
) -> list[str] | None:
    """The image files of a split, absolute and each once; None if the YAML file does not speak of the split."""
    entries = config.get(name)
    entries = [entries] if isinstance(entries, str) and entries else entries
    if not entries or entries in (["null"], ["~"]):
        return None
    if not isinstance(entries, list) or not all(isinstance(entry, str) and entry for entry in entries):
        raise DataError(f"{file}: {name!r} must be a folder, a text file or a list of them")
    path = config.get("path")
    bases = [_resolve(path if isinstance(path, str) else "", home), home]
    found: list[str] = []
    for entry in dict.fromkeys(entries):
        place = _locate(entry, bases, home)
        if place is None:
            text, kind = "does not exist; left out, correct it", "missing-folder"
            if not any(_allowed(_resolve(entry, base), home) for base in bases):
                text, kind = f"lies outside of {home}; left out, move {file.name} there", "path-outside"
            problems.append(Problem(file.name, f"{name}:", f"{entry} {text}", kind))
        elif os.path.isdir(place):
            found += images_under(Path(place), listing)
        else:
            found += _listed_images(Path(place), [*bases, os.path.dirname(place)], home, listing, problems)
    unique = list(dict.fromkeys(found))
    if len(unique) < len(found):
        text = f"lists {counted(len(found) - len(unique), 'image')} more than once; each counts once"
        problems.append(Problem(file.name, f"{name}:", text, "duplicate-entry"))
    return unique


def _resolve(entry: str, base: str) -> str:
    return os.path.normpath(os.path.join(base, entry.replace("\\", "/")))


def _allowed(place: str, home: str) -> bool:
    """Whether a place lies in the folder of the YAML file, or in a folder beside it."""
    above = os.path.dirname(home)
    disk = os.path.dirname(above) == above
    return inside(place, home) or (not disk and place != above and inside(place, above))


def _locate(entry: str, bases: list[str], home: str) -> str | None:
    """Where an entry leads. Roboflow writes ../train/images for the folder train/images beside the YAML file."""
    places = [_resolve(entry, base) for base in bases]
    if entry.startswith("../"):
        places.insert(0, _resolve(entry.removeprefix("../"), home))
    return next((place for place in places if _allowed(place, home) and _exists(place)), None)


def _exists(place: str) -> bool:
    try:
        return os.path.isdir(place) or os.path.isfile(place)
    except ValueError:  # a NUL in the name
        return False


def _listed_images(file: Path, bases: list[str], home: str, listing: Listing, problems: list[Problem]) -> list[str]:
    """The images that a text file lists, a path a line, relative to the data set or to the file."""
    found = []
    within = [home, *(base for base in bases if _allowed(base, home))]
    for number, line in enumerate(file.read_text(encoding="utf-8-sig", errors="replace").splitlines(), 1):
        if not (name := line.strip()):
            continue
        places = [_resolve(name, base) for base in bases]
        allowed = [place for place in places if any(inside(place, base) for base in within)]
        place = next((place for place in allowed if place in listing), None)
        if place is not None and is_image_name(place):
            found.append(place)
            continue
        text, kind = "no such image; left out, add the file", "missing-image"
        if not allowed:
            text, kind = f"lies outside of {home}; left out, move it there", "path-outside"
        problems.append(Problem(file.name, f"line {number}", f"{name}: {text}", kind))
    return found


def _label_file(image: str, root: str, listing: Listing) -> str | None:
    """labels/.../a.txt for images/.../a.jpg (the last "images" in the path counts), or a.txt beside the image."""
    stem = os.path.splitext(image)[0]
    head, middle, tail = stem[len(root) :].rpartition(f"{os.sep}images{os.sep}")
    places = [f"{root}{head}{os.sep}labels{os.sep}{tail}.txt"] if middle else []
    return next((place for place in [*places, f"{stem}.txt"] if place in listing), None)


def _read_split(
    name: str,
    root: str,
    images: list[str],
    label_files: list[str | None],
    names: dict[int, str],
    first_id: int,
    with_keypoints: bool,
    outlines: bool,
    problems: list[Problem],
) -> Split:
    position = {number: label for label, number in enumerate(names)}
    boxes: list[Box] = []
    labels: list[int] = []
    image_of: list[int] = []
    numbers: list[int] = []
    kept: list[int] = []
    column = Column()
    progress = tqdm(label_files, f"{name}: labels", delay=1, leave=False)
    for index, file in enumerate(progress):
        try:
            lines = [] if file is None else Path(file).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            text = f"cannot be read as text ({error}); its image is left out"
            problems.append(Problem(os.path.relpath(file or "", root), "", text, "broken-annotation"))
            continue
        for number, line in enumerate(lines, 1):
            if line.strip():
                row = _row(line, position, with_keypoints)
                if isinstance(row, _Refused):
                    shown, text = os.path.relpath(file or "", root), f"{row.reason}; left out"
                    problems.append(Problem(shown, f"line {number}", text, row.kind))
                else:
                    labels.append(row[0])
                    boxes.append(row[1])
                    if outlines:
                        column.add(row[2])
                    image_of.append(len(kept))
                    numbers.append(number)
        kept.append(index)

    def where(row: int) -> tuple[str, str, str]:
        return os.path.relpath(label_files[kept[image_of[row]]] or "", root), f"line {numbers[row]}", ""

    raw = RawSplit(
        name=name,
        root=Path(root),
        classes=tuple(names.values()),
        category_ids=np.array(list(names), dtype=np.int64),
        files=[images[index].removeprefix(os.path.join(root, "")) for index in kept],
        image_ids=first_id + np.array(kept, dtype=np.int64),
        sizes=np.zeros((len(kept), 2), dtype=np.int64),
        image_of=np.array(image_of, dtype=np.int64),
        boxes=np.array(boxes, dtype=np.float64).reshape(-1, 4),
        labels=np.array(labels, dtype=np.int64),
        ignore=np.zeros(len(labels), dtype=bool),
        areas=np.full(len(labels), math.nan),
        refused={},
        where=where,
        normalised=True,
        outlines=column.outlines() if outlines else None,
        broken=column.broken,
    )
    return check(raw, problems)


@dataclass(frozen=True)
class _Refused:
    """Why a line is no box."""

    kind: str
    reason: str


def _row(line: str, position: dict[int, int], with_keypoints: bool) -> tuple[int, Box, list[float]] | _Refused:
    """Label, x1, y1, x2, y2 and outline (if it is one) in fractions from one line, or what is wrong with it."""
    try:
        number, *values = (float(word) for word in line.split())
    except ValueError:
        return _Refused("broken-annotation", f"is not a row of numbers: {line.strip()!r:.60}")
    if number not in position:
        return _Refused("unknown-class", f"has class {number:g}, but 'names' has no such number")
    if not all(map(math.isfinite, values)):
        return _Refused("box-not-finite", "has a number that is not finite")
    if len(values) == 4 or (with_keypoints and len(values) > 4):
        x, y, width, height = values[:4]
        return position[int(number)], (x - width / 2, y - height / 2, x + width / 2, y + height / 2), []
    if len(values) >= 6 and len(values) % 2 == 0:  # the outline of an object
        xs, ys = values[0::2], values[1::2]
        return position[int(number)], (min(xs), min(ys), max(xs), max(ys)), values
    reason = f"has {len(values)} numbers after the class; a box has 4, an outline 6 or more, in pairs"
    return _Refused("broken-annotation", reason)
