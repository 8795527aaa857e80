"""What `fpn bench` leaves in a folder: the numbers, the table and a picture of them."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import torchvision

from fpn import __version__
from fpn.benching.measure import Row, Task
from fpn.benching.run import advice, base_of, precision_of, table
from fpn.data import Split
from fpn.hardware import processor_name
from fpn.words import counted
from fpn.writing import replacing, write_json


def about_machine(task: Task, split: Split | None) -> str:
    """What the numbers hold for."""
    on = f"{counted(len(split), 'image')} of {split.name}" if split is not None else "{} x {}".format(*task.size)
    processor = torch.cuda.get_device_name(task.device) if task.device.startswith("cuda") else processor_name()
    threads = f"{counted(torch.get_num_threads(), 'thread')}"
    versions = f"fpn {__version__}, torch {torch.__version__}, torchvision {torchvision.__version__}"
    return f"{on}, batch {task.batch}; {processor}, {threads}; {versions}; {datetime.date.today()}"


def write(out: Path, title: str, where: str, rows: Sequence[Row]) -> None:
    """bench.json, bench.md and bench.png."""
    write_json(out / "bench.json", {"detector": title, "machine": where, "rows": [asdict(row) for row in rows]})
    lines = [f"# {title}", where, table(rows), *(f"- {words}" for words in advice(rows))]
    with replacing(out / "bench.md") as unfinished:
        unfinished.write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    good = [row for row in rows if not row.error]
    if good:
        with replacing(out / "bench.png") as unfinished:
            draw(unfinished, title, good)


def draw(file: Path, title: str, rows: Sequence[Row]) -> None:
    """A bar for the time of each backend, with its AP and its memory beside it."""
    from matplotlib.figure import Figure

    base, colours = base_of(rows), {"fp32": "#1e88e5", "bf16": "#e8590c", "int8": "#2b9348"}
    figure = Figure(figsize=(9, 1.2 + 0.45 * len(rows)), layout="constrained")
    axes = figure.subplots()
    times = [1000 * row.median for row in rows]
    axes.barh([row.name for row in rows], times, color=[colours[row.precision] for row in rows])
    for place, (row, milliseconds) in enumerate(zip(rows, times, strict=True)):
        number = precision_of(row, base)
        known = [f"{milliseconds:.0f} ms"]
        known += [] if row.memory is None else [f"{row.memory:.0f} MiB"]
        known += [] if number == "-" else [f"{row.measure} {number}"]
        axes.text(milliseconds, place, f" {', '.join(known)}", va="center", fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.6 * max(times))
    axes.set_xlabel("milliseconds an image (median)")
    axes.set_title(title, loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, format="png", dpi=120)
