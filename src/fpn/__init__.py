"""fpn: object detection with Feature Pyramid Networks, from labelled images to a trained and measured detector."""

from fpn import data, errors, weights
from fpn.build import build
from fpn.evaluation.evaluate import evaluate
from fpn.predict import predict
from fpn.structures import Batch, Detections, Sample, Targets
from fpn.training.train import train
from fpn.weights import load

__version__ = "0.1.0"
__all__ = [
    "Batch",
    "Detections",
    "Sample",
    "Targets",
    "build",
    "data",
    "errors",
    "evaluate",
    "load",
    "predict",
    "train",
    "weights",
]
