"""Pages of small pictures with their boxes, to look through what was found in many."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from fpn.data.images import read_image
from fpn.data.show import CELL, grid
from fpn.drawing import draw, to_picture
from fpn.errors import ImageError
from fpn.inference.formats import Rows
from fpn.rle import mask_of, runs_of
from fpn.writing import replacing

COLUMNS, LINES = 4, 5  # of pictures on a page


def write_pages(rows: Rows, number: int, folder: Path, classes: Sequence[str], progress: bool = True) -> Path:
    """Writes the pictures, 20 on a page, as 1.jpg, 2.jpg and so on; with zeros in front, so that they sort."""
    pages = math.ceil(number / (COLUMNS * LINES))
    with tqdm(total=number, desc="grid", unit=" images", disable=None if progress else True) as bar:
        pictures = small_pictures(rows, classes, bar)
        for page in range(1, pages + 1):
            shown = list(islice(pictures, COLUMNS * LINES))
            if not shown:
                break
            name = f"{page:0{len(str(pages))}}.jpg"
            with replacing(folder / name) as unfinished:
                grid(shown, min(COLUMNS, len(shown))).save(unfinished, format="JPEG", quality=88)
    return folder


def small_pictures(rows: Rows, classes: Sequence[str], bar: tqdm) -> Iterator[tuple[str, Image.Image]]:
    """Each picture with its name; one that has gone since it was looked at is left out."""
    numbers = {name: number for number, name in enumerate(classes)}
    for each in rows():
        bar.update()
        try:
            yield each["file"], small_picture(Path(each["file"]), each["row"]["detections"], numbers)
        except ImageError as error:
            tqdm.write(f"left out of the grid: {error}", sys.stderr)


def small_picture(file: Path, detections: Sequence[Mapping[str, Any]], numbers: Mapping[str, int]) -> Image.Image:
    """The picture with its boxes and masks, made smaller where it is larger than its place on the page."""
    picture = to_picture(read_image(file))
    scale = min(1.0, CELL / max(picture.size))
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    boxes = np.array([d["box"] for d in detections], dtype=float).reshape(-1, 4) * scale
    masks = [small_mask(d["segmentation"], size) for d in detections if "segmentation" in d]
    labels, scores = [numbers[d["class"]] for d in detections], [d["score"] for d in detections]
    return draw(picture.resize(size), boxes, labels, scores, list(numbers), masks or None)


def small_mask(segmentation: Mapping[str, Any], size: tuple[int, int]) -> np.ndarray:
    """A mask of a picture that was made smaller to this (width, height)."""
    height, width = segmentation["size"]
    mask = Image.fromarray(mask_of(runs_of(segmentation["counts"]), (height, width)) * np.uint8(255))
    return np.asarray(mask.resize(size, Image.Resampling.BOX)) >= 128
