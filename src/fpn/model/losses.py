"""Loss terms: pure, unweighted, each a sum over the examples that count, divided by `count`."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor


def number_of(examples: Bool[Tensor, "B S"]) -> Float[Tensor, ""]:
    """How many examples there are, at least 1; where several processes train together, the mean over them.

    Data-parallel training averages gradients over the processes. Sums divided by this mean make that average exactly
    the gradient of one process with all the images. All processes must call this equally often. Without gradients, as
    in measuring a loss, a process counts for itself and waits for no other.
    """
    count, processes = examples.sum().float(), 1
    if torch.is_grad_enabled() and dist.is_available() and dist.is_initialized():
        dist.all_reduce(count)
        processes = dist.get_world_size()
    return count.clamp(min=1) / processes


def objectness_loss(
    logits: Float[Tensor, "B S"],
    positive: Bool[Tensor, "B S"],
    valid: Bool[Tensor, "B S"],
    count: Float[Tensor, ""],
) -> Float[Tensor, ""]:
    """Binary cross-entropy of the valid examples."""
    loss = F.binary_cross_entropy_with_logits(logits.float(), positive.float(), reduction="none")
    return (loss * valid).sum() / count


def classification_loss(
    logits: Float[Tensor, "B S K1"],
    labels: Int64[Tensor, "B S"],
    valid: Bool[Tensor, "B S"],
    count: Float[Tensor, ""],
) -> Float[Tensor, ""]:
    """Softmax cross-entropy of the valid examples; K1 is K classes and background last."""
    loss = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none")
    return (loss * valid.flatten()).sum() / count


def box_loss(
    offsets: Float[Tensor, "B S 4"],
    wanted: Float[Tensor, "B S 4"],
    positive: Bool[Tensor, "B S"],
    beta: float,
    count: Float[Tensor, ""],
) -> Float[Tensor, ""]:
    """Smooth L1 of the positive examples; `count` is that of all valid ones (Fast R-CNN, eq. 2)."""
    # Padding may hold offsets that are not finite; they must not reach the sum, not even times 0.
    wanted = wanted.masked_fill(~positive[..., None], 0.0)
    loss = F.smooth_l1_loss(offsets.float(), wanted, beta=beta, reduction="none").sum(-1)
    return loss.masked_fill(~positive, 0.0).sum() / count
