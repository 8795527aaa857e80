"""Cascade R-CNN (Cai and Vasconcelos 2018): box heads in a row, each trained for boxes as good as the last one's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from fpn import boxes as box
from fpn.errors import OptionError
from fpn.model.fast_rcnn import examples_at, head_losses
from fpn.model.faster_rcnn import FasterRCNN
from fpn.model.matching import IGNORED, match
from fpn.model.rpn import Proposals
from fpn.model.sampling import Examples
from fpn.structures import Targets

AVERAGES = ("scores", "logits")


class CascadeRCNN(FasterRCNN):
    """Faster R-CNN with several box heads. Each refines the boxes of the one before (section 4.1, figure 3d).

    parts: those of FasterRCNN, its box head a ModuleList of one head for each stage.
    box_positive: for each stage the IoU from which a region is positive, below which background (section 4.2).
    box_weights: for each stage those of its offsets, which shrink from stage to stage.
    stage_weights: what each stage's loss terms count in training. gradient_scale: what the gradients of the box heads
    count in the pyramid. detectron2 has (1, 1, 1) and 1/3, mmdetection (1, 0.5, 0.25) and 1.
    average: over the stages, at detection, of "scores" (detectron2) or "logits" (mmdetection).

    Loss terms: rpn_class, rpn_box, class_1, box_1, class_2 ..., and mask where it has masks, from stage 1's examples.
    """

    box_head: nn.ModuleList

    def __init__(
        self,
        *parts: Any,
        box_positive: tuple[float, ...] = (0.5, 0.6, 0.7),
        box_weights: tuple[tuple[float, float, float, float], ...] = (
            (10.0, 10.0, 5.0, 5.0),
            (20.0, 20.0, 10.0, 10.0),
            (30.0, 30.0, 15.0, 15.0),
        ),
        stage_weights: tuple[float, ...] = (1.0, 1.0, 1.0),
        gradient_scale: float = 1 / 3,
        average: str = "scores",
        **settings: Any,
    ):
        if not 0 < len(box_positive) == len(box_weights) == len(stage_weights):
            raise OptionError(
                f"a cascade needs one entry for each stage: box_positive has {len(box_positive)}, box_weights "
                f"{len(box_weights)} and stage_weights {len(stage_weights)}"
            )
        if average not in AVERAGES:
            raise OptionError(f"average {average!r}: it must be {', '.join(AVERAGES)}")
        super().__init__(*parts, box_positive=box_positive[0], box_weights=box_weights[0], **settings)
        assert len(self.box_head) == len(box_positive), "one head for each stage"
        self.stage_positive, self.stage_offsets = box_positive, box_weights
        self.gradient_scale, self.average = gradient_scale, average
        others = {name: weight for name, weight in self.loss_weights.items() if name not in ("class", "box")}
        stages = {f"{term}_{n}": weight for n, weight in enumerate(stage_weights, 1) for term in ("class", "box")}
        self.loss_weights = others | stages

    def decide(
        self, pyramid: dict[int, Tensor], proposals: Proposals, sizes: Int64[Tensor, "B 2"]
    ) -> tuple[Int64[Tensor, "B R"], Float[Tensor, "B R K1"], Float[Tensor, "B R _k 4"]]:
        """For each proposal the level of its last stage, the average of all stages' scores, the last stage's box."""
        regions, votes = proposals.boxes, []
        levels, boxes = torch.zeros_like(proposals.valid, dtype=torch.int64), regions[:, :, None]
        for head, weights in zip(self.box_head, self.stage_offsets, strict=True):
            levels, logits, offsets = self.classify(head, pyramid, regions, proposals.valid)
            boxes = box.decode(offsets, regions[:, :, None], weights)
            regions = refined(boxes, logits, sizes)
            votes.append(logits if self.average == "logits" else logits.softmax(-1))
        vote = torch.stack(votes).mean(0)
        return levels, vote.softmax(-1) if self.average == "logits" else vote, boxes

    def box_losses(
        self, pyramid: dict[int, Tensor], examples: Examples, targets: Targets, sizes: Int64[Tensor, "B 2"]
    ) -> dict[str, Tensor]:
        """The terms of every stage.

        Regions are sampled once. Later stages learn from all of them, refined and matched anew: better boxes make the
        positives that a higher IoU asks for (section 4.2).
        """
        pyramid = {level: scaled_gradient(p, self.gradient_scale) for level, p in pyramid.items()}
        losses = {}
        for n, (head, weights) in enumerate(zip(self.box_head, self.stage_offsets, strict=True), 1):
            logits, offsets = self.judge(head, pyramid, examples)
            losses[f"class_{n}"], losses[f"box_{n}"] = head_losses(logits, offsets, examples, weights, self.box_beta)
            if n < len(self.box_head):
                with torch.no_grad():
                    boxes = refined(box.decode(offsets, examples.boxes[:, :, None], weights), logits, sizes)
                examples = rematched(examples, boxes, targets, self.stage_positive[n], len(self.classes))
        return losses


@torch.no_grad()
def rematched(
    examples: Examples, boxes: Float[Tensor, "B S 4"], targets: Targets, iou: float, background: int
) -> Examples:
    """The same examples at other boxes: what each is follows from its IoU there; an empty box is none any more."""
    chosen = examples.chosen
    valid = chosen.valid & (boxes[..., 2:] > boxes[..., :2]).all(-1)
    index = match(targets.boxes, targets.valid, boxes, iou, iou, keep_best=False)
    index = torch.where(valid, index, IGNORED)
    return examples_at(boxes, index, replace(chosen, valid=valid, positive=index >= 0), targets, background)


def refined(
    boxes: Float[Tensor, "B R _k 4"], logits: Float[Tensor, "B R K1"], sizes: Int64[Tensor, "B 2"]
) -> Float[Tensor, "B R 4"]:
    """The regions of the next stage: one stage's boxes, those of the likeliest class where each class has its own.

    No gradient flows through them. Empty where weights went NaN, which must not become indices.
    """
    kind = logits[..., :-1].argmax(-1).clamp(max=boxes.shape[2] - 1)
    own = boxes.detach().gather(2, kind[..., None, None].expand(-1, -1, 1, 4))[:, :, 0]
    return box.clip(own.nan_to_num(nan=0.0), sizes)


def scaled_gradient(x: Tensor, scale: float) -> Tensor:
    """`x` itself, whose gradient is `scale` times as large further back."""
    return x.detach() + scale * (x - x.detach())
