"""From plain options to a detector: the only place that knows which parts fit together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
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

    short and long: images are resized so that their shorter side is `short` and the longer at most `long` pixels.
    """

    model: str = "faster_rcnn"
    backbone: str = "resnet50"
    classes: tuple[str, ...] = ()
    preset: str = "modern"
    short: int = 800
    long: int = 1333
    freeze: int | None = None
    backbone_norm: str | None = None
    norm_eps: float | None = None  # of the backbone's batch norms; None leaves torchvision's own
    width: int = 256
    norm: str = "none"
    fuse: str = "sum"
    hidden: int = 1024
    anchor_sizes: tuple[float, ...] = (32.0, 64.0, 128.0, 256.0, 512.0)
    anchor_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    whole_pixels: bool = False
    floor_stride: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)  # keyword arguments of the detector's class

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Spec:
        """The inverse of `as_dict`, also after JSON has turned tuples into lists."""
        return cls(**{key: as_tuple(value) for key, value in values.items()})


def as_tuple(value: Any) -> Any:
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
    preset: str = "modern",
    short: int = 800,
    long: int | None = None,
    freeze: int | None = None,
    backbone_norm: str | None = None,
    width: int = 256,
    norm: str = "none",
    fuse: str = "sum",
    hidden: int = 1024,
    anchor_sizes: Sequence[float] = (32, 64, 128, 256, 512),
    anchor_ratios: Sequence[float] = (0.5, 1.0, 2.0),
    **settings: Any,
) -> FasterRCNN:
    """A detector for the given class names.

    model: "faster_rcnn". backbone, weights, freeze, backbone_norm: see `fpn.model.backbone.build_backbone`.
    preset: "modern", or "paper" for the settings of Lin et al. 2017 where later practice differs.
    short, long: sides that images are resized to; `long` follows `short` at 1333 : 800 when left out.
    width, norm, fuse: see `fpn.model.pyramid.FPN`. hidden: width of the box head's two layers.
    anchor_sizes: one for each of P2..P6, in pixels of the resized image; anchor_ratios: height / width.
    settings: any keyword of the detector's class, such as `score=0.01` or `max_detections=300`.

    Raises OptionError for values that cannot work and CheckpointError for weights that do not fit.
    """
    check_sides(short, long)
    spec = Spec(
        model=model,
        backbone=backbone,
        classes=tuple(classes),
        preset=preset,
        short=short,
        long=long or round(short * 1333 / 800),
        freeze=freeze,
        backbone_norm=backbone_norm,
        width=width,
        norm=norm,
        fuse=fuse,
        hidden=hidden,
        anchor_sizes=tuple(float(size) for size in anchor_sizes),
        anchor_ratios=tuple(float(ratio) for ratio in anchor_ratios),
        settings=dict(settings),
    )
    return from_spec(spec, weights)


def check_sides(short: int, long: int | None) -> None:
    if short < 32 or (long is not None and long < short):
        raise OptionError(f"image sides short {short}, long {long}: short must be at least 32, long at least short")


def from_spec(spec: Spec, weights: str | Path = "none") -> FasterRCNN:
    """The detector that `spec` describes; `weights` are the backbone's."""
    if spec.model not in MODELS:
        raise OptionError(f"unknown model {spec.model!r}; there are {', '.join(MODELS)}")
    if spec.preset not in PRESETS:
        raise OptionError(f"unknown preset {spec.preset!r}; there are {', '.join(PRESETS)}")
    if not spec.classes or len(set(spec.classes)) != len(spec.classes):
        raise OptionError(f"classes {list(spec.classes)}: at least one name is needed, and none twice")
    if len(spec.anchor_sizes) != 5:
        raise OptionError(f"{len(spec.anchor_sizes)} anchor sizes for the 5 levels P2..P6")
    backbone = build_backbone(spec.backbone, weights, spec.freeze, spec.backbone_norm, spec.norm_eps)
    settings = {**PRESETS[spec.preset], **spec.settings}
    try:
        detector = FasterRCNN(
            backbone,
            FPN(backbone.channels, spec.width, spec.norm, spec.fuse),
            Anchors(
                dict(zip(range(2, 7), spec.anchor_sizes, strict=True)),
                spec.anchor_ratios,
                spec.whole_pixels,
                spec.floor_stride,
            ),
            RpnHead(spec.width, len(spec.anchor_ratios)),
            TwoLayerHead(spec.width * settings.get("pooled_size", 7) ** 2, len(spec.classes), spec.hidden),
            spec.classes,
            **settings,
        )
    except TypeError as error:
        if "unexpected keyword" in str(error):
            raise OptionError(f"{spec.model} has no setting {str(error).split()[-1]}") from error
        raise
    # Spelt out, because these two follow from whether there were weights, which a checkpoint cannot tell.
    pretrained = str(weights) != "none"
    norm, freeze = spec.backbone_norm or default_norm(pretrained), spec.freeze
    detector.spec = replace(spec, backbone_norm=norm, freeze=default_freeze(pretrained) if freeze is None else freeze)
    # Convolutions are 1.5 to 2 times as fast on channels-last tensors, on CPUs with AVX-512 and GPUs with tensor cores.
    return detector.to(memory_format=torch.channels_last)
