"""A detector as a file that is written, opened and gone: ONNX Runtime and OpenVINO without a step before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import Tensor

from fpn.exported import FORMAT, SUFFIXES, Exported, backend, load_exported
from fpn.exporting.export import described, given
from fpn.model.detector import Detector


def as_file(detector: Detector, kind: str, precision: str = "fp32", calibration: Sequence[Tensor] = ()) -> Exported:
    """What `fpn.export` makes of a detector, without its comparison with it. It runs on the CPU.

    kind: "onnx" or "openvino". calibration: of precision "int8", images like those that will be met. Raises
    OptionError for a network that cannot be exported and for a package that is missing.
    """
    alone, source = given(detector)
    writer = backend(kind)
    with TemporaryDirectory(prefix="fpn-", ignore_cleanup_errors=True) as folder:
        file = Path(folder) / f"detector{SUFFIXES[kind]}"
        writer.write(alone, file, precision, **({"calibration": calibration} if len(calibration) else {}))
        writer.write_about(file, {"format": FORMAT, "precision": precision, **described(alone, source, None)})
        return replace(load_exported(file), path=Path(f"backend {kind}"))
