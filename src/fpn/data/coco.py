"""COCO instances JSON (https://cocodataset.org/#format-data) -> splits.

folder/annotations/instances_train2017.json     or   folder/train/_annotations.coco.json   or   folder/train.json
folder/train2017/*.jpg  (or images/, images/train2017/ ...)

Image files lie in the data set's folder, whatever the annotations say: of a name with ".." in it, or one that starts at
the root of a disk, only the part after the last slash counts.
"""

from __future__ import annotations

import mmap
import os
import posixpath
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fpn.data.checks import RawSplit, check, check_classes
from fpn.data.coco_columns import Content, ImageEntry, read_columns, to_id, to_numbers
from fpn.data.dataset import Data, Problem, Split
from fpn.data.files import Listing, files_in, is_image_name
from fpn.data.splits import ALIASES, UNSPLIT, canonical, ordered
from fpn.errors import DataError
from fpn.words import counted

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
    found = _json_files(path / "annotations")
    if not found:
        elsewhere = [*_json_files(path), *(file for name in ALIASES for file in _json_files(path / name))]
        found = sorted(file for file in elsewhere if _mentions_images(file))
    instances = [file for file in found if file.name.startswith("instances")]
    return instances or [file for file in found if not file.name.startswith(_OTHER_TASKS)]


def _json_files(folder: Path) -> list[Path]:
    return [file for file in files_in(folder, ".json") if not file.name.startswith(".")]


def _mentions_images(file: Path) -> bool:
    """Whether a JSON file has a list of COCO's, found without parsing: it may have hundreds of megabytes."""
    if file.stat().st_size == 0:
        return False
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as text:
        return re.search(rb'"(images|annotations)"\s*:\s*\[', text) is not None


def read(path: Path, outlines: bool = False) -> Data:
    """Reads a folder, or one JSON file, as COCO, with the outlines of objects if asked.

    Raises:
        DataError: a file is cut off or not of this format, two files are the same split, or the classes contradict
            each other.
    """
    files = [path] if path.is_file() else find_annotations(path)
    root = _root(path)
    contents = {file: read_columns(file, outlines) for file in files}
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
    by_split = {name: Content(**contents[named[name]]) for name in ordered(named)}
    classes, category_names = _classes(by_split, named, problems)
    listing = Listing()
    splits = {
        name: _read_split(name, named[name], content, root, classes, category_names, listing, problems)
        for name, content in by_split.items()
    }
    for name, own in category_names.items():
        known = set(own.values())
        absent = [class_name for class_name in classes if class_name not in known]
        if absent:
            text = (
                f"lacks {len(absent)} of the {len(classes)} classes of the data, such as {absent[0]!r:.60}; all splits"
            )
            text += " get the same classes, make sure that its images show no such objects"
            problems.append(Problem(named[name].name, "", text, "class-sets"))
    return Data(path, "coco", classes, splits, problems, notes)


def _root(path: Path) -> Path:
    """The data set's folder: the parent of annotations/, or of a folder of JSON files alone that is beside images/."""
    folder = Path(os.path.abspath(path.parent if path.is_file() else path))
    if path.is_file() and folder.name == "annotations":
        return folder.parent
    if not (folder.parent / "images").is_dir():
        return folder
    with os.scandir(folder) as entries:
        return folder if any(entry.is_dir() or is_image_name(entry.name) for entry in entries) else folder.parent


def _split_name(file: Path, root: Path) -> str:
    """train, val or test if the file's or its folder's name says so; minival for instances_minival.json."""
    folder = Path(os.path.abspath(file.parent))
    own = canonical(file.stem) or (canonical(folder.name) if folder != root else None)
    rest = file.stem.removeprefix("instances_")
    return own or (rest if rest not in (file.stem, "default") else UNSPLIT)


