"""Class logits and box offsets, of regions or of whole pyramids -> detections."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from fpn import boxes as box
from fpn.model.dense_head import DenseOutput
from fpn.model.nms import nms
from fpn.structures import Detections

CANDIDATES = 4096  # pairs of region and class of an image that go into the NMS, at most


def detections_of(
    scores: Float[Tensor, "B R K1"],
    boxes: Float[Tensor, "B R _k 4"],
    valid: Bool[Tensor, "B R"],
    levels: Int64[Tensor, "B R"],
    sizes: Int64[Tensor, "B 2"],
    score: float,
    iou: float,
    count: int,
    classes: tuple[str, ...] = (),
    min_side: float = 1e-2,
) -> Detections:
    """Every region may become a box of every class: those above `score`, thinned by NMS within the class; the best.

    Of more than CANDIDATES pairs only these many, the best, go into the NMS. No box depends on one of lower score, so
    that differs from taking all only where more of them are above `score` and fewer than `count` of the best survive.
    scores: of every class and, last, background. boxes: for every class, or one for all of them (_k is 1).
    """
    regions, kinds = scores.shape[1], scores.shape[2] - 1
    boxes = box.clip(boxes.expand(-1, -1, kinds, -1).flatten(1, 2), sizes)
    labels = torch.arange(kinds, device=scores.device).repeat(regions).expand(scores.shape[0], -1)
    levels = levels.repeat_interleave(kinds, dim=1)
    valid = ((scores[..., :-1] > score) & valid[..., None]).flatten(1)
    valid = valid & ((boxes[..., 2:] - boxes[..., :2]) >= min_side).all(-1)
    scores = scores[..., :-1].flatten(1)
    if scores.shape[1] > (most := max(CANDIDATES, count)):
        best = torch.where(valid, scores, -1.0).topk(most, dim=1).indices
        boxes = boxes.gather(1, best[..., None].expand(-1, -1, 4))
        scores, labels, levels, valid = (part.gather(1, best) for part in (scores, labels, levels, valid))
    keep = nms(boxes, scores, labels, valid, iou)
    return select(boxes, torch.where(keep, scores, -1.0), labels, levels, count, classes)


def dense_detections(
    out: DenseOutput,
    anchors: Mapping[int, Float[Tensor, "_ 4"]],
    decode: Callable[[Tensor, Tensor], Tensor],
    sizes: Int64[Tensor, "B 2"],
    candidates: int,
    score: float,
    iou: float,
    count: int,
    classes: tuple[str, ...] = (),
    geometric_mean: bool = False,
    clip_first: bool = True,
    min_side: float = 1e-2,
) -> Detections:
    """Every anchor may become a box of every class: the best `candidates` pairs of each level, those above `score`
    thinned by NMS within the class, the best of all. `decode` makes boxes of (offsets, anchors).

    clip_first: boxes are cut at the image's borders before the NMS, as torchvision does, not after, as detectron2 does.
    """
    found = []
    for level in anchors:
        central = out.centerness[level] if out.centerness else None
        scores, place, labels = best_pairs(out.logits[level], central, candidates, geometric_mean)
        offsets = out.offsets[level].gather(1, place[..., None].expand(-1, -1, 4))
        boxes = decode(offsets, anchors[level][place])
        found.append((boxes, scores, labels, torch.full_like(labels, level)))
    boxes, scores, labels, levels = (torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
    clipped = box.clip(boxes, sizes)
    inside = ((clipped[..., 2:] - clipped[..., :2]) >= min_side).all(-1)
    if clip_first:
        keep = nms(clipped, scores, labels, (scores > score) & inside, iou)
    else:
        keep = nms(boxes, scores, labels, scores > score, iou) & inside
    return select(clipped, torch.where(keep, scores, -1.0), labels, levels, count, classes)


def best_pairs(
    logits: Float[Tensor, "B A K"], centerness: Float[Tensor, "B A"] | None, count: int, geometric_mean: bool
) -> tuple[Float[Tensor, "B n"], Int64[Tensor, "B n"], Int64[Tensor, "B n"]]:
    """Scores of the `count` best pairs of anchor and class, -1 where there are fewer; the anchor and class of each.

    The best pairs belong to the anchors with the best classes, so that only these are sorted; and no shape depends on
    the image size, see `fpn.model.rpn.best_of_level`.
    """
    rank = rated(logits.amax(-1), centerness, geometric_mean)
    value, place = F.pad(rank, (0, count), value=-1.0).topk(count, dim=1)
    place = place.clamp(max=logits.shape[1] - 1)
    chosen = logits.gather(1, place[..., None].expand(-1, -1, logits.shape[2]))
    central = None if centerness is None else centerness.gather(1, place)[..., None]
    scores = torch.where(value[..., None] >= 0, rated(chosen, central, geometric_mean), -1.0)
    scores, pair = scores.flatten(1).topk(count, dim=1)
    return scores, place.gather(1, pair // logits.shape[2]), pair % logits.shape[2]


def rated(logits: Tensor, centerness: Tensor | None, geometric_mean: bool) -> Tensor:
    """Scores from 0 to 1: of the class alone, or that times centerness, or the root of this."""
    if centerness is None:
        return logits.sigmoid()
    product = logits.sigmoid() * centerness.sigmoid()
    return product.sqrt() if geometric_mean else product


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
        # Chosen, not multiplied: weights that went NaN must not show in the padding.
        boxes=torch.where(real[..., None], boxes.gather(1, order[..., None].expand(-1, -1, 4)), 0.0),
        scores=value.clamp(min=0),
        labels=torch.where(real, labels.gather(1, order), -1),
        levels=torch.where(real, levels.gather(1, order), -1),
        count=real.sum(1),
        classes=classes,
    )
