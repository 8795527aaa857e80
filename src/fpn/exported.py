"""A detector that was exported to one file: what is known of it, how it is opened and how it is asked."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from fpn.errors import CheckpointError, FpnError
from fpn.structures import Detections

if TYPE_CHECKING:
    from fpn.spec import Spec

SUFFIXES = {"onnx": ".onnx", "openvino": ".xml", "torch": ".pt2"}  # of the kinds of files
FORMAT = 1  # of what is written into them

# uint8 images of one size, (B, 3, H, W), -> the outputs of `fpn.exporting.whole.Whole` by name.
Run = Callable[[np.ndarray], Mapping[str, np.ndarray]]


@dataclass(frozen=True)
class Exported:
    """An exported detector, with the names under which `fpn.model.detector.Detector` tells the same.

    kind: one of SUFFIXES. find: see `fpn.inference.finder.Finder`; it runs on the CPU, images of one size as one batch.
    about: what was written into the file when it was checked against the detector that it was made from.
    """

    path: Path
    kind: str
    spec: Spec
    find: Callable[[Sequence[Tensor]], list[Detections]]
    score: float
    max_detections: int
    has_masks: bool
    proposes: bool
    about: Mapping[str, Any]

    needs_regions = False

    @property
    def backend(self) -> str:
        return self.kind

    @property
    def precision(self) -> str:
        return str(self.about.get("precision", "fp32"))

    @property
    def classes(self) -> tuple[str, ...]:
        return self.spec.classes


def is_exported(path: str | Path) -> bool:
    """Whether a file of this name is an exported detector, not a checkpoint."""
    return Path(path).suffix.lower() in SUFFIXES.values()


def backend(kind: str) -> ModuleType:
    """The module that writes and runs a kind of files: its `write`, `open_`, `read_about` and `write_about`."""
    match kind:
        case "onnx":
            from fpn.exporting import onnx

            return onnx
        case "openvino":
            from fpn.exporting import openvino

            return openvino
    from fpn.exporting import inductor

    return inductor


def load_exported(path: str | Path) -> Exported:
    """The exported detector in a file, ready to detect on the CPU.

    Opening an ONNX or OpenVINO file runs no code of it. A .pt2 file is a compiled program: open only those of people
    whose programs you would run. Raises CheckpointError for a file that is not one, is damaged or was not written by
    fpn, and OptionError where the package that runs it is missing.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: {'a folder, not an exported file' if path.is_dir() else 'no such file'}")
    kind = next((kind for kind, suffix in SUFFIXES.items() if suffix == path.suffix.lower()), None)
    if kind is None:
        raise CheckpointError(f"{path}: not an exported file, which end in {', '.join(SUFFIXES.values())}")
    module = backend(kind)
    about = module.read_about(path)
    spec = spec_in(about, path)
    find = partial(find_in, module.open_(path), spec.classes)
    facts = {name: about[name] for name in ("score", "max_detections", "has_masks", "proposes")}
    return Exported(path, kind, spec, find, **facts, about=about)


def about_in(text: str | bytes, path: str | Path, remedy: str) -> dict[str, Any]:
    """What a file says of itself, in JSON. Raises CheckpointError, which ends with the remedy, where it is damaged."""
    try:
        about = json.loads(text)
        if not isinstance(about, dict):
            raise ValueError("no JSON object")
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: what it says of itself is damaged ({error}); {remedy}") from error
    return about


def spec_in(about: Mapping[str, Any], path: Path) -> Spec:
    """The spec in what a file says of itself. Raises CheckpointError where that is not what fpn writes."""
    from fpn.spec import Spec, check

    forms = {"format": int, "max_detections": int, "has_masks": bool, "proposes": bool, "spec": dict}
    try:
        if type(about["format"]) is int and about["format"] > FORMAT:
            version = about.get("versions", {}).get("fpn", "unknown")
            raise CheckpointError(f"{path}: written by a newer fpn ({version}); upgrade fpn to use it")
        wrong = [name for name, form in forms.items() if type(about[name]) is not form]  # to isinstance, True is an int
        wrong += [name for name in ("format", "max_detections") if name not in wrong and about[name] < 1]
        if type(about["score"]) not in (int, float) or not 0 <= about["score"] <= 1:  # NaN is not
            wrong.append("score")
        if wrong:
            raise TypeError(f"{', '.join(wrong)} of another type or range")
        spec = Spec.from_dict(about["spec"])
        check(spec)
    except CheckpointError:
        raise
    except (FpnError, TypeError, LookupError, AttributeError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: what it says of itself is damaged or of another version ({error}); export the detector again"
        ) from error
    return spec


def find_in(run: Run, classes: tuple[str, ...], images: Sequence[UInt8[Tensor, "3 _ _"]]) -> list[Detections]:
    """The detections of each of the images; those of one size go through the file as one batch."""
    places: dict[tuple[int, ...], list[int]] = {}
    for place, image in enumerate(images):
        places.setdefault(tuple(image.shape), []).append(place)
    found: dict[int, Detections] = {}
    for rows in places.values():
        together = detections_of(run(torch.stack([images[row] for row in rows]).cpu().numpy()), classes)
        found |= {row: together[place] for place, row in enumerate(rows)}
    return [found[place] for place in range(len(images))]


def detections_of(outputs: Mapping[str, np.ndarray], classes: tuple[str, ...]) -> Detections:
    """The outputs of a file, by name, as the detections of a batch."""
    tensors = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in outputs.items()}
    whole = {name: tensors[name].long() for name in ("labels", "levels", "count")}
    masks = tensors["masks"].float() if "masks" in tensors else None
    return Detections(tensors["boxes"].float(), tensors["scores"].float(), **whole, classes=classes, masks=masks)
