"""Any network of timm that gives feature maps, as a backbone: `timm:NAME`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fpn.errors import CheckpointError, OptionError
from fpn.model.dry_run import SIZES, dry_run
from fpn.model.vit import SimplePyramid, quarters
from fpn.weights.files import read_tensors

# What networks made for one size of image call the option to take every size; the last tries without.
FREE_SIZES: tuple[dict[str, Any], ...] = ({"dynamic_img_size": True}, {"strict_img_size": False}, {})


class TimmLevels(nn.Module):
    """A network of timm's with `features_only`: level k is the last of its maps with reduction 2**k, from 2 on."""

    def __init__(self, net: nn.Module, name: str, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.mean, self.std = mean, std
        info: Any = net.feature_info
        self.net, self.name, self.stages = net, name, stage_ends(info)
        self.last = getattr(net, "output_fmt", "NCHW") == "NHWC"  # the channels come last
        self.channels: dict[int, int] = {}
        self.places: dict[int, int] = {}  # of each level among the maps
        for place, (reduction, channels) in enumerate(zip(info.reduction(), info.channels(), strict=True)):
            level = reduction.bit_length() - 1
            if 2**level != reduction:
                raise OptionError(f"the backbone {name} has a map of stride {reduction}, which is no power of two")
            if level >= 2:
                self.channels[level], self.places[level] = channels, place

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> dict[int, Float[Tensor, "B _ _ _"]]:
        maps = self.net(images)
        chosen = {level: maps[place] for level, place in self.places.items()}
        return {level: x.permute(0, 3, 1, 2) if self.last else x for level, x in chosen.items()}

    def keep(self, levels: Iterable[int]) -> None:
        """Give these levels only. What makes none of them does not learn, as DDP refuses weights without a gradient.

        timm runs it all the same.
        """
        self.channels = {level: self.channels[level] for level in sorted(self.channels.keys() & set(levels))}
        self.places = {level: self.places[level] for level in self.channels}
        learnt = [p for p in self.parameters() if p.requires_grad]
        modes = {module: module.training for module in self.modules()}
        with torch.enable_grad():
            maps = self.eval()(next(self.parameters()).new_zeros(1, 3, *SIZES[0]))
            total = torch.stack([x.sum() for x in maps.values()]).sum()
            none = (None,) * len(learnt)
            gradients = torch.autograd.grad(total, learnt, allow_unused=True) if total.requires_grad else none
        for parameter, gradient in zip(learnt, gradients, strict=True):
            parameter.requires_grad_(gradient is not None)
        for module, training in modes.items():
            module.training = training

    def freeze(self, stages: int) -> None:
        """Stop the first `stages` stages from learning (0 to 5).

        Stage k ends with the module that makes level k, and stage 1, where there is no level 1, before the first level.
        timm registers modules in the order it runs them.
        """
        ends = [module for level, module in self.stages.items() if 1 <= level <= stages]
        if not stages:
            return
        names = [plain(name) for name, _ in self.net.named_modules()]
        target = plain(ends[-1] if ends else self.stages[0])
        inside = [i for i, name in enumerate(names) if f"{name}_".startswith(f"{target}_")]
        if not inside:
            raise OptionError(f"the stages of the backbone {self.name} cannot be told apart: it needs freeze 0")
        stop = inside[-1] + 1 if ends else inside[0]
        for module in list(self.net.modules())[:stop]:
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)


def stage_ends(info: Any) -> dict[int, str]:
    """The module that ends each stage, by level; 0 is the first that any level could come from."""
    blocks = [entry["module"] for entry in info.info]
    ends = {
        reduction.bit_length() - 1: name for reduction, name in zip(info.reduction(), info.module_name(), strict=True)
    }
    if len(ends) == 1:  # a plain network of equal blocks
        ends = {level: blocks[quarters(len(blocks), level) - 1] for level in range(2, 6)}
    return {0: blocks[0]} | ends


def plain(name: str) -> str:
    """A module's name without what timm's wrappers change in it."""
    return name.removeprefix("model.").removeprefix("body.").replace(".", "_")


