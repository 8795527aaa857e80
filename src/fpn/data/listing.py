"""Defects, and what was done about them, as a screen for people and as JSON for programs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, TypeVar

from rich.console import Console
from rich.markup import escape

from fpn.data.dataset import Data
from fpn.data.defects import KINDS, OTHER, Defect
from fpn.data.repair import FOR_PEOPLE, Change, Repair
from fpn.words import counted

SHOWN = 5  # of each kind; JSON has them all
_COLOURS = {"error": "red", "warning": "yellow", "note": "cyan"}
Listed = TypeVar("Listed", Defect, Change)


def number_of_defects(found: Sequence[Defect]) -> int:
    """Without notes, which are only worth knowing."""
    return sum(defect.severity != "note" for defect in found)


def defects_as_json(data: Data, defects: Sequence[Defect], done: Repair | None = None, out: str = "") -> dict[str, Any]:
    """Everything as plain numbers and strings; "clean" is about the copy where there is one."""
    content: dict[str, Any] = {
        "path": str(data.path),
        "format": data.format,
        "images": sum(map(len, data.values())),
        "boxes": sum(len(split.boxes) for split in data.values()),
        "clean": not number_of_defects(defects if done is None else done.remaining),
        "counts": {kind: len(own) for kind, own in _by_kind(defects).items()},
        "defects": [_plain(defect) for defect in defects],
        "notes": list(data.notes),
    }
    if done is not None:
        content |= {"out": out, "changes": [vars(change) for change in done.changes], "not_in_the_copy": done.lost}
        content["remaining"] = [_plain(defect) for defect in done.remaining]
    return content


def _plain(defect: Defect) -> dict[str, Any]:
    return {name: getattr(defect, name) for name in ("kind", "severity", "split", "file", "item", "text", "remedy")}


def _by_kind(found: Sequence[Listed]) -> dict[str, list[Listed]]:
    groups: dict[str, list[Listed]] = defaultdict(list)
    for defect in found:
        groups[defect.kind].append(defect)
    return dict(groups)


def print_defects(data: Data, defects: Sequence[Defect]) -> None:
    """Prints what `find_defects` found, to be read by people: by kind, the most important first."""
    console = Console(highlight=False)
    _print_data(console, data)
    _print_kinds(console, defects)
    if not number_of_defects(defects):
        console.print("[green]No defects found.[/]\n")


def _print_data(console: Console, data: Data) -> None:
    images, boxes = sum(map(len, data.values())), sum(len(split.boxes) for split in data.values())
    console.print(
        f"\n[bold]{escape(str(data.path))}[/]  {data.format.upper()} format, {counted(images, 'image')} and "
        f"{counted(boxes, 'box', 'boxes')} looked at\n",
        soft_wrap=True,
    )
    for note in data.notes:
        console.print(f"[cyan]Note[/] {escape(note)}\n", soft_wrap=True)


def print_verdict(data: Data, defects: Sequence[Defect]) -> None:
    """The last line of a check without a repair: how many defects, and what would mend them."""
    number, left = number_of_defects(defects), number_of_defects([d for d in defects if d.kind in FOR_PEOPLE])
    if not number:
        return
    mends = f"mends all but {left:,} of them" if left else f"mends {'it' if number == 1 else 'them'}"
    advice = f"fpn data check {data.path} --fix --out DIR writes a copy and {mends}."
    if left == number or any(defect.kind == "no-boxes" for defect in defects):  # a copy without boxes is refused
        advice = "It needs a person." if number == 1 else "They need a person."
    text = f"[bold]{counted(number, 'defect')}.[/] {escape(advice)}"
    Console(highlight=False).print(f"{text}\n", soft_wrap=True)


def print_repair(data: Data, done: Repair, out: str) -> None:
    """Prints what `repair` changed, and what remains; what it mended was a defect, and is not said twice."""
    console = Console(highlight=False)
    _print_data(console, data)
    console.print(f"[bold]{escape(out)}[/]  the repaired copy, in COCO format\n", soft_wrap=True)
    for kind, changes in _by_kind(done.changes).items():
        console.print(f"[green]{len(changes):,} x[/] [bold]{escape(KINDS.get(kind, OTHER).title)}[/]")
        _print_some(console, changes)
        console.print()
    for text in done.lost:
        console.print(f"[cyan]Not in the copy[/] {escape(text)}\n", soft_wrap=True)
    if not done.changes:
        console.print("Nothing was changed.\n")
    number = number_of_defects(done.remaining)
    need = f"{counted(number, 'defect')} {'remains and needs' if number == 1 else 'remain and need'} a person"
    colour, verdict = ("bold yellow", need) if number else ("green", "it is clean")
    console.print(f"[{colour}]The copy was checked too: {verdict}.[/]\n")
    _print_kinds(console, done.remaining)


def _print_kinds(console: Console, defects: Sequence[Defect]) -> None:
    for kind, own in _by_kind(defects).items():
        about = KINDS.get(kind, OTHER)
        console.print(f"[{_COLOURS[about.severity]}]{len(own):,} x[/] [bold]{escape(about.title)}[/]  [dim]{kind}[/]")
        _print_some(console, own)
        console.print(f"  [green]->[/] {escape(about.remedy)}\n", soft_wrap=True)


def _print_some(console: Console, found: Sequence[Listed]) -> None:
    for defect in found[:SHOWN]:
        console.print(f"  {escape(str(defect))}", soft_wrap=True)
    if len(found) > SHOWN:
        console.print(f"  [dim]... and {len(found) - SHOWN:,} more; --json lists all[/]")
