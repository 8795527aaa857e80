"""A balanced random choice of examples: (B, S) positions with a mask, so that no shape depends on the data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from fpn.model.matching import BACKGROUND


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


def sample(matched: Int64[Tensor, "B A"], count: int, positive_fraction: float) -> Sampled:
    """`count` examples an image, at most `positive_fraction` of them positive, filled up with background.

    `matched` is what `match` returns. Where an image has too few examples the rest is padding.
    """
    total = matched.shape[1]
    count = min(count, total)
    luck = torch.rand(matched.shape, device=matched.device)
    positive = matched >= 0
    luck_of_positives, chosen = torch.where(positive, luck, -1.0).topk(
        min(int(count * positive_fraction), total), dim=1
    )
    # Chosen positives rank above all background (2 > luck), everything else below it.
    rank = torch.where(matched == BACKGROUND, luck, -1.0)
    rank = rank.scatter(1, chosen, torch.where(luck_of_positives >= 0, 2.0, rank.gather(1, chosen)))
    value, positions = rank.topk(count, dim=1)
    return Sampled(positions, valid=value >= 0, positive=value == 2.0)
