"""Regions -> features of fixed size, each from the pyramid level that fits its scale."""

from collections.abc import Mapping

import torch
import torchvision
from jaxtyping import Float, Int64
from torch import Tensor

from fpn.boxes import area


def assign_levels(
    boxes: Float[Tensor, "*b 4"], lowest: int, highest: int, k0: int = 4, canonical: float = 224.0
) -> Int64[Tensor, "*b"]:
    """The level of each region: k = floor(k0 + log2(sqrt(w h) / 224)), Eq. 1, within the levels there are."""
    k = k0 + torch.log2(area(boxes).clamp(min=0).sqrt() / canonical) + 1e-6  # 1e-6: 224 x 224 must not fall to k0 - 1
    return k.floor().clamp(lowest, highest).to(torch.int64)


def pool_regions(
    pyramid: Mapping[int, Float[Tensor, "B d _ _"]],
    boxes: Float[Tensor, "B R 4"],
    levels: Int64[Tensor, "B R"],
    size: int = 7,
    sampling_ratio: int = 2,
    method: str = "align",
) -> Float[Tensor, "BR d s s"]:
    """The features of every region, from the level that `levels` names; zeros where that is none of the pyramid's.

    method: "align" is RoIAlign with half-pixel correction (detectron2's aligned), "align_v1" RoIAlign without
    (torchvision's default), "pool" the RoI max pooling of the paper.
    """
    batch, count = levels.shape
    image = torch.arange(batch, device=boxes.device, dtype=boxes.dtype)[:, None, None].expand(-1, count, 1)
    rois = torch.cat([image, boxes], dim=2).reshape(-1, 5)
    flat = levels.reshape(-1)
    maps, scales = [pyramid[k].float() for k in pyramid], [2.0**-k for k in pyramid]
    where = torch.full_like(flat, -1)
    for position, level in enumerate(pyramid):
        where = torch.where(flat == level, position, where)
    if method == "pool":
        mine = [(where == i)[:, None, None, None] for i in range(len(maps))]
        pooled = (torchvision.ops.roi_pool(m, rois, size, s) for m, s in zip(maps, scales, strict=True))
        return torch.stack([p * m for p, m in zip(pooled, mine, strict=True)]).sum(0)
    return align(maps, rois, where, scales, size, sampling_ratio, method == "align")


@torch.library.custom_op("fpn::roi_align", mutates_args=())
def align(
    maps: list[Tensor], rois: Tensor, where: Tensor, scales: list[float], size: int, sampling_ratio: int, aligned: bool
) -> Tensor:
    """RoIAlign over several maps: roi i (image, x1, y1, x2, y2) is pooled from maps[where[i]]; zeros where that is -1.

    An operator of its own, because sorting regions by map gives shapes that depend on the data.
    """
    out = maps[0].new_zeros(len(rois), maps[0].shape[1], size, size)
    for i, (features, scale) in enumerate(zip(maps, scales, strict=True)):
        rows = (where == i).nonzero()[:, 0]
        out[rows] = torchvision.ops.roi_align(features, rois[rows], size, scale, sampling_ratio, aligned)
    return out


@align.register_fake
def _(maps, rois, where, scales, size, sampling_ratio, aligned) -> Tensor:
    return maps[0].new_empty(rois.shape[0], maps[0].shape[1], size, size)


@torch.library.custom_op("fpn::roi_align_backward", mutates_args=())
def align_backward(
    grad: Tensor, maps: list[Tensor], rois: Tensor, where: Tensor, scales: list[float], sampling_ratio: int, aligned: bool
) -> list[Tensor]:
    """The gradient of `align` with respect to each map."""
    grads = []
    for i, (features, scale) in enumerate(zip(maps, scales, strict=True)):
        rows = (where == i).nonzero()[:, 0]
        size, shape = grad.shape[-1], features.shape
        grads.append(
            torch.ops.torchvision._roi_align_backward(
                grad[rows].contiguous(), rois[rows], scale, size, size, *shape, sampling_ratio, aligned
            )
        )
    return grads


@align_backward.register_fake
def _(grad, maps, rois, where, scales, sampling_ratio, aligned) -> list[Tensor]:
    return [torch.empty_like(m) for m in maps]


def _remember(ctx, inputs, output) -> None:
    maps, rois, where, ctx.scales, _, ctx.sampling_ratio, ctx.aligned = inputs
    ctx.save_for_backward(rois, where, *maps)


def _backward(ctx, grad):
    rois, where, *maps = ctx.saved_tensors
    grads = align_backward(grad, maps, rois, where, ctx.scales, ctx.sampling_ratio, ctx.aligned)
    return grads, None, None, None, None, None, None


align.register_autograd(_backward, setup_context=_remember)
