"""torchvision's detectors with a feature pyramid -> fpn, and back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fpn.build import build
from fpn.errors import CheckpointError, OptionError
from fpn.model.backbone import RESNETS, SPLIT_MOBILENET
from fpn.model.detector import Detector
from fpn.weights.files import read_content, state_in
from fpn.weights.foreign import first_of
from fpn.weights.torchvision_models import MODELS, SMALL, State, class_outputs, described, eps_of, settings_of
from fpn.weights.torchvision_names import modern, theirs, with_background, without_background


def from_torchvision(
    source: State | nn.Module | str | Path,
    classes: Sequence[str] | None = None,
    norm_eps: float | None = None,
    name: str | None = None,
    **options: Any,
) -> Detector:
    """A detector with the weights and the arithmetic of one of torchvision's: Faster and Mask R-CNN, RetinaNet, FCOS.

    source: its state dict, the model itself, or a file with the state dict. Which model it is, with which backbone, is
        seen from the tensors; sizes, thresholds and anchors are those of a model given, else torchvision's defaults.
    classes: the names of its classes without background, in its order; left out, the 90 of COCO with torchvision's gaps
        when the number fits, else "class 1" and so on. For a one-stage model with as many names as it has classes in
        all, no class is taken as background.
    norm_eps: the epsilon of its batch norms, which a state dict does not hold. Left out, it is read from a model given;
        for a state dict it is 0.0, which is what torchvision sets with some of its published COCO weights, where these
        have the form of those (91 classes, frozen batch norm, not FCOS), else 1e-5.
    name: torchvision's name of the model. Only fasterrcnn_mobilenet_v3_large_320_fpn needs it, whose tensors are those
        of a model for larger images; for a file the file's name does.
    options: as for `fpn.build`, where the model was made with other settings, such as `short=512`.

    Raises CheckpointError where an option cannot work, and where tensors are missing, unknown or of another shape: one
    error, with torchvision's names.
    """
    if told := options.keys() & {"model", "backbone", "weights"}:
        raise CheckpointError(f"the weights themselves tell {' and '.join(sorted(told))}: leave it out")
    file = source if isinstance(source, str | Path) else None
    where = str(file or name or "torchvision's weights")
    name = Path(name or file or "").name
    content = source.state_dict() if isinstance(source, nn.Module) else source if file is None else read_content(file)
    state = modern(state_in(content, where))
    found = described(state, where)
    model, backbone = found.pop("model"), found.pop("backbone")
    per_cell, outputs = class_outputs(state, model)
    names = tuple(classes) if classes is not None else names_for(outputs - 1)
    dense = model in ("retinanet", "fcos")
    background = not (dense and len(names) == outputs)
    if len(names) != outputs - background:
        raise CheckpointError(f"{where}: {len(names)} class names for {outputs - 1} classes (background not counted)")
    small = SMALL if backbone == SPLIT_MOBILENET and "_320_" in name else {}
    own = settings_of(source) if isinstance(source, nn.Module) else {}
    eps = {"norm_eps": eps_of(state, model, outputs) if norm_eps is None else norm_eps}
    if norm_eps is not None:
        own.pop("norm_eps", None)
    chosen = {**found, **small, **eps, **own, **options}
    try:
        detector = build(model, backbone=backbone, classes=names, weights="none", **chosen)
    except OptionError as error:
        raise CheckpointError(f"{where}: no detector can be built for these weights and options: {error}") from error
    fill(detector, state, per_cell, background, where)
    return detector.eval()


def to_torchvision(detector: Detector) -> dict[str, Tensor]:
    """A state dict that loads strictly into torchvision's model of the same kind, made with as many classes and 1 more.

    Thresholds, image sizes, anchor sizes and the epsilon of the batch norms are no part of it: give torchvision's
    model those of `detector.spec`. Raises CheckpointError, with every reason, for a detector that does something that
    torchvision has no model for.
    """
    reasons = obstacles(detector)
    names = their_names(detector)
    reasons += [f"it has nothing like the tensor {ours}" for ours, theirs in names.items() if theirs is None][:3]
    if reasons:
        raise CheckpointError(f"torchvision has no model like this {detector.spec.model}: {'; '.join(reasons)}")
    return their_state(detector, background=True)


def their_state(detector: Detector, background: bool) -> dict[str, Tensor]:
    """The tensors of a detector as torchvision keeps them; what it has no name for is left out."""
    state, per_cell = detector.state_dict(), anchors_per_cell(detector)
    renamed = {theirs: state[ours].cpu().contiguous() for ours, theirs in their_names(detector).items() if theirs}
    if not background:
        return renamed
    return {theirs: with_background(theirs, value, per_cell).clone() for theirs, value in renamed.items()}


def their_names(detector: Detector) -> dict[str, str | None]:
    """torchvision's name for each of a detector's tensors, None where it has no such tensor."""
    mobilenet = detector.spec.backbone == SPLIT_MOBILENET
    return theirs(detector.state_dict(), detector.spec.model, detector.levels[0], mobilenet)


def fill(detector: Detector, state: State, per_cell: int, background: bool, where: str) -> None:
    """Load torchvision's tensors, which must fit exactly; all that does not is listed in one error."""
    wanted = their_state(detector, background)
    faults = [f"{key} is missing" for key in wanted.keys() - state.keys()]
    faults += [f"{key} is unknown" for key in state.keys() - wanted.keys()]
    faults += [
        f"{key} has shape {tuple(state[key].shape)}, not {tuple(wanted[key].shape)}"
        for key in wanted.keys() & state.keys()
        if state[key].shape != wanted[key].shape
    ]
    if faults:
        kind = f"{detector.spec.model} with {detector.spec.backbone}"
        raise CheckpointError(
            f"{where}: {len(faults)} tensors are not those of torchvision's {kind}: {first_of(faults)}"
        )
    names = {ours: theirs for ours, theirs in their_names(detector).items() if theirs}
    if background:
        state = {key: without_background(key, value, per_cell) for key, value in state.items()}
    detector.load_state_dict({ours: state[theirs] for ours, theirs in names.items()})


