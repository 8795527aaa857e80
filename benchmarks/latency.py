"""One image, pixels in to boxes out: every path of fpn beside torchvision's own, on the same weights and pixels.

    python benchmarks/latency.py                                     # Faster R-CNN R50-FPN, 800 x 1216, eager
    python benchmarks/latency.py --model retinanet --backends onnx openvino openvino:bf16

Weights are seeded, with head layers wide enough that there is much to find. torchvision runs as its documentation says:
eval mode, float pixels from 0 to 1. Prints a Markdown table: median milliseconds with quartiles, times as fast as
torchvision (median and quartiles of the turns), and how far the detections are apart.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torchvision
from harness import alternate, apart, machine, ratios, spread
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from fpn.exported import SUFFIXES, backend, find_in
from fpn.exporting.scenes import scene
from fpn.inference.finder import finder
from fpn.structures import Detections
from fpn.weights.torchvision import from_torchvision

MODELS = {
    "faster_rcnn": torchvision.models.detection.fasterrcnn_resnet50_fpn,
    "retinanet": torchvision.models.detection.retinanet_resnet50_fpn,
    "fcos": torchvision.models.detection.fcos_resnet50_fpn,
}
PEER = "torchvision"


def peer_of(name: str) -> nn.Module:
    """torchvision's model with seeded weights whose outputs are spread out, so that there is much to find."""
    torch.manual_seed(0)
    model = MODELS[name](weights=None, weights_backbone=None, num_classes=91).eval()
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
    return model


@torch.inference_mode()
def ask(model: nn.Module, image: torch.Tensor, classes: tuple[str, ...]) -> Detections:
    return detections_in(model([image.float() / 255])[0], classes)


def detections_in(found: dict[str, torch.Tensor], classes: tuple[str, ...]) -> Detections:
    """What torchvision found in one image, on the CPU."""
    boxes, scores, labels = (found[name].float().cpu() for name in ("boxes", "scores", "labels"))
    labels, count = labels.to(torch.int64) - 1, torch.tensor(len(scores))
    return Detections(boxes, scores, labels, torch.zeros_like(labels), count, classes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="faster_rcnn")
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1216), metavar=("H", "W"))
    parser.add_argument("--backends", nargs="*", default=[], help="onnx, openvino, openvino:bf16, torch")
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    theirs = peer_of(options.model)
    ours = from_torchvision(theirs)
    image = scene(tuple(options.size), seed=0)
    sides: dict[str, Callable[[], Detections]] = {PEER: lambda: ask(theirs, image, ours.classes)}
    finds = {"fpn": finder(ours, "cpu")}
    with tempfile.TemporaryDirectory() as folder:
        for name in options.backends:
            kind, _, precision = name.partition(":")
            suffix = SUFFIXES[kind]
            file, module = Path(folder) / f"{precision}{kind}{suffix}", backend(kind)
            module.write(ours, file, precision or "fp32")
            finds[f"fpn, {name}"] = partial(find_in, module.open_(file), ours.classes)
        sides |= {name: lambda find=find: find([image])[0] for name, find in finds.items()}
        print(f"{options.model}, {options.size[0]} x {options.size[1]}; {machine()}\n")
        seconds = alternate(sides, options.repeats)
        times = ratios(seconds, PEER)
        print("| | ms (quartiles) | times as fast (quartiles) | results |\n|---|---|---|---|")
        for name, run in sides.items():
            took = "{:.0f} ({:.0f} to {:.0f})".format(*(1000 * value for value in spread(seconds[name])))
            ratio = "{:.2f} ({:.2f} to {:.2f})".format(*spread(times[name]))
            print(f"| {name} | {took} | {ratio} | {apart(run(), sides[PEER]())} |")


if __name__ == "__main__":
    main()
