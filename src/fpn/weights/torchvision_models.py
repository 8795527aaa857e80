"""Which of torchvision's models some weights belong to, as options for `fpn.build`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.models.detection.faster_rcnn import FasterRCNN
from torchvision.ops import FrozenBatchNorm2d

from fpn.errors import CheckpointError
from fpn.model.anchors import cell_anchors
from fpn.model.backbone import SPLIT_MOBILENET

State = Mapping[str, Tensor]

# What torchvision does otherwise than we do, whatever the size of its model. Of these its state dicts say nothing.
HABITS = {"whole_pixels": True, "floor_stride": True, "anchor_offset": 0.0}
TWO_STAGES = {**HABITS, "pooling": "align_v1", "rpn_beta": 1 / 9, "box_beta": 1 / 9}
MODELS: dict[str, dict[str, Any]] = {
    "faster_rcnn": TWO_STAGES,
    "mask_rcnn": {**TWO_STAGES, "mask_binary": False},
    "retinanet": {
        **HABITS,
        "anchor_scales": (1.0, 2 ** (1 / 3), 2 ** (2 / 3)),
        "per_image": True,
        "max_detections": 300,
    },
    "fcos": {**HABITS, "distances": "relu"},
}
FIRST_SIZES = {"faster_rcnn": 32.0, "mask_rcnn": 32.0, "retinanet": 32.0, "fcos": 8.0}  # of anchors, lowest level
MOBILENET = {"anchor_scales": (1.0, 2.0, 4.0, 8.0, 16.0), "pooled": (5, 5), "rpn_score": 0.05, "freeze": 3}
SMALL = {"short": 320, "long": 640, "proposals_per_level": (2000, 150), "proposals": (2000, 150)}

# (blocks, blocks have a third convolution, shape of their second one in the first stage) -> the ResNet.
DEPTHS = {
    (8, False, (64, 64)): "resnet18",
    (16, False, (64, 64)): "resnet34",
    (16, True, (64, 64)): "resnet50",
    (33, True, (64, 64)): "resnet101",
    (50, True, (64, 64)): "resnet152",
    (16, True, (128, 4)): "resnext50_32x4d",
    (33, True, (256, 8)): "resnext101_32x8d",
}


def described(state: State, where: str) -> dict[str, Any]:
    """What the names and shapes of torchvision's tensors say of its model, and what always comes with it."""
    model = model_of(state, where)
    backbone = backbone_of(state, where)
    top = 6 if backbone == SPLIT_MOBILENET else 5
    lateral = "backbone.fpn.inner_blocks.{}.0.weight"
    own = max(1, count(state, lateral))
    p6 = "backbone.fpn.extra_blocks.p6.weight"
    levels = (max(2, top + 1 - own), top + (2 if p6 in state else 1))
    width = size(state, lateral.format(0), 256)
    found = {
        "backbone": backbone,
        "model": model,
        "width": width,
        "levels": levels,
        "extra": "pool" if p6 not in state else "p5" if size(state, p6, width, 1) == width else "c5",
        "norm": norm_at(state, "backbone.fpn.inner_blocks.0.1"),
        "freeze": 2,
        "backbone_norm": "batch" if any(n.endswith("num_batches_tracked") for n in body(state)) else "frozen",
        **MODELS[model],
    }
    sizes = tuple(FIRST_SIZES[model] * 2**n for n in range(levels[1] - levels[0] + 1))
    if backbone == SPLIT_MOBILENET:
        found |= MOBILENET if model in ("faster_rcnn", "mask_rcnn") else {}
        sizes = tuple(FIRST_SIZES[model] for _ in sizes)
    found["anchor_sizes"] = sizes
    return {**found, **head_of(state, model)}


