"""mmdetection's detectors with an FPN -> fpn."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fpn.errors import CheckpointError
from fpn.model.detector import Detector
from fpn.spec import Spec
from fpn.weights.files import read_content, state_in
from fpn.weights.foreign import Names, assembled, names_for, naming, resnet_of, size_of, translated, with_options

PEER = "mmdetection"

CASCADE_WEIGHTS = (  # one through target_stds
    (10.0, 10.0, 5.0, 5.0),
    (20.0, 20.0, 10.0, 10.0),
    (1 / 0.033, 1 / 0.033, 1 / 0.067, 1 / 0.067),
)


def from_mmdetection(
    source: Mapping[str, Any] | str | Path, classes: Sequence[str] | None = None, **options: Any
) -> Detector:
    """A detector with the weights and the arithmetic of mmdetection's (2 or 3) Faster R-CNN, RetinaNet, Mask R-CNN,
    Cascade R-CNN or ATSS with a ResNet (ResNeXt) and an FPN.

    source: a `.pth` file, what it holds, or the model's state dict.
    classes: the names of its classes in its order; left out, those in the file, else the 80 of COCO if it has 80, else
        "class 1" and so on.
    options: fields of `fpn.spec.Spec` or settings of the detector that differ from the configuration in the file.
        Where there is none, mmdetection's base configuration of the model is taken: weights of its `caffe` style then
        need `stride_in_1x1=True, bgr=True` and their `mean` and `std` (as fractions of 255, red first).

    Raises CheckpointError where the file is none of these or has tensors that are missing, unknown or of another shape.
    """
    if not isinstance(source, Mapping):
        content = read_content(source)
        state_in(content, source)
        with naming(source):
            return from_mmdetection(content, classes, **options)
    state = state_in(source, "mmdetection's weights")
    meta = source.get("meta")
    meta = meta if isinstance(meta, Mapping) else {}
    # Its batch norms count batches although their statistics stay as they are.
    state = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    named = translated(state, names_of(state), PEER)
    spec = spec_of({name: value for name, (_, value) in named.items()}, classes or classes_in(meta))
    spec = with_options(spec, {**options_in(configuration_in(meta), spec), **options})
    if spec.model == "atss":  # whose towers have no bias before their norms
        named |= {
            name.replace("weight", "bias"): (theirs, value.new_zeros(len(value)))
            for name, (theirs, value) in named.items()
            if name.startswith(("head.class_tower.", "head.box_tower.")) and value.ndim == 4
        }
    return assembled(spec, named, PEER)


def names_of(state: Mapping[str, Tensor]) -> Names:
    """mmdetection's name -> ours; it numbers levels from its lowest and layers without what lies between them."""
    lateral = "neck.lateral_convs.0.conv.weight"
    fine = [k for k in state if k.startswith("backbone.layer1.") and k.endswith(("conv2.weight", "conv3.weight"))]
    c2 = len(state[max(fine)]) if fine else 0
    lowest = 2 if lateral in state and state[lateral].shape[1] == c2 else 3
    own = sum(name.startswith("neck.lateral_convs.") and name.endswith("conv.weight") for name in state)
    layers = 3 if any(".cls_convs.0.gn." in name for name in state) else 2  # of a tower, for each convolution

    def output(n: int) -> str:
        return f"pyramid.output.{n + lowest}." if n < own else f"pyramid.extra.convs.{n - own}."

    def tower(m: Any) -> str:
        return f"head.{'class' if m[1] == 'cls' else 'box'}_tower.{int(m[2]) * layers + (m[3] == 'gn')}."

    return (
        (r"backbone\.conv1\.", "backbone.stages.1.0."),
        (r"backbone\.bn1\.", "backbone.stages.1.1."),
        (r"backbone\.layer(\d)\.", lambda m: f"backbone.stages.{int(m[1]) + 1}."),
        (r"neck\.lateral_convs\.(\d)\.conv\.", lambda m: f"pyramid.lateral.{int(m[1]) + lowest}."),
        (r"neck\.fpn_convs\.(\d)\.conv\.", lambda m: output(int(m[1]))),
        (r"rpn_head\.rpn_conv\.", "rpn.shared.0."),
        (r"rpn_head\.rpn_cls\.", "rpn.objectness."),
        (r"rpn_head\.rpn_reg\.", "rpn.offsets."),
        (r"roi_head\.bbox_head\.(\d\.)?shared_fcs\.(\d)\.", lambda m: f"box_head.{m[1] or ''}fc{int(m[2]) + 1}."),
        (r"roi_head\.bbox_head\.(\d\.)?fc_cls\.", lambda m: f"box_head.{m[1] or ''}classes."),
        (r"roi_head\.bbox_head\.(\d\.)?fc_reg\.", lambda m: f"box_head.{m[1] or ''}offsets."),
        (r"roi_head\.mask_head\.convs\.(\d)\.conv\.", r"masks.head.convs.\1."),
        (r"roi_head\.mask_head\.upsample\.", "masks.head.up."),
        (r"roi_head\.mask_head\.conv_logits\.", "masks.head.logits."),
        (r"bbox_head\.(cls|reg)_convs\.(\d)\.(conv|gn)\.", tower),
        (r"bbox_head\.(?:retina|atss)_cls\.", "head.classes."),
        (r"bbox_head\.(?:retina|atss)_reg\.", "head.offsets."),
        (r"bbox_head\.atss_centerness\.", "head.centerness."),
        (r"bbox_head\.scales\.(\d)\.scale$", lambda m: f"head.scales.{int(m[1]) + lowest}"),
    )


