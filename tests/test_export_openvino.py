"""Detectors as OpenVINO files, with the eager results."""

import pytest
import torch
from fresh import run

import fpn
from fpn.errors import CheckpointError, OptionError
from fpn.exporting.openvino import check_weights, note, notes_of, read_about, write, write_about

pytest.importorskip("openvino")

GRAPH = (
    '<?xml version="1.0"?><net name="Model0" version="11"><layers/><edges/>'
    '<rt_info><Runtime_version value="1"/></rt_info></net>'
)

PRELUDE = """
    import sys
    from pathlib import Path
    import numpy as np, torch, fpn
    from fpn.exporting import openvino as kind
    from fpn.exporting.whole import Whole

    folder = Path(sys.argv[1])
    torch.manual_seed(0)
    torch.set_num_threads(1)

    def lively(model, **options):
        made = fpn.build(model, backbone="tiny", classes=["a", "b", "c"], weights="none", width=32, short=64, long=96,
                         **options).eval()
        for name, parameter in made.named_parameters():
            if name.endswith("weight") and any(part in name for part in ("classes", "offsets", "objectness", "logits")):
                torch.nn.init.normal_(parameter, std=0.1)
            elif name.endswith("weight") and "tower" in name:
                torch.nn.init.kaiming_normal_(parameter)
        return made

    def images(height, width, count=1):
        return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8)

    def same(found, expected, share, score, pixels):
        # That share of the detections is found again; those of nearly the same score may come in another order.
        assert set(found) == set(expected)
        for image, counts in enumerate(zip(expected["count"].tolist(), found["count"].tolist())):
            b, a = ({k: torch.as_tensor(v[image][:n]) for k, v in of.items() if k != "count"}
                    for of, n in zip((expected, found), counts))
            near = (a["scores"][:, None] - b["scores"]).abs() < score
            near &= ((a["boxes"][:, None] - b["boxes"]).abs() < pixels).all(-1)
            near &= (a["labels"][:, None] == b["labels"]) & (a["levels"][:, None] == b["levels"])
            if "masks" in b:
                near &= ((a["masks"][:, None] - b["masks"]).abs() < 10 * score).all(-1).all(-1)
            assert near.any(1).sum() >= share * counts[1] and near.any(0).sum() >= share * counts[0], near

    def compare(made, ask):
        whole = Whole(made)
        # 64 x 96 is not resized; elsewhere some bytes are rounded to another side, and this network knows only noise.
        for shape, bounds in (((64, 96), (1, 1e-4, 2e-2)), ((96, 64, 3), (1, 1e-4, 2e-2)),
                              ((131, 57, 2), (0.6, 3e-2, 2.0)), ((1, 1), (1, 1e-4, 2e-2)), ((90, 1), None)):
            some = images(*shape)
            with torch.no_grad():
                expected = whole(some)
            found = ask(some.numpy())
            assert {k: v.shape for k, v in found.items()} == {k: tuple(v.shape) for k, v in expected.items()}
            assert 1 in shape[:2] or expected["count"].sum() > 0
            if bounds is not None:
                same(found, expected, *bounds)
"""


@pytest.mark.slow
@pytest.mark.parametrize("model", ["mask_rcnn", "retinanet"])
def test_a_file_finds_what_the_detector_finds(model, tmp_path):
    run(
        PRELUDE,
        """
        made = lively(sys.argv[2])
        if sys.argv[2] == "retinanet":  # whose scores begin at 0.01
            made.head.classes.weight.data.mul_(4)
        kind.write(made, folder / "a.xml")
        kind.write_about(folder / "a.xml", {"classes": ["ä", "<b>\\n"]})
        assert kind.read_about(folder / "a.xml") == {"classes": ["ä", "<b>\\n"]}
        assert sorted(file.name for file in folder.iterdir()) == ["a.bin", "a.xml"]
        compare(made, kind.open_(folder / "a.xml", threads=1))

        # A .bin of another export.
        with open(folder / "a.bin", "r+b") as file:
            file.seek(100)
            file.write(b"other")
        try:
            kind.open_(folder / "a.xml")
            raise SystemExit("opened")
        except fpn.errors.CheckpointError as error:
            assert "a.bin is damaged or of another export" in str(error), error
    """,
        arguments=[tmp_path, model],
    )


@pytest.mark.slow
def test_lower_precisions_find_nearly_the_same_and_are_smaller(tmp_path):
    pytest.importorskip("nncf")
    run(
        PRELUDE,
        """
        made = lively("faster_rcnn")
        graph = kind.model_of(made)
        kind.model_of = lambda detector: graph.clone()
        size = {}
        some = images(64, 96)
        with torch.no_grad():
            expected = Whole(made)(some)
        for precision, bounds in (("fp32", (1, 1e-4, 2e-2)), ("bf16", (0.5, 0.1, 5)), ("int8", (0.3, 0.3, 20))):
            calibration = [images(64, 96)[0], images(70, 50)[0]] if precision == "int8" else ()
            kind.write(made, folder / f"{precision}.xml", precision, calibration)
            same(kind.open_(folder / f"{precision}.xml", threads=1)(some.numpy()), expected, *bounds)
            size[precision] = (folder / f"{precision}.bin").stat().st_size
        assert size["fp32"] > 1.8 * size["bf16"] > 2.5 * size["int8"], size
    """,
        arguments=[tmp_path],
    )


