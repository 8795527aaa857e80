"""FPN with a bottom-up path behind it: PANet's path augmentation (Liu et al. 2018, section 3.1)."""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from fpn.model.pyramid import FPN, Extra, convolution, own_levels


class PAFPN(nn.Module):
    """The paper's N2..N5 from an FPN's P2..P5: fine detail reaches the top over a few layers, not the whole backbone.

    N2 is P2. Each Nk above is a 3x3 convolution of Pk plus Nk-1, made half as large by a 3x3 convolution of stride 2;
    a ReLU follows both. mmdetection has no ReLU there, and goes up from the sum before its convolution. Levels above
    the backbone's are made from the highest N, or from C5.

    channels, width, levels, extra, norm, extra_relu, extra_norm: as of `fpn.model.pyramid.FPN`. fuse: of both paths.
    Weights begin as `fpn.model.pyramid.convolution` says.
    """

    def __init__(
        self,
        channels: Mapping[int, int],
        width: int = 256,
        levels: tuple[int, int] = (2, 6),
        extra: str = "pool",
        norm: str = "none",
        fuse: str = "sum",
        extra_relu: bool = True,
        extra_norm: bool = False,
    ):
        super().__init__()
        self.width, self.levels = width, tuple(range(levels[0], levels[1] + 1))
        own = own_levels(channels, self.levels)
        self.top_down = FPN(channels, width, (own[0], own[-1]), norm=norm, fuse=fuse)
        self.down = nn.ModuleDict({str(k): convolution(width, width, 3, norm, stride=2) for k in own[1:]})
        self.output = nn.ModuleDict({str(k): convolution(width, width, 3, norm) for k in own[1:]})
        count = len(self.levels) - len(own)
        self.extra = Extra(extra, count, channels[own[-1]], width, extra_relu, norm if extra_norm else "none")

    def forward(self, c: Mapping[int, Float[Tensor, "B _ _ _"]]) -> dict[int, Float[Tensor, "B d _ _"]]:
        """{2: C2 .. 5: C5} -> {2: N2 .. 6: N6}."""
        p = self.top_down(c)
        lowest, *higher = self.top_down.levels
        n = {lowest: p[lowest]}
        for level in higher:
            below = F.relu(self.down[str(level)](n[level - 1]))
            n[level] = F.relu(self.output[str(level)]((p[level] + below) * self.top_down.scale))
        highest = self.top_down.levels[-1]
        return n | dict(enumerate(self.extra(n[highest], c[highest]), highest + 1))
