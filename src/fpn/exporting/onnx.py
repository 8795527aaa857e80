"""Detectors as ONNX files, which run without PyTorch: written from what torch.export gives, read by ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fpn.errors import CheckpointError, OptionError
from fpn.exporting.onnx_metadata import read_about, write_about
from fpn.exporting.onnx_operators import translations
from fpn.exporting.whole import OUTPUTS, export_program, exportable, reason, silence
from fpn.model.detector import Detector
from fpn.writing import replacing

__all__ = ["open_", "read_about", "write", "write_about"]

INPUT = "images"
OPSET = 18
LARGEST = 2**31 - 1  # bytes of a file: protobuf, the format around ONNX, has none larger
LOGGERS = ("torch.onnx", "onnxscript", "onnx_ir")  # of what takes part in exporting
WEIGHTS = 0.95  # share of it that weights may take


def needed(name: str) -> Any:
    """A package that only ONNX files need. Raises OptionError where it is not installed."""
    try:
        return import_module(name)
    except ImportError as error:
        raise OptionError(f"ONNX files need {name}: pip install 'fpn[onnx]'") from error


def write(detector: Detector, path: str | Path, precision: str = "fp32") -> None:
    """Write the whole detector, see `fpn.exporting.whole.Whole`, to one file, which is there whole or not at all.

    Its input is `images`, uint8 (B, 3, H, W), any number of any size; its outputs have the names of `Whole`'s. Raises
    OptionError for a detector that cannot be exported or is too large for one file.
    """
    if precision != "fp32":
        raise OptionError(f"precision {precision}: ONNX files have fp32; export to openvino for bf16 or int8")
    needed("onnxscript")
    ir = needed("onnx_ir")
    size = sum(value.nbytes for value in detector.state_dict().values())
    if size > WEIGHTS * LARGEST:
        raise OptionError(
            f"{path}: {size / 2**30:.1f} GiB of weights are too many for an ONNX file, which ends at 2 GiB"
        )
    with exportable(detector):
        model = model_of(export_program(detector), detector.has_masks)
    with replacing(path) as unfinished:
        ir.save(model, unfinished)


def model_of(program: torch.export.ExportedProgram, has_masks: bool) -> Any:
    """The ONNX model, an `onnx_ir.Model`, of an exported `Whole`."""
    with silence(*LOGGERS):
        made = torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            input_names=[INPUT],
            output_names=[*OUTPUTS, *(["masks"] if has_masks else [])],
            opset_version=OPSET,
            custom_translation_table=translations(),
        )
    assert made is not None
    made.model.producer_name = "fpn"
    for node in made.model.graph.all_nodes():
        node.metadata_props.clear()  # in which lines of whose files each was made
    return made.model


def open_(path: str | Path, threads: int | None = None) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """The file as a function: images, uint8 (B, 3, H, W), to what `Whole` gives of them.

    threads: of the CPU; None: one a core. Raises CheckpointError for a file that ONNX Runtime cannot run or that is no
    detector.
    """
    runtime = needed("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.log_severity_level = 3  # errors, which are raised as well
    try:
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # of a type of its own for each cause
        raise CheckpointError(
            f"{path}: cannot be run by ONNX Runtime ({reason(error)}); export the detector again"
        ) from error
    names = [output.name for output in session.get_outputs()]
    inputs = [(given.name, given.type, len(given.shape)) for given in session.get_inputs()]
    if inputs != [(INPUT, "tensor(uint8)", 4)] or not set(OUTPUTS) <= set(names):
        raise CheckpointError(
            f"{path}: an ONNX file, but not of a detector that fpn exported: it takes {inputs} and gives {names}"
        )

    def run(images: np.ndarray) -> dict[str, np.ndarray]:
        return dict(zip(names, session.run(names, {INPUT: images}), strict=True))

    return run
