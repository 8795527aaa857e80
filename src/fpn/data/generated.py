"""A data set out of nothing: shaded objects of five classes, 8 to 200 pixels large, on textured backgrounds.

It lets the whole library run, from data to report, without a download. Every image has its own random generator, so
the same seed always gives the same pictures, in any order and on any number of threads.

An object is an outline (a polygon in its own unit coordinates u, v), placed by a 2x2 matrix, and a surface: colour and
height over (u, v), lit by the one lamp of the image. Clutter is made the same way and belongs to no class.
"""

from __future__ import annotations

import colorsys
import json
import math
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter
from tqdm import tqdm

from fpn.errors import DataError, OptionError
from fpn.hardware import cores
from fpn.rle import encode

# What makes it easy or hard. All of it is stored with the data, so a change here makes the data anew.
CLASSES = ("ball", "crate", "ring", "star", "leaf")
SMALLEST, LARGEST = 9.0, 200.0  # pixels, square root of the area of an object's box, log-uniform between
OBJECTS = (4, 9)  # fewest and most objects that an image starts from; one without a place is left out
CLUTTER = (3, 10)  # things of no class behind the objects
FRONT_CLUTTER = 0.35  # share of images with a thing of no class in front
MIN_VISIBLE = 0.4  # no object is hidden or cut off more than this leaves
MIN_VISIBLE_SMALL = 0.8  # the same for objects under SMALL pixels, of which a part tells little
SMALL = 24.0
ODD_COLOUR = 0.1  # share of objects whose hue is not that of their class
SENSOR_NOISE = 0.025  # largest standard deviation, of a range of 0 to 1
BLUR = 0.8  # largest radius in pixels, of a third of the images
VALIDATION = 6  # one unseen image for so many training images
VERSION = 2  # raised when the drawing below or what is written changes

HUES = {"ball": (0.97, 1.06), "crate": (0.07, 0.11), "ring": (0.53, 0.66), "star": (0.78, 0.9), "leaf": (0.22, 0.38)}
SUPERSAMPLING = 4

Array = np.ndarray
Object = tuple[int, Array, Array]  # label, box, mask
Surface = Callable[[Array, Array, Array, np.random.Generator], tuple[Array, Array]]


def generate(out: Path, images: int = 600, size: tuple[int, int] = (320, 320), seed: int = 0) -> Path:
    """A COCO data set in `out`: `images` training images and a sixth as many unseen ones ("val").

    All have the (height, width) `size`. Boxes are the tight boxes of the pixels that can be seen of each object.
    What is there already with the same parameters is kept; an earlier generated set with others is replaced; any
    other folder is refused.

    Raises OptionError for values that cannot work, DataError where `out` holds something else.
    """
    out = Path(out)
    if images < 1:
        raise OptionError(f"images is {images}; at least 1 is needed")
    if min(size) < 64 or max(size) > 4096:
        raise OptionError(f"size is {size}; height and width must be 64 to 4096 pixels")
    if seed < 0:
        raise OptionError(f"seed is {seed}; it must not be negative")
    parameters = _parameters(images, size, seed)
    if _is_complete(out, parameters):
        return out
    if out.exists() and not _is_ours(out):
        raise DataError(f"{out}: holds something other than a generated data set; give another or empty folder")

    partial_out = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        textures = _textures(max(size) + 192, seed)
        with tqdm(total=images + _validation(images), desc="generating images", unit="image") as bar:
            _write_split(partial_out, "train", images, size, (seed, 0), textures, parameters, bar)
            _write_split(partial_out, "val", _validation(images), size, (seed, 1), textures, parameters, bar)
        if out.exists():
            shutil.rmtree(out)
        os.replace(partial_out, out)
    finally:
        shutil.rmtree(partial_out, ignore_errors=True)
    return out


