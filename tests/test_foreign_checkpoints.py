"""detectron2's and mmdetection's checkpoints: read without running code, converted, and with the same numbers."""

import collections
import os
import pickle
import re
import struct

import foreign_reference as reference
import numpy as np
import pytest
import torch

from fpn.errors import CheckpointError
from fpn.weights.detectron2 import anchor_options, from_detectron2, look_of
from fpn.weights.files import read_tensors
from fpn.weights.foreign import coco_classes, names_for, ratio_first
from fpn.weights.mmdetection import configuration_in, from_mmdetection, options_in
from fpn.weights.pickles import Opaque, read_pickle, read_torch

FILES = sorted(reference.REFERENCE.glob("*.npz"))


def converted(file, **options):
    numbers, state = reference.load(file)
    convert = from_detectron2 if file.stem.startswith("detectron2") else from_mmdetection
    return convert(state, **options), numbers


@pytest.mark.parametrize("file", FILES, ids=[file.stem for file in FILES])
def test_numbers_are_those_of_the_other_library(file):
    detector, numbers = converted(file)
    found = reference.differences(reference.prepared(detector), numbers)
    assert max(found.values()) < 1e-4, found


def test_references_are_there_for_both_libraries():
    """An empty folder would make the test above pass without testing anything."""
    models = {tuple(re.findall(r"^([a-z2]+)_(\w+)_[rR]_?\d+$", file.stem)[0]) for file in FILES}
    two = {"faster_rcnn", "mask_rcnn", "retinanet"}
    assert {("detectron2", name) for name in two | {"cascade_mask_rcnn"}} <= models
    assert {("mmdetection", name) for name in two | {"cascade_rcnn", "atss"}} <= models
    assert sum(file.stat().st_size for file in FILES) < 200_000


# Reading pickles


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_arrays_come_out_of_every_protocol(tmp_path, protocol):
    weights = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "fortran": np.asfortranarray(np.random.default_rng(0).random((3, 4))),
        "half": np.float16([1, -2]),
        "empty": np.zeros((0, 3), dtype=np.int64),
        "one": np.array(True),
    }
    content = {"model": weights, "__author__": "somebody", "n": np.int64(3), "o": collections.OrderedDict(x=1)}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content, protocol))
    read = read_pickle(tmp_path / "a.pkl")
    for name, value in weights.items():
        assert torch.equal(read["model"][name], torch.from_numpy(np.ascontiguousarray(value).reshape(value.shape)))
    assert (read["__author__"], read["n"], read["o"]) == ("somebody", 3, {"x": 1})


def test_a_file_that_python_2_wrote_is_read(tmp_path):
    """Its texts are bytes, among them the data of arrays."""
    data = struct.pack("<2f", 1.5, -2.0)
    content = (
        b"\x80\x02}U\x05modelq\x01}U\x01wcnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01bt"
        b"R(K\x01K\x02\x85cnumpy\ndtype\n(U\x02f4K\x00K\x01tR(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"\x89U\x08" + data + b"tbss."
    )
    (tmp_path / "a.pkl").write_bytes(content)
    assert read_pickle(tmp_path / "a.pkl")["model"]["w"].tolist() == [1.5, -2.0]


