"""What a detector is made of, as plain options: what may be left open, what it then is, what is refused."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

from fpn.data.dataset import OBJECT
from fpn.errors import OptionError
from fpn.model.anchors import Anchors
from fpn.model.atss import ATSS
from fpn.model.cascade_rcnn import CascadeRCNN
from fpn.model.dense_head import NORMS as TOWER_NORMS
from fpn.model.detector import Detector
from fpn.model.fast_rcnn import FastRCNN
from fpn.model.faster_rcnn import FasterRCNN
from fpn.model.fcos import FCOS
from fpn.model.mask_proposals import MaskProposals, scales_of
from fpn.model.pyramid import NORMS
from fpn.model.region_proposals import RPN
from fpn.model.retinanet import RetinaNet

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
    "width": 256,
    "hidden": 1024,
}
CASCADE = {**TWO_STAGES, "class_agnostic": True}
ONE_STAGE = {**TWO_STAGES, "levels": (3, 7), "extra": "p5", "tower_norm": "none"}
OCTAVES = {**ONE_STAGE, "extra": "c5", "strides": 4, "anchor_scales": (1.0, 2 ** (1 / 3), 2 ** (2 / 3))}
CENTRES = {**ONE_STAGE, "anchor_ratios": (1.0,), "anchor_offset": 0.5, "tower_norm": "group"}
WINDOWS = {**TWO_STAGES, "anchor_ratios": (1.0,), "anchor_offset": 0.5, "width": 128, "hidden": 512}
MODELS: dict[str, dict[str, Any]] = {
    "rpn": TWO_STAGES,
    "fast_rcnn": TWO_STAGES,
    "faster_rcnn": TWO_STAGES,
    "mask_rcnn": TWO_STAGES,
    "cascade_rcnn": CASCADE,
    "cascade_mask_rcnn": CASCADE,
    "retinanet": OCTAVES,
    "fcos": {**CENTRES, "strides": 1},
    "atss": CENTRES,
    "mask_proposals": WINDOWS,
}
# And each neck; this counts where the two differ.
NECKS: dict[str, dict[str, Any]] = {
    "fpn": {"norm": "none"},
    "pafpn": {"norm": "none"},
    "bifpn": {"norm": "batch", "extra": "max", "repeats": 3},
    "nas_fpn": {"norm": "batch", "extra": "max", "repeats": 7},
    "simple": {"norm": "layer"},
}
NO_NECK: dict[str, Any] = {"norm": "none"}  # neck "none": one of the backbone's levels as it is
# All that several levels would do falls to one: as many candidates as the five of a pyramid have together.
ONE_LEVEL = {"proposals_per_level": (10000, 5000)}
STAGE_HEAD = {"pooled_size": 14}  # which stage 5 halves

# What the paper does and later practice changed; everything else is the defaults of FasterRCNN.
PAPER = {"pooling": "pool", "rpn_beta": 1 / 9, "box_beta": 1.0}
PRESETS: dict[str, dict[str, Any]] = {"modern": {}, "paper": PAPER}

FUSES = ("sum", "average")
BOX_HEADS = ("layers", "stage")
# The options that only some models or necks have; the others take nothing but what they would be left at anyway.
WITH_MASKS = ("mask_rcnn", "cascade_mask_rcnn")
WITH_PROPOSALS = ("faster_rcnn", "cascade_rcnn", *WITH_MASKS)
WITH_RPN, WITH_BOX_HEAD = ("rpn", *WITH_PROPOSALS), ("fast_rcnn", *WITH_PROPOSALS)
DENSE = ("retinanet", "fcos", "atss")
ONE_BOX = ("fcos", "mask_proposals")  # of each ratio and scale there can be but one
OPTIONS_OF: dict[str, tuple[str, ...]] = {
    "preset": ("rpn", *WITH_BOX_HEAD),
    "rpn_convolutions": WITH_RPN,
    **dict.fromkeys(("box_convolutions", "box_norm", "class_agnostic"), WITH_BOX_HEAD),
    "hidden": (*WITH_BOX_HEAD, "mask_proposals"),
    **dict.fromkeys(("mask_norm", "mask_pooled_size", "mask_binary"), WITH_MASKS),
    **dict.fromkeys(("tower_convolutions", "tower_norm"), DENSE),
    "rpn_shared": WITH_RPN,
    "box_head": ("fast_rcnn", "faster_rcnn"),
    **dict.fromkeys(("extra", "extra_relu", "extra_norm", "norm"), tuple(NECKS)),
    **dict.fromkeys(("top_down", "lateral", "finest"), ("fpn",)),
    "fuse": ("fpn", "pafpn"),
    "repeats": ("bifpn", "nas_fpn"),
    # fast_rcnn looks at regions of whole images.
    "tile": tuple(model for model in MODELS if model != "fast_rcnn"),
}
# What some settings of the detectors' classes may be, alone or in a pair for training and detection.
SHARES = ("score", "rpn_score", "box_nms", "rpn_nms", "positive_fraction")  # 0 to 1
COUNTS = ("max_detections", "candidates", "proposals", "proposals_per_level", "rpn_examples", "box_examples",
          "pooled_size", "nearest", "windows", "mask_size", "examples")  # 1 or more  # fmt: skip


@dataclass(frozen=True)
class Spec:
    """Everything but the weights that is needed to build a detector again; stored in every checkpoint.

    model: one of MODELS. backbone, freeze, backbone_norm, norm_eps, stride_in_1x1: see
        `fpn.model.backbone.build_backbone`.
    preset: "modern", or "paper" for the settings of Lin et al. 2017 where later practice differs.
    short, long: images are resized so that their shorter side is `short` and the longer at most `long` pixels; `long`
        follows `short` at 1333 : 800 when left out. square: all are padded to squares of `long` pixels.
    tile, overlap: images are looked at in tiles of `tile` pixels a side before that, which share `overlap` of it; see
        `fpn.inference.tiles.tiled`.
    neck: one of NECKS, or "none" for one of the backbone's levels as it is. width, levels, extra, norm, extra_relu,
        extra_norm: see `fpn.model.pyramid.FPN`; fuse as well, of fpn and pafpn; top_down, lateral, finest: of fpn.
        repeats: layers of bifpn, cells of nas_fpn.
    rpn_convolutions: see `fpn.model.rpn.RpnHead`. rpn_shared: one such head for all levels, not one for each.
    box_head: "layers", or "stage" for the backbone's stage 5 on regions of C4, without a neck; see
        `fpn.model.box_head.StageHead`. hidden: width of the layers of the box head, or of mask_proposals.
    box_convolutions: 3x3 convolutions of the box head, with box_norm ("none", "batch" or "group") and one layer after
        them; 0 for two layers only. class_agnostic: the box head has one box for all classes, not one for each.
    anchor_sizes: one for each level, in pixels of the resized image. Where there is one level only, without a neck or
        by finest, all sizes of a pyramid stand on it, by anchor_scales. anchor_ratios: height / width; anchor_scales,
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
    tile: int | None = None
    overlap: float = 0.2
    freeze: int | None = None
    backbone_norm: str | None = None
    norm_eps: float | None = None
    stride_in_1x1: bool = False
    neck: str = "fpn"
    width: int | None = None
    levels: tuple[int, int] | None = None
    extra: str | None = None
    extra_relu: bool = True
    extra_norm: bool = False
    norm: str | None = None
    fuse: str = "sum"
    top_down: bool = True
    lateral: bool = True
    finest: bool = False
    repeats: int | None = None
    rpn_convolutions: int = 1
    rpn_shared: bool = True
    box_head: str = "layers"
    hidden: int | None = None
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
    def one_level(self) -> bool:
        """Whether all objects are found on one level, without a neck or on the finest of one."""
        return self.neck == "none" or self.finest

    @property
    def square_side(self) -> int | None:
        """The side of the squares that images are padded to, in every batch the same; None where they are not."""
        return self.sides[1] if self.square else None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Spec:
        """The inverse of `as_dict`, also after JSON has turned tuples into lists."""
        values = {key: as_tuple(value) for key, value in values.items()}
        if values.get("model") in (*DENSE, "rpn"):  # earlier versions took and stored it, without effect
            values.pop("hidden", None)
        return cls(**values)