def anchors_per_cell(detector: Detector) -> int:
    spec = detector.spec
    return len(spec.anchor_ratios or ()) * len(spec.anchor_scales or ())


def names_for(count: int) -> tuple[str, ...]:
    from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

    coco = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"][1:]
    if count != len(coco):
        return tuple(f"class {i}" for i in range(1, count + 1))
    return tuple(f"N/A {i}" if name == "N/A" else name for i, name in enumerate(coco, 1))


def obstacles(detector: Detector) -> list[str]:
    """Why torchvision has no model that does what this detector does."""
    spec = detector.spec
    if spec.model not in MODELS:
        return [f"it has only {', '.join(MODELS)}"]
    common = {"neck": "fpn", "fuse": "sum", "extra_relu": True, "stride_in_1x1": False, "square": False, "bgr": False}
    common |= {"top_down": True, "lateral": True, "finest": False, "rpn_shared": True, "box_head": "layers"}
    own = {"geometric_mean": True} if spec.model == "fcos" else {}
    wanted: dict[str, Any] = {**MODELS[spec.model], **common, **own}
    # Numbers that its models are made with, and what matters in training only.
    free = {"anchor_scales", "per_image", "max_detections", "rpn_beta", "box_beta", "mask_binary"}
    values = {**spec.as_dict(), **spec.settings}
    wrong = {key: value for key, value in wanted.items() if key not in free and values[key] != value}
    found = [f"{key} is {values[key]}, not {value}" for key, value in wrong.items()]
    if spec.class_agnostic:
        found.append("it has one box for all classes")
    if spec.backbone not in (*RESNETS, SPLIT_MOBILENET):
        found.append(f"backbone {spec.backbone}")
    if spec.tower_convolutions not in (None, 4) and spec.model in ("retinanet", "fcos"):
        found.append(f"towers of {spec.tower_convolutions} convolutions, not 4")
    above = (spec.levels or (0, 0))[1] - (6 if spec.backbone == SPLIT_MOBILENET else 5)
    if above != {"pool": 1, "p5": 2, "c5": 2}.get(str(spec.extra)):
        found.append(f"{above} levels above the backbone's by {spec.extra}; torchvision has 1 by pool or 2 by p5 or c5")
    return found
