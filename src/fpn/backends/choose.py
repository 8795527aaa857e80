"""A detector -> the same, run by the backend that is asked for, or by the one that suits the machine."""

from __future__ import annotations

from fpn.backends.names import check
from fpn.errors import OptionError
from fpn.exported import Exported
from fpn.hardware import pick_precision
from fpn.model.detector import Detector


def ready(detector: Detector, backend: str = "auto", precision: str = "fp32") -> Detector | Exported:
    """The detector, on the device on which it is, as something that only detects.

    backend: "eager" is the detector itself; "fused" a copy with its batch norms folded into its convolutions;
    "compiled" that copy by torch.compile, which takes a minute for the first image of each size; "onnx" and
    "openvino" are files as `fpn.export` writes them, made for the time being, on the CPU. "auto" is the fastest that
    needs no waiting and no other package: fused, or eager where a network cannot be fused.
    precision: with "fp32" results are equal but for rounding; "bf16" computes the layers with weights in bfloat16.

    Raises OptionError for what there is not, and where a network cannot be brought into that form.
    """
    check(backend, precision)
    match backend:
        case "eager":
            return detector
        case "fused":
            from fpn.backends.fused import fused

            return fused(detector, precision)
        case "compiled":
            from fpn.backends.compiled import compiled

            return compiled(detector, precision)
        case "onnx" | "openvino":
            from fpn.backends.file import as_file

            return as_file(detector, backend, precision)
    try:
        return ready(detector, "fused", precision)
    except OptionError:
        if precision != "fp32":
            raise
        return detector


def described(detector: Detector | Exported) -> str:
    """A line on what runs, for people who did not choose it."""
    how = f"backend {detector.backend}, {detector.precision}"
    if isinstance(detector, Exported) or detector.precision != "bf16":
        return how
    slow = pick_precision("auto", detector.mean.device) != "bf16"
    return f"{how} (this device has no arithmetic for bfloat16: fp32 is faster here)" if slow else how
