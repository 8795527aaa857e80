"""RetinaNet: dense anchors and the focal loss (Lin et al. 2017, arXiv 1708.02002)."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from fpn import boxes as box
from fpn.errors import OptionError
from fpn.model.anchors import Anchors
from fpn.model.dense_head import joined
from fpn.model.detector import Detector
from fpn.model.losses import box_loss, focal_loss, giou_loss, number_of, number_of_each
from fpn.model.matching import IGNORED, labels_of, match, truth_of
from fpn.model.postprocess import dense_detections
from fpn.structures import Batch, Detections

BOX_LOSSES = ("smooth_l1", "giou")


class RetinaNet(Detector):
    """Every anchor of P3 to P7 is told apart and moved at once; nothing is proposed or sampled.

    positive, negative: IoU from which an anchor is positive, below which it is background (section 4). alpha, gamma:
    of the focal loss (Eq. 5, table 1b). box_loss: "smooth_l1" of the offsets, with `beta` below which it is a square
    (0: plain L1), or "giou" of the boxes. per_image: losses are divided by the positives of each image and averaged, as
    torchvision does it; otherwise by those of the batch. clip_first: see `dense_detections`. candidates: pairs of
    anchor and class of each level that go into the NMS. max_detections: boxes an image, of all classes.
    """

    anchors: Anchors
    loss_weights = {"class": 1.0, "box": 1.0}

    def __init__(
        self,
        backbone: nn.Module,
        pyramid: nn.Module,
        anchors: Anchors,
        head: nn.Module,
        classes: tuple[str, ...],
        *,
        positive: float = 0.5,
        negative: float = 0.4,
        alpha: float = 0.25,
        gamma: float = 2.0,
        box_loss: str = "smooth_l1",
        beta: float = 0.0,
        box_weights: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0),
        per_image: bool = False,
        clip_first: bool = True,
        candidates: int = 1000,
        box_nms: float = 0.5,
        score: float = 0.05,
        max_detections: int = 100,
        **pixels: Any,
    ):
        super().__init__(backbone, pyramid, classes, **pixels)
        if box_loss not in BOX_LOSSES:
            raise OptionError(f"box loss {box_loss!r}: it must be {', '.join(BOX_LOSSES)}")
        self.anchors, self.head = anchors, head
        self.positive, self.negative, self.alpha, self.gamma = positive, negative, alpha, gamma
        self.box_loss, self.beta, self.box_weights, self.per_image = box_loss, beta, box_weights, per_image
        self.clip_first, self.candidates, self.box_nms = clip_first, candidates, box_nms
        self.score, self.max_detections = score, max_detections

    def detect(self, batch: Batch) -> Detections:
        """Detections in the pixels of the batch's (resized) images."""
        pyramid = self.features(batch)
        return dense_detections(
            self.head(pyramid),
            self.anchors(pyramid, batch.images.shape[-2:]),
            self.decode,
            batch.sizes,
            self.candidates,
            self.score,
            self.box_nms,
            self.max_detections,
            self.classes,
            clip_first=self.clip_first,
        )

    def losses(self, batch: Batch) -> dict[str, Float[Tensor, ""]]:
        """The unweighted loss terms: class and box."""
        targets = batch.targets
        assert targets is not None, "losses need a batch with targets"
        pyramid = self.features(batch)
        anchors = torch.cat(list(self.anchors(pyramid, batch.images.shape[-2:]).values()))
        out = self.head(pyramid)
        matched = match(targets.boxes, targets.valid, anchors[None], self.positive, self.negative, keep_best=True)
        count = number_of_each(matched >= 0) if self.per_image else number_of(matched >= 0)
        labels = labels_of(targets.labels, matched)
        return {
            "class": focal_loss(joined(out.logits), labels, matched != IGNORED, self.alpha, self.gamma, count),
            "box": self.loss_of_boxes(joined(out.offsets), anchors, truth_of(targets.boxes, matched), matched, count),
        }

    def loss_of_boxes(
        self,
        offsets: Float[Tensor, "B A 4"],
        anchors: Float[Tensor, "A 4"],
        truth: Float[Tensor, "B A 4"],
        matched: Int64[Tensor, "B A"],
        count: Tensor,
    ) -> Float[Tensor, ""]:
        if self.box_loss == "giou":
            return giou_loss(self.decode(offsets, anchors), truth, matched >= 0, count)
        wanted = box.encode(truth, anchors.expand_as(truth), self.box_weights)
        return box_loss(offsets, wanted, matched >= 0, self.beta, count)

    def decode(self, offsets: Float[Tensor, "B n 4"], anchors: Float[Tensor, "*_ n 4"]) -> Float[Tensor, "B n 4"]:
        return box.decode(offsets, anchors, self.box_weights)
