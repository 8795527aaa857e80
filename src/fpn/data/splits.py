"""The names of splits, and dividing data into them: anew, or where it comes without a val split."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np

from fpn.data.dataset import Data, Split
from fpn.data.groups import groups_by_pattern, groups_by_table
from fpn.data.outlines import join
from fpn.data.stratify import stratify
from fpn.errors import DataError, OptionError
from fpn.words import counted

ALIASES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
UNSPLIT = "all"  # what readers call a set for which the data names no split
ORDER = ("train", "val", "test")
_OF_SPLITS = ("no box of ", "the data has no val split", "one image is too few")  # so begin notes about splits as read


def canonical(text: str) -> str | None:
    """The split that a file or folder name speaks of: "instances_train2017" -> "train", "valid" -> "val", else None."""
    words = re.split(r"[^a-z]+", text.lower())
    return next((ALIASES[word] for word in words if word in ALIASES), None)


def ordered(names: Iterable[str]) -> list[str]:
    """train, val, test first, then the others as they come."""
    names = list(names)
    return [name for name in ORDER if name in names] + [name for name in names if name not in ORDER]


def add_missing(splits: dict[str, Split], seed: int) -> tuple[dict[str, Split], list[str]]:
    """The splits with a val (and, of one unsplit set, a test) drawn from the training images, and notes that say so.

    One set that is not called val or test is split 80/10/10; where only val is missing, it is a tenth of train.
    """
    if "val" in splits:
        return splits, []
    if len(splits) == 1 and "test" not in splits:
        (whole,) = splits.values()
        parts = ("val", "test")
    elif "train" in splits:
        whole = splits["train"]
        parts = ("val",)
    else:
        return splits, []
    if len(whole) < 2:
        alone = {name: split for name, split in splits.items() if split is not whole}
        train = whole.select(np.arange(len(whole)), "train")
        return {"train": train, **alone}, ["one image is too few to draw a val split from"]

    drawn = draw(whole, {name: 0.1 for name in parts}, seed)
    others = {name: split for name, split in splits.items() if split is not whole}
    sizes = ", ".join(f"{name} {len(split)}" for name, split in drawn.items())
    note = f"the data has no val split: {len(whole):,} images were divided by class (seed {seed}) into {sizes}"
    return {**drawn, **others}, [note]


def draw(split: Split, fractions: dict[str, float], seed: int, groups: np.ndarray | None = None) -> dict[str, Split]:
    """Divides a split: the given fractions (at least one image each where there are enough), the rest is "train".

    Every part gets close to its share of each class's boxes and of full and empty images, see `stratify`. The order of
    the images within each part is the data's.
    """
    n = len(split)
    counts = {name: max(1, round(fraction * n)) for name, fraction in fractions.items()}
    while sum(counts.values()) >= n:
        largest = max(counts, key=lambda name: counts[name])
        if counts[largest] > 1:
            counts[largest] -= 1
        else:
            counts.popitem()
    counts = {"train": n - sum(counts.values()), **counts}
    part_of = stratify(split, np.array(list(counts.values())), seed, groups)
    return {name: split.select(np.flatnonzero(part_of == part), name) for part, name in enumerate(counts)}


def split(
    data: Data,
    val: float = 0.1,
    test: float = 0.1,
    seed: int = 0,
    group: str | None = None,
    group_file: str | os.PathLike[str] | None = None,
) -> Data:
    r"""All images of a data set divided anew into train, val and test, balanced by class and by objects an image.

    Args:
        data: as loaded; the splits it has do not matter.
        val: share of the images in the val split, 0 for none.
        test: share of the images in the test split, 0 for none.
        seed: the same seed gives the same splits.
        group: a regular expression; images whose file names give the same first bracket (or whole match) stay in one
            split, such as "^(patient\d+)_".
        group_file: a CSV file with the columns file and group, instead of `group`.

    Raises:
        OptionError: shares that leave nothing to train on, or both ways to group.
        DataError: fewer images or groups than splits, or an image without a group.
    """
    if not (val >= 0 and test >= 0 and val + test < 1):
        raise OptionError(f"val {val:g} and test {test:g} must be shares from 0 that sum to less than 1")
    if group is not None and group_file is not None:
        raise OptionError("give --group or --group-file, not both")
    fractions = {name: share for name, share in (("val", val), ("test", test)) if share}
    whole, notes = _union(data)
    notes = [note for note in data.notes if not note.startswith(_OF_SPLITS)] + notes
    groups = None
    if group is not None:
        groups = groups_by_pattern(whole.files.tolist(), group)
    elif group_file is not None:
        groups = groups_by_table(whole.files.tolist(), Path(group_file))
    number = len(whole) if groups is None else int(groups.max()) + 1
    if number <= len(fractions):
        what = ("image", "images") if groups is None else ("group of images", "groups of images")
        raise DataError(f"{data.path}: has {counted(number, *what)}, too few for {len(fractions) + 1} splits")
    if groups is not None:
        notes.append(f"{counted(number, 'group')}, each in one split")
    splits = draw(whole, fractions, seed, groups)
    return replace(data, splits=splits, notes=notes + _absent(splits, whole))


def _absent(splits: dict[str, Split], whole: Split) -> list[str]:
    """Notes on classes that the data has but a split has not."""
    notes = []
    for name, split in splits.items():
        labels = np.setdiff1d(whole.labels, split.labels).tolist()
        if labels:
            names = ", ".join(whole.classes[label] for label in labels[:5]) + ", ..." * (len(labels) > 5)
            amount = counted(len(labels), "class", "classes")
            notes.append(f"{name} has no box of {amount} ({names}): too few images or groups show them")
    return notes


def _union(data: Data) -> tuple[Split, list[str]]:
    """All images of all splits, each file once, and notes on what that changed."""
    splits = list(data.values())
    root, notes = splits[0].root, []
    paths = [os.path.normpath(split.path(index)) for split in splits for index in range(len(split))]
    everything = Split(
        name=UNSPLIT,
        classes=data.classes,
        category_ids=splits[0].category_ids,
        root=root,
        files=np.array([os.path.relpath(path, root) for path in paths], dtype=np.str_),
        image_ids=np.concatenate([split.image_ids for split in splits]),
        sizes=np.concatenate([split.sizes for split in splits]),
        offsets=np.concatenate([[0], np.cumsum(np.concatenate([np.diff(split.offsets) for split in splits]))]),
        boxes=np.concatenate([split.boxes for split in splits]),
        labels=np.concatenate([split.labels for split in splits]),
        ignore=np.concatenate([split.ignore for split in splits]),
        areas=np.concatenate([split.areas for split in splits]),
        outlines=join((split.outlines, len(split.boxes)) for split in splits),
    )
    # The same images in the same order whatever splits they came in, so that dividing again gives the same.
    kept = np.unique(everything.files, return_index=True)[1]
    if len(kept) < len(paths):
        several = len(paths) - len(kept)
        images = "1 image is" if several == 1 else f"{several:,} images are"
        notes.append(f"{images} in several splits of the data; each is taken once")
    whole = everything.select(kept, UNSPLIT)
    if len(np.unique(whole.image_ids)) < len(kept):
        whole = replace(whole, image_ids=np.arange(1, len(kept) + 1))
        notes.append("splits of the data use the same image ids; the images are numbered anew")
    return whole, notes
