"""COCO instances JSON (https://cocodataset.org/#format-data) -> splits.

folder/annotations/instances_train2017.json     or   folder/train/_annotations.coco.json   or   folder/train.json
folder/train2017/*.jpg  (or images/, images/train2017/ ...)
"""

from __future__ import annotations

import json
import mmap
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from fpn.data.checks import RawSplit, check
from fpn.data.dataset import Data, Problem, Split
from fpn.data.files import Listing
from fpn.data.splits import ALIASES, UNSPLIT, canonical, ordered
from fpn.errors import DataError

SHAPE = (
    "COCO: annotations/instances_train.json, annotations/instances_val.json, images/ (or one JSON beside its images)"
)
_OTHER_TASKS = ("captions_", "person_keypoints_", "stuff_", "panoptic_", "image_info_")
_KEYS = ("images", "annotations", "categories")


def looks_like(path: Path) -> bool:
    """Whether the folder holds COCO annotation files."""
    return bool(find_annotations(path))


def find_annotations(path: Path) -> list[Path]:
    """The instances files of a folder: in annotations/, at the top, or in split folders (as Roboflow exports them)."""
    found = sorted((path / "annotations").glob("*.json"))
    if not found:
        elsewhere = [*path.glob("*.json"), *(file for name in ALIASES for file in (path / name).glob("*.json"))]
        found = sorted(file for file in elsewhere if _mentions_images(file))
    instances = [file for file in found if file.name.startswith("instances")]
    return instances or [file for file in found if not file.name.startswith(_OTHER_TASKS)]


def _mentions_images(file: Path) -> bool:
    """Whether a JSON file has a list of COCO's, found without parsing: it may have hundreds of megabytes."""
    if file.stat().st_size == 0:
        return False
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as text:
        return re.search(rb'"(images|annotations)"\s*:\s*\[', text) is not None


def read(path: Path) -> Data:
    """Reads a folder, or one JSON file, as COCO.

    Raises:
        DataError: a file is cut off or not of this format, two files are the same split, or the classes contradict
            each other.
    """
    if path.is_file():
        files, root = [path], path.parent.parent if path.parent.name == "annotations" else path.parent
    else:
        files, root = find_annotations(path), path
    root = Path(os.path.abspath(root))
    contents = {file: _parse(file) for file in files}
    others = {file: text for file, content in contents.items() if (text := _not_instances(content))}
    if len(others) == len(files):
        file, text = next(iter(others.items()))
        raise DataError(f"{file}: {text}")
    notes = [f"{file.name} is ignored: {text}" for file, text in others.items()]

    named: dict[str, Path] = {}
    for file in (file for file in files if file not in others):
        name = _split_name(file, root)
        if name in named:
            rename = "give the split in their names, such as train.json and val.json, or keep one of them"
            raise DataError(f"{path}: {named[name].name} and {file.name} look like the same split {name!r}; {rename}")
        named[name] = file
    problems: list[Problem] = []
    by_split = {name: contents[named[name]] for name in ordered(named)}
    classes, category_names = _classes(by_split, named, problems)
    listing = Listing()
    splits = {
        name: _read_split(name, named[name], content, root, classes, category_names, listing, problems)
        for name, content in by_split.items()
    }
    return Data(path, "coco", classes, splits, problems, notes)


def _split_name(file: Path, root: Path) -> str:
    """train, val or test if the file's or its folder's name says so; minival for instances_minival.json."""
    folder = Path(os.path.abspath(file.parent))
    own = canonical(file.stem) or (canonical(folder.name) if folder != root else None)
    rest = file.stem.removeprefix("instances_")
    return own or (rest if rest not in (file.stem, "default") else UNSPLIT)


def _parse(file: Path) -> Any:
    try:
        return json.loads(file.read_bytes())
    except json.JSONDecodeError as error:
        raise DataError(
            f"{file}: not valid JSON at line {error.lineno}, column {error.colno} (character {error.pos} of "
            f"{len(error.doc)}): {error.msg}; the file may be cut off, copy or export it again"
        ) from error
    except (ValueError, RecursionError, OSError) as error:
        raise DataError(f"{file}: cannot be read as JSON ({error}); copy or export it again") from error


def _not_instances(content: Any) -> str:
    """Why parsed JSON is not an instances file; empty if it is."""
    lists = content if isinstance(content, dict) else {}
    lacking = [repr(key) for key in _KEYS if not isinstance(lists.get(key), list)]
    if not lacking:
        return ""
    return f"not a COCO instances file, it has no list {', '.join(lacking)} (needed: images, annotations, categories)"


