"""Regions -> features of fixed size, each from the pyramid level that fits its scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from fpn.boxes import area

POOLINGS = ("align", "align_v1", "pool")


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

    method: "align" is RoIAlign (He et al. 2017) with half-pixel correction (detectron2's aligned), "align_v1" RoIAlign
    without (torchvision's default), "pool" the RoI max pooling of the FPN paper. sampling_ratio: RoIAlign takes this
    many points along each side of a cell; 0: as many as the cell is long on its map, rounded up (detectron2).
    """
    assert method in POOLINGS, method
    half_pixel = method == "align"
    if method == "pool":
        pooled = level_by_level(pyramid, boxes, levels, size, method)
    elif torch.compiler.is_exporting():
        pooled = roi_align(list(pyramid.values()), list(pyramid), boxes, levels, size, sampling_ratio, half_pixel)
    else:
        pooled = aligned(pyramid, boxes, levels, size, sampling_ratio, half_pixel)
    # Summed in float32, given back in the precision of the maps, which is that of the head's weights or autocast's.
    return pooled.to(next(iter(pyramid.values())).dtype)


def aligned(
    pyramid: Mapping[int, Float[Tensor, "B d _ _"]],
    boxes: Float[Tensor, "B R 4"],
    levels: Int64[Tensor, "B R"],
    size: int,
    samples: int,
    half_pixel: bool,
) -> Float[Tensor, "BR d s s"]:
    """RoIAlign in the way that suits the number of points in a cell, see `pool_regions`."""
    if samples == 0:
        return level_by_level(pyramid, boxes, levels, size, "align" if half_pixel else "align_v1")
    return align(pyramid, boxes, levels, size, samples, half_pixel)


def align(
    pyramid: Mapping[int, Float[Tensor, "B d _ _"]],
    boxes: Float[Tensor, "B R 4"],
    levels: Int64[Tensor, "B R"],
    size: int,
    samples: int,
    half_pixel: bool,
) -> Float[Tensor, "BR d s s"]:
    """RoIAlign as one weighted gather over all levels and images.

    Each output cell is a weighted sum of (2 * samples)**2 pixels: samples**2 points, four neighbours each. All maps are
    laid end to end as rows of one table, and `embedding_bag` sums the rows. That needs no sorting of regions by level,
    so no shape depends on the data, and on CPUs it is many times faster than torchvision's compiled RoIAlign, to which
    it is equal but for rounding.
    """
    batch, count = levels.shape
    table = torch.cat([p.permute(0, 2, 3, 1).flatten(0, 2) for p in pyramid.values()]).float()
    # For each region: height and width of its map, where the map of its image starts in the table, and its scale.
    height, width, start = (torch.zeros_like(levels) for _ in range(3))
    scale, image, begin = torch.zeros_like(boxes[..., 0]), torch.arange(batch, device=boxes.device)[:, None], 0
    for level, p in pyramid.items():
        here, (h, w) = levels == level, p.shape[-2:]
        height, width = torch.where(here, h, height), torch.where(here, w, width)
        start = torch.where(here, begin + image * (h * w), start)
        scale = torch.where(here, 2.0**-level, scale)
        begin = begin + batch * h * w
    scaled = boxes * scale[..., None] - (0.5 if half_pixel else 0.0)
    row, row_weight = taps(scaled[..., 1], scaled[..., 3], height, size, samples, not half_pixel)
    column, column_weight = taps(scaled[..., 0], scaled[..., 2], width, size, samples, not half_pixel)
    # (B, R, s, taps) of rows and of columns make (B, R, s, s, taps, taps) of pixels.
    index = row[..., :, None, :, None] * width[..., None, None, None, None] + column[..., None, :, None, :]
    index = (start[..., None, None, None, None] + index).reshape(batch * count * size * size, -1)
    weight = row_weight[..., :, None, :, None] * column_weight[..., None, :, None, :]
    weight = (weight * (scale > 0)[..., None, None, None, None]).reshape(index.shape)
    pooled = F.embedding_bag(index, table, per_sample_weights=weight, mode="sum")
    return pooled.view(batch * count, size, size, -1).permute(0, 3, 1, 2)


