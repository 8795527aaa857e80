"""What a person sees of a run and what stays of it: the bar, one line an epoch, `metrics.csv`, the checkpoints."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from tqdm import tqdm

from fpn.hardware import cores, is_main_process
from fpn.training.learner import Learner
from fpn.training.resume import save_state
from fpn.weights.checkpoint import save
from fpn.writing import replacing

STARVED = 0.3  # share of an epoch spent waiting for images above which a warning is due


class Bar(Callback):
    """A progress bar over the steps of an epoch, with the losses, the rate and the time left."""

    def __init__(self) -> None:
        self.bar: tqdm | None = None

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, at: int) -> None:
        if self.bar is None:  # also where a resumed run begins in the middle of an epoch
            epochs = trainer.max_epochs or 0
            title = f"epoch {trainer.current_epoch + 1:>{len(str(epochs))}}/{epochs}"
            self.bar = self.make(title, int(trainer.num_training_batches), at)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        assert isinstance(pl_module, Learner)
        if self.bar is None:
            return
        shown = {name: f"{float(value):.3f}" for name, value in pl_module.values.items()}
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.close()
        self.bar = self.make("validating", int(sum(trainer.num_val_batches)))

    def on_validation_batch_end(self, *_: Any) -> None:
        if self.bar is not None:
            self.bar.update()

    def on_validation_end(self, *_: Any) -> None:
        self.close()

    def on_train_epoch_end(self, *_: Any) -> None:
        self.close()

    def on_exception(self, *_: Any) -> None:
        self.close()

    def make(self, title: str, total: int, done: int = 0) -> tqdm:
        pace = 0.3 if sys.stderr.isatty() else 20.0  # a log file needs no animation
        return tqdm(
            total=total, desc=title, unit=" steps", initial=done, leave=False, mininterval=pace, dynamic_ncols=True
        )

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


class Keeper(Callback):
    """After each epoch: a line on the screen, one in metrics.csv, last and (where it is) best checkpoint, resume state.

    The best epoch is the one with the highest AP on the validation split (`Metrics.main`); without one, the last.
    """

    def __init__(self, out: Path, patience: int | None, quiet: bool = False) -> None:
        self.out, self.patience, self.quiet = out, patience, quiet
        self.history: list[dict[str, float]] = []
        self.best, self.best_epoch = -2.0, 0
        self.warned = False

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, Learner)
        pl_module.meters.start()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, Learner)
        epoch = trainer.current_epoch + 1
        row = self.row(epoch, trainer, pl_module)
        self.history.append(row)
        reached = row[pl_module.metrics.main] if pl_module.metrics else -1.0
        reached = reached if reached >= 0 else float(epoch)  # nothing to measure on: the last is the best
        improved = reached > self.best
        if improved:
            self.best, self.best_epoch = reached, epoch
        self.warn_if_starved(row["waiting"], pl_module.settings.workers)
        if trainer.is_global_zero:
            numbers = pl_module.metrics.with_masks() if pl_module.metrics else {}
            about = {"epoch": epoch, "metrics": numbers}
            save(pl_module.average, self.out / "last.safetensors", about)
            if improved:
                save(pl_module.average, self.out / "best.safetensors", about)
            write_csv(self.history, self.out / "metrics.csv")
            self.say(row, trainer.max_epochs or 0, pl_module, improved)
        save_state(trainer, self.out)
        self.stop_if_stale(trainer, epoch)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.stop_if_stale(trainer, trainer.current_epoch)  # a run that had ended is resumed

    def stop_if_stale(self, trainer: pl.Trainer, epoch: int) -> None:
        if self.patience is not None and epoch - self.best_epoch >= self.patience:
            trainer.should_stop = True

    def row(self, epoch: int, trainer: pl.Trainer, learner: Learner) -> dict[str, float]:
        meters, numbers = learner.meters, learner.metrics.with_masks() if learner.metrics else {}
        return {
            "epoch": epoch,
            **{name: round(value, 5) for name, value in meters.means().items()},
            **{name: round(value, 5) for name, value in numbers.items()},
            "lr": float(f"{learner.learning_rate:.4g}"),
            "dropped_batches": meters.dropped,
            "seconds": round(meters.seconds(), 1),
            "images_per_second": round(meters.rate() * trainer.world_size, 2),
            "waiting": round(meters.waiting(), 3),
        }

    def say(self, row: dict[str, float], epochs: int, learner: Learner, improved: bool) -> None:
        if self.quiet:
            return
        numbers = learner.metrics.summary() if learner.metrics else ""
        star = "  best so far" if improved and learner.metrics else ""
        epoch = f"epoch {row['epoch']:>{len(str(epochs))}}/{epochs}"
        tqdm.write(
            f"{epoch}  loss {row.get('loss', float('nan')):.3f}  {numbers}  ({row['seconds']:.0f} s){star}", sys.stdout
        )
        sys.stdout.flush()

    def warn_if_starved(self, share: float, workers: int) -> None:
        if share > STARVED and not self.warned and is_main_process():
            self.warned = True
            tqdm.write(
                f"warning: {share:.0%} of the time was spent waiting for images (--workers {workers}, {cores()} "
                "cores). More workers help where cores are free; so do images stored no larger than they are used",
                sys.stderr,
            )

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history, "best": self.best, "best_epoch": self.best_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history, self.best, self.best_epoch = (state_dict[k] for k in ("history", "best", "best_epoch"))


def write_csv(rows: list[dict[str, float]], path: Path) -> None:
    """All rows under the union of their columns; the file is replaced in one step."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with replacing(path) as unfinished, unfinished.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