class Runs:
    """An object whose unpickling calls a function with a file's name."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def nested(depth: int = 60):
    """A tuple that holds itself twice, 60 deep: its hash or a walk through it would take 2**60 steps."""
    value = ("x",)
    for _ in range(depth):
        value = (value, value)
    return value


def array_of(size: int, data: bytes) -> bytes:
    """A pickle with an array that says it has `size` elements."""
    return (
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85C\x01btR(K\x01"
        + b"\x8a\x08"
        + struct.pack("<q", size)
        + b"\x85cnumpy\ndtype\n(X\x02\x00\x00\x00f4K\x00K\x01tR"
        + b"\x89B"
        + struct.pack("<I", len(data))
        + data
        + b"tb."
    )


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps({"model": Runs(os.mkdir, "hacked")}, 2),
        pickle.dumps({"model": Runs(os.system, "mkdir hacked")}, 4),
        pickle.dumps({"model": Runs(eval, "__import__('os').mkdir('hacked')")}, 2),
        b"cos\nmkdir\n(X\x06\x00\x00\x00hackedtR.",  # protocol 0
        b"\x80\x02cos\nmkdir\nX\x06\x00\x00\x00hacked\x85\x81.",  # NEWOBJ
        b"(ios\nmkdir\n.",  # INST
        pickle.dumps({"model": {"a": np.array([Runs(os.mkdir, "hacked")], dtype=object)}}, 2),
        pickle.dumps({"model": {"a": np.array([object()], dtype=object)}}, 5),
        pickle.dumps({"a": np.zeros(2, dtype=[("x", "f4")])}, 2),
        b"\x80\x02}" + pickle.dumps(nested(), 2)[2:-1] + b"K\x01s.",
        array_of(2**40, b"\0" * 8),
        array_of(-2, b"\0" * 8),
        array_of(2**40, b"").replace(b"\x85c", b"K\x00\x86c"),  # of shape (2**40, 0)
        b"\x80\x02\x8b" + struct.pack("<I", 2**20) + b"\x7f" * 2**20 + b".",  # a number of a million bytes
        b"\x80\x04X\x2c\x01\x00\x00" + b"a" * 300 + b"q\x00h\x00\x93.",  # a name of 600 letters
        b"\x80\x02r\xff\xff\xff\x7f.",  # LONG_BINPUT of 2**31 - 1, on an empty stack
        b"\x80\x02N0N0b.",
        b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"ab.",  # BINBYTES8 of more bytes than there are
        b"\x80\x02(((((((((t.",
        b"\x80\x02h\x05.",
        b"",
        b"not a pickle",
    ],
)
def test_hostile_and_damaged_pickles_are_refused(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.pkl").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"a\.pkl: not a pickle of plain numbers and arrays"):
        read_pickle("a.pkl")
    assert not (tmp_path / "hacked").exists()


def test_nothing_multiplies_in_memory(tmp_path):
    """An array of 1 MB that is asked for 1000 times, and lists of lists that would have 10**12 entries."""
    data = np.zeros(250_000, dtype=np.float32)
    call = (
        b"cnumpy.core.numeric\n_frombuffer\n(h\x63cnumpy\ndtype\n(X\x02\x00\x00\x00f4K\x00K\x01tR"
        b"J\x90\xd0\x03\x00\x85X\x01\x00\x00\x00CtR"
    )
    many = b"\x80\x03B" + struct.pack("<I", data.nbytes) + data.tobytes() + b"q\x63](" + call * 1000 + b"e."
    (tmp_path / "many.pkl").write_bytes(many)
    with pytest.raises(CheckpointError, match="larger than the file"):
        read_pickle(tmp_path / "many.pkl")
    value = []
    for _ in range(12):
        value = [value] * 10
    (tmp_path / "laughs.pkl").write_bytes(pickle.dumps({"model": value}, 4))
    assert len(read_pickle(tmp_path / "laughs.pkl")["model"]) == 10  # shared, as they were written
    with pytest.raises(CheckpointError, match="holds no state dict"):
        read_tensors(tmp_path / "laughs.pkl")


def test_every_cut_of_a_file_is_refused(tmp_path):
    whole = pickle.dumps({"model": {"a": np.arange(5, dtype=np.float32)}, "__author__": "x"}, 2)
    for length in range(len(whole)):
        (tmp_path / "a.pkl").write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            read_pickle(tmp_path / "a.pkl")


class History:
    """Stands for the objects that mmengine leaves in a checkpoint."""

    def __init__(self):
        self.values = np.zeros(3)


def make(folder):
    os.mkdir(folder)


@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files_with_foreign_objects_are_read_and_run_nothing(tmp_path, zipped, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = {
        "state_dict": collections.OrderedDict(a=torch.ones(2)),
        "meta": {"dataset_meta": {"classes": ("cat", "dog")}, "time": "now", "log": History()},
        "hub": Runs(make, "hacked"),
    }
    torch.save(content, "a.pth", _use_new_zipfile_serialization=zipped)
    read = read_torch("a.pth")
    assert not (tmp_path / "hacked").exists()
    assert torch.equal(read["state_dict"]["a"], torch.ones(2))
    assert read["meta"]["dataset_meta"] == {"classes": ("cat", "dog")}
    assert isinstance(read["meta"]["log"], Opaque) and isinstance(read["hub"], Opaque)
    for function, argument in ((eval, "__import__('os').mkdir('hacked')"), (os.mkdir, "hacked")):
        torch.save({"state_dict": {}, "meta": Runs(function, argument)}, "b.pth", _use_new_zipfile_serialization=zipped)
        with pytest.raises(CheckpointError, match=r"b\.pth: not a readable weights file"):
            read_torch("b.pth")
        assert not (tmp_path / "hacked").exists()
    size = os.path.getsize("a.pth")
    for part in (0, 10, size // 2, size - 1):
        (tmp_path / "cut.pth").write_bytes((tmp_path / "a.pth").read_bytes()[:part])
        with pytest.raises(CheckpointError, match=r"cut\.pth"):
            read_torch("cut.pth")


# Converting


def test_a_file_of_the_model_zoo_becomes_a_detector(tmp_path):
    file = next(file for file in FILES if file.stem == "detectron2_retinanet_R_18")
    state = reference.load(file)[1]
    cells = {f"anchor_generator.cell_anchors.{n}": cell_of(32.0 * 2**n) for n in range(5)}
    pixels = {"pixel_mean": torch.tensor([103.53, 116.28, 123.675]).view(3, 1, 1), "pixel_std": torch.ones(3, 1, 1)}
    arrays = {name: value.numpy() for name, value in (state | cells | pixels).items()}
    (tmp_path / "zoo.pkl").write_bytes(pickle.dumps({"model": arrays, "__author__": "Detectron2 Model Zoo"}, 2))
    names = [f"kind {n}" for n in range(reference.CLASSES)]
    detector = from_detectron2(tmp_path / "zoo.pkl", classes=names, score=0.3)
    assert detector.classes == tuple(names) and detector.score == 0.3 and detector.bgr
    assert detector.spec.anchor_sizes == (32.0, 64.0, 128.0, 256.0, 512.0)
    assert detector.spec.anchor_scales == pytest.approx([1, 2 ** (1 / 3), 2 ** (2 / 3)], abs=1e-5)
    plain = from_detectron2(state)
    assert all(
        torch.equal(a, b) for a, b in zip(detector.state_dict().values(), plain.state_dict().values(), strict=True)
    )


def cell_of(size: float) -> torch.Tensor:
    """detectron2's anchors of a cell: (size, ratio)."""
    scaled = [(size * 2 ** (n / 3), ratio) for n in range(3) for ratio in (0.5, 1.0, 2.0)]
    half = torch.tensor([[s / r**0.5 / 2, s * r**0.5 / 2] for s, r in scaled])
    return torch.cat([-half, half], dim=1)


