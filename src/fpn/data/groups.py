"""Which images belong together, such as those of one patient or one film, told by file names or by a table."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fpn.errors import DataError, OptionError


def groups_by_pattern(files: Sequence[str], pattern: str) -> np.ndarray:
    """The group of each image, (I,) int64 from 0: what the first bracket of `pattern`, or all of it, matches.

    The regular expression is searched in the file's name, and where it is not there, in its path inside the data set.

    Raises:
        OptionError: not a regular expression.
        DataError: a file does not match.
    """
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise OptionError(f"--group {pattern!r} is not a regular expression: {error}") from error
    names: list[str] = []
    unmatched: list[str] = []
    for file in files:
        match = expression.search(os.path.basename(file)) or expression.search(file.replace(os.sep, "/"))
        if match is None:
            unmatched.append(file)
        else:
            names.append(next((part for part in match.groups() if part is not None), match[0]))
    if unmatched:
        raise DataError(
            f"{unmatched[0]}: does not match --group {pattern!r}, nor do {len(unmatched) - 1} more of {len(files)} "
            "images; widen the pattern, so that every image has a group"
        )
    return np.unique(np.array(names), return_inverse=True)[1].astype(np.int64)


def groups_by_table(files: Sequence[str], table: Path) -> np.ndarray:
    """The group of each image, (I,) int64 from 0, from a CSV file with the columns file and group.

    `file` is the path inside the data set or the bare name.

    Raises:
        DataError: the table cannot be read, has no such columns, or an image is missing or has two groups.
    """
    wanted = _read_table(table)
    names: list[str] = []
    missing: list[str] = []
    for file in (file.replace(os.sep, "/") for file in files):
        group = wanted.get(file, wanted.get(os.path.basename(file)))
        if group is None:
            missing.append(file)
        else:
            names.append(group)
    if missing:
        raise DataError(
            f"{table}: has no row for {missing[0]}, nor for {len(missing) - 1} more of {len(files)} images; "
            "add a row with file and group for each"
        )
    return np.unique(np.array(names), return_inverse=True)[1].astype(np.int64)


def _read_table(table: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    try:
        with table.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream)
            if not {"file", "group"} <= set(reader.fieldnames or ()):
                columns = ", ".join(reader.fieldnames or ()) or "none"
                raise DataError(f"{table}: needs the columns file and group, separated by commas; it has {columns}")
            for row in reader:
                file, group = (row["file"] or "").replace("\\", "/"), row["group"] or ""
                if not file or not group:
                    raise DataError(f"{table}: line {reader.line_num} has no file or no group; complete it")
                if found.setdefault(file, group) != group:
                    known = found[file]
                    raise DataError(f"{table}: line {reader.line_num}: {file} is in {known!r} and {group!r}; keep one")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{table}: cannot be read as a CSV table ({error})") from error
    return found
