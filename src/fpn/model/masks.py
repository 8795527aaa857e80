"""Masks on the grid of their box -> masks of the image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor


def paste(
    masks: Float[Tensor, "D m m"], boxes: Float[Tensor, "D 4"], size: tuple[int, int], threshold: float = 0.5
) -> Bool[Tensor, "D H W"]:
    """Which pixels of an image of the given (height, width) each mask covers: probability at least `threshold`.

    boxes in pixels of that image. Boxes may be empty or reach beyond the image. Nothing but the result is of its size
    times D; where even that is too much, take the masks one by one with `window`.
    """
    found = torch.zeros((len(masks), *size), dtype=torch.bool, device=masks.device)
    for covered, mask, box in zip(found, masks, boxes.cpu(), strict=True):
        part, top, left = window(mask, box, size)
        covered[top : top + part.shape[0], left : left + part.shape[1]] = part >= threshold
    return found


def window(
    mask: Float[Tensor, "m m"], box: Float[Tensor, "4"], size: tuple[int, int]
) -> tuple[Float[Tensor, "h w"], int, int]:
    """The probability of every pixel that a mask reaches, and the row and column of the first; all others have 0.

    The mask is interpolated linearly from the centres of its cells to those of the pixels, towards 0 in a border of one
    cell around it. With that border it covers whole pixels: both as in torchvision's `paste_masks_in_image`.
    """
    cells = mask.shape[0] + 2
    centre, half = (box[2:] + box[:2]) * 0.5, (box[2:] - box[:2]) * 0.5 * (cells / mask.shape[0])
    # Rounded towards 0, the last pixel included.
    (x1, y1), (x2, y2) = (centre - half).to(torch.int64).tolist(), (centre + half).to(torch.int64).tolist()
    row, below, top = places(y1, y2, cells, size[0], mask.device)
    column, right, left = places(x1, x2, cells, size[1], mask.device)
    padded = F.pad(mask, (1, 1, 1, 1))
    rows = torch.lerp(padded[row], padded[(row + 1).clamp(max=cells - 1)], below[:, None])
    part = torch.lerp(rows[:, column], rows[:, (column + 1).clamp(max=cells - 1)], right)
    return part, top, left


def places(
    first: int, last: int, cells: int, length: int, device: torch.device
) -> tuple[Int64[Tensor, " n"], Float[Tensor, " n"], int]:
    """Along one axis of an image of `length`: the n pixels in it of a mask whose cells cover `first` to `last`.

    Of each pixel the cell whose centre is at or before its own and how far it is on the way to the next; and the first.
    """
    start, stop = min(max(first, 0), length), min(last + 1, length)
    pixel = torch.arange(start, max(start, stop), device=device) - first
    place = ((pixel + 0.5) * (cells / max(last - first + 1, 1)) - 0.5).clamp(min=0)
    cell = place.floor()
    return cell.to(torch.int64), place - cell, start


def resampled(
    masks: Float[Tensor, "n m m"], boxes: Float[Tensor, "n 4"], targets: Float[Tensor, "n 4"]
) -> Float[Tensor, "n m m"]:
    """Masks on the grids of other boxes, interpolated linearly between centres of cells; 0 outside their own box."""
    side = masks.shape[1]
    centres = (torch.arange(side, dtype=boxes.dtype) + 0.5) / side
    sizes = (boxes[:, 2:] - boxes[:, :2]).clamp(min=1e-6)
    points = targets[:, None, :2] + centres[None, :, None] * (targets[:, 2:] - targets[:, :2])[:, None]
    x, y = (2 * (points - boxes[:, None, :2]) / sizes[:, None] - 1).unbind(-1)  # -1 to 1 over the mask's own box
    grid = torch.stack([x[:, None, :].expand(-1, side, -1), y[:, :, None].expand(-1, -1, side)], dim=-1)
    return F.grid_sample(masks[:, None], grid.to(masks.dtype), align_corners=False)[:, 0]
