"""Kill and go on: a run that is killed at any moment and resumed ends as if it had never been stopped."""

import csv
import os
import random
import signal
import time

import pytest
import torch
import yaml
from fresh import COMMAND, start

from fpn.data.generated import generate
from fpn.training.resume import STATE
from fpn.weights.checkpoint import read

OPTIONS = {"backbone": "tiny", "weights": "none", "short": 64, "width": 16, "epochs": 3, "batch": 4, "device": "cpu",
           "workers": 2, "scales": [64, 80], "augment": "strong", "mosaic": 0.7, "ema": 0.9,
           "save_minutes": 0}  # fmt: skip
TIMES = {"seconds", "images_per_second", "waiting"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return generate(tmp_path_factory.mktemp("data") / "shapes", images=24, size=(96, 96), seed=2)


def train(log, *arguments, config=None, before=""):
    """`fpn train` in a process of its own, after some code; `config` are options for a YAML file beside the log."""
    log.with_suffix(".yaml").write_text(yaml.safe_dump({"train": config or {}}))
    return start(before + COMMAND, "train", *arguments, "--config", log.with_suffix(".yaml"), log=log)


def outcome(out):
    """What must not depend on how often a run was stopped: all weights, and all of metrics.csv but the times."""
    rows = list(csv.DictReader((out / "metrics.csv").read_text().splitlines()))
    weights = {name: read(out / f"{name}.safetensors")[1] for name in ("best", "last")}
    return weights, [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    log = out / "log.txt"
    process = train(log, data, "--out", out, config=OPTIONS)
    process.join()
    assert process.exitcode == 0, log.read_text()
    return outcome(out)


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_bitwise_the_same(data, whole, tmp_path):
    chance, out, log, kills, positions = random.Random(5), tmp_path / "run", tmp_path / "log.txt", 0, set()
    arguments, options = [data, "--out", out], OPTIONS
    while True:
        process = train(log, *arguments, config=options)
        before = (out / STATE).stat().st_mtime_ns if (out / STATE).exists() else 0
        while process.is_alive() and not ((out / STATE).exists() and (out / STATE).stat().st_mtime_ns > before):
            time.sleep(0.02)
        if kills == 3 or not process.is_alive():
            break
        time.sleep(chance.uniform(0, 0.6))
        process.kill()
        process.join()
        kills += 1
        positions.add(tuple(torch.load(out / STATE, weights_only=True)["begin_at"]))
        arguments, options = [data, "--out", out, "--resume"], None
    process.join()
    assert process.exitcode == 0, log.read_text()
    assert kills == 3 and any(done for _, done in positions), f"killed at {positions}, never within an epoch"
    (weights, rows), (weights_whole, rows_whole) = outcome(out), whole
    assert rows == rows_whole
    for name in weights:
        assert all(torch.equal(value, weights_whole[name][key]) for key, value in weights[name].items())


def test_a_disk_that_is_full_leaves_the_previous_state_whole(data, tmp_path):
    """No file may grow beyond 100 kB, which a state does: what a full disk does to a write in the middle."""
    out, log = tmp_path / "run", tmp_path / "log.txt"
    process = train(log, data, "--out", out, config={**OPTIONS, "workers": 0})
    while not (out / STATE).exists() and process.is_alive():
        time.sleep(0.02)
    process.kill()
    process.join()
    before = (out / STATE).read_bytes()
    limit = f"import resource, signal; resource.setrlimit(resource.RLIMIT_FSIZE, ({len(before) // 2},) * 2); "
    process = train(
        log, data, "--out", out, "--resume", before=limit + "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    )
    process.join()
    said = log.read_text()
    assert process.exitcode == 1 and "cannot be written" in said and "Traceback" not in said, said
    assert (out / STATE).read_bytes() == before
    assert not [path for path in out.iterdir() if path.name.endswith(".tmp")]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_asked_to_stop_writes_its_state_first(data, tmp_path, number):
    out, log = tmp_path / "run", tmp_path / "log.txt"
    options = {**OPTIONS, "epochs": 200, "save_minutes": 9, "workers": 0}
    process = train(log, data, "--out", out, config=options)
    while not (out / STATE).exists() and process.is_alive():
        time.sleep(0.02)
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == 1
    said = log.read_text()
    assert "stopping after this step" in said and f"--out {out} --resume" in said and "Traceback" not in said
    epoch, done = torch.load(out / STATE, weights_only=True)["begin_at"]
    assert epoch > 1 or done  # more than the first epoch, after which it was asked
