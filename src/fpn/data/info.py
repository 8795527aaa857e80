"""What is in a data set: numbers first (`describe`), then a screen to read (`print_info`)."""

from __future__ import annotations

from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fpn.data.dataset import Data, Split
from fpn.data.fit import DETECTIONS, PROPOSALS, Fit, advise, caps, most_boxes
from fpn.words import counted

SMALL, LARGE = 32**2, 96**2  # square pixels, COCO's borders between small, medium and large
PERCENTILES = (5, 25, 50, 75, 95)
SHOWN = 20  # problems and classes on the screen; `describe` has them all


def describe(data: Data, fit: Fit | None = None) -> dict[str, Any]:
    """The facts about a data set as plain numbers and strings, ready for JSON.

    Boxes that are ignored (crowds, difficult objects) count only under "ignored". With a `fit` (see
    `fpn.data.fit.measure`), also how well the detector's input size and anchors suit the boxes ("fit"), and what would
    suit them better ("advice").
    """
    splits = data.splits
    learnt = [split.boxes[~split.ignore] for split in splits.values()]
    boxes = np.concatenate(learnt)
    sides = np.sqrt((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]))
    areas = np.concatenate([split.areas[~split.ignore] for split in splits.values()])
    counts = {
        name: np.bincount(split.labels[~split.ignore], minlength=len(data.classes)) for name, split in splits.items()
    }
    return {
        "path": str(data.path),
        "format": data.format,
        "splits": {name: _describe_split(split) for name, split in splits.items()},
        "classes": [
            {"name": name, "boxes": {split: int(counts[split][label]) for split in splits}}
            for label, name in enumerate(data.classes)
        ],
        "box_sizes": {
            "unit": "pixels, square root of width x height",
            **_range(sides),
            "percentiles": {str(p): _round(np.percentile(sides, p)) for p in PERCENTILES} if len(sides) else {},
            "small": int((areas < SMALL).sum()),
            "medium": int(((areas >= SMALL) & (areas <= LARGE)).sum()),
            "large": int((areas > LARGE).sum()),
        },
        "caps": _describe_caps(data),
        **({} if fit is None else {"fit": fit.as_dict(), "advice": [vars(advice) for advice in advise(fit)]}),
        "problem_count": len(data.problems),
        "problems": [{"kind": p.kind, "file": p.file, "item": p.item, "text": p.text} for p in data.problems],
        "notes": list(data.notes),
    }


def _describe_split(split: Split) -> dict[str, Any]:
    per_image = np.diff(split.offsets)
    return {
        "images": len(split),
        "boxes": int((~split.ignore).sum()),
        "ignored": int(split.ignore.sum()),
        "images_without_objects": int((per_image == 0).sum()),
        "most_boxes_in_an_image": int(per_image.max(initial=0)),
        "height": _range(split.sizes[:, 0]),
        "width": _range(split.sizes[:, 1]),
    }


def _describe_caps(data: Data) -> dict[str, Any]:
    """The limits that the densest image needs, the detector's own where they suffice."""
    most, file = most_boxes(data.values())
    needed = {"max_detections": DETECTIONS, "proposals": PROPOSALS, **caps(data)}
    return {
        "densest_image": file,
        "objects": most,
        "max_detections": needed["max_detections"],
        "proposals": list(needed["proposals"]),
    }


def _range(values: np.ndarray) -> dict[str, float]:
    if not len(values):
        return {}
    return {"min": _round(values.min()), "median": _round(np.median(values)), "max": _round(values.max())}


def _round(value: Any) -> float:
    return round(float(value), 1)


def print_info(description: dict[str, Any]) -> None:
    """Prints what `describe` found, to be read by people."""
    console = Console(highlight=False)
    classes = description["classes"]
    console.print(
        f"\n[bold]{escape(description['path'])}[/]  {description['format'].upper()} format, "
        f"{counted(len(classes), 'class', 'classes')}\n"
    )
    console.print(_split_table(description["splits"]))
    console.print(_class_table(classes, list(description["splits"])))
    if len(classes) > SHOWN:
        console.print(f"[dim]... and {len(classes) - SHOWN} more classes; --json lists all[/]")
    _print_sizes(console, description)
    if "fit" in description:
        _print_fit(console, description["fit"], description["advice"])
    _print_caps(console, description["caps"])
    for note in description["notes"]:
        console.print(f"[cyan]Note[/] {escape(note)}")
    problems = description["problems"]
    further = f"fpn data check {escape(description['path'])} also decodes the images"
    if not problems:
        console.print(f"No defects met while reading; {further}.\n", soft_wrap=True)
        return
    console.print(f"[bold yellow]{len(problems)} {'problem' if len(problems) == 1 else 'problems'}[/]")
    for problem in problems[:SHOWN]:
        item = f" {problem['item']}" if problem["item"] else ""
        words = f"{escape(item)} {escape(problem['text'])}"
        console.print(f"  [yellow]{escape(problem['file'])}[/]:{words}", soft_wrap=True)
    if len(problems) > SHOWN:
        console.print(f"  [dim]... and {len(problems) - SHOWN} more; --json lists all[/]")
    console.print(f"{further}.\n", soft_wrap=True)


