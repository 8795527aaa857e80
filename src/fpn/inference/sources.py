"""What the inputs of `fpn predict` stand for: pictures, which may be many, and videos, which are named one by one."""

from __future__ import annotations

import glob
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

from fpn.data.files import images_under, is_image_name
from fpn.errors import DataError, OptionError

VIDEO_SUFFIXES = (
    ".mp4",
    ".m4v",
    ".mov",
    ".avi",
    ".mkv",
    ".webm",
    ".mpg",
    ".mpeg",
    ".ts",
    ".mts",
    ".wmv",
    ".flv",
    ".3gp",
)
WEBCAM = "webcam:"  # and its number


def is_video(name: str) -> bool:
    return name.lower().endswith(VIDEO_SUFFIXES) or name.startswith(WEBCAM)


def find_sources(inputs: Iterable[str | Path], out: Path | None = None) -> tuple[list[Path], list[str]]:
    """The pictures and the videos that paths, folders and glob patterns stand for, each once, in the order given.

    Folders are searched through for pictures; of those in `out`, a folder in the one that is searched or that a pattern
    begins with, none is taken: they are results. Raises DataError for a path that is not there, a folder without
    pictures or a pattern that matches nothing.
    """
    pictures: dict[Path, None] = {}
    videos: dict[str, None] = {}
    for entry in inputs:
        if str(entry).startswith(WEBCAM):
            videos[str(entry)] = None
            continue
        found = files_of(Path(entry), out)
        if not found:
            raise DataError(
                f"{entry}: " + ("no images in this folder" if Path(entry).is_dir() else "no such file, folder or match")
            )
        for file in found:
            if is_video(file.name):
                videos[str(file)] = None
            else:
                pictures[file] = None
    return list(pictures), list(videos)


def files_of(entry: Path, out: Path | None) -> list[Path]:
    """The files that one input stands for."""
    if entry.is_dir():
        found = [Path(file) for file in images_under(entry)]
    elif entry.exists():
        return [entry]
    else:
        matches = sorted(glob.glob(str(entry), recursive=True))
        found = [Path(file) for file in matches if is_image_name(file) or is_video(file)]
    results = out.resolve() if out is not None else None
    if results is None or searched(entry).resolve() not in results.parents:
        return found
    return [file for file in found if results not in file.resolve().parents]


def searched(entry: Path) -> Path:
    """The folder that an input is looked for in: itself, or what a pattern begins with."""
    return entry if entry.is_dir() else next(up for up in entry.parents if not glob.has_magic(str(up)))


def check_apart(inputs: Iterable[Path], out: Path) -> None:
    """Raises OptionError where pictures or videos written to `out` would be inputs when the command is repeated."""
    for entry in inputs:
        matches = any(fnmatch(result, entry.name) for result in ("any.jpg", "any.mp4"))
        takes_results = entry.is_dir() or (matches and not entry.exists())
        if takes_results and searched(entry).resolve() == out.resolve():
            raise OptionError(f"{entry}: would hold the results as well; choose another folder with --out")
