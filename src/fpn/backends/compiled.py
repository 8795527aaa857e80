"""A fused detector by torch.compile: kernels made for it, and on a GPU one CUDA graph for each size of batch."""

from __future__ import annotations

import torch

from fpn.backends.fused import fused
from fpn.model.detector import Detector

SIZES = 64  # of batches, each compiled by itself; further ones run uncompiled


def compiled(detector: Detector, precision: str = "fp32") -> Detector:
    """A copy that detects the same, compiled when the first image of each size comes, and cannot be trained.

    precision: see `fused`. On a GPU, give images of few sizes: each size keeps the memory of its graph.
    """
    made = fused(detector, precision)
    mode = "reduce-overhead" if made.mean.is_cuda else "default"
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, SIZES)
    made.detect = torch.compile(made.detect, fullgraph=True, dynamic=False, mode=mode)
    made.backend = "compiled"
    return made
