"""Training: schedules, settings, the moving average, what happens when things go wrong."""

import csv
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import fpn
from fpn.data.generated import generate
from fpn.errors import DataError, OptionError, TrainingError
from fpn.training.learner import update_average
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
    monkeypatch.setattr("fpn.training.learner.score", lambda *_: Metrics({"AP": next(values)}, {}, []))
    monkeypatch.setattr(Metrics, "summary", lambda self: "")
    run = fpn.train(detector, data, out=tmp_path / "run", **{**QUICK, "epochs": 5, "patience": 2})
    assert run.best_epoch == 1 and len(run.history) == 3


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_images(detector, data, tmp_path):
    with torch.no_grad():
        detector.rpn.objectness.weight.fill_(math.nan)
    with pytest.raises(TrainingError, match=r"not finite at step 0 .*\.jpg"):
        fpn.train(detector, data, out=tmp_path / "run", **QUICK)


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
