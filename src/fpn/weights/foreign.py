"""What the converters of detectron2's and mmdetection's checkpoints share."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from fpn.build import from_spec
from fpn.errors import CheckpointError
from fpn.model.detector import Detector
from fpn.spec import Spec, as_tuple

# Blocks of stages 2 to 5, convolutions in each, and channels and groups of the middle one in stage 2.
RESNETS: dict[tuple[tuple[int, ...], int, int, int], str] = {
    ((2, 2, 2, 2), 2, 64, 1): "resnet18",
    ((3, 4, 6, 3), 2, 64, 1): "resnet34",
    ((3, 4, 6, 3), 3, 64, 1): "resnet50",
    ((3, 4, 23, 3), 3, 64, 1): "resnet101",
    ((3, 8, 36, 3), 3, 64, 1): "resnet152",
    ((3, 4, 6, 3), 3, 128, 32): "resnext50_32x4d",
    ((3, 4, 23, 3), 3, 256, 32): "resnext101_32x8d",
    ((3, 4, 23, 3), 3, 256, 64): "resnext101_64x4d",
}

Names = Sequence[tuple[str, str | Callable[[re.Match[str]], str]]]


@contextmanager
def naming(where: str | Path) -> Iterator[None]:
    """Every CheckpointError from within begins with the name of the file."""
    try:
        yield
    except CheckpointError as error:
        if str(error).startswith(f"{where}:"):
            raise
        raise CheckpointError(f"{where}: {error}") from error


def first_of(faults: Sequence[str], separator: str = "; ") -> str:
    """The first 8 of what is wrong, and how many more there are."""
    more = [f"and {len(faults) - 8} more"] if len(faults) > 8 else []
    return separator.join([*(fault[:200] for fault in sorted(faults)[:8]), *more])


def translated(state: Mapping[str, Tensor], names: Names, peer: str) -> dict[str, tuple[str, Tensor]]:
    """{our name: (the peer's name, tensor)}; the first of `names`, (the peer's as a pattern, ours), that fits applies.

    Raises CheckpointError that lists the first of what none fits.
    """
    renamed, unknown = {}, []
    for name, value in state.items():
        for pattern, ours in names:
            new, hits = re.subn(f"^{pattern}", ours, name)
            if hits:
                renamed[new] = (name, value)
                break
        else:
            unknown.append(name)
    if unknown:
        raise CheckpointError(
            f"not a detector of {peer}'s that fpn has, with a ResNet and an FPN: {len(unknown)} tensors are unknown: "
            + first_of(unknown, ", ")
        )
    return renamed


def resnet_of(state: Mapping[str, Tensor], peer: str) -> str:
    """Which ResNet has these tensors (in our names)."""
    blocks = tuple(len({k.split(".")[3] for k in state if k.startswith(f"backbone.stages.{n}.")}) for n in (2, 3, 4, 5))
    middle = state.get("backbone.stages.2.0.conv2.weight")
    if middle is None or middle.ndim != 4:
        raise CheckpointError(f"not a detector of {peer}'s with a ResNet: the convolutions of stage 2 are missing")
    convolutions = 3 if "backbone.stages.2.0.conv3.weight" in state else 2
    name = RESNETS.get((blocks, convolutions, len(middle), len(middle) // middle.shape[1]))
    if name is None:
        raise CheckpointError(
            f"{peer}'s backbone has {blocks} blocks of {convolutions} convolutions and a middle one of shape "
            f"{tuple(middle.shape)}; fpn has {', '.join(RESNETS.values())}"
        )
    return name


def size_of(state: Mapping[str, Tensor], name: str, peer: str, dim: int = 0) -> int:
    """One length of the tensor that is called `name` in fpn."""
    if name not in state or state[name].ndim <= dim:
        raise CheckpointError(f"not a detector of {peer}'s with an FPN: {name} (in fpn's names) is missing")
    return state[name].shape[dim]


def with_options(spec: Spec, options: Mapping[str, Any]) -> Spec:
    """The spec with the user's options, fields of `Spec` or settings of the detector, in place of what was found."""
    own = {field.name for field in fields(Spec)} - {"settings"}
    values = {name: as_tuple(value) for name, value in options.items()}
    settings = {**spec.settings, **{name: value for name, value in values.items() if name not in own}}
    return replace(spec, **{name: value for name, value in values.items() if name in own}, settings=settings)


def assembled(spec: Spec, state: Mapping[str, tuple[str, Tensor]], peer: str) -> Detector:
    """The detector of a spec with a state dict that must fit exactly; one CheckpointError lists what does not."""
    detector = from_spec(spec)
    wanted = detector.state_dict()
    faults = [f"{name} (in fpn's names) is missing" for name in wanted.keys() - state.keys()]
    faults += [f"{state[name][0]} is unknown" for name in state.keys() - wanted.keys()]
    faults += [
        f"{state[name][0]} has shape {tuple(state[name][1].shape)}, not {tuple(wanted[name].shape)}"
        for name in wanted.keys() & state.keys()
        if state[name][1].shape != wanted[name].shape
    ]
    if faults:
        raise CheckpointError(
            f"{peer}'s weights do not fit {spec.model} with {spec.backbone}; {len(faults)} tensors: " + first_of(faults)
        )
    detector.load_state_dict({name: value for name, (_, value) in state.items()})
    return detector.eval()


def names_for(count: int, classes: Sequence[str] | None) -> tuple[str, ...]:
    """The class names given; left out, the 80 of COCO where there are 80 classes, else "class 1" and so on."""
    if classes is not None:
        if len(classes) != count:
            raise CheckpointError(
                f"{len(classes)} class names for weights with {count} classes (background not counted)"
            )
        return tuple(classes)
    return coco_classes() if count == 80 else tuple(f"class {i}" for i in range(1, count + 1))


def coco_classes() -> tuple[str, ...]:
    """The 80 class names of COCO, in the order of their ids."""
    from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

    listed = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    return tuple(name for name in listed if name not in ("__background__", "N/A"))


def ratio_first(value: Tensor, sizes: int, ratios: int) -> Tensor:
    """A head's output channels, for anchors in the order (size, ratio), in the order (ratio, size)."""
    return value.unflatten(0, (sizes, ratios, -1)).transpose(0, 1).flatten(0, 2)