def head_of(state: State, model: str) -> dict[str, Any]:
    """The options of the heads."""
    if model in ("retinanet", "fcos"):
        norm = (
            "group" if f"head.classification_head.conv.{'1' if model == 'fcos' else '0.1'}.weight" in state else "none"
        )
        return {"tower_norm": norm} | ({"box_loss": "giou"} if model == "retinanet" and norm == "group" else {})
    convolutions = count(state, "roi_heads.box_head.{}.0.weight")
    fc = f"roi_heads.box_head.{convolutions + 1}.weight" if convolutions else "roi_heads.box_head.fc6.weight"
    found: dict[str, Any] = {
        "hidden": size(state, fc, 1024),
        "rpn_convolutions": max(1, count(state, "rpn.head.conv.{}.0.weight")),
    }
    if convolutions:
        found |= {"box_convolutions": convolutions, "box_norm": norm_at(state, "roi_heads.box_head.0.1")}
    if model == "mask_rcnn":
        found["mask_norm"] = norm_at(state, "roi_heads.mask_head.0.1")
    return found


def model_of(state: State, where: str) -> str:
    if not any("keypoint" in name for name in state) and any(name.startswith("backbone.fpn.") for name in state):
        for model, sign in (
            ("fcos", "head.regression_head.bbox_ctrness.weight"),
            ("retinanet", "head.classification_head.cls_logits.weight"),
            ("mask_rcnn", "roi_heads.mask_predictor.mask_fcn_logits.weight"),
            ("faster_rcnn", "roi_heads.box_predictor.cls_score.weight"),
        ):
            if sign in state:
                return model
    raise CheckpointError(
        f"{where}: not torchvision's Faster R-CNN, Mask R-CNN, RetinaNet or FCOS with a feature pyramid; its tensors "
        f"are named {', '.join(list(state)[:3])} ..."
    )


def backbone_of(state: State, where: str) -> str:
    """The backbone, by the number and the shape of its blocks."""
    if "backbone.body.0.0.weight" in state:
        return SPLIT_MOBILENET
    blocks = {tuple(name.split(".")[2:4]) for name in body(state) if ".layer" in name}
    second = "backbone.body.layer1.0.conv2.weight"
    shape = (size(state, second, 0), size(state, second, 0, 1))
    found = DEPTHS.get((len(blocks), "backbone.body.layer1.0.conv3.weight" in state, shape))
    if found is None:
        raise CheckpointError(f"{where}: its backbone is none of {', '.join(DEPTHS.values())} and MobileNetV3")
    return found


def body(state: State) -> list[str]:
    return [name for name in state if name.startswith("backbone.body.")]


def size(state: State, name: str, otherwise: int, axis: int = 0) -> int:
    """The size of a tensor; `otherwise` where it is missing or not like this at all, which is told later."""
    shape = tuple(state[name].shape) if name in state else ()
    return shape[axis] or otherwise if len(shape) > axis else otherwise


def count(state: State, pattern: str) -> int:
    """How many tensors there are of names that differ in their number, from 0 up."""
    number = 0
    while pattern.format(number) in state:
        number += 1
    return number


def norm_at(state: State, prefix: str) -> str:
    if f"{prefix}.weight" not in state:
        return "none"
    return "batch" if f"{prefix}.running_mean" in state else "group"


