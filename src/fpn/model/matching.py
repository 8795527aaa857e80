"""Which ground-truth box each anchor or region stands for, by IoU."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from fpn.boxes import iou

BACKGROUND = -1  # matches nothing: a negative example
IGNORED = -2  # neither positive nor negative: no example at all

# IoUs computed at once, over the whole batch: bounds memory where images hold thousands of boxes.
CHUNK = 2**22


def match(
    truth: Float[Tensor, "B N 4"],
    truth_valid: Bool[Tensor, "B N"],
    candidates: Float[Tensor, "#B A 4"],
    positive: float,
    negative: float,
    keep_best: bool,
) -> Int64[Tensor, "B A"]:
    """For each candidate the index of its ground-truth box, or BACKGROUND or IGNORED.

    A candidate is positive at IoU >= `positive` with some box, background below `negative` with all, ignored between.
    With `keep_best` the candidates that overlap a box most are positive however low that is (paper, section 4.1), and
    each takes the box it overlaps most itself, as Faster R-CNN does.
    """
    (batch, count), anchors = truth_valid.shape, candidates.shape[1]
    best = candidates.new_full((batch, anchors), -1.0)
    index = torch.zeros((batch, anchors), dtype=torch.int64, device=truth.device)
    forced = torch.zeros((batch, anchors), dtype=torch.bool, device=truth.device)
    step = max(1, CHUNK // max(1, batch * anchors))
    for start in range(0, count, step):
        some, valid = truth[:, start : start + step], truth_valid[:, start : start + step, None]
        overlap = iou(some, candidates).masked_fill_(~valid, -1.0)
        value, which = overlap.max(dim=1)
        better = value > best
        index = torch.where(better, which + start, index)
        best = torch.where(better, value, best)
        if keep_best:
            highest = overlap.amax(dim=2, keepdim=True)
            forced |= (overlap == highest.masked_fill(highest <= 0, torch.inf)).any(dim=1)
    state = torch.where(best < positive, IGNORED, index)
    state = torch.where(best < negative, BACKGROUND, state)
    return torch.where(forced, index, state)


def truth_of(boxes: Float[Tensor, "B N 4"], index: Int64[Tensor, "B S"]) -> Float[Tensor, "B S 4"]:
    """The ground-truth box that each candidate stands for; any box where it is not positive, 0 where there is none."""
    if not boxes.shape[1]:
        return boxes.new_zeros((*index.shape, 4))
    return boxes.gather(1, index.clamp(min=0)[..., None].expand(-1, -1, 4))


def labels_of(labels: Int64[Tensor, "B N"], index: Int64[Tensor, "B S"]) -> Int64[Tensor, "B S"]:
    """The class of the box that each candidate stands for, -1 where it is not positive."""
    if not labels.shape[1]:
        return torch.full_like(index, -1)
    return torch.where(index >= 0, labels.gather(1, index.clamp(min=0)), -1)
