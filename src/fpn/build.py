"""From plain options to a detector: the only place that knows which parts fit together."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

import torch
from torch import nn

from fpn.errors import OptionError
from fpn.model.anchors import Anchors
from fpn.model.atss import ATSS
from fpn.model.backbone import OWN, Backbone, build_backbone, default_freeze, default_norm, prepare
from fpn.model.bifpn import BiFPN
from fpn.model.box_head import ConvHead, TwoLayerHead
from fpn.model.cascade_rcnn import CascadeRCNN
from fpn.model.dense_head import NORMS as TOWER_NORMS
from fpn.model.dense_head import DenseHead
from fpn.model.detector import Detector
from fpn.model.dry_run import dry_run
from fpn.model.faster_rcnn import FasterRCNN
from fpn.model.fcos import FCOS
from fpn.model.mask_head import MaskBranch, MaskHead
from fpn.model.nas_fpn import NASFPN
from fpn.model.pafpn import PAFPN
from fpn.model.pyramid import FPN, NORMS, own_levels
from fpn.model.retinanet import RetinaNet
from fpn.model.rpn import RpnHead
from fpn.model.timm_backbone import TimmLevels
from fpn.model.vit import SimpleNeck, SimplePyramid

# What each model takes where a spec leaves it open: the pyramid's levels and how those above the backbone's are made
# (`fpn.model.pyramid.Extra`), the anchors' sides in strides of their level, their ratios and scales.
TWO_STAGES = {
    "levels": (2, 6),
    "extra": "pool",
    "strides": 8,
    "anchor_ratios": (0.5, 1.0, 2.0),
    "anchor_scales": (1.0,),
    "anchor_offset": 0.0,
    "class_agnostic": False,
}
CASCADE = {**TWO_STAGES, "class_agnostic": True}
ONE_STAGE = {**TWO_STAGES, "levels": (3, 7), "extra": "p5", "tower_norm": "none"}
OCTAVES = {**ONE_STAGE, "extra": "c5", "strides": 4, "anchor_scales": (1.0, 2 ** (1 / 3), 2 ** (2 / 3))}
CENTRES = {**ONE_STAGE, "anchor_ratios": (1.0,), "anchor_offset": 0.5, "tower_norm": "group"}
MODELS: dict[str, dict[str, Any]] = {
    "faster_rcnn": TWO_STAGES,
    "mask_rcnn": TWO_STAGES,
    "cascade_rcnn": CASCADE,
    "cascade_mask_rcnn": CASCADE,
    "retinanet": OCTAVES,
    "fcos": {**CENTRES, "strides": 1},
    "atss": CENTRES,
}
# And each neck; this counts where the two differ.
NECKS: dict[str, dict[str, Any]] = {
    "fpn": {"norm": "none"},
    "pafpn": {"norm": "none"},
    "bifpn": {"norm": "batch", "extra": "max", "repeats": 3},
    "nas_fpn": {"norm": "batch", "extra": "max", "repeats": 7},
    "simple": {"norm": "layer"},
}

# What the paper does and later practice changed; everything else is the defaults of FasterRCNN.
PAPER = {"pooling": "pool", "rpn_beta": 1 / 9, "box_beta": 1.0}
PRESETS: dict[str, dict[str, Any]] = {"modern": {}, "paper": PAPER}

FUSES = ("sum", "average")
# The options that only some models or necks have; the others take nothing but what they would be left at anyway.
WITH_MASKS = ("mask_rcnn", "cascade_mask_rcnn")
WITH_PROPOSALS = ("faster_rcnn", "cascade_rcnn", *WITH_MASKS)
DENSE = ("retinanet", "fcos", "atss")
OPTIONS_OF: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("preset", "rpn_convolutions", "box_convolutions", "box_norm", "class_agnostic"), WITH_PROPOSALS),
    **dict.fromkeys(("mask_norm", "mask_pooled_size", "mask_binary"), WITH_MASKS),
    **dict.fromkeys(("tower_convolutions", "tower_norm"), DENSE),
    "fuse": ("fpn", "pafpn"),
    "repeats": ("bifpn", "nas_fpn"),
}
# What some settings of the detectors' classes may be, alone or in a pair for training and detection.
SHARES = ("score", "rpn_score", "box_nms", "rpn_nms")  # 0 to 1
COUNTS = ("max_detections", "candidates", "proposals", "proposals_per_level", "rpn_examples", "box_examples",
          "pooled_size", "nearest")  # 1 or more  # fmt: skip


@dataclass(frozen=True)
class Spec:
    """Everything but the weights that is needed to build a detector again; stored in every checkpoint.

    model: one of MODELS. backbone, freeze, backbone_norm, norm_eps, stride_in_1x1: see
        `fpn.model.backbone.build_backbone`.
    preset: "modern", or "paper" for the settings of Lin et al. 2017 where later practice differs.
    short, long: images are resized so that their shorter side is `short` and the longer at most `long` pixels; `long`
        follows `short` at 1333 : 800 when left out. square: all are padded to squares of `long` pixels.
    neck: one of NECKS. width, levels, extra, norm, extra_relu, extra_norm: see `fpn.model.pyramid.FPN`; fuse as well,
        of fpn and pafpn. repeats: layers of bifpn, cells of nas_fpn.
    rpn_convolutions: see `fpn.model.rpn.RpnHead`. hidden: width of the box head's layers.
    box_convolutions: 3x3 convolutions of the box head, with box_norm ("none", "batch" or "group") and one layer after
        them; 0 for two layers only. class_agnostic: the box head has one box for all classes, not one for each.
    anchor_sizes: one for each level, in pixels of the resized image; anchor_ratios: height / width; anchor_scales,
        anchor_offset, whole_pixels, floor_stride: see `fpn.model.anchors.Anchors`.
    mask_norm, mask_pooled_size, mask_binary: see `fpn.model.mask_head`; of models with masks.
    tower_convolutions, tower_norm: see `fpn.model.dense_head.DenseHead`; of one-stage models.
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
    stride_in_1x1: bool = False
    neck: str = "fpn"
    width: int = 256
    levels: tuple[int, int] | None = None
    extra: str | None = None
    extra_relu: bool = True
    extra_norm: bool = False
    norm: str | None = None
    fuse: str = "sum"
    repeats: int | None = None
    rpn_convolutions: int = 1
    hidden: int = 1024
    box_convolutions: int = 0
    box_norm: str = "group"
    class_agnostic: bool | None = None
    anchor_sizes: tuple[float, ...] | None = None
    anchor_ratios: tuple[float, ...] | None = None
    anchor_scales: tuple[float, ...] | None = None
    anchor_offset: float | None = None
    whole_pixels: bool = False
    floor_stride: bool = False
    mask_norm: str = "none"
    mask_pooled_size: int = 14
    mask_binary: bool = True
    tower_convolutions: int = 4
    tower_norm: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def sides(self) -> tuple[int, int]:
        """The shorter side that images are resized to, and the most that the longer may have."""
        return self.short, self.long or round(self.short * 1333 / 800)

    @property
    def square_side(self) -> int | None:
        """The side of the squares that images are padded to, in every batch the same; None where they are not."""
        return self.sides[1] if self.square else None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Spec:
        """The inverse of `as_dict`, also after JSON has turned tuples into lists."""
        return cls(**{key: as_tuple(value) for key, value in values.items()})


