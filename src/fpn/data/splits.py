"""The names of splits, and the seeded split for data that comes without one."""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np

from fpn.data.dataset import Split

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
    note = f"the data has no val split: {len(whole)} images were divided at random (seed {seed}) into {sizes}"
    return {**drawn, **others}, [note]


def draw(split: Split, fractions: dict[str, float], seed: int) -> dict[str, Split]:
    """Divides a split: the given fractions (at least one image each where there are enough), the rest is "train".

    Images are shuffled, lined up by the rarest class they show, and drawn at even distances along this line, so that
    rare classes reach every part. The order of the images within each part is the data's.
    """
    n = len(split)
    counts = {name: max(1, round(fraction * n)) for name, fraction in fractions.items()}
    while sum(counts.values()) >= n:
        counts.popitem()
    line = np.random.default_rng(seed % 2**32).permutation(n)
    line = line[np.argsort(_rarest_class(split)[line], kind="stable")]

    total = sum(counts.values())
    spots = ((np.arange(total) + 0.5) * n / total).astype(np.int64)
    owners = sorted((place, name) for name, count in counts.items() for place in (np.arange(count) + 0.5) / count)
    parts = {"train": np.setdiff1d(np.arange(n), line[spots])}
    for name in counts:
        mine = [spot for spot, (_, owner) in zip(spots, owners, strict=True) if owner == name]
        parts[name] = np.sort(line[mine])
    return {name: split.select(part, name) for name, part in parts.items()}


def _rarest_class(split: Split) -> np.ndarray:
    """Of each image, the rank by rarity of the rarest class in it; images without boxes come last. (I,) int64."""
    number = len(split.classes)
    by_rarity = np.argsort(np.bincount(split.labels, minlength=number), kind="stable")
    rank = np.empty(number, dtype=np.int64)
    rank[by_rarity] = np.arange(number)
    rarest = np.full(len(split), number, dtype=np.int64)
    image_of = np.repeat(np.arange(len(split)), np.diff(split.offsets))
    np.minimum.at(rarest, image_of, rank[split.labels])
    return rarest
