"""Images -> C2..C5: torchvision's classification networks, cut into stages at strides 4, 8, 16 and 32.

Level numbers are the paper's: C2 is the output of stage 2 at stride 4, and so on to C5. Stage 1 is what comes before.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from jaxtyping import Float
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.ops import FrozenBatchNorm2d

from fpn.errors import CheckpointError, OptionError
from fpn.weights.files import read_tensors

RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "resnext101_32x8d")
VGGS = tuple(f"vgg{depth}{bn}" for depth in (11, 13, 16, 19) for bn in ("", "_bn"))
MOBILENETS = ("mobilenet_v2", "mobilenet_v3_large")
BACKBONES = ("tiny", *RESNETS, *VGGS, *MOBILENETS)


class Backbone(nn.Module):
    """Five stages run one after another; the outputs of stages 2 to 5 are the levels C2..C5."""

    def __init__(self, stages: Mapping[int, nn.Module], channels: Mapping[int, int]):
        super().__init__()
        self.stages = nn.ModuleDict({str(level): stage for level, stage in stages.items()})
        self.channels = dict(channels)

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> dict[int, Float[Tensor, "B _ _ _"]]:
        levels, x = {}, images
        for name, stage in self.stages.items():
            x = stage(x)
            levels[int(name)] = x
        return {level: levels[level] for level in self.channels}

    def freeze(self, stages: int) -> None:
        """Stop the first `stages` stages from learning (0 to 5)."""
        for level in range(1, stages + 1):
            self.stages[str(level)].requires_grad_(False)


def build_backbone(
    name: str,
    weights: str | Path = "none",
    freeze: int | None = None,
    norm: str | None = None,
    norm_eps: float | None = None,
) -> Backbone:
    """A backbone by torchvision's name for it.

    weights: "imagenet" (downloaded by torchvision), "none", or a file with the state dict of torchvision's model.
    freeze: how many stages do not learn; 2 where there are weights (as detectron2 does), else 0.
    norm: "frozen" batch norm where there are weights (batches in detection are too small for statistics), else "batch".
    norm_eps: epsilon of the batch norms, where it is not torchvision's own.
    """
    if name not in BACKBONES:
        raise OptionError(f"unknown backbone {name!r}; there are {', '.join(BACKBONES)}")
    pretrained = str(weights) != "none"
    freeze = default_freeze(pretrained) if freeze is None else freeze
    norm = norm or default_norm(pretrained)
    if freeze not in range(6):
        raise OptionError(f"freeze is {freeze}: a backbone has 5 stages, so it must be 0 to 5")
    if norm not in ("frozen", "batch"):
        raise OptionError(f"backbone norm {norm!r}: it must be frozen or batch")
    backbone = tiny(weights) if name == "tiny" else cut(name, classifier(name, weights))
    if norm == "frozen":
        freeze_batch_norm(backbone)
    for module in backbone.modules():
        if norm_eps is not None and isinstance(module, nn.BatchNorm2d | FrozenBatchNorm2d):
            module.eps = norm_eps
    backbone.freeze(freeze)
    return backbone


def tiny(weights: str | Path = "none", channels: tuple[int, int, int, int] = (32, 64, 128, 192)) -> Backbone:
    """One residual block a stage, for training from scratch on small machines; there are no weights for it."""
    if str(weights) != "none":
        raise OptionError("the backbone tiny is for training from scratch: use weights none, or a larger backbone")

    def conv(inputs: int, outputs: int, kernel: int, stride: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(outputs)]

    first = channels[0]
    stages: dict[int, nn.Module] = {
        1: nn.Sequential(*conv(3, first // 2, 3, 2), nn.ReLU(), *conv(first // 2, first, 3, 2), nn.ReLU())
    }
    for level, (before, after) in enumerate(zip((first, *channels), channels, strict=False), 2):
        down = None if before == after else nn.Sequential(*conv(before, after, 1, 2))
        stages[level] = BasicBlock(before, after, 1 if before == after else 2, down)
    backbone = Backbone(stages, dict(enumerate(channels, 2)))
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return backbone


def default_freeze(pretrained: bool) -> int:
    return 2 if pretrained else 0


def default_norm(pretrained: bool) -> str:
    return "frozen" if pretrained else "batch"


def classifier(name: str, weights: str | Path) -> nn.Module:
    """torchvision's classification network of this name with the weights asked for."""
    if str(weights) == "imagenet":
        pretrained = torchvision.models.get_model_weights(name).DEFAULT  # type: ignore[attr-defined]
        try:
            return torchvision.models.get_model(name, weights=pretrained)
        except (OSError, RuntimeError) as error:  # urllib's errors are OSErrors; a bad hash is a RuntimeError
            raise CheckpointError(
                f"the ImageNet weights of {name} could not be downloaded ({error}). Fetch {pretrained.url} on a "
                f"machine with internet and give the file as --weights FILE, or train from scratch with --weights none"
            ) from error
    else:
        model = torchvision.models.get_model(name, weights=None)
    if str(weights) != "none":
        load_classifier(model, Path(weights))
    return model


