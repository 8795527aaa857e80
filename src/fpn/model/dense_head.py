"""The head of one-stage detectors: two towers slid over every pyramid level, one for classes and one for boxes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fpn.errors import OptionError
from fpn.model.pyramid import GroupNorm

PRIOR = 0.01  # the score that a new head gives to everything (RetinaNet, section 4.1)
NORMS = ("none", "group")


@dataclass(frozen=True)
class DenseOutput:
    """What the head says of every anchor, by level: K class logits, 4 box offsets, and how central it is (a logit)."""

    logits: dict[int, Float[Tensor, "B _ K"]]
    offsets: dict[int, Float[Tensor, "B _ 4"]]
    centerness: dict[int, Float[Tensor, "B _"]] | None = None


class DenseHead(nn.Module):
    """3x3 convolutions shared by all levels (RetinaNet, section 4; FCOS, figure 2).

    levels: those of the pyramid. norm: "none" or "group" after each convolution of the towers; bias: whether these have
    a bias although a norm follows (FCOS has, torchvision's RetinaNet v2 has not). centerness: one more output of the
    box tower for each anchor. scaled: the box offsets of each level are times a number of its own, which is learnt.
    """

    def __init__(
        self,
        width: int,
        classes: int,
        levels: tuple[int, ...],
        anchors_per_cell: int = 1,
        convolutions: int = 4,
        norm: str = "none",
        bias: bool = True,
        centerness: bool = False,
        scaled: bool = False,
    ):
        super().__init__()
        self.class_tower = tower(width, convolutions, norm, bias)
        self.box_tower = tower(width, convolutions, norm, bias)
        self.classes = nn.Conv2d(width, anchors_per_cell * classes, 3, padding=1)
        self.offsets = nn.Conv2d(width, anchors_per_cell * 4, 3, padding=1)
        self.centerness = nn.Conv2d(width, anchors_per_cell, 3, padding=1) if centerness else None
        self.scales = nn.ParameterDict({str(k): torch.ones(()) for k in levels}) if scaled else None
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.constant_(self.classes.bias, -math.log((1 - PRIOR) / PRIOR))  # pyright: ignore[reportArgumentType]
        self.count = classes

    def forward(self, pyramid: Mapping[int, Float[Tensor, "B d _ _"]]) -> DenseOutput:
        logits, offsets, centerness = {}, {}, {}
        for level, x in pyramid.items():
            kind, place = self.class_tower(x), self.box_tower(x)
            logits[level] = rows(self.classes(kind), self.count)
            offsets[level] = rows(self.offsets(place), 4)
            if self.scales is not None:
                offsets[level] = offsets[level] * self.scales[str(level)]
            if self.centerness is not None:
                centerness[level] = rows(self.centerness(place), 1)[..., 0]
        return DenseOutput(logits, offsets, centerness or None)


def tower(width: int, convolutions: int, norm: str, bias: bool) -> nn.Sequential:
    """Convolutions that keep the size, each with its norm and a ReLU."""
    if norm not in NORMS:
        raise OptionError(f"tower norm {norm!r}: it must be {', '.join(NORMS)}")
    if norm == "group" and width % 32:
        raise OptionError(f"group norm needs pyramid channels in multiples of 32, not {width}")
    layers = []
    for _ in range(convolutions):
        layers.append(nn.Conv2d(width, width, 3, padding=1, bias=bias or norm == "none"))
        if norm == "group":
            layers.append(GroupNorm(32, width))
        layers.append(nn.ReLU())
    return nn.Sequential(*layers)


def rows(x: Float[Tensor, "B _c _ _"], count: int) -> Float[Tensor, "B _A {count}"]:
    """A map with `count` channels for each anchor as one row an anchor, in the anchors' order (row, column, anchor)."""
    return x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, count).float()


def joined(levels: Mapping[int, Tensor]) -> Tensor:
    """The rows of all levels one after the other."""
    return torch.cat(list(levels.values()), dim=1)