def as_tuple(value: Any) -> Any:
    """Lists as tuples, also inside mappings: what JSON and people write, in the form that is compared and hashed."""
    if isinstance(value, list):
        return tuple(as_tuple(entry) for entry in value)
    if isinstance(value, dict):
        return {key: as_tuple(entry) for key, entry in value.items()}
    return value


def build(
    model: str = "faster_rcnn",
    *,
    backbone: str | nn.Module = "resnet50",
    classes: Sequence[str],
    weights: str | Path = "imagenet",
    **options: Any,
) -> Detector:
    """A detector for the given class names.

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
    levels = tuple(range(spec.levels[0], spec.levels[1] + 1))
    own_levels(channels, levels)
    if isinstance(backbone, Backbone | TimmLevels | SimplePyramid):
        backbone.keep(levels)
    detector = assemble(spec, backbone, neck_of(spec, channels))
    detector.spec = spec
    # Convolutions are 1.5 to 2 times as fast on channels-last tensors, on CPUs with AVX-512 and GPUs with tensor cores.
    return detector.to(memory_format=torch.channels_last)


def pixels_of(backbone: nn.Module) -> dict[str, tuple[float, ...]]:
    """The mean and deviation of the pixels that a backbone wants, where it says so by three numbers each."""
    found = {name: getattr(backbone, name, None) for name in ("mean", "std")}
    return {name: tuple(map(float, v)) for name, v in found.items() if isinstance(v, tuple | list) and len(v) == 3}


def resolved(spec: Spec, channels: Mapping[int, int]) -> Spec:
    """The spec with nothing left open, on a backbone that has these channels by level."""
    defaults = MODELS[spec.model] | NECKS[spec.neck]
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
    levels, extra, norm, relu, normed = spec.levels, spec.extra, spec.norm, spec.extra_relu, spec.extra_norm
    assert levels is not None and extra is not None and norm is not None
    match spec.neck:
        case "fpn":
            return FPN(channels, spec.width, levels, extra, norm, spec.fuse, relu, normed)
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
    match spec.model:
        case "faster_rcnn" | "mask_rcnn":
            rpn = RpnHead(spec.width, anchors.per_cell, spec.rpn_convolutions)
            head = box_head_of(spec)
            return FasterRCNN(backbone, pyramid, anchors, rpn, head, classes, masks_of(spec), **settings)
        case "cascade_rcnn" | "cascade_mask_rcnn":
            rpn = RpnHead(spec.width, anchors.per_cell, spec.rpn_convolutions)
            heads = nn.ModuleList(box_head_of(spec) for _ in settings["box_positive"])
            return CascadeRCNN(backbone, pyramid, anchors, rpn, heads, classes, masks_of(spec), **settings)
        case "retinanet":
            return RetinaNet(backbone, pyramid, anchors, dense_head_of(spec), classes, **settings)
        case "fcos":
            return FCOS(backbone, pyramid, anchors, dense_head_of(spec), classes, **settings)
        case "atss":
            return ATSS(backbone, pyramid, anchors, dense_head_of(spec), classes, **settings)
    raise OptionError(f"unknown model {spec.model!r}; there are {', '.join(MODELS)}")


def dense_head_of(spec: Spec) -> DenseHead:
    """The head of a resolved spec's one-stage model."""
    assert spec.levels and spec.tower_norm
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


