"""Detectors compiled to .pt2 files, with the eager results."""

import json
import os
import zipfile

import pytest
import torch
from fresh import run

import fpn
from fpn.errors import CheckpointError, OptionError
from fpn.exporting import inductor
from fpn.exporting.inductor import open_, read_about, write, write_about


@pytest.mark.slow
def test_a_file_finds_what_the_detector_finds(tmp_path):
    run(
        """
        import sys
        from pathlib import Path
        import torch, fpn
        from fpn.exporting import inductor
        from fpn.exporting.whole import Whole

        torch.manual_seed(0)
        torch.set_num_threads(1)
        made = fpn.build(backbone="tiny", classes=["a", "b"], weights="none", width=16, hidden=32, short=64, long=96,
                         proposals=(100, 100)).eval()
        for layer in (made.box_head.classes, made.box_head.offsets, made.rpn.objectness, made.rpn.offsets):
            torch.nn.init.normal_(layer.weight, std=0.2)
        file = Path(sys.argv[1]) / "a.pt2"
        inductor.write(made, file)
        inductor.write_about(file, {"classes": ["a", "b"]})
        assert [entry.name for entry in file.parent.iterdir()] == ["a.pt2"]
        ask, whole = inductor.open_(file), Whole(made)
        for shape in ((1, 3, 64, 96), (3, 3, 120, 70), (2, 3, 50, 131), (2, 3, 1, 1), (1, 3, 200, 1), (2, 3, 1, 90)):
            some = torch.randint(0, 256, shape, dtype=torch.uint8)
            with torch.no_grad():
                expected = whole(some)
            found = {name: torch.from_numpy(value) for name, value in ask(some.numpy()).items()}
            assert set(found) == set(expected) and (min(shape) == 1 or expected["count"].sum() > 0)
            for name in ("count", "labels", "levels"):
                assert torch.equal(found[name], expected[name]), (shape, name)
            torch.testing.assert_close(found["boxes"], expected["boxes"], atol=1e-2, rtol=0)
            torch.testing.assert_close(found["scores"], expected["scores"], atol=1e-4, rtol=0)
    """,
        arguments=[tmp_path],
    )


def archive(path, **files):
    with zipfile.ZipFile(path, "w") as zipped:
        zipped.writestr("model/data/model.so", os.urandom(2**21))
        for name, content in files.items():
            zipped.writestr(f"model/extra/{name}.json", content)
    return path


def test_what_a_file_says_is_replaced_and_the_rest_kept(tmp_path):
    file = archive(tmp_path / "a.pt2", fpn_runs="{}")
    before = zipfile.ZipFile(file).read("model/data/model.so")
    write_about(file, {"a": 1})
    write_about(file, {"a": "é"})
    assert read_about(file) == {"a": "é"}
    with zipfile.ZipFile(file) as zipped:
        assert sorted(zipped.namelist()) == [
            "model/data/model.so",
            "model/extra/fpn.json",
            "model/extra/fpn_runs.json",
        ]
        assert zipped.read("model/data/model.so") == before
    assert os.listdir(tmp_path) == ["a.pt2"]


@pytest.mark.parametrize(
    "files, message",
    [
        ({}, "not written by fpn"),
        ({"fpn": "[1]"}, "no JSON object"),
        ({"fpn": "{"}, "damaged"),
        ({"fpn": "[" * 10**5}, "damaged"),
        ({"fpn": " " * (inductor.LONGEST + 1)}, "16777217 bytes"),
    ],
)
def test_other_archives_are_refused_with_a_reason(files, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        read_about(archive(tmp_path / "a.pt2", **files))


@pytest.mark.parametrize("kind", [zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
def test_damaged_archives_are_refused_with_a_reason(kind, tmp_path):
    file = tmp_path / "a.pt2"
    with zipfile.ZipFile(file, "w", kind) as zipped:
        zipped.writestr("model/extra/fpn.json", "{}" + " " * 10**4)
    content, start = bytearray(file.read_bytes()), 30 + len("model/extra/fpn.json")  # of what is compressed
    content[start + 9 : start + 17] = b"\xff" * 8
    file.write_bytes(content)
    for read in (read_about, lambda path: inductor.put(path, tmp_path / "b.pt2", {})):
        with pytest.raises(CheckpointError, match="not a .pt2 file"):
            read(file)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"{}" * 100])
def test_other_files_are_refused_with_a_reason(content, tmp_path):
    file = tmp_path / "a.pt2"
    file.write_bytes(content)
    for read in (read_about, open_, lambda path: write_about(path, {})):
        with pytest.raises(CheckpointError, match="not a .pt2 file"):
            read(file)
    assert file.read_bytes() == content and os.listdir(tmp_path) == ["a.pt2"]


def test_a_file_for_another_processor_is_not_run(tmp_path):
    runs = {"sides": [64, 96], "square": None, "processor": "Linux riscv128 RVV"}
    with pytest.raises(CheckpointError, match="compiled for a processor with Linux riscv128 RVV"):
        open_(archive(tmp_path / "a.pt2", fpn_runs=json.dumps(runs)))
    here = inductor.processor()
    assert inductor.runs_on(here, here) and inductor.runs_on("Linux x86_64 AVX2", "Linux x86_64 AVX512")
    for needs in ("Linux x86_64 AVX512", "Windows x86_64 AVX2", "Linux arm64 AVX2", "Linux x86_64 SVE256", "AVX2", ""):
        assert not inductor.runs_on(needs, "Linux x86_64 AVX2")
    with pytest.raises(CheckpointError, match="damaged"):
        open_(archive(tmp_path / "b.pt2", fpn_runs=json.dumps({**runs, "sides": 3})))
    broken = archive(tmp_path / "c.pt2", fpn_runs=json.dumps({**runs, "processor": inductor.processor()}))
    with pytest.raises(CheckpointError, match="cannot be run by torch"):
        open_(broken)


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("a.xml", {}, "must end in .pt2"),
        ("a.pt2", {"precision": "int8"}, "have fp32"),
        ("a.pt2", {"calibration": [torch.zeros(3, 8, 8, dtype=torch.uint8)]}, "have fp32"),
    ],
)
def test_options_that_cannot_work(name, options, message, tmp_path):
    detector = fpn.build("retinanet", backbone="tiny", classes=["a"], weights="none", width=32)
    with pytest.raises(OptionError, match=message):
        write(detector, tmp_path / name, **options)
    assert not list(tmp_path.iterdir())
