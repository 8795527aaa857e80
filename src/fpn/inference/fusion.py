"""Weighted boxes fusion (Solovyev, Wang, Gabruseva 2019, arXiv 1910.13302): several finds of an object become one.

Where NMS keeps the box of the highest score, this takes the mean of all, so that each view of an image has its say; and
what few views have found loses score.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from fpn.model.masks import resampled
from fpn.structures import Detections

IOU = 0.55  # the paper's best


def fuse(views: Sequence[Detections], iou: float = IOU) -> Detections:
    """The detections of one image in several views of it, all in its pixels, as one set, highest score first.

    Boxes of a class that overlap by more than `iou` are one object, see `clusters`. Its box is their mean weighted by
    score, its score their mean, times the share of the views that found it; its level is that of the highest score. Its
    mask is the weighted mean of theirs where the new box is.
    """
    boxes, scores, labels, levels = (
        torch.cat([getattr(view, name) for view in views]) for name in ("boxes", "scores", "labels", "levels")
    )
    order = scores.argsort(descending=True, stable=True)
    boxes, scores, labels, levels = boxes[order], scores[order], labels[order], levels[order]
    cluster = clusters(boxes, scores, labels, iou)
    count = int(cluster.max()) + 1 if len(cluster) else 0
    members = torch.bincount(cluster, minlength=count)
    weights = scores.new_zeros(count).index_add(0, cluster, scores).clamp(min=torch.finfo(scores.dtype).tiny)
    share = scores / weights[cluster]
    fused = boxes.new_zeros(count, 4).index_add(0, cluster, boxes * share[:, None])
    fused_scores = weights / members * members.clamp(max=len(views)) / len(views)
    first = torch.full((count,), len(cluster)).scatter_reduce(0, cluster, torch.arange(len(cluster)), "amin")
    best = fused_scores.argsort(descending=True, stable=True)
    masks = None
    if views[0].masks is not None:
        given = torch.cat([view.masks for view in views if view.masks is not None])[order]
        moved = resampled(given, boxes, fused[cluster]) * share[:, None, None]
        masks = given.new_zeros(count, *given.shape[1:]).index_add(0, cluster, moved)[best]
    kept = first[best]
    return Detections(
        fused[best], fused_scores[best], labels[kept], levels[kept], torch.tensor(count), views[0].classes, masks
    )


def clusters(
    boxes: Float[Tensor, "n 4"], scores: Float[Tensor, " n"], labels: Int64[Tensor, " n"], iou: float
) -> Int64[Tensor, " n"]:
    """Which object each box belongs to, numbered from 0; the boxes come highest score first.

    Each box joins the object of its class whose box so far, the weighted mean of its members, it overlaps most, if by
    more than `iou`; else it begins a new one. (Section 3 of the paper, steps 2 to 6.)
    """
    rows, weights, kinds = boxes.double().numpy(), scores.double().numpy(), labels.numpy()
    found, count = np.zeros(len(rows), np.int64), 0
    for kind in np.unique(kinds):
        own = kinds == kind
        found[own] = count + clusters_of_class(rows[own], weights[own], iou)
        count = found[own].max() + 1
    return torch.from_numpy(found)


def clusters_of_class(
    rows: Float[np.ndarray, "n 4"], weights: Float[np.ndarray, " n"], iou: float
) -> Int64[np.ndarray, " n"]:
    # One after the other, as every box moves the mean; on small arrays NumPy is several times as fast as PyTorch.
    n, count = len(rows), 0
    means, totals, found = np.zeros((n, 4)), np.zeros(n), np.zeros(n, np.int64)
    for i in range(n):
        overlap = overlaps(rows[i], means[:count])
        place = int(overlap.argmax()) if count else 0
        if not count or overlap[place] <= iou:
            place, count = count, count + 1
        totals[place] += weights[i]
        means[place] += (rows[i] - means[place]) * (weights[i] / totals[place] if totals[place] > 0 else 1.0)
        found[i] = place
    return found


def overlaps(one: Float[np.ndarray, "4"], others: Float[np.ndarray, "m 4"]) -> Float[np.ndarray, " m"]:
    """Intersection over union of one box with each of the others; 0 with empty ones."""
    sides = np.minimum(one[2:], others[:, 2:]) - np.maximum(one[:2], others[:, :2])
    shared = sides.clip(min=0).prod(axis=1)
    union = (one[2:] - one[:2]).prod() + (others[:, 2:] - others[:, :2]).prod(axis=1) - shared
    return shared / np.where(union > 0, union, 1.0)
