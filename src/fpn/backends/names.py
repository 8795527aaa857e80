"""The backends and the precisions in which they compute, by name."""

from __future__ import annotations

from typing import Any, Literal

from fpn.errors import OptionError

Backend = Literal["auto", "eager", "fused", "compiled", "onnx", "openvino"]
Precision = Literal["fp32", "bf16"]
PRECISIONS: dict[str, tuple[str, ...]] = {
    "auto": ("fp32", "bf16"),
    "eager": ("fp32",),
    "fused": ("fp32", "bf16"),
    "compiled": ("fp32", "bf16"),
    "onnx": ("fp32",),
    "openvino": ("fp32", "bf16"),
}  # of each backend


def check_whole(detector: Any) -> None:
    """Raises OptionError for a detector that only detects, where one is needed as it was trained."""
    if detector.backend != "eager":
        raise OptionError(
            f"a detector of backend {detector.backend} only detects: load the checkpoint without backend= to train, "
            "save, change or export it"
        )


def check(backend: str, precision: str) -> None:
    """Raises OptionError for a backend that there is not, or not in this precision."""
    if backend not in PRECISIONS:
        raise OptionError(f"backend {backend!r}: there are {', '.join(PRECISIONS)}")
    if precision not in PRECISIONS[backend]:
        having = [name for name, known in PRECISIONS.items() if precision in known]
        remedy = f"{precision} is of {', '.join(having)}" if having else "int8 is of files: fpn export --calibrate"
        raise OptionError(f"precision {precision!r}: backend {backend} has {', '.join(PRECISIONS[backend])}; {remedy}")
