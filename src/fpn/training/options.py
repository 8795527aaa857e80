"""The options of a training run, as people give them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Options:
    """What can be chosen for a run; `fpn.training.settings.resolve` fills in None to fit the data and the machine.

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
        How the learning rate falls: cosine, step, paper (a tenth for the last quarter) or constant.
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
