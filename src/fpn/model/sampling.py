"""A balanced random choice of examples: (B, S) positions with a mask, so that no shape depends on the data.

The luck of the draw is a function of (key of the image, stage, position of the candidate) in integer arithmetic. It
depends neither on a generator's state nor on the device, nor on which images share the batch: a run that is resumed,
or spread over several processes, chooses the same examples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from fpn.model.matching import BACKGROUND

RPN, BOX_HEAD = 1, 2  # stages that choose examples, each with luck of its own

WORD = 2**32 - 1
Word = TypeVar("Word", int, Tensor)  # numbers from 0 to WORD; tensors of them are int64


@dataclass(frozen=True)
class Sampled:
    """Positions of S examples an image; `valid` tells examples from padding, `positive` objects from background."""

    positions: Int64[Tensor, "B S"]
    valid: Bool[Tensor, "B S"]
    positive: Bool[Tensor, "B S"]

    def take(self, values: Tensor) -> Tensor:
        """The sampled rows of a (B, A) or (B, A, C) tensor."""
        if values.ndim == 2:
            return values.gather(1, self.positions)
        return values.gather(1, self.positions[..., None].expand(-1, -1, values.shape[2]))


@dataclass(frozen=True)
class Examples:
    """S regions an image for the second stage to learn from.

    labels: K is background. truth, index: the box that a positive stands for and its row in the targets; of the others
    any box, and BACKGROUND or IGNORED. chosen: which are positive, and which only padding.
    """

    boxes: Float[Tensor, "B S 4"]
    labels: Int64[Tensor, "B S"]
    truth: Float[Tensor, "B S 4"]
    index: Int64[Tensor, "B S"]
    chosen: Sampled

    def first(self, count: int) -> Examples:
        """The first `count` of each image; as `sample` chooses them, positives come before all others."""
        boxes, labels, truth, index = (part[:, :count] for part in (self.boxes, self.labels, self.truth, self.index))
        chosen = self.chosen
        some = Sampled(chosen.positions[:, :count], chosen.valid[:, :count], chosen.positive[:, :count])
        return Examples(boxes, labels, truth, index, some)


def filled(wanted: Bool[Tensor, "B S"]) -> Int64[Tensor, "B S"]:
    """For each row itself where it is wanted, else one that is, in turn; in an image that has none the first.

    A norm over the batch must not see padding: rows that do not count repeat those that do.
    """
    place = torch.arange(wanted.shape[1], device=wanted.device)
    first = (~wanted).int().argsort(dim=1, stable=True)
    return torch.where(wanted, place, first.gather(1, place % wanted.sum(1, keepdim=True).clamp(min=1)))


def sample(
    matched: Int64[Tensor, "B A"], count: int, positive_fraction: float, keys: Int64[Tensor, " B"], stage: int
) -> Sampled:
    """`count` examples an image, at most `positive_fraction` of them positive, filled up with background.

    `matched` is what `match` returns. Where an image has too few examples the rest is padding. `keys` and `stage`
    decide which examples: see `draw`.
    """
    total = matched.shape[1]
    count = min(count, total)
    luck = draw(keys, stage, total)
    # No two ranks of an image are alike, so every device sorts them alike: positives that are chosen lie above WORD,
    # background from 0 to WORD, everything else below 0.
    none = luck - (WORD + 1)
    best, chosen = torch.where(matched >= 0, luck, none).topk(int(count * positive_fraction), dim=1)
    rank = torch.where(matched == BACKGROUND, luck, none)
    rank = rank.scatter(1, chosen, torch.where(best >= 0, best + (WORD + 1), rank.gather(1, chosen)))
    value, positions = rank.topk(count, dim=1)
    return Sampled(positions, valid=value >= 0, positive=value > WORD)


def draw(keys: Int64[Tensor, " B"], stage: int, count: int) -> Int64[Tensor, "B A"]:
    """Luck from 0 to 2**32 - 1 for `count` candidates of each image, no two of one image alike.

    The same for the same key, stage and position, everywhere.
    """
    position = mix(torch.arange(count, device=keys.device))
    image = mix(keys & WORD ^ mix(keys >> 32 & WORD ^ mix(stage)))
    return mix(image[:, None] ^ position)


def mix(x: Word) -> Word:
    """A permutation of the 32-bit numbers that looks random: the finalizer of MurmurHash3 (Appleby, public domain).

    In 64 bits that never overflow: the multipliers are 0x85EBCA6B and 0xC2B2AE35, less 2**32.
    """
    x = x ^ x >> 16
    x = x * -0x7A143595 & WORD
    x = x ^ x >> 13
    x = x * -0x3D4D51CB & WORD
    return x ^ x >> 16
