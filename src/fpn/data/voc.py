"""Pascal VOC (http://host.robots.ox.ac.uk/pascal/VOC/voc2012/htmldoc/devkit_doc.html) -> splits.

    folder/Annotations/*.xml
    folder/JPEGImages/*.jpg
    folder/ImageSets/Main/train.txt, val.txt, test.txt     or, without lists,   folder/train/*.xml beside the images
    folder/classes.txt     if it is there, the classes in their order, a line each; else they come as they first appear

Coordinates are kept as written, as the edges of the box. VOC itself counted pixels from 1 and included the last one,
but today's labelling tools write the edges they drew, counted from 0, and nothing in a file tells the two apart; the
most that VOC's own boxes are off is one pixel at the left and top.

Of the file names in annotations and lists only the part after the last slash counts; images and annotations are looked
for in the data set's folder alone.
"""

from __future__ import annotations

import math
import os
import re
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from fpn.data.checks import RawSplit, check, check_classes
from fpn.data.dataset import Data, Problem, Split
from fpn.data.files import Listing, files_in, is_image_name
from fpn.data.splits import ALIASES, UNSPLIT, canonical, ordered
from fpn.errors import DataError
from fpn.words import counted

SHAPE = "Pascal VOC: Annotations/*.xml, JPEGImages/ and ImageSets/Main/train.txt, val.txt (lists of names)"
_PER_CLASS_LIST = re.compile(r".+_(train|val|trainval|test)$")


def looks_like(path: Path) -> bool:
    """Whether the folder holds annotation files of VOC."""
    return any(_is_voc(folder) for folder in _annotation_folders(path))


def _annotation_folders(path: Path) -> list[Path]:
    return [path / "Annotations", path / "annotations", path, *(path / name for name in ALIASES)]


def _is_voc(folder: Path) -> bool:
    files = files_in(folder, ".xml")
    if not files or folder.name.lower() == "annotations":
        return bool(files)
    with files[0].open("rb") as stream:
        return b"<annotation" in stream.read(4096)


@dataclass(frozen=True)
class _Annotation:
    """One annotation file; `names` are empty and `boxes` NaN where they are missing."""

    filename: str
    size: tuple[int, int]  # height, width; 0 if not given
    names: list[str]
    boxes: np.ndarray  # (n, 4)
    difficult: np.ndarray  # (n,) bool


def read(path: Path) -> Data:
    """Reads a folder as Pascal VOC.

    Raises:
        DataError: no object in any file has a class.
    """
    root = Path(os.path.abspath(path))
    listing = Listing()
    problems: list[Problem] = []
    groups = _groups(root, listing, problems)
    annotations: dict[Path, _Annotation] = {}
    files = sorted({file for group in groups.values() for file in group})
    for file in tqdm(files, "annotations", delay=1, leave=False):
        try:
            annotations[file] = _parse(file)
        except DataError as error:
            problems.append(Problem(os.path.relpath(file, root), "", str(error), "broken-annotation"))
    named = [name for a in annotations.values() for name in a.names if name]
    classes = tuple(dict.fromkeys([*_listed_classes(root / "classes.txt"), *named]))
    if not classes:
        reason = f"; first problem: {problems[0]}" if problems else ""
        raise DataError(
            f"{path}: no object in its {counted(len(annotations), 'readable annotation file')} has a class{reason}"
        )

    check_classes(classes, root)
    images = _find_images(root, annotations, listing)
    for file in (file for file in annotations if file not in images):
        names = f"{file.stem}.* or {annotations[file].filename}"
        text = f"its image ({names}) was not found; left out, add it to JPEGImages"
        problems.append(Problem(os.path.relpath(file, root), "", text, "missing-image"))
    first: dict[str, Path] = {}
    for file, image in images.items():
        if first.setdefault(image, file) is not file:
            text = f"its image {image} is also that of {first[image].name}; both are kept, delete one"
            problems.append(Problem(os.path.relpath(file, root), "", text, "duplicate-entry"))
    usable = {file: annotation for file, annotation in annotations.items() if file in images}
    ids = {file: number for number, file in enumerate(usable, 1)}
    splits = {
        name: _read_split(name, root, [file for file in group if file in ids], usable, images, ids, classes, problems)
        for name, group in groups.items()
    }
    unlabelled = len(listing.names(root / "JPEGImages")) - len(usable) if UNSPLIT in groups else 0
    files = "1 file in JPEGImages has" if unlabelled == 1 else f"{unlabelled:,} files in JPEGImages have"
    notes = [f"{files} no annotation file, left out"] if unlabelled > 0 else []
    # An image that is in two lists is read twice; its defects are listed once.
    return Data(path, "voc", classes, splits, list(dict.fromkeys(problems)), notes)


