"""`fpn.predict`: pictures -> detections in their own pixels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fpn.data import read_image
from fpn.data.images import pixels_of
from fpn.errors import DataError
from fpn.exported import Exported
from fpn.inference.finder import check_threshold, finder
from fpn.model.detector import Detector
from fpn.rle import encode_pasted
from fpn.structures import Detections

Picture = str | Path | Image.Image | np.ndarray | Tensor


@overload
def predict(
    detector: Detector | Exported, pictures: Picture, threshold: float = ..., device: str = ...
) -> Detections: ...
@overload
def predict(
    detector: Detector | Exported, pictures: Sequence[Picture], threshold: float = ..., device: str = ...
) -> list[Detections]: ...
def predict(
    detector: Detector | Exported, pictures: Picture | Sequence[Picture], threshold: float = 0.5, device: str = "auto"
) -> Detections | list[Detections]:
    """Detections scoring at least `threshold`, highest first; boxes in the pixels of the picture as it is displayed.

    A picture is a file, a PIL image, or uint8 pixels: an array (H, W, 3) in RGB or a tensor (3, H, W). For a list of
    pictures a list comes back. Raises ImageError for a file that cannot be read.
    """
    check_threshold(threshold)
    find = finder(detector, device)
    if isinstance(pictures, str | Path | Image.Image | np.ndarray | Tensor):
        return find([as_pixels(pictures)])[0].above(threshold)
    return [find([as_pixels(picture)])[0].above(threshold) for picture in pictures]


def as_pixels(picture: Picture) -> Tensor:
    """uint8 pixels (3, H, W) in RGB."""
    if isinstance(picture, str | Path):
        return read_image(picture)
    if isinstance(picture, Image.Image):
        return pixels_of(picture)
    kind, shape = picture.dtype, tuple(picture.shape)
    if isinstance(picture, np.ndarray):
        if kind != np.uint8 or picture.ndim != 3 or shape[2] != 3 or 0 in shape:
            raise DataError(f"an array of shape {shape} and type {kind}: it must be (H, W, 3) and uint8")
        return torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1)
    if kind != torch.uint8 or picture.ndim != 3 or shape[0] != 3 or 0 in shape:
        raise DataError(f"a tensor of shape {shape} and type {kind}: it must be (3, H, W) and uint8")
    return picture


def segmentations(found: Detections, size: tuple[int, int]) -> list[dict[str, Any]] | None:
    """The masks of the detections of one image of this (height, width) as COCO's compressed RLE; None without masks."""
    if found.masks is None:
        return None
    counts = encode_pasted(found.masks, found.boxes, size)
    return [{"size": list(size), "counts": text} for text in counts]
