"""Non-maximum suppression as a mask of fixed size: the one place where the number of boxes depends on the data.

It is an operator of its own (`fpn::nms`), so that torch.compile and torch.export take a detector whole.
"""

import warnings

import torch
from torch import Tensor

triton_works = True  # until it has failed once


@torch.library.custom_op("fpn::nms", mutates_args=())
def nms(boxes: Tensor, scores: Tensor, groups: Tensor, valid: Tensor, threshold: float) -> Tensor:
    """Which boxes survive greedy NMS among the valid boxes of the same image and group.

    boxes (B, M, 4), scores (B, M), groups (B, M) int64 (level or class) and valid (B, M) bool give keep (B, M) bool. A
    box is dropped when its IoU with a kept box of higher score is above `threshold`.
    """
    return by_torchvision(boxes, scores, groups, valid, threshold)


@nms.register_fake
def _(boxes: Tensor, scores: Tensor, groups: Tensor, valid: Tensor, threshold: float) -> Tensor:
    return torch.empty_like(valid)


@nms.register_kernel("cuda")
def on_gpu(boxes: Tensor, scores: Tensor, groups: Tensor, valid: Tensor, threshold: float) -> Tensor:
    """The same without waiting for the GPU, as CUDA graphs ask; where Triton cannot make the kernel, it waits."""
    global triton_works
    if triton_works:
        try:
            from fpn.model.nms_triton import greedy

            return greedy(boxes, scores, groups, valid, threshold)
        except torch.OutOfMemoryError:
            raise
        except (
            Exception
        ) as error:  # no Triton, as on Windows; no C compiler that it finds; a GPU that is too old for it
            triton_works = False
            warnings.warn(f"NMS waits for the GPU, as Triton cannot be used here: {error}", stacklevel=2)
    return by_torchvision(boxes, scores, groups, valid, threshold)


def by_torchvision(boxes: Tensor, scores: Tensor, groups: Tensor, valid: Tensor, threshold: float) -> Tensor:
    """Image by image, the valid boxes alone: the fastest on a CPU, by a factor of 4 to 6."""
    from torchvision.ops import batched_nms

    keep = torch.zeros_like(valid)
    for image in range(len(boxes)):
        rows = valid[image].nonzero()[:, 0]
        kept = batched_nms(boxes[image, rows].float(), scores[image, rows].float(), groups[image, rows], threshold)
        keep[image, rows[kept]] = True
    return keep
