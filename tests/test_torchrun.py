"""Two processes started by torchrun, as on a cluster: the run ends, and its measurements are those of one process."""

import csv
import os
import subprocess
import sys

import pytest

import fpn
from fpn.data.generated import generate

OPTIONS = ["--backbone", "tiny", "--weights", "none", "--short", "64", "--width", "16", "--batch", "2", "--epochs", "2",
           "--workers", "0", "--device", "cpu", "--devices", "2", "--precision", "32"]  # fmt: skip


@pytest.mark.slow
def test_two_processes_train_and_measure_as_one(tmp_path):
    data, out = generate(tmp_path / "shapes", images=18, size=(96, 96), seed=2), tmp_path / "run"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "fpn.cli", "train", str(data), "--out", str(out), *OPTIONS]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=one_thread)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and done.stdout.count("epoch 2/2") == 1  # one of them speaks
    rows = list(csv.DictReader((out / "metrics.csv").read_text().splitlines()))
    metrics = fpn.evaluate(fpn.load(out / "last.safetensors"), fpn.data.load(data)["val"])
    assert {name: float(rows[-1][name]) for name in metrics} == {
        name: round(value, 5) for name, value in metrics.items()
    }
