"""Detectors as one program and as ONNX files, with the eager results."""

import json

import pytest
import torch
from fresh import run

from fpn.data.sizes import resized_size
from fpn.errors import CheckpointError, OptionError
from fpn.exporting.onnx_metadata import as_varint, field, read_about, write_about
from fpn.exporting.whole import Whole, resized

PRELUDE = """
    import sys, warnings
    from pathlib import Path
    import numpy as np, torch, fpn
    from fpn.exporting import onnx
    from fpn.exporting.whole import Whole
    from fpn.inference.finder import finder

    warnings.simplefilter("error")
    torch.manual_seed(0)
    torch.set_num_threads(1)

    def lively(model, **options):
        made = fpn.build(model, backbone="tiny", classes=["a", "b", "c"], weights="none", width=32, short=64, long=96,
                         **options).eval()
        for name, parameter in made.named_parameters():
            if name.endswith("weight") and any(part in name for part in ("classes", "offsets", "objectness", "logits")):
                torch.nn.init.normal_(parameter, std=0.1)
        return made

    def images(height, width, count=1):
        return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8)

    def same(found, expected, share=1.0, score=1e-4, pixels=2e-2):
        # That share of the detections is found; those of nearly the same score may come in another order.
        assert expected["count"].sum() > 0
        for image, counts in enumerate(zip(expected["count"].tolist(), found["count"].tolist())):
            b, a = ({k: torch.as_tensor(v[image][:n]) for k, v in of.items() if k != "count"}
                    for of, n in zip((expected, found), counts))
            near = (a["scores"][:, None] - b["scores"]).abs() < score
            near &= ((a["boxes"][:, None] - b["boxes"]).abs() < pixels).all(-1)
            near &= (a["labels"][:, None] == b["labels"]) & (a["levels"][:, None] == b["levels"])
            if "masks" in b:
                near &= ((a["masks"][:, None] - b["masks"]).abs() < 10 * score).all(-1).all(-1)
            assert near.any(1).sum() >= share * counts[1] and near.any(0).sum() >= share * counts[0]

    def compare(made, path, shapes, resized):
        ask, whole = onnx.open_(path, threads=1), Whole(made)
        for shape in (*shapes, *resized):
            some = images(*shape)
            with torch.no_grad():
                expected = whole(some)
            # ONNX Runtime and torch round some resized pixels to different sides; the untrained network sees noise.
            same(ask(some.numpy()), expected, *((0.7, 2e-2, 1.0) if shape in resized else ()))
        return some, expected
"""


def test_the_size_to_resize_to_is_the_usual_one():
    for size in ((1, 1), (1, 50), (50, 1), (480, 640), (640, 480), (333, 333), (7, 20000), (20000, 9999), (799, 1333)):
        for short, long in ((800, 1333), (64, 96), (100, 60), (1, 1)):
            found = resized(torch.tensor(size), short, long)
            assert tuple(found.tolist()) == resized_size(size, short, long), (size, short, long)


@pytest.mark.parametrize("square", [False, True])
def test_images_as_they_are_give_what_a_finder_gives(square):
    import fpn
    from fpn.inference.finder import finder

    torch.manual_seed(0)
    detector = fpn.build("retinanet", backbone="tiny", classes=["a"], weights="none", width=32, short=64, long=96,
                         square=square, score=0.0, max_detections=20)  # fmt: skip
    find, whole = finder(detector, "cpu"), Whole(detector)
    for shape in ((2, 3, 50, 70), (1, 3, 1, 40), (1, 3, 90, 1), (1, 3, 1, 1), (1, 3, 200, 130)):
        images = torch.randint(0, 256, shape, dtype=torch.uint8)
        with torch.no_grad():
            found = whole(images)
        for image, expected in enumerate(find(list(images))):
            n = int(found["count"][image])
            assert n == len(expected) > 0
            for name in ("boxes", "scores", "labels", "levels"):
                torch.testing.assert_close(found[name][image, :n], getattr(expected, name), atol=1e-5, rtol=1e-5)


def test_a_detector_that_needs_regions_is_refused():
    import fpn

    made = fpn.build("fast_rcnn", backbone="tiny", classes=["a"], weights="none", width=32, hidden=32)
    with pytest.raises(OptionError, match="fast_rcnn looks at given regions"):
        Whole(made)