def box_head_of(spec: Spec) -> nn.Module:
    """A box head of a resolved spec."""
    size, classes, agnostic = spec.settings["pooled_size"], len(spec.classes), bool(spec.class_agnostic)
    if spec.box_convolutions:
        return ConvHead(spec.width, size, classes, spec.hidden, spec.box_convolutions, spec.box_norm, agnostic)
    return TwoLayerHead(spec.width * size**2, classes, spec.hidden, agnostic)


def masks_of(spec: Spec) -> MaskBranch | None:
    """The mask branch of a resolved spec, if its model has one."""
    if spec.model not in ("mask_rcnn", "cascade_mask_rcnn"):
        return None
    head = MaskHead(spec.width, len(spec.classes), spec.width, norm=spec.mask_norm)
    return MaskBranch(head, spec.mask_pooled_size, spec.mask_binary, spec.settings["pooling"] != "align_v1")


def class_of(model: str) -> type[Detector]:
    match model:
        case "faster_rcnn" | "mask_rcnn":
            return FasterRCNN
        case "cascade_rcnn" | "cascade_mask_rcnn":
            return CascadeRCNN
        case "retinanet":
            return RetinaNet
        case "fcos":
            return FCOS
        case "atss":
            return ATSS
    raise OptionError(f"unknown model {model!r}; there are {', '.join(MODELS)}")


def anchors_of(spec: Spec) -> Anchors:
    """The anchors of a resolved spec."""
    assert spec.levels and spec.anchor_sizes and spec.anchor_ratios and spec.anchor_scales
    assert spec.anchor_offset is not None
    sizes = dict(zip(range(spec.levels[0], spec.levels[1] + 1), spec.anchor_sizes, strict=True))
    return Anchors(
        sizes, spec.anchor_ratios, spec.anchor_scales, spec.anchor_offset, spec.whole_pixels, spec.floor_stride
    )


def all_settings(spec: Spec) -> dict[str, Any]:
    """Every setting of the detector's class: its defaults, then the preset's, then those of the spec.

    A checkpoint keeps them all, so that a default that changes in a later version does not change the detector.
    """
    known: dict[str, inspect.Parameter] = {}
    for kind in reversed(class_of(spec.model).__mro__):
        if issubclass(kind, Detector):
            parameters = inspect.signature(kind.__init__, eval_str=True).parameters.values()
            known |= {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY}
    unknown = sorted(spec.settings.keys() - known.keys())
    if unknown:
        raise OptionError(f"{spec.model} has no option {', '.join(unknown)}")
    for name, value in spec.settings.items():
        check_setting(known[name], value)
    preset = {name: value for name, value in PRESETS[spec.preset].items() if name in known}
    return {**{name: p.default for name, p in known.items()}, **preset, **spec.settings}


