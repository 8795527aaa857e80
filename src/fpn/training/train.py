"""`fpn.train`: a detector and a data set -> a trained detector, with checkpoints, logs and numbers in a folder."""

from __future__ import annotations

import logging
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from fpn.backends.names import check_whole
from fpn.data import Data, Split, class_agnostic
from fpn.data.outlines import needed
from fpn.data.tiles import tiles_of
from fpn.errors import CheckpointError, DataError, FpnError, OptionError, TrainingError
from fpn.evaluation.evaluate import check_regions
from fpn.hardware import is_main_process
from fpn.inference.tiles import accept_large_pictures
from fpn.model.detector import Detector
from fpn.training.memory import largest_batch
from fpn.training.options import Options
from fpn.training.preflight import preflight, print_preflight
from fpn.training.settings import Settings, resolve
from fpn.training.trouble import out_of_memory
from fpn.weights.checkpoint import fill, read
from fpn.writing import replacing


@dataclass(frozen=True)
class Run:
    """What a training run gave: its files, its numbers (`history`, a row an epoch) and the settings it ran with."""

    out: Path
    best: Path
    last: Path
    best_epoch: int
    history: list[dict[str, float]]
    settings: Settings


def train(
    detector: Detector,
    data: Data | Mapping[str, Split],
    *,
    out: str | Path,
    resume: bool = False,
    config: Mapping[str, Any] | None = None,
    quiet: bool = False,
    bar: bool | None = None,
    **options: Any,
) -> Run:
    """Train `detector` on data["train"], measure it on data["val"] after each epoch, keep the best in `out`.

    A detector with `spec.tile` is trained on tiles of the images and measured in tiles, after these are merged.
    The detector is left with the weights of the best epoch. options: see `fpn.training.settings.Options`: epochs,
    batch, lr, schedule, precision, scales, patience and so on; what is left out fits the data and the machine. resume:
    go on with the run in `out` where it was stopped, with the options it has. config: anything else to note in
    `out/config.yaml`. quiet: nothing is said of the run; bar: whether there is a progress bar, as quiet has it when
    None.

    Writes best.safetensors, last.safetensors, metrics.csv, config.yaml, TensorBoard events and resume.ckpt to `out`.
    Raises OptionError and DataError before anything is written, TrainingError where a loss is not finite.
    """
    from fpn.training.resume import as_before

    out = Path(out)
    split, val = data["train"], data.get("val")
    if detector.proposes:
        split, val = class_agnostic(split), None if val is None else class_agnostic(val)
    check(detector, split, val)
    state = resume_state(out, resume)
    if resume:
        options = kept(options, read_config(out)["training"])
    chosen = options_of(options)
    if detector.spec.tile:
        accept_large_pictures()
        split = tiles_of(split, detector.spec.tile, detector.spec.overlap, chosen.seed)
    if chosen.batch == "auto":
        chosen = replace(chosen, batch=automatic_batch(detector, split, chosen))
    settings = resolve(chosen, split, detector.spec.short)
    findings = preflight(detector, split, val, settings)
    if is_main_process() and not quiet and not resume:
        print_preflight(findings, detector, split, val, settings)
    if is_main_process():
        write_config(out, {**(config or {}), "detector": detector.spec.as_dict(), "training": asdict(settings)})
        for unfinished in out.glob(".*.tmp"):  # of a run that was killed while it wrote
            unfinished.unlink()
    with as_before():
        keeper = fit(detector.train(), split, val, out, settings, state, quiet, not quiet if bar is None else bar)
    best = out / "best.safetensors"
    fill(detector, read(best)[1], best)
    detector.eval()
    return Run(out, best, out / "last.safetensors", keeper.best_epoch, keeper.history, settings)


def options_of(given: Mapping[str, Any]) -> Options:
    known = {field.name for field in fields(Options)}
    if unknown := sorted(given.keys() - known):
        raise OptionError(f"train has no option {', '.join(unknown)}; there are {', '.join(sorted(known))}")
    return Options(**given)


def read_config(out: Path) -> dict[str, Any]:
    """The configuration of the run in a folder."""
    file = out / "config.yaml"
    if not file.is_file():
        raise OptionError(f"{file}: not there, so there is no run to resume in {out}")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        return {"detector": content["detector"], "training": content["training"], **content}
    except (yaml.YAMLError, TypeError, KeyError, ValueError) as error:
        raise OptionError(
            f"{file}: not the configuration of a run ({error}); restore it, or start a new run"
        ) from error


def kept(given: Mapping[str, Any], stored: dict[str, Any]) -> dict[str, Any]:
    """The options of a run that goes on: its own. Raises OptionError where others are asked for."""
    if changed := sorted(name for name, value in given.items() if to_plain(value) != stored.get(name)):
        raise OptionError(
            f"a run that is resumed keeps its options, {', '.join(changed)} cannot change; start a new one for that"
        )
    return stored


def automatic_batch(detector: Detector, split: Split, options: Options) -> int:
    if options.devices * options.nodes > 1:
        raise OptionError("--batch auto works on one device; find the size there, then give it as a number")
    settings = resolve(replace(options, batch=1), split, detector.spec.short)
    device, bf16, mixed = torch.device(settings.device), settings.precision == "bf16", 4 if settings.mosaic else 1
    return largest_batch(detector, split, settings.scales, device, bf16, mixed)