def spec_of(state: Mapping[str, Tensor], classes: Sequence[str] | None) -> Spec:
    """What the shapes of the weights (in our names) tell, and the rest from mmdetection's base configurations."""
    common = {
        "backbone": resnet_of(state, PEER),
        "backbone_norm": "frozen",
        "freeze": 2,
        "short": 800,
        "long": 1333,
        "width": size_of(state, "pyramid.lateral.5.weight", PEER),
        "anchor_offset": 0.0,
    }
    if "head.classes.weight" in state:
        return one_stage(state, classes, common)
    cascade, masks = "box_head.0.fc1.weight" in state, "masks.head.logits.weight" in state
    head = "box_head.0." if cascade else "box_head."
    settings: dict[str, Any] = {"sampling_ratio": 0, "proposals": (2000 if cascade else 1000, 1000)}
    if cascade:
        settings |= {
            "box_weights": CASCADE_WEIGHTS,
            "rpn_beta": 1 / 9,
            "box_beta": 1.0,
            "stage_weights": (1.0, 0.5, 0.25),
            "gradient_scale": 1.0,
            "average": "logits",
        }
    return Spec(
        f"{'cascade_mask' if cascade and masks else 'cascade' if cascade else 'mask' if masks else 'faster'}_rcnn",
        names_for(size_of(state, f"{head}classes.weight", PEER) - 1, classes),
        **common,
        hidden=size_of(state, f"{head}fc1.weight", PEER),
        class_agnostic=size_of(state, f"{head}offsets.weight", PEER) == 4,
        settings=settings,
    )


def one_stage(state: Mapping[str, Tensor], classes: Sequence[str] | None, common: Mapping[str, Any]) -> Spec:
    anchors = size_of(state, "head.offsets.weight", PEER) // 4
    count = size_of(state, "head.classes.weight", PEER) // max(1, anchors)
    atss = "head.centerness.weight" in state
    return Spec(
        "atss" if atss else "retinanet",
        names_for(count, classes),
        **common,
        extra="p5" if size_of(state, "pyramid.extra.convs.0.weight", PEER, 1) == common["width"] else "c5",
        extra_relu=False,
        tower_convolutions=sum(k.startswith("head.class_tower.") and v.ndim == 4 for k, v in state.items()),
        settings={"geometric_mean": False, "score": 0.05} if atss else {},
    )


