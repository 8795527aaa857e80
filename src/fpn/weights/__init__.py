"""Weights on disk: our own checkpoints and other libraries' ones."""

from typing import TYPE_CHECKING

from fpn.lazy import lazy

if TYPE_CHECKING:
    from fpn.weights.checkpoint import load, load_detector, save
    from fpn.weights.detectron2 import from_detectron2
    from fpn.weights.finetune import adapt
    from fpn.weights.mmdetection import from_mmdetection
    from fpn.weights.torchvision import from_torchvision, to_torchvision

__all__ = [
    "adapt",
    "from_detectron2",
    "from_mmdetection",
    "from_torchvision",
    "load",
    "load_detector",
    "save",
    "to_torchvision",
]

lazy(
    __name__,
    {
        **dict.fromkeys(("load", "load_detector", "save"), "fpn.weights.checkpoint"),
        "from_detectron2": "fpn.weights.detectron2",
        "adapt": "fpn.weights.finetune",
        "from_mmdetection": "fpn.weights.mmdetection",
        **dict.fromkeys(("from_torchvision", "to_torchvision"), "fpn.weights.torchvision"),
    },
)
