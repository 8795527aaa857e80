"""Images out of whole numbers alone: the same to the last bit on every machine and with every version of a library.

A detector and the file made from it are compared on these, by whoever exports it and by whoever checks the file later.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

OBJECTS = 7
LARGEST = 1600  # pixels of the shorter side, whatever a file asks for


@dataclass(frozen=True)
class Case:
    """Images to compare on, uint8 (3, H, W) each: one at a time, or all of them as one batch."""

    name: str
    images: Sequence[Tensor]
    together: bool = False

    @property
    def calls(self) -> Iterator[list[Tensor]]:
        """The batches; an image that a sequence reads from its file is read when its turn comes."""
        return iter([list(self.images)]) if self.together else ([image] for image in self.images)


def cases(short: int) -> list[Case]:
    """What an exported detector could stumble over, in sizes that fit one whose images have this shorter side."""
    short = min(short, LARGEST)
    near, odd = short * 4 // 3, short | 1
    small, tall = (short * 3 // 5 | 1, short * 7 // 9 | 1), (2 * short + 1, short // 3 | 1)
    batch = [scene((odd, near), 8), plain((odd, near), 128, 9), scene((odd, near), 10)]
    return [
        Case("usual sizes", [scene((short, near), 1), scene((near, short), 2)]),
        Case("odd sizes", [scene(small, 3), scene(tall, 4)]),
        Case("1 pixel wide or high", [scene((odd, 1), 5), scene((1, short // 2 | 1), 6), scene((1, 1), 7)]),
        Case("nothing to see", [plain((short, odd), level, level) for level in (8, 128, 247)]),
        Case("a batch of 3", batch, together=True),
    ]


def digest(images: Sequence[UInt8[Tensor, "3 _ _"]]) -> str:
    """The SHA-256 of sizes and pixels."""
    state = hashlib.sha256()
    for image in images:
        state.update(f"{tuple(image.shape)}".encode())
        state.update(image.numpy().tobytes())
    return state.hexdigest()


def plain(size: tuple[int, int], level: int, seed: int) -> UInt8[Tensor, "3 H W"]:
    """One brightness with a little noise, without which every place would score the same and chance would decide."""
    return pixels_of(level + noise(np.random.PCG64(seed), (3, *size), 15) - 7)


def scene(size: tuple[int, int], seed: int) -> UInt8[Tensor, "3 H W"]:
    """Discs, rings and boxes of several sizes, shaded, on a background that changes slowly, with noise."""
    chance = np.random.PCG64(seed)
    height, width = size
    y, x = np.arange(height)[:, None], np.arange(width)[None, :]
    first, second = numbers(chance, 3, 60, 200)[:, None, None], numbers(chance, 3, 60, 200)[:, None, None]
    pixels = first + (second - first) * (x + y) // max(1, height + width - 2)
    for number in range(OBJECTS):
        reach = max(1, max(size) // (3 + 3 * number))
        tall, wide = (max(1, int(side)) for side in numbers(chance, 2, reach // 2, reach + 1))
        down, across = int(numbers(chance, 1, 0, height)[0]), int(numbers(chance, 1, 0, width)[0])
        inside = (abs(y - down) <= tall) & (abs(x - across) <= wide)
        # Of an ellipse, 1024 times the squared distance from its middle.
        round_ = 1024 * (y - down) ** 2 // tall**2 + 1024 * (x - across) ** 2 // wide**2
        shape = (inside, round_ <= 1024, (round_ <= 1024) & (round_ >= 300))[number % 3]
        colour = numbers(chance, 3, 0, 256)[:, None, None]
        shade = 60 * (across - x) // wide + 60 * (down - y) // tall
        pixels = np.where(shape, colour + shade, pixels)
    return pixels_of(pixels + noise(chance, pixels.shape, 13) - 6)


def numbers(chance: np.random.PCG64, count: int, low: int, high: int) -> Int64[np.ndarray, " _"]:
    """Whole numbers from low to below high, of the bare generator: what numpy makes of one may change, its bits not."""
    return low + (chance.random_raw(count) % max(1, high - low)).astype(np.int64)


def noise(chance: np.random.PCG64, shape: tuple[int, ...], levels: int) -> Int64[np.ndarray, "_ _ _"]:
    return numbers(chance, int(np.prod(shape)), 0, levels).reshape(shape)


def pixels_of(values: Int64[np.ndarray, "3 H W"]) -> UInt8[Tensor, "3 H W"]:
    return torch.from_numpy(values.clip(0, 255).astype(np.uint8))