def test_what_cannot_be_exported_is_told_in_a_line(monkeypatch, tmp_path):
    import fpn
    from fpn.exporting import inductor, onnx, whole

    pytest.importorskip("onnxscript")
    made = fpn.build("retinanet", backbone="tiny", classes=["a"], weights="none", width=32, short=64, long=96)

    def fails(*_, **__):
        raise ValueError

    def fails_deep(*_):
        raise RuntimeError("Failed.\nThis is step 3/3") from KeyError("no form of aten.odd")

    words = r"retinanet with backbone tiny cannot be exported for images of every size \({}\); networks of convolutions"
    monkeypatch.setattr(torch.export, "export", fails)
    for program in (whole.export_program, inductor.program_of):
        with pytest.raises(OptionError, match=words.format("ValueError")):
            program(made)
    monkeypatch.setattr(onnx, "export_program", lambda detector: None)
    monkeypatch.setattr(onnx, "model_of", fails_deep)
    with pytest.raises(OptionError, match=words.format("'no form of aten.odd'")):
        onnx.write(made, tmp_path / "a.onnx")
    assert not list(tmp_path.iterdir()) and whole.reason(ValueError("first\nlast"), -1) == "last"


@pytest.mark.slow
def test_a_two_stage_detector_with_masks_is_one_onnx_file(tmp_path):
    run(
        PRELUDE,
        """
        path = sys.argv[1]
        made = lively("mask_rcnn", hidden=32, score=0.2, levels=(3, 5), proposals=(200, 50),
                      proposals_per_level=(200, 50))
        onnx.write(made, path)
        assert b"/tests/" not in Path(path).read_bytes()  # where it was made, and from which files
        unresized = ((64, 96, 2), (90, 64, 1), (64, 64, 3))
        some, expected = compare(made, path, unresized, ((50, 70, 2), (200, 100, 1), (1, 40, 1), (90, 1, 3), (1, 1, 1)))
        assert set(expected) == {"boxes", "scores", "labels", "levels", "count", "masks"}
        onnx.write_about(path, {"classes": made.classes})
        assert onnx.read_about(path) == {"classes": ["a", "b", "c"]}
        same(onnx.open_(path, threads=1)(some.numpy()), expected, 0.7, 2e-2, 1.0)
    """,
        arguments=[tmp_path / "mask.onnx"],
    )


@pytest.mark.slow
def test_a_one_stage_detector_is_one_onnx_file(tmp_path):
    run(
        PRELUDE,
        """
        path = sys.argv[1]
        made = lively("fcos", score=0.005, levels=(4, 6), tower_convolutions=1)
        onnx.write(made, path)
        compare(made, path, ((96, 64, 2), (64, 64, 3)), ((1, 40, 1), (50, 70, 1)))
    """,
        arguments=[tmp_path / "fcos.onnx"],
    )


def test_the_operators_in_onnx_do_what_they_do_in_torch(tmp_path):
    run(
        """
        import sys, warnings
        import numpy as np, onnxruntime, torch
        from fpn.errors import CheckpointError
        from fpn.exporting.onnx import LOGGERS, open_, silence
        from fpn.exporting.onnx_operators import translations
        from fpn.model.nms import nms
        from fpn.model.roi import aligned, roi_align

        WAYS = ((2, True), (2, False), (0, True))  # points a cell, half_pixel

        class Both(torch.nn.Module):
            def forward(self, boxes, scores, groups, valid, low, high, regions, levels):
                pooled = [roi_align([low, high], [2, 3], regions, levels, 3, n, half) for n, half in WAYS]
                return nms(boxes, scores, groups, valid, 0.5), *pooled

        def given(rows, count, kinds):
            corner, size = torch.rand(rows, count, 2) * 60, torch.rand(rows, count, 2) * 60
            boxes = torch.cat([corner, corner + size], dim=2)
            boxes[:, 0] = torch.tensor([-500.0, -500.0, 900.0, 900.0])  # reaches far beyond all others
            valid, levels = torch.rand(rows, count) > 0.3, torch.randint(1, 4, (rows, count))
            maps = torch.randn(rows, 5, 32, 24), torch.randn(rows, 5, 16, 12)
            of_nms = torch.where(valid[..., None], boxes, torch.nan), torch.rand(rows, count)
            return *of_nms, torch.randint(kinds, (rows, count)), valid, *maps, boxes, levels

        path = sys.argv[1]
        torch.manual_seed(0)
        axes = [{0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}] * 4
        maps = [{0: torch.export.Dim.DYNAMIC}] * 2
        with silence(*LOGGERS):
            program = torch.export.export(Both(), given(2, 200, 3), dynamic_shapes=(*axes, *maps, *axes[:2]))
            torch.onnx.export(program, dynamo=True, verbose=False, custom_translation_table=translations()).save(path)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        names = [entry.name for entry in session.get_inputs()]
        for rows, count, kinds in ((2, 200, 3), (3, 400, 1), (2, 500, 90), (1, 1, 1), (2, 30, 2000)):
            some = given(rows, count, kinds)
            low, high, regions, levels = some[4:]
            keep, *pooled = session.run(None, dict(zip(names, [x.numpy() for x in some], strict=True)))
            expected = nms(*some[:4], 0.5)
            assert expected.any() or count == 1
            assert np.array_equal(keep, expected.numpy())
            for found, way in zip(pooled, WAYS):
                usual = aligned({2: low, 3: high}, regions, levels, 3, *way)
                torch.testing.assert_close(torch.from_numpy(found), usual, atol=1e-4, rtol=1e-4)
        try:
            open_(path)
        except CheckpointError as error:
            assert "not of a detector that fpn exported" in str(error)
        else:
            raise AssertionError("taken for a detector")
    """,
        arguments=[tmp_path / "both.onnx"],
    )


