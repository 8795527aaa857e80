"""From plain options to a detector: the only place that knows which parts fit together."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from fpn.errors import OptionError
from fpn.model.anchors import Anchors
from fpn.model.backbone import build_backbone, default_freeze, default_norm
from fpn.model.box_head import TwoLayerHead
from fpn.model.faster_rcnn import FasterRCNN
from fpn.model.pyramid import FPN
from fpn.model.rpn import RpnHead

MODELS = ("faster_rcnn",)

# What the paper does and later practice changed; everything else is the defaults of FasterRCNN.
PAPER = {"pooling": "pool", "rpn_beta": 1 / 9, "box_beta": 1.0}
PRESETS: dict[str, dict[str, Any]] = {"modern": {}, "paper": PAPER}


@dataclass(frozen=True)
class Spec:
    """Everything but the weights that is needed to build a detector again; stored in every checkpoint.

    backbone, freeze, backbone_norm, norm_eps: see `fpn.model.backbone.build_backbone`.
    preset: "modern", or "paper" for the settings of Lin et al. 2017 where later practice differs.
    short, long: images are resized so that their shorter side is `short` and the longer at most `long` pixels; `long`
        follows `short` at 1333 : 800 when left out.
    width, norm, fuse: see `fpn.model.pyramid.FPN`. hidden: width of the box head's two layers.
    anchor_sizes: one for each of P2..P6, in pixels of the resized image; anchor_ratios: height / width.
    whole_pixels, floor_stride: see `fpn.model.anchors.Anchors`.
    settings: keyword arguments of the detector's class; once it is built, all of them.
    """

    model: str
    classes: tuple[str, ...]
    backbone: str = "resnet50"
    preset: str = "modern"
    short: int = 800
    long: int | None = None
    freeze: int | None = None
    backbone_norm: str | None = None
    norm_eps: float | None = None
    width: int = 256
    norm: str = "none"
    fuse: str = "sum"
    hidden: int = 1024
    anchor_sizes: tuple[float, ...] = (32.0, 64.0, 128.0, 256.0, 512.0)
    anchor_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    whole_pixels: bool = False
    floor_stride: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def sides(self) -> tuple[int, int]:
        """The shorter side that images are resized to, and the most that the longer may have."""
        return self.short, self.long or round(self.short * 1333 / 800)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Spec:
        """The inverse of `as_dict`, also after JSON has turned tuples into lists."""
        return cls(**{key: as_tuple(value) for key, value in values.items()})


def as_tuple(value: Any) -> Any:
    """Lists as tuples, also inside mappings: what JSON and people write, in the form that is compared and hashed."""
    if isinstance(value, list):
        return tuple(value)
    if isinstance(value, dict):
        return {key: as_tuple(entry) for key, entry in value.items()}
    return value


def build(
    model: str = "faster_rcnn",
    *,
    backbone: str = "resnet50",
    classes: Sequence[str],
    weights: str | Path = "imagenet",
    **options: Any,
) -> FasterRCNN:
    """A detector for the given class names.

    model: "faster_rcnn". backbone: see `fpn.model.backbone.BACKBONES`. weights: the backbone's: "imagenet" (downloaded
    by torchvision), "none", or a file with the state dict of torchvision's classification model. options: any field of
    `Spec`, such as `short=512`, or any setting of the detector's class, such as `score=0.01` or `max_detections=300`.

    Raises OptionError for values that cannot work and CheckpointError for weights that do not fit.
    """
    own = {field.name for field in fields(Spec)} - {"settings"}
    chosen = {name: as_tuple(value) for name, value in options.items()}
    settings = {name: value for name, value in chosen.items() if name not in own}
    given = {name: value for name, value in chosen.items() if name in own}
    return from_spec(Spec(model=model, backbone=backbone, classes=tuple(classes), settings=settings, **given), weights)


def from_spec(spec: Spec, weights: str | Path = "none") -> FasterRCNN:
    """The detector that `spec` describes; `weights` are the backbone's. Its own `spec` has nothing left open."""
    check(spec)
    pretrained = str(weights) != "none"
    spec = replace(
        spec,
        freeze=default_freeze(pretrained) if spec.freeze is None else spec.freeze,
        backbone_norm=spec.backbone_norm or default_norm(pretrained),
        settings=all_settings(spec),
    )
    backbone = build_backbone(spec.backbone, weights, spec.freeze, spec.backbone_norm, spec.norm_eps)
    detector = FasterRCNN(
        backbone,
        FPN(backbone.channels, spec.width, spec.norm, spec.fuse),
        anchors_of(spec),
        RpnHead(spec.width, len(spec.anchor_ratios)),
        TwoLayerHead(spec.width * spec.settings["pooled_size"] ** 2, len(spec.classes), spec.hidden),
        spec.classes,
        **spec.settings,
    )
    detector.spec = spec
    # Convolutions are 1.5 to 2 times as fast on channels-last tensors, on CPUs with AVX-512 and GPUs with tensor cores.
    return detector.to(memory_format=torch.channels_last)


def anchors_of(spec: Spec) -> Anchors:
    sizes = dict(zip(range(2, 7), spec.anchor_sizes, strict=True))
    return Anchors(sizes, spec.anchor_ratios, spec.whole_pixels, spec.floor_stride)


def all_settings(spec: Spec) -> dict[str, Any]:
    """Every setting of the detector's class: its defaults, then the preset's, then those of the spec.

    A checkpoint keeps them all, so that a default that changes in a later version does not change the detector.
    """
    parameters = inspect.signature(FasterRCNN).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    unknown = sorted(spec.settings.keys() - defaults.keys())
    if unknown:
        raise OptionError(f"{spec.model} has no option {', '.join(unknown)}")
    return {**defaults, **PRESETS[spec.preset], **spec.settings}


def check(spec: Spec) -> None:
    """Raises OptionError for a spec that no detector can be built from."""
    if spec.model not in MODELS:
        raise OptionError(f"unknown model {spec.model!r}; there are {', '.join(MODELS)}")
    if spec.preset not in PRESETS:
        raise OptionError(f"unknown preset {spec.preset!r}; there are {', '.join(PRESETS)}")
    if not spec.classes or len(set(spec.classes)) != len(spec.classes):
        raise OptionError(f"classes {list(spec.classes)}: at least one name is needed, and none twice")
    if spec.short < 32 or (spec.long is not None and spec.long < spec.short):
        raise OptionError(f"sides short {spec.short}, long {spec.long}: short must be at least 32, long at least short")
    if spec.width < 1 or spec.hidden < 1:
        raise OptionError(f"width {spec.width}, hidden {spec.hidden}: both must be 1 or more")
    if len(spec.anchor_sizes) != 5 or min(spec.anchor_sizes) <= 0:
        raise OptionError(f"anchor sizes {list(spec.anchor_sizes)}: the levels P2..P6 need five, all above 0")
    if not spec.anchor_ratios or min(spec.anchor_ratios) <= 0:
        raise OptionError(f"anchor ratios {list(spec.anchor_ratios)}: at least one is needed, all above 0")
