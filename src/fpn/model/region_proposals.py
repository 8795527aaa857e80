"""A region proposal network alone: where objects may be, whatever they are (Ren et al. 2015; Lin et al. 2017, 4.1)."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from fpn import boxes as box
from fpn.model import sampling
from fpn.model.anchors import Anchors
from fpn.model.detector import Detector, chance_of
from fpn.model.losses import box_loss, number_of, objectness_loss
from fpn.model.matching import match, truth_of
from fpn.model.rpn import OFFSET_WEIGHTS, Proposals, RpnOutput, propose
from fpn.structures import Batch, Detections, Targets


class RPN(Detector):
    """Anchors on every level of a pyramid, the likeliest of which, moved and thinned, are its proposals.

    rpn_positive, rpn_negative: IoU from which an anchor is positive, below which background; rpn_examples,
    rpn_positive_fraction: examples an image and the fraction of them that may be positive; rpn_nms: IoU of the NMS;
    rpn_score: the lowest of a proposal; rpn_beta: below which smooth L1 is a square (0: plain L1).
    proposals_per_level, proposals: how many are kept, (training, detection).

    Its detections are the proposals, scored by objectness; what it is trained and scored on has one class, "object".
    """

    anchors: Anchors
    proposes = True
    loss_weights = {"rpn_class": 1.0, "rpn_box": 1.0}

    def __init__(
        self,
        backbone: nn.Module,
        pyramid: nn.Module,
        anchors: Anchors,
        rpn: nn.Module,
        classes: tuple[str, ...],
        *,
        rpn_positive: float = 0.7,
        rpn_negative: float = 0.3,
        rpn_examples: int = 256,
        rpn_positive_fraction: float = 0.5,
        rpn_nms: float = 0.7,
        rpn_score: float = 0.0,
        rpn_beta: float = 0.0,
        proposals_per_level: tuple[int, int] = (2000, 1000),
        proposals: tuple[int, int] = (2000, 1000),
        **pixels: Any,
    ):
        super().__init__(backbone, pyramid, classes, **pixels)
        self.anchors, self.rpn = anchors, rpn
        self.rpn_positive, self.rpn_negative = rpn_positive, rpn_negative
        self.rpn_examples, self.rpn_positive_fraction = rpn_examples, rpn_positive_fraction
        self.rpn_nms, self.rpn_score, self.rpn_beta = rpn_nms, rpn_score, rpn_beta
        self.proposals_per_level, self.proposals = proposals_per_level, proposals
        self.score, self.max_detections = rpn_score, proposals[1]

    def detect(self, batch: Batch) -> Detections:
        """The proposals, in the pixels of the batch's (resized) images."""
        pyramid = self.features(batch)
        anchors = self.anchors(pyramid, batch.images.shape[-2:])
        found = self.propose(self.rpn(pyramid), anchors, batch.sizes, training=False)
        assert found.levels is not None
        return Detections(
            boxes=torch.where(found.valid[..., None], found.boxes, 0.0),
            scores=found.scores.clamp(min=0),
            labels=torch.where(found.valid, 0, -1),
            levels=torch.where(found.valid, found.levels, -1),
            count=found.valid.sum(1),
            classes=self.classes,
        )

    def losses(self, batch: Batch) -> dict[str, Float[Tensor, ""]]:
        """The unweighted loss terms rpn_class and rpn_box; from which anchors, see `FasterRCNN.losses`."""
        assert batch.targets is not None, "losses need a batch with targets"
        pyramid = self.features(batch)
        anchors = self.anchors(pyramid, batch.images.shape[-2:])
        return self.rpn_losses(self.rpn(pyramid), anchors, batch.targets, chance_of(batch))

    def propose(
        self, rpn_out: RpnOutput, anchors: dict[int, Tensor], sizes: Int64[Tensor, "B 2"], training: bool
    ) -> Proposals:
        at = 0 if training else 1
        per_level, total = self.proposals_per_level[at], self.proposals[at]
        return propose(rpn_out, anchors, sizes, per_level, total, self.rpn_nms, self.rpn_score)

    def rpn_losses(
        self, rpn_out: RpnOutput, anchors: dict[int, Tensor], targets: Targets, keys: Int64[Tensor, " B"]
    ) -> dict[str, Tensor]:
        reference = torch.cat(list(anchors.values()))[None]
        logits, offsets = (torch.cat(list(part.values()), dim=1) for part in (rpn_out.logits, rpn_out.offsets))
        matched = match(targets.boxes, targets.valid, reference, self.rpn_positive, self.rpn_negative, keep_best=True)
        chosen = sampling.sample(matched, self.rpn_examples, self.rpn_positive_fraction, keys, sampling.RPN)
        wanted = box.encode(
            truth_of(targets.boxes, chosen.take(matched)),
            chosen.take(reference.expand(len(matched), -1, -1)),
            OFFSET_WEIGHTS,
        )
        count = number_of(chosen.valid)
        return {
            "rpn_class": objectness_loss(chosen.take(logits), chosen.positive, chosen.valid, count),
            "rpn_box": box_loss(chosen.take(offsets), wanted, chosen.positive, self.rpn_beta, count),
        }
