"""Checkpoints: round trips, and files that are not ones."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import fpn
from fpn.errors import CheckpointError, FpnError
from fpn.structures import Batch
from fpn.weights.checkpoint import KEY


@pytest.fixture
def detector():
    torch.manual_seed(0)
    return fpn.build(backbone="tiny", classes=["Bär", "cat"], weights="none", short=64, width=16, hidden=32, score=0.01)


def batch() -> Batch:
    sizes = torch.tensor([[64, 96], [64, 60]])
    images = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Batch(images, sizes, sizes, torch.arange(2))


def test_a_loaded_detector_is_the_saved_one(detector, tmp_path):
    file = fpn.weights.save(detector, tmp_path / "new" / "a.safetensors", {"epoch": 3})
    again = fpn.load(file)
    assert again.classes == ("Bär", "cat") and again.spec == detector.spec and not again.training
    with torch.no_grad():
        before, after = detector.eval().detect(batch()), again.detect(batch())
    assert before.count.min() > 0
    for name in ("boxes", "scores", "labels", "levels", "count"):
        assert torch.equal(getattr(before, name), getattr(after, name))
    assert [p.name for p in file.parent.iterdir()] == ["a.safetensors"]  # nothing unfinished is left


def change(file, **metadata):
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        content = json.loads(opened.metadata()[KEY])
    save_file(load_file(file), file, metadata={KEY: json.dumps({**content, **metadata})})


def test_files_that_are_not_checkpoints_say_what_they_are(detector, tmp_path):
    file = tmp_path / "a.safetensors"
    with pytest.raises(CheckpointError, match=r"a\.safetensors: no such checkpoint"):
        fpn.load(file)
    file.write_bytes(b"hello")
    with pytest.raises(CheckpointError, match=r"a\.safetensors: not a checkpoint of fpn"):
        fpn.load(file)
    save_file({"x": torch.zeros(1)}, file)
    with pytest.raises(CheckpointError, match="was not written by fpn"):
        fpn.load(file)
    fpn.weights.save(detector, file)
    file.write_bytes(file.read_bytes()[:-1000])  # cut short
    with pytest.raises(CheckpointError, match="not a checkpoint of fpn"):
        fpn.load(file)


def test_metadata_that_does_not_fit_is_refused(detector, tmp_path):
    file = fpn.weights.save(detector, tmp_path / "a.safetensors")
    change(file, format=99, version="9.0")
    with pytest.raises(CheckpointError, match="newer fpn"):
        fpn.load(file)
    change(file, format=1, spec={**detector.spec.as_dict(), "model": "other"})
    with pytest.raises(CheckpointError, match="unknown model"):
        fpn.load(file)
    change(file, spec={**detector.spec.as_dict(), "classes": ["a", "b", "c"]})
    with pytest.raises(CheckpointError, match=r"box_head\.classes\.weight has shape"):
        fpn.load(file)


def test_a_full_disk_leaves_the_old_file(detector, tmp_path, monkeypatch):
    file = fpn.weights.save(detector, tmp_path / "a.safetensors")
    before = file.read_bytes()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fpn.weights.checkpoint.save_file", full)
    with pytest.raises(FpnError, match="No space left"):
        fpn.weights.save(detector, file)
    assert file.read_bytes() == before and len(list(tmp_path.iterdir())) == 1
