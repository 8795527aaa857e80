"""What one step of training and one of validation do, for Lightning to run on any number of devices."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fpn.data import DetectionDataset, GroupedBatches, Split, loader, resize_transform, training_transform
from fpn.data.batching import seed_from
from fpn.data.mixing import Mixing
from fpn.data.tiles import TileDataset, Tiles
from fpn.errors import TrainingError
from fpn.evaluation.evaluate import collect, merge, readable, score_for
from fpn.evaluation.metrics import Metrics, Results
from fpn.inference.finder import detect_original, finder
from fpn.model.detector import Detector
from fpn.structures import Batch, Detections, Sample
from fpn.training.meters import Meters
from fpn.training.schedule import factor
from fpn.training.settings import Settings, augmentation_of
from fpn.training.trouble import not_finite, write_batch
from fpn.weights.checkpoint import save


class Learner(pl.LightningModule):
    """Trains `detector`; `average` is the moving average of its weights, which is what gets measured and kept.

    `stop` and `save` are wishes for the end of this step, which `ResumeState` sets; after `training_step` they are the
    same on all processes.
    """

    def __init__(self, detector: Detector, settings: Settings, train: Split, val: Split | None, out: Path):
        super().__init__()
        self.detector, self.settings, self.train_split, self.val_split = detector, settings, train, val
        self.out = out
        self.average = copy.deepcopy(detector).requires_grad_(False) if settings.ema else detector
        self.found: list[Results] = []
        self.metrics: Metrics | None = None
        self.meters = Meters()
        self.stop = self.save = False
        self.begin_at = (0, 0)  # epoch, and the batches of it that an earlier process has done
        self.batch: Batch | None = None
        self.window: list[Tensor] = []  # positions of the images whose gradients are being accumulated
        self.values: dict[str, Tensor] = {}

    def on_train_start(self) -> None:
        self.average.eval()
        self.detector.train()  # last: without a moving average they are one
        norms = [module for module in self.detector.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        self.statistics = [buffer for norm in norms for buffer in norm.buffers() if buffer.is_floating_point()]

    def on_train_batch_start(self, batch: Batch, _: int) -> None:
        self.meters.step_begins()
        # Whatever is random inside the model follows from the step, so that a resumed run need not know its past.
        torch.manual_seed(seed_from(self.settings.seed, self.trainer.fit_loop.total_batch_idx, self.global_rank))

    def training_step(self, batch: Batch, _: int) -> Tensor:
        before = [buffer.clone() for buffer in self.statistics]
        losses = self.detector.losses(batch)
        loss = torch.stack([self.detector.loss_weights[name] * value for name, value in losses.items()]).sum()
        self.batch, self.values = batch, {"loss": loss.detach(), **{n: v.detach() for n, v in losses.items()}}
        if self.agree(~torch.isfinite(loss)):
            for buffer, value in zip(self.statistics, before, strict=True):
                buffer.copy_(value)
            self.drop(self.values, [batch.indices], everywhere=False)
            return torch.stack([p.sum() for p in self.detector.parameters() if p.requires_grad]).sum() * 0
        self.window.append(batch.indices)
        self.meters.add(self.values)
        self.log_dict(self.values, batch_size=len(batch))
        return loss

    def agree(self, bad: Tensor) -> bool:
        """Whether the step is bad on any process; what one wishes for (`stop`, `save`) all do."""
        if self.trainer.world_size > 1:
            flags = torch.stack([bad.float(), *(bad.new_tensor(flag).float() for flag in (self.stop, self.save))])
            torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
            dropped, self.stop, self.save = (bool(flag) for flag in flags.tolist())
            return dropped
        return bool(bad)

    def drop(self, values: Mapping[str, Tensor], indices: list[Tensor], everywhere: bool) -> None:
        """Leave batches out and count them, or end the run with the last on disk and the last good weights.

        everywhere: whether all processes have the same values, so that one of them can speak for all.
        """
        if self.settings.on_nan == "skip":
            self.meters.dropped += len(indices)
            return
        assert self.batch is not None
        numbers = {name: float(value) for name, value in values.items()}
        mine = self.trainer.is_global_zero if everywhere else not all(map(math.isfinite, numbers.values()))
        if self.trainer.world_size > 1 and not mine:
            raise TrainingError("the loss is not finite on another process, which says more")
        save(self.average, self.out / "last.safetensors", {"epoch": self.current_epoch, "unfinished": True})
        file = write_batch(self.batch, self.train_split, numbers, self.out)
        files = [str(self.train_split.path(i)) for i in torch.cat(indices).tolist()]
        raise TrainingError(not_finite(files, numbers, self.global_step, self.learning_rate, file))

    @property
    def learning_rate(self) -> float:
        return self.trainer.optimizers[0].param_groups[0]["lr"]

    def configure_gradient_clipping(self, optimizer: torch.optim.Optimizer, *_: Any, **__: Any) -> None:
        """Clip and log the norm; gradients that are not finite, or of dropped batches only, move nothing."""
        parameters = [p for p in self.detector.parameters() if p.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.settings.clip or math.inf)
        bad = not torch.isfinite(norm)
        if bad:
            self.drop({**self.values, "gradient norm": norm}, self.window, everywhere=True)
        if bad or not self.window:
            optimizer.zero_grad(set_to_none=True)
        else:
            self.meters.add({"gradient_norm": norm})
        self.window = []
        self.log("gradient_norm", norm)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if self.settings.ema:
            # Early weights are soon outdated: average over about the last tenth of the steps so far at first.
            done = self.global_step
            update_average(self.average, self.detector, min(self.settings.ema, (1 + done) / (10 + done)))

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        self.meters.step_ends(len(batch))
        pace = {"images_per_second": self.meters.rate(), "waiting": self.meters.waiting()}
        self.log_dict({"lr": self.learning_rate, **pace})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["meters"] = self.meters.state()
        loop = self.trainer.fit_loop
        done = loop.epoch_loop.batch_progress.current.ready % int(self.trainer.num_training_batches)
        epochs = loop.epoch_progress.current.processed  # pyright: ignore[reportAttributeAccessIssue]
        checkpoint["begin_at"] = (epochs, done)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.meters.load(checkpoint["meters"], self.device)
        self.begin_at = tuple(checkpoint["begin_at"])

    def on_validation_epoch_start(self) -> None:
        self.found = []
        if self.trainer.world_size > 1:  # each process has batch norm statistics of its own, one has them saved
            for buffer in self.average.buffers():
                torch.distributed.broadcast(buffer, 0)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        if isinstance(batch, list):  # images as they are: their tiles go there, a few at a time
            return batch
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def validation_step(self, batch: Batch | list[Sample] | None, _: int) -> None:
        if not batch:
            return
        assert self.val_split is not None
        if isinstance(batch, list):
            find = finder(self.average, self.device, progress=False)
            indices = torch.tensor([sample.index for sample in batch])
            found = (indices, Detections.stack(find([sample.image for sample in batch])))
        else:
            found = (batch.indices.cpu(), detect_original(self.average, batch).to("cpu"))
        self.found.append(collect([found], self.average, self.val_split))

    def on_validation_epoch_end(self) -> None:
        assert self.val_split is not None
        results = merge([collect([], self.average, self.val_split), *self.found])
        self.found = []
        if self.trainer.world_size > 1:
            shards = [results] * self.trainer.world_size
            torch.distributed.all_gather_object(shards, results)
            results = merge(shards)
        self.metrics = score_for(self.detector, self.val_split, results)
        self.log_dict({f"val/{name}": value for name, value in self.metrics.with_masks().items()}, rank_zero_only=True)

    def configure_optimizers(self):
        s = self.settings
        optimizer = sgd(self.detector, s.lr, s.momentum, s.weight_decay)
        total = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor(step, total, s.warmup, s.schedule))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def train_dataloader(self) -> DataLoader:
        transform, mixing = training_transform(
            augmentation_of(self.settings), self.settings.scales, self.detector.spec.sides[1], self.settings.epochs
        )
        batches = self.batches(self.train_split, transform, training=True, mixing=mixing)
        assert isinstance(batches.batch_sampler, GroupedBatches)
        batches.batch_sampler.begin_at(*self.begin_at)
        return batches

    def val_dataloader(self) -> DataLoader | list:
        if self.val_split is None:
            return []
        if self.detector.spec.tile:
            rank, world = self.trainer.global_rank, self.trainer.world_size
            return DataLoader(
                DetectionDataset(self.val_split),
                batch_sampler=GroupedBatches(self.val_split, 1, shuffle=False, rank=rank, world=world),
                num_workers=self.settings.workers,
                collate_fn=readable,
                generator=torch.Generator(),  # leaves the global random state alone
            )
        return self.batches(self.val_split, resize_transform(*self.detector.spec.sides), training=False)

    def batches(self, split: Split, transform, training: bool, mixing: Mixing | None = None) -> DataLoader:
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
            mixing=mixing,
            square=self.detector.spec.square_side,
            masks=training and self.detector.has_masks,
            dataset=TileDataset if isinstance(split, Tiles) else DetectionDataset,
        )


def sgd(detector: nn.Module, lr: float, momentum: float, weight_decay: float) -> torch.optim.SGD:
    """The optimizer of all that learns; biases and norms are not decayed."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for parameter in detector.parameters():
        if parameter.requires_grad:
            groups[parameter.ndim > 1].append(parameter)
    decayed = [{"params": groups[True], "weight_decay": weight_decay}, {"params": groups[False], "weight_decay": 0.0}]
    return torch.optim.SGD(decayed, lr=lr, momentum=momentum)


@torch.no_grad()
def update_average(average: nn.Module, current: nn.Module, decay: float) -> None:
    """average = decay * average + (1 - decay) * current; counters are copied."""
    pairs = list(zip(average.state_dict().values(), current.state_dict().values(), strict=True))
    real = [(a, c) for a, c in pairs if a.is_floating_point()]
    torch._foreach_lerp_([a for a, _ in real], [c for _, c in real], 1 - decay)  # pyright: ignore
    for a, c in pairs:
        if not a.is_floating_point():
            a.copy_(c)
