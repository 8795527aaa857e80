"""NAS-FPN: a pyramid whose connections were found by search (Ghiasi, Lin, Le 2019, figure 7c)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from fpn.errors import OptionError
from fpn.model.pyramid import Extra, convolution, own_levels, upsample_to

DEPTH = 5  # levels that the cell merges


def shrink_to(x: Float[Tensor, "B d _h _w"], like: Float[Tensor, "B d h w"], factor: int) -> Float[Tensor, "B d h w"]:
    """The largest of every factor x factor places, in the size of `like`; at the edges of odd sizes there are fewer."""
    below, right = (factor * wanted - side for wanted, side in zip(like.shape[2:], x.shape[2:], strict=True))
    return F.max_pool2d(F.pad(x, (0, right, 0, below), value=-torch.inf), factor)


def attention(top: Float[Tensor, "B d h w"], x: Float[Tensor, "B d h w"]) -> Float[Tensor, "B d h w"]:
    """The global pooling cell: `top`, from the higher level, decides how much of each channel of `x` joins it.

    Max pooling, and the higher level as the gate, as in the authors' code; mmdetection pools the average of the other.
    """
    return top + x * top.amax((2, 3), keepdim=True).sigmoid()


class NasCell(nn.Module):
    """Seven merges, each followed by a ReLU and a 3x3 convolution; the last of each level is its output."""

    def __init__(self, width: int, norm: str):
        super().__init__()
        self.convolutions = nn.ModuleList(convolution(width, width, 3, norm) for _ in range(7))

    def forward(self, *p: Float[Tensor, "B d _ _"]) -> tuple[Float[Tensor, "B d _ _"], ...]:
        """P3..P7, or five other levels in a row -> the same; inputs that no merge takes join their level's output."""

        def node(n: int, merged: Float[Tensor, "B d h w"]) -> Float[Tensor, "B d h w"]:
            return self.convolutions[n](F.relu(merged))

        p3, p4, p5, p6, p7 = p
        first = node(0, attention(upsample_to(p6, p4), p4))
        second = node(1, p4 + first)
        out3 = node(2, p3 + upsample_to(second, p3))
        out4 = node(3, second + shrink_to(out3, p4, 2))
        out5 = node(4, attention(shrink_to(out4, p5, 2), shrink_to(out3, p5, 4)) + p5)
        out7 = node(5, attention(shrink_to(out5, p7, 4), shrink_to(second, p7, 8)) + p7)
        out6 = node(6, attention(upsample_to(out7, p6), shrink_to(out5, p6, 2)))
        return out3, out4, out5, out6, out7


class NASFPN(nn.Module):
    """1x1 convolutions to one width, the levels above the backbone's, and `repeats` cells on all five levels.

    It was searched and published for P3..P7. On five other levels in a row, such as P2..P6, the same cell works that
    much lower or higher, for which nothing is published; more or fewer levels are an OptionError.

    channels, width, levels, extra, norm, extra_relu, extra_norm: as of `fpn.model.pyramid.FPN`. As published: width
    256, "max" for P6 and P7, batch norm, 7 cells. Weights begin as `fpn.model.pyramid.convolution` says.
    """

    def __init__(
        self,
        channels: Mapping[int, int],
        width: int = 256,
        levels: tuple[int, int] = (3, 7),
        extra: str = "max",
        norm: str = "batch",
        repeats: int = 7,
        extra_relu: bool = True,
        extra_norm: bool = False,
    ):
        super().__init__()
        self.width, self.levels = width, tuple(range(levels[0], levels[1] + 1))
        if len(self.levels) != DEPTH:
            raise OptionError(
                f"the neck nas_fpn merges {DEPTH} levels, not the {len(self.levels)} of P{levels[0]} to P{levels[1]}; "
                "published are the levels 3 7"
            )
        self.own = own_levels(channels, self.levels)
        self.lateral = nn.ModuleDict({str(k): convolution(channels[k], width, 1, norm) for k in self.own})
        count, c5 = len(self.levels) - len(self.own), channels[self.own[-1]]
        self.extra = Extra(extra, count, c5, width, extra_relu, norm if extra_norm else "none")
        self.cells = nn.ModuleList(NasCell(width, norm) for _ in range(repeats))

    def forward(self, c: Mapping[int, Float[Tensor, "B _ _ _"]]) -> dict[int, Float[Tensor, "B d _ _"]]:
        """{3: C3 .. 5: C5} -> {3: P3 .. 7: P7}."""
        own, highest = [self.lateral[str(level)](c[level]) for level in self.own], self.own[-1]
        p = (*own, *self.extra(own[-1], c[highest]))
        for cell in self.cells:
            p = cell(*p)
        return dict(zip(self.levels, p, strict=True))
