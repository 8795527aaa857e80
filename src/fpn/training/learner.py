"""What one step of training and one of validation do, for Lightning to run on any number of devices."""

from __future__ import annotations

import copy

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fpn.data import Split, loader, resize_transform, train_transform
from fpn.errors import TrainingError
from fpn.evaluation.evaluate import collect, detect_original, merge
from fpn.evaluation.metrics import Metrics, score
from fpn.model.faster_rcnn import FasterRCNN
from fpn.structures import Batch, Detections
from fpn.training.schedule import factor
from fpn.training.settings import Settings


class Learner(pl.LightningModule):
    """Trains `detector`; `average` is the moving average of its weights, which is what gets measured and kept."""

    def __init__(self, detector: FasterRCNN, settings: Settings, train: Split, val: Split | None):
        super().__init__()
        self.detector, self.settings, self.train_split, self.val_split = detector, settings, train, val
        self.average = copy.deepcopy(detector).requires_grad_(False) if settings.ema else detector
        self.found: list[tuple[Tensor, Detections]] = []
        self.metrics: Metrics | None = None
        self.averaged = 0  # the step at which the average was last moved

    def training_step(self, batch: Batch, _: int) -> Tensor:
        losses = self.detector.losses(batch)
        loss = torch.stack(list(losses.values())).sum()
        if not torch.isfinite(loss):
            raise TrainingError(self.explain(batch, losses))
        shown = {name: value.detach() for name, value in {"loss": loss, **losses}.items()}
        self.log_dict(shown, on_epoch=True, batch_size=len(batch), sync_dist=self.trainer.world_size > 1)
        return loss

    def explain(self, batch: Batch, losses: dict[str, Tensor]) -> str:
        terms = ", ".join(f"{name} {value.item():.3g}" for name, value in losses.items())
        files = ", ".join(str(self.train_split.path(i)) for i in batch.indices.tolist())
        return (
            f"the loss is not finite at step {self.global_step} ({terms}) on {files}. The weights of the last epoch "
            f"are kept. Look at the boxes of these images, or lower --lr (now {self.settings.lr:g})"
        )

    def on_train_batch_end(self, *_) -> None:
        done = self.global_step  # does not move while gradients accumulate
        if self.settings.ema and done > self.averaged:
            # Early weights are soon outdated: average over about the last tenth of the steps so far at first.
            self.averaged = done
            update_average(self.average, self.detector, min(self.settings.ema, (1 + done) / (10 + done)))

    def on_validation_epoch_start(self) -> None:
        self.found = []

    def validation_step(self, batch: Batch | None, _: int) -> None:
        if batch is not None:
            self.found.append((batch.indices.cpu(), detect_original(self.average, batch).to("cpu")))

    def on_validation_epoch_end(self) -> None:
        assert self.val_split is not None
        results = collect(self.found, self.average, self.val_split)
        self.found = []
        if self.trainer.world_size > 1:
            shards = [results] * self.trainer.world_size
            torch.distributed.all_gather_object(shards, results)
            results = merge(shards)
        self.metrics = score(self.val_split, results, max(100, self.detector.max_detections))
        self.log_dict({f"val/{name}": value for name, value in self.metrics.items()}, rank_zero_only=True)

    def configure_optimizers(self):
        s = self.settings
        groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
        for parameter in self.detector.parameters():
            if parameter.requires_grad:
                groups[parameter.ndim > 1].append(parameter)  # biases and norms are not decayed
        optimizer = torch.optim.SGD(
            [{"params": groups[True], "weight_decay": s.weight_decay}, {"params": groups[False], "weight_decay": 0.0}],
            lr=s.lr,
            momentum=s.momentum,
        )
        total = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor(step, total, s.warmup, s.schedule))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def train_dataloader(self) -> DataLoader:
        transform = train_transform(
            self.settings.scales, self.detector.spec.sides[1], self.settings.flip, self.settings.jitter
        )
        return self.batches(self.train_split, transform, training=True)

    def val_dataloader(self) -> DataLoader | list:
        if self.val_split is None:
            return []
        return self.batches(self.val_split, resize_transform(*self.detector.spec.sides), training=False)

    def batches(self, split: Split, transform, training: bool) -> DataLoader:
        return loader(
            split,
            transform,
            self.settings.batch,
            training,
            seed=self.settings.seed,
            workers=self.settings.workers,
            rank=self.trainer.global_rank,
            world=self.trainer.world_size,
            pin_memory=self.settings.device.startswith("cuda"),
        )


@torch.no_grad()
def update_average(average: nn.Module, current: nn.Module, decay: float) -> None:
    """average = decay * average + (1 - decay) * current; counters are copied."""
    pairs = list(zip(average.state_dict().values(), current.state_dict().values(), strict=True))
    real = [(a, c) for a, c in pairs if a.is_floating_point()]
    torch._foreach_lerp_([a for a, _ in real], [c for _, c in real], 1 - decay)  # pyright: ignore
    for a, c in pairs:
        if not a.is_floating_point():
            a.copy_(c)
