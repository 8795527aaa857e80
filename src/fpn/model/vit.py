"""Plain vision transformers under a detector: the simple feature pyramid (ViTDet, Li et al. 2022, section 3).

A plain ViT has one map, at the stride of its patches. `SimplePyramid` makes C2..C5 of it, which every neck takes;
`SimpleNeck` is the paper's own, without a top-down pathway. Attention is global in every block, not in windows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from fpn.errors import OptionError
from fpn.model.detector import IMAGENET_MEAN, IMAGENET_STD
from fpn.model.pyramid import Extra, convolution, halve, own_levels

LEVELS = (2, 3, 4, 5)


class PlainViT(nn.Module):
    """torchvision's VisionTransformer for images of every size: {level: map}, one level."""

    def __init__(self, model: VisionTransformer):
        super().__init__()
        level = model.patch_size.bit_length() - 1
        if 2**level != model.patch_size:
            raise OptionError(f"a ViT with patches of {model.patch_size} pixels: it must be a power of two")
        self.patches, self.blocks = model.conv_proj, nn.ModuleList(model.encoder.layers.children())
        self.class_token, self.position = model.class_token, model.encoder.pos_embedding
        self.channels = {level: model.hidden_dim}

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> dict[int, Float[Tensor, "B C _ _"]]:
        (level,) = self.channels
        x = self.patches(images)
        first, position = resized_position(self.position, x)
        tokens = torch.cat([(self.class_token + first).expand(len(x), -1, -1), (x + position).flatten(2).mT], 1)
        for block in self.blocks:
            tokens = block(tokens)
        return {level: tokens[:, 1:].mT.unflatten(2, x.shape[-2:])}

    def freeze(self, stages: int) -> None:
        """Stop the first `stages` stages from learning: 1 is the embedding, 2 to 5 a quarter of the blocks each."""
        if stages:
            self.patches.requires_grad_(False)
            self.class_token.requires_grad_(False)
            self.position.requires_grad_(False)
        for block in self.blocks[: quarters(len(self.blocks), stages)]:
            block.requires_grad_(False)


def quarters(blocks: int, stages: int) -> int:
    """How many of a plain network's blocks belong to the first `stages` of five stages, the first without blocks."""
    return -(-blocks * max(stages - 1, 0) // 4)


def resized_position(
    position: Float[Tensor, "1 n C"], like: Float[Tensor, "B C h w"]
) -> tuple[Float[Tensor, "1 1 C"], Float[Tensor, "1 C h w"]]:
    """The position embedding of the class token, and that of the patches (a square) resized to the map `like`."""
    first, rest = position[:, :1], position[:, 1:]
    side = round(rest.shape[1] ** 0.5)
    return first, F.interpolate(rest.mT.unflatten(2, (side, side)), like.shape[-2:], mode="bicubic")


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of a map (B, C, H, W), each place on its own."""

    def forward(self, input: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Halve(nn.Module):
    """The largest of each 2 x 2 places."""

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C _ _"]:
        return halve(x)


class SimplePyramid(nn.Module):
    """The one map of a plain network -> C2..C5, by deconvolutions and pooling (ViTDet, section 3 and appendix A.2).

    body: a backbone with one level. With each level below that, a deconvolution halves the channels.
    channels: of its level. mean, std: of the pixels it was trained on.
    """

    def __init__(
        self,
        body: nn.Module,
        channels: Mapping[int, int],
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
    ):
        super().__init__()
        self.mean, self.std = mean, std
        ((own, width),) = channels.items()
        self.body, self.own = body, own
        self.scales = nn.ModuleDict({str(level): rescaling(width, own - level) for level in LEVELS})
        self.channels = {level: width >> max(own - level, 0) for level in LEVELS}

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> dict[int, Float[Tensor, "B _ _ _"]]:
        x = self.body(images)[self.own]
        return {level: self.scales[str(level)](x) for level in self.channels}

    def freeze(self, stages: int) -> None:
        """Stop the first `stages` stages of the network from learning; the pyramid itself always learns."""
        if stages:
            self.body.freeze(stages)  # pyright: ignore[reportCallIssue]

    def keep(self, levels: Iterable[int]) -> None:
        """Drop the other levels: none takes from another, and weights that nothing uses are an error in DDP."""
        for level in self.channels.keys() - set(levels):
            del self.channels[level], self.scales[str(level)]


def rescaling(width: int, up: int) -> nn.Module:
    """A map of `width` channels made larger by 2**up, with channels halved each time; or smaller where `up` < 0."""
    layers: list[nn.Module] = [Halve() for _ in range(-up)]
    for n in range(up):
        if n:
            layers += [ChannelNorm(width >> n, eps=1e-6), nn.GELU()]
        layers.append(nn.ConvTranspose2d(width >> n, width >> n + 1, 2, 2))
    return nn.Sequential(*layers)


class SimpleNeck(nn.Module):
    """ViTDet's neck: a 1x1 and a 3x3 convolution on each level, with a norm each, and no top-down pathway.

    channels, width, levels, extra, extra_relu, extra_norm: as of `fpn.model.pyramid.FPN`. norm: "layer" (the paper), or
    one of those that FPN takes.
    """

    def __init__(
        self,
        channels: Mapping[int, int],
        width: int = 256,
        levels: tuple[int, int] = (2, 6),
        extra: str = "pool",
        norm: str = "layer",
        extra_relu: bool = True,
        extra_norm: bool = False,
    ):
        super().__init__()
        self.width, self.levels = width, tuple(range(levels[0], levels[1] + 1))
        self.own = own_levels(channels, self.levels)
        self.output = nn.ModuleDict(
            {
                str(k): nn.Sequential(normed(channels[k], width, 1, norm), normed(width, width, 3, norm))
                for k in self.own
            }
        )
        if norm == "layer" and extra_norm and extra in ("p5", "c5"):
            raise OptionError(
                "extra_norm: no layer norm follows extra levels; use the norm batch or group, or none there"
            )
        count = len(self.levels) - len(self.own)
        self.extra = Extra(extra, count, channels[self.own[-1]], width, extra_relu, norm if extra_norm else "none")

    def forward(self, c: Mapping[int, Float[Tensor, "B _ _ _"]]) -> dict[int, Float[Tensor, "B d _ _"]]:
        """{2: C2 .. 5: C5} -> {2: P2 .. 6: P6}."""
        p = {level: self.output[str(level)](c[level]) for level in self.own}
        highest = self.own[-1]
        return p | dict(enumerate(self.extra(p[highest], c[highest]), highest + 1))


def normed(inputs: int, outputs: int, kernel: int, norm: str) -> nn.Module:
    """`fpn.model.pyramid.convolution`, which knows no layer norm: in other necks it has no use."""
    if norm != "layer":
        return convolution(inputs, outputs, kernel, norm)
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
    nn.init.kaiming_uniform_(conv.weight, a=1)
    return nn.Sequential(conv, ChannelNorm(outputs, eps=1e-6))
