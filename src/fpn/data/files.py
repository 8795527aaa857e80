"""Finding files: one scan a folder, however many images it holds."""

from __future__ import annotations

import os
from pathlib import Path

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".dib", ".tif", ".tiff", ".webp", ".gif"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".avif", ".tga"),
)


def is_image_name(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES)


class Listing:
    """Which files exist, from one scan of each folder asked about: 100,000 stats are slow on network disks."""

    def __init__(self) -> None:
        self._names: dict[str, frozenset[str]] = {}

    def names(self, folder: str | os.PathLike[str]) -> frozenset[str]:
        """The names of the files in `folder`, without devices and pipes; empty if there is no such folder."""
        key = os.path.normpath(folder)
        if key not in self._names:
            try:
                with os.scandir(key) as entries:
                    self._names[key] = frozenset(entry.name for entry in entries if entry.is_file())
            except (
                OSError,
                ValueError,
            ):  # ValueError: names that no file can have, with a NUL or half a surrogate pair
                self._names[key] = frozenset()
        return self._names[key]

    def __contains__(self, path: str | os.PathLike[str]) -> bool:
        folder, name = os.path.split(os.fspath(path))
        return name in self.names(folder)


def images_under(folder: Path, listing: Listing | None = None) -> list[str]:
    """All image files in `folder` and the folders below it, sorted. Links are followed, but no folder counts twice."""
    listing = listing or Listing()
    found: list[str] = []
    seen: set[tuple[int, int]] = set()
    for at, folders, _ in os.walk(folder, followlinks=True):
        status = os.stat(at)
        identity = (status.st_dev, status.st_ino)
        folders[:] = [] if identity in seen else sorted(name for name in folders if not name.startswith("."))
        if identity not in seen:
            names = (name for name in listing.names(at) if is_image_name(name) and not name.startswith("."))
            found += [os.path.join(at, name) for name in names]
        seen.add(identity)
    return sorted(found)


def files_in(folder: Path, *suffixes: str) -> list[Path]:
    """The regular files of `folder` with one of the suffixes, sorted; none if there is no such folder."""
    return [folder / name for name in sorted(Listing().names(folder)) if name.endswith(suffixes)]


def inside(path: str, folder: str) -> bool:
    """Whether `path` lies in `folder`, both absolute and without "..". Links are taken for what they stand for: they
    were made by someone with access to the disk, not by an annotation."""
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)