def test_notes_are_replaced_and_the_rest_of_the_graph_is_kept(tmp_path):
    file = tmp_path / "a.xml"
    file.write_text(GRAPH)
    write_about(file, {"a": 1})
    note(file, {"fpn_precision": "bf16"})
    write_about(file, {"a": "\"<&'\n\u2028é"})
    assert read_about(file) == {"a": "\"<&'\n\u2028é"}
    assert notes_of(file)["fpn_precision"] == "bf16"
    text = file.read_text(encoding="utf-8")
    assert text.count("<fpn ") == 1 and 'Runtime_version value="1"' in text and 'version="11"' in text


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "not an OpenVINO file"),
        (b"\x89PNG\r\n", "not an OpenVINO file"),
        (b"<html><body/></html>", "its first element is 'html'"),
        (b'<!DOCTYPE net [<!ENTITY a "aaaa">]><net>&a;</net>', "it has a document type"),
        (b"<!--" + b" " * 5000 + b'--><!DOCTYPE net [<!ENTITY a "aaaa">]><net>&a;</net>', "it has a document type"),
        ('<?xml version="1.0" encoding="utf-16"?><!DOCTYPE net><net/>'.encode("utf-16"), "it has a document type"),
        (GRAPH.encode(), "not written by fpn"),
        (GRAPH.replace("Runtime_version", "fpn").encode(), "damaged"),
        (GRAPH.replace("Runtime_version", "fpn").replace('"1"/', '"[[[[{"/').encode(), "damaged"),
        (GRAPH.encode()[:-20], "not an OpenVINO file"),
    ],
)
def test_other_files_are_refused_with_a_reason(content, message, tmp_path):
    file = tmp_path / "a.xml"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_about(file)


def test_a_graph_needs_its_own_weights(tmp_path):
    file = tmp_path / "a.xml"
    file.write_text(GRAPH)
    with pytest.raises(CheckpointError, match="a.bin, must be beside it"):
        check_weights(file)
    (tmp_path / "a.bin").write_bytes(b"1234")
    note(file, {"fpn_bin_bytes": "4", "fpn_bin_sha256": "0"})
    with pytest.raises(CheckpointError, match="of another export"):
        check_weights(file)


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("a.onnx", {}, "must end in .xml"),
        ("a.xml", {"precision": "fp8"}, "fp32, bf16, int8"),
        ("a.xml", {"precision": "int8"}, "needs images"),
        ("a.xml", {"calibration": [torch.zeros(3, 8, 8, dtype=torch.uint8)]}, "needs images"),
    ],
)
def test_options_that_cannot_work(name, options, message, tmp_path):
    detector = fpn.build("retinanet", backbone="tiny", classes=["a"], weights="none", width=32)
    with pytest.raises(OptionError, match=message):
        write(detector, tmp_path / name, **options)
    assert not list(tmp_path.iterdir())


def test_nms_in_openvino_does_what_it_does_in_torch():
    import warnings

    import openvino

    from fpn.exporting.openvino_operators import extensions
    from fpn.model.nms import nms

    class Only(torch.nn.Module):
        def forward(self, boxes, scores, groups, valid):
            return nms(boxes, scores, groups, valid, 0.5)

    def given(rows, count, kinds, lowest):
        corner, size = torch.rand(rows, count, 2) * 60 + lowest, torch.rand(rows, count, 2) * 60
        valid = torch.rand(rows, count) > 0.3
        boxes = torch.where(valid[..., None], torch.cat([corner, corner + size], dim=2), torch.nan)
        return boxes, torch.rand(rows, count), torch.randint(kinds, (rows, count)), valid

    torch.manual_seed(0)
    free = torch.export.Dim.DYNAMIC
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(Only(), given(2, 200, 3, 0), dynamic_shapes=[{0: free, 1: free}] * 4)
        model = openvino.convert_model(program, extension=extensions())
    model.reshape({0: openvino.PartialShape([-1, -1, 4])})
    ask = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for rows, count, kinds, lowest in ((2, 400, 3, 0), (2, 400, 3, -1000), (1, 500, 90, -60), (2, 30, 2000, 0)):
        some = given(rows, count, kinds, lowest)
        expected = nms(*some, 0.5)
        assert expected.any() and torch.equal(torch.from_numpy(ask([x.numpy() for x in some])[0]), expected)
