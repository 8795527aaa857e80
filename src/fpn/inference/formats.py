"""What is found in many pictures as files that other programs read. Nothing here holds more than one picture's rows.

Rows are those of `fpn.inference.journal`: {"file", "name", "row"}, in the order in which the pictures were given.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from fpn.errors import OptionError
from fpn.inference.journal import Row
from fpn.rle import runs_of
from fpn.writing import replacing

FORMATS = ("json", "coco", "csv", "yolo", "grid")
COLUMNS = ("file", "width", "height", "class", "score", "x1", "y1", "x2", "y2", "level")
ENCODE = json.JSONEncoder(ensure_ascii=False).encode

Rows = Callable[[], Iterator[Row]]  # from the first picture on, as often as it is called


def write(
    formats: Sequence[str],
    rows: Rows,
    number: int,
    out: Path,
    classes: Sequence[str],
    about: Mapping[str, Any],
    pictures: bool = True,
    progress: bool = True,
) -> list[Path]:
    """Writes the rows in each of the formats into the folder `out`, and returns the files, or folders of files.

    number: how many rows there are. about: the first entries of predictions.json. pictures: those with boxes exist.
    """
    written = []
    for name in dict.fromkeys(formats):
        match name:
            case "json":
                written.append(write_predictions(rows, out / "predictions.json", about, pictures))
            case "coco":
                written.append(write_coco(rows, out / "coco.json", classes))
            case "csv":
                written.append(write_csv(rows, out / "predictions.csv"))
            case "yolo":
                written.append(write_yolo(rows, out, classes))
            case "grid":
                from fpn.inference.grid import write_pages

                written.append(write_pages(rows, number, out / "grid", classes, progress))
            case _:
                raise OptionError(f"format {name}: there is no such format of predictions")
    return written


def write_predictions(rows: Rows, file: Path, about: Mapping[str, Any], pictures: bool) -> Path:
    """{**about, "images": [{"file", "picture", "height", "width", "detections"}, ...]}; see `fpn.inference.rows`."""
    with replacing(file) as unfinished, opened(unfinished) as stream:
        stream.write(f'{ENCODE(dict(about))[:-1]}, "images": ' if about else '{"images": ')
        picture = "picture" if pictures else None
        write_list(
            stream,
            (
                {"file": each["file"], **({picture: f"{each['name']}.jpg"} if picture else {}), **each["row"]}
                for each in rows()
            ),
        )
        stream.write("}")
    return file


def write_coco(rows: Rows, file: Path, classes: Sequence[str]) -> Path:
    """A COCO data set whose annotations have a score: images numbered from 1, categories from 1 as the classes stand.

    The name of an image is its path from the folder that all of them are in.
    """
    folders = {os.path.dirname(os.path.abspath(each["file"])) for each in rows()}
    root = os.path.commonpath(folders) if folders else os.curdir
    numbers = {name: number for number, name in enumerate(classes, 1)}
    with replacing(file) as unfinished, opened(unfinished) as stream:
        stream.write('{"images": ')
        write_list(stream, (coco_image(number, each, root) for number, each in enumerate(rows(), 1)))
        stream.write(', "annotations": ')
        entries = (
            coco_annotation(n, d, numbers) for n, each in enumerate(rows(), 1) for d in each["row"]["detections"]
        )
        write_list(stream, ({"id": number, **entry} for number, entry in enumerate(entries, 1)))
        stream.write(', "categories": ')
        write_list(stream, ({"id": number, "name": name} for name, number in numbers.items()))
        stream.write("}")
    return file


def coco_image(number: int, each: Row, root: str) -> dict[str, Any]:
    name = Path(os.path.relpath(os.path.abspath(each["file"]), root)).as_posix()
    return {"id": number, "file_name": name, "width": each["row"]["width"], "height": each["row"]["height"]}


def coco_annotation(image: int, detection: Mapping[str, Any], numbers: Mapping[str, int]) -> dict[str, Any]:
    x1, y1, x2, y2 = detection["box"]
    width, height = round(x2 - x1, 2), round(y2 - y1, 2)
    mask = detection.get("segmentation")
    area = round(width * height, 2) if mask is None else int(runs_of(mask["counts"])[1::2].sum())
    entry = {"image_id": image, "category_id": numbers[detection["class"]], "bbox": [x1, y1, width, height]}
    return {**entry, "score": detection["score"], "area": area, "iscrowd": 0,
            **({"segmentation": mask} if mask else {})}  # fmt: skip


def write_csv(rows: Rows, file: Path) -> Path:
    """A line a detection, with the names of the columns first; a picture without one has no line."""
    with replacing(file) as unfinished, opened(unfinished) as stream:
        table = csv.writer(stream)
        table.writerow(COLUMNS)
        for each in rows():
            row = each["row"]
            for d in row["detections"]:
                table.writerow(
                    [each["file"], row["width"], row["height"], d["class"], d["score"], *d["box"], d["level"]]
                )
    return file


def write_yolo(rows: Rows, out: Path, classes: Sequence[str]) -> Path:
    """labels/NAME.txt, where a line is: class, centre x and y, width, height, 0 to 1; and classes.txt for their names.

    Also of pictures in which nothing was found. Scores have no place in labels.
    """
    numbers = {name: number for number, name in enumerate(classes)}
    for each in rows():
        width, height = each["row"]["width"], each["row"]["height"]
        lines = []
        for detection in each["row"]["detections"]:
            x1, y1, x2, y2 = detection["box"]
            shares = ((x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height)
            lines.append(f"{numbers[detection['class']]} " + " ".join(f"{share:.6f}" for share in shares) + "\n")
        with replacing(out / "labels" / f"{each['name']}.txt") as unfinished:
            unfinished.write_text("".join(lines), encoding="utf-8")
    with replacing(out / "classes.txt") as unfinished:
        unfinished.write_text("".join(f"{name}\n" for name in classes), encoding="utf-8")
    return out / "labels"


def opened(file: Path) -> TextIO:
    """A text to be written; a file name that is not UTF-8 is written as JSON escapes it."""
    return file.open("w", encoding="utf-8", errors="backslashreplace", newline="")


def write_list(stream: TextIO, entries: Iterator[Any]) -> None:
    stream.write("[")
    for place, entry in enumerate(entries):
        stream.write((", " if place else "") + ENCODE(entry))
    stream.write("]")
