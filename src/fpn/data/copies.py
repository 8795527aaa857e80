"""A copy of a data set's images in a new folder: whole or not at all, under names that every format can hold."""

from __future__ import annotations

import os
import re
import shutil
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from fpn.data.dataset import Data
from fpn.data.splits import canonical
from fpn.errors import DataError, FpnError, ImageError, OptionError

# Line ends and other control characters, lone surrogates (names that are not UTF-8) and what XML forbids.
_UNSAFE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufffe\uffff]")
_IMAGE_FOLDERS = ("images", "jpegimages", "data")


@contextmanager
def new_folder(out: str | os.PathLike[str], data: Data) -> Iterator[Path]:
    """A folder to write to instead of `out`, which takes its place once all is written; else nothing stays.

    Raises:
        OptionError: `out` is a file, has something in it, or lies inside the data.
        FpnError: the disk refuses (full, no permission). Errors about files elsewhere pass as they are.
    """
    out = Path(os.path.abspath(Path(out).expanduser()))
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise OptionError(f"{out}: is there already and not an empty folder; give --out another name, or empty it")
    for root in {split.root for split in data.values()}:
        if Path(os.path.realpath(out)).is_relative_to(os.path.realpath(root)):
            raise OptionError(f"{out}: lies inside the data ({root}); give --out a folder elsewhere")
    unfinished = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    new_parents = [folder for folder in out.parents if not folder.exists()]
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        if out.is_dir():
            out.rmdir()
        unfinished.rename(out)
    except OSError as error:
        files = [Path(os.fsdecode(name)) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
        if files and not any(file == out or file.is_relative_to(unfinished) or file in out.parents for file in files):
            raise
        raise FpnError(f"{out}: cannot be written ({error}); nothing was left there") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        for folder in new_parents:
            with suppress(OSError):  # those that hold what was written are not empty, and stay
                folder.rmdir()


def place_images(pairs: Sequence[tuple[Path, Path]]) -> None:
    """Puts each source image at its target: a hard link where the disk can, which takes no room, else a copy.

    Raises ImageError for a source that is not there or may not be read, OSError where the target cannot be written.
    """
    for folder in dict.fromkeys(target.parent for _, target in pairs):
        folder.mkdir(parents=True, exist_ok=True)
    for source, target in tqdm(pairs, "images", delay=1, leave=False):
        real = os.path.realpath(source)  # a link to a link would lead nowhere from the new folder
        try:
            os.link(real, target)
        except OSError:
            _copy(Path(real), target, source)


def _copy(real: Path, target: Path, source: Path) -> None:
    try:
        shutil.copyfile(real, target)
    except OSError as error:
        if os.access(real, os.R_OK):
            raise
        raise ImageError(f"{source}: cannot be read ({error.strerror}); the image was there before") from error


def new_names(files: Iterable[str], mend: Callable[[str], str] = str, key: Callable[[str], str] = str) -> list[str]:
    """For image files relative to their data set, the names in a copy, relative to its folder of images.

    Folders that say only "images" or name a split are dropped where the names stay apart without them
    (train2017/a.jpg -> a.jpg). `mend` makes a name fit for the format; no two names have the same `key`, also not on
    disks that take A for a: later ones get _2, _3 and so on.
    """
    paths = [PurePosixPath(_UNSAFE.sub("_", file.replace(os.sep, "/")).replace("\\", "_")) for file in files]
    names = [mend("/".join(_parts(path, False))) for path in paths]
    if len({_folded(key(name)) for name in names}) < len(names):
        names = [mend("/".join(_parts(path, True))) for path in paths]
    taken = {_folded(key(name)) for name in names}
    seen: set[str] = set()
    for index, name in enumerate(names):
        path, number, at = PurePosixPath(name), 1, _folded(key(name))
        while at in seen or (number > 1 and at in taken):
            number += 1
            names[index] = str(path.with_name(f"{path.stem}_{number}{path.suffix}"))
            at = _folded(key(names[index]))
        seen.add(at)
    return names


def _parts(path: PurePosixPath, tell_splits: bool) -> list[str]:
    """The parts of a name without leading dots (hidden files) and without leading folders that tell nothing."""
    folders = [part.lstrip(".").strip() for part in path.parts[:-1]]
    folders = [part for part in folders if part.strip("/")]
    while folders and (folders[0].lower() in _IMAGE_FOLDERS or (not tell_splits and canonical(folders[0]))):
        del folders[0]
    return [*folders, path.name.lstrip(".").strip() or "image"]


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def check_class_names(data: Data) -> None:
    """Refuses class names that would not come back from a text file as they are.

    Raises:
        DataError: a name is empty, has blanks at its ends or control characters.
    """
    for name in data.classes:
        if not name or name != name.strip() or _UNSAFE.search(name):
            reason = "is empty, has blanks at its ends or characters that no text file holds"
            raise DataError(f"{data.path}: the class name {name!r} {reason}; rename the class")
