"""One page that shows how good a detector is: numbers, curves, predictions beside the truth, and the pyramid at work.

The page is a single HTML file without scripts or anything from outside; the pictures lie beside it once more, as files.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64, UInt8
from PIL import Image
from torch import Tensor

from fpn.boxes import area, iou
from fpn.drawing import ALARM, Colour, annotate, colour_of, to_picture
from fpn.evaluation.charts import Chart, training_charts
from fpn.structures import Detections
from fpn.writing import replacing

LEVEL_COLOURS: dict[int, Colour] = {
    2: (255, 208, 0),
    3: (0, 200, 120),
    4: (40, 140, 255),
    5: (235, 60, 170),
    6: (255, 120, 40),
    7: (150, 100, 255),
}
LEVEL_PICTURES = 4
SIDES = (640, 960)  # pixels: the longer side of a picture in the report is brought into this range

TILES = (
    ("AP", "AP", "mean over overlaps of 50 to 95 %"),
    ("AP50", "AP50", "boxes that overlap by half or more"),
    ("AP75", "AP75", "boxes that overlap by three quarters"),
    ("AP_small", "AP small", "objects under 32 × 32 pixels"),
    ("AP_medium", "AP medium", "32 × 32 to 96 × 96 pixels"),
    ("AP_large", "AP large", "objects from 96 × 96 pixels"),
)


@dataclass(frozen=True)
class ReportSample:
    """One image for the gallery, with its N true boxes and what was detected in it; all in pixels of `image`."""

    image: UInt8[Tensor, "3 H W"]
    truth_boxes: Float[Tensor, "N 4"]
    truth_labels: Int64[Tensor, " N"]
    detections: Detections


@dataclass(frozen=True)
class _Judged:
    """A sample with its detections above the threshold, told right from wrong."""

    sample: ReportSample
    shown: Detections
    right: list[bool]  # each shown detection: does it find an object
    found: list[bool]  # each true box: was it found


def write_report(
    out: Path,
    *,
    title: str,
    metrics: Mapping[str, Any],
    per_class: Mapping[str, Mapping[str, Any]],
    history: Sequence[Mapping[str, Any]],
    samples: Sequence[ReportSample],
    facts: Mapping[str, str],
    notes: Sequence[str] = (),
    threshold: float = 0.5,
) -> Path:
    """Write `out/report.html` and its pictures in `out/pictures/`; returns the path of the page.

    `metrics` and `per_class` are the numbers of `fpn.evaluation.metrics.score`, `history` has one row an epoch (see
    `training_charts`), `facts` are told as they are, and `notes` stand under the numbers. The gallery shows the
    detections that score at least `threshold`; one is right if its IoU with a true box of its class, not yet taken,
    is 0.5 or more.
    """
    out = Path(out)
    (out / "pictures").mkdir(parents=True, exist_ok=True)
    judged = [_judge(sample, threshold) for sample in samples]
    charts = training_charts(history)
    for chart in charts:
        _write(out / "pictures" / f"{chart.name}.png", chart.png)
    classes = next((s.detections.classes for s in samples if s.detections.classes), tuple(per_class))

    sections = [
        _tiles(metrics, notes),
        _gallery(out, judged, threshold),
        _levels(out, judged),
        _curves(charts),
        _class_table(per_class, classes),
        _facts(facts),
    ]
    body = f"<header><h1>{escape(title)}</h1></header>\n<main>\n" + "\n".join(filter(None, sections)) + "\n</main>"
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f"<title>{escape(title)}</title><style>{_STYLE}</style>"
    page = f'<!doctype html>\n<html lang="en">\n<head>{head}</head>\n<body>\n{body}\n</body>\n</html>\n'
    _write(out / "report.html", page.encode())
    return out / "report.html"


def _judge(sample: ReportSample, threshold: float) -> _Judged:
    """Highest score first, each detection takes the true box of its class that it overlaps most, if by half or more."""
    shown = sample.detections.above(threshold).to("cpu")
    shares = iou(shown.boxes, sample.truth_boxes.to(shown.boxes))
    shares = torch.where(shown.labels[:, None] == sample.truth_labels[None], shares, 0.0)
    found, right = [False] * len(sample.truth_labels), [False] * len(shown)
    for i in torch.argsort(shown.scores, descending=True, stable=True).tolist():
        free = [(share, -j) for j, share in enumerate(shares[i].tolist()) if not found[j] and share >= 0.5]
        if free:
            found[-max(free)[1]] = right[i] = True
    return _Judged(sample, shown, right, found)


# The sections of the page, from top to bottom. Each gives HTML, or nothing where there is nothing to show.


def _tiles(metrics: Mapping[str, Any], notes: Sequence[str]) -> str:
    tiles = []
    for key, name, meaning in TILES:
        value = metrics.get(key)
        if value is None:
            continue
        meaning = meaning if value >= 0 else f"not measured: no {_kind(key)} in these images"
        tiles.append(
            f'<div class="tile"><dt>{name}</dt><dd>{_number(value)}</dd>{_bar(value)}<p>{escape(meaning)}</p></div>'
        )
    remarks = "".join(f"<li>{escape(note)}</li>" for note in notes)
    remarks = f'<ul class="notes">{remarks}</ul>' if notes else ""
    return f'<section aria-label="Results"><dl class="tiles">{"".join(tiles)}</dl>{remarks}</section>'


def _kind(key: str) -> str:
    _, _, size = key.partition("_")
    return f"{size} objects" if size else "objects"


def _number(value: Any, digits: int = 3) -> str:
    return "–" if value is None or value != value or value < 0 else f"{value:.{digits}f}"


def _gallery(out: Path, judged: Sequence[_Judged], threshold: float) -> str:
    if not judged:
        return ""
    figures = []
    for number, item in enumerate(judged, 1):
        missed, false = item.found.count(False), item.right.count(False)
        parts = [f"{len(item.found)} objects", f"{item.found.count(True)} found"]
        parts += [f"<b>{missed} missed</b>"] * bool(missed) + [f"<b>{false} false</b>"] * bool(false)
        truth = _picture(out, f"{number:02d}-truth.jpg", _truth_picture(item), f"image {number}, truth")
        found = _picture(out, f"{number:02d}-found.jpg", _found_picture(item), f"image {number}, detections")
        caption = " · ".join(parts)
        figures.append(f'<figure><div class="pair">{truth}{found}</div><figcaption>{caption}</figcaption></figure>')
    legend = (
        f"First the truth, then the detections scoring {threshold:g} or more. A broken red line marks what was missed, "
        "and detections that are false: where nothing is, twice, under a wrong name or with a poor box."
    )
    return f'<section><h2>Predictions</h2><p>{legend}</p><div class="gallery">{"".join(figures)}</div></section>'


def _truth_picture(item: _Judged) -> Image.Image:
    labels = item.sample.truth_labels.tolist()
    names = [_name(item.shown.classes, label) for label in labels]
    texts = [name if hit else f"missed: {name}" for name, hit in zip(names, item.found, strict=True)]
    colours = [colour_of(label) if hit else ALARM for label, hit in zip(labels, item.found, strict=True)]
    return _annotated(item.sample.image, item.sample.truth_boxes, texts, colours, [not hit for hit in item.found])


def _found_picture(item: _Judged) -> Image.Image:
    labels, scores = item.shown.labels.tolist(), item.shown.scores.tolist()
    texts = [f"{_name(item.shown.classes, n)} {score:.2f}" for n, score in zip(labels, scores, strict=True)]
    texts = [text if hit else f"false: {text}" for text, hit in zip(texts, item.right, strict=True)]
    colours = [colour_of(label) if hit else ALARM for label, hit in zip(labels, item.right, strict=True)]
    return _annotated(item.sample.image, item.shown.boxes, texts, colours, [not hit for hit in item.right])


def _name(classes: tuple[str, ...], label: int) -> str:
    return classes[label] if 0 <= label < len(classes) else str(label)


def _annotated(
    image: Tensor, boxes: Tensor, texts: list[str], colours: list[Colour], dashed: list[bool]
) -> Image.Image:
    """The image, brought to a size that shows small boxes and does not fill the page's memory, with its boxes."""
    picture = to_picture(image)
    longer = max(picture.size)
    scale = min(max(longer, SIDES[0]), SIDES[1]) / longer
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    picture = picture.resize(size, Image.Resampling.LANCZOS)
    factor = torch.tensor([size[0] / image.shape[2], size[1] / image.shape[1]] * 2)
    return annotate(picture, boxes.cpu() * factor, texts, colours, dashed)