def as_tuple(value: Any) -> Any:
    """Lists as tuples, also inside mappings: what JSON and people write, in the form that is compared and hashed."""
    if isinstance(value, list):
        return tuple(as_tuple(entry) for entry in value)
    if isinstance(value, dict):
        return {key: as_tuple(entry) for key, entry in value.items()}
    return value


def class_of(model: str) -> type[Detector]:
    match model:
        case "rpn":
            return RPN
        case "fast_rcnn":
            return FastRCNN
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
        case "mask_proposals":
            return MaskProposals
    raise OptionError(f"unknown model {model!r}; there are {', '.join(MODELS)}")


def default_classes(model: str) -> tuple[str, ...]:
    """The one class of a model that only tells objects from background. Raises OptionError for all other models."""
    if not class_of(model).proposes:
        raise OptionError(f"{model} needs the names of its classes: build it with classes=data.classes")
    return (OBJECT,)


def resolved(spec: Spec, channels: Mapping[int, int]) -> Spec:
    """The spec with nothing left open, on a backbone that has these channels by level."""
    defaults = MODELS[spec.model] | NECKS.get(spec.neck, NO_NECK)
    strides, levels = defaults.pop("strides"), defaults["levels"]
    lowest, highest = spec.levels or levels_of(spec, channels, levels)
    first, count = (levels[0], 1) if spec.one_level else (lowest, highest - lowest + 1)
    defaults |= {
        "levels": (lowest, highest),
        "anchor_sizes": tuple(float(strides * 2**level) for level in range(first, first + count)),
    }
    if spec.one_level:
        defaults["anchor_scales"] = tuple(float(2**n) for n in range(levels[1] - levels[0] + 1))
    if spec.neck == "none":
        defaults["width"] = width = channels.get(lowest)
        if spec.width not in (None, width):
            raise OptionError(f"width {spec.width}: without a neck it is that of C{lowest} of {spec.backbone}, {width}")
    fitted = {name: value for name, value in defaults.items() if getattr(spec, name) is None}
    spec = replace(spec, **fitted, settings=all_settings(spec))
    if len(anchor_sizes := spec.anchor_sizes or ()) != highest - lowest + 1:
        raise OptionError(
            f"anchor sizes {list(anchor_sizes)}: the levels P{lowest} to P{highest} need {highest - lowest + 1}"
        )
    learnt = spec.neck == "bifpn" or spec.extra in ("p5", "c5")
    if spec.model == "fast_rcnn" and learnt and highest > max(channels):
        raise OptionError(
            f"levels {lowest} {highest}: fast_rcnn pools from the backbone's levels, those above would have weights "
            f"that never learn: levels {lowest} {max(channels)}"
        )
    return spec


