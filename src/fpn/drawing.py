"""Boxes, masks and labels on pictures of any size, from a thumbnail to a 24-megapixel photograph.

Line and letter sizes follow the picture, colours follow the class index, and labels look for a place inside the picture
where they cover no other label; in a crowd the labels of the highest scores win and the rest keep their boxes only.
"""

from __future__ import annotations

import colorsys
import importlib.util
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fpn.errors import OptionError

Colour = tuple[int, int, int]

# Bright, and far apart from each other and from most of what photographs are made of.
PALETTE: tuple[Colour, ...] = (
    (30, 136, 229),
    (255, 112, 0),
    (0, 190, 90),
    (224, 38, 190),
    (255, 208, 0),
    (0, 205, 225),
    (240, 50, 60),
    (124, 77, 255),
    (150, 220, 30),
    (255, 130, 170),
    (0, 150, 136),
    (170, 120, 90),
)
ALARM: Colour = (235, 20, 40)

SMALLEST_LETTERS, LARGEST_LETTERS = 9, 200  # pixels; text below this cannot be read, so none is written
CROWD = 0.25  # of the picture may lie under labels
SHINE = 0.55  # of the picture that is left under a mask
FULL = 0.15  # a label is left out where even its best place has more than this share under earlier labels


def draw(
    image: Tensor | Image.Image,
    boxes: Tensor | np.ndarray,
    labels: Tensor | np.ndarray | Sequence[int],
    scores: Tensor | np.ndarray | Sequence[float] | None = None,
    classes: Sequence[str] = (),
    masks: Tensor | Sequence[np.ndarray] | None = None,
) -> Image.Image:
    """The picture with its D boxes, each labelled "name 0.93" (the name alone without scores), as a new RGB image.

    `masks` are drawn half transparent under the boxes, with a line around them: the (D, m, m) probabilities of
    `Detections.masks`, or an array (H, W) for each box, not 0 where the object is.

    `image` is uint8 (3, H, W) or any Pillow image, `boxes` (D, 4) are (x1, y1, x2, y2) in its pixels, `labels` (D,)
    run from 0 and index `classes`; a label beyond `classes` is written as its number. Boxes are cut at the border;
    those with NaN are left out. Raises OptionError where the lengths differ or the image is of another kind.
    """
    rows, numbers = _rows(boxes), [int(label) for label in labels]
    shares = [float(score) for score in scores] if scores is not None else None
    if masks is not None and len(masks) != len(rows):
        raise OptionError(f"cannot draw {len(rows)} boxes, {len(masks)} masks; each box needs one mask")
    if len(numbers) != len(rows) or (shares is not None and len(shares) != len(rows)):
        given = f"{len(rows)} boxes, {len(numbers)} labels" + (f", {len(shares)} scores" if shares is not None else "")
        raise OptionError(f"cannot draw {given}; each box needs one label and, where there are scores, one score")
    texts = [classes[n] if 0 <= n < len(classes) else str(n) for n in numbers]
    order = list(range(len(rows)))
    if shares is not None:
        texts = [f"{text} {share:.2f}" for text, share in zip(texts, shares, strict=True)]
        order.sort(key=lambda i: -shares[i])
        rows, texts, numbers = rows[order], [texts[i] for i in order], [numbers[i] for i in order]
    colours = [colour_of(n) for n in numbers]
    if masks is not None:
        picture = to_picture(image)
        for i in reversed(range(len(rows))):  # one at a time: of a large photograph each has megabytes
            if np.isfinite(rows[i]).all():
                shade(picture, *_part(masks[int(order[i])], rows[i], picture.size), colours[i])
        image = picture
    return annotate(image, rows, texts, colours)


def annotate(
    image: Tensor | Image.Image,
    boxes: Tensor | np.ndarray,
    texts: Sequence[str],
    colours: Sequence[Colour],
    dashed: Sequence[bool] = (),
) -> Image.Image:
    """The picture with boxes (D, 4) of any text and colour, the most important first; an empty text gives no label.

    Boxes that are `dashed` have a broken line, white between its pieces. A new RGB image is returned.
    """
    picture, rows = to_picture(image), _rows(boxes)
    dashed = list(dashed) or [False] * len(rows)
    assert len(rows) == len(texts) == len(colours) == len(dashed)
    width, height = picture.size
    line = max(1, round(0.5 + (width * height) ** 0.5 / 300))
    crowding = min(1.0, (40 / max(1, len(rows))) ** 0.2)
    letters = min(LARGEST_LETTERS, max(SMALLEST_LETTERS, round((4 + (width * height) ** 0.5 / 55) * crowding)))

    pen = ImageDraw.Draw(picture, "RGBA")
    kept = [i for i in range(len(rows)) if np.isfinite(rows[i]).all()]
    edges = {i: _inside(rows[i], width, height) for i in kept}
    for i in reversed(kept):
        _box(pen, edges[i], colours[i], line, dashed[i])
    taken: list[tuple[int, int, int, int]] = []
    for i in kept:
        if texts[i] and sum(_overlap(plate, plate) for plate in taken) < CROWD * width * height:
            _label(pen, edges[i], texts[i], colours[i], letters, line, (width, height), taken)
    return picture


