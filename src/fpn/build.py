"""From plain options to a detector: the only place that knows which parts fit together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fpn.errors import OptionError
from fpn.model.atss import ATSS
from fpn.model.backbone import OWN, Backbone, build_backbone, default_freeze, default_norm, prepare
from fpn.model.bifpn import BiFPN
from fpn.model.box_head import ConvHead, StageHead, TwoLayerHead
from fpn.model.cascade_rcnn import CascadeRCNN
from fpn.model.dense_head import DenseHead
from fpn.model.detector import Detector
from fpn.model.dry_run import dry_run
from fpn.model.fast_rcnn import FastRCNN
from fpn.model.faster_rcnn import FasterRCNN
from fpn.model.fcos import FCOS
from fpn.model.mask_head import MaskBranch, MaskHead
from fpn.model.mask_proposals import MaskProposals, WindowHead
from fpn.model.nas_fpn import NASFPN
from fpn.model.pafpn import PAFPN
from fpn.model.pyramid import FPN, SingleLevel, own_levels
from fpn.model.region_proposals import RPN
from fpn.model.retinanet import RetinaNet
from fpn.model.rpn import RpnHead, SeparateRpnHeads
from fpn.model.timm_backbone import TimmLevels
from fpn.model.vit import SimpleNeck, SimplePyramid
from fpn.spec import MODELS, NECKS, Spec, anchors_of, as_tuple, check, default_classes, resolved


def build(
    model: str = "faster_rcnn",
    *,
    backbone: str | nn.Module = "resnet50",
    classes: Sequence[str] | None = None,
    weights: str | Path = "imagenet",
    **options: Any,
) -> Detector:
    """A detector for the given class names; models that only propose regions take none.

    model: one of MODELS. backbone: one of `fpn.model.backbone.BACKBONES`, "timm:NAME", or a module that turns images
    (B, 3, H, W) into {level: map of stride 2**level}; it is taken as it is, and `weights` does not count.
    weights: the backbone's: "imagenet" (downloaded by torchvision or timm), "none", or a file with the state dict of
    torchvision's or timm's classification model. options: any field of `Spec`, such as `short=512`, or any setting of
    the detector's class, such as `score=0.01` or `max_detections=300`.

    Raises OptionError for values that cannot work and CheckpointError for weights that do not fit.
    """
    own = {field.name for field in fields(Spec)} - {"settings"}
    chosen = {name: as_tuple(value) for name, value in options.items()}
    settings = {name: value for name, value in chosen.items() if name not in own}
    given = {name: value for name, value in chosen.items() if name in own}
    module = backbone if isinstance(backbone, nn.Module) else None
    name = backbone if isinstance(backbone, str) else OWN + type(backbone).__name__
    if classes is None:
        classes = default_classes(model)
    spec = Spec(model=model, backbone=name, classes=tuple(classes), settings=settings, **given)
    return from_spec(spec, weights, module)


def from_spec(spec: Spec, weights: str | Path = "none", module: nn.Module | None = None) -> Detector:
    """The detector that `spec` describes; its own `spec` has nothing left open.

    weights: the backbone's. module: the backbone itself, where it is the user's own.
    """
    check(spec)
    pretrained = str(weights) != "none" and module is None
    spec = replace(
        spec,
        freeze=default_freeze(pretrained) if spec.freeze is None else spec.freeze,
        backbone_norm=spec.backbone_norm or default_norm(pretrained),
    )
    if module is None:
        backbone = build_backbone(
            spec.backbone, weights, spec.freeze, spec.backbone_norm, spec.norm_eps, spec.stride_in_1x1
        )
        channels = backbone.channels
    else:
        channels = dry_run(module, type(module).__name__)
        backbone = module
        if not hasattr(module, "channels"):  # one that there is has been compared with what the module gives
            module.channels = channels  # pyright: ignore[reportArgumentType]
        prepare(backbone, spec.freeze or 0, spec.backbone_norm or "batch", spec.norm_eps)
    spec = resolved(replace(spec, settings={**pixels_of(backbone), **spec.settings}), channels)
    assert spec.levels is not None
    own_levels(channels, tuple(range(spec.levels[0], spec.levels[1] + 1)))
    check_stages(spec, backbone)
    if isinstance(backbone, Backbone | TimmLevels | SimplePyramid):
        # The finest level is made from all above it, and a head from the stage that makes C5.
        top = max(channels) if spec.finest else 5 if spec.box_head == "stage" else spec.levels[1]
        backbone.keep(range(spec.levels[0], top + 1))
    detector = assemble(spec, backbone, neck_of(spec, channels))
    detector.spec = spec
    # Convolutions are 1.5 to 2 times as fast on channels-last tensors, on CPUs with AVX-512 and GPUs with tensor cores.
    return detector.to(memory_format=torch.channels_last)


def pixels_of(backbone: nn.Module) -> dict[str, tuple[float, ...]]:
    """The mean and deviation of the pixels that a backbone wants, where it says so by three numbers each."""
    found = {name: getattr(backbone, name, None) for name in ("mean", "std")}
    return {name: tuple(map(float, v)) for name, v in found.items() if isinstance(v, tuple | list) and len(v) == 3}


def neck_of(spec: Spec, channels: Mapping[int, int]) -> nn.Module:
    """The pyramid of a resolved spec on a backbone with these channels."""
    levels, extra, norm, relu, normed = spec.levels, spec.extra, spec.norm, spec.extra_relu, spec.extra_norm
    assert levels is not None and extra is not None and norm is not None and spec.width is not None
    match spec.neck:
        case "fpn":
            parts = spec.top_down, spec.lateral, spec.finest
            return FPN(channels, spec.width, levels, extra, norm, spec.fuse, relu, normed, *parts)
        case "none":
            return SingleLevel(channels, levels[0])
        case "pafpn":
            return PAFPN(channels, spec.width, levels, extra, norm, spec.fuse, relu, normed)
        case "bifpn":
            return BiFPN(channels, spec.width, levels, extra, norm, spec.repeats or 1, relu, normed)
        case "nas_fpn":
            return NASFPN(channels, spec.width, levels, extra, norm, spec.repeats or 1, relu, normed)
        case "simple":
            return SimpleNeck(channels, spec.width, levels, extra, norm, relu, normed)
    raise OptionError(f"unknown neck {spec.neck!r}; there are {', '.join(NECKS)}")


def assemble(spec: Spec, backbone: nn.Module, pyramid: nn.Module) -> Detector:
    """The detector of a resolved spec around its backbone and pyramid."""
    anchors, classes, settings = anchors_of(spec), spec.classes, spec.settings
    assert spec.width and spec.hidden
    match spec.model:
        case "rpn":
            rpn = rpn_head_of(spec)
            return RPN(backbone, pyramid, anchors, rpn, classes, **settings)
        case "fast_rcnn":
            return FastRCNN(backbone, pyramid, box_head_of(spec, backbone), classes, **settings)
        case "faster_rcnn" | "mask_rcnn":
            rpn = rpn_head_of(spec)
            head = box_head_of(spec, backbone)
            return FasterRCNN(backbone, pyramid, anchors, rpn, head, classes, masks_of(spec), **settings)
        case "cascade_rcnn" | "cascade_mask_rcnn":
            rpn = rpn_head_of(spec)
            heads = nn.ModuleList(box_head_of(spec, backbone) for _ in settings["box_positive"])
            return CascadeRCNN(backbone, pyramid, anchors, rpn, heads, classes, masks_of(spec), **settings)
        case "retinanet":
            return RetinaNet(backbone, pyramid, anchors, dense_head_of(spec), classes, **settings)
        case "fcos":
            return FCOS(backbone, pyramid, anchors, dense_head_of(spec), classes, **settings)
        case "atss":
            return ATSS(backbone, pyramid, anchors, dense_head_of(spec), classes, **settings)
        case "mask_proposals":
            size, windows = settings["mask_size"], settings["windows"]
            heads = nn.ModuleList(WindowHead(spec.width, window, spec.hidden, size) for window in windows)
            return MaskProposals(backbone, pyramid, anchors, heads, classes, **settings)
    raise OptionError(f"unknown model {spec.model!r}; there are {', '.join(MODELS)}")


def dense_head_of(spec: Spec) -> DenseHead:
    """The head of a resolved spec's one-stage model."""
    assert spec.levels and spec.tower_norm and spec.width
    retinanet = spec.model == "retinanet"
    return DenseHead(
        spec.width,
        len(spec.classes),
        tuple(range(spec.levels[0], spec.levels[1] + 1)),
        anchors_of(spec).per_cell,
        spec.tower_convolutions,
        spec.tower_norm,
        bias=not retinanet,
        centerness=not retinanet,
        scaled=spec.model == "atss" or spec.settings.get("distances") == "exp",
    )


