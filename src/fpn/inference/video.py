"""Detection in videos: frames in, an annotated video and the detections of every frame out."""

from __future__ import annotations

import json
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, TextIO

from jaxtyping import UInt8
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from fpn.drawing import draw
from fpn.errors import DataError, OptionError
from fpn.inference.finder import Finder, check_threshold
from fpn.inference.frames import Video, Writer, opened
from fpn.inference.rows import row_of
from fpn.inference.tracking import Tracks
from fpn.structures import Detections
from fpn.writing import replacing

AHEAD = 8  # frames that are read before they are needed, and that wait to be drawn

Frame = tuple[UInt8[Tensor, "3 H W"], float]  # with its seconds from the first


@dataclass(frozen=True)
class VideoResult:
    """What came of a video: so many frames, detections in all of them, and objects followed (None without tracking).

    complete: to its end. rows, picture: the files with the detections and with the video drawn on. notes: sentences on
    what was wrong with it.
    """

    frames: int
    objects: int
    tracks: int | None
    complete: bool
    rows: Path
    picture: Path | None
    notes: list[str]


def predict_video(
    find: Finder,
    source: str | Path,
    out: str | Path,
    threshold: float = 0.5,
    *,
    name: str | None = None,
    track: bool = False,
    batch: int = 1,
    pictures: bool = True,
    about: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> VideoResult:
    """Detect objects in every frame of a video file, or of a camera ("webcam:0") until Ctrl-C.

    Writes `out`/NAME.json and, with `pictures`, the video with what was found drawn on it, without sound, as
    `out`/NAME.mp4; NAME is the source's without its suffix when left out. The JSON has one frame a line, rows as in
    predictions.json with "frame" (from 0) and "seconds" (from the first frame), and of every detection its "track" with
    `track` (see `fpn.inference.tracking`). It begins with `about`. Frames go to `find` in batches, of a camera singly.

    Ctrl-C ends it after the frame at hand: both files are whole, of the frames until then, and KeyboardInterrupt is
    raised with a sentence, except for a camera. A second one leaves nothing. Raises DataError for a source without a
    frame that can be read, OptionError where a package is missing.
    """
    check_threshold(threshold)
    if batch < 1:
        raise OptionError(f"batch is {batch}: it must be 1 at least")
    with opened(source) as video, stop_when_asked() as stop:
        tracks = Tracks(threshold, video.rate) if track else None
        followed = tracks.follow if tracks is not None else lambda found: (found.above(threshold), None)
        rows, picture = files_for(video, Path(out), name, pictures)
        frames = frames_of(video)
        rate = round(video.rate, 3)
        head = {"video": video.source, **(about or {}), "threshold": threshold, "frames_per_second": rate}
        with ExitStack() as files:
            coming = files.enter_context(closing(ahead(frames)))
            found = found_in(until(stop, coming), find, 1 if video.live else batch)
            lines = files.enter_context(Lines(files.enter_context(replacing(rows)), head))
            show = None
            if picture is not None:
                writer = Writer(files.enter_context(replacing(picture)), video.rate, video.pixel_aspect, picture)
                files.enter_context(closing(writer))
                show = files.enter_context(Behind(lambda *frame, seconds: writer.add(drawn(*frame), seconds)))
            bar = tqdm(found, f"detecting in {rows.stem}", video.length, unit=" frames", disable=not progress or None)
            for image, seconds, detections in files.enter_context(bar):
                shown, numbers = followed(detections)
                lines.add(seconds, image, shown, numbers)
                if show is not None:
                    show(image, shown, numbers, seconds=seconds)
            complete = not video.cut_off and (video.live or not stop.is_set())
            lines.end({"complete": complete, "objects": lines.objects, "notes": video.notes})
        if stop.is_set() and not video.live:
            raise KeyboardInterrupt(f"{source}: stopped after {lines.frames} frames, which are in {picture or rows}")
        count = None if tracks is None else tracks.count
        return VideoResult(lines.frames, lines.objects, count, complete, rows, picture, video.notes)


def files_for(video: Video, out: Path, name: str | None, pictures: bool) -> tuple[Path, Path | None]:
    """The two files to write; the second is None where no pictures are wanted."""
    name = name or (video.source.replace(":", "-") if video.live else Path(video.source).stem)
    rows, picture = out / f"{name}.json", out / f"{name}.mp4"
    if pictures and picture.resolve() == Path(video.source).resolve():
        raise OptionError(f"{video.source} would be overwritten by its results: choose another folder with --out")
    return rows, picture if pictures else None


def frames_of(video: Video) -> Iterator[Frame]:
    """Its frames, of which there is one at least."""
    frames = iter(video)
    first = next(frames, None)
    if first is None:
        raise DataError("; ".join([f"{video.source}: there is no frame in it that can be read", *video.notes]))
    return chain([first], frames)


def ahead(frames: Iterator[Frame]) -> Generator[Frame, None, None]:
    """The frames, of which the next ones are read in a thread meanwhile."""
    with ThreadPoolExecutor(1) as pool:
        coming = deque(pool.submit(next, frames, None) for _ in range(AHEAD))
        while (frame := coming.popleft().result()) is not None:
            coming.append(pool.submit(next, frames, None))
            yield frame


class Behind:
    """A function whose calls are done one after the other in a thread; those waiting are few. Its errors come late."""

    def __init__(self, function: Callable[..., None]):
        self._function, self._pool = function, ThreadPoolExecutor(1)
        self._waiting: deque[Future[None]] = deque()

    def __call__(self, *arguments: Any, **named: Any) -> None:
        if len(self._waiting) == AHEAD:
            self._waiting.popleft().result()
        self._waiting.append(self._pool.submit(self._function, *arguments, **named))

    def __enter__(self) -> Behind:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._pool.shutdown(cancel_futures=kind is not None)
        for call in self._waiting if kind is None else ():
            call.result()


def found_in(frames: Iterator[Frame], find: Finder, batch: int) -> Iterator[tuple[Tensor, float, Detections]]:
    """Every frame with its time and all its detections."""
    while part := list(islice(frames, batch)):
        images = [image for image, _ in part]
        for (image, seconds), detections in zip(part, find(images), strict=True):
            yield image, seconds, detections


def until(stop: threading.Event, frames: Iterable[Frame]) -> Iterator[Frame]:
    for frame in frames:
        yield frame
        if stop.is_set():
            return


class Lines:
    """The JSON file of a video, written as the frames come: valid as a whole, one frame a line."""

    def __init__(self, path: Path, head: Mapping[str, Any]):
        self._path, self._head = path, head
        self.frames = self.objects = 0

    def __enter__(self) -> Lines:
        self._file: TextIO = open(self._path, "w", encoding="utf-8", errors="backslashreplace")  # as JSON escapes it
        self._file.write(dumps(self._head).removesuffix("}") + ', "frames": [')
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, seconds: float, image: Tensor, found: Detections, numbers: list[int | None] | None) -> None:
        row = row_of(found, (image.shape[1], image.shape[2]))
        for detection, number in zip(row["detections"], numbers or (), strict=numbers is not None):
            detection["track"] = number
        start = "\n" if self.frames == 0 else ",\n"
        self._file.write(start + dumps({"frame": self.frames, "seconds": round(seconds, 4), **row}))
        self.frames += 1
        self.objects += len(found)

    def end(self, tail: Mapping[str, Any]) -> None:
        self._file.write("\n], " + dumps(tail).removeprefix("{") + "\n")


def dumps(content: Any) -> str:
    return json.dumps(content, ensure_ascii=False)


def drawn(image: Tensor, found: Detections, numbers: list[int | None] | None) -> Image.Image:
    """The frame with its detections; those followed have the colour and the number of their track."""
    if numbers is None:
        return draw(image, found.boxes, found.labels, found.scores, found.classes, found.masks)
    known = max([number for number in numbers if number is not None], default=0)
    labels, texts = [], [""] * (known + 1) + found.names
    for row, (name, number) in enumerate(zip(found.names, numbers, strict=True)):
        labels.append(known + 1 + row if number is None else number)
        texts[labels[-1]] = name if number is None else f"{name} #{number}"
    return draw(image, found.boxes, labels, found.scores, texts, found.masks)


@contextmanager
def stop_when_asked() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C, or SIGTERM, sets; the next ones do what they usually do."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    usual = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def back() -> None:
        for number, handler in usual.items():
            if handler is not None:
                signal.signal(number, handler)

    def asked(*_: object) -> None:
        stop.set()
        back()

    for number in usual:
        signal.signal(number, asked)
    try:
        yield stop
    finally:
        back()