def _levels(out: Path, judged: Sequence[_Judged]) -> str:
    """Which pyramid level found which object: counts over all samples, and the samples with the most levels."""
    judged = [item for item in judged if (item.shown.levels >= 2).any()]
    if not judged:
        return ""
    levels = torch.cat([item.shown.levels for item in judged])
    sides = torch.cat([area(item.shown.boxes) for item in judged]).sqrt()
    rows, most = [], max(int((levels == n).sum()) for n in levels.unique().tolist())
    for level in sorted(n for n in set(levels.tolist()) | {2, 3, 4, 5} if n >= 2):
        own = sides[levels == level]
        span = f"{own.quantile(0.05):.0f} to {own.quantile(0.95):.0f} px" if len(own) else "–"
        bar = _bar(len(own) / most, _level_colour(level))
        rows.append(
            f"<tr><th>{_swatch(_level_colour(level))}P{level}</th><td>{2**level} px</td>"
            f'<td>{len(own)}</td><td class="wide">{bar}</td><td>{span}</td></tr>'
        )
    head = '<tr><th>level</th><td>stride</td><td>found</td><td class="wide"></td><td>sizes, middle 90 %</td></tr>'
    order = sorted(range(len(judged)), key=lambda i: (-len(judged[i].shown.levels.unique()), -len(judged[i].shown), i))
    figures = []
    for number, i in enumerate(order[:LEVEL_PICTURES], 1):
        own = judged[i].shown.levels.tolist()
        texts, colours = [f"P{n}" for n in own], [_level_colour(n) for n in own]
        drawn = _annotated(judged[i].sample.image, judged[i].shown.boxes, texts, colours, [False] * len(own))
        counts = " ".join(
            f'<span class="key">{_swatch(_level_colour(n))}P{n} {own.count(n)}</span>' for n in sorted(set(own))
        )
        picture = _picture(out, f"{number:02d}-levels.jpg", drawn, f"detections of image {i + 1} by pyramid level")
        figures.append(f"<figure>{picture}<figcaption>{counts}</figcaption></figure>")
    text = (
        "Each box has the colour of the pyramid level whose features it was made from: fine levels, with a small "
        "stride, find the small objects, coarse ones the large."
    )
    table = f"<table><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table>"
    pictures = f'<div class="levels">{"".join(figures)}</div>'
    return f"<section><h2>Which level found what</h2><p>{text}</p>{table}{pictures}</section>"


