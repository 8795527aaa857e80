"""What an epoch of training amounted to: mean losses, images a second, the share of time spent waiting for data."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


class Meters:
    """Sums over the steps of an epoch so far. They are part of the state of a run; times are not."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """A new epoch begins."""
        self.sums: dict[str, Tensor] = {}  # stay on the device, so that no step waits for them
        self.counts: dict[str, int] = {}
        self.dropped = self.images = 0
        self.waited = 0.0
        self.began = self.step_ended = time.monotonic()

    def step_begins(self) -> None:
        self.waited += time.monotonic() - self.step_ended

    def step_ends(self, images: int) -> None:
        self.images += images
        self.step_ended = time.monotonic()

    def add(self, values: Mapping[str, Float[Tensor, ""]]) -> None:
        """One step's values by name; not every step need have them all."""
        for name, value in values.items():
            value = value.detach().float()
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] = self.counts.get(name, 0) + 1

    def means(self) -> dict[str, float]:
        """Means over the steps and over all processes."""
        return {name: float(value) / self.counts[name] for name, value in self.shared().items()}

    def shared(self) -> dict[str, Tensor]:
        """The sums' means over all processes; each of them must call this."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()) or not self.sums:
            return self.sums
        values = torch.stack(list(self.sums.values()))
        torch.distributed.all_reduce(values)
        values /= torch.distributed.get_world_size()
        return dict(zip(self.sums, values, strict=True))

    def seconds(self) -> float:
        return time.monotonic() - self.began

    def rate(self) -> float:
        """Images a second on this device, waiting included."""
        return self.images / max(self.step_ended - self.began, 1e-9)

    def waiting(self) -> float:
        """The share of the time so far, 0 to 1, in which the model had nothing to do because images were not ready."""
        return self.waited / max(self.step_ended - self.began, 1e-9)

    def state(self) -> dict[str, Any]:
        sums = {name: value.cpu() for name, value in self.shared().items()}
        return {"sums": sums, "counts": self.counts, "dropped": self.dropped}

    def load(self, state: Mapping[str, Any], device: torch.device) -> None:
        self.start()
        self.sums = {name: value.to(device) for name, value in state["sums"].items()}
        self.counts, self.dropped = dict(state["counts"]), state["dropped"]