def class_outputs(state: State, model: str) -> tuple[int, int]:
    """Anchors of a cell that have class outputs of their own, and the number of these, background among them."""
    if model in ("faster_rcnn", "mask_rcnn"):
        return 1, size(state, "roi_heads.box_predictor.cls_score.weight", 2)
    per_cell = max(1, size(state, "head.regression_head.bbox_reg.weight", 4) // 4)
    return per_cell, max(2, size(state, "head.classification_head.cls_logits.weight", 2) // per_cell)


def eps_of(state: State, model: str, outputs: int) -> float:
    """torchvision's own for its published weights of this form, else what its layers have."""
    frozen = not any(name.endswith("num_batches_tracked") for name in state)
    resnet = "backbone.body.conv1.weight" in state
    return 0.0 if frozen and resnet and outputs == 91 and model != "fcos" else 1e-5


def settings_of(model: nn.Module) -> dict[str, Any]:
    """What torchvision's model itself says of its numbers, as options for `fpn.build`; for other modules nothing."""
    if isinstance(model, FasterRCNN):
        found = two_stage_settings(model)
    elif isinstance(model, RetinaNet | FCOS):
        found = {
            "score": model.score_thresh,
            "box_nms": model.nms_thresh,
            "max_detections": model.detections_per_img,
            "candidates": model.topk_candidates,
            **anchors_of(model.anchor_generator),
        }
        if isinstance(model, FCOS):
            found["radius"] = float(model.center_sampling_radius)
        else:
            matcher = model.proposal_matcher
            found |= {"positive": matcher.high_threshold, "negative": matcher.low_threshold}
    else:
        return {}
    images: Any = model.transform
    norms = (m.eps for m in model.backbone.modules() if isinstance(m, nn.BatchNorm2d | FrozenBatchNorm2d))
    return {
        **found,
        "short": images.min_size[-1],
        "long": images.max_size,
        "mean": tuple(images.image_mean),
        "std": tuple(images.image_std),
        "norm_eps": next(norms, 1e-5),
    }


def two_stage_settings(model: FasterRCNN) -> dict[str, Any]:
    rpn: Any = model.rpn
    regions: Any = model.roi_heads
    pooler, masks = regions.box_roi_pool, regions.mask_roi_pool
    return {
        **({"mask_pooled_size": masks.output_size[0]} if masks is not None else {}),
        **anchors_of(rpn.anchor_generator),
        "rpn_positive": rpn.proposal_matcher.high_threshold,
        "rpn_negative": rpn.proposal_matcher.low_threshold,
        "rpn_examples": rpn.fg_bg_sampler.batch_size_per_image,
        "rpn_positive_fraction": rpn.fg_bg_sampler.positive_fraction,
        "rpn_nms": rpn.nms_thresh,
        "rpn_score": rpn.score_thresh,
        "proposals_per_level": (rpn._pre_nms_top_n["training"], rpn._pre_nms_top_n["testing"]),
        "proposals": (rpn._post_nms_top_n["training"], rpn._post_nms_top_n["testing"]),
        "pooled_size": pooler.output_size[0],
        "canonical": float(pooler.canonical_scale),
        "sampling_ratio": pooler.sampling_ratio,
        "box_positive": regions.proposal_matcher.high_threshold,
        "box_examples": regions.fg_bg_sampler.batch_size_per_image,
        "box_positive_fraction": regions.fg_bg_sampler.positive_fraction,
        "box_weights": tuple(regions.box_coder.weights),
        "box_nms": regions.nms_thresh,
        "score": regions.score_thresh,
        "max_detections": regions.detections_per_img,
    }


def anchors_of(generator: Any) -> dict[str, Any]:
    """The sizes, ratios and scales of torchvision's anchors. Raises CheckpointError where no scales give them."""
    first, ratios = generator.sizes[0], tuple(map(float, generator.aspect_ratios[0]))
    sizes = tuple(float(level[0]) for level in generator.sizes)
    # RetinaNet's sizes are whole numbers, which 2^(1/3) of a size is not.
    for scales in (tuple(size / first[0] for size in first), MODELS["retinanet"]["anchor_scales"]):
        ours = [cell_anchors(size, ratios, True, scales) for size in sizes]
        if all(map(torch.equal, ours, (cells.float().cpu() for cells in generator.cell_anchors))):
            return {"anchor_sizes": sizes, "anchor_ratios": ratios, "anchor_scales": scales}
    raise CheckpointError(
        f"torchvision's model has anchors of sizes {generator.sizes} and ratios {generator.aspect_ratios}: fpn has the "
        "same ratios, and the same scales of one whole size, on every level"
    )
