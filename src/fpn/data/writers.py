"""Data -> files in COCO, Pascal VOC or YOLO format, as `fpn.data.load` reads them.

Each writer fills an existing, empty folder; `fpn.data.convert` makes one that is there whole or not at all. Images are
hard links to the originals, or copies on another disk: to change one, write a new file in its place.

All raise DataError for a class name that no text file can hold, and OSError where the disk refuses.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TextIO
from xml.sax.saxutils import escape

import numpy as np
import yaml
from tqdm import tqdm

from fpn.data.copies import check_class_names, new_names, place_images
from fpn.data.dataset import Data, Split
from fpn.data.files import is_image_name
from fpn.data.images import image_size
from fpn.errors import DataError


def write_coco(data: Data, out: Path) -> None:
    """annotations/instances_{split}.json and images/{split}/, to which each `file_name` is relative.

    Ids of images and categories, areas, outlines and ignore flags (as iscrowd) are kept; annotations are numbered
    from 1.
    """
    check_class_names(data)
    names = image_names(data, "coco")
    _place(data, names, {name: out / "images" / name for name in data})
    (out / "annotations").mkdir()
    first_id = 1
    for name, split in data.items():
        with (out / "annotations" / f"instances_{name}.json").open("w", encoding="utf-8") as stream:
            _write_content(stream, split, names[name], first_id)
        first_id += len(split.boxes)


def _write_content(stream: TextIO, split: Split, names: list[str], first_id: int) -> None:
    """One object after the other: all their outlines as lists would take gigabytes."""
    encode = json.JSONEncoder(ensure_ascii=False).encode
    ids, sizes, numbers = split.image_ids.tolist(), split.sizes.tolist(), split.category_ids.tolist()
    images = [
        {"id": number, "file_name": name, "width": width, "height": height}
        for number, name, (height, width) in zip(ids, names, sizes, strict=True)
    ]
    categories = [{"id": number, "name": name} for number, name in zip(numbers, split.classes, strict=True)]
    stream.write(f'{{"images": {encode(images)}, "annotations": [')
    for number, entry in enumerate(_coco_annotations(split, first_id)):
        stream.write(", " * (number > 0) + encode(entry))
    stream.write(f'], "categories": {encode(categories)}}}')


def _coco_annotations(split: Split, first_id: int) -> Iterator[dict[str, Any]]:
    boxes = split.boxes.copy()
    boxes[:, 2:] -= boxes[:, :2]
    columns = (
        split.image_ids[split.image_of].tolist(),
        split.category_ids[split.labels].tolist(),
        boxes.tolist(),
        split.areas.tolist(),
        split.ignore.astype(int).tolist(),
    )
    for row, (image, category, box, area, crowd) in enumerate(zip(*columns, strict=True)):
        entry = {"image_id": image, "category_id": category, "bbox": box, "area": area, "iscrowd": crowd}
        outline = split.outlines.segmentation(row) if split.outlines else None
        yield {"id": first_id + row, **entry, **({"segmentation": outline} if outline else {})}


def write_voc(data: Data, out: Path) -> None:
    """Annotations/*.xml, JPEGImages/, ImageSets/Main/{split}.txt, and classes.txt for the order of the classes.

    Coordinates are the edges of the boxes in pixels, with fractions where they have any; ignore flags become difficult.
    """
    check_class_names(data)
    names = image_names(data, "voc")
    for folder in ("Annotations", "ImageSets/Main"):
        (out / folder).mkdir(parents=True)
    (out / "classes.txt").write_text("".join(f"{name}\n" for name in data.classes), encoding="utf-8")
    written: dict[str, Path] = {}
    for name, split in data.items():
        stems = [os.path.splitext(file)[0] for file in names[name]]
        lines = "".join(f"{stem}\n" for stem in stems)
        (out / "ImageSets" / "Main" / f"{name}.txt").write_text(lines, encoding="utf-8")
        for index, stem in enumerate(tqdm(stems, f"{name}: annotations", delay=1, leave=False)):
            if names[name][index] not in written:  # an image can be in two lists
                xml = _voc_xml(split, index, names[name][index])
                (out / "Annotations" / f"{stem}.xml").write_text(xml, encoding="utf-8")
                written[names[name][index]] = split.path(index)
    place_images([(path, out / "JPEGImages" / file) for file, path in written.items()])


def _voc_xml(split: Split, index: int, file: str) -> str:
    height, width = split.sizes[index].tolist()
    rows = split.rows(index)
    lines = [
        "<annotation>",
        f"  <folder>JPEGImages</folder>\n  <filename>{escape(file)}</filename>",
        f"  <size><width>{width}</width><height>{height}</height><depth>3</depth></size>",
        "  <segmented>0</segmented>",
    ]
    boxes = zip(split.labels[rows].tolist(), split.ignore[rows].tolist(), split.boxes[rows].tolist(), strict=True)
    for label, ignore, box in boxes:
        x1, y1, x2, y2 = (repr(value).removesuffix(".0") for value in box)
        lines += [
            f"  <object>\n    <name>{escape(split.classes[label])}</name>",
            f"    <pose>Unspecified</pose><truncated>0</truncated><difficult>{int(ignore)}</difficult>",
            f"    <bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox>\n  </object>",
        ]
    return "\n".join([*lines, "</annotation>\n"])


def write_yolo(data: Data, out: Path) -> None:
    """data.yaml, images/{split}/ and labels/{split}/, where a line is: class, centre x and y, width, height, 0 to 1.

    Ignored boxes are left out, as the format cannot mark them.

    Raises:
        DataError: also where an image's real size is not the annotated one, or its name has no suffix of an image.
    """
    check_class_names(data)
    names = image_names(data, "yolo")
    for name, split in data.items():
        _check_for_yolo(split, known=data.format == "yolo")
        for index, file in enumerate(tqdm(names[name], f"{name}: labels", delay=1, leave=False)):
            target = (out / "labels" / name / file).with_suffix(".txt")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(_yolo_lines(split, index), encoding="utf-8")
    _place(data, names, {name: out / "images" / name for name in data})
    config = {name: f"images/{name}" for name in data} | {"names": dict(enumerate(data.classes))}
    text = yaml.safe_dump(config, allow_unicode=True, sort_keys=False)
    (out / "data.yaml").write_text(text, encoding="utf-8")


def _yolo_lines(split: Split, index: int) -> str:
    rows = split.rows(index)
    height, width = split.sizes[index].tolist()
    lines = [
        f"{label} {(x1 + x2) / 2 / width!r} {(y1 + y2) / 2 / height!r} {(x2 - x1) / width!r} {(y2 - y1) / height!r}\n"
        for label, (x1, y1, x2, y2), ignore in zip(
            split.labels[rows].tolist(), split.boxes[rows].tolist(), split.ignore[rows].tolist(), strict=True
        )
        if not ignore
    ]
    return "".join(lines)


def _check_for_yolo(split: Split, known: bool) -> None:
    """Fractions are of the image as displayed, and that is looked for by its suffix; `known`: the sizes are its own."""
    nameless = [file for file in split.files.tolist() if not is_image_name(file)]
    if nameless:
        raise DataError(f"{nameless[0]}: has no image suffix such as .jpg, by which YOLO finds images; rename the file")
    if known:
        return
    with ThreadPoolExecutor(8) as pool:
        sizes = pool.map(image_size, (split.path(index) for index in range(len(split))))
        found = list(tqdm(sizes, f"{split.name}: image sizes", len(split), delay=1, leave=False))
    other = np.flatnonzero((split.sizes != np.array(found).reshape(-1, 2)).any(axis=1))
    if len(other):
        (height, width), (real_height, real_width) = split.sizes[other[0]].tolist(), found[other[0]]
        raise DataError(
            f"{split.path(int(other[0]))}: is annotated as {width}x{height}, but shows {real_width}x{real_height} "
            f"(width x height); YOLO keeps no sizes, so the boxes of {len(other)} such images would move; "
            "correct the sizes, or convert to coco or voc"
        )


def _place(data: Data, names: dict[str, list[str]], folders: dict[str, Path]) -> None:
    pairs = [
        (split.path(index), folders[name] / file)
        for name, split in data.items()
        for index, file in enumerate(names[name])
    ]
    place_images(pairs)


def image_names(data: Data, form: str) -> dict[str, list[str]]:
    """Of each split, the images' names below the format's folder of images, such that no two share an annotation."""
    if form == "voc":
        return _voc_names(data)
    mend: Callable[[str], str] = _yolo_name if form == "yolo" else str
    key = _without_suffix if form == "yolo" else str
    return {name: new_names(split.files.tolist(), mend, key) for name, split in data.items()}


def _voc_names(data: Data) -> dict[str, list[str]]:
    """One folder for all: an image in two splits has one name if its boxes are the same in both."""
    numbers: dict[tuple[object, ...], int] = {}
    files: list[str] = []
    places: dict[str, list[int]] = {}
    for name, split in data.items():
        places[name] = []
        for index, file in enumerate(split.files.tolist()):
            rows = split.rows(index)
            boxes = (array[rows].tobytes() for array in (split.boxes, split.labels, split.ignore))
            number = numbers.setdefault((split.root, file, *boxes), len(files))
            files += [file] * (number == len(files))
            places[name].append(number)
    names = new_names(files, _voc_name, _without_suffix)
    return {name: [names[number] for number in own] for name, own in places.items()}


def _without_suffix(name: str) -> str:
    return os.path.splitext(name)[0]


def _voc_name(name: str) -> str:
    """Without folders, and without blanks before the suffix, which lists of names would lose."""
    stem, suffix = os.path.splitext(name.replace("/", "_"))
    return f"{stem.strip()}{suffix}"


def _yolo_name(name: str) -> str:
    """Labels are looked for at the last folder called images, which must be ours."""
    *folders, file = name.split("/")
    return "/".join([*("images_" if folder == "images" else folder for folder in folders), file])


WRITERS = {"coco": write_coco, "voc": write_voc, "yolo": write_yolo}
