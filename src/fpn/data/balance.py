"""How evenly a data set is divided: images, boxes and each class's share by split, for people to look at."""

from __future__ import annotations

import numpy as np
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fpn.data.dataset import Data

SHOWN = 20  # classes in the table


def print_balance(data: Data) -> None:
    """Prints a table with the part of all images, boxes and boxes of each class that each split holds.

    Of more than 20 classes, those whose parts are farthest from the images' are shown.
    """
    counts = np.array([np.bincount(split.labels, minlength=len(data.classes)) for split in data.values()])
    images = np.array([len(split) for split in data.values()])
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for name in data:
        table.add_column(name, justify="right")
    table.add_row("[bold]images[/]", *_cells(images))
    table.add_row("[bold]boxes[/]", *_cells(counts.sum(axis=1)), end_section=True)
    off = np.abs(counts / np.maximum(counts.sum(axis=0), 1) - (images / images.sum())[:, None]).max(axis=0)
    shown = np.sort(np.argsort(-off, kind="stable")[:SHOWN])
    for label in shown.tolist():
        table.add_row(escape(data.classes[label]), *_cells(counts[:, label]))
    console = Console(highlight=False)
    console.print(table)
    if len(shown) < len(data.classes):
        rest = len(data.classes) - len(shown)
        console.print(f"[dim]and {rest} more classes, which are nearer to the images' shares[/]\n")


def _cells(counts: np.ndarray) -> list[str]:
    total = counts.sum()
    return [f"{number:,}  {100 * number / total:5.1f} %" if total else f"{number:,}        -" for number in counts]