def levels_of(spec: Spec, channels: Mapping[int, int], usual: tuple[int, int]) -> tuple[int, int]:
    """The lowest and the highest level of a spec that leaves them open; usual: those of its model."""
    lowest = max(min(channels), usual[0])
    if spec.neck == "none":
        return (4, 4) if spec.box_head == "stage" else (max(channels), max(channels))
    if spec.model == "fast_rcnn" and spec.neck == "bifpn":
        return lowest, max(channels)
    return lowest, lowest if spec.finest else usual[1]


def anchors_of(spec: Spec) -> Anchors:
    """The anchors of a resolved spec."""
    assert spec.levels and spec.anchor_sizes and spec.anchor_ratios and spec.anchor_scales
    assert spec.anchor_offset is not None
    sizes = dict(zip(range(spec.levels[0], spec.levels[1] + 1), spec.anchor_sizes, strict=True))
    scales = spec.anchor_scales
    if spec.model == "mask_proposals":
        scales = tuple(scale * scales[0] for scale in scales_of(spec.settings["windows"]))
    return Anchors(sizes, spec.anchor_ratios, scales, spec.anchor_offset, spec.whole_pixels, spec.floor_stride)


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
    fitting = PRESETS[spec.preset] | (ONE_LEVEL if spec.one_level else {})
    fitting = fitting | (STAGE_HEAD if spec.box_head == "stage" else {})
    preset = {name: value for name, value in fitting.items() if name in known}
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
    check_forms(spec)
    for what, value, known in (
        ("model", spec.model, MODELS),
        ("preset", spec.preset, PRESETS),
        ("neck", spec.neck, (*NECKS, "none")),
        ("fuse", spec.fuse, FUSES),
        ("box head", spec.box_head, BOX_HEADS),
        ("box norm", spec.box_norm, NORMS),
        ("mask norm", spec.mask_norm, NORMS),
        ("tower norm", spec.tower_norm or "none", TOWER_NORMS),
    ):
        if value not in known:
            raise OptionError(f"unknown {what} {value!r}; there are {', '.join(known)}")
    check_belonging(spec)
    check_parts(spec)
    if class_of(spec.model).proposes and spec.classes != (OBJECT,):
        raise OptionError(
            f"{spec.model} finds objects without telling their classes, so its one class is {OBJECT!r}, not "
            f"{', '.join(spec.classes)}: leave classes out"
        )
    if not spec.classes or len(set(spec.classes)) != len(spec.classes):
        raise OptionError(f"classes {list(spec.classes)}: at least one name is needed, and none twice")
    if spec.short < 32 or (spec.long is not None and spec.long < spec.short):
        raise OptionError(f"sides short {spec.short}, long {spec.long}: short must be at least 32, long at least short")
    if spec.tile is not None:
        from fpn.data.tiles import check_tiles

        check_tiles(spec.tile, spec.overlap)
    elif spec.overlap != Spec.overlap:
        raise OptionError(f"overlap {spec.overlap}: it is of tiles; give --tile too, such as 800")
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
        if spec.model in ONE_BOX and name != "anchor_sizes" and values is not None and len(values) != 1:
            owner = f"{name.replace('_', ' ')} {list(values)}: {spec.model}"
            raise OptionError(f"{owner} has one box a cell, so it must be one")
    all_settings(spec)


