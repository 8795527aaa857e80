"""`fpn.export`: what is written, what is refused, and that nothing is left where it goes wrong.

A stand-in takes the place of ONNX and OpenVINO: the detector itself, with a file that holds only what is known of it.
"""

from __future__ import annotations

import copy
import json
from dataclasses import asdict
from importlib import import_module
from importlib.metadata import version

import jaxtyping
import numpy as np
import pytest
import torch
from PIL import Image

import fpn
from fpn.data.generated import CLASSES, generate
from fpn.errors import CheckpointError, DataError, FpnError, OptionError
from fpn.exported import Exported, is_exported, load_exported
from fpn.exporting.certificate import confirm
from fpn.exporting.export import export
from fpn.exporting.whole import Whole


class StandIn:
    """The functions of a backend. `change` is what its files do to the outputs; `calls` what it was asked to write."""

    def __init__(self, change=lambda outputs: outputs):
        self.change, self.calls, self.whole = change, [], None

    def write(self, detector, path, precision="fp32", calibration=()):
        self.whole = Whole(detector)
        self.calls.append((precision, [image.shape for image in calibration]))
        path.write_text("{}")
        if path.suffix == ".xml":
            path.with_suffix(".bin").write_bytes(b"weights")

    def open_(self, path, threads=None):
        def run(images):
            with torch.inference_mode():
                return self.change({k: v.numpy() for k, v in self.whole(torch.from_numpy(images)).items()})

        return run

    def read_about(self, path):
        return json.loads(path.read_text())

    def write_about(self, path, about):
        path.write_text(json.dumps(about))


@pytest.fixture
def backend(monkeypatch):
    made = StandIn()
    for module in ("fpn.exported", "fpn.exporting.export"):
        monkeypatch.setattr(import_module(module), "backend", lambda kind: made)
    return made


@pytest.fixture(scope="module")
def detector():
    torch.manual_seed(0)
    made = fpn.build(backbone="tiny", classes=["Bär", "cat"], weights="none", width=16, hidden=32, short=64, long=96)
    torch.nn.init.normal_(made.box_head.classes.weight, std=0.2)
    return made


