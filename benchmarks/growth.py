"""How time and memory grow with the batch, the classes and the boxes of an image, beside torchvision's.

    python benchmarks/growth.py                      # all three
    python benchmarks/growth.py --by classes --values 1 80 1200

Faster R-CNN R50-FPN with seeded weights, float32. Batches and classes are of detecting, with fpn's fused
backend; boxes are of the losses of a training step without its backward pass, in which matching is. Prints a Markdown
table for each; see `latency.py` for what is in it. How loading grows with boxes is in `loading.py`, how evaluation does
with images and classes in `coco_eval.py`, and how reading does with annotations in `read_annotations.py`.
"""

from __future__ import annotations

import argparse

import torch
from harness import alone, alternate, machine, ratios, shown
from latency import CPU, PEER, mebibytes, peer_of, rows
from torch import Tensor

from fpn.data.batching import collate
from fpn.exporting.scenes import scene
from fpn.memory import most
from fpn.structures import Sample
from fpn.weights.torchvision import from_torchvision

VALUES = {"batch": (1, 2, 4, 8), "classes": (1, 20, 80, 300, 1200),
          "boxes": (0, 10, 100, 1000, 5000)}  # fmt: skip
HEAD = "| ms an image (quartiles) | times as fast (quartiles) | MiB | results"
SIDE = 800  # pixels of the shorter side, to which both sides resize other images


def detecting(by: str, value: int, repeats: int) -> list[list[str]]:
    batch, classes = (value if by == name else usual for name, usual in (("batch", 1), ("classes", 80)))
    images = [scene((SIDE, SIDE * 3 // 2), seed) for seed in range(batch)]
    return rows("faster_rcnn", ["fused"], images, repeats, classes + 1)


def boxes_of(count: int, size: int) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    corner = torch.rand(count, 2, generator=draw) * size * 0.8
    return torch.cat([corner, corner + 4 + torch.rand(count, 2, generator=draw) * size * 0.15], dim=1)


def losing(side: str, count: int):
    """A side as a function that works out the losses of one image with so many boxes."""
    peer, image, size = peer_of("faster_rcnn"), scene((640, 640), 0), 640
    peer.train()
    for module in peer.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()
    boxes, labels = boxes_of(count, size), torch.arange(count) % 90
    if side == PEER:
        peer.transform.min_size, peer.transform.max_size = (size,), size  # pyright: ignore
        return lambda: peer([image.float() / 255], [{"boxes": boxes, "labels": labels + 1}])
    detector = from_torchvision(peer).train()
    batch = collate([Sample(image, boxes, labels, 0, (size, size))])
    assert batch is not None
    return lambda: detector.losses(batch)


@torch.no_grad()
def memory_of_losses(side: str, count: int) -> float | None:
    run = losing(side, count)
    run()
    return most(run, CPU)


@torch.no_grad()
def learning(count: int, repeats: int) -> list[list[str]]:
    seconds = alternate({side: losing(side, count) for side in (PEER, "fpn")}, repeats)
    times, made = ratios(seconds, PEER), []
    for side in seconds:
        took = shown([1000 * value for value in seconds[side]], 0)
        made.append([side, took, shown(times[side]), mebibytes(alone(memory_of_losses, side, count)), "-"])
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--by", choices=VALUES, nargs="*", default=tuple(VALUES))
    parser.add_argument("--values", type=int, nargs="*", help="in place of those of --by, which must be one")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    print(machine())
    for by in options.by:
        print(f"\n| {by} | {HEAD} |\n|{'---|' * 6}")
        for value in options.values or VALUES[by]:
            found = learning(value, options.repeats) if by == "boxes" else detecting(by, value, options.repeats)
            for row in found:
                print(f"| {value} | {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
