"""The pyramid report as a page: the numbers of each level, advice, and its feature maps with what it found."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor

from fpn.data import Split, collate, resize_transform
from fpn.data.batching import DetectionDataset
from fpn.drawing import annotate, to_picture
from fpn.evaluation.metrics import Results
from fpn.evaluation.page import css, embedded, level_colour, page, swatch, write
from fpn.evaluation.pyramid import ALL, GIVEN, MADE, THRESHOLD, PyramidReport, Watch, columns, report_of
from fpn.evaluation.pyramid_advice import advise
from fpn.model.detector import Detector
from fpn.words import counted
from fpn.writing import write_json

PICTURES = 4  # images whose feature maps are shown
SIDE = 480  # pixels: the longer side of each picture

ALARMED, OTHERWISE = "background:var(--alarm)", "background:var(--soft)"

EXPLAINED = {
    "by_region": "objects whose region would be pooled from the level: k = floor(4 + log2(side / canonical)), Eq. 1 of "
    "the FPN paper",
    "by_anchor": "objects by the level with most of the anchors (or places, where the model has no anchors) that learn "
    "them in training; none: those that all are taken from by others",
    "anchors": "anchors or places there are",
    "matched": "those of them that learn an object in training, in all images",
    "proposals": "of the region proposal network, by the level of their anchors",
    "regions": "proposals by the level that their features are pooled from",
    "objects": "objects that a detection of the level found, however low its score, and those assigned to the level "
    "that no detection found; every object is handled by one level, so that the levels add up to all",
    "side": "the median side of those objects (root of the area) in pixels of the resized image",
    "found": "of them, those whose detection scores the threshold or more; it overlaps them by half or more (IoU) and "
    "has the right class",
    "missed": "the others",
    "false": "detections from the threshold up that find nothing: a second one of the same object, one of the wrong "
    "class, with a poor box, or where nothing is",
    "AP": "COCO's AP of the handled objects and the level's own detections; of all levels together that of the split",
    "AR": "COCO's AR of the same",
}


def pyramid_report(
    detector: Detector,
    split: Split,
    results: Results,
    watch: Watch,
    out: Path | None = None,
    *,
    title: str = "The pyramid at work",
    threshold: float = THRESHOLD,
    pictures: int = PICTURES,
) -> PyramidReport:
    """The numbers of every level with advice; where `out` is given, as pyramid.json, pyramid.html and pictures there.

    results, watch: of one pass, `detect_split(detector, split, detect=watch.detect)`. threshold: the lowest score of a
    detection that counts as found or false, and is drawn. pictures: how many images are shown with their feature
    maps; those that most levels found something in.
    """
    report = report_of(detector, split, results, watch, threshold)
    report = replace(report, advice=advise(report, watch))
    if out is not None:
        write_json(out / "pyramid.json", report.as_dict(), indent=2)
        figures = [
            _figure(out, shown, number)
            for number, index in enumerate(chosen(results, threshold, pictures), 1)
            if (shown := look(detector, split, results, index, threshold)) is not None
        ]
        sections = [_advice(report), _given(report), _made(report), _maps(figures, threshold)]
        write(out / "pyramid.html", page(title, sections).encode())
    return report


@dataclass(frozen=True)
class Shown:
    """One image as the detector saw it, the contrast of its feature maps by level, and D detections in its pixels."""

    image: UInt8[Tensor, "3 H W"]
    maps: dict[int, Float[np.ndarray, "_h _w"]]
    boxes: Float[np.ndarray, "D 4"]
    levels: Int[np.ndarray, " D"]


def chosen(results: Results, threshold: float, count: int) -> list[int]:
    """The images that most levels found something in, then those with most detections."""
    assert results.levels is not None
    shown = results.scores >= threshold
    pairs = np.unique(np.stack([results.indices, results.levels])[:, shown], axis=1)[0]
    size = int(results.images.max(initial=-1)) + 1
    levels, found = np.bincount(pairs, minlength=size), np.bincount(results.indices[shown], minlength=size)
    return sorted(results.images.tolist(), key=lambda i: (-levels[i], -found[i], i))[:count]


@torch.inference_mode()
def look(detector: Detector, split: Split, results: Results, index: int, threshold: float) -> Shown | None:
    """One image of the split with its feature maps and what was found in it; None where it cannot be read."""
    assert results.levels is not None
    dataset = DetectionDataset(replace(split, outlines=None), resize_transform(*detector.spec.sides))
    batch = collate([dataset[index]], square=detector.spec.square_side)
    if batch is None:
        return None
    batch = batch.to(detector.mean.device)
    height, width = batch.sizes[0].tolist()
    own = (results.indices == index) & (results.scores >= threshold)
    scale = (batch.sizes / batch.original_sizes).flip(1).repeat(1, 2).cpu().numpy()
    maps = {
        level: contrast(p[0, :, : math.ceil(height / 2**level), : math.ceil(width / 2**level)].float()).cpu().numpy()
        for level, p in detector.eval().features(batch).items()
    }
    image = batch.images[0, :, :height, :width].cpu()
    return Shown(image, maps, results.boxes[own] * scale, results.levels[own])


def contrast(p: Float[Tensor, "d h w"]) -> Float[Tensor, "h w"]:
    """How far each place of a map differs from the mean of the map, from 0 to 1 for all but 1 % at either end."""
    away = (p - p.mean((1, 2), keepdim=True)).norm(dim=0)
    low, high = away.quantile(0.01), away.quantile(0.99)
    return ((away - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)


# The sections of the page, from top to bottom.


def _advice(report: PyramidReport) -> str:
    objects, images = counted(report.all.objects, "object"), counted(report.images, "image")
    says = report.advice or ["no level is idle, and none has nearly everything"]
    items = "".join(f"<li>{escape(text[0].upper() + text[1:])}.</li>" for text in says)
    return f'<section><h2>Advice</h2><p>{objects} in {images}.</p><ul class="advice">{items}</ul></section>'


def _given(report: PyramidReport) -> str:
    text = "What the data and the model's rules bring to each level, before anything is learnt or detected."
    return _section("What each level is given", text, GIVEN, *_table(report, GIVEN, []))


def _made(report: PyramidReport) -> str:
    most = max([1, *(row.objects + row.false for row in report.levels.values())])
    bars = [
        _stack([(row.found, css(level_colour(level))), (row.missed, ALARMED), (row.false, OTHERWISE)], most)
        for level, row in report.levels.items()
    ]
    text = (
        f"What the detections scoring {report.threshold:g} or more find. Bars: found in the level's colour, then "
        "missed in red, then false in grey."
    )
    return _section("What each level makes of it", text, MADE, *_table(report, MADE, bars))


def _section(heading: str, text: str, kinds: dict[str, str], head: str, rows: str) -> str:
    terms = "".join(
        f"<div><dt>{escape(kinds[name])}</dt><dd>{escape(EXPLAINED[name])}</dd></div>"
        for name in kinds
        if name in EXPLAINED and escape(kinds[name]) in head
    )
    table = f'<div class="scroll"><table><thead>{head}</thead><tbody>{rows}</tbody></table></div>'
    return f'<section><h2>{heading}</h2><p>{escape(text)}</p>{table}<dl class="facts">{terms}</dl></section>'


def _table(report: PyramidReport, kinds: dict[str, str], bars: list[str]) -> tuple[str, str]:
    """The heading and the rows of a table, each row with its bar."""
    heads, rows = columns(report, kinds)
    levels = [*report.levels, ALL]
    cells = [[f"<td>{escape(cell.replace('-', '–'))}</td>" for cell in row[1:]] for row in rows]
    wide = [f'<td class="wide">{bar}</td>' for bar in [*bars, ""]] if bars else [""] * len(rows)
    lines = [
        f"<tr><th>{'' if level == ALL else swatch(level_colour(level))}{row[0]}</th>{''.join(own)}{bar}</tr>"
        for level, row, own, bar in zip(levels, rows, cells, wide, strict=True)
    ]
    head = f"<th>{heads[0]}</th>" + "".join(f"<td>{escape(text)}</td>" for text in heads[1:])
    return f"<tr>{head}{'<td></td>' if bars else ''}</tr>", "".join(lines)


def _stack(parts: Sequence[tuple[int, str]], most: int) -> str:
    """One bar of several numbers, each with its style."""
    pieces = "".join(f'<i style="width:{100 * value / most:.1f}%;{style}"></i>' for value, style in parts if value)
    return f'<div class="bar stack">{pieces}</div>'


def _maps(figures: Sequence[str], threshold: float) -> str:
    if not figures:
        return ""
    text = (
        "Each map shows how far its places differ from the map's mean, one pixel a place, brighter for more; on it "
        f"the level's detections scoring {threshold:g} or more, in the level's colour."
    )
    return f"<section><h2>Feature maps</h2><p>{text}</p>{''.join(figures)}</section>"


def _figure(out: Path, shown: Shown, number: int) -> str:
    """An image and its maps side by side, with the boxes."""
    height, width = shown.image.shape[1:]
    factor = SIDE / max(height, width)
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    boxes, colours = shown.boxes * factor, [level_colour(level) for level in shown.levels.tolist()]
    picture = to_picture(shown.image).resize(size, Image.Resampling.LANCZOS)
    drawn = annotate(picture, boxes, [f"P{level}" for level in shown.levels], colours)
    name = f"pyramid-{number:02d}"
    tag = embedded(out, f"{name}.jpg", drawn, f"image {number} with what each level found")
    parts = [_captioned(tag, f"image {number}: {counted(len(boxes), 'detection')}")]
    for level, values in shown.maps.items():
        own, colour = shown.levels == level, level_colour(level)
        count, places = int(own.sum()), " × ".join(map(str, values.shape))
        drawn = annotate(painted(values, level, factor, size), boxes[own], [""] * count, [colour] * count)
        tag = embedded(out, f"{name}-P{level}.png", drawn, f"feature map P{level} of image {number}")
        parts.append(_captioned(tag, f"{swatch(colour)}P{level}: {places} places, {counted(count, 'detection')}"))
    return f'<div class="maps">{"".join(parts)}</div>'


def _captioned(tag: str, words: str) -> str:
    return f"<figure>{tag}<figcaption>{words}</figcaption></figure>"


def painted(values: Float[np.ndarray, "h w"], level: int, factor: float, size: tuple[int, int]) -> Image.Image:
    """A map in false colours on a picture of this (width, height), `factor` of its pixels for one of the image's."""
    import matplotlib

    colours = (matplotlib.colormaps["magma"](values)[..., :3] * 255).round().astype(np.uint8)
    cell = 2**level * factor
    row = np.minimum((np.arange(size[1]) / cell).astype(int), values.shape[0] - 1)
    column = np.minimum((np.arange(size[0]) / cell).astype(int), values.shape[1] - 1)
    return Image.fromarray(colours[row[:, None], column])
