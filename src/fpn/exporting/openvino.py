"""Detectors as OpenVINO files: `x.xml`, the graph, and `x.bin`, the weights, from what torch.export gives.

Reading or running one runs no code of its maker's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import numpy as np
from torch import Tensor

from fpn.errors import CheckpointError, OptionError
from fpn.exported import about_in
from fpn.exporting.openvino_operators import extensions
from fpn.exporting.whole import OUTPUTS, export_program, reason, silence
from fpn.model.detector import Detector
from fpn.writing import replacing

INPUT = "images"
PRECISIONS = ("fp32", "bf16", "int8")
KEY = "fpn"  # of what is said about a detector, among the graph's notes
SIZE, DIGEST, PRECISION = "fpn_bin_bytes", "fpn_bin_sha256", "fpn_precision"  # other notes
AGAIN = "export the detector again"


def needed(name: str) -> ModuleType:
    """A package that only OpenVINO files need. Raises OptionError where it is not installed."""
    try:
        return import_module(name)
    except ImportError as error:
        raise OptionError(f"OpenVINO files need {name}: pip install 'fpn[openvino]'") from error


def weights_of(path: str | Path) -> Path:
    """The file with the weights, which goes wherever the .xml goes."""
    return Path(path).with_suffix(".bin")


def write(
    detector: Detector,
    path: str | Path,
    precision: str = "fp32",
    calibration: Sequence[Tensor] = (),
) -> None:
    """Write the whole detector, see `fpn.exporting.whole.Whole`, to `path`, which ends in .xml, and a .bin beside it.

    precision: "bf16" stores the weights in 16 bits and computes in bfloat16 where the processor can, "int8" computes
    the layers with weights in 8 bits, in steps fitted to what they give on the images of `calibration`, uint8
    (3, H, W) each. All that becomes boxes and scores stays in 32 bits. Raises OptionError for what cannot work.
    """
    path = Path(path)
    if path.suffix.lower() != ".xml":
        raise OptionError(f"{path}: the name of an OpenVINO file must end in .xml")
    if precision not in PRECISIONS:
        raise OptionError(f"precision {precision!r}: OpenVINO files have {', '.join(PRECISIONS)}")
    if (precision == "int8") != bool(len(calibration)):
        raise OptionError("precision int8 needs images to fit its steps to, and no other precision does")
    openvino = needed("openvino")
    model = model_of(detector)
    if precision == "int8":
        model = quantized(model, calibration)
    with replacing(path) as graph, replacing(weights_of(path)) as weights:
        half = precision == "bf16"
        made = graph.with_suffix(".xml")  # OpenVINO goes by the ending
        try:
            openvino.save_model(model, made, compress_to_fp16=half)
            made.with_suffix(".bin").replace(weights)
            made.replace(graph)
        finally:
            for leftover in (made, made.with_suffix(".bin")):
                leftover.unlink(missing_ok=True)
        if half:
            keep_exact(graph)
        note(graph, {PRECISION: precision, SIZE: str(weights.stat().st_size), DIGEST: digest(weights)})


def model_of(detector: Detector) -> Any:
    """The OpenVINO model of a detector, with the names of `Whole`."""
    openvino = needed("openvino")
    program = export_program(detector)
    try:
        with silence("openvino"):
            model = openvino.convert_model(program, extension=extensions())
    except Exception as error:  # of types of its own
        raise OptionError(
            f"{detector.spec.model}: OpenVINO has no form for some of it ({reason(error, -1)}); export to onnx"
        ) from error
    model.reshape({0: openvino.PartialShape([-1, 3, -1, -1])})
    model.input(0).set_names({INPUT})
    names = [*OUTPUTS, *(["masks"] if detector.has_masks else [])]
    for output, name in zip(model.outputs, names, strict=True):
        output.set_names({name})
    return model


def quantized(model: Any, calibration: Sequence[Tensor]) -> Any:
    """The model with its convolutions and linear layers in 8 bits, in steps that fit the images."""
    nncf = needed("nncf")
    images = nncf.Dataset(range(len(calibration)), lambda place: {INPUT: calibration[place].numpy()[None]})
    # Only layers with weights: the arithmetic of boxes, scores and places must stay exact.
    exact = sorted({node.get_type_name() for node in model.get_ops()} - {"Convolution", "GroupConvolution", "MatMul"})
    with silence("nncf"):
        return nncf.quantize(
            model,
            images,
            preset=nncf.QuantizationPreset.MIXED,
            subset_size=len(calibration),
            ignored_scope=nncf.IgnoredScope(types=exact, names=last_layers(model), validate=False),
        )


def last_layers(model: Any) -> list[str]:
    """The names of the layers that say scores and offsets: what they give is dealt out to regions as it is.

    In 8 bits they would cost the most and gain the least, and OpenVINO 2026.4 cannot always open a graph with them so.
    """
    between = ("Add", "Multiply", "Transpose", "Convert")

    def dealt_out(node: Any) -> bool:
        after = [target.get_node() for target in node.output(0).get_target_inputs()]
        kinds = [(other, other.get_type_name()) for other in after]
        return any(kind == "Reshape" or (kind in between and dealt_out(other)) for other, kind in kinds)

    layers = [node for node in model.get_ordered_ops() if node.get_type_name() in ("Convolution", "MatMul")]
    return [node.get_friendly_name() for node in layers if dealt_out(node)]


def open_(path: str | Path, threads: int | None = None) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """The file as a function: images, uint8 (B, 3, H, W), to what `Whole` gives of them.

    threads: of the CPU; None: one a core. Raises CheckpointError for files that OpenVINO cannot run or that do not
    belong together, and where it is no detector.
    """
    path = Path(path)
    openvino = needed("openvino")
    notes = check_weights(path)
    # What is asked of it comes image by image. 16 bits only where they were asked for, whatever the processor prefers.
    settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
    settings["INFERENCE_PRECISION_HINT"] = "bf16" if notes.get(PRECISION) == "bf16" else "f32"
    if threads:
        settings["INFERENCE_NUM_THREADS"] = threads
    try:
        core = openvino.Core()
        model = core.read_model(path, weights_of(path))
        names = [output.get_any_name() for output in model.outputs]
        inputs = [(given.get_any_name(), given.get_element_type().get_type_name()) for given in model.inputs]
        compiled = core.compile_model(model, "CPU", settings)
    except Exception as error:  # RuntimeError, and of types of its own
        raise CheckpointError(f"{path}: cannot be run by OpenVINO ({reason(error, -1)}); {AGAIN}") from error
    if inputs != [(INPUT, "u8")] or not set(OUTPUTS) <= set(names):
        raise CheckpointError(
            f"{path}: an OpenVINO file, but not of a detector that fpn exported: it takes {inputs} and gives {names}"
        )

    def run(images: np.ndarray) -> dict[str, np.ndarray]:
        # A request of its own for each call: calls may come from several threads.
        found = compiled.create_infer_request().infer({INPUT: images}, share_inputs=True)
        return {name: found[name].copy() for name in names}

    return run


def read_about(path: str | Path) -> dict[str, Any]:
    """What was written about the detector; the graph is not built. Raises CheckpointError for a file without."""
    path = Path(path)
    notes = notes_of(path)
    if KEY not in notes:
        raise CheckpointError(f"{path}: an OpenVINO file that was not written by fpn; it lacks class names and sizes")
    return about_in(notes[KEY], path, AGAIN)


def write_about(path: str | Path, about: Mapping[str, Any]) -> None:
    """Put this, JSON values, in the place of what was written about the detector."""
    with replacing(path) as unfinished:
        unfinished.write_bytes(Path(path).read_bytes())
        note(unfinished, {KEY: json.dumps(about)})


def notes_of(path: Path) -> dict[str, str]:
    """The texts that stand among a graph's own notes, `rt_info`, and begin with "fpn"."""
    rt_info = parsed(path).find("rt_info")
    notes = {} if rt_info is None else {entry.tag: entry.get("value", "") for entry in rt_info}
    return {name: value for name, value in notes.items() if name.startswith(KEY)}


