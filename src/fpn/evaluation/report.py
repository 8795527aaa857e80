"""One page that shows how good a detector is: numbers, curves, predictions beside the truth, and the pyramid at work.

The page is a single HTML file without scripts or anything from outside; the pictures lie beside it once more, as files.
"""

from __future__ import annotations

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
from fpn.drawing import ALARM, colour_of
from fpn.evaluation.charts import Chart, training_charts
from fpn.evaluation.page import annotated, bar, decimal, embedded, level_colour, page, swatch, write
from fpn.structures import Detections

LEVEL_PICTURES = 4

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
        write(out / "pictures" / f"{chart.name}.png", chart.png)
    classes = next((s.detections.classes for s in samples if s.detections.classes), tuple(per_class))

    sections = [
        _tiles(metrics, notes),
        _gallery(out, judged, threshold),
        _levels(out, judged),
        _curves(charts),
        _class_table(per_class, classes),
        _facts(facts),
    ]
    write(out / "report.html", page(title, sections).encode())
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
            f'<div class="tile"><dt>{name}</dt><dd>{decimal(value)}</dd>{bar(value)}<p>{escape(meaning)}</p></div>'
        )
    remarks = "".join(f"<li>{escape(note)}</li>" for note in notes)
    remarks = f'<ul class="notes">{remarks}</ul>' if notes else ""
    return f'<section aria-label="Results"><dl class="tiles">{"".join(tiles)}</dl>{remarks}</section>'


def _kind(key: str) -> str:
    _, _, size = key.partition("_")
    return f"{size} objects" if size else "objects"


def _gallery(out: Path, judged: Sequence[_Judged], threshold: float) -> str:
    if not judged:
        return ""
    figures = []
    for number, item in enumerate(judged, 1):
        missed, false = item.found.count(False), item.right.count(False)
        parts = [f"{len(item.found)} objects", f"{item.found.count(True)} found"]
        parts += [f"<b>{missed} missed</b>"] * bool(missed) + [f"<b>{false} false</b>"] * bool(false)
        truth = embedded(out, f"{number:02d}-truth.jpg", _truth_picture(item), f"image {number}, truth")
        found = embedded(out, f"{number:02d}-found.jpg", _found_picture(item), f"image {number}, detections")
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
    return annotated(item.sample.image, item.sample.truth_boxes, texts, colours, [not hit for hit in item.found])


def _found_picture(item: _Judged) -> Image.Image:
    labels, scores = item.shown.labels.tolist(), item.shown.scores.tolist()
    texts = [f"{_name(item.shown.classes, n)} {score:.2f}" for n, score in zip(labels, scores, strict=True)]
    texts = [text if hit else f"false: {text}" for text, hit in zip(texts, item.right, strict=True)]
    colours = [colour_of(label) if hit else ALARM for label, hit in zip(labels, item.right, strict=True)]
    return annotated(item.sample.image, item.shown.boxes, texts, colours, [not hit for hit in item.right])


def _name(classes: tuple[str, ...], label: int) -> str:
    return classes[label] if 0 <= label < len(classes) else str(label)


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
        width = bar(len(own) / most, level_colour(level))
        rows.append(
            f"<tr><th>{swatch(level_colour(level))}P{level}</th><td>{2**level} px</td>"
            f'<td>{len(own)}</td><td class="wide">{width}</td><td>{span}</td></tr>'
        )
    head = '<tr><th>level</th><td>stride</td><td>found</td><td class="wide"></td><td>sizes, middle 90 %</td></tr>'
    order = sorted(range(len(judged)), key=lambda i: (-len(judged[i].shown.levels.unique()), -len(judged[i].shown), i))
    figures = []
    for number, i in enumerate(order[:LEVEL_PICTURES], 1):
        own = judged[i].shown.levels.tolist()
        texts, colours = [f"P{n}" for n in own], [level_colour(n) for n in own]
        drawn = annotated(judged[i].sample.image, judged[i].shown.boxes, texts, colours, [False] * len(own))
        counts = " ".join(
            f'<span class="key">{swatch(level_colour(n))}P{n} {own.count(n)}</span>' for n in sorted(set(own))
        )
        picture = embedded(out, f"{number:02d}-levels.jpg", drawn, f"detections of image {i + 1} by pyramid level")
        figures.append(f"<figure>{picture}<figcaption>{counts}</figcaption></figure>")
    text = (
        "Each box has the colour of the pyramid level whose features it was made from: fine levels, with a small "
        "stride, find the small objects, coarse ones the large."
    )
    table = f"<table><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table>"
    pictures = f'<div class="levels">{"".join(figures)}</div>'
    return f"<section><h2>Which level found what</h2><p>{text}</p>{table}{pictures}</section>"


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
        cells = [decimal(row.get("objects"), 0)] * counted + [decimal(row.get(key)) for key in columns]
        width = bar(row.get("AP", 0), colour_of(label))
        rows.append(
            f"<tr><th>{swatch(colour_of(label))}{escape(name)}</th>"
            + "".join(f"<td>{cell}</td>" for cell in cells)
            + f'<td class="wide">{width}</td></tr>'
        )
    head = "<tr><th>class</th>" + "".join(f"<td>{escape(h)}</td>" for h in heads) + '<td class="wide">AP</td></tr>'
    undefined = any(value == -1 for row in per_class.values() for value in row.values())
    note = "<p>–: the images hold no object of this class.</p>" if undefined else ""
    table = f'<div class="scroll"><table><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table></div>'
    return f"<section><h2>Classes</h2>{table}{note}</section>"


def _facts(facts: Mapping[str, str]) -> str:
    rows = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(str(text))}</dd></div>" for name, text in facts.items())
    return f'<section><h2>Details</h2><dl class="facts">{rows}</dl></section>' if facts else ""
