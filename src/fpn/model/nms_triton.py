"""Greedy non-maximum suppression on a GPU for which the host never waits: fixed shapes, and one kernel that decides."""

# What is decorated with triton.jit is not Python to Triton, and not every torch comes with Triton.
# pyright: reportCallIssue=false, reportIndexIssue=false, reportMissingImports=false, reportOperatorIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 64, 8  # so many boxes are compared with as many others at once: all that fits into registers


def greedy(boxes: Tensor, scores: Tensor, groups: Tensor, valid: Tensor, threshold: float) -> Tensor:
    """What `fpn.model.nms.nms` says, with groups from 0.

    Groups are independent, so each is gone through by a program of its own, from its highest score on. No number of
    groups or boxes is known beforehand: there is a program for every box, and those whose box does not begin a group
    end at once.
    """
    order = by_group(scores, groups, valid)
    group = groups.masked_fill(~valid, -1).gather(1, order)
    corners = boxes.float().gather(1, order[..., None].expand(-1, -1, 4))
    images, count = valid.shape
    kept = valid.new_zeros(valid.shape)
    if images and count:
        marks, run = kept.view(torch.uint8), survive[(count, images)]
        # Without fusion every product is rounded, as on a CPU.
        with torch.cuda.device_of(boxes):  # Triton runs on the current device, which need not be theirs
            run(corners, group, marks, count, threshold, BLOCK, num_warps=WARPS, enable_fp_fusion=False)
    return torch.zeros_like(valid).scatter(1, order, kept)


def by_group(scores: Tensor, groups: Tensor, valid: Tensor) -> Tensor:
    """(B, M) positions: what is not valid first, then group by group, the highest score first; ties as they come."""
    order = scores.argsort(dim=1, descending=True, stable=True)
    group = groups.masked_fill(~valid, -1).gather(1, order)
    return order.gather(1, group.argsort(dim=1, stable=True))


@triton.jit
def survive(boxes, groups, kept, count, threshold, BLOCK: tl.constexpr):
    """Marks in `kept` which boxes of the group that begins at this program's position survive, block by block."""
    start = tl.program_id(0)
    image = tl.program_id(1).to(tl.int64) * count
    boxes += image * 4
    groups += image
    kept += image
    group = tl.load(groups + start)
    before = tl.load(groups + start - 1, mask=start > 0, other=-1)
    if (group >= 0) & (group != before):
        lane = tl.arange(0, BLOCK)
        first = start
        rows = BLOCK
        while rows == BLOCK:  # of the group in this block: with fewer, or none, it ends here
            here = first + lane
            own = tl.load(groups + here, mask=here < count, other=-1) == group
            left, top, right, bottom = corners(boxes, here, own)
            free = own.to(tl.int32)
            for earlier in range(start, first, BLOCK):
                there = earlier + lane
                survivors = tl.load(kept + there).to(tl.int32)
                others = corners(boxes, there, there < first)
                above = overlaps(left, top, right, bottom, others[0], others[1], others[2], others[3], threshold)
                free = free * (1 - tl.max(above * survivors[None, :], axis=1))
            # Within the block: all that are free survive, until a survivor before them overlaps them. Each round is
            # right about one box more at least, so that it ends, and does so at the greedy choice.
            left2, top2, right2, bottom2 = corners(boxes, here, own)
            above = overlaps(left, top, right, bottom, left2, top2, right2, bottom2, threshold)
            above = above * (lane[None, :] < lane[:, None]).to(tl.int32)
            survivors = free
            changes = 1
            while changes > 0:
                again = free * (1 - tl.max(above * survivors[None, :], axis=1))
                changes = tl.sum((again != survivors).to(tl.int32), axis=0)
                survivors = again
            tl.store(kept + here, survivors.to(tl.uint8), mask=own)
            tl.debug_barrier()  # the next block reads what all threads of this program have stored
            rows = tl.sum(own.to(tl.int32), axis=0)
            first += BLOCK


@triton.jit
def corners(boxes, rows, mask):
    """x1, y1, x2 and y2 of some rows."""
    place = boxes + rows * 4
    left = tl.load(place, mask=mask, other=0.0)
    top = tl.load(place + 1, mask=mask, other=0.0)
    right = tl.load(place + 2, mask=mask, other=0.0)
    bottom = tl.load(place + 3, mask=mask, other=0.0)
    return left, top, right, bottom


@triton.jit
def overlaps(left, top, right, bottom, left2, top2, right2, bottom2, threshold):
    """1 where the IoU of a box, by rows, with one of the others, by columns, is above the threshold, otherwise 0."""
    width = tl.minimum(right[:, None], right2[None, :]) - tl.maximum(left[:, None], left2[None, :])
    height = tl.minimum(bottom[:, None], bottom2[None, :]) - tl.maximum(top[:, None], top2[None, :])
    both = tl.maximum(width, 0.0) * tl.maximum(height, 0.0)
    area = (right - left) * (bottom - top)
    area2 = (right2 - left2) * (bottom2 - top2)
    # Rounded as torchvision's is. 0 / 0, of empty boxes, is above nothing.
    iou = tl.div_rn(both, area[:, None] + area2[None, :] - both)
    return (iou > threshold).to(tl.int32)
