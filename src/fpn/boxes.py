"""The one box convention: (x1, y1, x2, y2), float pixels, x2 and y2 exclusive (no +1); sizes are (height, width).

A pixel covers [i, i + 1), so the box of a whole image is (0, 0, width, height). All functions are pure and take any
number of leading dimensions where the shapes say `*b`.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

# A box may grow by at most this factor in one decoding step; exp() would overflow early in training otherwise.
MAX_LOG_SCALE = math.log(1000 / 16)


def area(boxes: Float[Tensor, "*b 4"]) -> Float[Tensor, "*b"]:
    """Areas in square pixels."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def iou(a: Float[Tensor, "*b n 4"], b: Float[Tensor, "*#b m 4"]) -> Float[Tensor, "*b n m"]:
    """Intersection over union of every box of `a` with every box of `b`; 0 where both are empty."""
    # One coordinate at a time, each laid out densely, and in place: several times as fast on a CPU as pairs (x, y).
    left, top, right, bottom = a[..., :, None, :].unbind(-1)
    others = b[..., None, :, :].movedim(-1, 0).contiguous()
    width = torch.minimum(right, others[2]).sub_(torch.maximum(left, others[0])).clamp_(min=0)
    height = torch.minimum(bottom, others[3]).sub_(torch.maximum(top, others[1])).clamp_(min=0)
    intersection = width.mul_(height)
    union = area(a)[..., :, None] + area(b)[..., None, :] - intersection
    return torch.where(union > 0, intersection.div_(union), 0.0)


def clip(boxes: Float[Tensor, "*b n 4"], sizes: Int[Tensor, "*b 2"]) -> Float[Tensor, "*b n 4"]:
    """Boxes cut at the borders of images of the given (height, width)."""
    height, width = sizes[..., 0], sizes[..., 1]
    limits = torch.stack([width, height, width, height], dim=-1)[..., None, :]
    return torch.minimum(boxes.clamp(min=0), limits.to(boxes.dtype))


def encode(
    boxes: Float[Tensor, "*b 4"], anchors: Float[Tensor, "*b 4"], weights: tuple[float, float, float, float]
) -> Float[Tensor, "*b 4"]:
    """Offsets (dx, dy, dw, dh) that turn `anchors` into `boxes` (Girshick et al. 2014, eq. 6-9), times `weights`."""
    size, anchor_size = boxes[..., 2:] - boxes[..., :2], anchors[..., 2:] - anchors[..., :2]
    centre, anchor_centre = boxes[..., :2] + size / 2, anchors[..., :2] + anchor_size / 2
    offsets = torch.cat([(centre - anchor_centre) / anchor_size, torch.log(size / anchor_size)], dim=-1)
    # Number by number: a tensor of the weights would have to be copied to the device, which waits for it.
    return torch.stack([offset * w for offset, w in zip(offsets.unbind(-1), weights, strict=True)], dim=-1)


def decode(
    offsets: Float[Tensor, "*b 4"], anchors: Float[Tensor, "*#b 4"], weights: tuple[float, float, float, float]
) -> Float[Tensor, "*b 4"]:
    """The inverse of `encode`, with growth limited to exp(MAX_LOG_SCALE)."""
    offsets = torch.stack([offset / w for offset, w in zip(offsets.unbind(-1), weights, strict=True)], dim=-1)
    anchor_size = anchors[..., 2:] - anchors[..., :2]
    centre = offsets[..., :2] * anchor_size + anchors[..., :2] + anchor_size / 2
    half = torch.exp(offsets[..., 2:].clamp(max=MAX_LOG_SCALE)) * anchor_size / 2
    return torch.cat([centre - half, centre + half], dim=-1)