def _classes(
    contents: dict[str, dict[str, Any]], files: dict[str, Path], problems: list[Problem]
) -> tuple[tuple[str, ...], dict[str, dict[int, str]]]:
    """The class names of all files in their order, and of each split the name of each category id."""
    by_split: dict[str, dict[int, str]] = {}
    seen: dict[int, tuple[str, Path]] = {}
    for split, content in contents.items():
        own = by_split[split] = {}
        for category in content["categories"]:
            match category:
                case {"id": int(number), "name": str(name)} if name:
                    own[number] = name
                case _:
                    raise DataError(f"{files[split]}: category {category!r} needs a whole number 'id' and a 'name'")
            known, where = seen.setdefault(number, (name, files[split]))
            if known != name:
                raise DataError(
                    f"{files[split]}: category id {number} is {name!r}, but {known!r} in {where}; "
                    "give each class one id in all files"
                )
        for name, times in Counter(own.values()).items():
            if times > 1:
                ids = [number for number, other in own.items() if other == name]
                text = f"{name!r} is the name of categories {ids}; they are taken as one class"
                problems.append(Problem(files[split].name, "categories:", text))
    return tuple(dict.fromkeys(name for own in by_split.values() for name in own.values())), by_split


def _category_ids(
    classes: tuple[str, ...], own: dict[int, str], all_splits: dict[str, dict[int, str]], used: list[Any]
) -> np.ndarray:
    """(K,) int64: the id of each class in its split's own numbering, or another split's where it has none.

    Of several ids with one name (exporters add a parent category to each class) the one used most counts.
    """
    ids: dict[str, int] = {}
    for names in all_splits.values():
        ids = {name: number for number, name in names.items()} | ids
    ids |= {name: number for number, name in reversed(own.items())}
    if len(set(own.values())) < len(own):
        for number, _ in reversed(Counter(number for number in used if number in own).most_common()):
            ids[own[number]] = number
    return np.array([ids[name] for name in classes], dtype=np.int64)


def _read_split(
    name: str,
    file: Path,
    content: dict[str, Any],
    root: Path,
    classes: tuple[str, ...],
    category_names: dict[str, dict[int, str]],
    listing: Listing,
    problems: list[Problem],
) -> Split:
    shown = os.path.relpath(os.path.abspath(file), root)
    images, files = _images(content["images"], name, file, root, listing, problems)
    rows, image_of, numbers = _annotations(content, images, shown, problems)
    own = category_names[name]
    categories = [_key(row.get("category_id")) for row in rows]
    label_of: dict[Any, int] = {number: classes.index(class_name) for number, class_name in own.items()}
    labels = np.array([label_of.get(category, -1) for category in categories], dtype=np.int64)
    boxes = _numbers([row.get("bbox") for row in rows], 4)
    with np.errstate(over="ignore", invalid="ignore"):
        boxes[:, 2:] += boxes[:, :2]

    def where(row: int) -> tuple[str, str, str]:
        return files[image_of[row]], f"box {numbers[row]}", f"{shown}, annotation id {rows[row].get('id')}"

    raw = RawSplit(
        name=name,
        root=root,
        classes=classes,
        category_ids=_category_ids(classes, own, category_names, categories),
        files=files,
        image_ids=_image_ids(images, shown, problems),
        sizes=_sizes(images),
        image_of=np.array(image_of, dtype=np.int64),
        boxes=boxes,
        labels=labels,
        ignore=np.array([row.get("iscrowd") in (1, "1") or row.get("ignore") in (1, "1") for row in rows], dtype=bool),
        areas=_numbers([row.get("area") for row in rows], 1)[:, 0],
        refused={
            int(row): f"has category_id {categories[row]}, which no category has" for row in np.flatnonzero(labels < 0)
        },
        where=where,
    )
    return check(raw, problems)


def _annotations(
    content: dict[str, Any], images: list[dict[str, Any]], shown: str, problems: list[Problem]
) -> tuple[list[dict[str, Any]], list[int], list[int]]:
    """The annotations of the given images, the position of each one's image, and its number in the image, from 1."""
    position: dict[Any, int] = {_key(image["id"]): index for index, image in enumerate(images)}
    left_out = {_key(image.get("id")) for image in content["images"] if isinstance(image, dict)} - position.keys()
    rows, image_of, numbers = [], [], []
    in_image = [0] * len(images)
    for annotation in content["annotations"]:
        image_id = _key(annotation.get("image_id")) if isinstance(annotation, dict) else None
        index = position.get(image_id)
        if index is not None:
            in_image[index] += 1
            rows.append(annotation)
            image_of.append(index)
            numbers.append(in_image[index])
        elif image_id is None or image_id not in left_out:
            number = annotation.get("id") if isinstance(annotation, dict) else None
            text = f"is of image id {image_id}, which no image has; left out"
            problems.append(Problem(shown, f"annotation id {number}", text))
    for key, times in Counter(_key(row.get("id")) for row in rows).items():
        if times > 1 and key is not None:
            problems.append(Problem(shown, f"annotation id {key}", f"stands {times} times; all are kept, renumber"))
    return rows, image_of, numbers


