"""Loss terms: pure, unweighted, each a sum over the examples that count, divided by `count`."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor


def number_of(examples: Bool[Tensor, "B S"] | Float[Tensor, "B S"]) -> Float[Tensor, ""]:
    """How many examples there are, or their weight, at least 1; where several processes train together, the mean.

    Data-parallel training averages gradients over the processes. Sums divided by this mean make that average exactly
    the gradient of one process with all the images. All processes must call this equally often. Without gradients, as
    in measuring a loss, a process counts for itself and waits for no other.
    """
    count, processes = examples.sum().float(), 1
    if torch.is_grad_enabled() and dist.is_available() and dist.is_initialized():
        dist.all_reduce(count)
        processes = dist.get_world_size()
    return count.clamp(min=1) / processes


def number_of_each(examples: Bool[Tensor, "B S"]) -> Float[Tensor, " B"]:
    """The examples of each image, at least 1, times B: what makes a loss the mean of the images' own losses."""
    return examples.sum(1).float().clamp(min=1) * len(examples)


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
    count: Float[Tensor, "*_"],
) -> Float[Tensor, ""]:
    """Smooth L1 of the positive examples; `count` is that of all valid ones (Fast R-CNN, eq. 2)."""
    # Padding may hold offsets that are not finite; they must not reach the sum, not even times 0.
    wanted = wanted.masked_fill(~positive[..., None], 0.0)
    loss = F.smooth_l1_loss(offsets.float(), wanted, beta=beta, reduction="none").sum(-1)
    return over(loss.masked_fill(~positive, 0.0), count)


def focal_loss(
    logits: Float[Tensor, "B S K"],
    labels: Int64[Tensor, "B S"],
    valid: Bool[Tensor, "B S"],
    alpha: float,
    gamma: float,
    count: Float[Tensor, "*_"],
) -> Float[Tensor, ""]:
    """Focal loss of the valid examples, each class by itself; a label of -1 is of no class (RetinaNet, Eq. 5)."""
    own = labels[..., None] == torch.arange(logits.shape[-1], device=logits.device)
    # With x turned so that large is wrong, -log(p_t) is softplus(x), and 1 - p_t is sigmoid(x).
    wrong = torch.where(own, -logits, logits).float()
    loss = F.softplus(wrong) * wrong.sigmoid() ** gamma * torch.where(own, alpha, 1 - alpha)
    return over(loss.sum(-1).masked_fill(~valid, 0.0), count)


def giou_loss(
    boxes: Float[Tensor, "B S 4"],
    wanted: Float[Tensor, "B S 4"],
    positive: Bool[Tensor, "B S"],
    count: Float[Tensor, "*_"],
    weights: Float[Tensor, "B S"] | None = None,
) -> Float[Tensor, ""]:
    """1 - GIoU of the positive examples (Rezatofighi et al. 2019, algorithm 1), each times its weight."""
    eps = 1e-7  # a box may be empty
    low, high = boxes.float().split(2, dim=-1)
    wanted_low, wanted_high = wanted.split(2, dim=-1)
    overlap = (torch.minimum(high, wanted_high) - torch.maximum(low, wanted_low)).clamp(min=0)
    overlap, own, other = (product(sides) for sides in (overlap, high - low, wanted_high - wanted_low))
    union = own + other - overlap
    hull = product(torch.maximum(high, wanted_high) - torch.minimum(low, wanted_low))
    loss = 1 - overlap / (union + eps) + (hull - union) / (hull + eps)
    loss = loss if weights is None else loss * weights
    return over(loss.masked_fill(~positive, 0.0), count)


def product(sides: Float[Tensor, "B S 2"]) -> Float[Tensor, "B S"]:
    """Width times height. `prod` looks for zeros in its backward pass, for which the host waits."""
    width, height = sides.unbind(-1)
    return width * height


def centerness_loss(
    logits: Float[Tensor, "B S"],
    wanted: Float[Tensor, "B S"],
    positive: Bool[Tensor, "B S"],
    count: Float[Tensor, ""],
) -> Float[Tensor, ""]:
    """Binary cross-entropy of the positive examples' centerness, which is between 0 and 1 (FCOS, section 3.3)."""
    wanted = wanted.masked_fill(~positive, 0.0)
    loss = F.binary_cross_entropy_with_logits(logits.float(), wanted, reduction="none")
    return over(loss.masked_fill(~positive, 0.0), count)


def over(loss: Float[Tensor, "B S"], count: Float[Tensor, "*_"]) -> Float[Tensor, ""]:
    """The sum of all examples over their number, or of each image over the number of that image."""
    return loss.sum() / count if count.ndim == 0 else (loss.sum(1) / count).sum()
