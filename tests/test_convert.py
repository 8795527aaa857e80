"""`fpn convert`: foreign checkpoints in, ours out, and back."""

import argparse
import collections
import json
import os
import pickle
import zipfile

import foreign_reference as reference
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import fpn
from fpn.cli import main
from fpn.errors import CheckpointError, FpnError
from fpn.weights.checkpoint import KEY
from fpn.weights.convert import convert_file, from_file
from fpn.weights.torchvision import from_torchvision, to_torchvision

THEIRS = {"whole_pixels": True, "floor_stride": True, "pooling": "align_v1"}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A small detector in torchvision's form, and itself."""
    torch.manual_seed(0)
    detector = fpn.build(backbone="resnet18", weights="none", classes=("a", "b"), width=16, hidden=16, **THEIRS)
    file = tmp_path_factory.mktemp("theirs") / "model.pth"
    torch.save(to_torchvision(detector), file)
    return file, detector


def run(*arguments):
    main(["convert", *map(str, arguments)])


def fails(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    assert isinstance(stop.value.code, str)
    return stop.value.code


def test_torchvisions_file_becomes_a_detector_and_goes_back(theirs, tmp_path, capsys):
    file, detector = theirs
    ours, back = tmp_path / "new" / "ours.safetensors", tmp_path / "back.pth"
    run(file, "--out", ours, "--classes", "a", "b")
    assert "from torchvision: faster_rcnn, resnet18, 2 classes" in capsys.readouterr().out
    loaded = fpn.load(ours)
    assert loaded.classes == ("a", "b")
    assert all(torch.equal(v, detector.state_dict()[k]) for k, v in loaded.state_dict().items())
    run(ours, "--out", back)
    wanted, found = torch.load(file), torch.load(back)
    assert wanted.keys() == found.keys() and all(torch.equal(v, found[k]) for k, v in wanted.items())


def test_mistakes_are_told_in_one_line_and_nothing_is_written(theirs, tmp_path, capsys):
    file, detector = theirs
    weights, other, cut = tmp_path / "weights.pth", tmp_path / "ours.safetensors", tmp_path / "cut.pth"
    torch.save({"fc.weight": torch.zeros(2, 2)}, weights)
    cut.write_bytes(file.read_bytes()[:1000])
    fpn.weights.save(detector, other)
    out = tmp_path / "out.safetensors"
    for arguments, said in (
        ([tmp_path / "no.pth", "--out", out], "no.pth: no such file"),
        ([tmp_path, "--out", out], "a folder, not a file"),
        ([cut, "--out", out], "cut.pth"),
        ([weights, "--out", out], "not a detector with a feature pyramid of torchvision, detectron2 or mmdetection"),
        ([file, "--out", out, "--classes", "a"], "2 classes"),
        ([file, "--out", tmp_path / "out.onnx"], "must end in .safetensors"),
        ([other, "--out", out, "--classes", "a", "b"], "knows its classes"),
        ([other, "--out", other], "the file to read cannot be the file to write"),
    ):
        assert said in fails(capsys, *arguments), arguments
        assert not out.exists()


def test_what_torchvision_cannot_hold_is_told(tmp_path, capsys):
    detector = fpn.build(backbone="tiny", weights="none", classes=("a",), width=16, hidden=16)
    file, out = fpn.weights.save(detector, tmp_path / "tiny.safetensors"), tmp_path / "out.pth"
    assert "torchvision" in fails(capsys, file, "--out", out)
    assert not out.exists()


def test_checkpoints_as_training_leaves_them_are_converted(theirs, tmp_path):
    """torchvision's script keeps its arguments beside the weights, mmdetection's and detectron2's what they logged."""
    files = {"torchvision": torch.load(theirs[0])}
    for library in ("detectron2", "mmdetection"):
        files[library] = reference.load(next(reference.REFERENCE.glob(f"{library}_faster_rcnn_*.npz")))[1]
    for library, state in files.items():
        key = "state_dict" if library == "mmdetection" else "model"
        file = tmp_path / f"{library}.pth"
        torch.save({key: state, "epoch": 3, "args": argparse.Namespace(lr=1), "log": collections.Counter("a")}, file)
        detector, found = from_file(file, short=320, long=640)
        assert found == library and detector.spec.sides == (320, 640)


def pickled(content):
    return lambda file, state: file.write_bytes(pickle.dumps(content, 4))


def zipped(file, state):
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"\x80\x02X\x00\x00\x00\x01" + b"a" * 2**24 + b".")


