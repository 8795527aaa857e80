"""A grid of training images with their boxes and masks, as the model will see them."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from fpn.data.batching import DetectionDataset, Transform, seed_from
from fpn.data.dataset import Split
from fpn.data.mixing import Mixing
from fpn.data.transforms import resize_masks
from fpn.drawing import draw, font_for, to_picture
from fpn.errors import DataError, OptionError
from fpn.structures import Sample
from fpn.words import counted
from fpn.writing import replacing

CELL, NARROWEST = 420, 160  # pixels, the most of a picture's sides in the grid, and the least width of a column
GAP, TITLE = 10, 22  # pixels between pictures, and for the file name above each
PAPER, INK = (255, 255, 255), (40, 40, 40)
LARGEST = 400  # pictures in a grid
NAMED = 3  # unreadable images in a message


def save_grid(
    split: Split,
    transform: Transform,
    out: Path,
    mixing: Mixing | None = None,
    count: int = 16,
    times: int = 1,
    seed: int = 0,
) -> int:
    """Writes `count` random images of a split, `times` in a row as they come in different epochs, to a PNG or JPEG.

    Each is exactly what `DetectionDataset` gives when training. Images that cannot be read are left out, with one
    warning for all. Returns the number of different images.
    Raises OptionError for numbers or a file name that cannot work, DataError for a split without readable images.
    """
    if out.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise OptionError(f"{out}: the name of the picture must end in .png or .jpg")
    if count < 1 or times < 1 or count * times > LARGEST:
        raise OptionError(
            f"--count {count}, --times {times}: each must be at least 1, and both together at most {LARGEST}"
        )
    if not len(split):
        raise DataError(f"{split.root}: the split {split.name!r} has no images to show")
    # With training=True, which says nothing else, another image would take the place of an unreadable one.
    masks = split.outlines is not None
    dataset = DetectionDataset(split, transform, training=False, seed=seed, mixing=mixing, masks=masks)
    chosen = np.random.default_rng(seed_from(seed)).permutation(len(split))[:count].tolist()
    items = [(epoch, index) for index in chosen for epoch in range(times)]
    pictures, unreadable = [], {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*; it is left out$")
        for item in tqdm(items, desc="drawing", unit=" images", disable=None):
            sample = dataset[item]
            if sample is None:
                unreadable[item[1]] = str(split.path(item[1]))
            else:
                pictures.append((str(split.files[sample.index]), small_picture(sample, split.classes)))
    if unreadable:
        _tell(list(unreadable.values()), len(chosen))
    columns = times if times > 1 else math.ceil(math.sqrt(len(pictures)))
    with replacing(out) as unfinished:
        grid(pictures, columns).save(unfinished, format="PNG" if out.suffix.lower() == ".png" else "JPEG")
    return len(chosen) - len(unreadable)


def _tell(unreadable: list[str], tried: int) -> None:
    names = ", ".join(unreadable[:NAMED]) + (", ..." if len(unreadable) > NAMED else "")
    text = f"{counted(len(unreadable), 'image')} could not be read: {names}; fpn data check tells why"
    if len(unreadable) == tried:
        raise DataError(text)
    warnings.warn(text, stacklevel=3)


def small_picture(sample: Sample, classes: tuple[str, ...]) -> Image.Image:
    """The picture with its boxes and masks, made smaller where it is larger than its place in the grid."""
    picture = to_picture(sample.image)
    scale = min(1.0, CELL / max(picture.size))
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    boxes, masks = sample.boxes.numpy() * scale, None
    if sample.masks is not None:
        masks = list(resize_masks(sample.masks, (size[1], size[0])).numpy())
    return draw(picture.resize(size), boxes, sample.labels.numpy(), classes=classes, masks=masks)


def grid(pictures: list[tuple[str, Image.Image]], columns: int) -> Image.Image:
    """Pictures in rows, as wide as the widest and each row as high as the highest in it, their names above them."""
    rows = [pictures[start : start + columns] for start in range(0, len(pictures), columns)]
    width = max(NARROWEST, *(picture.width for _, picture in pictures))
    heights = [TITLE + max(picture.height for _, picture in row) for row in rows]
    page = Image.new("RGB", (GAP + columns * (width + GAP), GAP + sum(heights) + GAP * len(rows)), PAPER)
    pen, y = ImageDraw.Draw(page), GAP
    for row, height in zip(rows, heights, strict=True):
        for column, (name, picture) in enumerate(row):
            x = GAP + column * (width + GAP)
            font = font_for(TITLE - 8, name)
            while font.getlength(name) > width:
                name = "…" + name[2:]  # the end of a long path tells most
            pen.text((x, y + TITLE - 4), name, fill=INK, font=font, anchor="ls")
            page.paste(picture, (x, y + TITLE))
        y += height + GAP
    return page
