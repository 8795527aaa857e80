"""Kill and go on: the whole state of a run on disk, written at the end of a step or an epoch, and asked for by Ctrl-C.

What a run does next follows from its weights, its optimizer and its position; all that is random follows from the seed
and the position. So a resumed run ends with the same weights, to the last bit, as one that was never stopped.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from tqdm import tqdm

from fpn.hardware import is_main_process
from fpn.training.learner import Learner
from fpn.writing import replacing

STATE = "resume.ckpt"  # what --resume reads; everything a person uses is in the .safetensors files


def save_state(trainer: pl.Trainer, out: Path) -> None:
    """Write the state of the run; every process must call this. The previous one stays until the new one is whole."""
    if not trainer.is_global_zero:
        return trainer.save_checkpoint(out / STATE)  # takes part in gathering the state; the first process writes it
    with replacing(out / STATE) as unfinished:
        trainer.save_checkpoint(unfinished)


class ResumeState(Callback):
    """Writes the state every `minutes` within an epoch, and when the user or the machine asks the run to stop.

    The first Ctrl-C (or SIGTERM) lets the step end, or the validation that has begun, and writes the state; the second
    stops at once.
    """

    def __init__(self, out: Path, minutes: float) -> None:
        self.out, self.minutes = out, minutes
        self.asked = False
        self.saved = time.monotonic()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.saved = time.monotonic()
        for number in own_signals():
            signal.signal(number, self.ask)  # over Lightning's; `as_before` puts back what was there before both

    def ask(self, number: int, _: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        if is_main_process():
            said = "\nstopping after this step, or after the validation where it has begun; once more stops at once"
            tqdm.write(said, sys.stderr)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        assert isinstance(pl_module, Learner)
        pl_module.stop = self.asked
        pl_module.save = trainer.is_global_zero and time.monotonic() - self.saved > 60 * self.minutes

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, Learner)
        within_step = (batch_idx + 1) % trainer.accumulate_grad_batches
        if within_step or trainer.is_last_batch or not (pl_module.stop or pl_module.save):
            return  # after the last batch the epoch's end saves
        save_state(trainer, self.out)
        self.saved = time.monotonic()
        if pl_module.stop:
            raise KeyboardInterrupt

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.saved = time.monotonic()
        if trainer.strategy.reduce_boolean_decision(self.asked, all=False):
            raise KeyboardInterrupt


def own_signals() -> tuple[signal.Signals, ...]:
    """Those that ask a run to stop, where this thread may handle them."""
    main = threading.current_thread() is threading.main_thread()
    return (signal.SIGINT, signal.SIGTERM) if main else ()


@contextmanager
def as_before() -> Iterator[None]:
    """Leaves the handling of signals and torch's choice of algorithms as they were."""
    handlers = {number: signal.getsignal(number) for number in own_signals()}
    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic)
        for number, handler in handlers.items():
            signal.signal(number, handler)
