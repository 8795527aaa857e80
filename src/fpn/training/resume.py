"""Kill and go on: the whole state of a run on disk, written at the end of a step or an epoch, and asked for by Ctrl-C.

What a run does next follows from its weights, its optimizer and its position; all that is random follows from the seed
and the position. So a resumed run ends with the same weights, to the last bit, as one that was never stopped.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from tqdm import tqdm

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

    The first Ctrl-C (or SIGTERM) lets the step end and writes the state; the second stops at once.
    """

    def __init__(self, out: Path, minutes: float) -> None:
        self.out, self.minutes = out, minutes
        self.asked = False
        self.saved = time.monotonic()
        self.handlers: dict[int, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.saved = time.monotonic()
        if threading.current_thread() is threading.main_thread():
            self.handlers = {number: signal.signal(number, self.ask) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(self, number: int, _: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        tqdm.write("\nstopping after this step; once more stops at once", sys.stderr)

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
        self.stop_if_asked(pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, Learner)
        self.saved = time.monotonic()
        self.stop_if_asked(pl_module)

    def stop_if_asked(self, learner: Learner) -> None:
        if learner.stop:
            raise KeyboardInterrupt

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.handlers = {}
