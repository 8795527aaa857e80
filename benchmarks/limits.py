"""What a machine can do at best beside what a detector needs: the least time that an image can take.

    python benchmarks/limits.py                      # on the CPU; --device cuda on a GPU

The floating-point operations of a model are counted (torch.utils.flop_counter: convolutions and linear layers, which
are all but a few of them), and the bytes that it must move at least: its weights, and the output of every convolution
and linear layer written and read once. What the machine can do is measured: the fastest of a matrix product and of
single convolutions for operations, a copy of memory that fits no cache for bytes. Prints a Markdown table of the least
milliseconds by operations and by bytes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from harness import machine, wait
from latency import MODELS, peer_of
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fpn.backends.fused import fused
from fpn.exporting.scenes import scene
from fpn.inference.finder import finder
from fpn.weights.torchvision import from_torchvision

CONVOLUTIONS = ((256, 3, 100, 152), (512, 3, 25, 38), (1024, 1, 100, 152))  # channels, kernel, height, width
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def best(work: Callable[[], object], seconds: float = 2.0) -> float:
    """The shortest time of many runs."""
    work()
    found, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end or len(found) < 3:
        wait()
        start = time.perf_counter()
        work()
        wait()
        found.append(time.perf_counter() - start)
    return min(found)


@torch.inference_mode()
def operations_a_second(kind: torch.dtype, device: str) -> float:
    """The highest rate of a matrix product and of convolutions as they are in these models, whichever is fastest."""
    side, images = (2048, 1) if device == "cpu" else (8192, 16)
    a, b = (torch.randn(side, side, device=device).to(kind) for _ in range(2))
    rates = [2 * side**3 / best(lambda: a @ b)]
    for channels, kernel, height, width in CONVOLUTIONS:
        conv = nn.Conv2d(channels, channels, kernel, padding=kernel // 2, device=device, dtype=kind)
        conv = conv.to(memory_format=torch.channels_last)
        x = torch.randn(images, channels, height, width, device=device).to(kind)
        x = x.contiguous(memory_format=torch.channels_last)
        work = 2 * images * height * width * channels**2 * kernel**2
        rates.append(work / best(lambda conv=conv, x=x: conv(x)))
    return max(rates)


def bytes_a_second(device: str) -> float:
    a = torch.empty(2**28 if device == "cpu" else 2**32, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    return 2 * len(a) / best(lambda: b.copy_(a))


def needs(model: str, size: tuple[int, int]) -> tuple[float, float]:
    """Operations, and bytes in float32, of one image."""
    detector = fused(from_torchvision(peer_of(model)))
    moved = [4 * sum(p.numel() for p in detector.parameters())]
    for module in detector.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(lambda _, args, out: moved.append(2 * 4 * out.numel()))
    find, image = finder(detector, "cpu"), scene(size, seed=0)
    with FlopCounterMode(display=False) as counter:
        find([image])
    return counter.get_total_flops(), sum(moved)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1216), metavar=("H", "W"))
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    speed = {name: operations_a_second(kind, options.device) for name, kind in TYPES.items()}
    width = bytes_a_second(options.device)
    print(f"{options.size[0]} x {options.size[1]}; {machine()}")
    print(f"{', '.join(f'{name} {v / 1e9:.0f} GFLOP/s' for name, v in speed.items())}; ", end="")
    print(f"memory {width / 1e9:.1f} GB/s\n")
    print("| | GFLOP | MB moved (fp32) | least ms, fp32 | least ms, bf16 | by bytes, fp32 |\n|---|---|---|---|---|---|")
    for model in MODELS:
        work, moved = needs(model, tuple(options.size))
        least = " | ".join(f"{1000 * work / speed[name]:.0f}" for name in TYPES)
        print(f"| {model} | {work / 1e9:.0f} | {moved / 1e6:.0f} | {least} | {1000 * moved / width:.0f} |")


if __name__ == "__main__":
    main()
