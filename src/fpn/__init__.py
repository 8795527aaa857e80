"""fpn: object detection with Feature Pyramid Networks, from labelled images to a trained and measured detector."""

from typing import TYPE_CHECKING

from fpn.lazy import lazy

if TYPE_CHECKING:
    from fpn import data, errors, weights
    from fpn.build import build
    from fpn.evaluation.evaluate import evaluate
    from fpn.exporting.export import export
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
    "export",
    "load",
    "predict",
    "train",
    "weights",
]

lazy(
    __name__,
    {
        **dict.fromkeys(("Batch", "Detections", "Sample", "Targets"), "fpn.structures"),
        **{
            name: f"fpn.{name}"
            for name in ("boxes", "evaluation", "exporting", "inference", "model", "spec", "structures", "training")
        },
        "build": "fpn.build",
        "data": "fpn.data",
        "errors": "fpn.errors",
        "evaluate": "fpn.evaluation.evaluate",
        "export": "fpn.exporting.export",
        "load": "fpn.weights",
        "predict": "fpn.predict",
        "train": "fpn.training.train",
        "weights": "fpn.weights",
    },
)
