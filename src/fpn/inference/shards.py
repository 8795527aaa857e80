"""Several processes that share the pictures of one run, as torchrun starts them on one machine or many."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

PATIENCE = timedelta(days=30)  # the first to be done waits for the last; torchrun ends all where one fails


@dataclass(frozen=True)
class Shard:
    """Process number `rank` of `world`: every world-th picture is its own."""

    rank: int = 0
    world: int = 1

    def gathered(self, texts: list[str]) -> list[str]:
        """The texts of all processes, once the last has come to this line."""
        if self.world == 1:
            return texts
        parts: list[list[str]] = [[] for _ in range(self.world)]
        dist.all_gather_object(parts, texts)
        return [text for part in parts for text in part]


def place() -> tuple[int, int]:
    """Which of how many processes this is: 0 of 1, unless torchrun has started several."""
    if not dist.is_available() or not dist.is_torchelastic_launched():
        return 0, 1
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def shard() -> Iterator[Shard]:
    """The part of this process, which can speak to the others."""
    rank, world = place()
    if world == 1:
        yield Shard()
        return
    dist.init_process_group("gloo", timeout=PATIENCE)
    try:
        yield Shard(rank, world)
    finally:
        dist.destroy_process_group()


def own_device(wanted: str) -> str:
    """The GPU of this process, where torchrun has started one for each."""
    if wanted in ("auto", "cuda") and "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        return f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"
    return wanted
