"""Training: schedules, settings, the moving average, what happens when things go wrong."""

import csv
import json
import math
import signal
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open

import fpn
from fpn.data.generated import generate
from fpn.errors import CheckpointError, DataError, OptionError, TrainingError
from fpn.training import memory
from fpn.training.learner import update_average
from fpn.training.meters import Meters
from fpn.training.schedule import factor
from fpn.training.settings import Options, default_epochs, default_lr, resolve

QUICK = {"epochs": 1, "batch": 4, "workers": 0, "device": "cpu", "quiet": True}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return fpn.data.load(generate(tmp_path_factory.mktemp("data") / "shapes", images=8, size=(96, 96), seed=2))


@pytest.fixture
def detector(data):
    torch.manual_seed(0)
    return fpn.build(backbone="tiny", classes=data.classes, weights="none", short=64, width=16, hidden=32)


def rows_of(out):
    return list(csv.DictReader((out / "metrics.csv").read_text().splitlines()))


def test_schedules_on_worked_numbers():
    assert [factor(s, 100, 4, "constant") for s in (0, 1, 3, 4, 99)] == [0.2, 0.4, 0.8, 1.0, 1.0]
    assert factor(4, 104, 4, "cosine") == 1 and factor(54, 104, 4, "cosine") == pytest.approx(0.5)
    assert factor(104, 104, 4, "cosine") == pytest.approx(0)
    steps = [factor(s, 90, 0, "step") for s in (0, 59, 60, 79, 80)]
    assert steps == pytest.approx([1, 1, 0.1, 0.1, 0.01])


def test_defaults_follow_data_and_batch(data):
    assert default_lr(16) == 0.02 and default_lr(2) == 0.0025
    assert default_epochs(10_000) == 12 and default_epochs(40) == 25 and default_epochs(1) == 60
    settings = resolve(Options(batch=2, accumulate=4, device="cpu"), data["train"], 64)
    assert settings.lr == 0.01 and settings.scales == (64,) and settings.epochs == 60


@pytest.mark.parametrize("option", [{"batch": 0}, {"ema": 1.0}, {"lr": math.nan}, {"schedule": "up"}, {"scales": (8,)},
                                    {"precision": "16"}, {"workers": -1}, {"device": "cuda:9"}])  # fmt: skip
def test_settings_that_cannot_work_are_refused(option, data):
    with pytest.raises(OptionError, match=next(iter(option))):
        resolve(Options(**{"device": "cpu", **option}), data["train"], 64)


def test_an_unknown_option_is_named(detector, data, tmp_path):
    with pytest.raises(OptionError, match="no option epoch; there are"):
        fpn.train(detector, data, out=tmp_path / "run", epoch=3)
    assert not (tmp_path / "run").exists()


def test_the_average_moves_as_its_decay_says():
    average, current = torch.nn.BatchNorm1d(1), torch.nn.BatchNorm1d(1)
    torch.nn.init.constant_(average.weight, 0.0)
    current.num_batches_tracked.fill_(7)
    update_average(average, current, 0.75)
    assert average.weight.item() == 0.25 and average.num_batches_tracked.item() == 7


def test_the_same_seed_gives_the_same_run(data, tmp_path):
    losses = []
    for name in ("a", "b"):
        torch.manual_seed(3)
        detector = fpn.build(backbone="tiny", classes=data.classes, weights="none", short=64, width=16, hidden=32)
        fpn.train(detector, data, out=tmp_path / name, **{**QUICK, "scales": (64, 80)})
        losses.append(rows_of(tmp_path / name)[0]["loss"])
    assert losses[0] == losses[1]


def test_training_learns_and_leaves_the_best_weights(detector, data, tmp_path):
    run = fpn.train(detector, data, out=tmp_path / "run", **{**QUICK, "epochs": 4, "lr": 0.02, "precision": "bf16"})
    assert run.history[-1]["loss"] < run.history[0]["loss"]
    assert not detector.training
    best = fpn.load(run.best).state_dict()
    assert all(torch.equal(value, best[name]) for name, value in detector.state_dict().items())


def test_without_a_validation_split_the_last_epoch_is_kept(detector, data, tmp_path):
    run = fpn.train(detector, {"train": data["train"]}, out=tmp_path / "run", **{**QUICK, "epochs": 2})
    assert run.best_epoch == 2 and "AP" not in run.history[0] and run.best.exists()


def test_gradients_that_accumulate_move_the_average_once_a_step(detector, data, tmp_path, monkeypatch):
    moves = []
    monkeypatch.setattr("fpn.training.learner.update_average", lambda *a: moves.append(a[2]))
    fpn.train(detector, data, out=tmp_path / "run", **{**QUICK, "batch": 2, "accumulate": 2})
    assert len(moves) == 2  # 8 images, 4 a step


