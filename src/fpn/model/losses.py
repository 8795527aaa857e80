"""Loss terms: pure, unweighted, each a mean over the examples that count."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor


def objectness_loss(
    logits: Float[Tensor, "B S"], positive: Bool[Tensor, "B S"], valid: Bool[Tensor, "B S"]
) -> Float[Tensor, ""]:
    """Binary cross-entropy, averaged over the valid examples."""
    loss = F.binary_cross_entropy_with_logits(logits.float(), positive.float(), reduction="none")
    return (loss * valid).sum() / valid.sum().clamp(min=1)


def classification_loss(
    logits: Float[Tensor, "B S K1"], labels: Int64[Tensor, "B S"], valid: Bool[Tensor, "B S"]
) -> Float[Tensor, ""]:
    """Softmax cross-entropy, averaged over the valid examples; K1 is K classes and background last."""
    loss = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none")
    return (loss * valid.flatten()).sum() / valid.sum().clamp(min=1)


def box_loss(
    offsets: Float[Tensor, "B S 4"],
    wanted: Float[Tensor, "B S 4"],
    positive: Bool[Tensor, "B S"],
    valid: Bool[Tensor, "B S"],
    beta: float,
) -> Float[Tensor, ""]:
    """Smooth L1 over the positive examples, divided by the number of all valid ones (Fast R-CNN, eq. 2)."""
    # Padding may hold offsets that are not finite; they must not reach the sum, not even times 0.
    wanted = wanted.masked_fill(~positive[..., None], 0.0)
    loss = F.smooth_l1_loss(offsets.float(), wanted, beta=beta, reduction="none").sum(-1)
    return loss.masked_fill(~positive, 0.0).sum() / valid.sum().clamp(min=1)
