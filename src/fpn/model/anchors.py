"""Anchors: reference boxes of fixed sizes and ratios, centred on every cell of every pyramid level."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor


def cell_anchors(
    size: float, ratios: tuple[float, ...], whole_pixels: bool, scales: tuple[float, ...] = (1.0,)
) -> Float[Tensor, "a 4"]:
    """Boxes around the origin, of each ratio (height / width) and for each ratio of area (size * scale)^2."""
    sides, ratio = torch.tensor([size * scale for scale in scales]), torch.tensor(ratios).sqrt()[:, None]
    sides = sides.floor() if whole_pixels else sides
    width, height = (sides / ratio).flatten(), (sides * ratio).flatten()
    boxes = torch.stack([-width, -height, width, height], dim=1) / 2
    return boxes.round() if whole_pixels else boxes


def numbers(values: Sequence[float], device: torch.device) -> Float[Tensor, " n"]:
    """A few numbers as a tensor. On a GPU they are made there: copied from the host they would have to be waited for,
    and nothing that comes from the host can be part of a CUDA graph.
    """
    if device.type == "cpu":
        return torch.tensor(values)
    return torch.cat([torch.full((1,), value, device=device) for value in values])


def grid(
    height: int, width: int, stride: tuple[int, int], device: torch.device, offset: float = 0.0
) -> Float[Tensor, "hw 4"]:
    """The image position (x, y, x, y) that each cell of a map stands for, row by row; offset 0.5 is a cell's centre."""
    y = (torch.arange(height, device=device, dtype=torch.float32) + offset) * stride[0]
    x = (torch.arange(width, device=device, dtype=torch.float32) + offset) * stride[1]
    y, x = torch.meshgrid(y, x, indexing="ij")
    return torch.stack([x, y, x, y], dim=-1).reshape(-1, 4)


@dataclass(frozen=True)
class Anchors:
    """One size a level (32^2 .. 512^2 on P2..P6 in the paper), times each of the scales, in each of the ratios.

    A cell at (row, column) of level k has its anchors around (column + offset, row + offset) * 2**k. Two habits of
    torchvision can be had for weights trained with them: `whole_pixels` cuts the anchors' sides and rounds their
    corners, `floor_stride` takes the padded image size divided by the map size, rounded down, as stride (61 instead of
    64 for P6 at 800 pixels).
    """

    sizes: Mapping[int, float] = field(default_factory=lambda: {2: 32.0, 3: 64.0, 4: 128.0, 5: 256.0, 6: 512.0})
    ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    scales: tuple[float, ...] = (1.0,)
    offset: float = 0.0
    whole_pixels: bool = False
    floor_stride: bool = False
    corners: Mapping[int, list[float]] = field(init=False, repr=False, compare=False)  # of a cell's, one after another

    def __post_init__(self) -> None:
        cells = {k: cell_anchors(size, self.ratios, self.whole_pixels, self.scales) for k, size in self.sizes.items()}
        object.__setattr__(self, "corners", {level: boxes.flatten().tolist() for level, boxes in cells.items()})

    @property
    def per_cell(self) -> int:
        """Anchors of each cell."""
        return len(self.ratios) * len(self.scales)

    def __call__(
        self, pyramid: Mapping[int, Float[Tensor, "B d _ _"]], image_size: Sequence[int]
    ) -> dict[int, Float[Tensor, "A 4"]]:
        """The anchors of every level in the order (row, column, ratio, scale), in pixels of the padded images."""
        return {level: self.on(level, pyramid[level], image_size) for level in self.sizes}

    def on(self, level: int, p: Float[Tensor, "B d h w"], image_size: Sequence[int]) -> Float[Tensor, "A 4"]:
        height, width = p.shape[-2:]
        stride = (image_size[0] // height, image_size[1] // width) if self.floor_stride else (2**level, 2**level)
        # Not a buffer, which would follow the model into half precision.
        cells = numbers(self.corners[level], p.device).view(-1, 4)
        return (grid(height, width, stride, p.device, self.offset)[:, None] + cells).reshape(-1, 4)