def _level_colour(level: int) -> Colour:
    return LEVEL_COLOURS.get(level, (160, 160, 160))


def _curves(charts: Sequence[Chart]) -> str:
    figures = "".join(f"<figure><h3>{escape(c.title)}</h3>{c.svg}</figure>" for c in charts)
    return f'<section><h2>Training</h2><div class="charts">{figures}</div></section>' if charts else ""


def _class_table(per_class: Mapping[str, Mapping[str, Any]], classes: tuple[str, ...]) -> str:
    if not per_class:
        return ""
    columns = list(dict.fromkeys(key for row in per_class.values() for key in row if key != "objects"))
    counted = any("objects" in row for row in per_class.values())
    heads = ["objects"] * counted + columns
    rows = []
    for position, (name, row) in enumerate(per_class.items()):
        label = classes.index(name) if name in classes else position
        cells = [_number(row.get("objects"), 0)] * counted + [_number(row.get(key)) for key in columns]
        bar = _bar(row.get("AP", 0), colour_of(label))
        rows.append(
            f"<tr><th>{_swatch(colour_of(label))}{escape(name)}</th>"
            + "".join(f"<td>{cell}</td>" for cell in cells)
            + f'<td class="wide">{bar}</td></tr>'
        )
    head = "<tr><th>class</th>" + "".join(f"<td>{escape(h)}</td>" for h in heads) + '<td class="wide">AP</td></tr>'
    undefined = any(value == -1 for row in per_class.values() for value in row.values())
    note = "<p>–: the images hold no object of this class.</p>" if undefined else ""
    table = f'<div class="scroll"><table><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table></div>'
    return f"<section><h2>Classes</h2>{table}{note}</section>"


def _facts(facts: Mapping[str, str]) -> str:
    rows = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(str(text))}</dd></div>" for name, text in facts.items())
    return f'<section><h2>Details</h2><dl class="facts">{rows}</dl></section>' if facts else ""


def _css(colour: Colour) -> str:
    return "background:#{:02x}{:02x}{:02x}".format(*colour)


def _swatch(colour: Colour) -> str:
    return f'<i class="swatch" style="{_css(colour)}"></i>'


def _bar(share: Any, colour: Colour | None = None) -> str:
    width = 100 * min(1.0, share) if share is not None and share > 0 else 0.0
    return f'<div class="bar"><i style="width:{width:.1f}%;{_css(colour) if colour else ""}"></i></div>'


