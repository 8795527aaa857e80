"""Class logits and box offsets of regions -> detections."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from fpn import boxes as box
from fpn.model.nms import nms
from fpn.model.rpn import Proposals
from fpn.structures import Detections


def detections_of(
    logits: Float[Tensor, "B R K1"],
    offsets: Float[Tensor, "B R K 4"],
    proposals: Proposals,
    levels: Int64[Tensor, "B R"],
    sizes: Int64[Tensor, "B 2"],
    offset_weights: tuple[float, float, float, float],
    score: float,
    iou: float,
    count: int,
    classes: tuple[str, ...] = (),
    min_side: float = 1e-2,
) -> Detections:
    """Every region may become a box of every class: those above `score`, thinned by NMS within the class; the best."""
    regions, kinds = offsets.shape[1:3]
    scores = logits.softmax(-1)[..., :-1]
    boxes = box.decode(offsets, proposals.boxes[:, :, None], offset_weights).flatten(1, 2)
    boxes = box.clip(boxes, sizes)
    labels = torch.arange(kinds, device=logits.device).repeat(regions).expand(len(logits), -1)
    levels = levels.repeat_interleave(kinds, dim=1)
    valid = ((scores > score) & proposals.valid[..., None]).flatten(1)
    valid = valid & ((boxes[..., 2:] - boxes[..., :2]) >= min_side).all(-1)
    scores = scores.flatten(1)
    keep = nms(boxes, scores, labels, valid, iou)
    return select(boxes, torch.where(keep, scores, -1.0), labels, levels, count, classes)


def select(
    boxes: Float[Tensor, "B M 4"],
    scores: Float[Tensor, "B M"],
    labels: Int64[Tensor, "B M"],
    levels: Int64[Tensor, "B M"],
    count: int,
    classes: tuple[str, ...],
) -> Detections:
    """The `count` best of the candidates whose score is not negative, padded as `Detections` says."""
    value, order = scores.topk(min(count, scores.shape[1]), dim=1)
    real = value >= 0
    return Detections(
        boxes=boxes.gather(1, order[..., None].expand(-1, -1, 4)) * real[..., None],
        scores=value.clamp(min=0),
        labels=torch.where(real, labels.gather(1, order), -1),
        levels=torch.where(real, levels.gather(1, order), -1),
        count=real.sum(1),
        classes=classes,
    )
