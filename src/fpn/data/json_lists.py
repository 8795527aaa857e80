"""The lists of a large JSON file, entry by entry: parsed as a whole, the outlines of COCO take gigabytes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

_BLANKS = re.compile(r"[ \t\n\r]*")
_SEPARATOR = re.compile(r"[ \t\n\r]*([,\]])[ \t\n\r]*")


def read_lists(file: Path, takers: Mapping[str, Callable[[Iterator[Any]], Any]]) -> dict[str, Any]:
    """What each taker makes of the entries of the list under its key, for the object that a JSON file holds.

    A taker is given an iterator and has to use it up. Keys without a taker are skipped, and so are those whose value is
    no list: they are absent in what is returned. Of a key that stands twice the last counts.

    Raises:
        ValueError: the file is not JSON (json.JSONDecodeError with the place), not text, or has a number of more than
            4,300 digits.
        RecursionError: it is nested too deeply.
        OSError: it cannot be read.
    """
    content = file.read_bytes()
    text = content.decode(json.detect_encoding(content), "surrogatepass")
    del content
    found: dict[str, Any] = {}
    reader = _Reader(text)
    if not reader.has("{"):
        reader.value()
    elif not reader.has("}"):
        while True:
            if not text.startswith('"', reader.at):
                raise json.JSONDecodeError("Expecting property name enclosed in double quotes", text, reader.at)
            key = reader.value()
            reader.need(":")
            found.pop(key, None)
            if key in takers and reader.has("["):
                found[key] = takers[key](reader.entries())
            else:
                reader.value()
            if reader.has("}"):
                break
            reader.need(",")
    if reader.at < len(text):
        raise json.JSONDecodeError("Extra data", text, reader.at)
    return found


class _Reader:
    """A place in a text; blanks are stepped over at once, so that it is always at the start of something."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.decode = json.JSONDecoder().raw_decode
        self.move(0)

    def move(self, at: int) -> None:
        blanks = _BLANKS.match(self.text, at)
        self.at = blanks.end() if blanks else at

    def has(self, char: str) -> bool:
        """Steps over `char` if it comes next."""
        here = self.text.startswith(char, self.at)
        if here:
            self.move(self.at + 1)
        return here

    def need(self, char: str) -> None:
        if not self.has(char):
            raise json.JSONDecodeError(f"Expecting {char!r} delimiter", self.text, self.at)

    def value(self) -> Any:
        value, end = self.decode(self.text, self.at)
        self.move(end)
        return value

    def entries(self) -> Iterator[Any]:
        """The entries of a list whose bracket has been stepped over. Short ways, as there may be a million."""
        text, decode, separator, at = self.text, self.decode, _SEPARATOR.match, self.at
        if self.has("]"):
            return
        while True:
            value, at = decode(text, at)
            yield value
            found = separator(text, at)
            if found is None:
                raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
            at = found.end()
            if found[1] == "]":
                self.at = at
                return
