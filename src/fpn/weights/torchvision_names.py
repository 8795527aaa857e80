"""torchvision's names for the tensors of a detector, and its background class, which is the first and not the last."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

NEVER = -100.0  # logit of a class that never is: its score, and the gradient of its loss, are 0

# Our name -> torchvision's, the first that matches applies; {k} is a group, {low} the lowest level of the pyramid.
# What torchvision calls a block is a convolution, number 0, and its norm, number 1. Ours has numbers only with a norm.
Rename = str | Callable[[re.Match[str]], str]
BACKBONE: tuple[tuple[str, Rename], ...] = (
    (r"backbone\.stages\.1\.0\.(weight)", r"backbone.body.conv1.\1"),
    (r"backbone\.stages\.1\.1\.(\w+)", r"backbone.body.bn1.\1"),
    (r"backbone\.stages\.(\d)\.(\d+\..+)", lambda m: f"backbone.body.layer{int(m[1]) - 1}.{m[2]}"),
)
MOBILENET: tuple[tuple[str, Rename], ...] = ((r"backbone\.stages\.\d\.(.+)", r"backbone.body.\1"),)
HEADS: tuple[tuple[str, Rename], ...] = (
    (r"pyramid\.extra\.convs\.([01])\.(.+)", lambda m: f"backbone.fpn.extra_blocks.p{int(m[1]) + 6}.{m[2]}"),
    (r"rpn\.shared\.(\d)\.(.+)", r"rpn.head.conv.\1.0.\2"),
    (r"rpn\.objectness\.(.+)", r"rpn.head.cls_logits.\1"),
    (r"rpn\.offsets\.(.+)", r"rpn.head.bbox_pred.\1"),
    (r"box_head\.convs\.(\d)\.(.+)", lambda m: f"roi_heads.box_head.{m[1]}.{block(m[2])}"),
    (r"box_head\.fc2\.(.+)", r"roi_heads.box_head.fc7.\1"),
    (r"box_head\.classes\.(.+)", r"roi_heads.box_predictor.cls_score.\1"),
    (r"box_head\.offsets\.(.+)", r"roi_heads.box_predictor.bbox_pred.\1"),
    (r"masks\.head\.convs\.(\d)\.(.+)", lambda m: f"roi_heads.mask_head.{m[1]}.{block(m[2])}"),
    (r"masks\.head\.up\.(.+)", r"roi_heads.mask_predictor.conv5_mask.\1"),
    (r"masks\.head\.logits\.(.+)", r"roi_heads.mask_predictor.mask_fcn_logits.\1"),
    (r"head\.classes\.(.+)", r"head.classification_head.cls_logits.\1"),
    (r"head\.offsets\.(.+)", r"head.regression_head.bbox_reg.\1"),
    (r"head\.centerness\.(.+)", r"head.regression_head.bbox_ctrness.\1"),
)


def block(rest: str) -> str:
    return rest if rest[0].isdigit() else f"0.{rest}"


def theirs(names: Iterable[str], model: str, low: int, mobilenet: bool) -> dict[str, str | None]:
    """torchvision's name for each of our tensors, None where it has no such tensor.

    model: as in `fpn.spec.MODELS`. low: the pyramid's lowest level.
    """
    names = list(names)
    convs = len({name.split(".")[2] for name in names if name.startswith("box_head.convs.")})
    normed = any(name.startswith("head.class_tower.1.") for name in names)
    layers = 3 if normed else 2  # of a tower: convolution, norm, ReLU

    def tower(m: re.Match[str]) -> str:
        place = int(m[2])
        at = place if model == "fcos" else f"{place // layers}.{place % layers}"
        return f"head.{'classification' if m[1] == 'class' else 'regression'}_head.conv.{at}.{m[3]}"

    renames = (
        *(MOBILENET if mobilenet else BACKBONE),
        (
            r"pyramid\.(lateral|output)\.(\d)\.(.+)",
            lambda m: (
                f"backbone.fpn.{'inner' if m[1] == 'lateral' else 'layer'}_blocks.{int(m[2]) - low}.{block(m[3])}"
            ),
        ),
        (r"head\.(class|box)_tower\.(\d+)\.(.+)", tower),
        (r"box_head\.fc1\.(.+)", rf"roi_heads.box_head.{convs + 1 if convs else 'fc6'}.\1"),
        *HEADS,
    )
    return {name: renamed(name, renames) for name in names}


def renamed(name: str, renames: Iterable[tuple[str, Rename]]) -> str | None:
    for pattern, replacement in renames:
        if match := re.fullmatch(pattern, name):
            return match.expand(replacement) if isinstance(replacement, str) else replacement(match)
    return None


def modern(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the names that torchvision gives them since 0.13, when convolutions became blocks."""
    fcos = any("bbox_ctrness" in name for name in state)  # has kept its names
    old: tuple[tuple[str, Rename], ...] = (
        (r"(backbone\.fpn\.(?:inner|layer)_blocks\.\d)\.(weight|bias)", r"\1.0.\2"),
        (r"rpn\.head\.conv\.(weight|bias)", r"rpn.head.conv.0.0.\1"),
        (r"roi_heads\.mask_head\.mask_fcn(\d)\.(.+)", lambda m: f"roi_heads.mask_head.{int(m[1]) - 1}.0.{m[2]}"),
        (
            r"(head\.\w+_head\.conv)\.(\d)\.(weight|bias)",
            lambda m: m[0] if fcos else f"{m[1]}.{int(m[2]) // 2}.0.{m[3]}",
        ),
    )
    return {renamed(name, old) or name: value for name, value in state.items()}


def without_background(name: str, value: Tensor, per_cell: int) -> Tensor:
    """Our rows of a tensor of torchvision's. Its class 0 is background; ours, where there is one, is the last.

    per_cell: anchors of each cell, where the model has one stage: each has logits of its own.
    """
    if ".cls_score." in name:
        return value.roll(-1, 0)
    if ".box_predictor.bbox_pred." in name:
        return value[4:]  # background has a box that means nothing
    if ".mask_fcn_logits." in name:
        return value[1:]
    if ".classification_head.cls_logits." in name:
        return value.unflatten(0, (per_cell, -1))[:, 1:].flatten(0, 1)
    return value


def with_background(name: str, value: Tensor, per_cell: int) -> Tensor:
    """The inverse of `without_background`; the rows that we do not have are 0, or say that it never is background."""
    if ".cls_score." in name:
        return value.roll(1, 0)
    if ".box_predictor.bbox_pred." in name:
        return torch.cat([torch.zeros_like(value[:4]), value])
    if ".mask_fcn_logits." in name:
        return torch.cat([torch.zeros_like(value[:1]), value])
    if ".classification_head.cls_logits." in name:
        rows = value.unflatten(0, (per_cell, -1))
        none = torch.full_like(rows[:, :1], NEVER if name.endswith("bias") else 0.0)
        return torch.cat([none, rows], dim=1).flatten(0, 1)
    return value
