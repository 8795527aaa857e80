"""What a client has sent -> pixels. Nothing of it goes to the disk, and nothing is decoded before its size is known."""

from __future__ import annotations

import asyncio
import struct
from functools import lru_cache
from io import BytesIO

from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request
from torch import Tensor

from fpn.data.images import pixels_of
from fpn.serve.limits import BYTES_A_DEEP_PIXEL, BYTES_A_PIXEL, Limits, Refused, Share

# Of all that Pillow reads: what cameras, phones, browsers and microscopes write. Others start programs (EPS) or have
# decoders that few people look at.
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF")
FIELDS = (b"image", b"file")  # of a form
# A JPEG's decoder walks over the whole image for each scan, however short, and a TIFF's tiles may be one pixel each:
# files that would take hours. Usual are ten scans, and some thousands of tiles.
MOST_SCANS, MOST_TILES = 200, 100_000
MOST_FIELDS = 100
STRIPS, TILES = 273, 324  # TIFF's tags for where each begins


async def body_of(request: Request, limits: Limits, share: Share) -> bytes:
    """The body of a request, held in `share`. Raises Refused for one that is empty, too large or too slow."""
    too_large = Refused(413, f"the body is larger than the {limits.bytes:,} bytes that this server takes")
    declared = request.headers.get("content-length", "0")
    if not declared.isdecimal() or int(declared) > limits.bytes:
        raise too_large
    parts, size = [], 0
    try:
        async with asyncio.timeout(limits.seconds):
            async for part in request.stream():
                size += len(part)
                if size > limits.bytes:
                    raise too_large
                share.hold(size)
                parts.append(part)
    except TimeoutError:
        raise Refused(408, f"the body did not arrive within {limits.seconds:g} seconds") from None
    if not size:
        raise Refused(400, "the body is empty: send the bytes of an image file, or a form with one in the field image")
    return b"".join(parts)


def file_of(body: bytes, content_type: str) -> bytes:
    """The image file in a body: all of it, or the field `image` of a form."""
    kind, options = parse_options_header(content_type)
    if kind != b"multipart/form-data":
        return body
    for name, content in fields_of(body, options.get(b"boundary", b"")):
        if name in FIELDS:
            return content
    raise Refused(422, "the form has no field image: send the file in it, or the file's bytes as the whole body")


def fields_of(body: bytes, boundary: bytes) -> list[tuple[bytes, bytes]]:
    """The fields of a form (multipart/form-data, RFC 7578): name and content of each."""
    fields: list[tuple[bytes, bytes]] = []
    header, name, content, ended = [b"", b""], b"", bytearray(), False

    def begin() -> None:
        nonlocal name
        if len(fields) == MOST_FIELDS:
            raise Refused(400, f"the form has more than {MOST_FIELDS} fields")
        name = b""
        content.clear()

    def end_header() -> None:
        nonlocal name
        if header[0].lower() == b"content-disposition":
            name = parse_options_header(header[1])[1].get(b"name", b"")
        header[:] = [b"", b""]

    def add_to_header(part: int, data: bytes, start: int, end: int) -> None:
        header[part] += data[start:end]

    def end() -> None:
        nonlocal ended
        ended = True

    callbacks = {
        "on_part_begin": begin,
        "on_header_field": lambda data, start, end: add_to_header(0, data, start, end),
        "on_header_value": lambda data, start, end: add_to_header(1, data, start, end),
        "on_header_end": end_header,
        "on_part_data": lambda data, start, end: content.extend(data[start:end]),
        "on_part_end": lambda: fields.append((name, bytes(content))),
        "on_end": end,
    }
    try:
        parser = MultipartParser(boundary, callbacks)  # pyright: ignore[reportArgumentType]
        parser.write(body)
        parser.finalize()
    except (FormParserError, ValueError) as error:
        raise Refused(400, f"the form cannot be read ({error})") from error
    if not ended:
        raise Refused(400, "the form is cut off: its last boundary is missing")
    return fields


def needs_of(file: bytes, limits: Limits) -> int:
    """The bytes of memory that decoding takes, from the file's header. Raises Refused for what is not to be decoded."""
    if file.startswith(b"\xff\xd8") and file.count(b"\xff\xda\x00") > MOST_SCANS:
        raise Refused(422, f"the JPEG has more than {MOST_SCANS} scans")
    if pieces_of(file) > MOST_TILES:
        raise Refused(422, f"the TIFF has more than {MOST_TILES:,} tiles")
    try:
        with Image.open(BytesIO(file), formats=formats()) as image:
            (width, height), mode = image.size, image.mode
    except UnidentifiedImageError:
        raise Refused(415, f"the file is none of {', '.join(formats())}, or too damaged to tell") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise Refused(413, f"the image has more than the {limits.pixels:,} pixels that this server takes") from None
    except Exception as error:  # Pillow raises nearly every built-in exception on broken files
        raise Refused(422, f"the image cannot be read ({type(error).__name__}); it may be damaged") from error
    if width * height > limits.pixels:
        raise Refused(413, f"the image has {width} x {height} pixels; this server takes {limits.pixels:,}")
    if width * height == 0:
        raise Refused(422, f"the image has {width} x {height} pixels")
    return width * height * (BYTES_A_DEEP_PIXEL if mode.startswith("I") or mode == "F" else BYTES_A_PIXEL)


def pieces_of(file: bytes) -> int:
    """The strips or tiles that the first directory of a TIFF or BigTIFF names; 0 where it cannot be told.

    Pillow lists them all as it opens the file, at some hundred bytes each, before it can be asked how many there are.
    """
    if file[:2] not in (b"II", b"MM") or not {42, 43} & set(file[2:4]):
        return 0
    classic, big = (4, "I", "H", "HHI4x"), (8, "Q", "Q", "HHQ8x")
    layouts = [classic] * (file[2] != 43) + [big] * (43 in file[2:4])  # Pillow 12 reads MM's BigTIFF as the classic one
    return max(most_in(file, "<" if file[:2] == b"II" else ">", *layout) for layout in layouts)


def most_in(file: bytes, order: str, at: int, offset: str, number: str, row: str) -> int:
    """The most that a directory names, whose offset is at `at`: struct's letters for it, its rows' number and a row."""
    try:
        (start,) = struct.unpack_from(order + offset, file, at)
        (rows,) = struct.unpack_from(order + number, file, start)
    except (struct.error, OverflowError):
        return 0
    start, size = start + struct.calcsize(order + number), struct.calcsize(order + row)
    rows = min(rows, (len(file) - start) // size)  # Pillow takes what there is of a directory that is cut off
    found = (struct.unpack_from(order + row, file, start + size * index) for index in range(rows))
    return max((count for tag, _, count in found if tag in (STRIPS, TILES)), default=0)


def decoded(file: bytes) -> UInt8[Tensor, "3 H W"]:
    """The pixels of a file that `needs_of` has let through. Raises Refused where it is cut off or damaged."""
    try:
        with Image.open(BytesIO(file), formats=formats()) as image:
            return pixels_of(image)
    except Exception as error:  # as in needs_of
        raise Refused(422, f"the image cannot be decoded ({type(error).__name__}); it is cut off or damaged") from error


@lru_cache
def formats() -> tuple[str, ...]:
    """Those of FORMATS that this Pillow was built with."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)