def _picture(out: Path, name: str, picture: Image.Image, words: str) -> str:
    """Save a picture beside the page, and give the tag that holds it inside the page."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=86)
    _write(out / "pictures" / name, buffer.getvalue())
    source = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<img src="{source}" width="{picture.width}" height="{picture.height}" loading="lazy" alt="{escape(words)}">'
    )


def _write(path: Path, content: bytes) -> None:
    with replacing(path) as unfinished:
        unfinished.write_bytes(content)


_STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --ink: #16181d; --soft: #5c6370; --line: #dfe2e8;
  --accent: #1e6fd9; --alarm: #d0142c; }
@media (prefers-color-scheme: dark) { :root { --page: #111317; --card: #1a1d23; --ink: #e8eaee; --soft: #9aa2b1;
  --line: #30353e; --accent: #5aa2ff; --alarm: #ff6b7d; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); line-height: 1.5; -webkit-text-size-adjust: 100%;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
header, main { max-width: 1120px; margin: 0 auto; padding: 0 clamp(16px, 4vw, 32px); }
header { padding-top: clamp(24px, 5vw, 56px); }
h1 { font-size: clamp(1.5rem, 4vw, 2.2rem); line-height: 1.15; letter-spacing: -0.02em; margin: 0 0 24px;
  text-wrap: balance; }
h2 { font-size: 1.25rem; letter-spacing: -0.01em; margin: 0 0 4px; }
h3 { font-size: 0.9rem; font-weight: 600; margin: 0 0 8px; }
section { margin: 0 0 clamp(36px, 6vw, 60px); }
section > p, .notes { color: var(--soft); max-width: 68ch; margin: 0 0 16px; font-size: 0.95rem; text-wrap: pretty; }
.notes { margin-top: 12px; padding-left: 1.1em; }
.tiles { display: grid; grid-template-columns: repeat(6, 1fr); gap: 12px; margin: 0; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 14px 16px; }
.tile dt { color: var(--soft); font-size: 0.85rem; font-weight: 600; }
.tile dd { margin: 0; font-size: 1.9rem; font-weight: 650; letter-spacing: -0.03em;
  font-variant-numeric: tabular-nums; }
.tile p { margin: 8px 0 0; color: var(--soft); font-size: 0.78rem; line-height: 1.35; }
.bar { height: 5px; border-radius: 3px; background: var(--line); overflow: hidden; }
.bar i { display: block; height: 100%; border-radius: 3px; background: var(--accent); }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 10px;
  min-width: 0; }
figcaption { color: var(--soft); font-size: 0.85rem; padding: 8px 4px 0; }
figcaption b { color: var(--alarm); font-weight: 600; }
img { display: block; width: 100%; height: auto; border-radius: 6px; background: var(--line); }
svg { display: block; width: 100%; height: auto; }
.gallery { display: grid; gap: 14px; }
.pair, .levels { display: grid; grid-template-columns: 1fr 1fr; gap: 10px; align-items: start; }
.levels { gap: 14px; margin-top: 16px; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 14px;
  margin-top: 12px; }
.charts figure { padding: 16px; }
.scroll { overflow-x: auto; margin-top: 12px; }
table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.92rem; }
th, td { text-align: right; padding: 8px 10px; border-bottom: 1px solid var(--line); white-space: nowrap;
  font-weight: 400; }
th { text-align: left; padding-left: 2px; }
thead { color: var(--soft); font-size: 0.82rem; }
td.wide { width: 34%; min-width: 90px; text-align: left; }
.swatch { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 8px; }
.key { white-space: nowrap; margin-right: 12px; }
.key .swatch { margin-right: 5px; }
.facts { margin: 12px 0 0; font-size: 0.92rem; }
.facts div { display: grid; grid-template-columns: minmax(110px, 220px) 1fr; gap: 16px; padding: 7px 2px;
  border-bottom: 1px solid var(--line); }
.facts dt { color: var(--soft); }
.facts dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 900px) { .tiles { grid-template-columns: repeat(3, 1fr); } }
@media (max-width: 560px) {
  .tiles { grid-template-columns: 1fr 1fr; }
  .tile dd { font-size: 1.6rem; }
  .pair, .levels, .facts div { grid-template-columns: 1fr; }
  .facts div { gap: 0; }
  th, td { padding: 7px 6px; }
  td.wide { min-width: 60px; width: 20%; }
  .charts figure { padding: 8px; }
}
@media print { body { background: #fff; } figure, .tile { break-inside: avoid; } }
"""
