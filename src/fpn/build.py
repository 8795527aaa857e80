"""From plain options to a detector: the only place that knows which parts fit together."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fpn.errors import OptionError
from fpn.model.anchors import Anchors
from fpn.model.backbone import build_backbone, default_freeze, default_norm
from fpn.model.box_head import TwoLayerHead
from fpn.model.detector import Detector
from fpn.model.faster_rcnn import FasterRCNN
from fpn.model.pyramid import FPN
from fpn.model.rpn import RpnHead

# What each model takes where a spec leaves it open: the pyramid's levels and how those above the backbone's are made
# (`fpn.model.pyramid.Extra`), the anchors' sides in strides of their level, their ratios and scales.
TWO_STAGES = {
    "levels": (2, 6),
    "extra": "pool",
    "strides": 8,
    "anchor_ratios": (0.5, 1.0, 2.0),
    "anchor_scales": (1.0,),
}
ONE_STAGE = {**TWO_STAGES, "levels": (3, 7), "extra": "p5"}
MODELS: dict[str, dict[str, Any]] = {
    "faster_rcnn": TWO_STAGES,
}
NECKS = ("fpn",)

# What the paper does and later practice changed; everything else is the defaults of FasterRCNN.
PAPER = {"pooling": "pool", "rpn_beta": 1 / 9, "box_beta": 1.0}
PRESETS: dict[str, dict[str, Any]] = {"modern": {}, "paper": PAPER}


@dataclass(frozen=True)
class Spec:
    """Everything but the weights that is needed to build a detector again; stored in every checkpoint.

    model: one of MODELS. backbone, freeze, backbone_norm, norm_eps: see `fpn.model.backbone.build_backbone`.
    preset: "modern", or "paper" for the settings of Lin et al. 2017 where later practice differs.
    short, long: images are resized so that their shorter side is `short` and the longer at most `long` pixels; `long`
        follows `short` at 1333 : 800 when left out. square: they are padded to squares.
    neck: one of NECKS. width, levels, extra, norm, fuse: see `fpn.model.pyramid.FPN`. repeats: of a neck that is made
        of equal layers.
    rpn_convolutions: see `fpn.model.rpn.RpnHead`. hidden: width of the box head's two layers.
    anchor_sizes: one for each level, in pixels of the resized image; anchor_ratios: height / width; anchor_scales,
        anchor_offset, whole_pixels, floor_stride: see `fpn.model.anchors.Anchors`.
    settings: keyword arguments of the detector's class; once it is built, all of them.

    What is None fits the model and the backbone.
    """

    model: str
    classes: tuple[str, ...]
    backbone: str = "resnet50"
    preset: str = "modern"
    short: int = 800
    long: int | None = None
    square: bool = False
    freeze: int | None = None
    backbone_norm: str | None = None
    norm_eps: float | None = None
    neck: str = "fpn"
    width: int = 256
    levels: tuple[int, int] | None = None
    extra: str | None = None
    norm: str = "none"
    fuse: str = "sum"
    repeats: int | None = None
    rpn_convolutions: int = 1
    hidden: int = 1024
    anchor_sizes: tuple[float, ...] | None = None
    anchor_ratios: tuple[float, ...] | None = None
    anchor_scales: tuple[float, ...] | None = None
    anchor_offset: float = 0.0
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
) -> Detector:
    """A detector for the given class names.

    model: one of MODELS. backbone: see `fpn.model.backbone.BACKBONES`. weights: the backbone's: "imagenet" (downloaded
    by torchvision), "none", or a file with the state dict of torchvision's classification model. options: any field of
    `Spec`, such as `short=512`, or any setting of the detector's class, such as `score=0.01` or `max_detections=300`.

    Raises OptionError for values that cannot work and CheckpointError for weights that do not fit.
    """
    own = {field.name for field in fields(Spec)} - {"settings"}
    chosen = {name: as_tuple(value) for name, value in options.items()}
    settings = {name: value for name, value in chosen.items() if name not in own}
    given = {name: value for name, value in chosen.items() if name in own}
    return from_spec(Spec(model=model, backbone=backbone, classes=tuple(classes), settings=settings, **given), weights)


def from_spec(spec: Spec, weights: str | Path = "none") -> Detector:
    """The detector that `spec` describes; `weights` are the backbone's. Its own `spec` has nothing left open."""
    check(spec)
    pretrained = str(weights) != "none"
    spec = replace(
        spec,
        freeze=default_freeze(pretrained) if spec.freeze is None else spec.freeze,
        backbone_norm=spec.backbone_norm or default_norm(pretrained),
    )
    backbone = build_backbone(spec.backbone, weights, spec.freeze, spec.backbone_norm, spec.norm_eps)
    spec = resolved(spec, backbone.channels)
    detector = assemble(spec, backbone, neck_of(spec, backbone.channels))
    detector.spec = spec
    # Convolutions are 1.5 to 2 times as fast on channels-last tensors, on CPUs with AVX-512 and GPUs with tensor cores.
    return detector.to(memory_format=torch.channels_last)


