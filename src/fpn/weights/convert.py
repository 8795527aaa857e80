"""Checkpoints of other libraries -> ours, found out by looking, and ours -> torchvision's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fpn.errors import CheckpointError, FpnError, OptionError
from fpn.model.detector import Detector
from fpn.weights.checkpoint import is_detector, load_detector, save
from fpn.weights.detectron2 import from_detectron2
from fpn.weights.files import read_content, state_in
from fpn.weights.foreign import naming
from fpn.weights.mmdetection import from_mmdetection
from fpn.weights.torchvision import from_torchvision, to_torchvision
from fpn.writing import replacing

# Names that only one library gives to tensors of its detectors.
SIGNS = {
    "detectron2": ("backbone.bottom_up.",),
    "torchvision": ("backbone.body.",),
    "mmdetection": ("neck.lateral_convs.", "neck.fpn_convs."),
}


def from_file(path: str | Path, classes: Sequence[str] | None = None, **options: Any) -> tuple[Detector, str]:
    """The detector in a checkpoint of torchvision, detectron2 or mmdetection, and the name of that library.

    classes: the names of its classes without background, in its order, where the file does not hold them.
    options: as for `from_torchvision` and the others, where the model was made with other settings: `short=512`.

    Raises CheckpointError for a file that is none of these, or whose tensors do not fit.
    """
    content = read_content(path)
    state = state_in(content, path)
    with naming(path):
        match [library for library, signs in SIGNS.items() if any(name.startswith(signs) for name in state)]:
            case ["detectron2"]:
                return from_detectron2(state, classes, **options), "detectron2"
            case ["mmdetection"]:
                return from_mmdetection(content, classes, **options), "mmdetection"
            case ["torchvision"]:
                return from_torchvision(state, classes, name=str(path), **options), "torchvision"
    raise CheckpointError(
        f"{path}: not a detector with a feature pyramid of torchvision, detectron2 or mmdetection; its tensors are "
        f"named {', '.join(name[:200] for name in list(state)[:3])} ..."
    )


def convert_file(source: str, out: Path, classes: Sequence[str] | None = None, **options: Any) -> tuple[Detector, str]:
    """Write a foreign checkpoint as one of ours (.safetensors), or one of ours as torchvision's state dict (.pth).

    options: as for `from_file`. Gives the detector and where it came from. Raises OptionError for a file name with
    another ending, or the source's, before anything is read, FpnError where the file cannot be written, and
    CheckpointError as `from_file` and `to_torchvision` do.
    """
    if out.suffix not in (".safetensors", ".pth"):
        raise OptionError(f"{out}: the name of the file to write must end in .safetensors (fpn) or .pth (torchvision)")
    if out.resolve() == Path(source).resolve():
        raise OptionError(f"{out}: the file to read cannot be the file to write; give another name")
    if is_detector(source):
        if classes is not None:
            raise OptionError(f"{source} knows its classes; leave out --classes")
        if options:
            raise OptionError(f"{source} knows its settings; leave out {', '.join(f'--{name}' for name in options)}")
        detector, library = load_detector(source), "torchvision" if source.startswith("torchvision://") else "fpn"
    else:
        detector, library = from_file(source, classes, **options)
    if out.suffix == ".safetensors":
        save(detector, out, {"converted_from": Path(source).name, "library": library})
    else:
        write(to_torchvision(detector), out)
    return detector, library


def write(state: dict[str, Tensor], out: Path) -> None:
    try:
        with replacing(out) as unfinished:
            torch.save(state, unfinished)
    except RuntimeError as error:  # how torch tells of a full disk
        reason = str(error).splitlines()[0]
        raise FpnError(f"{out}: cannot be written ({reason}); what was there before is untouched") from error