def build_timm(name: str, weights: str | Path) -> TimmLevels | SimplePyramid:
    """The backbone `name`, one of timm's (without "timm:"); plain networks such as ViT under a simple pyramid.

    weights: "imagenet" (timm's own for this name, whatever data they are from; downloaded by timm), "none", or a file
    with the state dict of timm's network. `mean` and `std` are those of the first.
    """
    timm = imported(name)
    try:
        cfg = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    except RuntimeError as error:  # a tag that is not one
        raise OptionError(f"unknown backbone timm:{name} ({error})") from error
    if cfg is None:
        near = ", ".join(f"timm:{other}" for other in timm.list_models(f"*{name}*")[:5])
        raise OptionError(f"unknown backbone timm:{name}" + (f"; there are {near} ..." if near else ""))
    net, options = network(timm, name, cfg.fixed_input_size)
    if str(weights) == "imagenet":
        net = downloaded(timm, name, options)
    elif str(weights) != "none":
        net = from_file(timm, name, options, Path(weights))
    backbone = TimmLevels(net, f"timm:{name}", tuple(cfg.mean), tuple(cfg.std))
    channels = dry_run(backbone, backbone.name)
    return SimplePyramid(backbone, channels, backbone.mean, backbone.std) if len(channels) == 1 else backbone


def imported(name: str) -> ModuleType:
    try:
        import timm
    except ImportError as error:
        raise OptionError(f"the backbone timm:{name} needs timm: pip install 'fpn[timm]'") from error
    return timm


def network(timm: ModuleType, name: str, fixed: bool) -> tuple[nn.Module, dict[str, Any]]:
    """The network without weights, and the options it took for images of every size."""
    tries = list(FREE_SIZES if fixed else FREE_SIZES[-1:])
    while True:
        options = tries.pop(0)
        try:
            net = timm.create_model(name, pretrained=False, features_only=True, **options)
            break
        except Exception as error:  # timm's networks refuse options and features in many ways
            if not tries:
                raise OptionError(f"timm gives no feature maps of {name} ({error})") from error
    if len(set(net.feature_info.reduction())) == 1 and net.feature_info.reduction()[0] == 14:
        # DINOv2's patches; timm resizes the weights of its patch embedding and positions.
        options["patch_size"] = 16
        net = timm.create_model(name, pretrained=False, features_only=True, **options)
    return net, options


def downloaded(timm: ModuleType, name: str, options: Mapping[str, Any]) -> nn.Module:
    cfg = timm.get_pretrained_cfg(name)
    if not cfg.has_weights:
        raise CheckpointError(f"timm has no weights for {name}: use weights none, or a file")
    try:
        return timm.create_model(name, pretrained=True, features_only=True, **options)
    except Exception as error:  # each of its ways to download has its own errors
        source = cfg.hf_hub_id or cfg.url
        raise CheckpointError(
            f"the weights of timm:{name} could not be downloaded ({str(error).splitlines()[0]}). Fetch {source} on a "
            "machine with internet and give the file as --weights FILE, or train from scratch with --weights none"
        ) from error


def from_file(timm: ModuleType, name: str, options: Mapping[str, Any], file: Path) -> nn.Module:
    """The network with the weights of a file; the classifier may be missing or of another size, nothing else may."""
    given = read_tensors(file)
    # With `features_only` timm loads what fits and is silent about the rest: the classification network is stricter.
    classifier = timm.create_model(name, pretrained=False, **options)
    heads = classifier.pretrained_cfg.get("classifier") or ()
    heads = tuple(f"{head}." for head in ((heads,) if isinstance(heads, str) else heads))
    body = {key: value for key, value in given.items() if not key.startswith(heads)}
    head = {key: value for key, value in classifier.state_dict().items() if key.startswith(heads)}

    def filled(state: Mapping[str, Tensor], **more: Any) -> nn.Module:
        overlay = {"state_dict": dict(state)}
        return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **options, **more)

    try:
        filled(body | head)
    except Exception as error:
        reason = "; ".join(line.strip() for line in str(error).splitlines()[1:4]) or str(error)
        raise CheckpointError(f"{file} does not fit the backbone timm:{name}: {reason}") from error
    return filled(body, features_only=True)
