"""Images -> C2..C5: classification networks, cut into stages at strides 4, 8, 16 and 32.

Level numbers are the paper's: C2 is the output of stage 2 at stride 4, and so on to C5. Stage 1 is what comes before.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from jaxtyping import Float
from torch import Tensor, nn
from torchvision.models import RegNet, VisionTransformer
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.ops import FrozenBatchNorm2d

from fpn.errors import CheckpointError, OptionError
from fpn.model.detector import IMAGENET_MEAN, IMAGENET_STD
from fpn.model.timm_backbone import TimmLevels, build_timm
from fpn.model.vit import PlainViT, SimplePyramid
from fpn.weights.files import read_tensors

RESNETS = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
)
VGGS = tuple(f"vgg{depth}{bn}" for depth in (11, 13, 16, 19) for bn in ("", "_bn"))
MOBILENETS = ("mobilenet_v2", "mobilenet_v3_large")
CONVNEXTS = tuple(f"convnext_{size}" for size in ("tiny", "small", "base", "large"))
EFFICIENTNETS = (*(f"efficientnet_b{n}" for n in range(8)), "efficientnet_v2_s", "efficientnet_v2_m")
REGNETS = tuple(
    f"regnet_{kind}_{size}" for kind in "xy" for size in ("400mf", "800mf", "1_6gf", "3_2gf", "8gf", "16gf", "32gf")
)
VITS = ("vit_b_16", "vit_b_32", "vit_l_16", "vit_l_32")
BACKBONES = ("tiny", *RESNETS, *VGGS, *MOBILENETS, *CONVNEXTS, *EFFICIENTNETS, *REGNETS, *VITS)
# torchvision's detectors take two maps at stride 32 from MobileNetV3, here as C5 and C6. The only C6 that does not keep
# to stride 2**k: anchors on it need `floor_stride`, and regions must not be pooled from it. For their weights only.
SPLIT_MOBILENET = "mobilenet_v3_large_split"
OWN = "module:"  # how a spec writes a backbone that is a module of the user's: with the name of its class


class Backbone(nn.Module):
    """Five stages run one after another; the outputs of stages 2 to 5 are the levels C2..C5.

    mean, std: of the pixels that its weights were made for; also of other backbones, where they are not ImageNet's.
    """

    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __init__(self, stages: Mapping[int, nn.Module], channels: Mapping[int, int]):
        super().__init__()
        self.stages = nn.ModuleDict({str(level): stage for level, stage in stages.items()})
        self.channels = dict(channels)

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> dict[int, Float[Tensor, "B _ _ _"]]:
        levels, x = {}, images
        for name, stage in self.stages.items():
            if int(name) <= max(self.channels):
                x = stage(x)
                levels[int(name)] = x
        return {level: levels[level] for level in self.channels}

    def keep(self, levels: Iterable[int]) -> None:
        """Give these levels only. The stages above neither run nor learn: DDP refuses weights that nothing uses."""
        self.channels = {level: self.channels[level] for level in sorted(self.channels.keys() & set(levels))}
        for name, stage in self.stages.items():
            if int(name) > max(self.channels):
                stage.requires_grad_(False)

    def give_up(self, level: int) -> nn.Module:
        """The stage that makes this level, the highest, for a head to run it on regions; gone from the backbone.

        Raises OptionError where it has no weights: VGG's stage 5 is a pooling.
        """
        stage = self.stages[str(level)]
        if next(stage.parameters(), None) is None:
            raise OptionError(
                f"stage {level} of this backbone has no weights, so it is no head: use box_head layers, as Fast R-CNN "
                "does on VGG-16 with hidden 4096"
            )
        self.stages.pop(str(level))
        self.channels = {k: n for k, n in self.channels.items() if k != level}
        return stage

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
    stride_in_1x1: bool = False,
) -> Backbone | TimmLevels | SimplePyramid:
    """A backbone by torchvision's name for it, or by timm's after "timm:" (see `fpn.model.timm_backbone`).

    weights: "imagenet" (downloaded by torchvision or timm), "none", or a file with the state dict of their network.
    freeze: how many stages do not learn; 2 where there are weights (as detectron2 does), else 0.
    norm: "frozen" batch norm where there are weights (batches in detection are too small for statistics), else "batch".
    norm_eps: epsilon of the batch norms, where it is not torchvision's own.
    stride_in_1x1: the first 1x1 convolution of a bottleneck halves the map, as in He et al. 2015 and in the weights
        that detectron2 starts from, not the 3x3 one.
    """
    pretrained = str(weights) != "none"
    freeze = default_freeze(pretrained) if freeze is None else freeze
    backbone = network(name, weights)
    if stride_in_1x1:
        move_strides(backbone)
    prepare(backbone, freeze, norm or default_norm(pretrained), norm_eps)
    return backbone


def network(name: str, weights: str | Path) -> Backbone | TimmLevels | SimplePyramid:
    """The backbone of this name with the weights asked for; all of it learns."""
    if name.startswith("timm:"):
        return build_timm(name.removeprefix("timm:"), weights)
    if name.startswith(OWN):
        raise OptionError(
            f"the backbone is a module of its maker's own, {name.removeprefix(OWN)}: give it as backbone= to fpn.build "
            "or to fpn.load for a checkpoint"
        )
    if name not in (*BACKBONES, SPLIT_MOBILENET):
        raise OptionError(f"unknown backbone {name!r}; there are timm:NAME and {', '.join(BACKBONES)}")
    if name == "tiny":
        return tiny(weights)
    model = classifier(name, weights)
    if isinstance(model, VisionTransformer):
        body = PlainViT(model)
        return SimplePyramid(body, body.channels)
    return cut(name, model)


def prepare(backbone: nn.Module, freeze: int, norm: str, norm_eps: float | None = None) -> None:
    """Settle what in a backbone does not learn; options as of `build_backbone`. Stages need its method `freeze`."""
    if freeze not in range(6):
        raise OptionError(f"freeze is {freeze}: a backbone has 5 stages, so it must be 0 to 5")
    if norm not in ("frozen", "batch"):
        raise OptionError(f"backbone norm {norm!r}: it must be frozen or batch")
    if norm == "frozen":
        freeze_batch_norm(backbone)
    else:
        split_batch_norm(backbone)
    for module in backbone.modules():
        if norm_eps is not None and isinstance(module, nn.BatchNorm2d | FrozenBatchNorm2d):
            module.eps = norm_eps
    if freeze:
        if not callable(method := getattr(backbone, "freeze", None)):
            raise OptionError(f"freeze is {freeze}, but the backbone {type(backbone).__name__} has no method `freeze`")
        method(freeze)


def move_strides(backbone: nn.Module) -> None:
    """Let the first 1x1 convolution of each bottleneck take the stride of its 3x3 convolution."""
    for block in backbone.modules():
        if isinstance(block, Bottleneck):
            block.conv1.stride, block.conv2.stride = block.conv2.stride, (1, 1)


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
    name = "mobilenet_v3_large" if name == SPLIT_MOBILENET else name
    # Layers left out by chance are for long training on ImageNet; timm's networks come without them too.
    options = {"stochastic_depth_prob": 0.0} if name in (*CONVNEXTS, *EFFICIENTNETS) else {}
    if str(weights) == "imagenet":
        pretrained = torchvision.models.get_model_weights(name).DEFAULT  # type: ignore[attr-defined]
        try:
            return torchvision.models.get_model(name, weights=pretrained, **options)
        except (OSError, RuntimeError) as error:  # urllib's errors are OSErrors; a bad hash is a RuntimeError
            raise CheckpointError(
                f"the ImageNet weights of {name} could not be downloaded ({error}). Fetch {pretrained.url} on a "
                f"machine with internet and give the file as --weights FILE, or train from scratch with --weights none"
            ) from error
    else:
        model = torchvision.models.get_model(name, weights=None, **options)
    if str(weights) != "none":
        load_classifier(model, Path(weights))
    return model


def load_classifier(model: nn.Module, file: Path) -> None:
    """Load a classification state dict; the classifier itself may be missing or of another size, nothing else may."""
    given, wanted = read_tensors(file), model.state_dict()
    head = ("fc.", "classifier.", "heads.")
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
        whole = any(key.startswith(("backbone.", "module.backbone.")) for key in given)
        hint = "; a whole detector of another library becomes one of fpn by `fpn convert`" if whole else ""
        raise CheckpointError(f"{file} does not fit this backbone: {'; '.join(faults[:3])}{more}{hint}")
    model.load_state_dict({k: v for k, v in given.items() if not k.startswith(head)}, strict=False)


def cut(name: str, model: nn.Module) -> Backbone:
    """Cut a classification network into the five stages; pooling and classifier are dropped."""
    if isinstance(model, ResNet):
        stem = nn.Sequential(model.conv1, model.bn1, model.relu, model.maxpool)
        stages = {1: stem, 2: model.layer1, 3: model.layer2, 4: model.layer3, 5: model.layer4}
        growth = 1 if isinstance(model.layer1[0], BasicBlock) else 4  # a bottleneck's output is 4 times as wide
        return Backbone(stages, {2: 64 * growth, 3: 128 * growth, 4: 256 * growth, 5: 512 * growth})
    if isinstance(model, RegNet):
        stages = dict(enumerate((model.stem, *model.trunk_output.children()), 1))
        return Backbone(stages, widths(stages))
    features = model.get_submodule("features")
    assert isinstance(features, nn.Sequential)
    ends, channels = cut_points(name, features)
    cuts = zip((0, *ends[:-1]), ends, strict=True)
    stages = {level: features[start:end] for level, (start, end) in enumerate(cuts, 1)}
    return Backbone(stages, channels or widths(stages))


def widths(stages: Mapping[int, nn.Module]) -> dict[int, int]:
    """The channels of C2..C5 of these five stages, which are in training mode, found out on a small image."""
    found, x = {}, torch.zeros(1, 3, 32, 32)
    with torch.no_grad():
        for level, stage in stages.items():
            x = stage.eval()(x)
            stage.train()
            found[level] = x.shape[1]
    return {level: found[level] for level in (2, 3, 4, 5)}


def cut_points(name: str, features: nn.Sequential) -> tuple[tuple[int, ...], dict[int, int] | None]:
    """Where the stages end in `features`, and the channels of C2 and so on where the name alone tells them."""
    if name == "mobilenet_v2":
        return (2, 4, 7, 14, 18), {2: 24, 3: 32, 4: 96, 5: 320}
    if name == "mobilenet_v3_large":
        return (2, 4, 7, 13, 16), {2: 24, 3: 40, 4: 112, 5: 160}
    if name == SPLIT_MOBILENET:
        return (2, 4, 7, 13, 14, 17), {2: 24, 3: 40, 4: 112, 5: 160, 6: 960}
    if name in CONVNEXTS:  # the stem has stride 4, and each stage begins with the layer that halves
        return (1, 2, 4, 6, 8), None
    if name in EFFICIENTNETS:  # the last layer belongs to the classifier
        return (2, 3, 4, 6, len(features) - 1), None
    # VGG: C2..C4 are the last layers of its conv3, conv4 and conv5 blocks, C5 the pooled conv5.
    pools = [i for i, layer in enumerate(features) if isinstance(layer, nn.MaxPool2d)]
    return (pools[1] + 1, pools[2], pools[3], pools[4], pools[4] + 1), {2: 256, 3: 512, 4: 512, 5: 512}


class FrozenBatchNorm(FrozenBatchNorm2d):
    """Batch norm with constant statistics, scale and shift, that gives back the precision it is given.

    torchvision's own turns bfloat16 into float32, and with it everything that follows.
    after: what a batch norm of timm's does besides, which is often the activation.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, eps: float, after: nn.Module | None = None):
        super().__init__(channels, eps)
        self.after = after or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return self.after(x)


