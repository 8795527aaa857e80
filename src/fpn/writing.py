"""Files that are there whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fpn.errors import FpnError

UMASK = os.umask(0)  # can only be read by setting it
os.umask(UMASK)


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A path to write to instead of `path`, which takes its place once all is written; folders are made.

    Where writing fails, what stood at `path` is untouched and nothing unfinished is left. A disk's refusal (full, no
    permission) is raised as FpnError.
    """
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield unfinished
        os.chmod(unfinished, 0o666 & ~UMASK)  # some writers make files that only their owner can read
        os.replace(unfinished, path)
    except OSError as error:
        raise FpnError(f"{path}: cannot be written ({error}); what was there before is untouched") from error
    finally:
        if unfinished.is_file():
            unfinished.unlink()


def write_json(path: str | Path, content: Any, indent: int | None = None) -> None:
    with replacing(path) as unfinished:
        unfinished.write_text(json.dumps(content, indent=indent, ensure_ascii=False), encoding="utf-8")
