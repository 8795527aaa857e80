"""The largest batch that fits: found by steps on made-up batches of the worst kind, doubling until memory is short."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor

from fpn.data import Split
from fpn.data.fit import most_boxes, resized_sizes
from fpn.errors import OptionError
from fpn.memory import forget_peak, free_memory, peak
from fpn.model.detector import Detector
from fpn.structures import Batch, Regions, Targets

LARGEST = {"cpu": 16, "cuda": 256, "mps": 32}  # beyond, more images a step bring no more images a second
SHARE = 0.8  # of the memory that is free may be used: real batches vary, and memory gets fragmented


def largest_batch(
    detector: Detector, split: Split, scales: tuple[int, ...], device: torch.device, bf16: bool, mixed: int = 1
) -> int:
    """Images a step for which a training step fits into memory; a power of two.

    Each try is a forward and backward pass at the largest size that training can meet, with as many boxes as the
    densest image has, times the `mixed` images that may be put into one. Raises OptionError where not even one image
    fits, and on systems that do not tell how much memory a process uses.
    """
    size, objects = largest_size(split, max(scales), detector.spec.sides[1]), mixed * most_boxes([split])[0]
    if detector.spec.square:
        size = (max(size), max(size))
    regions = 0 if split.regions is None else int(np.diff(split.regions.offsets).max())
    model = copy.deepcopy(detector).to(device).train()
    if not forget_peak(device):
        raise OptionError("--batch auto can measure GPUs, and CPUs on Linux only; give a number")
    fits, free, base, before = 0, free_memory(device), peak(device), 0
    while fits < LARGEST[device.type]:
        batch = max(1, 2 * fits)
        try:
            step(model, made_up_batch(batch, size, objects, detector.has_masks, regions), device, bf16)
        except (torch.OutOfMemoryError, MemoryError):
            break
        used = peak(device) - base
        if used > SHARE * free:
            break
        fits = batch
        if used + 2 * (used - before) > SHARE * free:  # the next would be too much, and a CPU gives no second chance
            break
        before = used
    if not fits:
        raise OptionError(
            f"not even one image of {size[1]}x{size[0]} pixels fits into {free / 2**30:.1f} GiB; take a smaller --short"
        )
    return fits


def largest_size(split: Split, short: int, long: int) -> tuple[int, int]:
    """Height and width, multiples of 32, that hold every image of the split after resizing."""
    height, width = resized_sizes(split.sizes, short, long).max(axis=0)
    return int(-(-height // 32) * 32), int(-(-width // 32) * 32)


def made_up_batch(count: int, size: tuple[int, int], objects: int, with_masks: bool = False, regions: int = 0) -> Batch:
    (height, width), objects = size, max(1, objects)
    targets = Targets(
        made_up_boxes((count, objects), size),
        torch.zeros((count, objects), dtype=torch.int64),
        torch.ones((count, objects), dtype=torch.bool),
        torch.ones((count, objects, height, width), dtype=torch.uint8) if with_masks else None,
    )
    sizes = torch.tensor([size] * count)
    images = torch.randint(256, (count, 3, height, width), dtype=torch.uint8)
    given = Regions(made_up_boxes((count, regions), size), torch.ones((count, regions), dtype=torch.bool))
    indices = torch.zeros(count, dtype=torch.int64)
    return Batch(images, sizes, sizes, indices, targets, regions=given if regions else None)


def made_up_boxes(shape: tuple[int, int], size: tuple[int, int]) -> Tensor:
    sides = torch.tensor([size[1], size[0]])
    corners = torch.rand(*shape, 2) * 0.8 * sides
    return torch.cat([corners, corners + 0.1 * sides], dim=-1)


def step(model: Detector, batch: Batch, device: torch.device, bf16: bool) -> None:
    """What a training step does as far as memory goes."""
    with torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext():
        losses = model.losses(batch.to(device))
    torch.stack(list(losses.values())).sum().backward()
    model.zero_grad()
