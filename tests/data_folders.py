"""Writes small data sets in each format, for the tests of fpn.data."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import numpy as np
from PIL import Image

CLASSES = ("cat", "dog")


@dataclass(frozen=True)
class Picture:
    """One image to be written; boxes are (class, x1, y1, x2, y2)."""

    name: str
    size: tuple[int, int] = (40, 60)  # height, width
    boxes: tuple[tuple[str, float, float, float, float], ...] = ()


# Numbers that all three formats write without rounding.
PICTURES = {
    "train": (
        Picture("a.png", (40, 80), (("cat", 8, 4, 24, 20), ("dog", 40, 10, 80, 40))),
        Picture("b.png", (80, 40), (("dog", 0, 0, 10, 20),)),
        Picture("c.png", (20, 20)),
    ),
    "val": (Picture("d.png", (50, 100), (("cat", 25, 10, 75, 30),)),),
}


def write_image(path: Path, size: tuple[int, int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(sum(size)).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(values).save(path)


def coco_content(pictures: tuple[Picture, ...], ids: tuple[int, ...] = (1, 2)) -> dict[str, list[Any]]:
    numbers = dict(zip(CLASSES, ids, strict=True))
    content: dict[str, list[Any]] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": number, "name": name} for name, number in numbers.items()],
    }
    for image_id, picture in enumerate(pictures, 1):
        height, width = picture.size
        content["images"].append({"id": image_id, "file_name": picture.name, "height": height, "width": width})
        for name, x1, y1, x2, y2 in picture.boxes:
            box = [x1, y1, x2 - x1, y2 - y1]
            entry = {"id": len(content["annotations"]) + 1, "image_id": image_id, "category_id": numbers[name]}
            content["annotations"].append({**entry, "bbox": box, "area": box[2] * box[3], "iscrowd": 0})
    return content


def write_coco(folder: Path, splits: dict[str, tuple[Picture, ...]] | None = None) -> Path:
    for split, pictures in (PICTURES if splits is None else splits).items():
        save_json(folder / "annotations" / f"instances_{split}.json", coco_content(pictures))
        for picture in pictures:
            write_image(folder / "images" / picture.name, picture.size)
    return folder


def save_json(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def xml(picture: Picture, extra: str = "") -> str:
    objects = "".join(
        f"<object><name>{escape(name)}</name><difficult>0</difficult><bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin>"
        f"<xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
        for name, x1, y1, x2, y2 in picture.boxes
    )
    size = f"<size><width>{picture.size[1]}</width><height>{picture.size[0]}</height><depth>3</depth></size>"
    return f"<annotation><filename>{escape(picture.name)}</filename>{size}{objects}{extra}</annotation>"


def write_voc(folder: Path, splits: dict[str, tuple[Picture, ...]] | None = None) -> Path:
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for split, pictures in (PICTURES if splits is None else splits).items():
        for picture in pictures:
            (folder / "Annotations" / f"{Path(picture.name).stem}.xml").write_text(xml(picture))
            write_image(folder / "JPEGImages" / picture.name, picture.size)
        lines = "".join(f"{Path(picture.name).stem}\n" for picture in pictures)
        (folder / "ImageSets" / "Main" / f"{split}.txt").write_text(lines)
    return folder


def write_yolo(folder: Path, splits: dict[str, tuple[Picture, ...]] | None = None) -> Path:
    splits = PICTURES if splits is None else splits
    for split, pictures in splits.items():
        for picture in pictures:
            height, width = picture.size
            write_image(folder / "images" / split / picture.name, picture.size)
            if picture.boxes:  # an image without objects has no label file
                lines = [
                    f"{CLASSES.index(name)} {(x1 + x2) / 2 / width} {(y1 + y2) / 2 / height} "
                    f"{(x2 - x1) / width} {(y2 - y1) / height}\n"
                    for name, x1, y1, x2, y2 in picture.boxes
                ]
                label = folder / "labels" / split / f"{Path(picture.name).stem}.txt"
                label.parent.mkdir(parents=True, exist_ok=True)
                label.write_text("".join(lines))
    entries = "".join(f"{split}: images/{split}\n" for split in splits)
    (folder / "data.yaml").write_text(f"names: [{', '.join(CLASSES)}]\n{entries}")
    return folder
