"""Videos and cameras as frames, and frames as a video, with PyAV (FFmpeg's libraries)."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int32, UInt8
from PIL import Image
from torch import Tensor

from fpn.errors import DataError, FpnError, OptionError
from fpn.inference.sources import WEBCAM

TICKS = 30_000  # a second; every usual frame rate's frames are whole numbers of these, or nearly
PATIENCE = 10  # seconds for a camera to open and to give a frame
BT709, STUDIO = 1, 1  # numbers of ITU-T H.273: the colours that players expect, and their range


@dataclass
class Video:
    """An open video or camera. What its reading shows to be wrong is told in `notes`."""

    source: str
    live: bool
    rate: float  # frames a second, as the file has it or guessed
    seconds: float | None  # its length, as far as the file tells
    pixel_aspect: Fraction  # width over height of a pixel as it is displayed
    container: Any
    notes: list[str] = field(default_factory=list)
    cut_off: bool = False

    def __iter__(self) -> Iterator[tuple[UInt8[Tensor, "3 H W"], float]]:
        """The frames as they are displayed, turned as a phone was held, each with its seconds from the first.

        Damaged parts are skipped, and at an end that cannot be read the frames end.
        """
        first, end, number, damaged = None, 0.0, 0, 0
        for packet in self._packets():
            try:
                decoded = packet.decode()
            except pyav().FFmpegError:
                damaged += 1
                continue
            for frame in decoded:
                seconds = frame.time if frame.time is not None else number / self.rate
                first = seconds if first is None else first
                end = seconds - first + float((frame.duration or 0) * frame.time_base)
                yield pixels_of(frame), seconds - first
                number += 1
        if damaged:
            self.notes.append(f"{self.source}: {damaged} damaged parts were left out")
        # Sound may be a little longer than the pictures.
        if number and self.seconds is not None and end < min(0.97 * self.seconds, self.seconds - 0.5):
            self.cut_off = True
            self.notes.append(f"{self.source}: ends after {end:.1f} seconds of {self.seconds:.1f}: it is cut off")

    @property
    def length(self) -> int | None:
        """About how many frames there are."""
        return None if self.seconds is None else max(1, round(self.seconds * self.rate))

    def _packets(self) -> Iterator[Any]:
        packets = self.container.demux(self.container.streams.video[0])
        while True:
            try:
                packet = next(packets, None)
            except pyav().FFmpegError as error:
                self.cut_off = True
                self.notes.append(f"{self.source}: cannot be read any further ({reason(error)})")
                return
            if packet is None:
                return
            yield packet


@contextmanager
def opened(source: str | Path) -> Iterator[Video]:
    """A video file, or the camera of "webcam:0". Raises DataError where there is no video in it, naming the source."""
    av, name = pyav(), str(source)
    live = name.startswith(WEBCAM)
    if not live and not Path(name).is_file():
        raise DataError(f"{name}: no such video file")
    file, how = camera(name.removeprefix(WEBCAM)) if live else (name, {})
    try:
        container = av.open(file, **how)
    except (av.FFmpegError, OSError, ValueError) as error:
        remedy = (
            "is the camera there, and free?" if live else "not a video that FFmpeg can read, or one that is cut off"
        )
        raise DataError(f"{name}: {remedy} ({reason(error)})") from error
    with closing(container):
        if not container.streams.video:
            raise DataError(f"{name}: there are no pictures in it, only {kinds(container)}")
        stream = container.streams.video[0]
        if stream.codec_context is None:
            raise DataError(f"{name}: its pictures are in a format that this FFmpeg cannot decode")
        stream.thread_type = "AUTO"
        rate = float(stream.average_rate or stream.guessed_rate or 25)
        seconds = float(stream.duration * stream.time_base) if stream.duration else (container.duration or 0) / 1e6
        aspect = stream.sample_aspect_ratio or Fraction(1)
        yield Video(name, live, rate, None if live else seconds or None, aspect, container)


def camera(name: str) -> tuple[str, dict[str, Any]]:
    """What PyAV is asked for, of a camera's number or name on this system."""
    how: dict[str, Any] = {"timeout": PATIENCE}
    if sys.platform == "darwin":
        return name, {**how, "format": "avfoundation", "options": {"framerate": "30"}}
    if sys.platform == "win32":
        return f"video={name}", {**how, "format": "dshow"}
    return f"/dev/video{name}" if name.isdigit() else name, {**how, "format": "v4l2"}


