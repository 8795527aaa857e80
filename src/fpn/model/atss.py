"""ATSS: RetinaNet with one anchor a cell, and examples chosen by statistics (Zhang et al. 2020, arXiv 1912.02424)."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from fpn import boxes as box
from fpn.model.anchors import Anchors
from fpn.model.dense_head import joined
from fpn.model.detector import Detector
from fpn.model.fcos import centerness_of, centres, sides
from fpn.model.losses import centerness_loss, focal_loss, giou_loss, number_of
from fpn.model.matching import BACKGROUND, CHUNK, labels_of, truth_of
from fpn.model.postprocess import dense_detections
from fpn.structures import Batch, Detections


class ATSS(Detector):
    """Adaptive training sample selection: which anchors are positive follows from how well those near a box fit it.

    cells: one anchor a cell, with sides of 8 strides. nearest: anchors of each level that are looked at, for each one
    in a cell (k in algorithm 1). box_weights: see `fpn.boxes.encode`. The other settings are those of FCOS.
    """

    loss_weights = {"class": 1.0, "box": 2.0, "centerness": 1.0}

    def __init__(
        self,
        backbone: nn.Module,
        pyramid: nn.Module,
        cells: Anchors,
        head: nn.Module,
        classes: tuple[str, ...],
        *,
        nearest: int = 9,
        box_weights: tuple[float, float, float, float] = (10.0, 10.0, 5.0, 5.0),
        alpha: float = 0.25,
        gamma: float = 2.0,
        geometric_mean: bool = True,
        candidates: int = 1000,
        box_nms: float = 0.6,
        score: float = 0.1,
        max_detections: int = 100,
        **pixels: Any,
    ):
        super().__init__(backbone, pyramid, classes, **pixels)
        # Not `anchors`: how well they overlap boxes does not matter, they only need to be near.
        self.cells, self.head = cells, head
        self.nearest, self.box_weights, self.alpha, self.gamma = nearest, box_weights, alpha, gamma
        self.geometric_mean, self.candidates, self.box_nms = geometric_mean, candidates, box_nms
        self.score, self.max_detections = score, max_detections

    def detect(self, batch: Batch) -> Detections:
        """Detections in the pixels of the batch's (resized) images."""
        pyramid = self.features(batch)
        return dense_detections(
            self.head(pyramid),
            self.cells(pyramid, batch.images.shape[-2:]),
            self.decode,
            batch.sizes,
            self.candidates,
            self.score,
            self.box_nms,
            self.max_detections,
            self.classes,
            self.geometric_mean,
        )

    def losses(self, batch: Batch) -> dict[str, Float[Tensor, ""]]:
        """The unweighted loss terms: class, box, centerness; a box counts as much as its anchor is central in it."""
        targets = batch.targets
        assert targets is not None, "losses need a batch with targets"
        pyramid = self.features(batch)
        levels = list(self.cells(pyramid, batch.images.shape[-2:]).values())
        out = self.head(pyramid)
        matched = assign(targets.boxes, targets.valid, levels, self.nearest * self.cells.per_cell)
        positive, anchors, truth = matched >= 0, torch.cat(levels), truth_of(targets.boxes, matched)
        central = centerness_of(anchors, truth).masked_fill(~positive, 0.0)
        count, every = number_of(positive), torch.ones_like(positive)
        labels = labels_of(targets.labels, matched)
        boxes = self.decode(joined(out.offsets), anchors)
        return {
            "class": focal_loss(joined(out.logits), labels, every, self.alpha, self.gamma, count),
            "box": giou_loss(boxes, truth, positive, number_of(central), central),
            "centerness": centerness_loss(joined(out.centerness), central, positive, count),
        }

    def decode(self, offsets: Float[Tensor, "B n 4"], anchors: Float[Tensor, "*_ n 4"]) -> Float[Tensor, "B n 4"]:
        return box.decode(offsets, anchors, self.box_weights)


@torch.no_grad()
def assign(
    truth: Float[Tensor, "B N 4"], valid: Bool[Tensor, "B N"], levels: list[Float[Tensor, "_ 4"]], nearest: int
) -> Int64[Tensor, "B A"]:
    """For each anchor, level by level, the index of its ground-truth box, or BACKGROUND (algorithm 1).

    Candidates of a box are the `nearest` anchors of each level by the distance of centres. Those are positive whose IoU
    is at least the mean plus the standard deviation of all its candidates' and whose centres lie inside the box. An
    anchor that is positive for several boxes takes the one that it overlaps most.
    """
    anchors = torch.cat(levels)
    candidates = nearest_anchors(truth, levels, nearest)
    near = anchors[candidates]
    overlap = box.iou(truth[:, :, None], near)[:, :, 0]
    mean, count = overlap.mean(-1, keepdim=True), overlap.shape[2]
    # Of a sample, as in the authors' code; 0 where a pyramid of one place has a single candidate.
    deviation = ((overlap - mean).square().sum(-1, keepdim=True) / max(1, count - 1)).sqrt()
    inside = torch.stack(sides(*centres(near), truth[:, :, None])).amin(0) > 0
    positive = (overlap >= mean + deviation) & inside & valid[..., None]
    # Which box an anchor overlaps most; the first of several.
    place, value = candidates.flatten(1), overlap.masked_fill(~positive, -1.0).flatten(1)
    best = value.new_full((len(truth), len(anchors)), -1.0).scatter_reduce(1, place, value, "amax")
    won = positive.flatten(1) & (value == best.gather(1, place))
    none = truth.shape[1]
    which = torch.arange(none, device=truth.device).repeat_interleave(count).expand_as(place)
    index = torch.full_like(best, none, dtype=torch.int64)
    index = index.scatter_reduce(1, place, torch.where(won, which, none), "amin")
    return torch.where(index < none, index, BACKGROUND)


def nearest_anchors(
    truth: Float[Tensor, "B N 4"], levels: list[Float[Tensor, "_ 4"]], nearest: int
) -> Int64[Tensor, "B N C"]:
    """The positions of the `nearest` anchors of each level to each box, by the distance of their centres."""
    x, y = (part[..., None] for part in centres(truth))
    found, first = [], 0
    for anchors in levels:
        level_x, level_y = centres(anchors)
        step = max(1, CHUNK // max(1, len(truth) * len(anchors)))
        parts = [
            torch.hypot(some_x - level_x, some_y - level_y).topk(min(nearest, len(anchors)), largest=False).indices
            for some_x, some_y in zip(x.split(step, dim=1), y.split(step, dim=1), strict=True)
        ]
        found.append(torch.cat(parts, dim=1) + first)
        first += len(anchors)
    return torch.cat(found, dim=2)
