"""The options of a training run, with defaults that fit the data and the machine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch

from fpn.data import PRESETS, Augmentation, Split
from fpn.errors import OptionError
from fpn.hardware import check_devices, pick_device, pick_precision, pick_workers
from fpn.training.schedule import SCHEDULES


@dataclass(frozen=True)
class Options:
    """What can be chosen for a run; None is filled in by `resolve` to fit the data and the machine.

    Parameters
    ----------
    epochs
        Passes over the data; 12, and more for small data, when left out.
    batch
        Images a step and device; auto for the most that fit into memory. When left out, 4 on a CPU and up to 16 on a
        GPU by its memory.
    accumulate
        Steps whose gradients are added up before the weights change.
    lr
        Learning rate of SGD; 0.02 for 16 images in all, in proportion for others, when left out.
    momentum
        How much of the last step each step of SGD repeats.
    weight_decay
        How fast weights shrink; biases and norms are spared.
    warmup
        Steps of linear warm-up; a tenth of all, 1000 at most, when left out.
    schedule
        How the learning rate falls: cosine, step or constant.
    clip
        Largest norm of the gradient; 0 is off.
    ema
        Decay of the moving average of the weights, which is what is measured and kept; 0 is off.
    precision
        32, or bf16 for mixed precision; auto takes that where the hardware is made for it.
    scales
        Several shorter sides to draw from while training (multi-scale).
    augment
        How much images are changed: none, light (flips), strong, or auto by the number of epochs. Each of the eight
        options below overrides one part; look at the outcome with `fpn data show`.
    flip
        Probability of a horizontal flip.
    vertical_flip
        Probability of a vertical flip, for images without an up: from a microscope, from above.
    lsj
        Smallest and largest factor of scale jitter, such as 0.5 2; 1 1 is off.
    crop
        Probability of a cut to a random part with objects.
    jitter
        Strength of random changes of colour, 0 to 1.
    mosaic
        Probability of four images in one; off in the last epochs, as are the next two.
    mixup
        Probability of two images shining through each other.
    copy_paste
        Probability of objects of another image put in.
    patience
        Stop after so many epochs without a better AP.
    on_nan
        What to do about a loss that is not finite: stop, or skip the batch and count it.
    save_minutes
        How often the state for --resume is written within an epoch.
    deterministic
        Only algorithms that repeat to the last bit, also on GPUs; slower there.
    seed
        The same seed gives the same run.
    workers
        Processes that load images; one a core up to 4 when left out.
    device
        auto, cpu, cuda, cuda:N or mps.
    devices
        Number of devices on this machine.
    nodes
        Number of machines.
    """

    epochs: int | None = None
    batch: int | Literal["auto"] | None = None
    accumulate: int = 1
    lr: float | None = None
    momentum: float = 0.9
    weight_decay: float = 1e-4
    warmup: int | None = None
    schedule: str = "cosine"
    clip: float = 10.0
    ema: float = 0.999
    precision: str = "auto"
    scales: Sequence[int] | None = None
    augment: str = "auto"
    flip: float | None = None
    vertical_flip: float | None = None
    lsj: Sequence[float] | None = None
    crop: float | None = None
    jitter: float | None = None
    mosaic: float | None = None
    mixup: float | None = None
    copy_paste: float | None = None
    patience: int | None = None
    on_nan: str = "stop"
    save_minutes: float = 10.0
    deterministic: bool = False
    seed: int = 0
    workers: int | None = None
    device: str = "auto"
    devices: int = 1
    nodes: int = 1


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
        **pick_augmentation(options, epochs),
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


def pick_augmentation(options: Options, epochs: int) -> dict[str, Any]:
    """The preset, chosen where it is "auto", and each of its parts as the options or else the preset have it."""
    name = default_augment(epochs) if options.augment == "auto" else options.augment
    given = {part: getattr(options, part) for part in vars(PRESETS[name])}
    given["lsj"] = None if options.lsj is None else tuple(options.lsj)
    chosen = replace(PRESETS[name], **{part: value for part, value in given.items() if value is not None})
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
