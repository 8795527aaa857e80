"""Faster R-CNN with a Feature Pyramid Network (Ren et al. 2015; Lin et al. 2017)."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from fpn.model.anchors import Anchors
from fpn.model.detector import chance_of
from fpn.model.fast_rcnn import FastRCNN
from fpn.model.mask_head import MaskBranch
from fpn.model.region_proposals import RPN
from fpn.model.rpn import Proposals
from fpn.structures import Batch


class FasterRCNN(FastRCNN, RPN):
    """Fast R-CNN on the proposals of an RPN: two stages on one pyramid, learning together.

    The parts hold the weights; settings: those of both.
    """

    proposes = needs_regions = False
    loss_weights = {**RPN.loss_weights, **FastRCNN.loss_weights}

    def __init__(
        self,
        backbone: nn.Module,
        pyramid: nn.Module,
        anchors: Anchors,
        rpn: nn.Module,
        box_head: nn.Module,
        classes: tuple[str, ...],
        masks: MaskBranch | None = None,
        **settings: Any,
    ):
        super().__init__(backbone, pyramid, box_head, classes, masks, anchors=anchors, rpn=rpn, **settings)

    def regions_of(self, batch: Batch, pyramid: dict[int, Tensor]) -> Proposals:
        """What is looked at in detection: the RPN's proposals."""
        anchors = self.anchors(pyramid, batch.images.shape[-2:])
        return self.propose(self.rpn(pyramid), anchors, batch.sizes, training=False)

    def losses(self, batch: Batch) -> dict[str, Float[Tensor, ""]]:
        """The unweighted loss terms: rpn_class, rpn_box, and those of the regions: class, box, mask where it has masks.

        Which examples they are taken from follows from `batch.keys`; without keys, from torch's global generator. In
        a group of processes that train together all of them must call this, see `fpn.model.losses.number_of`.
        """
        assert batch.targets is not None, "losses need a batch with targets"
        pyramid = self.features(batch)
        anchors = self.anchors(pyramid, batch.images.shape[-2:])
        rpn_out = self.rpn(pyramid)
        proposals = self.propose(rpn_out, anchors, batch.sizes, training=True)
        keys = chance_of(batch)
        return {
            **self.rpn_losses(rpn_out, anchors, batch.targets, keys),
            **self.region_losses(pyramid, proposals, batch.targets, batch.sizes, keys),
        }
