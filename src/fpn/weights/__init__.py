"""Weights on disk: our own checkpoints and other libraries' ones."""

from fpn.weights.checkpoint import load, save
from fpn.weights.detectron2 import from_detectron2
from fpn.weights.finetune import adapt
from fpn.weights.mmdetection import from_mmdetection
from fpn.weights.torchvision import from_torchvision, to_torchvision

__all__ = ["adapt", "from_detectron2", "from_mmdetection", "from_torchvision", "load", "save", "to_torchvision"]
