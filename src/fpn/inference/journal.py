"""What is done of a run, kept as it comes: OUT/unfinished.jsonl, a line an image, so that a run can go on.

The first line tells what the run is. A line counts once it has its line end, so whatever a run was killed in, what
stands before is whole. Processes that share the work have a file each, unfinished-1.jsonl and so on.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from fpn.errors import FpnError, OptionError

NAME = re.compile(r"unfinished(-\d+)?\.jsonl")
ENCODE = json.JSONEncoder(ensure_ascii=False).encode
Row = dict[str, Any]


@dataclass(frozen=True)
class Place:
    """Where the line of an image stands, and the name of its results."""

    journal: Path
    offset: int
    name: str


def journals(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(file for file in folder.iterdir() if NAME.fullmatch(file.name) and file.is_file())


def done_in(folder: Path, about: Mapping[str, Any]) -> dict[str, Place]:
    """Each image that the journals of a folder have, by its file.

    about: what this run is. Raises OptionError where the folder has the journal of another, and FpnError for one that
    is damaged.
    """
    found: dict[str, Place] = {}
    for journal in journals(folder):
        with journal.open("rb") as stream:
            head = stream.readline()
            offset = stream.tell()
            for number, line in enumerate(whole_lines(stream)):
                if number == 0:
                    check_same(journal, parsed(head, journal), about)
                row = parsed(line, journal)
                found[row["file"]] = Place(journal, offset, row["name"])
                offset += len(line)
    return found


def whole_lines(stream: BinaryIO) -> Iterator[bytes]:
    return (line for line in stream if line.endswith(b"\n"))


def parsed(line: bytes, journal: Path) -> Row:
    try:
        row = json.loads(line)
        if isinstance(row, dict) and ("run" in row or {"file", "name", "row"} <= row.keys()):
            return row
    except (ValueError, RecursionError):
        pass
    raise FpnError(f"{journal}: damaged at {line[:60]!r}; delete it to start anew")


def check_same(journal: Path, head: Row, about: Mapping[str, Any]) -> None:
    before = head.get("run")
    before = before if isinstance(before, dict) else {}
    differing = [name for name in {**about, **before} if about.get(name) != before.get(name)]
    if differing:
        name = differing[0]
        raise OptionError(
            f"{journal.parent}: has an unfinished run with {name} {before.get(name)} rather than {about.get(name)}: "
            f"repeat the command that began it to go on with it, take another --out, or delete {journal}"
        )


@contextmanager
def appending(folder: Path, about: Mapping[str, Any], rank: int = 0) -> Iterator[BinaryIO]:
    """The journal of one process, open for `append`; a line that was cut off is taken away."""
    journal = folder / (f"unfinished-{rank}.jsonl" if rank else "unfinished.jsonl")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stream = journal.open("ab+", buffering=0)  # what a full disk has refused is not to come again when it is closed
    except OSError as error:
        raise FpnError(f"{folder}: cannot be written to ({error}); choose another folder with --out") from error
    empty = False  # unknown where the disk fails: then it stays
    try:
        with stream:
            try:
                stream.truncate(end_of_rows(stream))
                if not stream.seek(0, os.SEEK_END):
                    append(stream, [{"run": dict(about)}])
                yield stream
            finally:
                empty = not end_of_rows(stream)
    finally:
        if empty:
            journal.unlink()


def end_of_rows(stream: BinaryIO) -> int:
    """Up to where a journal has whole lines; 0 without a row, for then it is of no run."""
    stream.seek(0)
    head = len(stream.readline())
    end = end_of_last_line(stream)
    return end if end > head else 0


def end_of_last_line(stream: BinaryIO) -> int:
    """How many bytes of a file are whole lines."""
    at = stream.seek(0, os.SEEK_END)
    while at:
        start = max(0, at - 2**16)
        stream.seek(start)
        last = stream.read(at - start).rfind(b"\n")
        if last >= 0:
            return start + last + 1
        at = start
    return 0


def append(stream: BinaryIO, rows: Iterable[Row]) -> None:
    """Adds lines, all at once. Raises FpnError where the disk refuses; of the last line there may be a part then."""
    left = "".join(ENCODE(row) + "\n" for row in rows).encode("utf-8", "backslashreplace")
    try:
        while left:
            left = left[stream.write(left) :]
    except OSError as error:
        raise FpnError(
            f"{stream.name}: cannot be written ({error}); with more room the same command goes on"
        ) from error


def rows_at(places: Sequence[Place]) -> Iterator[Row]:
    """The row of each place, read when it is asked for."""
    streams: dict[Path, BinaryIO] = {}
    try:
        for place in places:
            stream = streams.get(place.journal) or streams.setdefault(place.journal, place.journal.open("rb"))
            stream.seek(place.offset)
            yield parsed(stream.readline(), place.journal)
    finally:
        for stream in streams.values():
            stream.close()
