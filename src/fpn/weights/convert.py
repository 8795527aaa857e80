"""Checkpoints of other libraries -> ours, found out by looking, and ours -> torchvision's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from fpn.errors import CheckpointError, OptionError
from fpn.model.detector import Detector
from fpn.weights.checkpoint import is_detector, load, save
from fpn.weights.detectron2 import from_detectron2
from fpn.weights.files import read_tensors
from fpn.weights.mmdetection import from_mmdetection
from fpn.weights.torchvision import from_torchvision, to_torchvision
from fpn.writing import replacing

# Names that only one library gives to tensors of its detectors.
SIGNS = {
    "detectron2": ("backbone.bottom_up.",),
    "torchvision": ("backbone.body.",),
    "mmdetection": ("neck.lateral_convs.", "neck.fpn_convs."),
}


def from_file(path: str | Path, classes: Sequence[str] | None = None) -> tuple[Detector, str]:
    """The detector in a checkpoint of torchvision, detectron2 or mmdetection, and the name of that library.

    classes: the names of its classes without background, in its order, where the file does not hold them. Raises
    CheckpointError for a file that is none of these, or whose tensors do not fit.
    """
    path = Path(path)
    if path.suffix == ".pkl":
        return from_detectron2(path, classes), "detectron2"
    names = read_tensors(path)
    match [library for library, signs in SIGNS.items() if any(name.startswith(signs) for name in names)]:
        case ["detectron2"]:
            return from_detectron2(path, classes), "detectron2"
        case ["mmdetection"]:
            return from_mmdetection(path, classes), "mmdetection"
        case ["torchvision"]:
            return from_torchvision(path, classes), "torchvision"
    raise CheckpointError(
        f"{path}: not a detector with a feature pyramid of torchvision, detectron2 or mmdetection; its tensors are "
        f"named {', '.join(list(names)[:3])} ..."
    )


def convert_file(source: str, out: Path, classes: Sequence[str] | None = None) -> tuple[Detector, str]:
    """Write a foreign checkpoint as one of ours (.safetensors), or one of ours as torchvision's state dict (.pth).

    Gives the detector and where it came from. Raises OptionError for a file name with another ending, before anything
    is read, and CheckpointError as `from_file` and `to_torchvision` do.
    """
    if out.suffix not in (".safetensors", ".pth"):
        raise OptionError(f"{out}: the name of the file to write must end in .safetensors (fpn) or .pth (torchvision)")
    if is_detector(source):
        if classes is not None:
            raise OptionError(f"{source} knows its classes; leave out --classes")
        detector, library = load(source), "torchvision" if source.startswith("torchvision://") else "fpn"
    else:
        detector, library = from_file(source, classes)
    if out.suffix == ".safetensors":
        save(detector, out, {"converted_from": Path(source).name, "library": library})
    else:
        state = to_torchvision(detector)
        with replacing(out) as unfinished:
            torch.save(state, unfinished)
    return detector, library
