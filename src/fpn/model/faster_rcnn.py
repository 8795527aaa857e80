"""Faster R-CNN with a Feature Pyramid Network (Ren et al. 2015; Lin et al. 2017)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn

from fpn import boxes as box
from fpn.errors import OptionError
from fpn.model.anchors import Anchors
from fpn.model.losses import box_loss, classification_loss, number_of, objectness_loss
from fpn.model.matching import IGNORED, match
from fpn.model.postprocess import detections_of
from fpn.model.roi import POOLINGS, assign_levels, pool_regions
from fpn.model.rpn import OFFSET_WEIGHTS, Proposals, RpnOutput, propose
from fpn.model.sampling import BOX_HEAD, RPN, Sampled, sample
from fpn.structures import Batch, Detections, Targets

if TYPE_CHECKING:
    from fpn.build import Spec


class FasterRCNN(nn.Module):
    """Two stages on one pyramid. The parts hold the weights; the numbers are the settings of each step.

    rpn_* and box_*: IoU from which an example is positive, below which background; examples an image and the fraction
    of them that may be positive; IoU of the NMS; beta, below which smooth L1 is a square (0: plain L1).
    proposals_per_level and proposals: (training, detection). pooling: see `pool_regions`. canonical: the side of
    regions pooled from P4 (Eq. 1). max_detections: boxes an image, of all classes.
    """

    spec: Spec  # set by `fpn.build`
    mean: Tensor
    std: Tensor
    loss_names = ("rpn_class", "rpn_box", "class", "box")

    def __init__(
        self,
        backbone: nn.Module,
        pyramid: nn.Module,
        anchors: Anchors,
        rpn: nn.Module,
        box_head: nn.Module,
        classes: tuple[str, ...],
        *,
        mean: tuple[float, float, float] = (0.485, 0.456, 0.406),
        std: tuple[float, float, float] = (0.229, 0.224, 0.225),
        rpn_positive: float = 0.7,
        rpn_negative: float = 0.3,
        rpn_examples: int = 256,
        rpn_positive_fraction: float = 0.5,
        rpn_nms: float = 0.7,
        rpn_beta: float = 0.0,
        proposals_per_level: tuple[int, int] = (2000, 1000),
        proposals: tuple[int, int] = (2000, 1000),
        pooling: str = "align",
        pooled_size: int = 7,
        canonical: float = 224.0,
        sampling_ratio: int = 2,
        box_positive: float = 0.5,
        box_examples: int = 512,
        box_positive_fraction: float = 0.25,
        box_weights: tuple[float, float, float, float] = (10.0, 10.0, 5.0, 5.0),
        box_beta: float = 0.0,
        box_nms: float = 0.5,
        score: float = 0.05,
        max_detections: int = 100,
    ):
        super().__init__()
        if pooling not in POOLINGS:
            raise OptionError(f"pooling {pooling!r}: it must be {', '.join(POOLINGS)}")
        self.backbone, self.pyramid, self.anchors, self.rpn, self.box_head = backbone, pyramid, anchors, rpn, box_head
        self.classes = tuple(classes)
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1) * 255, persistent=False)
        self.rpn_positive, self.rpn_negative = rpn_positive, rpn_negative
        self.rpn_examples, self.rpn_positive_fraction = rpn_examples, rpn_positive_fraction
        self.rpn_nms, self.rpn_beta = rpn_nms, rpn_beta
        self.proposals_per_level, self.proposals = proposals_per_level, proposals
        self.pooling, self.pooled_size, self.sampling_ratio = pooling, pooled_size, sampling_ratio
        self.canonical = canonical
        self.box_positive, self.box_examples, self.box_positive_fraction = (
            box_positive,
            box_examples,
            box_positive_fraction,
        )
        self.box_weights, self.box_beta, self.box_nms = box_weights, box_beta, box_nms
        self.score, self.max_detections = score, max_detections

    def detect(self, batch: Batch) -> Detections:
        """Detections in the pixels of the batch's (resized) images."""
        pyramid = self.pyramid(self.backbone(self.normalise(batch.images, batch.sizes)))
        anchors = self.anchors(pyramid, batch.images.shape[-2:])
        proposals = self.propose(self.rpn(pyramid), anchors, batch.sizes, training=False)
        levels, logits, offsets = self.classify(pyramid, proposals.boxes, proposals.valid)
        return detections_of(
            logits,
            offsets,
            proposals,
            levels,
            batch.sizes,
            self.box_weights,
            self.score,
            self.box_nms,
            self.max_detections,
            self.classes,
        )

    forward = detect  # what torch.export and hooks call

    def losses(self, batch: Batch) -> dict[str, Float[Tensor, ""]]:
        """The four unweighted loss terms: rpn_class, rpn_box, class, box.

        Which examples they are taken from follows from `batch.keys`; without keys, from torch's global generator. In
        a group of processes that train together all of them must call this, see `fpn.model.losses.number_of`.
        """
        assert batch.targets is not None, "losses need a batch with targets"
        pyramid = self.pyramid(self.backbone(self.normalise(batch.images, batch.sizes)))
        anchors = self.anchors(pyramid, batch.images.shape[-2:])
        rpn_out = self.rpn(pyramid)
        proposals = self.propose(rpn_out, anchors, batch.sizes, training=True)
        keys = batch.keys
        if keys is None:
            keys = torch.randint(2**62, batch.indices.shape, device=batch.indices.device)
        return {
            **self.rpn_losses(rpn_out, anchors, batch.targets, keys),
            **self.box_losses(pyramid, proposals, batch.targets, keys),
        }

    def normalise(self, images: UInt8[Tensor, "B 3 H W"], sizes: Int64[Tensor, "B 2"]) -> Float[Tensor, "B 3 H W"]:
        """Pixels with the mean and deviation of the backbone's training data; exactly 0 in the padding."""
        pixels = (images - self.mean) / self.std
        row = torch.arange(images.shape[2], device=images.device)[:, None]
        column = torch.arange(images.shape[3], device=images.device)
        inside = (row < sizes[:, 0, None, None]) & (column < sizes[:, 1, None, None])
        return pixels * inside[:, None]

    def propose(
        self, rpn_out: RpnOutput, anchors: dict[int, Tensor], sizes: Int64[Tensor, "B 2"], training: bool
    ) -> Proposals:
        at = 0 if training else 1
        return propose(rpn_out, anchors, sizes, self.proposals_per_level[at], self.proposals[at], self.rpn_nms)

    def classify(
        self, pyramid: dict[int, Tensor], boxes: Float[Tensor, "B R 4"], valid: Tensor
    ) -> tuple[Int64[Tensor, "B R"], Float[Tensor, "B R K1"], Float[Tensor, "B R K 4"]]:
        """The level that each region is pooled from, its class logits and its box offsets for every class."""
        *own, _ = pyramid  # the highest level serves the RPN only
        levels = assign_levels(boxes, own[0], own[-1], canonical=self.canonical)
        regions = pool_regions(
            {k: pyramid[k] for k in own},
            boxes,
            levels.masked_fill(~valid, -1),
            self.pooled_size,
            self.sampling_ratio,
            self.pooling,
        )
        logits, offsets = self.box_head(regions)
        return levels, logits.unflatten(0, boxes.shape[:2]), offsets.unflatten(0, boxes.shape[:2])

    def rpn_losses(
        self, rpn_out: RpnOutput, anchors: dict[int, Tensor], targets: Targets, keys: Int64[Tensor, " B"]
    ) -> dict[str, Tensor]:
        reference = torch.cat(list(anchors.values()))[None]
        logits, offsets = (torch.cat(list(part.values()), dim=1) for part in (rpn_out.logits, rpn_out.offsets))
        matched = match(targets.boxes, targets.valid, reference, self.rpn_positive, self.rpn_negative, keep_best=True)
        chosen = sample(matched, self.rpn_examples, self.rpn_positive_fraction, keys, RPN)
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

    def box_losses(
        self, pyramid: dict[int, Tensor], proposals: Proposals, targets: Targets, keys: Int64[Tensor, " B"]
    ) -> dict[str, Tensor]:
        regions, labels, wanted, chosen = self.examples(proposals, targets, keys)
        _, logits, offsets = self.classify(pyramid, regions, chosen.valid)
        kind = labels.clamp(max=len(self.classes) - 1)[..., None, None].expand(-1, -1, 1, 4)
        count = number_of(chosen.valid)
        return {
            "class": classification_loss(logits, labels, chosen.valid, count),
            "box": box_loss(offsets.gather(2, kind)[:, :, 0], wanted, chosen.positive, self.box_beta, count),
        }

    @torch.no_grad()
    def examples(
        self, proposals: Proposals, targets: Targets, keys: Int64[Tensor, " B"]
    ) -> tuple[Tensor, Tensor, Tensor, Sampled]:
        """Regions (B, S, 4) for the box head with their labels (B, S; K is background) and wanted offsets (B, S, 4).

        The ground truth itself stands among the proposals, so that there are positives from the first step.
        """
        candidates = torch.cat([proposals.boxes, targets.boxes], dim=1)
        real = torch.cat([proposals.valid, targets.valid], dim=1)
        matched = match(targets.boxes, targets.valid, candidates, self.box_positive, self.box_positive, keep_best=False)
        matched = torch.where(real, matched, IGNORED)
        chosen = sample(matched, self.box_examples, self.box_positive_fraction, keys, BOX_HEAD)
        regions, index = chosen.take(candidates), chosen.take(matched)
        labels = torch.where(chosen.positive, targets.labels.gather(1, index.clamp(min=0)), len(self.classes))
        wanted = box.encode(truth_of(targets.boxes, index), regions, self.box_weights)
        return regions, labels, wanted, chosen


def truth_of(boxes: Float[Tensor, "B N 4"], index: Int64[Tensor, "B S"]) -> Float[Tensor, "B S 4"]:
    """The ground-truth box of each example; any box where the example is background."""
    return boxes.gather(1, index.clamp(min=0)[..., None].expand(-1, -1, 4))
