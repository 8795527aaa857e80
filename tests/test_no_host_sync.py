"""Between pixels and boxes, and between pixels and losses, the host never waits for a GPU. No GPU is needed to see it.

Everything runs on torch's meta device, whose tensors have shapes and no values. To read a value raises, and so does
every operation whose output's shape depends on values. Copies between two devices are looked for one by one.
"""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fpn
from fpn.model.detector import Detector
from fpn.structures import Batch, Regions, Targets

DETECTORS = [
    "faster_rcnn",
    "mask_rcnn",
    "cascade_mask_rcnn",
    "fast_rcnn",
    "rpn",
    "retinanet",
    "fcos",
    "atss",
    "mask_proposals",
]

OTHERS = [
    ("faster_rcnn", {"pooling": "pool"}),
    ("faster_rcnn", {"sampling_ratio": 0, "whole_pixels": True, "floor_stride": True}),
    ("retinanet", {"box_loss": "giou", "per_image": True, "clip_first": False}),
    ("faster_rcnn", {"neck": "bifpn"}),
]


class NoCopies(TorchDispatchMode):
    """Raises where an operation has to do with two devices: a copy, or a tensor on the host among those on a GPU.

    The latter may do no harm by itself, but torch.compile makes no CUDA graph of a function that has one.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        devices = {x.device.type for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)}
        assert len(devices) < 2, f"{func} on {devices}"
        return out


def batch_for(model: str) -> Batch:
    device = "meta"
    sizes = torch.zeros(2, 2, dtype=torch.int64, device=device)
    boxes, valid = torch.zeros(2, 5, 4, device=device), torch.zeros(2, 5, dtype=torch.bool, device=device)
    masks = torch.zeros(2, 5, 128, 160, dtype=torch.uint8, device=device) if "mask" in model else None
    return Batch(
        torch.zeros(2, 3, 128, 160, dtype=torch.uint8, device=device),
        sizes,
        sizes,
        sizes[:, 0],
        Targets(boxes, valid.long(), valid, masks),
        sizes[:, 0],
        Regions(boxes, valid) if model == "fast_rcnn" else None,
    )


WAITS = {
    "from the host": lambda x: torch.zeros(3).to(x.device),
    "beside the host": lambda x: torch.zeros(()) + x,
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool(x.any()),
    "tolist": lambda x: x.tolist(),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "unique": lambda x: x.unique(),
    "repeat": lambda x: x.repeat_interleave(x.long()),
}


@pytest.mark.parametrize("wait", WAITS.values(), ids=WAITS)
def test_waiting_would_be_seen(wait):
    x = torch.zeros(3, device="meta")
    with NoCopies(), pytest.raises((AssertionError, RuntimeError, NotImplementedError)):
        wait(x)


def built(model: str, **options) -> Detector:
    names = ["object"] if model in ("rpn", "mask_proposals") else ["a", "b"]
    return fpn.build(model, backbone="resnet18", weights="none", classes=names, width=32, **options).to("meta")


@pytest.mark.parametrize("model, options", [*((model, {}) for model in DETECTORS), *OTHERS])
def test_detecting_never_waits(model, options):
    detector, batch = built(model, **options).eval(), batch_for(model)
    with torch.no_grad(), NoCopies():
        found = detector.detect(batch)
    assert found.boxes.device.type == "meta" and found.boxes.shape[0] == 2


@pytest.mark.parametrize("model, options", [*((model, {}) for model in DETECTORS), *OTHERS])
def test_learning_never_waits(model, options):
    detector, batch = built(model, **options).train(), batch_for(model)
    with NoCopies():
        losses = detector.losses(batch)
        torch.stack(list(losses.values())).sum().backward()
    assert all(p.grad is not None for p in detector.parameters())
