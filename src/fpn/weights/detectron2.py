"""detectron2's detectors with an FPN -> fpn, from its model zoo or from its trainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fpn.model.detector import Detector
from fpn.spec import MODELS, Spec
from fpn.weights.files import read_tensors, state_in
from fpn.weights.foreign import (
    Names,
    assembled,
    names_for,
    naming,
    ratio_first,
    resnet_of,
    size_of,
    translated,
    with_options,
)

PEER = "detectron2"

# detectron2's name -> ours; the first that matches applies.
NAMES: Names = (
    (r"backbone\.bottom_up\.stem\.conv1\.norm\.", "backbone.stages.1.1."),
    (r"backbone\.bottom_up\.stem\.conv1\.", "backbone.stages.1.0."),
    (r"backbone\.bottom_up\.res(\d)\.(\d+)\.shortcut\.norm\.", r"backbone.stages.\1.\2.downsample.1."),
    (r"backbone\.bottom_up\.res(\d)\.(\d+)\.shortcut\.", r"backbone.stages.\1.\2.downsample.0."),
    (r"backbone\.bottom_up\.res(\d)\.(\d+)\.conv(\d)\.norm\.", r"backbone.stages.\1.\2.bn\3."),
    (r"backbone\.bottom_up\.res(\d)\.(\d+)\.conv(\d)\.", r"backbone.stages.\1.\2.conv\3."),
    (r"backbone\.fpn_(lateral|output)(\d)\.", r"pyramid.\1.\2."),
    (r"backbone\.top_block\.p([67])\.", lambda m: f"pyramid.extra.convs.{int(m[1]) - 6}."),
    (r"proposal_generator\.rpn_head\.conv\.(?:conv(\d)\.)?", lambda m: f"rpn.shared.{m[1] or 0}."),
    (r"proposal_generator\.rpn_head\.objectness_logits\.", "rpn.objectness."),
    (r"proposal_generator\.rpn_head\.anchor_deltas\.", "rpn.offsets."),
    (r"roi_heads\.box_head\.fc(\d)\.", r"box_head.fc\1."),
    (r"roi_heads\.box_predictor\.cls_score\.", "box_head.classes."),
    (r"roi_heads\.box_predictor\.bbox_pred\.", "box_head.offsets."),
    (r"roi_heads\.box_head\.(\d)\.fc(\d)\.", r"box_head.\1.fc\2."),
    (r"roi_heads\.box_predictor\.(\d)\.cls_score\.", r"box_head.\1.classes."),
    (r"roi_heads\.box_predictor\.(\d)\.bbox_pred\.", r"box_head.\1.offsets."),
    (r"roi_heads\.mask_head\.mask_fcn(\d)\.", lambda m: f"masks.head.convs.{int(m[1]) - 1}."),
    (r"roi_heads\.mask_head\.deconv\.", "masks.head.up."),
    (r"roi_heads\.mask_head\.predictor\.", "masks.head.logits."),
    (r"head\.cls_subnet\.(\d)\.", r"head.class_tower.\1."),
    (r"head\.bbox_subnet\.(\d)\.", r"head.box_tower.\1."),
    (r"head\.cls_score\.", "head.classes."),
    (r"head\.bbox_pred\.", "head.offsets."),
)

BLUE_GREEN_RED = (103.53, 116.28, 123.675)  # PIXEL_MEAN
DEVIATION = (57.375, 57.12, 58.395)  # PIXEL_STD of its ResNeXts; the weights of its ResNets have absorbed it


def from_detectron2(
    source: Mapping[str, Tensor] | str | Path, classes: Sequence[str] | None = None, **options: Any
) -> Detector:
    """A detector with the weights and the arithmetic of detectron2's Faster R-CNN, RetinaNet, Mask R-CNN or Cascade
    (Mask) R-CNN with a ResNet (50, 101; ResNeXt) and an FPN.

    source: a `.pkl` file of its model zoo, a `.pth` file of its trainer, or the model's state dict.
    classes: the names of its classes in its order; left out, the 80 of COCO if it has 80, else "class 1" and so on.
    options: fields of `fpn.spec.Spec` or settings of the detector that differ from detectron2's configuration for the
        model zoo, such as `score=0.01`. The weights do not tell these: `stride_in_1x1` (STRIDE_IN_1X1), which is taken
        to be true for ResNets and false for ResNeXts; `mean`, `std` (PIXEL_MEAN, PIXEL_STD; here as fractions of 255,
        red first) and `bgr` (FORMAT), unless the file has them; anchors other than detectron2's.

    Raises CheckpointError where the file is none of these or has tensors that are missing, unknown or of another shape.
    """
    if not isinstance(source, Mapping):
        state = read_tensors(source)
        with naming(source):
            return from_detectron2(state, classes, **options)
    state = state_in(source, "detectron2's weights")
    pixels = {name: state.pop(name).flatten().tolist() for name in ("pixel_mean", "pixel_std") if name in state}
    anchors = [state.pop(name) for name in sorted(state) if "anchor_generator.cell_anchors." in name]
    named = translated(state, NAMES, PEER)
    spec = spec_of({name: value for name, (_, value) in named.items()}, classes)
    looks = look_of(spec.backbone, pixels.get("pixel_mean"), pixels.get("pixel_std"))
    spec = with_options(spec, {**anchor_options(anchors), **looks, **options})
    return assembled(spec, {name: (theirs, arranged(name, v, spec)) for name, (theirs, v) in named.items()}, PEER)


def spec_of(state: Mapping[str, Tensor], classes: Sequence[str] | None) -> Spec:
    """What the shapes of the weights (in our names) tell, and the rest from detectron2's Base-RCNN-FPN.yaml and
    Base-RetinaNet.yaml.
    """
    common = {
        "backbone": resnet_of(state, PEER),
        "backbone_norm": "batch" if any("num_batches_tracked" in name for name in state) else "frozen",
        "freeze": 2,
        "short": 800,
        "long": 1333,
        "width": size_of(state, "pyramid.lateral.5.weight", PEER),
    }
    if "head.classes.weight" in state:
        return retinanet(state, classes, common)
    cascade = "box_head.0.fc1.weight" in state
    head = "box_head.0." if cascade else "box_head."
    count = size_of(state, f"{head}classes.weight", PEER) - 1
    proposed = 2000 if cascade else 1000
    return Spec(
        f"{'cascade' if cascade else 'mask' if has_masks(state) else 'faster'}"
        f"{'_mask' if cascade and has_masks(state) else ''}_rcnn",
        names_for(count, classes),
        **common,
        hidden=size_of(state, f"{head}fc1.weight", PEER),
        rpn_convolutions=sum(name.startswith("rpn.shared.") and name.endswith("weight") for name in state),
        class_agnostic=size_of(state, f"{head}offsets.weight", PEER) == 4,
        settings={"sampling_ratio": 0, "proposals": (proposed, 1000)},
    )


def has_masks(state: Mapping[str, Tensor]) -> bool:
    return "masks.head.logits.weight" in state


def retinanet(state: Mapping[str, Tensor], classes: Sequence[str] | None, common: Mapping[str, Any]) -> Spec:
    anchors = size_of(state, "head.offsets.weight", PEER) // 4
    count = size_of(state, "head.classes.weight", PEER) // max(1, anchors)
    return Spec(
        "retinanet",
        names_for(count, classes),
        **common,
        extra="p5" if size_of(state, "pyramid.extra.convs.0.weight", PEER, 1) == common["width"] else "c5",
        tower_convolutions=sum(k.startswith("head.class_tower.") and state[k].ndim == 4 for k in state),
        settings={"clip_first": False},
    )


def look_of(backbone: str, mean: Sequence[float] | None, std: Sequence[float] | None) -> dict[str, Any]:
    """How the backbone wants its pixels, and where its strides are.

    detectron2's ResNets are the original ones of Caffe: pixels without a deviation, strides in the 1x1 convolutions.
    Blue comes first where the blue mean, which is ImageNet's lowest, does.
    """
    mean = BLUE_GREEN_RED if mean is None else mean
    std = (DEVIATION if "resnext" in backbone else (1.0, 1.0, 1.0)) if std is None else std
    bgr = mean[0] < mean[2]
    order = -1 if bgr else 1
    return {
        "mean": tuple(value / 255 for value in mean[::order]),
        "std": tuple(value / 255 for value in std[::order]),
        "bgr": bgr,
        "stride_in_1x1": set(std) == {1.0} and "resnext" not in backbone,
    }


def anchor_options(cells: Sequence[Tensor]) -> dict[str, Any]:
    """Sizes, ratios and scales of the anchors around the origin that older files hold for each level."""
    if not cells:
        return {}
    sides = [(cell[:, 2:] - cell[:, :2]).double() for cell in cells]  # width, height
    root = [side.prod(1).sqrt() for side in sides]
    ratios = (sides[0][:, 1] / sides[0][:, 0])[(root[0] - root[0][0]).abs() < 1e-3 * root[0][0]]
    return {
        "anchor_sizes": tuple(round(float(sizes[0]), 4) for sizes in root),
        "anchor_ratios": tuple(round(float(ratio), 5) for ratio in ratios),
        "anchor_scales": tuple(round(float(size / root[0][0]), 6) for size in root[0][:: len(ratios)]),
    }


def arranged(name: str, value: Tensor, spec: Spec) -> Tensor:
    """The outputs for the anchors of a cell in our order; detectron2's is (size, ratio)."""
    ratios, scales = (len(getattr(spec, key) or MODELS[spec.model][key]) for key in ("anchor_ratios", "anchor_scales"))
    by_anchor = name.startswith(("rpn.objectness.", "rpn.offsets.", "head.classes.", "head.offsets."))
    return ratio_first(value, scales, ratios) if by_anchor and len(value) % (scales * ratios) == 0 else value
