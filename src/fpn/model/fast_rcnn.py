"""Fast R-CNN with a Feature Pyramid Network: what given regions hold (Girshick 2015; Lin et al. 2017, section 4.2)."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from fpn import boxes as box
from fpn.errors import OptionError
from fpn.model.detector import Detector, chance_of
from fpn.model.losses import box_loss, classification_loss, number_of
from fpn.model.mask_head import MaskBranch
from fpn.model.matching import IGNORED, labels_of, match, truth_of
from fpn.model.postprocess import detections_of
from fpn.model.roi import POOLINGS, assign_levels, pool_regions
from fpn.model.rpn import Proposals
from fpn.model.sampling import BOX_HEAD, Examples, Sampled, filled, sample
from fpn.structures import Batch, Detections, Targets


class FastRCNN(Detector):
    """A head that looks at regions of a pyramid, which come with the batch; it proposes none itself.

    box_*: IoU from which a region is positive, below which background; examples an image and the fraction of them that
    may be positive; IoU of the NMS; beta, below which smooth L1 is a square (0: plain L1).
    masks: draws outlines too (Mask R-CNN, He et al. 2017); adds the loss term "mask".
    pooling: see `pool_regions`. pooled: the lowest and the highest level that regions are pooled from; None: all that
    the backbone has. canonical: the side of regions pooled from P4 (Eq. 1). max_detections: boxes an image, of all
    classes. first_stage: what `FasterRCNN` has besides.
    """

    needs_regions = True
    loss_weights = {"class": 1.0, "box": 1.0}

    def __init__(
        self,
        backbone: nn.Module,
        pyramid: nn.Module,
        box_head: nn.Module,
        classes: tuple[str, ...],
        masks: MaskBranch | None = None,
        *,
        pooling: str = "align",
        pooled_size: int = 7,
        pooled: tuple[int, int] | None = None,
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
        **first_stage: Any,
    ):
        super().__init__(backbone, pyramid, classes=classes, **first_stage)
        if pooling not in POOLINGS:
            raise OptionError(f"pooling {pooling!r}: it must be {', '.join(POOLINGS)}")
        self.box_head, self.masks = box_head, masks
        if masks is not None:
            self.has_masks, self.loss_weights = True, {**self.loss_weights, "mask": 1.0}
        # Levels that the pyramid adds above the backbone's own serve the RPN only.
        own = tuple(level for level in self.levels if level in backbone.channels)  # pyright: ignore
        self.pooled_levels = tuple(k for k in own if pooled is None or pooled[0] <= k <= pooled[1])
        if not self.pooled_levels:
            raise OptionError(f"pooled {pooled}: regions can be pooled from levels {own[0]} to {own[-1]}")
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
        pyramid = self.features(batch)
        return self.detect_in(pyramid, self.regions_of(batch, pyramid), batch.sizes)

    def regions_of(self, batch: Batch, pyramid: dict[int, Tensor]) -> Proposals:
        """What is looked at in detection: the regions that came with the batch. Raises OptionError where none did."""
        return given_regions(batch)

    def losses(self, batch: Batch) -> dict[str, Float[Tensor, ""]]:
        """The unweighted loss terms of the batch's regions: class, box; as for the examples see `FasterRCNN.losses`."""
        assert batch.targets is not None, "losses need a batch with targets"
        regions, keys = given_regions(batch), chance_of(batch)
        return self.region_losses(self.features(batch), regions, batch.targets, batch.sizes, keys)

    def detect_in(self, pyramid: dict[int, Tensor], proposals: Proposals, sizes: Int64[Tensor, "B 2"]) -> Detections:
        """The second stage: what the proposals are, and where exactly."""
        levels, scores, boxes = self.decide(pyramid, proposals, sizes)
        detections = detections_of(
            scores,
            boxes,
            proposals.valid,
            levels,
            sizes,
            self.score,
            self.box_nms,
            self.max_detections,
            self.classes,
        )
        return detections if self.masks is None else self.masks.outline(partial(self.pool, pyramid), detections)

    def decide(
        self, pyramid: dict[int, Tensor], proposals: Proposals, sizes: Int64[Tensor, "B 2"]
    ) -> tuple[Int64[Tensor, "B R"], Float[Tensor, "B R K1"], Float[Tensor, "B R _k 4"]]:
        """For each proposal its level, the probability of every class and background, and its box for every class."""
        levels, logits, offsets = self.classify(self.box_head, pyramid, proposals.boxes, proposals.valid)
        return levels, logits.softmax(-1), box.decode(offsets, proposals.boxes[:, :, None], self.box_weights)

    def classify(
        self, head: nn.Module, pyramid: dict[int, Tensor], boxes: Float[Tensor, "B R 4"], valid: Tensor
    ) -> tuple[Int64[Tensor, "B R"], Float[Tensor, "B R K1"], Float[Tensor, "B R _k 4"]]:
        """The level that each region is pooled from, its class logits and its box offsets for every class, or for all.

        head: a head of `fpn.model.box_head`.
        """
        levels, regions = self.pool(pyramid, boxes, valid, self.pooled_size)
        logits, offsets = head(regions)
        return levels, logits.unflatten(0, boxes.shape[:2]), offsets.unflatten(0, boxes.shape[:2])

    def judge(
        self, head: nn.Module, pyramid: dict[int, Tensor], examples: Examples
    ) -> tuple[Float[Tensor, "B S K1"], Float[Tensor, "B S _k 4"]]:
        """The class logits and box offsets of examples; of those that are not valid any."""
        row = filled(examples.chosen.valid)
        boxes = examples.boxes.gather(1, row[..., None].expand(-1, -1, 4))
        _, logits, offsets = self.classify(head, pyramid, boxes, examples.chosen.valid.gather(1, row))
        return logits, offsets

    def pool(
        self, pyramid: dict[int, Tensor], boxes: Float[Tensor, "B R 4"], valid: Tensor, size: int
    ) -> tuple[Int64[Tensor, "B R"], Float[Tensor, "BR d s s"]]:
        """The level that each region is pooled from (Eq. 1), and its features; zeros where it is not valid."""
        maps = {level: pyramid[level] for level in self.pooled_levels}
        levels = assign_levels(boxes, self.pooled_levels[0], self.pooled_levels[-1], canonical=self.canonical)
        chosen = levels.masked_fill(~valid, -1)
        return levels, pool_regions(maps, boxes, chosen, size, self.sampling_ratio, self.pooling)

    def region_losses(
        self,
        pyramid: dict[int, Tensor],
        proposals: Proposals,
        targets: Targets,
        sizes: Int64[Tensor, "B 2"],
        keys: Int64[Tensor, " B"],
    ) -> dict[str, Tensor]:
        """The loss terms of the second stage."""
        examples = self.examples(proposals, targets, keys)
        return self.box_losses(pyramid, examples, targets, sizes) | self.mask_losses(pyramid, examples, targets)

    def box_losses(
        self, pyramid: dict[int, Tensor], examples: Examples, targets: Targets, sizes: Int64[Tensor, "B 2"]
    ) -> dict[str, Tensor]:
        """The terms of what the sampled regions are, and where exactly."""
        logits, offsets = self.judge(self.box_head, pyramid, examples)
        kind, place = head_losses(logits, offsets, examples, self.box_weights, self.box_beta)
        return {"class": kind, "box": place}

    def mask_losses(self, pyramid: dict[int, Tensor], examples: Examples, targets: Targets) -> dict[str, Tensor]:
        """The term of the outlines, from the rows that positives can be in; none without a mask branch."""
        if self.masks is None:
            return {}
        rows = examples.first(int(self.box_positive_fraction * examples.labels.shape[1]))
        return {"mask": self.masks.loss(partial(self.pool, pyramid), rows, targets)}

    @torch.no_grad()
    def examples(self, proposals: Proposals, targets: Targets, keys: Int64[Tensor, " B"]) -> Examples:
        """What the second stage learns from.

        The ground truth itself stands among the proposals, so that there are positives from the first step.
        """
        candidates = torch.cat([proposals.boxes, targets.boxes], dim=1)
        real = torch.cat([proposals.valid, targets.valid], dim=1)
        matched = match(targets.boxes, targets.valid, candidates, self.box_positive, self.box_positive, keep_best=False)
        matched = torch.where(real, matched, IGNORED)
        chosen = sample(matched, self.box_examples, self.box_positive_fraction, keys, BOX_HEAD)
        return examples_at(chosen.take(candidates), chosen.take(matched), chosen, targets, len(self.classes))


