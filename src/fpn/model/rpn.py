"""The region proposal network: one small head slid over every pyramid level, and what becomes of its output."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from fpn import boxes as box
from fpn.model.nms import nms

OFFSET_WEIGHTS = (1.0, 1.0, 1.0, 1.0)


@dataclass(frozen=True)
class RpnOutput:
    """Objectness logits and box offsets of every anchor, by level."""

    logits: dict[int, Float[Tensor, "B _"]]
    offsets: dict[int, Float[Tensor, "B _ 4"]]


@dataclass(frozen=True)
class Proposals:
    """R candidate boxes an image, highest score first; `valid` tells proposals from padding.

    levels: of the anchor that each was made from; None where they come from elsewhere.
    """

    boxes: Float[Tensor, "B R 4"]
    scores: Float[Tensor, "B R"]
    valid: Bool[Tensor, "B R"]
    levels: Int64[Tensor, "B R"] | None = None


class RpnHead(nn.Module):
    """A 3x3 convolution and two sibling 1x1 convolutions, shared by all levels (paper, section 4.1)."""

    def __init__(self, width: int, anchors_per_cell: int, convolutions: int = 1):
        super().__init__()
        self.shared = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(convolutions))
        self.objectness = nn.Conv2d(width, anchors_per_cell, 1)
        self.offsets = nn.Conv2d(width, anchors_per_cell * 4, 1)
        for name, parameter in self.named_parameters():
            nn.init.zeros_(parameter) if name.endswith("bias") else nn.init.normal_(parameter, std=0.01)

    def forward(self, pyramid: Mapping[int, Float[Tensor, "B d _ _"]]) -> RpnOutput:
        logits, offsets = {}, {}
        for level, x in pyramid.items():
            for conv in self.shared:
                x = F.relu(conv(x))
            # (row, column, ratio) is the order of the anchors.
            logits[level] = self.objectness(x).permute(0, 2, 3, 1).flatten(1).float()
            offsets[level] = self.offsets(x).permute(0, 2, 3, 1).reshape(x.shape[0], -1, 4).float()
        return RpnOutput(logits, offsets)


class SeparateRpnHeads(nn.Module):
    """A head of its own for each level, to see what sharing it is worth.

    The paper shares it, and reports similar accuracy without (section 4.1).
    """

    def __init__(self, levels: Iterable[int], width: int, anchors_per_cell: int, convolutions: int = 1):
        super().__init__()
        self.heads = nn.ModuleDict({str(k): RpnHead(width, anchors_per_cell, convolutions) for k in levels})

    def forward(self, pyramid: Mapping[int, Float[Tensor, "B d _ _"]]) -> RpnOutput:
        found = [self.heads[str(level)]({level: x}) for level, x in pyramid.items()]
        logits = {level: x for out in found for level, x in out.logits.items()}
        return RpnOutput(logits, {level: x for out in found for level, x in out.offsets.items()})


def propose(
    rpn_out: RpnOutput,
    anchors: Mapping[int, Float[Tensor, "_ 4"]],
    sizes: Int64[Tensor, "B 2"],
    per_level: int,
    total: int,
    iou: float,
    score: float = 0.0,
    min_side: float = 1e-3,
) -> Proposals:
    """The best `per_level` anchors of each level, decoded, clipped, thinned by NMS within the level; the best of all.

    None has a score below `score` or a side below `min_side` pixels. No gradient flows through proposals. The
    number of rows is always `total`, whatever the image size.
    """
    found = [
        best_of_level(rpn_out.logits[k].detach(), rpn_out.offsets[k].detach(), anchors[k], per_level) for k in anchors
    ]
    boxes, scores, valid = (torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
    level = torch.arange(len(found), device=boxes.device).repeat_interleave(per_level).expand_as(scores)
    boxes = box.clip(boxes, sizes)
    valid = valid & (scores >= score) & ((boxes[..., 2:] - boxes[..., :2]) >= min_side).all(-1)
    boxes = torch.where(valid[..., None], boxes, 0.0)  # weights that went NaN must not become indices
    keep = nms(boxes, scores, level, valid, iou)
    scores, order = torch.where(keep, scores, -1.0).topk(min(total, scores.shape[1]), dim=1)
    boxes, level = boxes.gather(1, order[..., None].expand(-1, -1, 4)), level.gather(1, order) + min(anchors)
    return Proposals(boxes, scores, scores >= 0, level)


def best_of_level(
    logits: Float[Tensor, "B A"], offsets: Float[Tensor, "B A 4"], anchors: Float[Tensor, "A 4"], count: int
) -> tuple[Float[Tensor, "B n 4"], Float[Tensor, "B n"], Bool[Tensor, "B n"]]:
    """Boxes and scores of the `count` anchors with the highest objectness, and which are real.

    Padded with -inf first: a level with fewer anchors gives `count` rows too, and no shape depends on the image size.
    """
    value, position = F.pad(logits, (0, count), value=-torch.inf).topk(count, dim=1)
    position = position.clamp(max=logits.shape[1] - 1)
    chosen = offsets.gather(1, position[..., None].expand(-1, -1, 4))
    return box.decode(chosen, anchors[position], OFFSET_WEIGHTS), value.sigmoid(), value > -torch.inf
