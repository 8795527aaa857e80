"""How the learning rate moves: a linear warm-up, then down by steps or along a cosine."""

from __future__ import annotations

import math

from fpn.errors import OptionError

SCHEDULES = ("cosine", "step", "paper", "constant")


def factor(step: int, steps: int, warmup: int, schedule: str) -> float:
    """What the learning rate is multiplied with at optimizer step `step` of `steps`.

    step: a tenth from 2/3 of the way and a hundredth from 8/9, as in the 1x schedule (60k and 80k of 90k iterations).
    paper: a tenth from 3/4 of the way, as in Lin et al. 2017 (30k of 40k iterations, 60k of 80k).
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if schedule == "cosine":
        done = min(1.0, (step - warmup) / max(1, steps - warmup))
        return 0.5 * (1 + math.cos(math.pi * done))
    if schedule == "step":
        return 0.1 ** sum(step >= part * steps for part in (2 / 3, 8 / 9))
    if schedule == "paper":
        return 0.1 if step >= 3 / 4 * steps else 1.0
    if schedule == "constant":
        return 1.0
    raise OptionError(f"schedule {schedule!r}: it must be {', '.join(SCHEDULES)}")