def _validation(images: int) -> int:
    return max(1, images // VALIDATION)


def _parameters(images: int, size: tuple[int, int], seed: int) -> dict:
    difficulty = (SMALLEST, LARGEST, OBJECTS, CLUTTER, FRONT_CLUTTER, MIN_VISIBLE, MIN_VISIBLE_SMALL, SMALL)
    look = (ODD_COLOUR, SENSOR_NOISE, BLUR, HUES)
    chosen = {"version": VERSION, "images": images, "size": size, "seed": seed, "difficulty": difficulty, "look": look}
    return json.loads(json.dumps(chosen))  # as it will be read back: lists, not tuples


def _annotations(out: Path, split: str) -> Path:
    return out / "annotations" / f"instances_{split}.json"


def _stored(out: Path, split: str) -> dict:
    try:
        stored = json.loads(_annotations(out, split).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stored if isinstance(stored, dict) else {}


def _is_complete(out: Path, parameters: dict) -> bool:
    for split in ("train", "val"):
        stored = _stored(out, split)
        if stored.get("info", {}).get("parameters") != parameters:
            return False
        if not all((out / "images" / split / image["file_name"]).is_file() for image in stored["images"]):
            return False
    return True


def _is_ours(out: Path) -> bool:
    """Whether `out` may be replaced: an empty folder, or an earlier generated data set."""
    if not out.is_dir():
        return False
    stored = [_stored(out, split).get("info", {}) for split in ("train", "val")]
    return not any(out.iterdir()) or any("parameters" in info for info in stored)


def _write_split(
    out: Path,
    split: str,
    images: int,
    size: tuple[int, int],
    seed: tuple[int, int],
    textures: Array,
    parameters: dict,
    bar: tqdm,
) -> None:
    folder = out / "images" / split
    folder.mkdir(parents=True)
    names = [f"{i:06d}.jpg" for i in range(1, images + 1)]

    def one(index: int) -> list[tuple[int, Array, list[str]]]:
        rng = np.random.default_rng((*seed, index))
        pixels, objects = render(size, textures, rng)
        Image.fromarray(pixels).save(folder / names[index], quality=int(rng.integers(86, 96)))
        return [(label, box, encode(torch.from_numpy(mask[None]))) for label, box, mask in objects]

    rows = []
    with ThreadPoolExecutor(max_workers=min(8, cores())) as threads:
        for index, objects in enumerate(threads.map(one, range(images))):
            for label, (x1, y1, x2, y2), (outline,) in objects:
                box = [int(x1), int(y1), int(x2 - x1), int(y2 - y1)]
                row = {"id": len(rows) + 1, "image_id": index + 1, "category_id": label + 1, "bbox": box}
                outlined = {"segmentation": {"size": list(size), "counts": outline}}
                rows.append(row | {"area": box[2] * box[3], "iscrowd": 0} | outlined)
            bar.update()

    height, width = size
    content = {
        "info": {"description": "generated by fpn: objects of five classes, no photographs", "parameters": parameters},
        "images": [{"id": i, "file_name": n, "height": height, "width": width} for i, n in enumerate(names, 1)],
        "categories": [{"id": i, "name": name} for i, name in enumerate(CLASSES, 1)],
        "annotations": rows,
    }
    _annotations(out, split).parent.mkdir(exist_ok=True)
    _annotations(out, split).write_text(json.dumps(content), encoding="utf-8")


# One image: background, clutter, objects from far to near, then the camera.


@dataclass(frozen=True)
class _Lamp:
    """Where the light comes from (a unit vector in x, y and towards the viewer) and how much shadow it throws."""

    direction: Array
    shadow: float


class _Canvas:
    """The picture while it is painted, and which thing (-1: none) every pixel shows."""

    def __init__(self, pixels: Array) -> None:
        self.pixels = pixels  # (H, W, 3) float32, 0..1
        self.owner: Array = np.full(pixels.shape[:2], -1, dtype=np.int16)
        self.need: list[int] = []  # pixels of each object that must stay visible

    def free(self, mask: Array, top: int, left: int, need: int) -> bool:
        """Whether a thing fits here: enough of it inside the picture, and enough left of those it hides."""
        window, inside = self._windows(mask.shape, top, left)
        if np.count_nonzero(mask[inside]) < need:
            return False
        hidden = self.owner[window][mask[inside]]
        for thing, count in zip(*np.unique(hidden[hidden >= 0], return_counts=True), strict=True):
            if np.count_nonzero(self.owner == thing) - count < self.need[thing]:
                return False
        return True

    def paint(self, colour: Array, alpha: Array, top: int, left: int, lamp: _Lamp, scale: float) -> None:
        """Put a thing, and the shadow it throws, over what is there."""
        window, inside = self._windows(alpha.shape, top, left)
        if lamp.shadow > 0:
            reach = 0.06 * scale + 1
            pad = int(3 * reach) + 1
            dx, dy = (round(float(-d) * reach * 1.5) for d in lamp.direction[:2])
            shadow = _blur(np.pad((alpha * 255).astype(np.uint8), pad), reach) * np.float32(lamp.shadow / 255)
            below, part = self._windows(shadow.shape, top - pad + dy, left - pad + dx)
            self.pixels[below] *= 1 - shadow[part][..., None]
        cover = alpha[inside][..., None]
        self.pixels[window] += cover * (colour[inside] - self.pixels[window])

    def own(self, mask: Array, top: int, left: int, need: int | None) -> None:
        """Note who is seen here now: a new object, or nobody where `need` is None."""
        window, inside = self._windows(mask.shape, top, left)
        self.owner[window][mask[inside]] = -1 if need is None else len(self.need)
        if need is not None:
            self.need.append(need)

    def box(self, thing: int) -> Array:
        """The tight box (x1, y1, x2, y2) of the visible pixels of an object."""
        seen = self.owner == thing
        columns, rows = np.flatnonzero(seen.any(axis=0)), np.flatnonzero(seen.any(axis=1))
        return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])

    def shape(self, thing: int) -> Array:
        """Where an object is seen, (H, W) bool."""
        return self.owner == thing

    def _windows(self, shape: tuple[int, ...], top: int, left: int) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
        height, width = self.owner.shape
        y1, x1 = min(max(top, 0), height), min(max(left, 0), width)
        y2, x2 = min(max(top + shape[0], y1), height), min(max(left + shape[1], x1), width)
        return (slice(y1, y2), slice(x1, x2)), (slice(y1 - top, y2 - top), slice(x1 - left, x2 - left))