def _part(mask: Tensor | np.ndarray, box: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, int, int]:
    """Where in the picture of this (width, height) an object is: bool (h, w), with its top and left."""
    from fpn.model.masks import window

    if isinstance(mask, np.ndarray):
        return mask != 0, 0, 0
    part, top, left = window(mask.float().cpu(), torch.from_numpy(box).float(), (size[1], size[0]))
    return (part >= 0.5).numpy(), top, left


def shade(picture: Image.Image, mask: np.ndarray, top: int, left: int, colour: Colour) -> None:
    """Colours an RGB picture half through where a mask (h, w) is, and fully in a line at its edge."""
    if not mask.any():
        return
    height, width = min(mask.shape[0], picture.height - top), min(mask.shape[1], picture.width - left)
    inner = mask = mask[:height, :width]
    line = max(1, round((picture.width * picture.height) ** 0.5 / 500))
    for _ in range(line):  # what is left when a pixel is taken off on all sides
        near = np.pad(inner, 1)
        inner = inner & near[2:, 1:-1] & near[:-2, 1:-1] & near[1:-1, 2:] & near[1:-1, :-2]
    place = (left, top, left + width, top + height)
    pixels = np.asarray(picture.crop(place)).astype(np.float32)
    pixels[inner] = SHINE * pixels[inner] + (1 - SHINE) * np.array(colour, dtype=np.float32)
    pixels[mask & ~inner] = colour
    picture.paste(Image.fromarray(pixels.round().astype(np.uint8)), place[:2])


def to_picture(image: Tensor | Image.Image) -> Image.Image:
    """A new RGB Pillow image of uint8 pixels (3, H, W) or of any Pillow image. Raises OptionError for other tensors."""
    if isinstance(image, Image.Image):
        return image.convert("RGB") if image.mode != "RGB" else image.copy()
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
        raise OptionError(f"cannot draw on {image.dtype} {tuple(image.shape)}; it must be torch.uint8 (3, H, W)")
    return Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())