def freeze_batch_norm(module: nn.Module) -> None:
    """Replace every BatchNorm2d by a frozen one."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d) and child.running_mean is not None:
            after = [child.get_submodule(part) for part in ("drop", "act") if hasattr(child, part)]
            frozen = FrozenBatchNorm(child.num_features, child.eps, nn.Sequential(*after) if after else None)
            with torch.no_grad():
                for key in ("weight", "bias", "running_mean", "running_var"):
                    if (value := getattr(child, key)) is not None:
                        getattr(frozen, key).copy_(value)
            setattr(module, name, frozen)
        else:
            freeze_batch_norm(child)


class BatchNormThen(nn.Module):
    """A batch norm and what comes after it, under the names that weights have without this.

    torch.nn.SyncBatchNorm takes the place of any subclass of BatchNorm2d, and knows nothing of what that does besides.
    """

    def __init__(self, norm: nn.Module, drop: nn.Module, act: nn.Module):
        super().__init__()
        self.norm, self.drop, self.act = norm, drop, act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(self.norm(x)))

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any) -> Any:
        state = super().state_dict(*args, prefix=prefix, **kwargs)
        for key in [key for key in state if key.startswith(f"{prefix}norm.")]:
            state[prefix + key.removeprefix(f"{prefix}norm.")] = state.pop(key)
        return state

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        own = (f"{prefix}drop.", f"{prefix}act.")
        for key in [key for key in state_dict if key.startswith(prefix) and not key.startswith(own)]:
            state_dict[f"{prefix}norm.{key.removeprefix(prefix)}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *rest)


def split_batch_norm(module: nn.Module) -> None:
    """Take every batch norm of timm's apart that does more than its name says."""
    for name, child in module.named_children():
        timms = isinstance(child, nn.BatchNorm2d) and type(child).__module__.startswith("timm.")
        if timms and hasattr(child, "drop") and hasattr(child, "act"):
            drop, act = child.get_submodule("drop"), child.get_submodule("act")
            del child.drop, child.act
            child.__class__ = nn.BatchNorm2d  # with its weights, their device and whether they learn
            setattr(module, name, BatchNormThen(child, drop, act).train(child.training))
        else:
            split_batch_norm(child)
