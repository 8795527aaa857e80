"""A detector for detection alone: each batch norm is folded into the convolution before it, in float32 or bfloat16."""

from __future__ import annotations

import copy
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from fpn.errors import OptionError
from fpn.model.backbone import FrozenBatchNorm
from fpn.model.detector import Detector
from fpn.structures import Batch

Norm = nn.BatchNorm2d | FrozenBatchNorm
SIDE = 128  # pixels of the image that shows what follows what: every level of a pyramid up to P7 has a place
APART = 1e-3  # how far maps may be apart after folding, beside their largest value: many times what rounding brings


def fused(detector: Detector, precision: str = "fp32") -> Detector:
    """A copy that detects the same, faster, and cannot be trained.

    precision: "bf16" has the layers with weights compute in bfloat16; boxes and scores stay in float32. Raises
    OptionError where a network does more with the output of a convolution than the norm that takes it.
    """
    made = copy.deepcopy(detector).eval().requires_grad_(False)
    with torch.no_grad(), torch.backends.cudnn.flags(allow_tf32=False):  # whose rounding is as large as APART
        image = noise(made)
        before = made.features(image)
        for norm, conv in followed(made).items():
            fold(made, conv, norm)
        after = made.features(image)
        # Not what heads give, which are fpn's own: in these a norm takes all that its convolution makes. NaN differs.
        if not all((after[k] - p).abs().max() <= APART * p.abs().max() for k, p in before.items()):
            raise OptionError(
                f"{detector.spec.backbone}: its batch norms cannot be folded into its convolutions, whose outputs it "
                "needs elsewhere too; take backend eager"
            )
        if precision == "bf16":
            for part in made.children():  # the mean and deviation of pixels are not in these
                part.to(torch.bfloat16)
    made.backend, made.precision = "fused", precision
    return made.to(memory_format=torch.channels_last)


def noise(detector: Detector) -> Batch:
    """One small image of all kinds of pixels."""
    device, sizes = detector.mean.device, torch.tensor([[SIDE, SIDE]])
    pixels = torch.randint(256, (1, 3, SIDE, SIDE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Batch(pixels, sizes, sizes, torch.zeros(1, dtype=torch.int64)).to(device)


def followed(detector: Detector) -> dict[str, str]:
    """The batch norms that always and alone among norms take the output of one convolution: {norm: convolution}."""
    made: dict[int, tuple[str, Tensor]] = {}  # by the output's identity, which keeping it keeps from being given again
    takes: dict[str, set[str | None]] = defaultdict(set)
    hooks = []

    def makes(name: str) -> Any:
        return lambda _, args, out: made.update({id(out): (name, out)})

    def takes_from(name: str) -> Any:
        return lambda _, args: takes[name].add(made.get(id(args[0]), (None,))[0])

    for name, module in detector.named_modules():
        if isinstance(module, nn.Conv2d):
            hooks.append(module.register_forward_hook(makes(name)))
        elif isinstance(module, Norm) and not module.training and module.running_mean is not None:
            hooks.append(module.register_forward_pre_hook(takes_from(name)))
    image = noise(detector)
    try:
        detector.features(image) if detector.needs_regions else detector.detect(image)
    finally:
        for hook in hooks:
            hook.remove()
    convs = [conv for some in takes.values() for conv in some]
    alone = {norm: next(iter(some)) for norm, some in takes.items() if len(some) == 1}
    return {norm: conv for norm, conv in alone.items() if conv is not None and convs.count(conv) == 1}


def fold(detector: Detector, conv: str, norm: str) -> None:
    """Give a convolution the scale and shift of the norm after it, and put in its place what else that does."""
    layer, bn = detector.get_submodule(conv), detector.get_submodule(norm)
    assert isinstance(layer, nn.Conv2d) and isinstance(bn, Norm)
    assert bn.running_mean is not None and bn.running_var is not None
    layer.weight, layer.bias = fuse_conv_bn_weights(
        layer.weight, layer.bias, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias
    )
    parent, _, name = norm.rpartition(".")
    setattr(detector.get_submodule(parent), name, bn.after if isinstance(bn, FrozenBatchNorm) else nn.Identity())