def with_tensor(change):
    """A state dict of torchvision's whose class layer is changed."""
    name = "roi_heads.box_predictor.cls_score.weight"
    return lambda file, state: torch.save({**state, name: change(state[name])}, file)


class Runs:
    def __reduce__(self):
        return os.mkdir, ("hacked",)


@pytest.mark.filterwarnings("ignore:(Validating sparse|Sparse invariant)")
@pytest.mark.parametrize(
    "name, write, said",
    [
        (
            "a.pkl",
            pickled({"model": {"a": np.zeros((3 * 10**8, 0), "f2")}}),
            "tensor a has fewer numbers than its shape says",
        ),
        ("a.pkl", pickled({"model": {1: np.zeros(1, "f2")}}), "holds no state dict"),
        ("a.pth", zipped, "holds more than its size"),
        (
            "a.pth",
            with_tensor(lambda value: torch.zeros(1, 1).expand(3 * 10**8, 1024)),
            "fewer numbers than its shape says",
        ),
        ("a.pth", with_tensor(lambda value: value.to("meta")), "fewer numbers than its shape says"),
        ("a.pth", with_tensor(lambda value: value.to_sparse()), "fewer numbers than its shape says"),
        ("a.pth", with_tensor(lambda value: value[:0]), "fewer numbers than its shape says"),
        ("a.pth", with_tensor(lambda value: "x"), "holds no state dict"),
        ("a.pth", lambda file, state: torch.save(dict(enumerate(state.values())), file), "holds no state dict"),
        (
            "a.pth",
            lambda file, state: torch.save({"model": state, "x": Runs()}, file),
            r"asks for \w+.mkdir, which weights do not",
        ),
        ("a.pth", lambda file, state: file.write_bytes(b"garbage"), "damaged, or of another kind"),
    ],
)
def test_hostile_files_are_refused_in_one_short_line(theirs, tmp_path, monkeypatch, name, write, said):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / name
    write(file, torch.load(theirs[0]))
    with pytest.raises(CheckpointError, match=said) as error:
        from_file(file)
    text = str(error.value)
    assert text.startswith(f"{file}: ") and len(text) < len(str(file)) + 200 and "weights_only" not in text
    assert not (tmp_path / "hacked").exists()


def test_options_that_the_weights_tell_are_refused(theirs):
    with pytest.raises(CheckpointError, match="tell backbone and model: leave it out"):
        from_torchvision(theirs[0], model="fcos", backbone="resnet50")


def test_a_full_disk_is_told(theirs, tmp_path, monkeypatch):
    ours = fpn.weights.save(theirs[1], tmp_path / "ours.safetensors")

    def full(state, file):
        file.write_bytes(b"half of it")
        raise RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(FpnError, match=r"out\.pth: cannot be written \(PytorchStreamWriter failed"):
        convert_file(str(ours), tmp_path / "out.pth")
    assert [file.name for file in tmp_path.iterdir()] == ["ours.safetensors"]


@pytest.mark.parametrize(
    "options, said",
    [({"extra": "max"}, "levels above the backbone's by max"), ({"tower_convolutions": 2}, "towers of 2 convolutions")],
)
def test_a_retinanet_that_torchvision_has_not_is_refused(options, said):
    habits = {"whole_pixels": True, "floor_stride": True, "anchor_offset": 0.0}
    detector = fpn.build("retinanet", backbone="resnet18", weights="none", classes=("a",), width=8, **habits, **options)
    with pytest.raises(CheckpointError, match=said):
        to_torchvision(detector)


def test_loading_a_foreign_file_points_to_convert(theirs):
    with pytest.raises(CheckpointError, match="run `fpn convert` on it first"):
        fpn.load(theirs[0])
    with pytest.raises(CheckpointError, match="by `fpn convert`"):
        fpn.build(backbone="resnet18", weights=theirs[0], classes=("a",))


def test_damaged_metadata_is_one_error(theirs, tmp_path):
    spec, file = theirs[1].spec.as_dict(), tmp_path / "a.safetensors"
    two = {**spec, "settings": {**spec["settings"], "mean": [1, 2]}}
    for text, said in (
        ('{"format": 2}', "newer fpn"),
        ("[" * 100_000, "metadata is damaged"),
        ("5", "metadata is damaged"),
        (json.dumps({"format": 1, "version": "0", "spec": two}), "options this version does not know"),
    ):
        save_file({"a": torch.zeros(1)}, file, metadata={KEY: text})
        with pytest.raises(CheckpointError, match=said):
            fpn.load(file)
