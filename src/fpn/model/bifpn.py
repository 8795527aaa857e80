"""The weighted bi-directional pyramid of EfficientDet (Tan, Pang, Le 2020, section 3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from fpn.model.pyramid import Extra, convolution, halve, own_levels, upsample_to


class Fusion(nn.Module):
    """Fast normalised fusion of maps of one size (section 3.3), then a swish and a depthwise separable convolution.

    Each map has one weight, which begins at 1; a ReLU keeps it from being negative, and all are divided by their sum.
    """

    def __init__(self, inputs: int, width: int, norm: str):
        super().__init__()
        self.weights = nn.Parameter(torch.ones(inputs))
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        nn.init.kaiming_uniform_(self.depthwise.weight, a=1)
        self.pointwise = convolution(width, width, 1, norm)

    def forward(self, *maps: Float[Tensor, "B d h w"]) -> Float[Tensor, "B d h w"]:
        weights = F.relu(self.weights)
        weights = weights / (weights.sum() + 1e-4)
        fused = weights[0] * maps[0]
        for n, x in enumerate(maps[1:], 1):
            fused = fused + weights[n] * x
        return self.pointwise(self.depthwise(F.silu(fused)))


class BiLayer(nn.Module):
    """Once down and once up the pyramid (figure 3); in between, the map that came in is merged a second time."""

    def __init__(self, levels: Sequence[int], width: int, norm: str):
        super().__init__()
        self.down = nn.ModuleDict({str(k): Fusion(2, width, norm) for k in levels[:-1]})
        self.up = nn.ModuleDict({str(k): Fusion(2 if k == levels[-1] else 3, width, norm) for k in levels[1:]})

    def forward(self, p: Mapping[int, Float[Tensor, "B d _ _"]]) -> dict[int, Float[Tensor, "B d _ _"]]:
        lowest, highest = min(p), max(p)
        down = {highest: p[highest]}
        for level in reversed(range(lowest, highest)):
            down[level] = self.down[str(level)](p[level], upsample_to(down[level + 1], p[level]))
        up = {lowest: down[lowest]}
        for level in range(lowest + 1, highest + 1):
            own = (p[level],) if level == highest else (p[level], down[level])
            up[level] = self.up[str(level)](*own, halve(up[level - 1], kernel=3))
        return up


class BiFPN(nn.Module):
    """1x1 convolutions to one width, the levels above the backbone's, and `repeats` layers down and up on all of them.

    channels, width, levels, extra, norm, extra_relu, extra_norm: as of `fpn.model.pyramid.FPN`. EfficientDet-D0 has
    width 64, levels 3 to 7, batch norm and 3 layers; D1 to D7 have more of each. It differs from this in two places:
    the first layer has 1x1 convolutions of its own for the second use of a map, and P6 comes from C5 by one of its own
    with a max pooling of 3x3. Weights begin as `fpn.model.pyramid.convolution` says, the depthwise ones too.
    """

    def __init__(
        self,
        channels: Mapping[int, int],
        width: int = 256,
        levels: tuple[int, int] = (3, 7),
        extra: str = "max",
        norm: str = "batch",
        repeats: int = 3,
        extra_relu: bool = True,
        extra_norm: bool = False,
    ):
        super().__init__()
        self.width, self.levels = width, tuple(range(levels[0], levels[1] + 1))
        self.own = own_levels(channels, self.levels)
        self.lateral = nn.ModuleDict({str(k): convolution(channels[k], width, 1, norm) for k in self.own})
        count, c5 = len(self.levels) - len(self.own), channels[self.own[-1]]
        self.extra = Extra(extra, count, c5, width, extra_relu, norm if extra_norm else "none")
        self.layers = nn.ModuleList(BiLayer(self.levels, width, norm) for _ in range(repeats))

    def forward(self, c: Mapping[int, Float[Tensor, "B _ _ _"]]) -> dict[int, Float[Tensor, "B d _ _"]]:
        """{3: C3 .. 5: C5} -> {3: P3 .. 7: P7}."""
        p = {level: self.lateral[str(level)](c[level]) for level in self.own}
        highest = self.own[-1]
        p |= dict(enumerate(self.extra(p[highest], c[highest]), highest + 1))
        for layer in self.layers:
            p = layer(p)
        return p
