"""A checkpoint is one `.safetensors` file: the weights, and as metadata all that is needed to use them.

Reading one never runs code: safetensors holds only tensors, the metadata is JSON.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fpn.backends.choose import ready
from fpn.backends.names import check, check_whole
from fpn.build import from_spec
from fpn.errors import CheckpointError, FpnError, OptionError
from fpn.exported import Exported, is_exported, load_exported
from fpn.hardware import pick_device
from fpn.model.backbone import OWN
from fpn.model.detector import Detector
from fpn.spec import Spec
from fpn.writing import replacing

KEY = "fpn"  # the metadata entry that marks a file as ours
FORMAT = 1
FOREIGN = "if it is a detector of torchvision, detectron2 or mmdetection, run `fpn convert` on it first"
PUBLISHED = re.compile(r"torchvision:/{1,2}(.*)")  # a path that went through pathlib has one slash


def save(detector: Detector, path: str | Path, about: Mapping[str, Any] | None = None) -> Path:
    """Write weights and spec to `path`; the file is there whole or not at all. `about` is kept as metadata (JSON).

    Raises OptionError for a detector that only detects, see `load`.
    """
    check_whole(detector)
    return save_state(detector.state_dict(), detector.spec, path, about)


def save_state(
    state: Mapping[str, Tensor], spec: Spec, path: str | Path, about: Mapping[str, Any] | None = None
) -> Path:
    from fpn import __version__

    path = Path(path)
    tensors = {key: value.detach().cpu().contiguous().clone() for key, value in state.items()}
    content = {"format": FORMAT, "version": __version__, "spec": spec.as_dict(), "about": dict(about or {})}
    try:
        with replacing(path) as unfinished:
            save_file(tensors, unfinished, metadata={KEY: json.dumps(content)})
    except SafetensorError as error:
        raise CheckpointError(f"{path}: could not be written ({error}); what was there is untouched") from error
    return path


def load(
    path: str | Path,
    device: str | torch.device = "cpu",
    backbone: nn.Module | None = None,
    *,
    backend: str | None = None,
    precision: str = "fp32",
) -> Detector | Exported:
    """The detector in a file, ready to detect: of a checkpoint `load_detector`, of an exported file `load_exported`.

    path: what these two take; .onnx, .xml and .pt2 are exported files. Such a one runs on the CPU and has no weights
    to fill in, so that OptionError is raised for another device, a backbone, or another backend or precision.
    device: also "auto", the first GPU where there is one.
    backend: what is to run a checkpoint's detector, which then only detects: "auto" for what is fastest without
    waiting, "eager", "fused", "compiled", "onnx" or "openvino"; see `fpn.backends.choose.ready`, also for precision.
    When None it is the detector as it was trained, to train on or to look into.
    """
    if is_exported(path):
        if str(device) not in ("cpu", "auto") or backbone is not None:
            raise OptionError(
                f"{path}: an exported detector is whole and runs on the CPU: load it without device, backbone"
            )
        if backend not in (None, "auto") or precision != "fp32":
            raise OptionError(
                f"{path}: an exported detector has its backend and precision: load it without, or take the checkpoint "
                "it was made from"
            )
        return load_exported(path)
    check(backend or "eager", precision)
    detector = load_detector(path, pick_device(device), backbone)
    return detector if backend is None else ready(detector, backend, precision)


def load_detector(path: str | Path, device: str | torch.device = "cpu", backbone: nn.Module | None = None) -> Detector:
    """The detector in a checkpoint, ready to detect: it knows its classes, sizes and normalisation.

    backbone: where it was built with a module of the user's own, such a module; the checkpoint fills in its weights.
    path: a file, or "torchvision://NAME" for the weights that torchvision publishes for its model of that name, with
        the classes of COCO; see `fpn.weights.published`.

    Raises CheckpointError, naming what is wrong, for a file that is not one or whose tensors do not fit.
    """
    if name := PUBLISHED.fullmatch(str(path)):
        from fpn.weights.published import published

        path = published(name[1])
    if is_exported(path):
        raise CheckpointError(
            f"{path}: an exported file, which cannot be trained or changed: take the checkpoint it was made from"
        )
    path = Path(path)
    content, state = read(path)
    check_own(content.get("spec"), backbone, path)
    try:
        detector = from_spec(Spec.from_dict(content["spec"]), module=backbone)
    except (FpnError, TypeError, LookupError, AttributeError, ValueError, RuntimeError, MemoryError) as error:
        version = content.get("version", "unknown")
        raise CheckpointError(
            f"{path}: written by fpn {version} with options this version does not know ({error})"
        ) from error
    fill(detector, state, path)
    return detector.eval().to(device)


def check_own(spec: Any, backbone: nn.Module | None, path: Path) -> None:
    """Raises CheckpointError unless there is a module of the user's own exactly where the checkpoint needs one."""
    name = str(spec.get("backbone")) if isinstance(spec, dict) else ""
    if name.startswith(OWN) and backbone is None:
        kind = name.removeprefix(OWN)
        raise CheckpointError(
            f"{path}: its backbone is a module of its maker's own, {kind}: load it with backbone={kind}(...)"
        )
    if not name.startswith(OWN) and backbone is not None:
        raise CheckpointError(f"{path}: its backbone is {name}, which fpn builds itself: load it without backbone=")


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The metadata and the tensors of one of our checkpoints."""
    if not path.is_file():
        raise CheckpointError(f"{path}: {'a folder, not a checkpoint' if path.is_dir() else 'no such checkpoint'}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError, MemoryError) as error:
        raise CheckpointError(f"{path}: not a checkpoint of fpn ({error}); {FOREIGN}") from error
    if KEY not in metadata:
        raise CheckpointError(
            f"{path}: holds tensors, but was not written by fpn; it lacks class names and sizes; {FOREIGN}"
        )
    try:
        content = json.loads(metadata[KEY])
        if content["format"] > FORMAT:
            version = content.get("version", "unknown")
            raise CheckpointError(f"{path}: written by a newer fpn ({version}); upgrade fpn to read it")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: its metadata is damaged ({error})") from error
    return content, state


def is_detector(weights: str | Path) -> bool:
    """Whether these are the weights of a whole detector that `load` reads, not of a backbone alone."""
    if str(weights).startswith("torchvision://"):
        return True
    path = Path(weights)
    if path.suffix != ".safetensors" or not path.is_file():
        return False
    try:
        with safe_open(path, framework="pt") as file:
            return KEY in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def fill(detector: Detector, state: Mapping[str, Tensor], path: str | Path) -> None:
    """Load a state dict that must fit exactly; all that does not is listed in one error."""
    wanted = detector.state_dict()
    faults = [f"{key} is missing" for key in wanted.keys() - state.keys()]
    faults += [f"{key} is unknown" for key in state.keys() - wanted.keys()]
    faults += [
        f"{key} has shape {tuple(state[key].shape)}, not {tuple(wanted[key].shape)}"
        for key in wanted.keys() & state.keys()
        if state[key].shape != wanted[key].shape
    ]
    if faults:
        raise CheckpointError(f"{path}: {len(faults)} tensors do not fit: " + "; ".join(sorted(faults)[:8]))
    detector.load_state_dict(dict(state))