def test_anchors_are_read_from_cells():
    found = anchor_options([cell_of(40.0), cell_of(80.0)])
    assert found["anchor_sizes"] == (40.0, 80.0) and found["anchor_ratios"] == (0.5, 1.0, 2.0)
    assert found["anchor_scales"] == pytest.approx([1, 2 ** (1 / 3), 2 ** (2 / 3)], abs=1e-5)
    # Channel 2 * size + ratio, for 3 sizes and 2 ratios, with two channels an anchor.
    theirs = torch.arange(12).view(12, 1)
    assert ratio_first(theirs, 3, 2).flatten().tolist() == [0, 1, 4, 5, 8, 9, 2, 3, 6, 7, 10, 11]


def test_pixels_and_strides_follow_the_backbone():
    msra, resnext = look_of("resnet50", None, None), look_of("resnext101_32x8d", None, None)
    assert msra["bgr"] and msra["stride_in_1x1"] and msra["std"] == (1 / 255,) * 3
    assert resnext["bgr"] and not resnext["stride_in_1x1"]
    assert resnext["std"] == pytest.approx([0.229, 0.224, 0.225], abs=1e-6)
    assert msra["mean"] == pytest.approx([0.485, 0.456, 0.406], abs=1e-6)
    rgb = look_of("resnet50", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
    assert not rgb["bgr"] and not rgb["stride_in_1x1"] and rgb["mean"] == msra["mean"]


def test_a_configuration_in_the_file_decides():
    text = """
model = dict(
    data_preprocessor=dict(mean=[103.53, 116.28, 123.675], std=[1.0, 1.0, 1.0], bgr_to_rgb=False),
    backbone=dict(style='caffe'), neck=dict(relu_before_extra_convs=True),
    rpn_head=dict(anchor_generator=dict(scales=[4, 8], ratios=[1.0], strides=[4, 8, 16, 32, 64])),
    test_cfg=dict(rcnn=dict(score_thr=0.1, nms=dict(type='nms', iou_threshold=0.6), max_per_img=50)))
train = exit()
"""
    spec = converted(next(f for f in FILES if f.stem == "mmdetection_faster_rcnn_r50"))[0].spec
    found = options_in(configuration_in({"cfg": text}), spec)
    assert found.pop("mean") == pytest.approx((0.485, 0.456, 0.406), abs=1e-6)
    assert found == {
        "std": (1 / 255,) * 3,
        "bgr": True,
        "stride_in_1x1": True,
        "extra_relu": True,
        "anchor_sizes": (16.0, 32.0, 64.0, 128.0, 256.0),
        "anchor_ratios": (1.0,),
        "anchor_scales": (1.0, 2.0),
        "anchor_offset": 0.0,
        "score": 0.1,
        "max_detections": 50,
        "box_nms": 0.6,
    }
    for hostile in ("model = exit()", "model = dict(", "model = " + "(" * 10_000, "model = [].__class__", 3):
        assert configuration_in({"cfg": hostile}) == {}


def test_strides_may_be_pairs():
    text = "model = dict(rpn_head=dict(anchor_generator=dict(scales=[8], ratios=[1.0], strides=[(4, 4), (8, 8)])))"
    spec = converted(next(f for f in FILES if f.stem == "mmdetection_faster_rcnn_r50"))[0].spec
    assert options_in(configuration_in({"cfg": text}), spec)["anchor_sizes"] == (32.0, 64.0)


@pytest.mark.parametrize(
    "text",
    [
        "model = 5",
        "model = dict(neck=5)",
        "model = dict(backbone=None)",
        "model = dict(rpn_head=dict(), test_cfg=dict(rcnn=dict(score_thr='x')))",
        "model = dict(rpn_head=dict(anchor_generator=dict(strides=[4], ratios=['x'], scales=[8])))",
        "model = dict(rpn_head=dict(anchor_generator=dict(strides=[4], ratios=[1.0], scales=[0])))",
        "img_norm_cfg = dict(mean=[1.0, 2.0], std=[1.0, 2.0])",
    ],
)
def test_an_odd_configuration_is_one_error(text):
    state = reference.load(next(f for f in FILES if f.stem == "mmdetection_faster_rcnn_r50"))[1]
    with pytest.raises(CheckpointError, match="its configuration cannot be read"):
        from_mmdetection({"state_dict": state, "meta": {"cfg": text}})


def test_class_names_are_cocos_where_there_are_80():
    names = coco_classes()
    assert len(set(names)) == 80 and (names[0], names[79]) == ("person", "toothbrush")
    assert names_for(80, None) == names and names_for(2, None) == ("class 1", "class 2")
    with pytest.raises(CheckpointError, match="1 class names for weights with 2 classes"):
        names_for(2, ["a"])


@pytest.mark.parametrize(
    "convert, stem", [(from_detectron2, "detectron2_mask_rcnn_R_18"), (from_mmdetection, "mmdetection_mask_rcnn_r18")]
)
def test_one_error_lists_all_that_does_not_fit(convert, stem):
    state = reference.load(reference.REFERENCE / f"{stem}.npz")[1]
    objectness = next(name for name in state if "objectness" in name or "rpn_cls" in name)
    lateral = next(name for name in state if "lateral" in name and name.endswith("bias"))
    box = next(name for name in state if "fc2.weight" in name or "shared_fcs.1.weight" in name)
    wrong = {name: value for name, value in state.items() if name != lateral}
    wrong |= {objectness: torch.zeros(5, 7, 1, 1), box: torch.zeros(3)}
    with pytest.raises(CheckpointError) as error:
        convert(wrong)
    text = str(error.value)
    assert "3 tensors" in text and f"{objectness} has shape (5, 7, 1, 1)" in text
    assert f"{box} has shape (3,)" in text and "pyramid.lateral.2.bias (in fpn's names) is missing" in text
    with pytest.raises(CheckpointError, match="2 tensors are unknown: another, one"):
        convert(state | {"one": torch.zeros(1), "another": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"90 tensors are unknown: .*, and 82 more$") as error:
        convert(state | {f"other.{n}": torch.zeros(1) for n in range(90)})
    assert len(str(error.value)) < 500
    with pytest.raises(CheckpointError):
        convert({})
    with pytest.raises(CheckpointError, match="no such file"):
        convert("nowhere.pkl")