def colour_of(label: int) -> Colour:
    """The colour of a class index, the same in every picture; different for the first dozens of classes."""
    if label < len(PALETTE):
        return PALETTE[label]
    step = label - len(PALETTE)
    hue = (0.08 + step * 0.618034) % 1  # the golden ratio spreads any number of hues evenly
    red, green, blue = colorsys.hsv_to_rgb(hue, (0.85, 0.55, 0.7)[step % 3], (0.95, 0.95, 0.7)[step // 3 % 3])
    return round(red * 255), round(green * 255), round(blue * 255)


def _rows(boxes: Tensor | np.ndarray) -> np.ndarray:
    rows = boxes.detach().cpu().numpy() if isinstance(boxes, Tensor) else np.asarray(boxes)
    if rows.size == 0:
        return np.zeros((0, 4))
    if rows.ndim != 2 or rows.shape[1] != 4:
        raise OptionError(f"cannot draw boxes of shape {rows.shape}; it must be (D, 4)")
    return rows.astype(np.float64)


def _inside(box: np.ndarray, width: int, height: int) -> tuple[int, int, int, int]:
    """The first and last pixel of a box in x and y, at least one pixel large and inside the picture."""
    x1, x2 = (min(max(round(float(x)), 0), width) for x in box[[0, 2]])
    y1, y2 = (min(max(round(float(y)), 0), height) for y in box[[1, 3]])
    x1, y1 = min(x1, width - 1), min(y1, height - 1)
    return x1, y1, max(x2 - 1, x1), max(y2 - 1, y1)


def _box(pen: ImageDraw.ImageDraw, edges: tuple[int, int, int, int], colour: Colour, line: int, dashed: bool) -> None:
    """The four sides, with a dim seam around them so that they show on any background."""
    x1, y1, x2, y2 = edges
    line = max(1, min(line, (min(x2 - x1, y2 - y1) + 1) // 5))
    seam = max(1, line // 2)
    pen.rectangle((x1 - seam, y1 - seam, x2 + seam, y2 + seam), outline=(0, 0, 0, 70), width=seam)
    if not dashed:
        pen.rectangle(edges, outline=colour, width=line)
        return
    pen.rectangle(edges, outline=(255, 255, 255), width=line)
    piece = max(2, 4 * line)
    for x in range(x1, x2 + 1, 2 * piece):
        end = min(x + piece - 1, x2)
        pen.rectangle((x, y1, end, y1 + line - 1), fill=colour)
        pen.rectangle((x, y2 - line + 1, end, y2), fill=colour)
    for y in range(y1, y2 + 1, 2 * piece):
        end = min(y + piece - 1, y2)
        pen.rectangle((x1, y, x1 + line - 1, end), fill=colour)
        pen.rectangle((x2 - line + 1, y, x2, end), fill=colour)


def _label(
    pen: ImageDraw.ImageDraw,
    edges: tuple[int, int, int, int],
    text: str,
    colour: Colour,
    letters: int,
    line: int,
    size: tuple[int, int],
    taken: list[tuple[int, int, int, int]],
) -> None:
    """A plate with the text at the box, where it hides least of the plates so far; none where it finds no place."""
    text = " ".join(text.split())  # a line break would leave the plate
    pad = max(1, letters // 5)
    while True:
        font = font_for(letters, text)
        wide = round(font.getlength(text)) + 2 * pad
        high = round(letters * 1.15) + pad
        if wide <= size[0] and high <= size[1]:
            break
        if letters <= SMALLEST_LETTERS:
            return
        letters = max(SMALLEST_LETTERS, min(letters - 1, int(letters * size[0] / wide)))

    plates = [(x, y, x + wide, y + high) for x, y in _places(edges, wide, high, line, size)]
    covered = [sum(_overlap(plate, other) for other in taken) for plate in plates]
    best = min(range(len(plates)), key=covered.__getitem__)
    if covered[best] > FULL * wide * high:
        return
    x1, y1, x2, y2 = plates[best]
    pen.rounded_rectangle((x1, y1, x2 - 1, y2 - 1), radius=pad, fill=colour)
    # By relative luminance: at 0.2 black and white stand out about equally.
    luminance = sum(w * (c / 255) ** 2.2 for w, c in zip((0.2126, 0.7152, 0.0722), colour, strict=True))
    ink = (0, 0, 0) if luminance > 0.2 else (255, 255, 255)
    pen.text(((x1 + x2) / 2, (y1 + y2) / 2), text, fill=ink, font=font, anchor="mm")
    taken.append(plates[best])


def _places(
    edges: tuple[int, int, int, int], wide: int, high: int, line: int, size: tuple[int, int]
) -> list[tuple[int, int]]:
    """Top left corners for a plate, best first: above, below, inside and beside the box, moved into the picture."""
    x1, y1, x2, y2 = edges
    right, bottom = x2 + 1 - wide, y2 + 1
    outside = [(x1, y1 - high), (x1, bottom), (right, y1 - high), (right, bottom)]
    inside = [(x1 + line, y1 + line), (right - line, bottom - line - high)]
    beside = [(x2 + 1, y1), (x1 - wide, y1)]
    fits = [(x, y) for x, y in outside[:1] if y >= 0]  # a plate above a box at the upper border would cover the object
    rest = [(x, y) for x, y in outside[1:] + inside + beside if 0 <= y <= size[1] - high]
    places = fits + rest or inside
    return [(min(max(x, 0), size[0] - wide), min(max(y, 0), size[1] - high)) for x, y in places]


def _overlap(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> int:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(width, 0) * max(height, 0)


@lru_cache(maxsize=64)
def _fonts(letters: int) -> list[ImageFont.FreeTypeFont]:
    """Pillow's own font, then others with more alphabets, as far as this machine has them."""
    fonts: list = [ImageFont.load_default(letters)]
    matplotlib = importlib.util.find_spec("matplotlib")  # brings a font; found without importing it
    files = (
        [Path(matplotlib.origin).parent / "mpl-data/fonts/ttf/DejaVuSans.ttf"]
        if matplotlib and matplotlib.origin
        else []
    )
    for file in (*files, "NotoSansCJK-Regular.ttc", "DroidSansFallback.ttf", "msyh.ttc", "PingFang.ttc", "malgun.ttf"):
        try:
            fonts.append(ImageFont.truetype(str(file), letters))
        except OSError:
            continue
    return fonts


def font_for(letters: int, text: str) -> ImageFont.FreeTypeFont:
    """The first font that has every letter of the text, else the one that has the most."""
    if text.isascii():
        return _fonts(letters)[0]
    known = _known(text)
    return _fonts(letters)[known.index(max(known))]


@lru_cache(maxsize=1024)
def _known(text: str) -> list[int]:
    """How many letters of a text each font can draw; an unknown letter looks like one that no font has."""
    counts = []
    for font in _fonts(16):
        unknown = _shape(font, "\U0010fffe")
        counts.append(sum(letter.isspace() or _shape(font, letter) != unknown for letter in text))
    return counts


def _shape(font: ImageFont.FreeTypeFont, letter: str) -> bytes:
    return bytes(font.getmask(letter))  # type: ignore[arg-type]
