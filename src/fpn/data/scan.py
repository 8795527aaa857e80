"""Every image file decoded once, on all cores, into about a kilobyte of facts each.

A decoder is C code that is given whatever a file holds. So it runs in processes of its own: one that hangs, or
crashes twice with the same image, costs that image, which is named, and a new process goes on with the rest.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import signal
import time
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from fpn.data.images import orientation_of, read_image
from fpn.errors import FpnError, ImageError
from fpn.hardware import cores

THUMBNAIL = 32  # pixels a side
CHUNK = 16  # images handed to a process at once
PATIENCE = 120.0  # seconds that one image may take


@dataclass(frozen=True)
class Scan:
    """What decoding N image files told; the rows of those in `errors` are zero."""

    errors: dict[int, tuple[str, str]]  # by position: the kind of defect, and what is wrong in words
    sizes: np.ndarray  # (N, 2) int64: height, width as displayed
    orientations: np.ndarray  # (N,) int64: how EXIF asks to display them, 1 (as stored) to 8
    digests: np.ndarray  # (N, 2) uint64: the same for the same pixels as displayed
    thumbnails: np.ndarray  # (N, 32, 32) uint8: grey, the whole image squeezed into a square


# Height and width, orientation, digest, thumbnail; or kind of defect and words.
_Result = tuple[tuple[int, int], int, bytes, bytes] | tuple[str, str]


def scan(paths: Sequence[str | Path], workers: int | None = None, patience: float = PATIENCE) -> Scan:
    """Decodes every file. A progress bar shows how far it is.

    Args:
        paths: image files.
        workers: processes; one a core when left out.
        patience: seconds after which a file that is still being decoded is given up.

    Raises:
        FpnError: processes cannot be started.
    """
    n = len(paths)
    errors: dict[int, tuple[str, str]] = {}
    sizes, orientations = np.zeros((n, 2), dtype=np.int64), np.zeros(n, dtype=np.int64)
    digests = np.zeros((n, 2), dtype=np.uint64)
    thumbnails = np.zeros((n, THUMBNAIL, THUMBNAIL), dtype=np.uint8)
    files = [str(path) for path in paths]
    results = _on_all_cores(files, workers or cores(), patience)
    for index, result in tqdm(results, "decoding images", n, unit="image", delay=1, leave=False):
        if len(result) == 2:
            errors[index] = result
        else:
            sizes[index], orientations[index] = result[:2]
            digests[index] = np.frombuffer(result[2], dtype=np.uint64)
            thumbnails[index] = np.frombuffer(result[3], dtype=np.uint8).reshape(THUMBNAIL, THUMBNAIL)
    return Scan(errors, sizes, orientations, digests, thumbnails)


def decode(path: str) -> _Result:
    """What one file tells, or the kind of its defect and what is wrong with it."""
    try:
        pixels = read_image(path).permute(1, 2, 0).contiguous().numpy()
        orientation = exif_orientation(path)
    except ImageError as error:
        return _kind(error.__cause__), str(error).removeprefix(f"{path}: ")
    size = (pixels.shape[0], pixels.shape[1])
    digest = hashlib.blake2b(pixels.data, digest_size=16, salt=repr(size[0]).encode())
    grey = Image.fromarray(pixels).convert("L").resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    return size, orientation, digest.digest(), grey.tobytes()


def exif_orientation(path: str | Path) -> int:
    """How EXIF asks to display an image: 1 (as stored) to 8."""
    with Image.open(path) as image:
        return orientation_of(image)


def _kind(cause: BaseException | None) -> str:
    match cause:
        case FileNotFoundError():
            return "missing-image"
        case UnidentifiedImageError():
            return "unreadable-image"
        case Image.DecompressionBombError() | Image.DecompressionBombWarning() | MemoryError():
            return "huge-image"
    return "damaged-image"


class _Worker:
    """A process that decodes, and the files that it still owes an answer for, in their order."""

    def __init__(self) -> None:
        self.connection, other_end = multiprocessing.Pipe()
        self.process = multiprocessing.Process(target=_serve, args=(other_end, self.connection), daemon=True)
        self.process.start()
        other_end.close()
        self.owed: deque[int] = deque()
        self.last_sign = time.monotonic()
        self.ready = False

    def give(self, indices: Sequence[int], files: list[str]) -> None:
        self.owed.extend(indices)
        self.last_sign = time.monotonic()
        with suppress(ConnectionError):  # it has died meanwhile; the caller sees that it owes and is not alive
            self.connection.send([files[index] for index in indices])

    def answers(self) -> Iterator[tuple[int, _Result]]:
        """What has arrived since the last call."""
        try:
            while self.connection.poll():
                answer = self.connection.recv()
                self.last_sign = time.monotonic()
                if answer is None:
                    self.ready = True
                else:
                    yield self.owed.popleft(), answer
        except (EOFError, ConnectionError):
            self.process.join(1)  # it is ending; the caller sees that it is no longer alive

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


def _serve(connection: Connection, parents_end: Connection) -> None:
    """The life of a process: lists of files come in, one answer a file goes out."""
    parents_end.close()  # else this copy of it would keep the pipe open after the parent was killed
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends its processes
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    warnings.simplefilter("ignore")  # Pillow's, about metadata
    connection.send(None)
    try:
        while True:
            for file in connection.recv():
                connection.send(decode(file))
    except (EOFError, ConnectionError):  # the parent is gone
        return


def _on_all_cores(files: list[str], number: int, patience: float) -> Iterator[tuple[int, _Result]]:
    """The position of each file and its answer, as they come."""
    chunks: deque[Sequence[int]] = deque(
        range(start, min(start + CHUNK, len(files))) for start in range(0, len(files), CHUNK)
    )
    suspects: set[int] = set()  # files with which a process died; that may have been for lack of memory
    workers: list[_Worker] = []
    try:
        for _ in range(min(number, len(chunks))):
            workers.append(_Worker())
            workers[-1].give(chunks.popleft(), files)
        while workers:
            wait([handle for worker in workers for handle in (worker.connection, worker.process.sentinel)], timeout=1)
            for place, worker in reversed(list(enumerate(workers))):
                alive = worker.process.is_alive()  # asked before reading: what it sent last is not lost
                yield from worker.answers()
                late = time.monotonic() - worker.last_sign > patience
                if worker.owed and (late or not alive):
                    index = worker.owed.popleft()
                    workers[place] = _successor(worker, chunks)
                    if late or index in suspects:
                        yield index, _blame(patience if late else None)
                    else:
                        suspects.add(index)
                        workers[place].give([index], files)
                elif not worker.owed and chunks:
                    worker.give(chunks.popleft(), files)
                elif not worker.owed:
                    workers.pop(place).stop()
    finally:
        for worker in workers:
            worker.stop()


def _blame(patience: float | None) -> tuple[str, str]:
    what = "crashes the decoder" if patience is None else f"cannot be decoded within {patience:g} seconds"
    return "damaged-image", f"{what}; replace the file or remove it"


def _successor(worker: _Worker, chunks: deque[Sequence[int]]) -> _Worker:
    """A new process in place of the given one, whose other files go back to the chunks."""
    if not worker.ready:
        raise FpnError(
            'processes that decode images cannot be started; a script must call this below if __name__ == "__main__":'
        )
    worker.stop()
    if worker.owed:
        chunks.appendleft(list(worker.owed))
    return _Worker()