def check_setting(known: inspect.Parameter, value: Any) -> None:
    """Raises OptionError for a value of another form than the parameter's, or outside of what makes sense."""
    if not has_form(value, known.annotation):
        form = inspect.formatannotation(known.annotation)
        raise OptionError(f"{known.name} is {value!r}: it must be {form}, such as {known.default!r}")
    numbers = value if isinstance(value, tuple) else (value,)
    if known.name in SHARES and not all(0 <= number <= 1 for number in numbers):
        raise OptionError(f"{known.name} is {value!r}: it must be 0 to 1")
    if known.name in COUNTS and not all(number >= 1 for number in numbers):
        raise OptionError(f"{known.name} is {value!r}: it must be 1 or more")


def has_form(value: Any, form: Any) -> bool:
    """Whether a value is of a type such as `tuple[int, int] | None`; a whole number does for a float too."""
    parts = get_args(form)
    if isinstance(form, UnionType):
        return any(has_form(value, part) for part in parts)
    if get_origin(form) is tuple:
        if not isinstance(value, tuple):
            return False
        parts = parts[:1] * len(value) if parts[-1] is Ellipsis else parts
        return len(parts) == len(value) and all(map(has_form, value, parts))
    if form in (int, float):
        return isinstance(value, Integral if form is int else Real) and not isinstance(value, bool)
    return value is None if form is NoneType else isinstance(value, form)


def check(spec: Spec) -> None:
    """Raises OptionError for a spec that no detector can be built from."""
    for what, value, known in (
        ("model", spec.model, MODELS),
        ("preset", spec.preset, PRESETS),
        ("neck", spec.neck, NECKS),
        ("fuse", spec.fuse, FUSES),
        ("box norm", spec.box_norm, NORMS),
        ("mask norm", spec.mask_norm, NORMS),
        ("tower norm", spec.tower_norm or "none", TOWER_NORMS),
    ):
        if value not in known:
            raise OptionError(f"unknown {what} {value!r}; there are {', '.join(known)}")
    check_belonging(spec)
    if not spec.classes or len(set(spec.classes)) != len(spec.classes):
        raise OptionError(f"classes {list(spec.classes)}: at least one name is needed, and none twice")
    if spec.short < 32 or (spec.long is not None and spec.long < spec.short):
        raise OptionError(f"sides short {spec.short}, long {spec.long}: short must be at least 32, long at least short")
    for name in ("width", "hidden", "rpn_convolutions", "repeats", "mask_pooled_size", "tower_convolutions"):
        if getattr(spec, name) is not None and getattr(spec, name) < 1:
            raise OptionError(f"{name} is {getattr(spec, name)}: it must be 1 or more")
    if spec.box_convolutions < 0:
        raise OptionError(f"box_convolutions is {spec.box_convolutions}: it must be 0 or more")
    if spec.levels is not None and not (len(spec.levels) == 2 and 1 <= spec.levels[0] <= spec.levels[1] <= 9):
        raise OptionError(f"levels {list(spec.levels)}: the lowest and the highest are needed, such as 2 6")
    for name in ("anchor_sizes", "anchor_ratios", "anchor_scales"):
        values = getattr(spec, name)
        if values is not None and (not values or min(values) <= 0):
            raise OptionError(f"{name.replace('_', ' ')} {list(values)}: at least one is needed, all above 0")
        if spec.model == "fcos" and name != "anchor_sizes" and values is not None and len(values) != 1:
            raise OptionError(f"{name.replace('_', ' ')} {list(values)}: fcos has one box a cell, so it must be one")
    all_settings(spec)


def check_belonging(spec: Spec) -> None:
    """Raises OptionError for an option that would have no effect, being of other models or necks."""
    usual = {field.name: field.default for field in fields(Spec)}
    filled_in = MODELS[spec.model] | NECKS[spec.neck]
    for name, owners in OPTIONS_OF.items():
        if spec.model in owners or spec.neck in owners:
            continue
        value = getattr(spec, name)
        if value is not None and value not in (usual[name], filled_in.get(name)):
            own = spec.model if owners[0] in MODELS else spec.neck
            raise OptionError(f"{name} {value!r}: {own} has no such option, only {', '.join(owners)}")