def resolved(spec: Spec, channels: Mapping[int, int]) -> Spec:
    """The spec with nothing left open, on a backbone that has these channels by level."""
    defaults = dict(MODELS[spec.model])
    lowest, highest = spec.levels or (max(min(channels), defaults["levels"][0]), defaults["levels"][1])
    strides = defaults.pop("strides")
    defaults |= {
        "levels": (lowest, highest),
        "anchor_sizes": tuple(float(strides * 2**level) for level in range(lowest, highest + 1)),
    }
    fitted = {name: value for name, value in defaults.items() if getattr(spec, name) is None}
    spec = replace(spec, **fitted, settings=all_settings(spec))
    if len(anchor_sizes := spec.anchor_sizes or ()) != highest - lowest + 1:
        raise OptionError(
            f"anchor sizes {list(anchor_sizes)}: the levels P{lowest} to P{highest} need {highest - lowest + 1}"
        )
    return spec


def neck_of(spec: Spec, channels: Mapping[int, int]) -> nn.Module:
    """The pyramid of a resolved spec on a backbone with these channels."""
    levels, extra = spec.levels, spec.extra
    assert levels is not None and extra is not None
    match spec.neck:
        case "fpn":
            return FPN(channels, spec.width, levels, extra, spec.norm, spec.fuse)
    raise OptionError(f"unknown neck {spec.neck!r}; there are {', '.join(NECKS)}")


def assemble(spec: Spec, backbone: nn.Module, pyramid: nn.Module) -> Detector:
    """The detector of a resolved spec around its backbone and pyramid."""
    anchors, classes, settings = anchors_of(spec), spec.classes, spec.settings
    match spec.model:
        case "faster_rcnn":
            rpn = RpnHead(spec.width, anchors.per_cell, spec.rpn_convolutions)
            head = TwoLayerHead(spec.width * settings["pooled_size"] ** 2, len(classes), spec.hidden)
            return FasterRCNN(backbone, pyramid, anchors, rpn, head, classes, **settings)
    raise OptionError(f"unknown model {spec.model!r}; there are {', '.join(MODELS)}")


def class_of(model: str) -> type[Detector]:
    match model:
        case "faster_rcnn":
            return FasterRCNN
    raise OptionError(f"unknown model {model!r}; there are {', '.join(MODELS)}")


def anchors_of(spec: Spec) -> Anchors:
    """The anchors of a resolved spec."""
    assert spec.levels and spec.anchor_sizes and spec.anchor_ratios and spec.anchor_scales
    sizes = dict(zip(range(spec.levels[0], spec.levels[1] + 1), spec.anchor_sizes, strict=True))
    return Anchors(
        sizes, spec.anchor_ratios, spec.anchor_scales, spec.anchor_offset, spec.whole_pixels, spec.floor_stride
    )


def all_settings(spec: Spec) -> dict[str, Any]:
    """Every setting of the detector's class: its defaults, then the preset's, then those of the spec.

    A checkpoint keeps them all, so that a default that changes in a later version does not change the detector.
    """
    defaults: dict[str, Any] = {}
    for kind in reversed(class_of(spec.model).__mro__):
        if issubclass(kind, Detector):
            parameters = inspect.signature(kind.__init__).parameters.values()
            defaults |= {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    unknown = sorted(spec.settings.keys() - defaults.keys())
    if unknown:
        raise OptionError(f"{spec.model} has no option {', '.join(unknown)}")
    preset = {name: value for name, value in PRESETS[spec.preset].items() if name in defaults}
    return {**defaults, **preset, **spec.settings}


def check(spec: Spec) -> None:
    """Raises OptionError for a spec that no detector can be built from."""
    for what, value, known in (
        ("model", spec.model, MODELS),
        ("preset", spec.preset, PRESETS),
        ("neck", spec.neck, NECKS),
    ):
        if value not in known:
            raise OptionError(f"unknown {what} {value!r}; there are {', '.join(known)}")
    if not spec.classes or len(set(spec.classes)) != len(spec.classes):
        raise OptionError(f"classes {list(spec.classes)}: at least one name is needed, and none twice")
    if spec.short < 32 or (spec.long is not None and spec.long < spec.short):
        raise OptionError(f"sides short {spec.short}, long {spec.long}: short must be at least 32, long at least short")
    for name in ("width", "hidden", "rpn_convolutions", "repeats"):
        if getattr(spec, name) is not None and getattr(spec, name) < 1:
            raise OptionError(f"{name} is {getattr(spec, name)}: it must be 1 or more")
    if spec.levels is not None and not (len(spec.levels) == 2 and 1 <= spec.levels[0] <= spec.levels[1] <= 9):
        raise OptionError(f"levels {list(spec.levels)}: the lowest and the highest are needed, such as 2 6")
    for name in ("anchor_sizes", "anchor_ratios", "anchor_scales"):
        values = getattr(spec, name)
        if values is not None and (not values or min(values) <= 0):
            raise OptionError(f"{name.replace('_', ' ')} {list(values)}: at least one is needed, all above 0")
