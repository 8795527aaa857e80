"""A plot of a table: each row's numbers by size of object, ours with their spread beside the paper's."""

from __future__ import annotations

import io
from typing import Any

from fpn.evaluation.charts import SERIES, dress
from fpn.paper.claims import Numbers, over_seeds
from fpn.paper.published import PUBLISHED
from fpn.paper.tables import Table

INK = {"light": ("#16181d", "#dfe2e8", "#ffffff"), "dark": ("#e8eaee", "#30353e", "#1a1d23")}  # text, lines, ground
APART = 0.09  # how far the marks of two rows stand apart, in sizes of object


def plot(table: Table, numbers: Numbers, theme: str = "light") -> bytes | None:
    """A PNG; None where there is nothing to draw. Error bars are standard deviations over the seeds."""
    import matplotlib
    from matplotlib.figure import Figure

    groups = table.by_size or {heading: key for key, heading in table.metrics.items()}
    here = {row: points for row in table.rows if (points := spread(numbers, row, list(groups.values())))}
    if not any(value is not None for points in here.values() for value in points):
        return None
    published = {row: [(value[key], None) for key in groups.values()] for row, value in PUBLISHED[table.number].items()}
    ink, lines, ground = INK[theme]
    with matplotlib.rc_context({"font.size": 10, "font.family": "sans-serif", "text.color": ink}):
        figure = Figure(figsize=(9.6, 4.0), layout="constrained", facecolor=ground)
        for axes, title, values in zip(
            figure.subplots(1, 2), ("Here", "In the paper (COCO)"), (here, published), strict=True
        ):
            draw(axes, values, list(table.rows), table.compared)
            axes.set_title(title, loc="left", fontsize=10.5, fontweight="bold")
            axes.set_xticks(range(len(groups)), list(groups))
            axes.set_facecolor(ground)
            axes.set_ylim(bottom=0)
            axes.margins(x=0.15)
            dress(axes, ink, lines)
        figure.axes[0].set_ylabel(f"{heading(table)}, %", color=ink)
        handles, labels = figure.axes[1].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right center", frameon=False, labelcolor=ink)
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=160)
    return png.getvalue()


def heading(table: Table) -> str:
    """What the sizes are sizes of: AR1k or AP."""
    first = next(iter(table.by_size.values()), "AP")
    return table.metrics.get(first.rpartition("_")[0], "AP")


def spread(numbers: Numbers, row: str, metrics: list[str]) -> list[tuple[float, float | None] | None]:
    """Mean and standard deviation of a row's metrics in percent; None where one is not defined, [] without cells."""
    cells = numbers.get(row, {})
    points: list[tuple[float, float | None] | None] = []
    for metric in metrics if cells else ():
        found = over_seeds(numbers, row, metric)
        points.append(found and (found.mean, found.spread))
    return points


def draw(axes: Any, values: dict[str, Any], rows: list[str], compared: str) -> None:
    """A line of marks for each row; that which the others are compared with is the thick one."""
    for position, row in enumerate(rows):
        points = [(x, *point) for x, point in enumerate(values.get(row, [])) if point is not None]
        if not points:
            continue
        shift = APART * (position - (len(rows) - 1) / 2)
        bars = [error or 0.0 for _, _, error in points]
        main = row == compared
        axes.errorbar(
            [x + shift for x, _, _ in points],
            [mean for _, mean, _ in points],
            yerr=bars if any(bars) else None,
            color=SERIES[position % len(SERIES)],
            label=row,
            marker="o",
            ms=6 if main else 4.5,
            lw=2.4 if main else 1.0,
            elinewidth=1.6,
            capsize=3,
            zorder=3 if main else 2,
        )
