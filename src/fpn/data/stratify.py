"""Dividing images into parts that each hold close to their share of everything: of images, boxes and every class.

A greedy form of iterative stratification (Sechidis, Tsoumakas and Vlahavas, 2011) that counts boxes, not only whether
an image shows a class, and keeps groups of images together.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fpn.data.dataset import Split

EXCHANGED = 50_000_000  # groups^2 x kinds up to which exchanging takes less than a second
SWEEPS = 3


@dataclass(frozen=True)
class _Contents:
    """What each of G groups holds of each of C kinds, as fractions of all there is; group g is offsets[g]:[g + 1]."""

    offsets: np.ndarray  # (G + 1,) int64
    kinds: np.ndarray  # (N,) int64
    fractions: np.ndarray  # (N,) float64
    number: int  # C
    images: np.ndarray  # (G,) int64: how many images a group has


def stratify(split: Split, counts: np.ndarray, seed: int, groups: np.ndarray | None = None) -> np.ndarray:
    """The part, 0..P-1, of each image, (I,) int64; part p gets counts[p] images (with `groups`, about as many).

    Groups, rarest class and fullest first, go one by one to the part in which they least increase
    sum over kinds k and parts p of (share of k that p holds - f_p)^2 / f_p, where f_p is the part's share of images.
    Kinds are the images, the boxes, each class's boxes, and the images with about n boxes (n in powers of two). In
    small data sets, where single images matter, pairs are then exchanged as long as this lowers the sum.

    Args:
        split: all the images, at least P.
        counts: (P,) int64, at least 1 each, the number of images in sum.
        seed: decides between alike images.
        groups: (I,) int64, the group of each image, 0..G-1, each number in use; images of one group stay together.
    """
    groups = np.arange(len(split)) if groups is None else groups
    contents = _contents(split, groups)
    part_of, held = _assign(contents, _order(split, groups, contents, seed), counts)
    if len(part_of) ** 2 * contents.number <= EXCHANGED:
        _exchange(contents, counts / counts.sum(), part_of, held)
    return part_of[groups]


def _assign(contents: _Contents, order: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The part of each group, (G,) int64, and the share of each kind that each part holds, (P, C)."""
    shares, room = counts / counts.sum(), counts.astype(np.int64).copy()
    held = np.zeros((len(counts), contents.number))
    part_of = np.empty(len(order), dtype=np.int64)
    empty = np.ones(len(counts), dtype=bool)
    for left, group in zip(range(len(order), 0, -1), order.tolist(), strict=True):
        rows = slice(contents.offsets[group], contents.offsets[group + 1])
        kinds, fractions = contents.kinds[rows], contents.fractions[rows]
        # What the sum grows by, less a term that is the same for all parts.
        cost = (fractions @ fractions + 2 * (held[:, kinds] @ fractions)) / shares
        allowed = room >= contents.images[group]
        if left <= empty.sum():  # no part may stay empty
            allowed = empty
        part = int((np.where(allowed, cost, np.inf) if allowed.any() else cost).argmin())
        part_of[group], empty[part] = part, False
        held[part, kinds] += fractions
        room[part] -= contents.images[group]
    return part_of, held


def _exchange(contents: _Contents, shares: np.ndarray, part_of: np.ndarray, held: np.ndarray) -> None:
    """Lets each group in turn change places with the group of another part that lowers the sum most, in place."""
    number = len(part_of)
    fractions = np.zeros((number, contents.number))
    fractions[np.repeat(np.arange(number), np.diff(contents.offsets)), contents.kinds] = contents.fractions
    for _ in range(SWEEPS):
        before = part_of.copy()
        for group in range(number):
            own = part_of[group]
            change = fractions - fractions[group]  # what the own part would gain and the other lose
            slope = held / shares[:, None] - 1
            gain = (change**2).sum(axis=1) * (1 / shares[own] + 1 / shares[part_of])
            gain += 2 * (change * (slope[own] - slope[part_of])).sum(axis=1)
            gain[part_of == own] = 0
            other = int(gain.argmin())
            if gain[other] < -1e-12:
                held[own] += change[other]
                held[part_of[other]] -= change[other]
                part_of[group], part_of[other] = part_of[other], own
        if np.array_equal(before, part_of):
            break


def _contents(split: Split, groups: np.ndarray) -> _Contents:
    per_image = np.diff(split.offsets)
    levels = np.ceil(np.log2(per_image + 1)).astype(np.int64)
    first_level, first_class = 2, 3 + int(levels.max())
    number = first_class + len(split.classes)
    group_of_box = np.repeat(groups, per_image)
    keys = np.concatenate(
        [
            groups * number,  # kind 0: an image
            group_of_box * number + 1,  # kind 1: a box
            groups * number + first_level + levels,
            group_of_box * number + first_class + split.labels,
        ]
    )
    entries, amounts = np.unique(keys, return_counts=True)
    holders, kinds = entries // number, entries % number
    images = np.bincount(groups)
    return _Contents(
        offsets=np.searchsorted(holders, np.arange(len(images) + 1)),
        kinds=kinds,
        fractions=amounts / np.bincount(kinds, amounts, minlength=number)[kinds],
        number=number,
        images=images,
    )


def _order(split: Split, groups: np.ndarray, contents: _Contents, seed: int) -> np.ndarray:
    """(G,) int64: the groups with the rarest classes first, among these the fullest, at random where they are alike."""
    number = len(split.classes)
    by_rarity = np.argsort(np.bincount(split.labels, minlength=number), kind="stable")
    rank = np.empty(number, dtype=np.int64)
    rank[by_rarity] = np.arange(number)
    group_of_box = np.repeat(groups, np.diff(split.offsets))
    rarest = np.full(len(contents.images), number, dtype=np.int64)
    np.minimum.at(rarest, group_of_box, rank[split.labels])
    boxes = np.bincount(group_of_box, minlength=len(contents.images))
    fullness = np.ceil(np.log2(boxes + contents.images))
    chance = np.random.default_rng(seed % 2**32).random(len(contents.images))
    return np.lexsort((chance, -fullness, rarest))
