"""Weights on disk: our own checkpoints and other libraries' ones."""

from fpn.weights.checkpoint import load, save
from fpn.weights.torchvision import from_torchvision

__all__ = ["from_torchvision", "load", "save"]