def rpn_head_of(spec: Spec) -> nn.Module:
    """The head or heads of a resolved spec's RPN."""
    assert spec.levels and spec.width
    per_cell = anchors_of(spec).per_cell
    if spec.rpn_shared:
        return RpnHead(spec.width, per_cell, spec.rpn_convolutions)
    levels = range(spec.levels[0], spec.levels[1] + 1)
    return SeparateRpnHeads(levels, spec.width, per_cell, spec.rpn_convolutions)


def box_head_of(spec: Spec, backbone: nn.Module) -> nn.Module:
    """A box head of a resolved spec; with the stage of the backbone that it takes, if it takes one."""
    assert spec.width and spec.hidden
    size, classes, agnostic = spec.settings["pooled_size"], len(spec.classes), bool(spec.class_agnostic)
    if spec.box_head == "stage":
        assert isinstance(backbone, Backbone)
        width = backbone.channels[5]
        return StageHead(backbone.give_up(5), width, classes, agnostic)
    if spec.box_convolutions:
        return ConvHead(spec.width, size, classes, spec.hidden, spec.box_convolutions, spec.box_norm, agnostic)
    return TwoLayerHead(spec.width * size**2, classes, spec.hidden, agnostic)


def masks_of(spec: Spec) -> MaskBranch | None:
    """The mask branch of a resolved spec, if its model has one."""
    if spec.model not in ("mask_rcnn", "cascade_mask_rcnn"):
        return None
    assert spec.width
    head = MaskHead(spec.width, len(spec.classes), spec.width, norm=spec.mask_norm)
    return MaskBranch(head, spec.mask_pooled_size, spec.mask_binary, spec.settings["pooling"] != "align_v1")


def check_stages(spec: Spec, backbone: nn.Module) -> None:
    """Raises OptionError where a spec needs stages that run one after another, and the backbone is not made of them."""
    cut = isinstance(backbone, Backbone) and not spec.backbone.startswith(OWN)
    if spec.box_head == "stage" and not cut:
        raise OptionError(f"box_head 'stage': the stage 5 of {spec.backbone} cannot be told apart; use box_head layers")
    if not spec.lateral and isinstance(backbone, SimplePyramid):
        raise OptionError(f"lateral False: the levels of {spec.backbone} do not make each other, most would not learn")