def render(size: tuple[int, int], textures: Array, rng: np.random.Generator) -> tuple[Array, list[Object]]:
    """One picture, (H, W, 3) uint8, and its objects: (label, tight box of the visible pixels, those pixels)."""
    angle, tilt = rng.uniform(0, 2 * np.pi), rng.uniform(0.5, 0.9)
    direction = np.array([np.cos(angle) * np.sin(tilt), np.sin(angle) * np.sin(tilt), np.cos(tilt)])
    lamp = _Lamp(direction, rng.uniform(0.15, 0.55))
    canvas = _Canvas(_background(size, textures, rng))

    for _ in range(rng.integers(CLUTTER[0], CLUTTER[1] + 1)):
        _put(canvas, _clutter(rng), _log_uniform(rng, 6.0, 0.4 * min(size)), textures, lamp, rng, label=None)
    largest = min(LARGEST, 0.62 * min(size))
    sizes = [_log_uniform(rng, SMALLEST, largest) for _ in range(rng.integers(OBJECTS[0], OBJECTS[1] + 1))]
    labels = []
    for scale in sorted(sizes, key=lambda side: -math.log(side) + rng.normal(0, 0.5)):  # mostly the small in front
        label = int(rng.integers(len(CLASSES)))
        if _put(canvas, _object(CLASSES[label], rng), scale, textures, lamp, rng, label):
            labels.append(label)
    if rng.random() < FRONT_CLUTTER:
        _put(canvas, _clutter(rng), _log_uniform(rng, 10.0, 0.5 * min(size)), textures, lamp, rng, label=None)

    objects = [(label, canvas.box(thing), canvas.shape(thing)) for thing, label in enumerate(labels)]
    return _photograph(canvas.pixels, textures, rng), objects


