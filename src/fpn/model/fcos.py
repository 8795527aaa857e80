"""FCOS: every place inside an object tells how far its sides are (Tian et al. 2019, arXiv 1904.01355; 2006.09214)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from fpn import boxes as box
from fpn.errors import OptionError
from fpn.model.anchors import Anchors
from fpn.model.dense_head import joined
from fpn.model.detector import Detector
from fpn.model.losses import centerness_loss, focal_loss, giou_loss, number_of
from fpn.model.matching import BACKGROUND, CHUNK, labels_of, truth_of
from fpn.model.postprocess import dense_detections
from fpn.structures import Batch, Detections

DISTANCES = ("exp", "relu")


class FCOS(Detector):
    """No anchors: a place on the pyramid is the centre of a cell as large as its level's stride.

    cells: those, as anchors of one size and ratio. radius: places less than that far from an object's centre are
    positive, in strides (centre sampling, from the longer paper). reach: the largest distance to a side that a level
    learns, in strides; the next level learns the longer ones: 64, 128, 256, 512 pixels on P3 to P6 (section 3.2).
    distances: "exp" of the head's scaled output (section 3.2) or its "relu" (torchvision), both in strides. alpha,
    gamma: of the focal loss. geometric_mean: detections are rated by the root of class score times centerness, as in
    the authors' code and torchvision, otherwise by the product (section 3.3). candidates: pairs of place and class of
    each level that go into the NMS. max_detections: boxes an image, of all classes.
    """

    loss_weights = {"class": 1.0, "box": 1.0, "centerness": 1.0}

    def __init__(
        self,
        backbone: nn.Module,
        pyramid: nn.Module,
        cells: Anchors,
        head: nn.Module,
        classes: tuple[str, ...],
        *,
        radius: float = 1.5,
        reach: float = 8.0,
        distances: str = "exp",
        alpha: float = 0.25,
        gamma: float = 2.0,
        geometric_mean: bool = True,
        candidates: int = 1000,
        box_nms: float = 0.6,
        score: float = 0.2,
        max_detections: int = 100,
        **pixels: Any,
    ):
        super().__init__(backbone, pyramid, classes, **pixels)
        if distances not in DISTANCES:
            raise OptionError(f"distances {distances!r}: it must be {', '.join(DISTANCES)}")
        self.cells, self.head = cells, head
        self.radius, self.reach, self.distances = radius, reach, distances
        self.alpha, self.gamma, self.geometric_mean = alpha, gamma, geometric_mean
        self.candidates, self.box_nms = candidates, box_nms
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
        """The unweighted loss terms: class, box, centerness (Eq. 2, and section 3.3)."""
        targets = batch.targets
        assert targets is not None, "losses need a batch with targets"
        pyramid = self.features(batch)
        cells = list(self.cells(pyramid, batch.images.shape[-2:]).values())
        out = self.head(pyramid)
        matched = assign(targets.boxes, targets.valid, cells, self.radius, self.reach)
        positive, places, truth = matched >= 0, torch.cat(cells), truth_of(targets.boxes, matched)
        count = number_of(positive)
        labels = labels_of(targets.labels, matched)
        boxes = self.decode(joined(out.offsets), places)
        central = centerness_of(places, truth)
        return {
            "class": focal_loss(joined(out.logits), labels, torch.ones_like(positive), self.alpha, self.gamma, count),
            "box": giou_loss(boxes, truth, positive, count),
            "centerness": centerness_loss(joined(out.centerness), central, positive, count),
        }

    def decode(self, offsets: Float[Tensor, "B n 4"], cells: Float[Tensor, "*_ n 4"]) -> Float[Tensor, "B n 4"]:
        """The box that the head's output stands for: the distances of its sides from the cell's centre, in cells."""
        distances = F.relu(offsets) if self.distances == "relu" else offsets.clamp(max=box.MAX_LOG_SCALE).exp()
        x, y = centres(cells)
        width, height = cells[..., 2] - cells[..., 0], cells[..., 3] - cells[..., 1]
        left, top, right, bottom = distances.unbind(-1)
        sides = [x - left * width, y - top * height, x + right * width, y + bottom * height]
        return torch.stack(sides, dim=-1)


@torch.no_grad()
def assign(
    truth: Float[Tensor, "B N 4"],
    valid: Bool[Tensor, "B N"],
    cells: list[Float[Tensor, "_ 4"]],
    radius: float,
    reach: float,
) -> Int64[Tensor, "B A"]:
    """For each cell, level by level from the lowest, the index of its ground-truth box, or BACKGROUND.

    A box is learnt by the cells whose centres lie inside it and less than `radius` cells from its own, on the level
    that its farthest side is in `reach` of; the lowest level learns everything smaller too, the highest everything
    larger. Of several boxes a cell takes the smallest.
    """
    sizes = [level[:, 2] - level[:, 0] for level in cells]
    lower = torch.cat([size * (0.0 if level == 0 else reach / 2) for level, size in enumerate(sizes)])
    upper = torch.cat([size * (reach if level < len(cells) - 1 else torch.inf) for level, size in enumerate(sizes)])
    (x, y), allowed = centres(torch.cat(cells)), radius * torch.cat(sizes)
    best = truth.new_full((len(truth), len(x)), torch.inf)
    index = torch.full_like(best, BACKGROUND, dtype=torch.int64)
    step = max(1, CHUNK // max(1, best.numel()))
    for start in range(0, truth.shape[1], step):
        some = truth[:, start : start + step, None]
        left, top, right, bottom = sides(x, y, some)
        nearest = torch.minimum(torch.minimum(left, right), torch.minimum(top, bottom))
        farthest = torch.maximum(torch.maximum(left, right), torch.maximum(top, bottom))
        away = torch.maximum((left - right).abs(), (top - bottom).abs()) / 2
        fits = (nearest > 0) & (away < allowed) & (farthest >= lower) & (farthest <= upper)
        fits &= valid[:, start : start + step, None]
        area, which = box.area(some).where(fits, torch.inf).min(dim=1)
        index = torch.where(area < best, which + start, index)
        best = torch.minimum(area, best)
    return index


def centres(cells: Float[Tensor, "*b 4"]) -> tuple[Float[Tensor, "*b"], Float[Tensor, "*b"]]:
    """x and y of the middle of each box."""
    return (cells[..., 0] + cells[..., 2]) / 2, (cells[..., 1] + cells[..., 3]) / 2


def sides(x: Tensor, y: Tensor, boxes: Float[Tensor, "*b 4"]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """How far the left, top, right and bottom of each box are from a place inside it (FCOS, Eq. 1)."""
    left, top, right, bottom = boxes.unbind(-1)
    return x - left, y - top, right - x, bottom - y


def centerness_of(cells: Float[Tensor, "A 4"], boxes: Float[Tensor, "B A 4"]) -> Float[Tensor, "B A"]:
    """1 in the middle of a box, 0 at its sides (FCOS, Eq. 3); of no meaning where the cell's centre is outside."""
    left, top, right, bottom = sides(*centres(cells), boxes)
    across = torch.minimum(left, right) / torch.maximum(left, right)
    down = torch.minimum(top, bottom) / torch.maximum(top, bottom)
    return (across * down).clamp(min=0).sqrt()
