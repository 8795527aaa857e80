"""Many pictures -> predictions, in bounded memory: read ahead, detected in batches of like size, kept as they come.

A run that is stopped goes on where it was, see `fpn.inference.journal`; the files that were asked for are made when all
is done, see `fpn.inference.formats`. Processes that torchrun has started share the pictures.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fpn.data.images import image_size, read_image
from fpn.drawing import draw
from fpn.errors import ImageError, OptionError
from fpn.hardware import pick_workers
from fpn.inference.finder import Finder, check_threshold
from fpn.inference.formats import FORMATS, write
from fpn.inference.journal import Place, Row, append, appending, done_in, journals, rows_at
from fpn.inference.rows import row_of
from fpn.inference.shards import shard
from fpn.structures import Detections
from fpn.words import listed
from fpn.writing import replacing

WINDOW = 64  # batches whose pictures are sorted by shape
AHEAD = 2  # batches that are read before their turn, and that may still be drawn after it
PIXELS = 2**26  # of the pictures in a batch, of those read ahead and of those still drawn; a larger picture is alone
LONGEST = 65_500  # pixels of a side of a JPEG file


@dataclass(frozen=True)
class Predicted:
    """What came of a run: its pictures and objects, the files that could not be read, and the files written."""

    images: int
    objects: int
    unreadable: tuple[str, ...]
    files: tuple[Path, ...]


def predict_files(
    find: Finder,
    files: Sequence[Path],
    out: Path,
    *,
    classes: Sequence[str],
    threshold: float = 0.5,
    batch: int = 4,
    formats: Sequence[str] = ("json",),
    pictures: bool = True,
    about: Mapping[str, Any] | None = None,
    version: Any = None,
    workers: int | None = None,
    progress: bool = True,
) -> Predicted | None:
    """Detections scoring at least `threshold` in many picture files, written to the folder `out` in these formats.

    What is done is kept in `out` as it comes: called again with the same arguments after it was stopped, it goes on.
    classes: the names that labels stand for. batch: pictures that are detected at once. pictures: write each with its
    boxes. about: what else the result depends on, such as the detector; it goes into the files. version: tells one
    state of the detector from another (JSON). workers: threads that read and draw, one a core up to 4 when left out.

    In processes that torchrun has started each does its share; the first writes the files, the others return None.
    Raises OptionError for what cannot work, FpnError where the disk refuses. A picture that cannot be read is named on
    stderr and left out.
    """
    check(threshold, batch, formats)
    about = {**(about or {}), "threshold": threshold}
    run = {**about, "pictures": pictures, "classes": list(classes), "version": version}
    with shard() as own:
        done = done_in(out, run)
        check_same_images(files, done, out)
        names = names_of(files, {file: place.name for file, place in done.items()})
        if pictures:
            check_overwriting(files, names, out)
        if "yolo" in formats:
            check_labels(files, out)
        share = files[own.rank :: own.world]
        before = sum(str(file) in done for file in share)
        if done and own.rank == 0:
            print(
                f"going on: {sum(str(f) in done for f in files):,} of {len(files):,} images are done", file=sys.stderr
            )
        bar = tqdm(total=len(share), initial=before, desc="detecting", unit=" images",
                   disable=None if progress and own.rank == 0 else True)  # fmt: skip
        unreadable: list[str] = []
        with bar, appending(out, run, own.rank) as journal, threads(pick_workers(workers)) as pool:
            images = read_ahead(batches_of(share, done, batch, pool), pool)
            for found in drawn(detected(find, images, threshold, unreadable), names, out if pictures else None, pool):
                append(journal, found)
                bar.update(len(found))
        unreadable = own.gathered(unreadable)
        if own.rank:
            return None
        done = done_in(out, run)
        places = [done[str(file)] for file in files if str(file) in done]
        written = write(formats, lambda: rows_at(places), len(places), out, classes, about, pictures, progress)
        objects = sum(len(row["row"]["detections"]) for row in rows_at(places))
        for file in journals(out):
            file.unlink()
    return Predicted(len(places), objects, tuple(unreadable), tuple(written))


def check(threshold: float, batch: int, formats: Sequence[str]) -> None:
    check_threshold(threshold)
    if batch < 1:
        raise OptionError(f"batch is {batch}: it must be at least 1")
    if not formats or not set(formats) <= set(FORMATS):
        raise OptionError(f"format {' '.join(formats) or 'is empty'}: choose among {listed(FORMATS)}")


def check_overwriting(files: Iterable[Path], names: Mapping[str, str], out: Path) -> None:
    """Raises OptionError where the picture with boxes would take the place of a picture that is looked at."""
    here = {folder for folder in {file.parent for file in files} if folder.resolve() == out.resolve()}
    taken = {f"{name}.jpg" for name in names.values()}
    for file in files:
        if file.parent in here and file.name in taken:
            raise OptionError(f"{file}: a picture with boxes would take its place; choose another folder with --out")


def check_labels(files: Iterable[Path], out: Path) -> None:
    """Raises OptionError where labels would be written over those of the data set that the pictures are of."""
    if (out / "labels").is_dir() and any(out.resolve() in file.resolve().parents for file in files):
        raise OptionError(
            f"{out / 'labels'}: is there already, beside the images, and may be what people have labelled; choose "
            "another folder with --out, or move it away"
        )


def check_same_images(files: Iterable[Path], done: Mapping[str, Place], out: Path) -> None:
    """Raises OptionError where what is done is of other images, and would be lost; some may be gone since."""
    wanted = {str(file) for file in files}
    others = [file for file in done if file not in wanted]
    if others and (len(others) == len(done) or any(Path(file).exists() for file in others)):
        raise OptionError(
            f"{out}: has an unfinished run of other images, such as {others[0]}: repeat the command that began it to "
            f"go on with it, take another --out, or delete {done[others[0]].journal}"
        )


def names_of(files: Iterable[Path], known: Mapping[str, str]) -> dict[str, str]:
    """A name for the results of each file: those of one name in different folders must not overwrite each other."""
    names = dict(known)
    taken = {name.lower() for name in names.values()}
    for file in files:
        if str(file) not in names:
            names[str(file)] = free_name(file.stem, taken)
    return names


def free_name(stem: str, taken: set[str]) -> str:
    """The stem, or stem-2 and so on where that is taken, whatever the case of its letters; it is taken then.

    >>> [free_name(stem, taken) for taken in [set()] for stem in ("a", "A", "b")]
    ['a', 'A-2', 'b']
    """
    name, n = stem, 1
    while name.lower() in taken:
        n += 1
        name = f"{stem}-{n}"
    taken.add(name.lower())
    return name


@contextmanager
def threads(number: int) -> Iterator[ThreadPoolExecutor]:
    """Threads that, where something goes wrong, end with what they have begun."""
    pool = ThreadPoolExecutor(max(1, number))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def batches_of(
    files: Sequence[Path], done: Container[str], size: int, pool: ThreadPoolExecutor
) -> Iterator[tuple[list[Path], int]]:
    """Batches of pictures of like shape, and how many pixels each has, as long as there are any that are not done.

    A picture is in the batch that it would be in if none were done: a run that goes on gives what one gives that was
    never stopped.
    """
    for start in range(0, len(files), WINDOW * size):
        window = files[start : start + WINDOW * size]
        if all(str(file) in done for file in window):
            continue
        sizes = dict(zip(window, pool.map(size_or_nothing, window), strict=True))
        window = sorted(window, key=lambda file: (sizes[file][1] / max(1, sizes[file][0]), sizes[file]))
        for batch, pixels in cut(window, sizes, size):
            left = [file for file in batch if str(file) not in done]
            if left:
                yield left, pixels


def cut(window: Iterable[Path], sizes: Mapping[Path, tuple[int, int]], size: int) -> Iterator[tuple[list[Path], int]]:
    """Batches of `size` files and of `PIXELS` pixels at most, or of one file, with their pixels."""
    batch: list[Path] = []
    pixels = 0
    for file in window:
        more = sizes[file][0] * sizes[file][1]
        if batch and (len(batch) == size or pixels + more > PIXELS):
            yield batch, pixels
            batch, pixels = [], 0
        batch.append(file)
        pixels += more
    if batch:
        yield batch, pixels


def size_or_nothing(file: Path) -> tuple[int, int]:
    """Height and width; of a file that cannot be read 0, for reading it will tell."""
    try:
        return image_size(file)
    except ImageError:
        return 0, 0


def read_ahead(
    batches: Iterable[tuple[list[Path], int]], pool: ThreadPoolExecutor
) -> Iterator[list[tuple[Path, Tensor | ImageError]]]:
    """The pictures of each batch, or why one cannot be read, some batches read before they are asked for."""
    reading: deque[tuple[list[Path], list[Future[Tensor | ImageError]], int]] = deque()

    def first() -> list[tuple[Path, Tensor | ImageError]]:
        files, images, _ = reading.popleft()
        return [(file, image.result()) for file, image in zip(files, images, strict=True)]

    for files, pixels in batches:
        while reading and (len(reading) >= AHEAD or pixels + sum(held for *_, held in reading) > PIXELS):
            yield first()
        reading.append((files, [pool.submit(image_or_error, file) for file in files], pixels))
    while reading:
        yield first()


def image_or_error(file: Path) -> Tensor | ImageError:
    try:
        return read_image(file)
    except ImageError as error:
        return error


def detected(
    find: Finder, batches: Iterable[list[tuple[Path, Tensor | ImageError]]], threshold: float, unreadable: list[str]
) -> Iterator[list[tuple[Path, Tensor, Detections]]]:
    """The pictures of each batch with what is found in them; those that cannot be read are named in `unreadable`."""
    for batch in batches:
        for file, image in batch:
            if isinstance(image, ImageError):
                tqdm.write(f"skipped: {image}", sys.stderr)
                unreadable.append(str(file))
        readable = [(file, image) for file, image in batch if isinstance(image, Tensor)]
        try:
            found = find([image for _, image in readable]) if readable else []
        except torch.OutOfMemoryError as error:
            raise OptionError(
                f"{len(readable)} images at once do not fit into the memory of the device: repeat the command with a "
                "smaller --batch, or --tile, and it goes on from here"
            ) from error
        yield [(file, image, one.above(threshold)) for (file, image), one in zip(readable, found, strict=True)]


def drawn(
    batches: Iterable[list[tuple[Path, Tensor, Detections]]],
    names: Mapping[str, str],
    out: Path | None,
    pool: ThreadPoolExecutor,
) -> Iterator[list[Row]]:
    """A line for the journal of each picture of a batch, once the picture with its boxes stands in the folder `out`.

    Where the batches end with an error or Ctrl-C, what has been detected until then still comes.
    """
    drawing: deque[tuple[list[Future[Row]], int]] = deque()
    stopped: BaseException | None = None
    try:
        for batch in batches:
            pixels = sum(image.shape[1] * image.shape[2] for _, image, _ in batch)
            drawing.append(([pool.submit(row_and_picture, *each, names[str(each[0])], out) for each in batch], pixels))
            del batch  # the pictures are the threads' alone
            while len(drawing) > AHEAD or sum(held for _, held in drawing) > PIXELS:
                yield [row.result() for row in drawing.popleft()[0]]
    except (Exception, KeyboardInterrupt) as error:
        stopped = error
    while drawing:
        yield [row.result() for row in drawing.popleft()[0]]
    if stopped is not None:
        raise stopped


def row_and_picture(file: Path, image: Tensor, found: Detections, name: str, out: Path | None) -> Row:
    if out is not None:
        picture = draw(image, found.boxes, found.labels, found.scores, found.classes, found.masks)
        picture.thumbnail((LONGEST, LONGEST))
        with replacing(out / f"{name}.jpg") as unfinished:
            picture.save(unfinished, format="JPEG", quality=92)
    return {"file": str(file), "name": name, "row": row_of(found, (image.shape[1], image.shape[2]))}