def test_patience_stops_a_run_that_no_longer_gets_better(detector, data, tmp_path, monkeypatch):
    from fpn.evaluation.metrics import Metrics

    values = iter([0.5, 0.4, 0.3, 0.2, 0.1])
    monkeypatch.setattr("fpn.training.learner.score_for", lambda *_: Metrics({"AP": next(values)}, {}, []))
    monkeypatch.setattr(Metrics, "summary", lambda self: "")
    run = fpn.train(detector, data, out=tmp_path / "run", **{**QUICK, "epochs": 5, "patience": 2})
    assert run.best_epoch == 1 and len(run.history) == 3
    again = fpn.train(detector, data, out=tmp_path / "run", resume=True, quiet=True)
    assert len(again.history) == 3  # it had ended


def test_a_resumed_run_keeps_its_options(detector, data, tmp_path):
    fpn.train(detector, data, out=tmp_path / "run", **QUICK)
    with pytest.raises(OptionError, match="keeps its options, lr cannot change"):
        fpn.train(detector, data, out=tmp_path / "run", resume=True, lr=0.5)
    assert fpn.train(detector, data, out=tmp_path / "run", resume=True, quiet=True).settings.epochs == 1
    state = tmp_path / "run" / "resume.ckpt"
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="damaged"):
        fpn.train(detector, data, out=tmp_path / "run", resume=True)


def poison(monkeypatch, detector, index):
    """Make the loss NaN wherever the image of this index is in the batch."""
    losses = type(detector).losses

    def poisoned(self, batch):
        found = losses(self, batch)
        return {**found, "class": found["class"] * (math.nan if index in batch.indices.tolist() else 1.0)}

    monkeypatch.setattr(type(detector), "losses", poisoned)


def test_a_loss_that_is_not_finite_stops_the_run_and_shows_the_batch(detector, data, tmp_path, monkeypatch):
    poison(monkeypatch, detector, 3)
    file = str(data["train"].files[3])
    with pytest.raises(TrainingError, match=rf"not finite at step \d .*{file}.*--on-nan skip"):
        fpn.train(detector, data, out=tmp_path / "run", **QUICK)
    with safe_open(tmp_path / "run" / "bad-batch.safetensors", "pt") as content:
        about = json.loads(content.metadata()["fpn"])
        assert content.get_tensor("images").shape[0] == len(about["files"]) == 4
    assert any(name.endswith(file) for name in about["files"]) and math.isnan(about["values"]["class"])
    assert (tmp_path / "run" / "bad-batch-4.jpg").exists()
    assert all(torch.isfinite(value).all() for value in fpn.load(tmp_path / "run" / "last.safetensors").parameters())


def test_on_nan_skip_leaves_the_batch_out_and_counts_it(detector, data, tmp_path, monkeypatch):
    poison(monkeypatch, detector, 3)
    start = {name: value.clone() for name, value in detector.state_dict().items()}
    run = fpn.train(detector, data, out=tmp_path / "run", **{**QUICK, "on_nan": "skip", "ema": 0.0, "warmup": 0})
    (row,) = run.history
    assert row["dropped_batches"] == 1 and math.isfinite(row["loss"])
    assert not torch.equal(detector.rpn.objectness.weight, start["rpn.objectness.weight"])
    assert all(torch.isfinite(value).all() for value in detector.parameters())


def test_when_every_batch_is_bad_no_weight_moves(detector, data, tmp_path, monkeypatch):
    losses = type(detector).losses
    monkeypatch.setattr(type(detector), "losses", lambda *a: {n: v * math.inf for n, v in losses(*a).items()})
    start = {name: value.clone() for name, value in detector.named_parameters()}
    run = fpn.train(detector, data, out=tmp_path / "run", **{**QUICK, "on_nan": "skip", "epochs": 2})
    assert [row["dropped_batches"] for row in run.history] == [2, 2]
    assert all(torch.equal(value, start[name]) for name, value in detector.named_parameters())


def test_gradients_that_are_not_finite_move_nothing(detector, data, tmp_path):
    detector.rpn.objectness.weight.register_hook(lambda gradient: gradient * math.inf)
    start = detector.rpn.objectness.weight.clone()
    run = fpn.train(detector, data, out=tmp_path / "run", **{**QUICK, "on_nan": "skip"})
    assert run.history[0]["dropped_batches"] == 2 and torch.equal(detector.rpn.objectness.weight, start)


