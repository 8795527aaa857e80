"""Region features -> class logits and box offsets.

Class K, the last, is background; it has no box. Offsets are for each class, or class-agnostic: one box for all of them.
"""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from fpn.model.pyramid import convolution


class TwoLayerHead(nn.Module):
    """Two fully connected layers with ReLU, then one layer for classes and one for boxes (paper, section 4.2)."""

    def __init__(self, inputs: int, classes: int, hidden: int = 1024, class_agnostic: bool = False):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(inputs, hidden), nn.Linear(hidden, hidden)
        self.classes, self.offsets = last_layers(hidden, classes, class_agnostic)

    def forward(self, regions: Float[Tensor, "BR d s s"]) -> tuple[Float[Tensor, "BR K1"], Float[Tensor, "BR _k 4"]]:
        x = F.relu(self.fc1(regions.flatten(1)))
        x = F.relu(self.fc2(x))
        return self.classes(x).float(), self.offsets(x).float().unflatten(1, (-1, 4))


class ConvHead(nn.Module):
    """3x3 convolutions with ReLU and one fully connected layer with ReLU, then classes and boxes.

    Four convolutions with group norm are the head of Wu and He 2018 (Group Normalization, section 4.2) and detectron2's
    4conv1fc; with batch norm, that of torchvision's Faster R-CNN v2. width: channels of the regions and of every
    convolution. size: s, the side of the regions. norm: "none", "batch" or "group", after each convolution.
    """

    def __init__(
        self,
        width: int,
        size: int,
        classes: int,
        hidden: int = 1024,
        convolutions: int = 4,
        norm: str = "group",
        class_agnostic: bool = False,
    ):
        super().__init__()
        self.convs = nn.ModuleList(convolution(width, width, 3, norm) for _ in range(convolutions))
        self.fc1 = nn.Linear(width * size**2, hidden)
        self.classes, self.offsets = last_layers(hidden, classes, class_agnostic)
        for parameter in self.convs.parameters():
            if parameter.ndim == 4:
                nn.init.kaiming_normal_(parameter, mode="fan_out", nonlinearity="relu")

    def forward(self, regions: Float[Tensor, "BR d s s"]) -> tuple[Float[Tensor, "BR K1"], Float[Tensor, "BR _k 4"]]:
        x = regions
        for conv in self.convs:
            x = F.relu(conv(x))
        x = F.relu(self.fc1(x.flatten(1)))
        return self.classes(x).float(), self.offsets(x).float().unflatten(1, (-1, 4))


class StageHead(nn.Module):
    """The backbone's last stage on every region, average pooling, then classes and boxes.

    The head of the single-level baseline (paper, Table 2a: "conv5" on 14x14 regions of C4; He et al. 2015). stage: the
    backbone's own, with its weights; it is part of the head, no longer of the backbone. width: channels that it gives.
    """

    def __init__(self, stage: nn.Module, width: int, classes: int, class_agnostic: bool = False):
        super().__init__()
        self.stage = stage
        self.classes, self.offsets = last_layers(width, classes, class_agnostic)

    def forward(self, regions: Float[Tensor, "BR d s s"]) -> tuple[Float[Tensor, "BR K1"], Float[Tensor, "BR _k 4"]]:
        x = self.stage(regions).mean((2, 3))
        return self.classes(x).float(), self.offsets(x).float().unflatten(1, (-1, 4))


def last_layers(inputs: int, classes: int, class_agnostic: bool) -> tuple[nn.Linear, nn.Linear]:
    """The layer for the classes and the one for the offsets, initialised as in Fast R-CNN."""
    layers = nn.Linear(inputs, classes + 1), nn.Linear(inputs, 4 if class_agnostic else classes * 4)
    for layer, std in zip(layers, (0.01, 0.001), strict=True):
        nn.init.normal_(layer.weight, std=std)
        nn.init.zeros_(layer.bias)
    return layers