def check_forms(spec: Spec) -> None:
    """Raises OptionError for a field of another form than it has in `Spec`."""
    for name, form in inspect.get_annotations(Spec, eval_str=True).items():
        if name != "settings" and not has_form(value := getattr(spec, name), form):
            wanted = inspect.formatannotation(form).removesuffix(" | None")
            raise OptionError(f"{name} is {value!r}: it must be {wanted}")


def check_belonging(spec: Spec) -> None:
    """Raises OptionError for an option that would have no effect, being of other models or necks."""
    usual = {field.name: field.default for field in fields(Spec)}
    filled_in = MODELS[spec.model] | NECKS.get(spec.neck, NO_NECK)
    for name, owners in OPTIONS_OF.items():
        if spec.model in owners or spec.neck in owners:
            continue
        value = getattr(spec, name)
        if value is not None and value not in (usual[name], filled_in.get(name)):
            own = spec.model if owners[0] in MODELS else spec.neck
            raise OptionError(f"{name} {value!r}: {own} has no such option, only {', '.join(owners)}")


def check_parts(spec: Spec) -> None:
    """Raises OptionError for parts that are taken out or put elsewhere, where others need them or would do nothing."""
    alone, levels, stage = "neck none" if spec.neck == "none" else "finest", spec.levels, spec.box_head == "stage"
    models = ("rpn", *WITH_BOX_HEAD) if spec.finest else ("rpn", "fast_rcnn", "faster_rcnn", "cascade_rcnn")
    usual = {"box_convolutions": 0, "box_norm": "group", "hidden": MODELS[spec.model]["hidden"]}
    idle = [name for name, value in usual.items() if getattr(spec, name) not in (None, value)]
    refused = {
        "top_down False and lateral False: nothing would make the levels below C5": not (spec.top_down or spec.lateral),
        "finest without top_down: the levels above would do nothing": spec.finest and not spec.top_down,
        f"fuse {spec.fuse!r}: without top_down or lateral nothing is fused": (
            spec.fuse != "sum" and not (spec.top_down and spec.lateral)
        ),
        f"{alone}: {spec.model} has no such option, only {', '.join(models)}": (
            spec.one_level and spec.model not in models
        ),
        f"levels {levels}: {alone} gives one level, such as 4 4": (
            spec.one_level and levels is not None and levels[0] != levels[1]
        ),
        f"rpn_shared False: {alone} leaves one level, and so one head": spec.one_level and not spec.rpn_shared,
        f"box_head 'stage': stage 5 takes regions of C4 as they are: neck none, not {spec.neck}": (
            stage and spec.neck != "none"
        ),
        f"levels {levels}: box_head 'stage' takes regions of C4: 4 4": stage and levels not in (None, (4, 4)),
        f"{', '.join(idle)}: box_head 'stage' has no layers but the backbone's and the last": stage and bool(idle),
    }
    for words, wrong in refused.items():
        if wrong:
            raise OptionError(words)
