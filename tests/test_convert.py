"""`fpn convert`: foreign checkpoints in, ours out, and back."""

import pytest
import torch

import fpn
from fpn.cli import main
from fpn.weights.torchvision import to_torchvision

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
        ([tmp_path, "--out", out], "no such file"),
        ([cut, "--out", out], "cut.pth"),
        ([weights, "--out", out], "not a detector with a feature pyramid of torchvision, detectron2 or mmdetection"),
        ([file, "--out", out, "--classes", "a"], "2 classes"),
        ([file, "--out", tmp_path / "out.onnx"], "must end in .safetensors"),
        ([other, "--out", out, "--classes", "a", "b"], "knows its classes"),
    ):
        assert said in fails(capsys, *arguments), arguments
        assert not out.exists()


def test_what_torchvision_cannot_hold_is_told(tmp_path, capsys):
    detector = fpn.build(backbone="tiny", weights="none", classes=("a",), width=16, hidden=16)
    file, out = fpn.weights.save(detector, tmp_path / "tiny.safetensors"), tmp_path / "out.pth"
    assert "torchvision" in fails(capsys, file, "--out", out)
    assert not out.exists()
