"""torchvision's Faster R-CNN -> fpn."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from fpn.build import Spec, from_spec
from fpn.errors import CheckpointError
from fpn.model.detector import Detector
from fpn.weights.checkpoint import fill
from fpn.weights.files import read_tensors

# torchvision's name -> ours; the first that matches applies.
NAMES = (
    (r"backbone\.body\.conv1\.", "backbone.stages.1.0."),
    (r"backbone\.body\.bn1\.", "backbone.stages.1.1."),
    (r"backbone\.body\.layer(\d)\.", lambda m: f"backbone.stages.{int(m[1]) + 1}."),
    # The ".0" before weight and bias came with torchvision 0.13; files from before lack it.
    (r"backbone\.fpn\.inner_blocks\.(\d)\.(?:0\.)?", lambda m: f"pyramid.lateral.{int(m[1]) + 2}."),
    (r"backbone\.fpn\.layer_blocks\.(\d)\.(?:0\.)?", lambda m: f"pyramid.output.{int(m[1]) + 2}."),
    (r"rpn\.head\.conv\.(?:0\.0\.)?", "rpn.shared.0."),
    (r"rpn\.head\.cls_logits\.", "rpn.objectness."),
    (r"rpn\.head\.bbox_pred\.", "rpn.offsets."),
    (r"roi_heads\.box_head\.fc6\.", "box_head.fc1."),
    (r"roi_heads\.box_head\.fc7\.", "box_head.fc2."),
    (r"roi_heads\.box_predictor\.cls_score\.", "box_head.classes."),
    (r"roi_heads\.box_predictor\.bbox_pred\.", "box_head.offsets."),
)


def our_name(name: str) -> str | None:
    """Our name for one of torchvision's tensors, or None if we have no such thing."""
    for pattern, ours in NAMES:
        renamed, hits = re.subn(f"^{pattern}", ours, name)
        if hits:
            return renamed
    return None


def from_torchvision(
    source: Mapping[str, Tensor] | nn.Module | str | Path,
    classes: Sequence[str] | None = None,
    norm_eps: float | None = None,
    backbone: str = "resnet50",
) -> Detector:
    """A detector with the weights and the arithmetic of torchvision's `fasterrcnn_resnet50_fpn`.

    source: its state dict, the model itself, or a file with the state dict.
    classes: the names of its classes without background, in its order; left out, the 90 of COCO with torchvision's gaps
        when the number fits, else "class 1" and so on.
    norm_eps: the epsilon of its batch norms, which a state dict does not hold. Left out, it is read from a model given;
        for a state dict it is 0.0, which is what torchvision sets with its published COCO weights, where these have
        the form of those (91 outputs, frozen batch norm), else 1e-5.

    torchvision's habits come along: anchors rounded to whole pixels, strides rounded down, RoIAlign without half-pixel
    correction. Raises CheckpointError where tensors are missing, unknown or of another shape.
    """
    state = source.state_dict() if isinstance(source, nn.Module) else source
    state = read_tensors(state) if isinstance(state, str | Path) else dict(state)
    key = "roi_heads.box_predictor.cls_score.weight"
    if key not in state:
        raise CheckpointError(f"not torchvision's Faster R-CNN with FPN: {key} is missing")
    count = len(state[key]) - 1
    names = tuple(classes) if classes is not None else names_for(count)
    if len(names) != count:
        raise CheckpointError(f"{len(names)} class names for weights with {count} classes (background not counted)")
    unknown = [name for name in state if our_name(name) is None]
    if unknown:
        raise CheckpointError(
            f"not torchvision's Faster R-CNN with a ResNet: {unknown[0]} and {len(unknown)} in all are unknown"
        )
    frozen = not any("num_batches_tracked" in name for name in state)
    detector = from_spec(
        Spec(
            "faster_rcnn",
            names,
            backbone,
            freeze=2,
            backbone_norm="frozen" if frozen else "batch",
            whole_pixels=True,
            floor_stride=True,
            norm_eps=eps_of(source, count, frozen) if norm_eps is None else norm_eps,
            settings={"pooling": "align_v1", "rpn_beta": 1 / 9, "box_beta": 1 / 9},
        )
    )
    fill(detector, {str(our_name(name)): shift(name, value) for name, value in state.items()}, "torchvision's weights")
    return detector.eval()


def shift(name: str, value: Tensor) -> Tensor:
    """torchvision's class 0 is background; ours is the last, and has no box."""
    if "cls_score" in name:
        return value.roll(-1, 0)
    return value[4:] if "roi_heads.box_predictor.bbox_pred" in name else value


def names_for(count: int) -> tuple[str, ...]:
    from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

    coco = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"][1:]
    if count != len(coco):
        return tuple(f"class {i}" for i in range(1, count + 1))
    return tuple(f"N/A {i}" if name == "N/A" else name for i, name in enumerate(coco, 1))


def eps_of(source: object, count: int, frozen: bool) -> float:
    if isinstance(source, nn.Module):
        return next(m.eps for m in source.modules() if isinstance(m, nn.BatchNorm2d | FrozenBatchNorm2d))
    return 0.0 if frozen and count == 90 else 1e-5
