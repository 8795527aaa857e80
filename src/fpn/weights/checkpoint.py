"""A checkpoint is one `.safetensors` file: the weights, and as metadata all that is needed to use them.

Reading one never runs code: safetensors holds only tensors, the metadata is JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fpn.build import Spec, from_spec
from fpn.errors import CheckpointError, FpnError
from fpn.model.detector import Detector
from fpn.writing import replacing

KEY = "fpn"  # the metadata entry that marks a file as ours
FORMAT = 1


def save(detector: Detector, path: str | Path, about: Mapping[str, Any] | None = None) -> Path:
    """Write weights and spec to `path`; the file is there whole or not at all. `about` is kept as metadata (JSON)."""
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


def load(path: str | Path, device: str | torch.device = "cpu") -> Detector:
    """The detector in a checkpoint, ready to detect: it knows its classes, sizes and normalisation.

    Raises CheckpointError, naming what is wrong, for a file that is not one or whose tensors do not fit.
    """
    path = Path(path)
    content, state = read(path)
    try:
        detector = from_spec(Spec.from_dict(content["spec"]))
    except (FpnError, TypeError, KeyError, AttributeError) as error:
        version = content.get("version", "unknown")
        raise CheckpointError(
            f"{path}: written by fpn {version} with options this version does not know ({error})"
        ) from error
    fill(detector, state, path)
    return detector.eval().to(device)


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The metadata and the tensors of one of our checkpoints."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a checkpoint of fpn ({error})") from error
    if KEY not in metadata:
        raise CheckpointError(f"{path}: holds tensors, but was not written by fpn; it lacks class names and sizes")
    try:
        content = json.loads(metadata[KEY])
        if content["format"] > FORMAT:
            raise CheckpointError(f"{path}: written by a newer fpn ({content['version']}); upgrade fpn to read it")
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: its metadata is damaged ({error})") from error
    return content, state


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
