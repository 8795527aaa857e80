"""The largest batch that fits: found by steps on made-up batches of the worst kind, doubling until memory is short."""

from __future__ import annotations

import copy
import os
import resource
import sys
from contextlib import nullcontext

import numpy as np
import torch

from fpn.data import Split, resized_size
from fpn.data.fit import most_boxes
from fpn.errors import OptionError
from fpn.model.faster_rcnn import FasterRCNN
from fpn.structures import Batch, Targets

LARGEST = {"cpu": 16, "cuda": 256, "mps": 32}  # beyond, more images a step bring no more images a second
SHARE = 0.8  # of the memory that is free may be used: real batches vary, and memory gets fragmented


def largest_batch(
    detector: FasterRCNN, split: Split, scales: tuple[int, ...], device: torch.device, bf16: bool = False
) -> int:
    """Images a step for which a training step fits into memory; a power of two.

    Each try is a forward and backward pass at the largest size that training can meet, with as many boxes as the
    densest image has. Raises OptionError where not even one image fits.
    """
    size = largest_size(split, max(scales), detector.spec.sides[1])
    model = copy.deepcopy(detector).to(device).train()
    fits, free, before = 0, free_memory(device), 0
    base = peak(device) if device.type == "cpu" else 0
    while fits < LARGEST[device.type]:
        batch = max(1, 2 * fits)
        try:
            used = step_memory(model, made_up_batch(batch, size, most_boxes([split])[0]), device, bf16) - base
        except (torch.OutOfMemoryError, MemoryError):
            break
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
    shapes = np.unique(split.sizes, axis=0)
    sizes = np.array([resized_size((int(h), int(w)), short, long) for h, w in shapes])
    wide = sizes[:, 1] >= sizes[:, 0]  # wide and tall images do not share batches
    most = max((group.max(axis=0) for group in (sizes[wide], sizes[~wide]) if len(group)), key=np.prod)
    return int(-(-most[0] // 32) * 32), int(-(-most[1] // 32) * 32)


def made_up_batch(count: int, size: tuple[int, int], objects: int) -> Batch:
    height, width = size
    corners = torch.rand(count, max(1, objects), 2) * torch.tensor([0.8 * width, 0.8 * height])
    targets = Targets(
        torch.cat([corners, corners + torch.tensor([0.1 * width, 0.1 * height])], dim=-1),
        torch.zeros(corners.shape[:2], dtype=torch.int64),
        torch.ones(corners.shape[:2], dtype=torch.bool),
    )
    sizes = torch.tensor([size] * count)
    images = torch.randint(256, (count, 3, height, width), dtype=torch.uint8)
    return Batch(images, sizes, sizes, torch.zeros(count, dtype=torch.int64), targets)


def step_memory(model: FasterRCNN, batch: Batch, device: torch.device, bf16: bool) -> int:
    """The most bytes in use by the end of one training step."""
    with torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext():
        losses = model.losses(batch.to(device))
    torch.stack(list(losses.values())).sum().backward()
    model.zero_grad()
    return peak(device)


def peak(device: torch.device) -> int:
    """The most bytes this process has used so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most * (1 if sys.platform == "darwin" else 1024)


def free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):  # macOS does not tell: half of all
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
