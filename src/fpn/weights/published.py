"""torchvision's published weights, fetched through torchvision, as checkpoints of fpn."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path

import torch
from torchvision.models import get_model_weights

from fpn.errors import CheckpointError
from fpn.weights.checkpoint import is_detector, save
from fpn.weights.torchvision import from_torchvision

# torchvision's detectors with a feature pyramid, and the epsilon that it gives the batch norms of each.
PUBLISHED = {
    "fasterrcnn_resnet50_fpn": 0.0,
    "fasterrcnn_resnet50_fpn_v2": 1e-5,
    "fasterrcnn_mobilenet_v3_large_fpn": 1e-5,
    "fasterrcnn_mobilenet_v3_large_320_fpn": 1e-5,
    "retinanet_resnet50_fpn": 0.0,
    "retinanet_resnet50_fpn_v2": 1e-5,
    "fcos_resnet50_fpn": 1e-5,
    "maskrcnn_resnet50_fpn": 0.0,
    "maskrcnn_resnet50_fpn_v2": 1e-5,
}


def published(name: str) -> Path:
    """The checkpoint with torchvision's COCO weights for its model `name`, made at the first call.

    It lies in the folder "fpn" of `torch.hub.get_dir()`. Raises CheckpointError for a model that there is not, and
    where the weights cannot be had.
    """
    from fpn import __version__

    if name not in PUBLISHED:
        raise CheckpointError(f"torchvision://{name}: no such weights; there are {', '.join(PUBLISHED)}")
    weights = get_model_weights(name).DEFAULT  # pyright: ignore[reportAttributeAccessIssue]
    hub = Path(torch.hub.get_dir())
    file = hub / "fpn" / f"{name}-{weights.name}-fpn-{__version__}.safetensors"
    if is_detector(file):  # and not cut short
        return file
    check_hash(hub / "checkpoints" / Path(weights.url).name)
    try:
        state = weights.get_state_dict(progress=True, check_hash=True, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:  # urllib's errors are OSErrors
        raise CheckpointError(
            f"torchvision://{name}: the weights could not be had ({error}). Fetch {weights.url} on a machine with "
            f"internet and put it into {hub / 'checkpoints'}"
        ) from error
    if not name.endswith("_v2"):  # whose other models freeze their batch norms, which then count nothing
        state = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    detector = from_torchvision(state, norm_eps=PUBLISHED[name], name=name)
    file.parent.mkdir(parents=True, exist_ok=True)
    return save(detector, file, {"converted_from": weights.url, "library": "torchvision"})


def check_hash(file: Path) -> None:
    """torch checks what it downloads, by the start of the SHA-256 in the name, but not a file that lies there already.

    Raises CheckpointError for another file of that name.
    """
    wanted = file.stem.rsplit("-", 1)[-1]
    if file.is_file():
        with file.open("rb") as content:
            found = hashlib.file_digest(content, "sha256").hexdigest()
        if not found.startswith(wanted):
            raise CheckpointError(f"{file}: damaged, or another file than torchvision's of this name; delete it")