@torch.library.custom_op(
    "fpn::roi_align",
    mutates_args=(),
    schema="(Tensor[] maps, int[] numbers, Tensor boxes, Tensor levels, int size, int samples, bool half_pixel)"
    " -> Tensor",
)
def roi_align(
    maps: Sequence[Tensor],
    numbers: Sequence[int],
    boxes: Tensor,
    levels: Tensor,
    size: int,
    samples: int,
    half_pixel: bool,
) -> Tensor:
    """`aligned` as an operator of its own, so that what an exported program is turned into can have its own way of it.

    maps: those of the pyramid, `numbers` their levels.
    """
    return aligned(dict(zip(numbers, maps, strict=True)), boxes, levels, size, samples, half_pixel)


@roi_align.register_fake
def _(
    maps: Sequence[Tensor],
    numbers: Sequence[int],
    boxes: Tensor,
    levels: Tensor,
    size: int,
    samples: int,
    half_pixel: bool,
) -> Tensor:
    rows, width = boxes.shape[0] * boxes.shape[1], maps[0].shape[1]
    if samples == 0:
        return boxes.new_empty((rows, width, size, size), dtype=torch.float32)
    return boxes.new_empty((rows, size, size, width), dtype=torch.float32).permute(0, 3, 1, 2)


def taps(
    low: Float[Tensor, "B R"],
    high: Float[Tensor, "B R"],
    length: Int64[Tensor, "B R"],
    size: int,
    samples: int,
    at_least_one: bool,
) -> tuple[Int64[Tensor, "B R s t"], Float[Tensor, "B R s t"]]:
    """Along one axis: which pixels each of `size` bins between `low` and `high` reads, and with what weight.

    `samples` points a bin, linear interpolation between the two pixels around each, so t = 2 * samples. A point up to
    one pixel outside the map reads its border, one further out reads nothing.
    """
    extent = (high - low).clamp(min=1.0) if at_least_one else high - low
    step = extent / (size * samples)
    points = torch.arange(size * samples, device=low.device, dtype=low.dtype) + 0.5
    points = low[..., None] + points * step[..., None]
    inside = (points >= -1) & (points <= length[..., None])
    last = (length[..., None] - 1).clamp(min=0)
    points = torch.minimum(points.clamp(min=0), last.to(points.dtype))
    first = points.floor()
    part = points - first
    first = first.to(torch.int64)
    index = torch.stack([first, torch.minimum(first + 1, last)], dim=-1)
    weight = torch.stack([1 - part, part], dim=-1) * (inside[..., None] / samples)
    return index.unflatten(2, (size, samples)).flatten(3), weight.unflatten(2, (size, samples)).flatten(3)


def level_by_level(
    pyramid: Mapping[int, Float[Tensor, "B d _ _"]],
    boxes: Float[Tensor, "B R 4"],
    levels: Int64[Tensor, "B R"],
    size: int,
    method: str,
) -> Float[Tensor, "BR d s s"]:
    """torchvision's pooling, where the work in a region depends on its size: RoI max pooling (Girshick 2015), adaptive
    RoIAlign. Every level pools all regions, those of other levels shrunk to nothing, which costs little.
    """
    from torchvision.ops import roi_align, roi_pool

    image = torch.arange(boxes.shape[0], device=boxes.device, dtype=boxes.dtype)[:, None, None].expand(
        -1, boxes.shape[1], 1
    )
    rois = torch.cat([image, boxes], dim=2).flatten(0, 1)
    aligned, pooled = method == "align", boxes.new_zeros(())
    for level, p in pyramid.items():
        here = (levels == level).flatten()
        own = torch.cat([rois[:, :1], rois[:, 1:] * here[:, None]], dim=1)
        if method == "pool":
            found = roi_pool(p.float(), own, size, 2.0**-level)
        else:
            found = roi_align(p.float(), own, size, 2.0**-level, -1, aligned)
        pooled = pooled + found * here[:, None, None, None]
    return pooled