def check(detector: Detector, split: Split, val: Split | None) -> None:
    check_whole(detector)
    if tuple(split.classes) != tuple(detector.classes):
        raise OptionError(
            f"the detector's classes ({', '.join(detector.classes)}) are not the data's ({', '.join(split.classes)}): "
            f"build it with classes=data.classes"
        )
    if not len(split):
        raise DataError(f"{split.root}: the split {split.name!r} has no images to train on")
    if not (~split.ignore).any():
        raise DataError(f"{split.root}: no image of the split {split.name!r} has an object to learn from")
    if val is not None and not len(val):
        raise DataError(f"{val.root}: the split {val.name!r} has no images")
    for part in (split, val):
        if part is not None:
            check_regions(detector, part)
    if detector.has_masks:
        needed(split.outlines, f"{split.root}: the split {split.name}")


def resume_state(out: Path, resume: bool) -> Path | None:
    from fpn.training.resume import STATE

    state = out / STATE
    if resume and state.is_file() and not zipfile.is_zipfile(state):
        raise CheckpointError(f"{state}: damaged, so the run cannot be resumed; start a new one")
    if resume and not state.is_file():
        raise OptionError(f"{out}: no run to resume here ({STATE} is missing); leave --resume out to start one")
    if not resume and state.is_file():
        raise OptionError(f"{out}: holds a run already; add --resume to continue it, or choose another --out")
    return state if resume else None


def fit(
    detector: Detector,
    split: Split,
    val: Split | None,
    out: Path,
    settings: Settings,
    state: Path | None,
    quiet: bool,
    bar: bool,
):
    import lightning.pytorch as pl
    from lightning.pytorch.loggers import TensorBoardLogger

    from fpn.training.callbacks import Bar, Keeper
    from fpn.training.learner import Learner
    from fpn.training.resume import ResumeState

    silence_lightning()
    pl.seed_everything(settings.seed, workers=True, verbose=False)
    keeper = Keeper(out, settings.patience, quiet)
    device = torch.device(settings.device)
    trainer = pl.Trainer(
        accelerator={"cuda": "gpu"}.get(device.type, device.type),
        devices=[device.index] if device.index is not None else settings.devices,
        num_nodes=settings.nodes,
        precision="bf16-mixed" if settings.precision == "bf16" else "32-true",
        max_epochs=settings.epochs,
        accumulate_grad_batches=settings.accumulate,
        deterministic=settings.deterministic,
        sync_batchnorm=device.type == "cuda" and settings.devices * settings.nodes > 1,
        callbacks=[
            *([Bar()] if bar and is_main_process() else []),
            keeper,
            ResumeState(out, settings.save_minutes),
        ],
        logger=TensorBoardLogger(str(out), name="", version=""),
        default_root_dir=str(out),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=10,
        use_distributed_sampler=False,
        limit_val_batches=1.0 if val is not None else 0,
    )
    learner = Learner(detector, settings, split, val, out)
    with warnings.catch_warnings():
        for text in HARMLESS:
            warnings.filterwarnings("ignore", text)
        try:
            run(trainer, learner, state, settings)
        finally:
            (out / "hparams.yaml").unlink(missing_ok=True)  # of Lightning's logger; everything is in config.yaml
    return keeper


def run(trainer: Any, learner: Any, state: Path | None, settings: Settings) -> None:
    """`trainer.fit`, with its ways of ending put in order."""
    try:
        trainer.fit(learner, ckpt_path=state, weights_only=True)
    except SystemExit:  # what Lightning makes of Ctrl-C
        if not trainer.interrupted:
            raise
        raise KeyboardInterrupt from None
    except FpnError as error:
        raise type(error)(own_words(str(error))) from None
    except (RuntimeError, MemoryError) as error:
        if words := out_of_memory(settings.batch, settings.scales, error):
            raise TrainingError(words) from error
        raise


def own_words(text: str) -> str:
    """An error's own message, where a loading process has wrapped it in its traceback."""
    if not text.startswith("Caught "):
        return text
    return text.strip().splitlines()[-1].split(": ", 1)[-1]


# What Lightning says to people who wrote the loop themselves, and of its own dependencies.
HARMLESS = (
    ".*does not have many workers.*",
    ".*The number of training batches.*",
    ".*your dataloader is not resumable.*",  # it is, through the batch sampler
    ".*recommended to use.*sync_dist=True.*",
    ".*LeafSpec.*is deprecated.*",
    r".*module\(s\) in eval mode.*",  # features that are fixed
)


def silence_lightning() -> None:
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)


def write_config(out: Path, content: Mapping[str, Any]) -> None:
    """The run's full configuration as YAML, in one step."""
    from fpn import __version__

    plain = to_plain({"fpn": __version__, "torch": str(torch.__version__), **content})
    with replacing(out / "config.yaml") as unfinished:
        unfinished.write_text(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True), encoding="utf-8")


def to_plain(value: Any) -> Any:
    """Tuples as lists, paths as text: what YAML can hold."""
    match value:
        case Mapping():
            return {str(key): to_plain(entry) for key, entry in value.items()}
        case list() | tuple():
            return [to_plain(entry) for entry in value]
        case Path():
            return str(value)
    return value
