"""YOLO's folders (https://docs.ultralytics.com/datasets/detect/) -> splits.

folder/data.yaml             names: [cat, dog]   train: images/train   val: images/val
folder/images/train/a.jpg
folder/labels/train/a.txt    a line a box: class, centre x, centre y, width, height, in fractions of the image
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from tqdm import tqdm

from fpn.data.checks import RawSplit, check
from fpn.data.dataset import Data, Problem, Split
from fpn.data.files import Listing, images_under, is_image_name
from fpn.data.splits import ALIASES, ORDER
from fpn.errors import DataError

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
    for file in sorted([*path.glob("*.yaml"), *path.glob("*.yml")]):
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
        if all(any(line.startswith(key) for line in lines) for key in ("names:", "train:")):
            return file
    return None


def read(path: Path) -> Data:
    """Reads a folder, or its data.yaml, as YOLO.

    Raises:
        DataError: the YAML file cannot be used, or no image has a label file.
    """
    config_file = path if path.is_file() else find_config(path)
    assert config_file is not None, "only called where looks_like() holds"
    config = _config(config_file)
    names = _names(config, config_file)
    root = Path(os.path.abspath(config_file.parent))
    listing = Listing()
    problems: list[Problem] = []
    splits: dict[str, Split] = {}
    first_id, labelled = 1, 0
    for name in ORDER:
        images = _images(name, config, config_file, root, listing, problems)
        if images is None:
            continue
        labels = [_label_file(image, listing) for image in images]
        labelled += sum(label is not None for label in labels)
        splits[name] = _read_split(name, root, images, labels, names, first_id, "kpt_shape" in config, problems)
        first_id += len(images)
    if first_id > 1 and not labelled:
        raise DataError(
            f"{path}: none of its {first_id - 1} images has a label file; "
            "images/train/a.jpg belongs to labels/train/a.txt (or a.txt beside it)"
        )
    return Data(path, "yolo", tuple(names.values()), splits, problems)


def _config(file: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{file}: not valid YAML ({reason}); mend it") from error
    if not isinstance(config, dict):
        raise DataError(f"{file}: has no keys; it needs 'names', 'train' and 'val'")
    aliases = {alias: split for alias, split in ALIASES.items() if alias in config and split not in config}
    return config | {split: config[alias] for alias, split in aliases.items()}


def _names(config: dict[str, Any], file: Path) -> dict[int, str]:
    """The class of each number; gaps in a numbered list of names are kept."""
    names = config.get("names")
    pairs = names.items() if isinstance(names, dict) else enumerate(names if isinstance(names, list) else [])
    try:
        classes = {int(number): str(name) for number, name in pairs}
    except (TypeError, ValueError) as error:
        raise DataError(f"{file}: the keys of 'names' must be class numbers ({error})") from error
    if not classes:
        raise DataError(f"{file}: 'names' gives no classes; write names: [first, second, ...]")
    if len(set(classes.values())) < len(classes):
        raise DataError(f"{file}: 'names' has the same class twice ({', '.join(classes.values())}); rename one")
    return dict(sorted(classes.items()))


def _images(
    name: str, config: dict[str, Any], file: Path, root: Path, listing: Listing, problems: list[Problem]
) -> list[str] | None:
    """The image files of a split, each once; None if the YAML file does not speak of the split."""
    entries = config.get(name)
    entries = [entries] if isinstance(entries, str) else entries
    if not entries:
        return None
    if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
        raise DataError(f"{file}: {name!r} must be a folder, a text file or a list of them, not {entries!r:.80}")
    bases = [root / str(config.get("path") or "."), root]
    found: list[str] = []
    for entry in entries:
        place = _locate(entry, bases)
        if place is None:
            problems.append(Problem(file.name, f"{name}:", f"{entry} does not exist; left out, correct it"))
        elif place.is_dir():
            found += images_under(place)
        else:
            found += _listed_images(place, bases, listing, problems)
    found = [os.path.normpath(image) for image in found]
    unique = list(dict.fromkeys(found))
    if len(unique) < len(found):
        text = f"lists {len(found) - len(unique)} images more than once; they count once"
        problems.append(Problem(file.name, f"{name}:", text))
    return unique


def _locate(entry: str, bases: list[Path]) -> Path | None:
    """Where an entry leads. Roboflow writes ../train/images for the folder train/images beside the YAML file."""
    entry = entry.replace("\\", "/")
    places = [base / entry for base in bases] + [bases[-1] / entry.removeprefix("../")]
    return next((place for place in places if place.exists()), None)


def _listed_images(file: Path, bases: list[Path], listing: Listing, problems: list[Problem]) -> list[str]:
    """The images that a text file lists, a path a line, relative to the data set or to the file."""
    found = []
    for number, line in enumerate(file.read_text(encoding="utf-8-sig", errors="replace").splitlines(), 1):
        name = line.strip().replace("\\", "/")
        places = [os.path.join(base, name) for base in (*bases, file.parent)]
        place = next((place for place in places if place in listing), None)
        if name and (place is None or not is_image_name(name)):
            problems.append(Problem(file.name, f"line {number}", f"{name}: no such image; left out, add the file"))
        elif name and place is not None:
            found.append(place)
    return found


def _label_file(image: str, listing: Listing) -> str | None:
    """labels/.../a.txt for images/.../a.jpg (the last "images" in the path counts), or a.txt beside the image."""
    stem = os.path.splitext(image)[0]
    head, middle, tail = stem.rpartition(f"{os.sep}images{os.sep}")
    places = [f"{head}{os.sep}labels{os.sep}{tail}.txt"] if middle else []
    return next((place for place in [*places, f"{stem}.txt"] if place in listing), None)


def _read_split(
    name: str,
    root: Path,
    images: list[str],
    label_files: list[str | None],
    names: dict[int, str],
    first_id: int,
    with_keypoints: bool,
    problems: list[Problem],
) -> Split:
    position = {number: label for label, number in enumerate(names)}
    boxes: list[Box] = []
    labels: list[int] = []
    image_of: list[int] = []
    numbers: list[int] = []
    kept: list[int] = []
    progress = tqdm(label_files, f"{name}: labels", delay=1, leave=False)
    for index, file in enumerate(progress):
        try:
            lines = [] if file is None else Path(file).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            text = f"cannot be read as text ({error}); its image is left out"
            problems.append(Problem(os.path.relpath(file or "", root), "", text))
            continue
        for number, line in enumerate(lines, 1):
            if line.strip():
                row = _row(line, position, with_keypoints)
                if isinstance(row, str):
                    problems.append(Problem(os.path.relpath(file or "", root), f"line {number}", f"{row}; left out"))
                else:
                    labels.append(row[0])
                    boxes.append(row[1])
                    image_of.append(len(kept))
                    numbers.append(number)
        kept.append(index)

    def where(row: int) -> tuple[str, str, str]:
        return os.path.relpath(label_files[kept[image_of[row]]] or "", root), f"line {numbers[row]}", ""

    raw = RawSplit(
        name=name,
        root=root,
        classes=tuple(names.values()),
        category_ids=np.array(list(names), dtype=np.int64),
        files=[os.path.relpath(images[index], root) for index in kept],
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
    )
    return check(raw, problems)


def _row(line: str, position: dict[int, int], with_keypoints: bool) -> tuple[int, Box] | str:
    """Label and x1, y1, x2, y2 in fractions from one line, or what is wrong with it."""
    try:
        number, *values = (float(word) for word in line.split())
    except ValueError:
        return f"is not a row of numbers: {line.strip()!r:.60}"
    if number not in position:
        return f"has class {number:g}, but 'names' has no such number"
    if not all(map(math.isfinite, values)):
        return "has a number that is not finite"
    if len(values) == 4 or (with_keypoints and len(values) > 4):
        x, y, width, height = values[:4]
        return position[int(number)], (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
    if len(values) >= 6 and len(values) % 2 == 0:  # the outline of an object
        xs, ys = values[0::2], values[1::2]
        return position[int(number)], (min(xs), min(ys), max(xs), max(ys))
    return f"has {len(values)} numbers after the class; a box has 4, an outline 6 or more, in pairs"
