"""`fpn bench`: what it measures, what it says of that, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from test_backends import lived_in
from test_pairs import detector_of

import fpn
from fpn.benching import run
from fpn.benching.command import bench
from fpn.benching.measure import Row, Task, agreement, measure
from fpn.benching.run import advice, candidates, table
from fpn.data.generated import generate
from fpn.errors import OptionError
from fpn.structures import Detections


def row(backend: str, precision: str, seconds: float, AP: float | None = 0.5, lost: int = 0, **more) -> Row:
    return Row(backend, precision, 1.0, [seconds] * 3, [0.2 / seconds] * 3, 100.0, 4, 4 - lost, 0.05, AP, **more)


ROWS = [
    row("eager", "fp32", 0.2),
    row("fused", "fp32", 0.1, 0.5001),
    row("fused", "bf16", 0.05, 0.4979, lost=1),
    row("openvino", "int8", 0.025, 0.4985),
    row("onnx", "fp32", 0.01, error="no | package"),
]


def test_the_table_has_a_line_for_each_with_its_loss_of_AP():
    lines = table(ROWS).splitlines()
    assert lines[2].startswith(
        "| eager fp32 | 200.0 (200.0 to 200.0) | 1.00 (1.00 to 1.00) | 100 | 4 of 4, within 0.050"
    )
    assert "0.5000 |" in lines[2] and "0.4979 (-0.0021)" in lines[4] and "0.5001 (+0.0001)" in lines[3]
    assert lines[6] == "| onnx fp32 | no / package | | | | | |"


def test_advice_is_the_fastest_that_is_the_same_and_the_fastest_that_is_as_good():
    same, close = advice(ROWS)
    assert same.endswith("--backend fused --precision fp32")  # not the one that failed
    assert "--precision int8 --calibrate" in close  # 0.0015 lost, where bf16 lost 0.0021
    assert len(advice([row("eager", "fp32", 0.2, None)])) == 1  # nothing is known of AP
    assert advice([ROWS[-1]]) == []
    eager, other = row("eager", "fp32", 0.2, -1.0), row("onnx", "fp32", 0.1, -1.0, lost=1)
    assert advice([eager, other]) == ["the same results, fastest: --backend eager --precision fp32"]  # no object, no AP
    busy = Row("fused", "fp32", 1.0, [0.4], [1.5], 100.0, 4, 4, 0.0)  # slower in seconds, faster in its turns
    assert "--backend fused" in advice([row("eager", "fp32", 0.2), busy])[0]


def test_boxes_found_again_are_paired_one_to_one_within_the_class():
    def found(*rows: tuple[float, int]) -> Detections:
        boxes = torch.tensor([[x, 0, x + 10, 10] for x, _ in rows]).float().reshape(-1, 4)
        labels = torch.tensor([label for _, label in rows], dtype=torch.int64)
        scores, levels = torch.linspace(0.9, 0.5, len(rows)), torch.full_like(labels, 3)
        return Detections(boxes, scores, labels, levels, torch.tensor(len(rows)), ("a", "b"))

    before, after = found((0, 0), (100, 1), (200, 0)), found((2, 0), (100, 0), (50, 1))
    assert agreement([before, found()], [after, found((0, 0))]) == (3, 1, 2.0)


def test_what_is_not_there_is_left_out_and_said(monkeypatch):
    monkeypatch.setattr(run, "find_spec", lambda name: None if name == "openvino" else name)
    monkeypatch.setattr(run, "pick_precision", lambda wanted, device: "32")
    wanted, notes = candidates("cpu", calibrated=True)
    assert ("onnx", "fp32") in wanted and not [one for one in wanted if one[0] == "openvino" or one[1] != "fp32"]
    assert any("pip install 'fpn[openvino]'" in note for note in notes) and any("bf16" in note for note in notes)
    monkeypatch.setattr(run, "find_spec", lambda name: name)
    assert ("openvino", "int8") in candidates("cpu", calibrated=True)[0]
    assert any("int8 is left out" in note for note in candidates("cpu", calibrated=False)[1])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    detector = lived_in(detector_of("retinanet", "fpn", short=64, long=96))
    return fpn.weights.save(detector, tmp_path_factory.mktemp("bench") / "a.safetensors")


def test_measuring_one_backend(checkpoint):
    made = measure(Task(checkpoint, "fused", "fp32", "cpu", size=(64, 96), repeats=3))
    assert not made.error and len(made.seconds) == len(made.ratios) == 3 and made.AP is None
    assert made.memory is None or made.memory > 50
    assert made.compared > 5 and made.again == made.compared and made.apart < 0.01


def test_a_backend_that_fails_says_why(checkpoint):
    made = measure(Task(checkpoint, "onnx", "bf16", "cpu", size=(64, 96)))
    assert "backend onnx has fp32" in made.error and not made.seconds


@pytest.mark.parametrize(
    "options, words",
    [
        ({"limit": 0}, "--limit is 0"),
        ({"size": (0, 5)}, "--size is 0"),
        ({"backends": ["onnx"], "precisions": ["bf16"]}, "nothing to measure"),
    ],
)
def test_what_cannot_be_measured_is_refused(checkpoint, options, words):
    with pytest.raises(OptionError, match=words):
        bench(checkpoint, **options)


@pytest.mark.slow
def test_the_verb_measures_and_writes(tmp_path, capsys):
    data = generate(tmp_path / "data", images=6, size=(64, 96))
    torch.manual_seed(0)
    classes = fpn.data.load(data).classes
    detector = fpn.build("retinanet", backbone="tiny", classes=classes, weights="none", width=32, short=64, long=96)
    file = fpn.weights.save(lived_in(detector), tmp_path / "a.safetensors")
    bench(file, data, backends=["eager", "fused"], precisions=["fp32"], repeats=2, out=tmp_path / "out")
    said = capsys.readouterr().out
    assert "| eager fp32 |" in said and "| fused fp32 |" in said and "(+0.0000)" in said and "advice: " in said
    rows = json.loads((tmp_path / "out" / "bench.json").read_text())["rows"]
    assert [one["backend"] for one in rows] == ["eager", "fused"] and not any(one["error"] for one in rows)
    assert (tmp_path / "out" / "bench.png").stat().st_size > 5000
    assert "| fused fp32 |" in (tmp_path / "out" / "bench.md").read_text()