def _not_instances(content: dict[str, Any]) -> str:
    """Why what was read from a JSON file is not that of an instances file; empty if it is."""
    lacking = [repr(key) for key in _KEYS if key not in content]
    if not lacking:
        return ""
    return f"not a COCO instances file, it has no list {', '.join(lacking)} (needed: images, annotations, categories)"


def _classes(
    contents: dict[str, Content], files: dict[str, Path], problems: list[Problem]
) -> tuple[tuple[str, ...], dict[str, dict[int, str]]]:
    """The class names of all files in their order, and of each split the name of each category id."""
    by_split: dict[str, dict[int, str]] = {}
    seen: dict[int, tuple[str, Path]] = {}
    for split, content in contents.items():
        own = by_split[split] = {}
        for category in content.categories:
            number, name = (category.get("id"), category.get("name")) if isinstance(category, dict) else (None, None)
            number = to_id(number)
            if not isinstance(number, int) or abs(number) >= 2**63 or not isinstance(name, str):
                raise DataError(f"{files[split]}: category {_shown(category)} needs a whole number 'id' and a 'name'")
            known, where = seen.setdefault(number, (name, files[split]))
            if known != name:
                raise DataError(
                    f"{files[split]}: category id {number} is {name!r:.80}, but {known!r:.80} in {where}; "
                    "give each class one id in all files"
                )
            own[number] = name
        check_classes(own.values(), files[split])
        numbers: dict[str, list[int]] = {}
        for number, name in own.items():
            numbers.setdefault(name, []).append(number)
        for name, ids in numbers.items():
            if len(ids) > 1:
                text = f"{name!r} is the name of categories {ids}; they are taken as one class"
                problems.append(Problem(files[split].name, "categories:", text, "duplicate-class"))
    return tuple(dict.fromkeys(name for own in by_split.values() for name in own.values())), by_split


def _category_ids(
    classes: tuple[str, ...], own: dict[int, str], all_splits: dict[str, dict[int, str]], used: Sequence[Any]
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
    content: Content,
    root: Path,
    classes: tuple[str, ...],
    category_names: dict[str, dict[int, str]],
    listing: Listing,
    problems: list[Problem],
) -> Split:
    shown = os.path.relpath(os.path.abspath(file), root)
    images, files, position_of = _images(content, name, file, root, listing, problems)
    rows, image_of = _owners(content, position_of, shown, problems)
    numbers = _numbers_in_image(image_of)
    ids = [content.annotations.ids[row] for row in rows.tolist()]
    _report_repeated(ids, shown, problems)
    categories = [content.annotations.category_ids[row] for row in rows.tolist()]
    position = {class_name: label for label, class_name in enumerate(classes)}
    label_of: dict[Any, int] = {number: position[name] for number, name in category_names[name].items()}
    labels = np.array([label_of.get(category, -1) for category in categories], dtype=np.int64)
    boxes = content.annotations.boxes[rows]
    with np.errstate(over="ignore", invalid="ignore"):
        boxes[:, 2:] += boxes[:, :2]

    def where(row: int) -> tuple[str, str, str]:
        return files[image_of[row]], f"box {numbers[row]}", f"{shown}, annotation id {ids[row]}"

    kept_rows = {row: position for position, row in enumerate(rows.tolist())} if content.annotations.broken else {}
    raw = RawSplit(
        name=name,
        root=root,
        classes=classes,
        category_ids=_category_ids(classes, category_names[name], category_names, categories),
        files=files,
        image_ids=_image_ids(images, shown, problems),
        sizes=_sizes(images),
        image_of=image_of,
        boxes=boxes,
        labels=labels,
        ignore=content.annotations.ignore[rows],
        areas=content.annotations.areas[rows],
        refused={
            int(row): f"has category_id {categories[row]}, which no category has" for row in np.flatnonzero(labels < 0)
        },
        where=where,
        outlines=content.annotations.outlines and content.annotations.outlines.select(rows),
        broken={kept_rows[row]: text for row, text in content.annotations.broken.items() if row in kept_rows},
    )
    return check(raw, problems)


