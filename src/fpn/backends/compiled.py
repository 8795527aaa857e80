"""A fused detector by torch.compile: kernels made for it, and on a GPU one CUDA graph for each size of batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch._dynamo import config

from fpn.backends.fused import fused
from fpn.model.detector import Detector
from fpn.structures import Batch, Detections

SIZES = 64  # of batches, each compiled by itself; further ones run uncompiled
# Torch counts what all compiled detectors of a process have, and knows of no limit set in another thread.
LIMITS = {"recompile_limit": 100 * SIZES, "accumulated_recompile_limit": 100 * SIZES}


def compiled(detector: Detector, precision: str = "fp32") -> Detector:
    """A copy that detects the same, compiled when the first batch of each size comes, and cannot be trained.

    precision: see `fused`. On a GPU, give images of few sizes: each size keeps the memory of its graph.
    """
    made = fused(detector, precision)
    mode = "reduce-overhead" if made.mean.is_cuda else "default"
    fast = torch.compile(made.detect, fullgraph=True, dynamic=False, mode=mode)
    made.detect = by_size(fast, made.detect)  # pyright: ignore[reportAttributeAccessIssue]
    made.backend = "compiled"
    return made


def by_size(fast: Callable[[Batch], Detections], plain: Callable[[Batch], Detections]) -> Callable[[Batch], Detections]:
    """The compiled function for the first `SIZES` sizes of batches, the other for all further ones."""
    known: set[tuple[int, ...]] = set()

    def detect(batch: Batch) -> Detections:
        if len(known) < SIZES:
            known.add(tuple(batch.images.shape))
        if tuple(batch.images.shape) not in known:
            return plain(batch)
        with config.patch(LIMITS):
            return fast(batch)

    return detect
