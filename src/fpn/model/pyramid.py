"""C2..C5 -> P2..P6: lateral connections and the top-down pathway (Lin et al. 2017, section 3)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from fpn.errors import OptionError

NORMS = ("none", "batch", "group")
EXTRAS = ("pool", "max", "p5", "c5")


def upsample_to(top: Float[Tensor, "B d _h _w"], like: Float[Tensor, "B _c h w"]) -> Float[Tensor, "B d h w"]:
    """Nearest-neighbour upsampling to the size of `like`: doubling would miss by one where a size is odd."""
    return F.interpolate(top, size=like.shape[-2:], mode="nearest")


def halve(x: Float[Tensor, "B d h w"], kernel: int = 2) -> Float[Tensor, "B d _h _w"]:
    """Max pooling of stride 2; half of an odd size is rounded up. A kernel of 3 is centred on every second place."""
    # Of other than even sizes torch 2.11 would export it for the parity of the example only. The size that comes out is
    # written as that of a convolution, so that the exporter knows it for the same.
    below, right = ((side - 1) // 2 * 2 + 2 - side for side in x.shape[-2:])
    even = F.pad(x, (0, right, 0, below), value=-torch.inf)
    return F.max_pool2d(even, kernel, stride=2, padding=(kernel - 1) // 2)


def every_second(x: Float[Tensor, "B d h w"]) -> Float[Tensor, "B d _h _w"]:
    """Every second row and column, from the first on."""
    return halve(x, kernel=1)


def convolution(inputs: int, outputs: int, kernel: int, norm: str, stride: int = 1) -> nn.Module:
    """A convolution without non-linearity; its bias gives way to a norm where there is one.

    It keeps the size, or with stride 2 halves it, rounding up. Weights are drawn uniformly with variance 1 / fan-in and
    biases are 0 (Caffe2's XavierFill, as in detectron2 and torchvision).
    """
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=norm == "none")
    nn.init.kaiming_uniform_(conv.weight, a=1)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    match norm:
        case "none":
            return conv
        case "batch":
            return nn.Sequential(conv, BatchNorm(outputs))
        case "group":
            if outputs % 32:
                raise OptionError(f"group norm needs pyramid channels in multiples of 32, not {outputs}")
            return nn.Sequential(conv, GroupNorm(32, outputs))
    raise OptionError(f"pyramid norm {norm!r}: it must be {', '.join(NORMS)}")


class BatchNorm(nn.BatchNorm2d):
    """nn.BatchNorm2d that also learns from one map of one place, where nothing varies: by its running statistics."""

    def forward(self, input: Tensor) -> Tensor:
        if self.training and input.numel() == self.num_features:
            mean, var = self.running_mean, self.running_var
            return F.batch_norm(input, mean, var, self.weight, self.bias, eps=self.eps)
        return super().forward(input)


class GroupNorm(nn.GroupNorm):
    """nn.GroupNorm that also takes a map of one place and one channel a group, where nothing but its bias is left."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)


class Extra(nn.Module):
    """The levels above the backbone's highest, each half the size of the one below.

    method: "pool" takes every second place of the level below (FPN paper, footnote 1; LastLevelMaxPool of detectron2
    and torchvision), "max" the largest of 2x2 (NAS-FPN); "p5" makes them by 3x3 convolutions of stride 2, the first
    from the highest pyramid level, "c5" the first from the highest backbone level (RetinaNet, section 4; LastLevelP6P7
    of detectron2 and torchvision).
    relu: whether there is one before each convolution but the first. norm: what follows each convolution. mmdetection
    gives these levels the norm of the others and, but for FCOS, no ReLU.
    """

    def __init__(self, method: str, count: int, c5: int, width: int, relu: bool = True, norm: str = "none"):
        super().__init__()
        if method not in EXTRAS:
            raise OptionError(f"extra levels {method!r}: it must be {', '.join(EXTRAS)}")
        self.method, self.count, self.relu = method, count, relu
        inputs = [c5 if method == "c5" else width, *[width] * (count - 1)][:count]
        learnt = method in ("p5", "c5")
        self.convs = nn.ModuleList(convolution(n, width, 3, norm, stride=2) for n in inputs if learnt)

    def forward(self, p5: Float[Tensor, "B d _ _"], c5: Float[Tensor, "B _c _ _"]) -> list[Float[Tensor, "B d _ _"]]:
        """P6, P7 ... from P5 and C5."""
        levels, x = [], c5 if self.method == "c5" else p5
        for n in range(self.count):
            x = self.above(n, x)
            levels.append(x)
        return levels

    def above(self, n: int, x: Float[Tensor, "B _ h w"]) -> Float[Tensor, "B d _h _w"]:
        """The n-th of the extra levels, counted from 0, from the level below."""
        match self.method:
            case "pool":
                return every_second(x)
            case "max":
                return halve(x)
        return self.convs[n](F.relu(x) if n and self.relu else x)


class FPN(nn.Module):
    """The Feature Pyramid Network.

    channels: those of each backbone level, {2: .., 3: .., 4: .., 5: ..}.
    width: d, the channels of every pyramid level (256 in the paper).
    levels: the lowest and the highest level it gives; the backbone need not have the highest, see `Extra`.
    extra: how levels above the backbone's are made.
    norm: "none" (the paper), "batch" or "group" after each convolution.
    fuse: "sum" (the paper) or "average" of lateral and upsampled map.
    extra_relu: whether there is a ReLU between the levels that are made by convolutions. extra_norm: whether the norm
        follows these as well; see `Extra`.

    Three options take a part away, to show what it is worth (the paper's Tables 1 to 3):
    top_down: False for rows (d), a bottom-up pyramid: each level is made from its own C alone.
    lateral: False for rows (e): C5 alone enters, all levels below are made from it by upsampling; C2..C4 only say how
        large they are.
    finest: rows (f): the pathway starts at the backbone's highest level all the same, but of `levels` there is but one,
        its end.
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
        top_down: bool = True,
        lateral: bool = True,
        finest: bool = False,
    ):
        super().__init__()
        if fuse not in ("sum", "average"):
            raise OptionError(f"pyramid fuse {fuse!r}: it must be sum or average")
        if not (top_down or lateral):
            raise OptionError("a pyramid without top-down pathway and without lateral connections has nothing below C5")
        self.width, self.levels, self.top_down = width, tuple(range(levels[0], levels[1] + 1)), top_down
        self.own = own_levels(channels, tuple(range(levels[0], max(channels) + 1)) if finest else self.levels)
        self.scale = 1.0 if fuse == "sum" else 0.5
        entering = self.own if lateral else self.own[-1:]
        self.lateral = nn.ModuleDict({str(k): convolution(channels[k], width, 1, norm) for k in entering})
        given = [k for k in self.own if k in self.levels]
        self.output = nn.ModuleDict({str(k): convolution(width, width, 3, norm) for k in given})
        count, c5 = len(self.levels) - len(given), channels[self.own[-1]]
        self.extra = Extra(extra, count, c5, width, extra_relu, norm if extra_norm else "none")

    def forward(self, c: Mapping[int, Float[Tensor, "B _ _ _"]]) -> dict[int, Float[Tensor, "B d _ _"]]:
        """{2: C2 .. 5: C5} -> {2: P2 .. 6: P6}."""
        *lower, highest = self.own
        top = self.lateral[str(highest)](c[highest])
        merged = {highest: top}
        for level in reversed(lower):
            merged[level] = top = self.merge(level, top, c[level])
        p = {int(level): output(merged[int(level)]) for level, output in self.output.items()}
        if highest in p:
            p |= dict(enumerate(self.extra(p[highest], c[highest]), highest + 1))
        return {level: p[level] for level in self.levels}

    def merge(
        self, level: int, top: Float[Tensor, "B d _ _"], c: Float[Tensor, "B _c h w"]
    ) -> Float[Tensor, "B d h w"]:
        """What comes down from the level above and what enters from the side, where there is both (figure 3)."""
        if not self.top_down:
            return self.lateral[str(level)](c)
        down = upsample_to(top, c)
        if str(level) not in self.lateral:
            return down
        return (self.lateral[str(level)](c) + down) * self.scale


class SingleLevel(nn.Module):
    """No pyramid: one of the backbone's levels as it is, the baselines on C4 and on C5 (paper, Tables 1 to 3, a and b).

    channels: those of each backbone level. level: the one it gives; `width` are its channels.
    """

    def __init__(self, channels: Mapping[int, int], level: int):
        super().__init__()
        self.levels = own_levels(channels, (level,))
        self.width = channels[level]

    def forward(self, c: Mapping[int, Float[Tensor, "B _ _ _"]]) -> dict[int, Float[Tensor, "B d _ _"]]:
        """{2: C2 .. 5: C5} -> {4: C4}."""
        return {level: c[level] for level in self.levels}


def own_levels(channels: Mapping[int, int], levels: tuple[int, ...]) -> tuple[int, ...]:
    """Those of a pyramid's levels that the backbone has; all the others lie above them. Raises OptionError if not."""
    own = tuple(level for level in levels if level in channels)
    if not own or own != levels[: len(own)] or len(own) < len(levels) and own[-1] != max(channels):
        raise OptionError(
            f"a pyramid of levels {', '.join(map(str, levels))} cannot stand on a backbone with levels "
            f"{', '.join(map(str, channels))}: its lowest must be one of these, and none between may be missing"
        )
    return own