def _owners(
    content: Content, position: dict[Any, int], shown: str, problems: list[Problem]
) -> tuple[np.ndarray, np.ndarray]:
    """The rows of the annotations whose image id has a `position`, and that position; (M,) int64 both."""
    image_ids = content.annotations.image_ids
    image_of = np.array([position.get(image_id, -1) for image_id in image_ids], dtype=np.int64)
    left_out = {image.id for image in content.images} - position.keys() - {None}
    for row in np.flatnonzero(image_of < 0).tolist():
        if image_ids[row] not in left_out:
            text = f"is of image id {image_ids[row]}, which no image has; left out"
            item = f"annotation id {content.annotations.ids[row]}"
            problems.append(Problem(shown, item, text, "unknown-image"))
    rows = np.flatnonzero(image_of >= 0)
    return rows, image_of[rows]


def _numbers_in_image(image_of: np.ndarray) -> np.ndarray:
    """(M,) int64: which box of its image each one is, from 1."""
    order = np.argsort(image_of, kind="stable")
    ends = np.cumsum(np.bincount(image_of))
    starts = np.concatenate([[0], ends])[image_of[order]] if len(order) else order
    numbers = np.empty_like(order)
    numbers[order] = np.arange(len(order)) - starts + 1
    return numbers


def _report_repeated(ids: list[int | str | None], shown: str, problems: list[Problem]) -> None:
    if len(set(ids)) == len(ids):
        return
    for annotation_id, times in Counter(ids).items():
        if times > 1 and annotation_id is not None:
            text = f"stands {times} times; all are kept, renumber"
            problems.append(Problem(shown, f"annotation id {annotation_id}", text, "duplicate-id"))


def _images(
    content: Content, name: str, file: Path, root: Path, listing: Listing, problems: list[Problem]
) -> tuple[list[ImageEntry], list[str], dict[Any, int]]:
    """The image entries that can be used, one a file, their files relative to root, and of each id the position."""
    shown = os.path.relpath(os.path.abspath(file), root)
    for number, entry in enumerate(content.images, 1):
        if entry.id is None or not entry.file_name:
            text = "has no 'id' or no 'file_name'; left out, add them"
            problems.append(Problem(shown, f"image {number}", text, "broken-annotation"))
    entries = [entry for entry in content.images if entry.id is not None and entry.file_name]
    folders = _image_folders(name, file, root)
    files = _find_images([entry.file_name for entry in entries], folders, root, listing)
    clashing = _clashing_ids(entries, files, content.annotations.image_ids, shown, problems)
    pairs = [(entry, found) for entry, found in zip(entries, files, strict=True) if entry.id not in clashing]

    missing = [entry for entry, found in pairs if found is None]
    places = ", ".join(os.path.relpath(folder, root) for folder in folders)
    if missing and len(missing) == len(entries):
        text = (
            f"none of its {counted(len(missing), 'image')} ({missing[0].file_name:.80}, ...) is in {places}; add them"
        )
        problems.append(Problem(shown, "", text, "missing-image"))
    else:
        for entry in missing:
            text = f"image not found in {places} ({shown}, image id {entry.id}); left out, add the file"
            problems.append(Problem(entry.file_name, "", text, "missing-image"))
    by_file: dict[str, list[ImageEntry]] = {}
    for entry, found in pairs:
        if found is not None:
            by_file.setdefault(found, []).append(entry)
    for found, same in by_file.items():
        if len(same) > 1:
            ids = ", ".join(str(entry.id) for entry in same[:3]) + ", ..." * (len(same) > 3)
            text = f"has {len(same)} entries in {shown} (image ids {ids}); their boxes are joined"
            problems.append(Problem(found, "", text, "duplicate-entry"))
    position: dict[Any, int] = {entry.id: index for index, same in enumerate(by_file.values()) for entry in same}
    return [same[0] for same in by_file.values()], list(by_file), position