def note(path: Path, notes: Mapping[str, str]) -> None:
    """Write such texts into a graph, in the place of those of the same names."""
    root = parsed(path)
    rt_info = root.find("rt_info")
    if rt_info is None:
        rt_info = ElementTree.SubElement(root, "rt_info")
    for entry in [entry for entry in rt_info if entry.tag in notes]:
        rt_info.remove(entry)
    for name, value in notes.items():
        ElementTree.SubElement(rt_info, name, value=value)
    ElementTree.ElementTree(root).write(path, encoding="utf-8", xml_declaration=True)


def keep_exact(path: Path) -> None:
    """Have what is not a map or a linear layer computed in 32 bits, whatever is asked of the rest of the graph.

    OpenVINO lowers all that stands before the last layer with weights, the boxes of proposals as well; in 16 bits these
    are 4 pixels off in images of 1000. The attribute is the one of its own `disable_fp16_compression`.
    """
    root = parsed(path)
    for layer in root.iterfind("layers/layer"):
        ranks = {len(port) for port in layer.iterfind("output/port")}
        if layer.get("type") in ("Parameter", "Result", "Const", "Convert", "MatMul") or 4 in ranks:
            continue
        rt_info = layer.find("rt_info")
        if rt_info is None:
            rt_info = ElementTree.SubElement(layer, "rt_info")
        ElementTree.SubElement(rt_info, "attribute", name="precise", version="0")
    ElementTree.ElementTree(root).write(path, encoding="utf-8", xml_declaration=True)


class Tree(ElementTree.TreeBuilder):
    """A graph declares no document type, through which short files can be made to swell."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise ValueError("it has a document type")


def parsed(path: Path) -> ElementTree.Element:
    """The XML of a graph, its first element. Raises CheckpointError for anything else."""
    try:
        with open(path, "rb") as file:
            root = ElementTree.fromstring(file.read(), ElementTree.XMLParser(target=Tree()))
        if root.tag != "net":
            raise ValueError(f"its first element is {root.tag[:50]!r}, not 'net'")
    except (OSError, ElementTree.ParseError, ValueError, LookupError) as error:
        raise CheckpointError(f"{path}: not an OpenVINO file ({error}); {AGAIN}") from error
    return root


def check_weights(path: Path) -> dict[str, str]:
    """The graph's notes. Raises CheckpointError where the .bin beside it is not the one it was written with."""
    notes, weights = notes_of(path), weights_of(path)
    if not weights.is_file():
        raise CheckpointError(f"{path}: the file with its weights, {weights.name}, must be beside it")
    if SIZE in notes and (notes[SIZE] != str(weights.stat().st_size) or notes.get(DIGEST) != digest(weights)):
        raise CheckpointError(f"{path}: {weights.name} is damaged or of another export; {AGAIN}")
    return notes


def digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