def _images(
    entries: list[Any], name: str, file: Path, root: Path, listing: Listing, problems: list[Problem]
) -> tuple[list[dict[str, Any]], list[str]]:
    """The image entries that can be used and their files relative to root."""
    shown = os.path.relpath(os.path.abspath(file), root)
    entries_by_id: dict[Any, dict[str, Any]] = {}
    for number, entry in enumerate(entries, 1):
        image_id = _key(entry.get("id")) if isinstance(entry, dict) else None
        if image_id is None or not isinstance(entry.get("file_name"), str) or not entry["file_name"]:
            problems.append(Problem(shown, f"image {number}", "has no 'id' or no 'file_name'; left out, add them"))
        elif image_id in entries_by_id:
            text = f"({entry['file_name']}) has the id of {entries_by_id[image_id]['file_name']}; left out, renumber it"
            problems.append(Problem(shown, f"image id {image_id}", text))
        else:
            entries_by_id[image_id] = entry

    candidates = list(entries_by_id.values())
    folders = _image_folders(name, file, root)
    files = _find_images([entry["file_name"].replace("\\", "/") for entry in candidates], folders, root, listing)
    missing = [entry for entry, found in zip(candidates, files, strict=True) if found is None]
    places = ", ".join(os.path.relpath(folder, root) for folder in folders)
    if missing and len(missing) == len(candidates):
        text = f"none of its {len(missing)} images ({missing[0]['file_name']}, ...) is in {places}; add them"
        problems.append(Problem(shown, "", text))
    else:
        for entry in missing:
            text = f"image not found in {places} ({shown}, image id {entry['id']}); left out, add the file"
            problems.append(Problem(entry["file_name"], "", text))
    kept = [(entry, found) for entry, found in zip(candidates, files, strict=True) if found is not None]
    return [entry for entry, _ in kept], [found for _, found in kept]


def _image_folders(name: str, file: Path, root: Path) -> list[str]:
    """Existing folders in which images of a split may lie, the most telling first."""
    raw_name = re.sub(r"^(instances|annotations)_", "", file.stem)
    names = list(dict.fromkeys([raw_name, name, *(alias for alias, split in ALIASES.items() if split == name)]))
    beside = Path(os.path.abspath(file.parent))
    folders = [root / "images" / n for n in names] + [root / n / "images" for n in names] + [root / n for n in names]
    folders += [beside / "images", root / "images", root / "data", root, beside.parent / "images"]
    if beside.name != "annotations":
        folders.insert(0 if beside != root else len(folders), beside)
    return [str(folder) for folder in dict.fromkeys(folders) if folder.is_dir()]


def _find_images(names: list[str], folders: list[str], root: Path, listing: Listing) -> list[str | None]:
    """Each image's file relative to root: under its name with folders if it exists so, else under its bare name."""
    found: dict[int, str] = {}
    for bare in (False, True):
        for folder in folders:
            for index in (index for index in range(len(names)) if index not in found):
                path = os.path.join(folder, os.path.basename(names[index]) if bare else names[index])
                if path in listing:
                    found[index] = os.path.relpath(path, root)
    return [found.get(index) for index in range(len(names))]


def _image_ids(images: list[dict[str, Any]], shown: str, problems: list[Problem]) -> np.ndarray:
    ids = [_key(image["id"]) for image in images]
    whole = [image_id for image_id in ids if isinstance(image_id, int) and abs(image_id) < 2**63]
    if len(whole) == len(ids):
        return np.array(whole, dtype=np.int64)
    problems.append(Problem(shown, "images:", "some ids are not integers; the images are numbered from 1 instead"))
    return np.arange(1, len(ids) + 1)


def _sizes(images: list[dict[str, Any]]) -> np.ndarray:
    """(I, 2) int64 height and width, 0 where the entry does not have them."""
    sizes = _numbers([(image.get("height"), image.get("width")) for image in images], 2)
    return np.nan_to_num(sizes, nan=0, posinf=0, neginf=0).clip(0, 2**31).astype(np.int64)


def _numbers(values: list[Any], width: int) -> np.ndarray:
    """(len(values), width) float64; a row in which something is no number is NaN."""
    try:
        return np.array(values, dtype=np.float64).reshape(len(values), width)
    except (ValueError, TypeError, OverflowError):
        rows = np.full((len(values), width), np.nan)
    for row, value in zip(rows, values, strict=True):
        try:
            row[:] = np.array(value, dtype=np.float64).reshape(width)
        except (ValueError, TypeError, OverflowError):
            continue
    return rows


def _key(value: Any) -> int | str | None:
    """An id as it may be used to look things up; None for what cannot be one."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int | str) else None
