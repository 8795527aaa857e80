"""Training curves: what the training wrote down for each epoch -> charts for a page (SVG) and for a folder (PNG)."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SERIES = ("#1e88e5", "#e8590c", "#2b9348", "#9c36b5", "#b08900", "#0c8599", "#c92a2a", "#5f3dc4")
# In the SVG these stand for colours that the page chooses, by light or dark.
_INK, _LINES = "#101112", "#d0d1d2"
_NOT_A_LOSS = re.compile(r"(epoch|step|lr|seconds|time|images).*|A[PR]\d*(_\w+)?$")


@dataclass(frozen=True)
class Chart:
    """One chart: its heading, and the drawing as inline SVG and as a PNG file."""

    name: str
    title: str
    svg: str
    png: bytes


def training_charts(history: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """Charts of the losses and of AP over the epochs; none where there is nothing to show.

    A row is one epoch: "epoch" (else its position, from 1), "AP", "AP50", ... and the losses under any other name.
    Values that are missing, not finite or, for AP, -1 are left out.
    """
    names = list(dict.fromkeys(name for row in history for name in row))
    losses = [name for name in names if not _NOT_A_LOSS.match(name)]
    precisions = [name for name in names if re.fullmatch(r"AP\d*(_\w+)?", name)]
    charts = []
    for name, title, series, top in (("losses", "Losses", losses, None), ("ap", "Average precision", precisions, 1.0)):
        lines = {key: points for key in series[: len(SERIES)] if (points := _points(history, key, top is not None))}
        if lines:
            charts.append(_chart(name, title, lines, top))
    return charts


def _points(history: Sequence[Mapping[str, Any]], key: str, not_negative: bool) -> list[tuple[float, float]]:
    points = []
    for position, row in enumerate(history, 1):
        value, epoch = row.get(key), row.get("epoch", position)
        if not isinstance(value, int | float) or not isinstance(epoch, int | float):
            continue
        if math.isfinite(value) and (value >= 0 or not not_negative):
            points.append((float(epoch), float(value)))
    return points


def _chart(name: str, title: str, lines: dict[str, list[tuple[float, float]]], top: float | None) -> Chart:
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    look: dict[Any, Any] = {"font.size": 10, "svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif"}
    with matplotlib.rc_context(look):
        figure = Figure(figsize=(5.6, 3.4), layout="constrained")
        axes = figure.subplots()
        for (label, points), colour in zip(lines.items(), SERIES, strict=False):
            few = "o" if len(points) < 20 else ""
            axes.plot(*zip(*points, strict=True), color=colour, label=_words(label), lw=1.8, marker=few, ms=3.2)
        axes.set_xlabel("epoch", color=_INK)
        axes.set_ylim(0, top)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))
        dress(axes, _INK, _LINES)
        axes.legend(frameon=False, labelcolor=_INK, fontsize=9)
        svg, png = io.StringIO(), io.BytesIO()
        figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
        figure.savefig(png, format="png", dpi=160, facecolor="white")
    return Chart(name, title, _inline(svg.getvalue(), title), png.getvalue())


def dress(axes: Any, ink: str, lines: str) -> None:
    """Axes of a page: horizontal lines behind what is drawn, and no frame but the one below."""
    axes.tick_params(colors=ink, length=0)
    axes.grid(axis="y", color=lines, lw=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(lines)


def _words(key: str) -> str:
    return key if key.startswith("AP") and "_" not in key else key.replace("_", " ")


def _inline(svg: str, title: str) -> str:
    """The SVG as a part of an HTML page: no header, no metadata, no outside names, and colours that follow the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(
        r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1), count=1
    )
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)
    svg = svg.replace(_INK, "currentColor").replace(_LINES, "var(--line)")
    return re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", svg)