def _listed_classes(file: Path) -> list[str]:
    """The lines of the file; none if it is not there."""
    try:
        lines = file.read_text(encoding="utf-8-sig", errors="replace").split("\n")
    except OSError:
        return []
    return [line.strip() for line in lines if line.strip()]


def _groups(root: Path, listing: Listing, problems: list[Problem]) -> dict[str, list[Path]]:
    """The annotation files of each split."""
    folder = next((folder for folder in _annotation_folders(root)[:3] if _is_voc(folder)), None)
    if folder is None:
        folders = {name: root / name for name in ALIASES if _is_voc(root / name)}
        groups = {ALIASES[name]: files_in(folder, ".xml") for name, folder in folders.items()}
        return {name: groups[name] for name in ordered(groups)}

    stems = {name.removesuffix(".xml") for name in listing.names(folder) if name.endswith(".xml")}
    lists = _lists(root / "ImageSets" / "Main")
    if not lists:
        return {UNSPLIT: [folder / f"{stem}.xml" for stem in sorted(stems)]}
    groups = {}
    for name in ordered(lists):
        shown = os.path.relpath(lists[name], root)
        chosen: dict[str, Path] = {}
        for number, line in enumerate(lists[name].read_text(encoding="utf-8-sig", errors="replace").splitlines(), 1):
            stem = _listed(line, stems)
            if stem in chosen:
                text = f"names {stem} again; it counts once"
                problems.append(Problem(shown, f"line {number}", text, "duplicate-entry"))
            elif stem in stems:
                chosen[stem] = folder / f"{stem}.xml"
            elif stem:
                text = f"names {stem}, but {folder.name}/{stem}.xml does not exist; left out"
                text += " (images without objects need one too)"
                problems.append(Problem(shown, f"line {number}", text, "missing-annotation"))
        groups[name] = list(chosen.values())
    return groups


def _lists(main: Path) -> dict[str, Path]:
    """The lists that are splits, by name: not those of one class (dog_train.txt), nor trainval beside train and val."""
    files = {file.stem: file for file in files_in(main, ".txt") if not _PER_CLASS_LIST.match(file.stem)}
    whole = files.pop("trainval", None)
    lists = {canonical(stem) or stem: file for stem, file in files.items()}
    if whole is not None and not ("train" in lists and "val" in lists):
        lists["train"] = whole
    return lists


def _listed(line: str, stems: set[str]) -> str:
    """The image that a line names: "000005", "000005  1", "JPEGImages/000005.jpg" or a name with blanks."""
    line = line.strip()
    if line in stems or not line:
        return line
    name = os.path.basename(line.split()[0])
    return os.path.splitext(name)[0] if is_image_name(name) and name not in stems else name


