"""One step of training on a CPU: forward, backward, clipping and SGD, beside torchvision's on the same weights.

    python benchmarks/training_step.py                                        # Faster R-CNN R50-FPN, 2 x 512 x 512
    python benchmarks/training_step.py --model retinanet --batch 4 --size 384 640

Both sides are set up as for fine-tuning a pretrained detector: batch norms frozen, conv1 and layer1 fixed
(torchvision's `trainable_backbone_layers=3`, fpn's `freeze=2`). torchvision runs as in its reference scripts:
`model.train()`, float pixels from 0 to 1, the sum of its losses, SGD with momentum. fpn does what a step of `fpn.train`
does: gradients are clipped, and a moving average follows the weights. Weights are seeded.

Each side has a process of its own, and they take turns. Prints a Markdown table: seconds and CPU seconds of all threads
(steadier where other programs run), times as fast as torchvision by either, turn by turn (medians and quartiles); peak
memory; and the loss terms of the first step. Those of bf16 differ by rounding, those of Faster R-CNN also because each
side draws its own examples.
"""

from __future__ import annotations

import argparse
import copy
import resource
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import torch
from harness import alternate, machine, ratios, shown
from latency import MODELS, PEER
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from fpn.exporting.scenes import scene
from fpn.structures import Batch, Targets
from fpn.training.learner import sgd, update_average
from fpn.training.options import Options
from fpn.weights.torchvision import from_torchvision

TERMS = {
    "loss_objectness": "rpn_class",
    "loss_rpn_box_reg": "rpn_box",
    "loss_classifier": "class",
    "loss_box_reg": "box",
    "classification": "class",
    "bbox_regression": "box",
    "bbox_ctrness": "centerness",
}
SIDES = (PEER, "fpn", "fpn, bf16")
OBJECTS, RATE = 8, 1e-4  # objects an image; a rate at which random weights stay sane


def peer_of(name: str) -> nn.Module:
    """torchvision's model as one that starts from ImageNet weights, but with random ones."""
    torch.manual_seed(0)
    model = MODELS[name](weights=None, weights_backbone=None, num_classes=91)
    freeze_norms(model.backbone)
    for part, parameter in model.named_parameters():
        if part.startswith(("backbone.body.conv1", "backbone.body.layer1")):
            parameter.requires_grad_(False)
    return model.train()


def freeze_norms(module: nn.Module) -> None:
    """torchvision's own frozen batch norms; weak ones at the end of a block, or 16 blocks would blow the maps up."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            norm: Any = FrozenBatchNorm2d(child.num_features)
            norm.weight.uniform_(0.1, 0.3) if name == "bn3" else norm.weight.uniform_(0.5, 1.0)
            norm.running_mean.normal_(0, 0.1)
            norm.running_var.uniform_(0.5, 1.5)
            setattr(module, name, norm)
        else:
            freeze_norms(child)


def examples(batch: int, size: tuple[int, int]) -> Batch:
    """Images with boxes of all sizes, each from 8 pixels a side to most of the image."""
    height, width = size
    generator = torch.Generator().manual_seed(0)
    images = torch.stack([scene(size, seed) for seed in range(batch)])
    sides = torch.rand(batch, OBJECTS, 2, generator=generator) ** 2 * 0.8 * torch.tensor([width, height]) + 8
    corner = torch.rand(batch, OBJECTS, 2, generator=generator) * (torch.tensor([width, height]) - sides)
    labels = torch.randint(90, (batch, OBJECTS), generator=generator)
    targets = Targets(torch.cat([corner, corner + sides], 2), labels, torch.ones(batch, OBJECTS, dtype=torch.bool))
    sizes = torch.tensor([size] * batch)
    return Batch(images, sizes, sizes, torch.arange(batch), targets, keys=torch.arange(batch))


def torchvision_step(model: Any, batch: Batch) -> Callable[[], dict[str, float]]:
    assert batch.targets is not None
    short, long = sorted(batch.images.shape[-2:])
    model.transform.min_size, model.transform.max_size = (short,), long
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], RATE, 0.9, weight_decay=1e-4)
    # Its one-stage models have a class 0 like any other, which no box is of.
    rows = zip(batch.targets.boxes, batch.targets.labels + 1, strict=True)
    targets = [{"boxes": boxes, "labels": labels} for boxes, labels in rows]

    def step() -> dict[str, float]:
        losses = model([image.float() / 255 for image in batch.images], targets)
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
        return {name: losses[theirs].item() for theirs, name in TERMS.items() if theirs in losses}

    return step


def fpn_step(model: Any, batch: Batch, bf16: bool) -> Callable[[], dict[str, float]]:
    """As Lightning runs `fpn.training.learner.Learner`."""
    detector: Any = from_torchvision(model).train()
    detector.backbone.freeze(2)
    average = copy.deepcopy(detector).requires_grad_(False)
    optimizer = sgd(detector, RATE, Options.momentum, Options.weight_decay)
    parameters = [p for p in detector.parameters() if p.requires_grad]

    def step() -> dict[str, float]:
        with torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext():
            losses = detector.losses(batch)
            loss = torch.stack([detector.loss_weights[name] * value for name, value in losses.items()]).sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, Options.clip)
        optimizer.step()
        update_average(average, detector, Options.ema)
        return {name: value.item() for name, value in losses.items()}

    return step


def serve(side: str, model: str, size: tuple[int, int], batch: int, threads: int, connection: Connection) -> None:
    """A process of one side: takes a step when it is asked to; tells its loss terms, CPU seconds and peak megabytes."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    peer, data = peer_of(model), examples(batch, size)
    step = torchvision_step(peer, data) if side == PEER else fpn_step(peer, data, side.endswith("bf16"))
    del peer
    while connection.recv():
        before = time.process_time()
        losses = step()
        spent, peak = time.process_time() - before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        connection.send((losses, spent, peak / 1024))


def ask(connection: Connection, told: list[tuple[dict[str, float], float, float]]) -> None:
    connection.send(True)
    told.append(connection.recv())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="faster_rcnn")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--size", type=int, nargs=2, default=(512, 512), metavar=("H", "W"))
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    context, size = get_context("spawn"), tuple(options.size)
    sides: dict[str, Callable[[], None]] = {}
    told: dict[str, list] = {side: [] for side in options.sides}
    connections = []
    for side in options.sides:
        ours, theirs = context.Pipe()
        arguments = (side, options.model, size, options.batch, torch.get_num_threads(), theirs)
        context.Process(target=serve, args=arguments, daemon=True).start()
        connections.append(ours)
        sides[side] = partial(ask, ours, told[side])
    print(f"{options.model}, {options.batch} x {size[0]} x {size[1]}; {machine()}\n")
    seconds = alternate(sides, options.repeats, warmup=2)
    for connection in connections:
        connection.send(False)
    cpu = {side: [spent for _, spent, _ in told[side][-options.repeats :]] for side in sides}
    columns = [seconds, ratios(seconds, options.sides[0]), cpu, ratios(cpu, options.sides[0])]
    names = ("", "s", "times as fast", "CPU s", "times as fast", "peak MB", "losses of the first step")
    print(f"| {' | '.join(names)} |\n|{'---|' * len(names)}")
    for side in sides:
        cells = [shown(column[side]) for column in columns]
        losses = ", ".join(f"{name} {value:.4f}" for name, value in told[side][0][0].items())
        print(f"| {side} | {' | '.join(cells)} | {told[side][-1][2]:.0f} | {losses} |")


if __name__ == "__main__":
    main()