def _log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return low * (high / low) ** rng.random()


@dataclass(frozen=True)
class _Thing:
    outlines: list[Array]  # polygons (P, 2) in u, v; the second and later ones are holes
    matrix: Array  # (2, 2): from u, v to x, y, but for the scale
    surface: Surface
    gloss: float


def _put(
    canvas: _Canvas,
    thing: _Thing,
    scale: float,
    textures: Array,
    lamp: _Lamp,
    rng: np.random.Generator,
    label: int | None,
) -> bool:
    """Paint a thing whose box has an area of scale**2 somewhere; False where ten tries found no place for it."""
    points = [outline @ thing.matrix.T for outline in thing.outlines]
    low, high = points[0].min(axis=0), points[0].max(axis=0)
    stretch = scale / np.sqrt(np.prod(high - low))
    shift = rng.random(2) + 1 - low * stretch  # the outline starts one to two pixels inside its patch
    width, height = (int(side) + 2 for side in high * stretch + shift)

    alpha = _cover([p * stretch + shift for p in points], height, width)
    mask = alpha >= 0.5
    share = MIN_VISIBLE_SMALL if scale < SMALL else MIN_VISIBLE
    need = int(np.ceil(mask.sum() * share)) if label is not None else 0
    for _ in range(10):
        top = int(rng.integers(-height // 2, canvas.owner.shape[0] - height // 2))
        left = int(rng.integers(-width // 2, canvas.owner.shape[1] - width // 2))
        if canvas.free(mask, top, left, need):
            break
    else:
        return False

    x, y = _grid(height, width, -shift)
    inverse = (np.linalg.inv(thing.matrix) / stretch).astype(np.float32)
    u = inverse[0, 0] * x + inverse[0, 1] * y
    v = inverse[1, 0] * x + inverse[1, 1] * y
    grain = _crop(textures, (height, width), rng)
    colour, relief = thing.surface(u, v, grain, rng)
    lit = _light(colour, relief * np.float32(stretch), lamp, thing.gloss)
    canvas.paint(lit, alpha, top, left, lamp, float(scale))
    canvas.own(mask, top, left, None if label is None else need)
    return True


def _grid(height: int, width: int, shift: Array | tuple[float, float] = (0.0, 0.0)) -> tuple[Array, Array]:
    """The x (1, width) and y (height, 1) of the middles of all pixels, moved by a shift."""
    x, y = (np.arange(n, dtype=np.float32) + np.float32(0.5 + s) for n, s in zip((width, height), shift, strict=True))
    return x[None, :], y[:, None]


def _cover(outlines: list[Array], height: int, width: int) -> Array:
    """How much of each pixel a polygon with holes covers, 0 to 1, (height, width) float32."""
    k = SUPERSAMPLING
    picture = Image.new("L", (width * k, height * k))
    pen = ImageDraw.Draw(picture)
    for i, outline in enumerate(outlines):
        pen.polygon([(float(a), float(b)) for a, b in outline * k - 0.5], fill=0 if i else 255)
    return np.asarray(picture.reduce(k), dtype=np.float32) / 255


def _blur(picture: Array, radius: float) -> Array:
    """A grey uint8 picture blurred, float32; wide blurs are made on a smaller copy, which costs far less."""
    factor = max(1, int(radius / 1.5))
    full = Image.fromarray(picture)
    soft = full.reduce(factor).filter(ImageFilter.GaussianBlur(radius / factor))
    return np.asarray(soft.resize(full.size, Image.Resampling.BILINEAR), dtype=np.float32)


def _light(colour: Array, height: Array, lamp: _Lamp, gloss: float) -> Array:
    """Colour under the lamp: diffuse and specular light on the slopes of the surface, (h, w, 3)."""
    dy, dx = np.gradient(height)
    length = np.sqrt(dx * dx + dy * dy + 1)
    lx, ly, lz = lamp.direction.astype(np.float32)
    diffuse = np.maximum(lz - dx * lx - dy * ly, 0) / length
    half = lamp.direction + np.array([0, 0, 1])  # between the lamp and the eye
    hx, hy, hz = (half / np.linalg.norm(half)).astype(np.float32)
    shine = np.maximum((hz - dx * hx - dy * hy) / length, 0) ** 24
    return colour * (0.38 + 0.78 * diffuse)[..., None] + (gloss * shine)[..., None]


# The five classes: outline, placement and surface.


def _object(name: str, rng: np.random.Generator) -> _Thing:
    turn = _rotation(rng.uniform(0, 2 * np.pi))
    match name:
        case "ball":
            return _Thing([_circle(1.0)], turn, partial(_ball, _hue(name, rng)), gloss=0.7)
        case "crate":
            aspect = rng.uniform(0.75, 1)
            slant = np.array([[1, rng.uniform(-0.15, 0.15)], [0, aspect]])
            return _Thing([_square()], turn @ slant, partial(_crate, _hue(name, rng)), gloss=0.05)
        case "ring":
            hole = rng.uniform(0.42, 0.6)
            flat = np.diag([1, rng.uniform(0.6, 1)])
            return _Thing([_circle(1.0), _circle(hole)], turn @ flat, partial(_ring, _hue(name, rng), hole), gloss=0.5)
        case "star":
            flat = np.diag([1, rng.uniform(0.8, 1)])
            inner = rng.uniform(0.4, 0.52)
            return _Thing([_star(inner)], turn @ flat, partial(_star_surface, _hue(name, rng), inner), gloss=0.25)
        case _:
            bend, wide = rng.uniform(-0.35, 0.35), rng.uniform(0.36, 0.5)
            return _Thing([_leaf(bend, wide)], turn, partial(_leaf_surface, _hue(name, rng), bend), gloss=0.15)


def _rotation(angle: float) -> Array:
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


def _hue(name: str, rng: np.random.Generator) -> float:
    return rng.random() if rng.random() < ODD_COLOUR else rng.uniform(*HUES[name])


def _colour(hue: float, saturation: float, value: float) -> Array:
    return np.array(colorsys.hsv_to_rgb(hue % 1, saturation, value), dtype=np.float32)


def _blend(a: Array, b: Array, share: Array) -> Array:
    return a + (b - a) * share[..., None].astype(np.float32)


def _circle(radius: float) -> Array:
    angle = np.linspace(0, 2 * np.pi, 96, endpoint=False)
    return radius * np.stack([np.cos(angle), np.sin(angle)], axis=1)


def _ball(hue: float, u: Array, v: Array, grain: Array, rng: np.random.Generator) -> tuple[Array, Array]:
    """A sphere with painted gores, with a band, or plain."""
    height = np.sqrt(np.maximum(1 - u * u - v * v, 0))
    axis = rng.normal(size=3).astype(np.float32)
    axis /= np.linalg.norm(axis)
    side = np.cross(axis, np.array([0.3, 0.5, 0.8], dtype=np.float32))
    side /= np.linalg.norm(side)
    other = np.cross(axis, side)
    a, b, c = (u * n[0] + v * n[1] + height * n[2] for n in (axis, side, other))
    match rng.integers(3):
        case 0:
            paint = np.floor(np.arctan2(b, c) * (3 / np.pi)) % 2
        case 1:
            paint = (np.abs(a) < 0.28).astype(np.float32)
        case _:
            paint = np.zeros_like(u)
    main, second = _colour(hue, rng.uniform(0.75, 0.95), rng.uniform(0.75, 1)), _colour(hue + 0.09, 0.15, 0.97)
    return _blend(main, second, paint) * (1 + 0.05 * grain)[..., None], height


def _square() -> Array:
    """A square with slightly rounded corners."""
    angle = np.linspace(0, np.pi / 2, 5)
    corner = 0.9 + 0.1 * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return np.concatenate([corner @ _rotation(-k * np.pi / 2) for k in range(4)])


def _crate(hue: float, u: Array, v: Array, grain: Array, rng: np.random.Generator) -> tuple[Array, Array]:
    """Planks in a frame, with a brace across or without."""
    planks = rng.integers(2, 5)
    row = (v + 1) * planks / 2
    gap = np.abs(row - np.round(row)) < 0.06
    frame = np.maximum(np.abs(u), np.abs(v)) > 0.72
    brace = (np.abs(u - v) < 0.26) if rng.random() < 0.6 else np.zeros_like(frame)
    raised = frame | brace
    tint = rng.uniform(0.85, 1.1, planks + 2)[np.clip(row, -1, planks).astype(int) + 1]
    wood = _colour(hue, rng.uniform(0.45, 0.75), rng.uniform(0.55, 0.85))
    fibre = 1 + 0.16 * np.sin((v * 26 + grain * 3.0) + 2 * np.sin(u * 2 + grain)) + 0.12 * grain
    tone = np.where(raised, 1.12, tint * np.where(gap, 0.45, 0.86)) * np.where(raised & gap & ~frame, 1, fibre)
    edge = np.clip((np.maximum(np.abs(u), np.abs(v)) - 0.9) / 0.1, 0, 1)
    height = 0.09 * raised - 0.06 * gap * ~raised - 0.12 * edge
    return wood * tone[..., None].astype(np.float32), height


def _ring(hue: float, hole: float, u: Array, v: Array, grain: Array, rng: np.random.Generator) -> tuple[Array, Array]:
    """A torus, often with stripes around the tube."""
    middle, thick = (1 + hole) / 2, (1 - hole) / 2
    height = np.sqrt(np.maximum(thick**2 - (np.hypot(u, v) - middle) ** 2, 0))
    stripes = int(rng.choice([0, 2, 4, 6]))
    wave = np.sin(np.arctan2(v, u) * stripes + rng.uniform(0, 6))
    main, second = _colour(hue, rng.uniform(0.7, 0.95), rng.uniform(0.7, 1)), _colour(hue, 0.08, 0.96)
    return _blend(main, second, (wave > 0.5) * (stripes > 0)) * (1 + 0.06 * grain)[..., None], height


def _star(inner: float) -> Array:
    angle = np.arange(10) * np.pi / 5
    radius = np.where(np.arange(10) % 2, inner, 1.0)
    return radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)


def _star_surface(
    hue: float, inner: float, u: Array, v: Array, grain: Array, rng: np.random.Generator
) -> tuple[Array, Array]:
    """Ten facets that rise to the middle."""
    sector = 2 * np.pi / 5
    angle = np.abs((np.arctan2(v, u) + sector / 2) % sector - sector / 2)
    radius = np.hypot(u, v)
    x, y = radius * np.cos(angle), radius * np.sin(angle)
    edge = (inner * math.cos(sector / 2) - 1, inner * math.sin(sector / 2))  # from a tip to the next notch
    height = ((1 - x) * edge[1] + y * edge[0]) / math.hypot(*edge)
    main, second = _colour(hue, rng.uniform(0.6, 0.9), rng.uniform(0.75, 1)), _colour(hue - 0.06, 0.5, 1.0)
    return _blend(main, second, radius < rng.choice([0, 0.35])) * (1 + 0.1 * grain)[..., None], 0.9 * height


def _leaf(bend: float, wide: float) -> Array:
    t = np.cos(np.linspace(0, np.pi, 40))
    half = wide * (1 - t * t) ** 0.8 * (1 - 0.3 * t)
    middle = bend * (1 - t * t)
    return np.concatenate([np.stack([t, middle + half], axis=1), np.stack([t, middle - half], axis=1)[::-1]])


def _leaf_surface(
    hue: float, bend: float, u: Array, v: Array, grain: Array, rng: np.random.Generator
) -> tuple[Array, Array]:
    """Two halves folded at the midrib, with side veins and patches of another green."""
    across = np.abs(v - bend * (1 - u * u))
    phase = ((u - across * 1.1) * rng.uniform(5, 8)) % 1
    vein = np.maximum(across < 0.035, np.maximum(0.5 - 3 * np.abs(phase - 0.5), 0))
    main, patch = _colour(hue, rng.uniform(0.65, 0.9), rng.uniform(0.45, 0.8)), _colour(hue - 0.07, 0.7, 0.8)
    colour = _blend(main, patch, np.clip(grain * 0.8, 0, 0.8))
    height = 0.55 * across + 0.008 * np.sin(phase * 2 * math.pi)
    return _blend(colour, _colour(hue - 0.04, 0.35, 0.9), vein * 0.7), height


# What belongs to no class, and what everything stands before.


def _clutter(rng: np.random.Generator) -> _Thing:
    """A bent stroke, a blob or a shard, of any colour."""
    turn = _rotation(rng.uniform(0, 2 * np.pi))
    match rng.integers(3):
        case 0:
            t = np.linspace(-1, 1, 24)
            middle = rng.uniform(-0.5, 0.5) * t**2 + rng.uniform(-0.4, 0.4) * t**3
            half = rng.uniform(0.02, 0.07) * (1.2 - t * t)
            outline = np.concatenate([np.stack([t, middle + half], 1), np.stack([t, middle - half], 1)[::-1]])
        case 1:
            angle = np.linspace(0, 2 * np.pi, 48, endpoint=False)
            waves = sum(rng.normal(0, 0.22 / k) * np.sin(k * angle + rng.uniform(0, 6)) for k in (2, 3, 4, 5))
            radius = np.maximum(1 + waves, 0.35)
            outline = radius[:, None] * np.stack([np.cos(angle), 0.6 * np.sin(angle)], 1)
        case _:
            angle = np.sort(rng.uniform(0, 2 * np.pi, 3)) + np.array([0, 0.7, 1.4])
            outline = np.stack([np.cos(angle), 0.7 * np.sin(angle)], 1)
    colour = _colour(rng.random(), rng.uniform(0, 0.6), rng.uniform(0.15, 0.9))
    return _Thing([outline], turn, partial(_plain, colour), gloss=0.0)


def _plain(colour: Array, u: Array, v: Array, grain: Array, rng: np.random.Generator) -> tuple[Array, Array]:
    return colour * (1 + rng.uniform(0.1, 0.5) * grain)[..., None], 0.05 * grain


def _textures(side: int, seed: int) -> Array:
    """Sixteen fields of noise (16, side, side) of many octaves, mean 0, about -1 to 1, half of them stretched."""
    rng = np.random.default_rng((seed, 2))
    fields = []
    for i in range(16):
        field, stretch = np.zeros((side, side), dtype=np.float32), (1 if i % 2 else int(rng.integers(1, 12)))
        cells, roughness = float(rng.uniform(2, 6)), rng.uniform(0.45, 0.75)
        for octave in range(7):
            rows, columns = (int(min(side, cells * 2**octave / s)) + 3 for s in (1, stretch))
            grid = Image.fromarray(rng.standard_normal((rows, columns), dtype=np.float32))
            field += roughness**octave * np.asarray(grid.resize((side, side), Image.Resampling.BICUBIC))
        fields.append(np.clip((field - field.mean()) / (2 * field.std()), -1.2, 1.2))
    return np.stack(fields)


def _crop(textures: Array, size: tuple[int, int], rng: np.random.Generator) -> Array:
    """A piece (height, width) of one of the textures, turned and mirrored."""
    field = textures[rng.integers(len(textures))]
    if rng.random() < 0.5:
        field = field.T
    field = field[:: rng.choice([-1, 1]), :: rng.choice([-1, 1])]
    top, left = (int(rng.integers(side - part + 1)) for side, part in zip(field.shape, size, strict=True))
    return field[top : top + size[0], left : left + size[1]]


def _background(size: tuple[int, int], textures: Array, rng: np.random.Generator) -> Array:
    """A surface seen out of focus: ground, boards, cloth or a horizon, (H, W, 3) float32."""
    size, whole = (size[0] // 2, size[1] // 2), (size[1], size[0])  # out of focus, so half the pixels will do
    height, width = size
    coarse, fine = _crop(textures, size, rng), _crop(textures, size, rng)
    hue = rng.random()
    first = _colour(hue, rng.uniform(0.05, 0.4), rng.uniform(0.3, 0.8))
    second = _colour(hue + rng.normal(0, 0.08), rng.uniform(0.05, 0.4), rng.uniform(0.3, 0.8))
    x, y = (part / max(size) for part in _grid(height, width))
    angle = rng.uniform(0, math.pi)
    along = x * math.cos(angle) + y * math.sin(angle)
    across = y * math.cos(angle) - x * math.sin(angle)
    match rng.integers(4):
        case 0:
            share, dark = 0.5 + 0.5 * coarse, 0.0
        case 1:  # boards
            place = across * rng.uniform(4, 10) + 0.02 * coarse
            share = (np.floor(place) * 0.37) % 1 + 0.25 * fine
            dark = 0.45 * (np.abs(place - np.round(place)) < 0.03)
        case 2:  # cloth
            threads = rng.uniform(60, 160)
            share = 0.5 + 0.4 * coarse
            dark = 0.09 * (1 + np.sin(along * threads + coarse) * np.sin(across * threads + coarse))
        case _:  # a horizon, or the edge of a table
            place = across - across.mean() + rng.uniform(-0.15, 0.15) + 0.01 * fine
            share, dark = 0.5 + 0.5 * np.tanh(place * rng.uniform(10, 75)) + 0.15 * coarse, 0.0
    detail = rng.uniform(0.05, 0.28) * fine - dark
    pixels = _blend(first, second, np.clip(share, 0, 1)) * (1 + detail)[..., None].astype(np.float32)
    soft = Image.fromarray((np.clip(pixels, 0, 1) * 255).astype(np.uint8))
    soft = soft.filter(ImageFilter.GaussianBlur(rng.uniform(0, 1)))
    return np.asarray(soft.resize(whole, Image.Resampling.BICUBIC), dtype=np.float32) / 255


def _photograph(pixels: Array, textures: Array, rng: np.random.Generator) -> Array:
    """What a camera makes of it: uneven light, vignetting, a colour cast, blur and sensor noise; uint8."""
    height, width = pixels.shape[:2]
    y, x = np.linspace(-1, 1, height, dtype=np.float32)[:, None], np.linspace(-1, 1, width, dtype=np.float32)[None]
    angle = rng.uniform(0, 2 * math.pi)
    slope = rng.uniform(0, 0.3)
    light = 1 + slope * (math.cos(angle) * x + math.sin(angle) * y) - rng.uniform(0, 0.2) * (x * x + y * y)
    light = light * (1 + rng.uniform(0, 0.2) * _crop(textures, (height, width), rng))
    cast = rng.uniform(0.88, 1.08, 3).astype(np.float32) * np.float32(rng.uniform(0.8, 1.15))
    pixels = pixels * (light[..., None] * cast)
    if rng.random() < 1 / 3:
        soft = Image.fromarray((np.clip(pixels, 0, 1) * 255).astype(np.uint8))
        pixels = np.asarray(soft.filter(ImageFilter.GaussianBlur(rng.uniform(0, BLUR))), dtype=np.float32) / 255
    noise = rng.standard_normal((height, width, 1), dtype=np.float32) * rng.uniform(0.003, SENSOR_NOISE)
    return (np.clip(pixels + noise, 0, 1) * 255 + 0.5).astype(np.uint8)