def test_an_exported_file_is_taken_like_a_checkpoint(detector, backend, tmp_path):
    checkpoint = fpn.weights.save(detector, tmp_path / "a.safetensors", {"epoch": 3})
    made = export(checkpoint, tmp_path / "new" / "a.onnx", licence="CC0-1.0", progress=False)
    assert isinstance(made, Exported) and made.path == tmp_path / "new" / "a.onnx"
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["a.onnx"]
    again = fpn.load(made.path)
    assert isinstance(again, Exported) and again.classes == ("Bär", "cat") and again.kind == "onnx"
    assert again.spec == detector.spec and asdict(again)["max_detections"] == detector.max_detections
    image = torch.randint(0, 256, (3, 50, 70), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    ours, theirs = (fpn.predict(one, image, 0.3) for one in (detector, again))
    assert len(ours) > 0 and torch.equal(ours.boxes, theirs.boxes) and ours.names == theirs.names
    about = again.about
    assert about["licence"] == {"code": "Apache-2.0", "weights": "CC0-1.0"} and about["classes"] == ["Bär", "cat"]
    assert about["source"]["file"] == "a.safetensors" and about["source"]["about"] == {"epoch": 3}
    assert about["thresholds"]["box_nms"] == 0.5 and about["versions"]["torch"] == version("torch")
    assert set(about["certificate"]["rows"]) >= {"odd sizes", "1 pixel wide or high", "nothing to see", "a batch of 3"}
    assert "certificate confirmed on 13 images" in confirm(again, progress=False)
    with pytest.raises(CheckpointError, match="cannot be trained or changed"):
        fpn.weights.load_detector(made.path)
    with pytest.raises(OptionError, match="runs on the CPU"):
        fpn.load(made.path, device="cuda")


def test_the_detector_itself_is_left_as_it_was(detector, backend, tmp_path):
    detector.train()
    wanted = {name: parameter.requires_grad for name, parameter in detector.named_parameters()}
    made = export(detector, tmp_path / "a.onnx", progress=False)
    assert detector.training and wanted == {n: p.requires_grad for n, p in detector.named_parameters()}
    assert "file" not in made.about["source"] and made.about["licence"]["weights"].startswith("not stated")


def test_a_file_that_differs_is_not_written(detector, backend, tmp_path):
    (tmp_path / "a.onnx").write_text("as it was")
    backend.change = lambda outputs: {**outputs, "boxes": outputs["boxes"] + 1}
    with pytest.raises(
        CheckpointError, match=r"a\.onnx: not written, the exported detector is not the original: usual"
    ):
        export(detector, tmp_path / "a.onnx", progress=False)
    backend.write = lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    with pytest.raises(FpnError, match=r"a\.onnx: cannot be written .*No space left"):
        export(detector, tmp_path / "a.onnx", progress=False)
    backend.write = lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        export(detector, tmp_path / "a.onnx", progress=False)
    assert [file.name for file in tmp_path.iterdir()] == ["a.onnx"]
    assert (tmp_path / "a.onnx").read_text() == "as it was"


def test_files_that_belong_together_arrive_together(detector, backend, tmp_path):
    images = [tmp_path / f"{n}.png" for n in range(3)]
    for n, file in enumerate(images):
        Image.new("RGB", (40 + n, 30)).save(file)
    out = tmp_path / "out" / "a.xml"
    made = export(detector, out, "openvino", "int8", calibrate=images, images=images, progress=False)
    assert sorted(file.name for file in out.parent.iterdir()) == ["a.bin", "a.xml"]
    assert backend.calls == [("int8", [(3, 30, 40), (3, 30, 41), (3, 30, 42)])]
    assert made.about["certificate"]["rows"]["images given"]["images"] == 3
    assert made.about["certificate"]["bound"]["AP"] == 0.03


@pytest.fixture
def unchecked():
    """Types are checked by fpn alone, as where it is installed."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


SOME = [torch.zeros(3, 8, 8, dtype=torch.uint8)]


@pytest.mark.parametrize(
    "out, keywords, words",
    [
        ("a.pt", {}, r"a\.pt: the name of the file to write must end in \.onnx, \.xml, \.pt2"),
        ("a.onnx", {"to": "openvino"}, r"must end in \.xml for openvino"),
        ("a.onnx", {"to": "tflite"}, "there are onnx, openvino, torch"),
        ("a.onnx", {"precision": "int8", "calibrate": SOME}, "onnx files have fp32; int8 is for openvino"),
        ("a.onnx", {"precision": "fp8"}, "onnx files have fp32"),
        ("a.xml", {"precision": "int8"}, "add --calibrate"),
        ("a.xml", {"calibrate": SOME}, "--calibrate is for precision int8; fp32 needs none"),
        ("a.onnx", {"images": SOME[0]}, "images must be a list of pictures, not Tensor"),
        ("a.onnx", {"images": "a.png"}, "images must be a list of pictures, not str"),
        ("a.onnx", {"images": [3]}, "images: int is no picture"),
    ],
)
def test_options_that_cannot_work_are_refused_before_anything_is_read(unchecked, tmp_path, out, keywords, words):
    with pytest.raises(OptionError, match=words):
        export(tmp_path / "not there", tmp_path / out, **keywords)
    assert not list(tmp_path.iterdir())


def test_what_is_no_detector_picture_or_split_is_refused_before_it_costs_minutes(
    unchecked, detector, backend, tmp_path
):
    out = tmp_path / "a.onnx"
    with pytest.raises(DataError, match="must be .3, H, W. and uint8"):
        export(detector, out, images=[torch.zeros(3, 8, 8)])
    with pytest.raises(OptionError, match="detector or the file of one is needed, not int"):
        export(3, out)
    data = fpn.data.load(generate(tmp_path / "data", 12, (64, 96), seed=1))
    with pytest.raises(OptionError, match=r"must be one split, such as fpn\.data\.load\(path\)\['val'\]"):
        export(detector, out, data=data)
    with pytest.raises(OptionError, match="are not the detector's"):
        export(detector, out, data=data["val"])
    assert backend.calls == [] and not out.exists()
    made = export(copy.deepcopy(detector).bfloat16(), out, images=[np.zeros((8, 9, 3), np.uint8)], progress=False)
    assert made.about["certificate"]["rows"]["images given"]["images"] == 1
    with pytest.raises(OptionError, match=r"a\.onnx is exported already"):
        export(made, tmp_path / "b.onnx")


def test_what_belongs_to_others_is_not_replaced(detector, backend, tmp_path):
    (tmp_path / "a.onnx").mkdir()
    with pytest.raises(OptionError, match=r"a\.onnx: is a folder"):
        export(detector, tmp_path / "a.onnx")
    (tmp_path / "b.bin").write_text("of another program")
    with pytest.raises(OptionError, match=r"b\.bin: is there already, of something else than b\.xml"):
        export(detector, tmp_path / "b.xml")
    assert backend.calls == [] and (tmp_path / "b.bin").read_text() == "of another program"


def test_an_error_names_the_file_and_leaves_no_folder(detector, backend, tmp_path):
    def damaged(path):
        raise CheckpointError(f"{path}: is damaged")

    backend.read_about = damaged
    out = tmp_path / "new" / "deep" / "a.onnx"
    with pytest.raises(CheckpointError) as error:
        export(detector, out, progress=False)
    assert str(error.value) == f"{out}: is damaged" and not list(tmp_path.iterdir())


def test_a_detector_that_needs_regions_is_refused(tmp_path):
    made = fpn.build("fast_rcnn", backbone="tiny", classes=["a"], weights="none", width=16, hidden=32, short=64)
    with pytest.raises(OptionError, match="fast_rcnn looks at given regions"):
        export(made, tmp_path / "a.onnx")


def test_files_that_are_not_exported_detectors_are_told(detector, backend, tmp_path):
    file = tmp_path / "a.onnx"
    with pytest.raises(CheckpointError, match=r"a\.onnx: no such file"):
        fpn.load(file)
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(CheckpointError, match=r"a\.txt: not an exported file, which end in \.onnx, \.xml, \.pt2"):
        load_exported(tmp_path / "a.txt")
    good = dict(export(detector, file, progress=False).about)
    damages = [
        {},
        {**good, "format": "1"},
        {**good, "score": "high"},
        {**good, "score": float("nan")},
        {**good, "format": -5},
        {**good, "format": float("nan")},
        {**good, "max_detections": True},
        {**good, "max_detections": 0},
        {**good, "spec": []},
        {**good, "spec": {**good["spec"], "model": "other"}},
        {**good, "spec": {**good["spec"], "classes": []}},
        {**good, "spec": {**good["spec"], "unheard": 1}},
    ]
    for damaged in damages:
        file.write_text(json.dumps(damaged))
        with pytest.raises(CheckpointError, match=r"a\.onnx: what it says of itself is damaged"):
            fpn.load(file)
    file.write_text(json.dumps({**good, "format": 2}))
    with pytest.raises(CheckpointError, match="newer fpn"):
        fpn.load(file)
    assert is_exported("a.ONNX") and not is_exported("a.safetensors") and not is_exported("torchvision://a")


def test_the_command_measures_on_labelled_images(backend, tmp_path, capsys):
    from fpn.exporting.command import export as command

    data = generate(tmp_path / "data", 12, (64, 96), seed=1)
    torch.manual_seed(0)
    made = fpn.build(backbone="tiny", classes=CLASSES, weights="none", width=16, hidden=32, short=64, long=96)
    checkpoint = fpn.weights.save(made, tmp_path / "a.safetensors")
    command(checkpoint, data=data, limit=1)
    told = capsys.readouterr()
    assert f"written to {tmp_path / 'a.onnx'}" in told.out and "AP on val (1 images)" in told.err
    certificate = fpn.load(tmp_path / "a.onnx").about["certificate"]
    assert certificate["data"]["images"] == 1 and set(certificate["AP"]) == {"AP"}
    with pytest.raises(OptionError, match="--limit is 0"):
        command(checkpoint, data=data, limit=0)
    for alone in ({"limit": 3}, {"split": "val"}):
        with pytest.raises(OptionError, match="add --data"):
            command(checkpoint, **alone)
    command(checkpoint, out=tmp_path / "b.xml")
    assert fpn.load(tmp_path / "b.xml").kind == "openvino"