def _split_table(splits: dict[str, Any]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("Split", "Images", "without objects", "Boxes", "ignored", "most in an image", "median image"):
        table.add_column(title, justify="left" if title == "Split" else "right")
    for name, split in splits.items():
        keys = ("images", "images_without_objects", "boxes", "ignored", "most_boxes_in_an_image")
        size = f"{split['width']['median']:g}x{split['height']['median']:g}"
        table.add_row(f"[bold]{name}[/]", *(f"{split[key]:,}" for key in keys), size)
    return table


def _class_table(classes: list[dict[str, Any]], splits: list[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("Class")
    for name in splits:
        table.add_column(name, justify="right")
    table.add_column("share of boxes")
    total = sum(sum(entry["boxes"].values()) for entry in classes)
    most = max((sum(entry["boxes"].values()) for entry in classes), default=0)
    for entry in classes[:SHOWN]:
        number = sum(entry["boxes"].values())
        bar = "█" * round(24 * number / most) if most else ""
        share = f"{100 * number / total:5.1f} %" if total else ""
        numbers = [f"{entry['boxes'][name]:,}" if entry["boxes"][name] else "[yellow]0[/]" for name in splits]
        table.add_row(f"[bold]{escape(entry['name'])}[/]", *numbers, f"{share} [cyan]{bar}[/]")
    return table


def _print_sizes(console: Console, description: dict[str, Any]) -> None:
    splits, sizes = description["splits"].values(), description["box_sizes"]
    sides = [
        f"{min(split[side]['min'] for split in splits):g} to {max(split[side]['max'] for split in splits):g}"
        for side in ("width", "height")
    ]
    console.print(f"[bold]Images[/]  {sides[0]} pixels wide, {sides[1]} high")
    if not sizes["percentiles"]:
        console.print("[bold]Boxes[/]   none\n")
        return
    middle = sizes["percentiles"]
    console.print(
        f"[bold]Boxes[/]   {sizes['min']:g} to {sizes['max']:g} pixels, median {middle['50']:g} "
        "[dim](square root of width x height)[/]\n"
        f"        {sizes['small']:,} small (below 32x32), {sizes['medium']:,} medium, "
        f"{sizes['large']:,} large (above 96x96)\n"
    )


def _print_fit(console: Console, fit: dict[str, Any], advice: list[dict[str, Any]]) -> None:
    """Which part of the boxes the anchors reach, by level, and what to change."""
    if not fit["boxes"]:
        return
    console.print(
        f"[bold]Anchors[/]  on images resized to a shorter side of {fit['short']} and at most {fit['long']} pixels;\n"
        "         [dim]a box counts at the level whose anchors fit it best[/]"
    )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("Level")
    for title in ("anchor", "boxes", "share", "mean IoU", "recall at IoU 0.5", "at 0.7"):
        table.add_column(title, justify="right")
    for name, row in [*fit["levels"].items(), ("all", fit)]:
        table.add_row(f"[bold]{name}[/]", f"{row['anchor']:g}" if "anchor" in row else "", *_fit_cells(row, fit))
    console.print(table)
    for entry in advice:
        console.print(f"[bold cyan]Advice[/] on {entry['topic']}: {escape(entry['text'])}.")
    if any("short" in entry["options"] for entry in advice):
        console.print("[dim]Anchors go with the input size: after a change of --short, look here again with it.[/]")
    if not advice:
        console.print("[green]Input size and anchors suit these boxes.[/]")
    console.print()


def _fit_cells(row: dict[str, Any], fit: dict[str, Any]) -> list[str]:
    if not row["boxes"]:
        return ["[dim]0[/]", "", "", "", ""]
    shares = [f"{100 * row[key]:.1f} %" for key in ("recall_50", "recall_70")]
    return [f"{row['boxes']:,}", f"{100 * row['boxes'] / fit['boxes']:.1f} %", f"{row['mean_iou']:.2f}", *shares]


def _print_caps(console: Console, caps: dict[str, Any]) -> None:
    if not caps["objects"]:
        return
    allowed = f"fpn train allows {caps['max_detections']:,} detections and {caps['proposals'][1]:,} proposals an image"
    words = "the usual limits suffice" if caps["max_detections"] == DETECTIONS else allowed
    objects = counted(caps["objects"], "object")
    console.print(f"[bold]Densest image[/]  {objects}, {words} [dim]({escape(caps['densest_image'])})[/]\n")
