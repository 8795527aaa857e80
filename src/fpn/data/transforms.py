"""Resizing uint8 pixels and their boxes, as torchvision's `transforms.v2`.

A transform takes (image, target), a `tv_tensors.Image` and a dictionary with "boxes" (`tv_tensors.BoundingBoxes`) and
"labels", where asked for also "masks" (`tv_tensors.Mask`, one a box), and returns the same pair. Any v2 transform of
torchvision can stand in for the ones made here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from fpn.data.sizes import LONG, SHORT, resized_size
from fpn.errors import OptionError


def resize_transform(short: int = SHORT, long: int = LONG) -> v2.Transform:
    """Resizes so that the shorter side is `short` pixels, or less where the longer side would exceed `long`."""
    return v2.Compose([ResizeSides([short], long), v2.ClampBoundingBoxes()])


class ResizeSides(v2.Transform):
    """torchvision's `Resize` with a choice of shorter sides, and without its errors on extreme shapes (4000x1)."""

    def __init__(self, short: Sequence[int], long: int) -> None:
        super().__init__()
        if not short or min(short) < 1 or long < 1:
            raise OptionError(f"image sizes must be at least 1 pixel, not short={list(short)}, long={long}")
        self.short, self.long = tuple(short), long

    def size_for(self, height: int, width: int) -> tuple[int, int]:
        """The size to which an image of this size is brought, by a shorter side drawn at random where several are."""
        choice = int(torch.randint(len(self.short), ())) if len(self.short) > 1 else 0
        return resized_size((height, width), self.short[choice], self.long)

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = v2.query_size(flat_inputs)
        return {"size": list(self.size_for(height, width))}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if isinstance(inpt, tv_tensors.Mask):
            return tv_tensors.Mask(resize_masks(inpt.as_subclass(Tensor), tuple(params["size"])))
        return self._call_kernel(F.resize, inpt, size=params["size"], antialias=True)


def largest_size(transform: object, size: tuple[int, int]) -> tuple[int, int] | None:
    """The largest size (height, width) to which a transform resizes images of this size, if it does so first of all."""
    while isinstance(transform, v2.Compose):
        transform = transform.transforms[0]
    return resized_size(size, max(transform.short), transform.long) if isinstance(transform, ResizeSides) else None


def resize_masks(masks: UInt8[Tensor, "N h w"], size: tuple[int, int]) -> UInt8[Tensor, "N H W"]:
    """Masks at another size; each pixel is that of the old one in which its middle lies.

    torchvision's transform takes the one in which its corner lies, and so moves masks by up to half a pixel.
    """
    if masks.shape[1:] == size:
        return masks
    rows, columns = (
        ((torch.arange(new) + 0.5) * (old / new)).long().clamp(max=old - 1)
        for old, new in zip(masks.shape[1:], size, strict=True)
    )
    return masks.index_select(1, rows).index_select(2, columns)