def _parse(file: Path) -> _Annotation:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DataError(f"cannot be read ({error}); left out, copy or export it again") from error
    if b"<!DOCTYPE" in content or b"<!ENTITY" in content or b"\0" in content:
        # Entities can blow a small file up to gigabytes; no tool writes them, nor UTF-16, which would hide them.
        raise DataError("has a DOCTYPE or is not plain text; left out, save it as XML without one")
    try:
        tree = ET.fromstring(content)
    except (ET.ParseError, ValueError, LookupError) as error:
        raise DataError(f"not valid XML ({error}); left out, copy or export it again") from error
    objects = tree.findall("object")
    boxes = [_edges(item.find("bndbox")) for item in objects]
    sides = [_number(tree.findtext(f"size/{side}")) for side in ("height", "width")]
    height, width = (int(side) if 0 < side < 2**31 else 0 for side in sides)
    return _Annotation(
        filename=os.path.basename((tree.findtext("filename") or "").strip().replace("\\", "/")),
        size=(height, width),
        names=[" ".join((item.findtext("name") or "").split()) for item in objects],
        boxes=np.array(boxes, dtype=np.float64).reshape(-1, 4),
        difficult=np.array([_number(item.findtext("difficult")) > 0 for item in objects], dtype=bool),
    )


def _edges(box: ET.Element | None) -> list[float]:
    edges = ("xmin", "ymin", "xmax", "ymax")
    return [math.nan if box is None else _number(box.findtext(edge)) for edge in edges]


def _number(text: str | None) -> float:
    try:
        return float(text or "nan")
    except ValueError:
        return float("nan")


def _find_images(root: Path, annotations: dict[Path, _Annotation], listing: Listing) -> dict[Path, str]:
    """Of each annotation file the image, relative to root: the one of the same name, else the one that it names."""
    found: dict[Path, str] = {}
    usual = [os.path.join(root, name) for name in ("JPEGImages", "images", "Images")]
    by_stem: dict[str, dict[str, str]] = {}
    for file, annotation in annotations.items():
        named, stem = annotation.filename, file.stem
        for folder in (*usual, os.path.dirname(file), str(root)):
            if folder not in by_stem:
                names = sorted(name for name in listing.names(folder) if is_image_name(name))
                by_stem[folder] = {os.path.splitext(name)[0]: name for name in reversed(names)}
            if os.path.splitext(named)[0] == stem and named in listing.names(folder):
                name = named
            elif stem in by_stem[folder]:
                name = by_stem[folder][stem]
            elif is_image_name(named) and named in listing.names(folder):
                name = named
            else:
                continue
            found[file] = os.path.join(folder, name).removeprefix(os.path.join(root, ""))
            break
    return found


def _read_split(
    name: str,
    root: Path,
    files: list[Path],
    annotations: dict[Path, _Annotation],
    images: dict[Path, str],
    ids: dict[Path, int],
    classes: tuple[str, ...],
    problems: list[Problem],
) -> Split:
    chosen = [annotations[file] for file in files]
    names = [class_name for annotation in chosen for class_name in annotation.names]
    counts = [len(annotation.names) for annotation in chosen]
    image_of = np.repeat(np.arange(len(chosen)), counts)
    first_row = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    position = {class_name: label for label, class_name in enumerate(classes)}
    labels = np.array([position.get(class_name, -1) for class_name in names], dtype=np.int64)

    def where(row: int) -> tuple[str, str, str]:
        index = int(image_of[row])
        return os.path.relpath(files[index], root), f"box {row - first_row[index] + 1}", ""

    raw = RawSplit(
        name=name,
        root=root,
        classes=classes,
        category_ids=np.arange(1, len(classes) + 1),
        files=[images[file] for file in files],
        image_ids=np.array([ids[file] for file in files], dtype=np.int64),
        sizes=np.array([annotation.size for annotation in chosen], dtype=np.int64).reshape(-1, 2),
        image_of=image_of,
        boxes=np.concatenate([np.empty((0, 4)), *(annotation.boxes for annotation in chosen)]),
        labels=labels,
        ignore=np.concatenate([np.empty(0, dtype=bool), *(annotation.difficult for annotation in chosen)]),
        areas=np.full(len(names), np.nan),
        refused={int(row): "has no class, its <name> is missing or empty" for row in np.flatnonzero(labels < 0)},
        where=where,
    )
    return check(raw, problems)
