"""What pages of results are made of: one HTML file without scripts or anything from outside, light or dark by itself.

The pictures lie beside the page once more, as files.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from fpn.drawing import Colour, annotate, to_picture
from fpn.writing import replacing

LEVEL_COLOURS: dict[int, Colour] = {
    2: (255, 208, 0),
    3: (0, 200, 120),
    4: (40, 140, 255),
    5: (235, 60, 170),
    6: (255, 120, 40),
    7: (150, 100, 255),
}
SIDES = (640, 960)  # pixels: the longer side of a picture in the report is brought into this range


def page(title: str, sections: Iterable[str]) -> str:
    """A whole page of a title and sections, each HTML, or nothing where there is nothing to show."""
    body = f"<header><h1>{escape(title)}</h1></header>\n<main>\n" + "\n".join(filter(None, sections)) + "\n</main>"
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f"<title>{escape(title)}</title><style>{STYLE}</style>"
    return f'<!doctype html>\n<html lang="en">\n<head>{head}</head>\n<body>\n{body}\n</body>\n</html>\n'


def decimal(value: Any, digits: int = 3) -> str:
    """A number from 0 up; a dash where there is none (None, NaN, or -1 as the metrics have it)."""
    return "–" if value is None or value != value or value < 0 else f"{value:.{digits}f}"


def annotated(image: Tensor, boxes: Tensor, texts: list[str], colours: list[Colour], dashed: list[bool]) -> Image.Image:
    """The image, brought to a size that shows small boxes and does not fill the page's memory, with its boxes."""
    picture = to_picture(image)
    longer = max(picture.size)
    scale = min(max(longer, SIDES[0]), SIDES[1]) / longer
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    picture = picture.resize(size, Image.Resampling.LANCZOS)
    factor = torch.tensor([size[0] / image.shape[2], size[1] / image.shape[1]] * 2)
    return annotate(picture, boxes.cpu() * factor, texts, colours, dashed)


def level_colour(level: int) -> Colour:
    """The colour of a pyramid level in every picture."""
    return LEVEL_COLOURS.get(level, (160, 160, 160))


def css(colour: Colour) -> str:
    return "background:#{:02x}{:02x}{:02x}".format(*colour)


def swatch(colour: Colour) -> str:
    """A small square of a colour, before the words that it stands for."""
    return f'<i class="swatch" style="{css(colour)}"></i>'


def bar(share: Any, colour: Colour | None = None) -> str:
    """A bar as long as a share from 0 to 1; empty where there is none."""
    width = 100 * min(1.0, share) if share is not None and share > 0 else 0.0
    return f'<div class="bar"><i style="width:{width:.1f}%;{css(colour) if colour else ""}"></i></div>'


def embedded(out: Path, name: str, image: Image.Image, words: str) -> str:
    """Save a picture as `out/pictures/name`, and give the tag that holds it inside the page. `words` say what it shows.

    The name's ending says how: .jpg for photographs, .png for drawings and maps.
    """
    buffer, kind = io.BytesIO(), "PNG" if name.endswith(".png") else "JPEG"
    image.save(buffer, kind, **({"optimize": True} if kind == "PNG" else {"quality": 86}))
    write(out / "pictures" / name, buffer.getvalue())
    source = f"data:image/{kind.lower()};base64," + base64.b64encode(buffer.getvalue()).decode()
    return f'<img src="{source}" width="{image.width}" height="{image.height}" loading="lazy" alt="{escape(words)}">'


def write(path: Path, content: bytes) -> None:
    with replacing(path) as unfinished:
        unfinished.write_bytes(content)


STYLE = """
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
.stack { display: flex; height: 8px; }
.stack i { border-radius: 0; }
.advice { margin: 0; padding: 14px 16px 14px 34px; background: var(--card); border: 1px solid var(--line);
  border-radius: 12px; }
.advice li { margin: 4px 0; max-width: 84ch; }
.maps { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr)); gap: 12px;
  margin: 0 0 22px; align-items: start; }
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