def kinds(container: Any) -> str:
    return ", ".join(sorted({stream.type for stream in container.streams})) or "nothing at all"


def pixels_of(frame: Any) -> UInt8[Tensor, "3 H W"]:
    """RGB pixels of a frame as it is displayed."""
    from av.sidedata.sidedata import Type

    pixels, matrix = frame.to_ndarray(format="rgb24"), frame.side_data.get(Type.DISPLAYMATRIX)
    if matrix is not None and len(raw := bytes(matrix)) == 36:
        pixels = turned(pixels, np.frombuffer(raw, np.int32).reshape(3, 3))
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def turned(pixels: UInt8[np.ndarray, "h w 3"], matrix: Int32[np.ndarray, "3 3"]) -> UInt8[np.ndarray, "H W 3"]:
    """Pixels as FFmpeg's display matrix says: its rows are where x and y go; any of the eight turns and mirrorings."""
    (a, b), (c, d) = matrix[:2, :2].tolist()
    if abs(b) > abs(a):  # x becomes y
        pixels, a, d = pixels.transpose(1, 0, 2), c, b
    return pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


class Writer:
    """An mp4 video of pictures, all brought to the size of the first. It can be played once it is closed.

    name: what errors call it, where `path` is not where it will be in the end.
    """

    def __init__(self, path: Path, rate: float, pixel_aspect: Fraction = Fraction(1), name: Path | None = None):
        self.path, self.rate, self.pixel_aspect, self.name = path, rate, pixel_aspect, name or path
        self._container: Any = None
        self._last = -1

    def add(self, picture: Image.Image, seconds: float) -> None:
        """The next picture, shown from this time on; `seconds` grows."""
        av = pyav()
        try:
            if self._container is None:
                self._begin(picture.size)
            self._encode(picture if picture.size == self.size else picture.resize(self.size), seconds)
        except av.FFmpegError as error:
            if isinstance(error, OSError):  # of the disk
                raise
            raise FpnError(f"{self.name}: pictures of {picture.size} cannot be encoded ({reason(error)})") from error

    def _encode(self, picture: Image.Image, seconds: float) -> None:
        av, stream = pyav(), self._container.streams.video[0]
        frame = av.VideoFrame.from_ndarray(evened(np.asarray(picture)), format="rgb24")
        frame = frame.reformat(format="yuv420p", dst_colorspace=BT709)
        self._last = max(self._last + 1, round(seconds * TICKS))
        frame.pts, frame.time_base = self._last, Fraction(1, TICKS)
        self._container.mux(stream.encode(frame))

    def _begin(self, size: tuple[int, int]) -> None:
        av = pyav()
        codec = next((name for name in ("libx264", "libopenh264") if name in av.codecs_available), "mpeg4")
        self.size = size
        container: Any = av.open(str(self.path), "w", format="mp4", options={"movflags": "faststart"})
        self._container = container
        options = {"crf": "21", "preset": "veryfast"} if codec == "libx264" else {}
        stream = container.add_stream(codec, rate=Fraction(self.rate).limit_denominator(1001), options=options)
        stream.width, stream.height = (side + side % 2 for side in size)
        stream.pix_fmt = "yuv420p"
        context = stream.codec_context
        context.time_base = Fraction(1, TICKS)
        context.sample_aspect_ratio = self.pixel_aspect
        context.colorspace = context.color_primaries = context.color_trc = BT709
        context.color_range = STUDIO
        if codec != "libx264":
            stream.bit_rate = round(size[0] * size[1] * self.rate * 0.2)

    def close(self) -> None:
        if self._container is None:
            return
        container, self._container = self._container, None
        with closing(container):
            container.mux(container.streams.video[0].encode(None))


def evened(pixels: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "H W 3"]:
    """With the last row and column twice where their number is odd, which the usual format of pixels cannot be."""
    height, width = pixels.shape[:2]
    return np.pad(pixels, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")


def pyav() -> Any:
    try:
        import av
    except ImportError as error:
        raise OptionError("videos and cameras need PyAV: pip install 'fpn[video]'") from error
    return av


def reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error).lower()