def test_too_little_memory_is_put_into_words(detector, data, tmp_path, monkeypatch):
    def losses(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(type(detector), "losses", losses)
    with pytest.raises(TrainingError, match="batches of 4 images .* 64 pixels.*--batch .* --short"):
        fpn.train(detector, data, out=tmp_path / "run", **QUICK)


def test_batch_auto_takes_what_fits(detector, data, monkeypatch):
    """With 1 GiB an image on top of 2, batches of 8 need 10 GiB: 80 % of 13 hold that, of 12 not."""
    used = [0]
    monkeypatch.setattr(memory, "step", lambda model, batch, *_: used.append((2 + len(batch)) * 2**30))
    monkeypatch.setattr(memory, "peak", lambda device: used[-1])
    for gib, fits in ((13, 8), (12, 4), (1000, 16)):
        used[:] = [0]
        monkeypatch.setattr(memory, "free_memory", lambda device, gib=gib: gib * 2**30)
        assert memory.largest_batch(detector, data["train"], (64,), torch.device("cpu"), False) == fits
    used[:] = [0]
    monkeypatch.setattr(memory, "free_memory", lambda device: 2**30)
    with pytest.raises(OptionError, match=r"not even one image of 64x64 pixels .* --short"):
        memory.largest_batch(detector, data["train"], (64,), torch.device("cpu"), False)


def test_what_was_used_before_does_not_count(detector, data):
    cpu = torch.device("cpu")
    torch.ones(2**28)  # 1 GiB, and gone
    memory.forget_peak(cpu)
    before = memory.peak(cpu)
    held = torch.ones(2**26)
    assert 2**27 < memory.peak(cpu) - before < 2**29 and memory.free_memory(cpu) > 0 and len(held)


def test_batch_auto_measures_a_real_step(detector, data, tmp_path):
    run = fpn.train(detector, data, out=tmp_path / "run", **{**QUICK, "batch": "auto"})
    assert run.settings.batch == 16 and run.settings.lr == default_lr(16)


def test_the_largest_size_holds_every_image(data):
    split = replace(data["train"], sizes=np.array([[100, 200], [100, 250]] + [[100, 100]] * 6))
    assert memory.largest_size(split, 64, 128) == (64, 128)
    assert memory.largest_size(split, 64, 1000) == (64, 160)  # 64 x 160 for the second
    both = replace(data["train"], sizes=np.array([[100, 250], [250, 100]] + [[100, 100]] * 6))
    assert memory.largest_size(both, 64, 1000) == (160, 160)  # the last batch of an epoch may mix them


def test_meters_on_worked_numbers():
    meters = Meters()
    meters.add({"loss": torch.tensor(2.0)})
    meters.add({"loss": torch.tensor(4.0), "norm": torch.tensor(1.0)})
    assert meters.means() == {"loss": 3.0, "norm": 1.0}
    other = Meters()
    other.load(meters.state(), torch.device("cpu"))
    other.add({"loss": torch.tensor(6.0)})
    assert other.means() == {"loss": 4.0, "norm": 1.0}
    assert Meters().means() == {} and Meters().waiting() == 0


def test_a_loader_that_is_too_slow_is_told_once(detector, data, tmp_path, monkeypatch, capsys):
    read = fpn.data.batching.read_image
    monkeypatch.setattr(fpn.data.batching, "read_image", lambda *a, **k: (time.sleep(0.3), read(*a, **k))[1])
    run = fpn.train(detector, data, out=tmp_path / "run", **{**QUICK, "epochs": 2})
    assert run.history[0]["waiting"] > 0.3
    assert capsys.readouterr().err.count("of the time was spent waiting for images (--workers 0") == 1


def test_a_bad_batch_leaves_no_trace_in_batch_norm(detector, data, tmp_path, monkeypatch):
    """Infinite activations reach the running statistics before the loss is known."""
    stem = next(module for module in detector.modules() if isinstance(module, torch.nn.Conv2d))
    calls = []

    def explode(module, inputs, output):
        calls.append(module.training)
        return output * (math.inf if len(calls) == 1 else 1.0)

    stem.register_forward_hook(explode)
    fpn.train(detector, data, out=tmp_path / "run", **{**QUICK, "on_nan": "skip", "ema": 0.0})
    assert all(torch.isfinite(value).all() for value in fpn.load(tmp_path / "run" / "last.safetensors").buffers())


def test_without_a_moving_average_batch_norm_learns_too(detector, data, tmp_path):
    fpn.train(detector, data, out=tmp_path / "run", **{**QUICK, "ema": 0.0})
    norm = next(module for module in detector.modules() if isinstance(module, torch.nn.BatchNorm2d))
    assert norm.num_batches_tracked == 2


def test_training_leaves_signals_and_algorithms_as_they_were(detector, data, tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    fpn.train(detector, data, out=tmp_path / "run", **{**QUICK, "deterministic": True})
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert not torch.are_deterministic_algorithms_enabled()


def test_weights_that_are_nan_detect_nothing(detector, data):
    with torch.no_grad():
        for parameter in detector.parameters():
            parameter.fill_(math.nan)
    assert len(fpn.predict(detector, torch.zeros(3, 64, 64, dtype=torch.uint8), 0.0, "cpu")) == 0


def test_images_without_objects_are_negatives(detector, data, tmp_path):
    split = data["train"]
    empty = split.select(np.arange(0), "x")
    nothing = replace(split, offsets=split.offsets * 0, boxes=empty.boxes, labels=empty.labels, ignore=empty.ignore,
                      areas=empty.areas)  # fmt: skip
    with pytest.raises(DataError, match="no image .* has an object"):
        fpn.train(detector, {"train": nothing}, out=tmp_path / "run", **QUICK)
    batch = next(iter(fpn.data.loader(nothing, fpn.data.train_transform((64,)), 4, training=True)))
    losses = detector.losses(batch)
    sum(losses.values()).backward()
    assert losses["box"] == 0 and losses["rpn_box"] == 0 and losses["class"] > 0 and losses["rpn_class"] > 0
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in detector.parameters())