def classes_in(meta: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The class names that a file holds: mmdetection 3's `dataset_meta`, 2's `CLASSES`."""
    data = meta.get("dataset_meta")
    data = data if isinstance(data, Mapping) else {}
    names = data.get("classes") or data.get("CLASSES") or meta.get("CLASSES")
    if isinstance(names, list | tuple) and names and all(isinstance(name, str) for name in names):
        return tuple(names)
    return None


def configuration_in(meta: Mapping[str, Any]) -> dict[str, Any]:
    """The variables of the configuration that a file holds as Python's text; read as literals, never run."""
    text = meta.get("cfg") or meta.get("config")
    if not isinstance(text, str):
        return {}
    found = {}
    try:
        for line in ast.parse(text).body:
            match line:
                case ast.Assign(targets=[ast.Name(id="model" | "img_norm_cfg" | "data_preprocessor" as name)]):
                    found[name] = literal(line.value)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return {}
    return found


def literal(node: ast.expr) -> Any:
    """The value of an expression made of literals and `dict(name=value)`."""
    match node:
        case ast.Call(func=ast.Name(id="dict"), args=[], keywords=pairs):
            return {str(pair.arg): literal(pair.value) for pair in pairs}
        case ast.Dict(keys=keys, values=values):
            return {literal(k): literal(v) for k, v in zip(keys, values, strict=True) if k is not None}
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [literal(item) for item in items]
    return ast.literal_eval(node)


def options_in(config: Mapping[str, Any], spec: Spec) -> dict[str, Any]:
    """What a configuration says of pixels, strides, levels, anchors and detection, as options of ours.

    Raises CheckpointError where it says it in a way that mmdetection's own configurations do not.
    """
    try:
        return {**looks_in(config), **numbers_in(config.get("model", {}))}
    except (TypeError, AttributeError, ValueError, LookupError, ArithmeticError) as error:
        raise CheckpointError(
            f"its configuration cannot be read ({str(error)[:200]}): convert its state dict alone, and give the "
            "options that differ from mmdetection's base configuration"
        ) from error


def looks_in(config: Mapping[str, Any]) -> dict[str, Any]:
    """Pixels and their normalisation."""
    model = config.get("model", {})
    looks = model.get("data_preprocessor") or config.get("data_preprocessor") or config.get("img_norm_cfg") or {}
    found: dict[str, Any] = {}
    if "mean" in looks and "std" in looks:
        bgr = not looks.get("bgr_to_rgb", looks.get("to_rgb", False))
        order = -1 if bgr else 1
        found["bgr"] = bgr
        for name in ("mean", "std"):
            red, green, blue = looks[name][::order]
            found[name] = (red / 255, green / 255, blue / 255)
    return found


def numbers_in(model: Mapping[str, Any]) -> dict[str, Any]:
    """Strides, levels, anchors and detection."""
    found: dict[str, Any] = {}
    if model.get("backbone", {}).get("style") == "caffe":
        found["stride_in_1x1"] = True
    if "neck" in model:
        found["extra_relu"] = bool(model["neck"].get("relu_before_extra_convs", False))
    two_stages = "rpn_head" in model
    dense = model.get("rpn_head" if two_stages else "bbox_head", {})
    found |= anchors_in(dense.get("anchor_generator", {}) if isinstance(dense, dict) else {})
    test = model.get("test_cfg", {}) or {}
    test = test.get("rcnn", {}) if two_stages else test
    for ours, theirs, kind in (("score", "score_thr", float), ("max_detections", "max_per_img", int)):
        if theirs in test:
            found[ours] = kind(test[theirs])
    if "iou_threshold" in test.get("nms", {}):
        found["box_nms"] = float(test["nms"]["iou_threshold"])
    return found


def anchors_in(generator: Mapping[str, Any]) -> dict[str, Any]:
    """The anchors of mmdetection's AnchorGenerator."""
    if "strides" not in generator or "ratios" not in generator:
        return {}
    base, count = generator.get("octave_base_scale"), generator.get("scales_per_octave", 1)
    scales = generator.get("scales") or [base * 2 ** (n / count) for n in range(count)]
    strides = [max(stride) if isinstance(stride, list) else stride for stride in generator["strides"]]  # or (x, y)
    return {
        "anchor_sizes": tuple(float(stride * scales[0]) for stride in strides),
        "anchor_ratios": tuple(float(ratio) for ratio in generator["ratios"]),
        "anchor_scales": tuple(scale / scales[0] for scale in scales),
        "anchor_offset": float(generator.get("center_offset", 0.0)),
    }