def given_regions(batch: Batch) -> Proposals:
    """The regions that came with the batch. Raises OptionError where none did."""
    if batch.regions is None:
        raise OptionError(
            "this detector looks at given regions, and the images came without: add the proposals of another with "
            "fpn.data.with_regions(split, file)"
        )
    boxes, valid = batch.regions.boxes, batch.regions.valid
    return Proposals(boxes, valid.to(boxes.dtype), valid)


def examples_at(
    boxes: Float[Tensor, "B S 4"], index: Int64[Tensor, "B S"], chosen: Sampled, targets: Targets, background: int
) -> Examples:
    """Examples at these boxes, each of which stands for the target in row `index`."""
    labels = torch.where(chosen.positive, labels_of(targets.labels, index), background)
    return Examples(boxes, labels, truth_of(targets.boxes, index), index, chosen)


def head_losses(
    logits: Float[Tensor, "B S K1"],
    offsets: Float[Tensor, "B S _k 4"],
    examples: Examples,
    weights: tuple[float, float, float, float],
    beta: float,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """The terms for the class and for the box of one head's output (Fast R-CNN, eq. 1-3)."""
    chosen = examples.chosen
    kind = examples.labels.clamp(max=offsets.shape[2] - 1)[..., None, None].expand(-1, -1, 1, 4)
    own = offsets.gather(2, kind)[:, :, 0]
    wanted = box.encode(examples.truth, examples.boxes, weights)
    count = number_of(chosen.valid)
    return (
        classification_loss(logits, examples.labels, chosen.valid, count),
        box_loss(own, wanted, chosen.positive, beta, count),
    )
