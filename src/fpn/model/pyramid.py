"""C2..C5 -> P2..P6: lateral connections and the top-down pathway (Lin et al. 2017, section 3)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from fpn.errors import OptionError

NORMS = ("none", "batch", "group")


def upsample_to(top: Float[Tensor, "B d _h _w"], like: Float[Tensor, "B _c h w"]) -> Float[Tensor, "B d h w"]:
    """Nearest-neighbour upsampling to the size of `like`: doubling would miss by one where a size is odd."""
    return F.interpolate(top, size=like.shape[-2:], mode="nearest")


def every_second(x: Float[Tensor, "B d h w"]) -> Float[Tensor, "B d _h _w"]:
    """Every second row and column, from the first on.

    Neither a slice nor pooling with stride 2: torch 2.11 would export them for odd or for even sizes only.
    """
    for dim in (2, 3):
        x = x.index_select(dim, torch.arange(0, x.shape[dim], 2, device=x.device))
    return x


def convolution(inputs: int, outputs: int, kernel: int, norm: str) -> nn.Module:
    """A convolution that keeps the size, no non-linearity; its bias gives way to a norm where there is one."""
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=norm == "none")
    nn.init.kaiming_uniform_(conv.weight, a=1)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    match norm:
        case "none":
            return conv
        case "batch":
            return nn.Sequential(conv, nn.BatchNorm2d(outputs))
        case "group":
            if outputs % 32:
                raise OptionError(f"group norm needs pyramid channels in multiples of 32, not {outputs}")
            return nn.Sequential(conv, nn.GroupNorm(32, outputs))
    raise OptionError(f"pyramid norm {norm!r}: it must be {', '.join(NORMS)}")


class FPN(nn.Module):
    """The Feature Pyramid Network.

    channels: those of each backbone level, {2: .., 3: .., 4: .., 5: ..}.
    width: d, the channels of every pyramid level (256 in the paper).
    norm: "none" (the paper), "batch" or "group" after each convolution.
    fuse: "sum" (the paper) or "average" of lateral and upsampled map.
    """

    def __init__(self, channels: Mapping[int, int], width: int = 256, norm: str = "none", fuse: str = "sum"):
        super().__init__()
        if fuse not in ("sum", "average"):
            raise OptionError(f"pyramid fuse {fuse!r}: it must be sum or average")
        self.width = width
        self.scale = 1.0 if fuse == "sum" else 0.5
        self.lateral = nn.ModuleDict({str(k): convolution(c, width, 1, norm) for k, c in channels.items()})
        self.output = nn.ModuleDict({str(k): convolution(width, width, 3, norm) for k in channels})
        self.levels = tuple(sorted(channels))

    def forward(self, c: Mapping[int, Float[Tensor, "B _ _ _"]]) -> dict[int, Float[Tensor, "B d _ _"]]:
        """{2: C2 .. 5: C5} -> {2: P2 .. 6: P6}; P6 is P5 at every second place (for the RPN only)."""
        *lower, highest = self.levels
        top = self.lateral[str(highest)](c[highest])
        p = {highest: self.output[str(highest)](top)}
        for level in reversed(lower):
            top = (self.lateral[str(level)](c[level]) + upsample_to(top, c[level])) * self.scale
            p[level] = self.output[str(level)](top)
        p[highest + 1] = every_second(p[highest])
        return {level: p[level] for level in sorted(p)}
