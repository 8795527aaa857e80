"""Pixels in to boxes out: every path of fpn beside torchvision's own, on the same weights and pixels, turn by turn.

    python benchmarks/latency.py                                     # Faster R-CNN R50-FPN, 800 x 1216, one image
    python benchmarks/latency.py --model retinanet --sides fused fused:bf16 openvino:int8
    python benchmarks/latency.py --batch 4 --sides fused

Weights are seeded, with head layers wide enough that there is much to find. torchvision runs as its documentation says:
eval mode, float32 pixels from 0 to 1. int8 is fitted to generated scenes. Prints a Markdown table: median milliseconds
an image with quartiles, times as fast as torchvision (median and quartiles of the turns), the most memory that a
process with this side alone has had at once while detecting, and how far the detections are apart. Random weights tell
nothing about low precision, because scores lie so close together that any rounding changes which boxes are the best:
for that see `fpn bench` on a detector that was trained.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torchvision
from harness import alone, alternate, apart, machine, ratios, shown
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from fpn.backends.choose import ready
from fpn.backends.file import as_file
from fpn.exporting.scenes import scene
from fpn.inference.finder import finder
from fpn.memory import most
from fpn.structures import Detections
from fpn.weights.torchvision import from_torchvision

MODELS = {
    "faster_rcnn": torchvision.models.detection.fasterrcnn_resnet50_fpn,
    "retinanet": torchvision.models.detection.retinanet_resnet50_fpn,
    "fcos": torchvision.models.detection.fcos_resnet50_fpn,
}
PEER, CPU = "torchvision", torch.device("cpu")
SIDES = ("eager", "fused", "fused:bf16", "onnx", "openvino", "openvino:bf16", "openvino:int8")
CALIBRATION = 16  # scenes that int8 is fitted to

Side = Callable[[Sequence[Tensor]], list[Detections]]


def peer_of(name: str, classes: int = 91) -> nn.Module:
    """torchvision's model with seeded weights whose outputs are spread out, so that there is much to find."""
    torch.manual_seed(0)
    model = MODELS[name](weights=None, weights_backbone=None, num_classes=classes).eval()
    for part, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d | FrozenBatchNorm2d):
            norm: Any = module
            norm.running_mean.normal_(0, 0.1)
            norm.running_var.uniform_(0.5, 1.5)
            norm.weight.data.uniform_(0.5, 1.0)
        elif "_head.conv." in part and isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        elif any(word in part for word in ("cls_", "bbox_")) and isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.normal_(module.weight, std=0.3 if part.endswith("cls_score") else 0.05)
            if name == "fcos" and part.endswith("bbox_reg") and module.bias is not None:
                nn.init.constant_(module.bias, 4.0)  # distances of about 4 strides: torchvision keeps boxes of no size
    return model


def side_of(name: str, peer: nn.Module) -> Side:
    """A side by its name: torchvision, or a backend of fpn, with its precision after a colon."""
    detector = from_torchvision(peer)
    if name == PEER:
        return lambda images: ask(peer, images, detector.classes)
    backend, _, precision = name.partition(":")
    if precision == "int8":
        made = as_file(detector, backend, "int8", [scene((800, 1088), seed) for seed in range(CALIBRATION)])
    else:
        made = ready(detector, backend, precision or "fp32")
    return finder(made)


@torch.inference_mode()
def ask(model: nn.Module, images: Sequence[Tensor], classes: tuple[str, ...]) -> list[Detections]:
    return [detections_in(one, classes) for one in model([image.float() / 255 for image in images])]


def detections_in(found: dict[str, torch.Tensor], classes: tuple[str, ...]) -> Detections:
    """What torchvision found in one image, on the CPU."""
    boxes, scores, labels = (found[name].float().cpu() for name in ("boxes", "scores", "labels"))
    labels, count = labels.to(torch.int64) - 1, torch.tensor(len(scores))
    return Detections(boxes, scores, labels, torch.zeros_like(labels), count, classes)


def memory_of(name: str, model: str, images: list[Tensor], classes: int) -> float | None:
    """MiB at most while detecting, of a process that does nothing else."""
    side = side_of(name, peer_of(model, classes))
    side(images)
    return most(lambda: side(images), CPU)


def mebibytes(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def rows(
    model: str, names: Sequence[str], images: list[Tensor], repeats: int, classes: int = 91, memory: bool = True
) -> list[list[str]]:
    """Name, milliseconds an image, ratio, MiB and results of torchvision and of each side."""
    sides = {name: side_of(name, peer_of(model, classes)) for name in (PEER, *names)}
    seconds = alternate({name: lambda side=side: side(images) for name, side in sides.items()}, repeats)
    times, expected, made = ratios(seconds, PEER), sides[PEER](images)[0], []
    for name, side in sides.items():
        took = shown([1000 * value / len(images) for value in seconds[name]], 0)
        mib = mebibytes(alone(memory_of, name, model, images, classes) if memory else None)
        made.append([name, took, shown(times[name]), mib, apart(side(images)[0], expected)])
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="faster_rcnn")
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1216), metavar=("H", "W"))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--classes", type=int, default=91, help="torchvision's count, with background")
    parser.add_argument("--sides", nargs="*", default=SIDES, help=f"{', '.join(SIDES)}, compiled, compiled:bf16")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args()
    images = [scene(tuple(options.size), seed) for seed in range(options.batch)]
    print(f"{options.model}, {options.batch} x {options.size[0]} x {options.size[1]}; {machine()}\n")
    print("| | ms an image (quartiles) | times as fast (quartiles) | MiB | results |\n|---|---|---|---|---|")
    for row in rows(options.model, options.sides, images, options.repeats, options.classes, options.memory):
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
