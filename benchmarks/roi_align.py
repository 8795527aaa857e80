"""RoIAlign over a pyramid: fpn's weighted gather against torchvision's MultiScaleRoIAlign, in the same run.

    python benchmarks/roi_align.py

Alternates the two sides on the same maps and regions and prints the median seconds, the ratio of each pair and the
largest difference of the results.
"""

from __future__ import annotations

import statistics
import time

import torch
from torchvision.ops import MultiScaleRoIAlign

from fpn.model.roi import assign_levels, pool_regions

# name: images, height, width, channels, regions an image
CASES = {"detection, 800 x 1216": (1, 800, 1216, 256, 1000), "training, 4 x 320 x 448": (4, 320, 448, 128, 512)}


def regions(images: int, height: int, width: int, count: int) -> torch.Tensor:
    corner = torch.rand(images, count, 2) * torch.tensor([width, height]) * 0.8
    size = torch.exp(torch.rand(images, count, 2) * 4 + 2)
    return torch.minimum(torch.cat([corner, corner + size], -1), torch.tensor([width, height] * 2))


def once(pool, maps: dict[int, torch.Tensor]) -> tuple[torch.Tensor, float, float]:
    """The result and the seconds of the forward and the backward pass."""
    start = time.perf_counter()
    out = pool(maps)
    middle = time.perf_counter()
    out.backward(torch.ones_like(out))
    return out.detach(), middle - start, time.perf_counter() - middle


def compare(images: int, height: int, width: int, channels: int, count: int, repeats: int = 7) -> None:
    torch.manual_seed(0)
    boxes = regions(images, height, width, count)
    levels = assign_levels(boxes, 2, 5)
    maps = {k: torch.randn(images, channels, height >> k, width >> k) for k in (2, 3, 4, 5)}
    maps = {k: m.contiguous(memory_format=torch.channels_last).requires_grad_() for k, m in maps.items()}
    theirs = MultiScaleRoIAlign([str(k) for k in maps], 7, 2)
    sides = {
        "fpn": lambda m: pool_regions(m, boxes, levels, method="align_v1"),
        "torchvision": lambda m: theirs({str(k): v for k, v in m.items()}, list(boxes), [(height, width)] * images),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    results = {}
    for turn in range(repeats + 1):
        for name, pool in sides.items():
            results[name], forward, backward = once(pool, maps)
            if turn:  # the first is a warm-up
                times[name].append((forward, backward))
    for i, part in enumerate(("forward", "backward")):
        mine, other = ([pair[i] for pair in times[name]] for name in sides)
        ratios = [b / a for a, b in zip(mine, other, strict=True)]
        print(
            f"  {part:<9} fpn {statistics.median(mine):.3f} s, torchvision {statistics.median(other):.3f} s, ", end=""
        )
        print(f"{statistics.median(ratios):.1f} times as fast ({min(ratios):.1f} to {max(ratios):.1f})")
    print(f"  largest difference {(results['fpn'] - results['torchvision']).abs().max():.1e}")


if __name__ == "__main__":
    for title, case in CASES.items():
        print(f"{title}, {case[-1]} regions an image, {case[-2]} channels, {torch.get_num_threads()} threads")
        compare(*case)