def test_what_ort_cannot_run_is_no_checkpoint(tmp_path):
    from fpn.exporting.onnx import open_

    pytest.importorskip("onnxruntime")
    path = tmp_path / "a.onnx"
    for content in (b"", b"no protobuf at all", b"\x08\x08" * 50):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"a\.onnx: cannot be run by ONNX Runtime"):
            open_(path)


MODEL = field(7, bytes(200))  # stands for the graph


def other(key: bytes, value: bytes) -> bytes:
    return field(14, field(1, key) + field(2, value))


def test_metadata_comes_back_and_gives_way_to_what_is_written_next(tmp_path):
    path = tmp_path / "a.onnx"
    version = as_varint(1 << 3) + as_varint(8)  # a field that is a number
    path.write_bytes(version + other(b"author", b"x") + MODEL)
    for about in ({"classes": ["ä", "b"], "score": 0.05}, {"text": "y" * 300}, {"file": "half a \udce4"}):
        write_about(path, about)
        assert read_about(path) == about
        own = field(14, field(1, b"fpn") + field(2, json.dumps(about).encode()))
        assert path.read_bytes() == version + other(b"author", b"x") + MODEL + own
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.onnx"]


def test_onnx_itself_reads_the_metadata(tmp_path):
    onnx = pytest.importorskip("onnx")
    path = tmp_path / "a.onnx"
    nothing = onnx.helper.make_graph([], "nothing", [], [])
    onnx.save(onnx.helper.make_model(nothing), path)
    before = onnx.load(path)
    write_about(path, {"a": 1})
    after = onnx.load(path)
    assert [(entry.key, json.loads(entry.value)) for entry in after.metadata_props] == [("fpn", {"a": 1})]
    assert after.graph == before.graph and after.opset_import == before.opset_import


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "was not written by `fpn export`"),
        (MODEL, "was not written by `fpn export`"),
        (MODEL[:-1], "it ends early"),
        (b"\x80", "it ends early, within a number"),
        (b"\xff" * 20, "a number of more than ten bytes"),
        (b"\x0b\x00", "a field of type 3"),
        (b"\x3a" + b"\xff" * 9 + b"\x01", "it ends early"),  # a length of 2**64 - 1
        (field(14, b"\x80"), "within a number"),
        (other(b"fpn", b"{"), "its metadata is damaged"),
        (other(b"fpn", b"\xff\xfe"), "its metadata is damaged"),
        (other(b"fpn", b"[1]"), "its metadata is damaged"),
        (other(b"fpn", b"[" * 100_000), "its metadata is damaged"),
        (field(14, field(1, b"fpn")), "its metadata is damaged"),
    ],
)
def test_hostile_files_are_one_clear_error(tmp_path, content, reason):
    path = tmp_path / "a.onnx"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=reason) as error:
        read_about(path)
    assert str(path) in str(error.value)


def test_a_file_that_is_not_there_or_damaged_is_not_written_to(tmp_path):
    with pytest.raises(CheckpointError, match="not a readable ONNX file"):
        read_about(tmp_path / "none.onnx")
    path = tmp_path / "a.onnx"
    path.write_bytes(MODEL[:-1])
    with pytest.raises(CheckpointError, match="it ends early"):
        write_about(path, {})
    assert path.read_bytes() == MODEL[:-1] and [entry.name for entry in tmp_path.iterdir()] == ["a.onnx"]
