"""What is written in an ONNX file beside the model, read and written without the model: files may be large, or hostile.

An ONNX file is one message of protobuf: fields one after the other, each a number, a type and a length or value. Of
these only the entries of `metadata_props` are looked into, which are messages of a key and a value.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from io import BufferedIOBase, BytesIO
from pathlib import Path
from typing import Any

from fpn.errors import CheckpointError
from fpn.writing import replacing

OWN = "fpn"  # the key of the entry that marks a file as ours
METADATA, KEY, VALUE = 14, 1, 2  # numbers of the fields: of entries in the file, and in an entry
LONGEST = 2**26  # bytes of an entry that are read


def read_about(path: str | Path) -> dict[str, Any]:
    """What `write_about` wrote. Raises CheckpointError for a file that is damaged or that fpn did not export."""
    try:
        with Path(path).open("rb") as file:
            found = [text for _, _, text in entries(file) if text is not None]
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a readable ONNX file ({error})") from error
    if not found:
        raise CheckpointError(f"{path}: was not written by `fpn export`; it lacks class names and sizes")
    try:
        about = json.loads(found[-1])
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its metadata is damaged ({error}); export the detector again") from error
    if not isinstance(about, dict):
        raise CheckpointError(f"{path}: its metadata is damaged (not a mapping); export the detector again")
    return about


def write_about(path: str | Path, about: Mapping[str, Any]) -> None:
    """Put `about`, which JSON must be able to hold, into an ONNX file; the last one that was there gives way to it."""
    text = json.dumps(about).encode()  # escaped: names of files may hold what UTF-8 has no bytes for
    entry = field(METADATA, field(KEY, OWN.encode()) + field(VALUE, text))
    try:
        with replacing(path) as unfinished, Path(path).open("rb") as source, unfinished.open("wb") as target:
            for start, stop, own in entries(source):
                if own is None:
                    source.seek(start)
                    copy(source, target, stop - start)
            target.write(entry)
    except ValueError as error:
        raise CheckpointError(f"{path}: not a readable ONNX file ({error})") from error


def entries(file: BufferedIOBase) -> Iterator[tuple[int, int, bytes | None]]:
    """Where each field of the file starts and stops, and the value of those that are our own metadata."""
    for number, start, content, stop in fields(file):
        if number != METADATA or stop - content > LONGEST:
            yield start, stop, None
            continue
        file.seek(content)
        entry = BytesIO(file.read(stop - content))
        parts = {part: entry.getvalue()[begin:end] for part, _, begin, end in fields(entry)}
        yield start, stop, parts.get(VALUE, b"") if parts.get(KEY) == OWN.encode() else None


def fields(file: BufferedIOBase) -> Iterator[tuple[int, int, int, int]]:
    """Of each field of a message its number, where it starts, where its content starts and where that stops.

    Raises ValueError where it is none or ends too early.
    """
    size, start = file.seek(0, 2), 0
    while start < size:
        file.seek(start)
        tag = varint(file)
        match tag & 7:
            case 0:  # a number of as many bytes as it needs
                content = file.tell()
                varint(file)
                stop = file.tell()
            case 1:
                content = file.tell()
                stop = content + 8
            case 2:  # a length, and as many bytes
                length = varint(file)
                content = file.tell()
                stop = content + length
            case 5:
                content = file.tell()
                stop = content + 4
            case other:
                raise ValueError(f"no protobuf: a field of type {other} at byte {start}")
        if stop > size:
            raise ValueError(f"it ends early: {size} bytes, of at least {stop}")
        yield tag >> 3, start, content, stop
        start = stop


def varint(file: BufferedIOBase) -> int:
    """A number of seven bits a byte, the lowest first; all bytes but the last have the eighth bit set."""
    value = 0
    for place in range(10):
        byte = file.read(1)
        if not byte:
            raise ValueError("it ends early, within a number")
        value |= (byte[0] & 127) << (7 * place)
        if byte[0] < 128:
            return value
    raise ValueError("no protobuf: a number of more than ten bytes")


def field(number: int, content: bytes) -> bytes:
    """A field that holds bytes."""
    return as_varint(number << 3 | 2) + as_varint(len(content)) + content


def as_varint(value: int) -> bytes:
    low, rest = value & 127, value >> 7
    return bytes([low | 128]) + as_varint(rest) if rest else bytes([low])


def copy(source: BufferedIOBase, target: BufferedIOBase, count: int) -> None:
    """The next `count` bytes of one file to another."""
    while count and (part := source.read(min(count, 2**20))):
        target.write(part)
        count -= len(part)
