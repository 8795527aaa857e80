"""The options of a training run, with defaults that fit the data and the machine."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from fpn.data import Split
from fpn.errors import OptionError
from fpn.hardware import pick_device, pick_precision, pick_workers
from fpn.training.schedule import SCHEDULES


@dataclass(frozen=True)
class Settings:
    """Every option of a run, none left open. `batch` is images a step and device; `lr` is for the whole batch."""

    epochs: int
    batch: int
    accumulate: int
    lr: float
    momentum: float
    weight_decay: float
    warmup: int
    schedule: str
    clip: float
    ema: float
    precision: str
    scales: tuple[int, ...]
    flip: float
    jitter: float
    patience: int | None
    seed: int
    workers: int
    device: str
    devices: int
    nodes: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def resolve(
    train: Split,
    short: int,
    *,
    epochs: int | None = None,
    batch: int | None = None,
    accumulate: int = 1,
    lr: float | None = None,
    momentum: float = 0.9,
    weight_decay: float = 1e-4,
    warmup: int | None = None,
    schedule: str = "cosine",
    clip: float = 10.0,
    ema: float = 0.999,
    precision: str = "auto",
    scales: tuple[int, ...] | None = None,
    flip: float = 0.5,
    jitter: float = 0.0,
    patience: int | None = None,
    seed: int = 0,
    workers: int | None = None,
    device: str = "auto",
    devices: int = 1,
    nodes: int = 1,
) -> Settings:
    """Fill in what was left out, and refuse what cannot work with an OptionError."""
    target = pick_device(device)
    batch = default_batch(target) if batch is None else batch
    check_positive(batch=batch, accumulate=accumulate, devices=devices, nodes=nodes)
    whole = batch * accumulate * devices * nodes
    steps = max(1, len(train) // whole)
    epochs = default_epochs(steps) if epochs is None else epochs
    check_positive(epochs=epochs)
    if lr is None:
        lr = default_lr(whole)
    if schedule not in SCHEDULES:
        raise OptionError(f"schedule {schedule!r}: it must be {', '.join(SCHEDULES)}")
    if not 0 <= ema < 1:
        raise OptionError(f"ema is {ema}: it must be 0 (off) or below 1, such as 0.999")
    if not (math.isfinite(lr) and lr > 0):
        raise OptionError(f"lr is {lr}: it must be above 0")
    return Settings(
        epochs=epochs,
        batch=batch,
        accumulate=accumulate,
        lr=lr,
        momentum=momentum,
        weight_decay=weight_decay,
        warmup=min(1000, max(1, steps * epochs // 10)) if warmup is None else warmup,
        schedule=schedule,
        clip=clip,
        ema=ema,
        precision=pick_precision(precision, target),
        scales=tuple(scales) if scales else (short,),
        flip=flip,
        jitter=jitter,
        patience=patience,
        seed=seed,
        workers=pick_workers(workers),
        device=str(target),
        devices=devices,
        nodes=nodes,
    )


def check_positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise OptionError(f"{name} is {value}: it must be 1 or more")


def default_batch(device: torch.device) -> int:
    """4 images on a CPU; on a GPU what fits into its memory with a ResNet-50 at 800 pixels, up to the usual 16."""
    if device.type != "cuda":
        return 4
    gib = torch.cuda.get_device_properties(device).total_memory / 2**30
    return 16 if gib > 38 else 8 if gib > 18 else 4 if gib > 9 else 2


def default_epochs(steps: int) -> int:
    """12, the usual 1x schedule, and more where the data is so small that this makes under 1,000 steps; 60 at most."""
    return min(60, max(12, math.ceil(1000 / steps)))


def default_lr(images: int) -> float:
    """0.02 for 16 images a step (Lin et al. 2017), following the batch linearly (Goyal et al. 2017)."""
    return 0.02 * images / 16