def load_classifier(model: nn.Module, file: Path) -> None:
    """Load a classification state dict; the classifier itself may be missing or of another size, nothing else may."""
    given, wanted = read_tensors(file), model.state_dict()
    head = ("fc.", "classifier.")
    faults = [f"{key} is missing" for key in wanted if key not in given and not key.startswith(head)]
    # Files from before torch 0.4.1 count no batches; the count is not used.
    faults = [fault for fault in faults if "num_batches_tracked" not in fault]
    faults += [f"{key} is unknown" for key in given if key not in wanted and not key.startswith(head)]
    faults += [
        f"{key} has shape {tuple(given[key].shape)}, not {tuple(wanted[key].shape)}"
        for key in wanted
        if key in given and given[key].shape != wanted[key].shape and not key.startswith(head)
    ]
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise CheckpointError(f"{file} does not fit this backbone: {'; '.join(faults[:3])}{more}")
    model.load_state_dict({k: v for k, v in given.items() if not k.startswith(head)}, strict=False)


def cut(name: str, model: nn.Module) -> Backbone:
    """Cut a classification network into the five stages; pooling and classifier are dropped."""
    if isinstance(model, ResNet):
        stem = nn.Sequential(model.conv1, model.bn1, model.relu, model.maxpool)
        stages = {1: stem, 2: model.layer1, 3: model.layer2, 4: model.layer3, 5: model.layer4}
        growth = 1 if isinstance(model.layer1[0], BasicBlock) else 4  # a bottleneck's output is 4 times as wide
        return Backbone(stages, {2: 64 * growth, 3: 128 * growth, 4: 256 * growth, 5: 512 * growth})
    features = model.get_submodule("features")
    assert isinstance(features, nn.Sequential)
    ends, channels = cut_points(name, features)
    cuts = zip((0, *ends[:-1]), ends, strict=True)
    return Backbone({level: features[start:end] for level, (start, end) in enumerate(cuts, 1)}, channels)


def cut_points(name: str, features: nn.Sequential) -> tuple[tuple[int, ...], dict[int, int]]:
    """Where stages 1..5 end in `features`, and the channels of C2..C5."""
    if name == "mobilenet_v2":
        return (2, 4, 7, 14, 18), {2: 24, 3: 32, 4: 96, 5: 320}
    if name == "mobilenet_v3_large":
        return (2, 4, 7, 13, 16), {2: 24, 3: 40, 4: 112, 5: 160}
    # VGG: C2..C4 are the last layers of its conv3, conv4 and conv5 blocks, C5 the pooled conv5.
    pools = [i for i, layer in enumerate(features) if isinstance(layer, nn.MaxPool2d)]
    return (pools[1] + 1, pools[2], pools[3], pools[4], pools[4] + 1), {2: 256, 3: 512, 4: 512, 5: 512}


class FrozenBatchNorm(FrozenBatchNorm2d):
    """Batch norm with constant statistics, scale and shift, that gives back the precision it is given.

    torchvision's own turns bfloat16 into float32, and with it everything that follows.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


def freeze_batch_norm(module: nn.Module) -> None:
    """Replace every BatchNorm2d by a frozen one."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            frozen = FrozenBatchNorm(child.num_features, eps=child.eps)
            with torch.no_grad():
                for key in ("weight", "bias", "running_mean", "running_var"):
                    getattr(frozen, key).copy_(getattr(child, key))
            setattr(module, name, frozen)
        else:
            freeze_batch_norm(child)
