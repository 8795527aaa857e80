"""What a training run does: its options, with defaults that fit the data and the machine."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from fpn.data import PRESETS, Augmentation, Split
from fpn.errors import OptionError
from fpn.hardware import check_devices, pick_device, pick_precision, pick_workers
from fpn.training.options import Options
from fpn.training.schedule import SCHEDULES

NEW_IMAGES = ("lsj", "crop", "mosaic", "mixup", "copy_paste")  # augmentations that cut images or join several


@dataclass(frozen=True)
class Settings:
    """The options of a run with none left open; stored as `training` in the run's config.yaml."""

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
    augment: str
    flip: float
    vertical_flip: float
    lsj: tuple[float, float]
    crop: float
    jitter: float
    mosaic: float
    mixup: float
    copy_paste: float
    patience: int | None
    on_nan: str
    save_minutes: float
    deterministic: bool
    seed: int
    workers: int
    device: str
    devices: int
    nodes: int


def resolve(options: Options, train: Split, short: int) -> Settings:
    """Fill in what was left out for a training split and a detector's input size.

    Raises OptionError for what cannot work.
    """
    assert options.batch != "auto", "the caller finds the batch size"
    given = vars(options)
    check(**given)
    device = pick_device(options.device)
    check_devices(device, options.devices)
    batch = options.batch or default_batch(device)
    images = batch * options.accumulate * options.devices * options.nodes
    steps = max(1, len(train) // images)
    epochs = options.epochs or default_epochs(steps)
    filled = {
        "batch": batch,
        "epochs": epochs,
        "lr": options.lr or default_lr(images),
        "warmup": min(1000, max(1, steps * epochs // 10)) if options.warmup is None else options.warmup,
        "precision": pick_precision(options.precision, device),
        "scales": tuple(options.scales or (short,)),
        **pick_augmentation(options, epochs, train.regions is not None),
        "workers": pick_workers(options.workers),
        "device": str(device),
    }
    return Settings(**{**given, **filled})


def check(**given: Any) -> None:
    """Refuse values that cannot work; None is still to be filled in."""
    for name in ("epochs", "batch", "accumulate", "patience", "devices", "nodes"):
        if given[name] not in (None, "auto") and given[name] < 1:
            raise OptionError(f"{name} is {given[name]}: it must be 1 or more")
    for name in ("lr", "momentum", "weight_decay", "warmup", "clip", "save_minutes"):
        if given[name] is not None and not (math.isfinite(given[name]) and given[name] >= 0):
            raise OptionError(f"{name} is {given[name]}: it must not be negative")
    if given["lr"] == 0:
        raise OptionError("lr is 0: nothing would be learnt; it must be above 0")
    if given["augment"] not in ("auto", *PRESETS):
        raise OptionError(f"augment {given['augment']!r}: it must be auto, {', '.join(PRESETS)}")
    if given["scales"] is not None and (not given["scales"] or min(given["scales"]) < 32):
        raise OptionError(f"scales {list(given['scales'])}: each must be at least 32 pixels")
    if not 0 <= given["seed"] < 2**32:
        raise OptionError(f"seed is {given['seed']}: it must be from 0 to 4294967295")
    if not 0 <= given["ema"] < 1:
        raise OptionError(f"ema is {given['ema']}: it must be 0 (off) or below 1, such as 0.999")
    if given["on_nan"] not in ("stop", "skip"):
        raise OptionError(f"on_nan {given['on_nan']!r}: it must be stop or skip")
    if given["schedule"] not in SCHEDULES:
        raise OptionError(f"schedule {given['schedule']!r}: it must be {', '.join(SCHEDULES)}")


def pick_augmentation(options: Options, epochs: int, regions: bool = False) -> dict[str, Any]:
    """The preset, chosen where it is "auto", and each of its parts as the options or else the preset have it.

    Raises OptionError where an image would be cut or made of several, and there are saved regions, which stay behind.
    """
    usual = "light" if regions else default_augment(epochs)
    name = usual if options.augment == "auto" else options.augment
    given = {part: getattr(options, part) for part in vars(PRESETS[name])}
    given["lsj"] = None if options.lsj is None else tuple(options.lsj)
    chosen = replace(PRESETS[name], **{part: value for part, value in given.items() if value is not None})
    if regions and (others := [part for part in NEW_IMAGES if getattr(chosen, part) not in (0, (1, 1))]):
        raise OptionError(
            f"the data has saved proposals, which cannot follow {', '.join(others)}: leave these out, as augment light "
            "and none do"
        )
    return {"augment": name, **vars(chosen)}


def augmentation_of(settings: Settings) -> Augmentation:
    """The settings that `training_transform` needs."""
    return Augmentation(**{part.name: getattr(settings, part.name) for part in fields(Augmentation)})


def default_augment(epochs: int) -> str:
    """Strong where every image is seen 30 times or more, as in small data, and would be learnt by heart; else light."""
    return "strong" if epochs >= 30 else "light"


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