def _clashing_ids(
    entries: list[ImageEntry],
    files: list[str | None],
    image_ids: Sequence[int | str | None],
    shown: str,
    problems: list[Problem],
) -> set[Any]:
    """The ids that several files have: nobody can tell whose boxes theirs are, and without them no image is usable."""
    named: dict[Any, dict[str, None]] = {}  # keys in their order
    for entry, found in zip(entries, files, strict=True):
        named.setdefault(entry.id, {})[found or entry.file_name] = None
    clashing = {number: list(names) for number, names in named.items() if len(names) > 1}
    boxes = Counter(number for number in image_ids if number in clashing) if clashing else Counter()
    for number, names in clashing.items():
        those = ", ".join(names[:3]) + f" and {len(names) - 3} more" * (len(names) > 3)
        text = (
            f"is that of {those}; left out with {counted(boxes[number], 'box', 'boxes')} of one or the other, renumber"
        )
        problems.append(Problem(shown, f"image id {number}", text, "clashing-id"))
    return set(clashing)


def _image_folders(name: str, file: Path, root: Path) -> list[str]:
    """Existing folders in which images of a split may lie, the most telling first."""
    raw_name = re.sub(r"^(instances|annotations)_", "", file.stem)
    names = list(dict.fromkeys([raw_name, name, *(alias for alias, split in ALIASES.items() if split == name)]))
    beside = Path(os.path.abspath(file.parent))
    folders = [root / "images" / n for n in names] + [root / n / "images" for n in names] + [root / n for n in names]
    folders += [beside / "images", root / "images", root / "data", root]
    if beside.name != "annotations":
        folders.insert(0 if beside != root else len(folders), beside)
    return [str(folder) for folder in dict.fromkeys(folders) if folder.is_dir()]


def _find_images(names: list[str], folders: list[str], root: Path, listing: Listing) -> list[str | None]:
    """Each image's file relative to root: under its name with folders if it exists so, else under its bare name."""
    found: list[str | None] = [None] * len(names)
    parts = [posixpath.split(name) for name in names]
    heads = {head: posixpath.normpath(head) if head else "" for head, _ in parts}
    leaving = {head for head, clean in heads.items() if clean.startswith(("/", "..")) or clean[1:2] == ":"}
    for bare in (False, True):
        for folder in folders:
            places = (
                {"": folder} if bare else {head: os.path.join(folder, heads[head]) for head in heads.keys() - leaving}
            )
            there = {head: listing.names(place) for head, place in places.items()}
            prefixes = {head: os.path.relpath(places[head], root) + os.sep for head, here in there.items() if here}
            for index in (index for index, file in enumerate(found) if file is None):
                head, tail = parts[index]
                head = "" if bare else head
                if tail in there.get(head, ()):
                    found[index] = (prefixes[head] + tail).removeprefix(os.curdir + os.sep)
    return found


def _image_ids(images: list[ImageEntry], shown: str, problems: list[Problem]) -> np.ndarray:
    whole = [image.id for image in images if isinstance(image.id, int) and abs(image.id) < 2**63]
    if len(whole) == len(images):
        return np.array(whole, dtype=np.int64)
    text = "some ids are not integers; the images are numbered from 1 instead"
    problems.append(Problem(shown, "images:", text, "id-not-integer"))
    return np.arange(1, len(images) + 1)


def _sizes(images: list[ImageEntry]) -> np.ndarray:
    """(I, 2) int64 height and width, 0 where the entry does not have them."""
    sizes = to_numbers([(image.height, image.width) for image in images], 2)
    return np.nan_to_num(sizes, nan=0, posinf=0, neginf=0).clip(0, 2**31).astype(np.int64)


def _shown(value: Any) -> str:
    try:
        return f"{value!r:.80}"
    except RecursionError:
        return f"(a deeply nested {type(value).__name__})"
