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
        """The names of the files in `folder`; empty if there is no such folder."""
        key = os.path.normpath(folder)
        if key not in self._names:
            try:
                with os.scandir(key) as entries:
                    self._names[key] = frozenset(entry.name for entry in entries if entry.is_file())
            except OSError:
                self._names[key] = frozenset()
        return self._names[key]

    def __contains__(self, path: str | os.PathLike[str]) -> bool:
        folder, name = os.path.split(os.fspath(path))
        return name in self.names(folder)


def images_under(folder: Path) -> list[str]:
    """All image files in `folder` and the folders below it, sorted."""
    found = []
    for at, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [os.path.join(at, name) for name in names if is_image_name(name) and not name.startswith(".")]
    return sorted(found)
