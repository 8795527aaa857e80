"""The pyramid report: numbers by hand, levels that add up to COCO's totals, every model, and its advice."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_metrics import make_results, make_split, random_case

import fpn
from fpn.data import Split, with_regions, write_regions
from fpn.errors import OptionError
from fpn.evaluation import pyramid
from fpn.evaluation.evaluate import detect_split, score_for
from fpn.evaluation.matches import average_precision
from fpn.evaluation.metrics import Results, score
from fpn.evaluation.pyramid import ALL, NOWHERE, Level, PyramidReport, Watch, handled_by, level_of_most, matched_places
from fpn.evaluation.pyramid_advice import advise
from fpn.evaluation.pyramid_page import chosen, contrast, look, painted, pyramid_report

CLASSES = ("a", "b")
FEW = {"proposals": (50, 50), "proposals_per_level": (50, 50)}
MODELS = {
    "faster_rcnn": {"score": 0.0, **FEW},
    "mask_rcnn": {"score": 0.0, **FEW, "max_detections": 12},
    "cascade_rcnn": {"score": 0.0, **FEW},
    "retinanet": {"score": 0.0, "candidates": 20},
    "fcos": {"score": 0.0, "candidates": 20},
    "atss": {"score": 0.0, "candidates": 20},
    "rpn": FEW,
    "fast_rcnn": {"score": 0.0},
}


def of_model(model: str, **options: object) -> fpn.model.detector.Detector:
    torch.manual_seed(0)
    options = {"width": 32, "short": 64, "long": 96, **({"hidden": 16} if "rcnn" in model else {}), **options}
    classes = ("object",) if model == "rpn" else CLASSES
    return fpn.build(model, backbone="tiny", weights="none", classes=classes, **options)


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Split:
    """Three small images on disk, of two shapes: four objects and a crowd, one object, nothing."""
    crowd = [5, 40, 30, 60, 0, 1]
    first = [[4, 4, 20, 20, 0, 0], [30, 8, 90, 60, 1, 0], [50, 50, 54, 54, 0, 0], [0, 0, 96, 64, 1, 0], crowd]
    made = make_split([first, [[10, 10, 60, 50, 0, 0]], []], CLASSES)
    root = tmp_path_factory.mktemp("images")
    sizes = np.array([[64, 96], [96, 64], [64, 64]])
    for file, size in zip(made.files, sizes, strict=True):
        noise = np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)
        Image.fromarray(noise).save(root / str(file))
    return replace(made, root=root, sizes=sizes)


def watched(detector: fpn.model.detector.Detector, split: Split) -> tuple[Results, Watch]:
    watch = Watch(detector, split)
    return detect_split(detector, split, batch=2, device="cpu", workers=0, progress=False, detect=watch.detect), watch


def with_levels(split: Split, rows: list[list[float]]) -> Results:
    """Results from rows (image, x1, y1, x2, y2, label, score, level)."""
    results = make_results(split, [row[:7] for row in rows])
    return replace(results, levels=np.array([int(row[7]) for row in rows], dtype=np.int64))


A, B, C, D, E = ([x, 0, x + 100, 100] for x in range(0, 1000, 200))
NOTHING = [0, 300, 50, 350]


def test_who_handled_what_by_hand():
    made = make_split([[[*box, 0, 0] for box in (A, B, C, D, E)]], ("a",))
    results = with_levels(made, [
        [0, *A, 0, 0.9, 2],
        [0, *NOTHING, 0, 0.8, 2],
        [0, *B, 0, 0.7, 3],  # assigned to P2
        [0, C[0], 0, C[0] + 62, 100, 0, 0.6, 3],  # IoU 0.62
        [0, *NOTHING, 0, 0.55, 4],
        [0, *D, 0, 0.2, 4],  # below the threshold: handled, missed
    ])  # fmt: skip
    own = handled_by(made, results, np.array([2, 2, 3, 4, 5]), threshold=0.5)
    assert {k: v.rows.tolist() for k, v in own.items()} == {2: [0], 3: [1, 2], 4: [3], 5: [4], ALL: [0, 1, 2, 3, 4]}
    assert {k: (v.found, v.false) for k, v in own.items()} == {2: (1, 1), 3: (2, 0), 4: (0, 1), 5: (0, 0), ALL: (3, 2)}
    assert (own[2].AP, own[2].AR) == (1, 1)
    # C is found at IoU 0.50, 0.55 and 0.60; from there on half of P3's objects, at 51 of the 101 recalls.
    assert pytest.approx((3 + 7 * 51 / 101) / 10) == own[3].AP and pytest.approx(0.65) == own[3].AR
    assert (own[4].AP, own[4].AR) == (0.5, 1), "a false one before the right one"
    assert (own[5].AP, own[5].AR) == (0, 0)


def test_precision_by_hand():
    assert average_precision(np.array([True, False, True]), 2) == pytest.approx((51 + 50 * 2 / 3) / 101)
    assert average_precision(np.zeros(0, dtype=bool), 3) == 0
    assert average_precision(np.array([False, True]), 1) == 0.5


def test_the_finer_box_takes_the_object_with_it_at_higher_ious():
    """P2 found it first, with a poor box; at IoU 0.65 and above P3's good one is what finds it."""
    made = make_split([[[*A, 0, 0]]], ("a",))
    results = with_levels(made, [[0, 0, 0, 62, 100, 0, 0.9, 2], [0, *A, 0, 0.8, 3]])
    own = handled_by(made, results, np.array([5]), threshold=0.5)
    assert own[2].rows.tolist() == [0] and (own[2].found, own[2].false, own[2].AP) == (1, 0, 1)
    assert len(own[3].rows) == 0 and (own[3].found, own[3].false) == (0, 1)
    assert own[3].AR == own[3].AP == 1 and own[ALL].AR == 1 and pytest.approx((3 + 7 * 0.5) / 10) == own[ALL].AP
    assert 5 not in own, "it was assigned there, but found elsewhere"


def test_classes_crowds_and_the_limit_count_as_in_coco():
    made = make_split([[[*A, 0, 0], [*B, 1, 1]]])
    results = with_levels(made, [[0, *A, 1, 0.9, 2], [0, B[0], 0, B[0] + 20, 20, 1, 0.8, 3], [0, *A, 0, 0.7, 4]])
    own = handled_by(made, results, np.array([2, 2]), threshold=0.5)
    assert {k: (len(v.rows), v.found, v.false) for k, v in own.items()} == {
        2: (0, 0, 1), 3: (0, 0, 0), 4: (1, 1, 0), ALL: (1, 1, 1),
    }  # fmt: skip
    many = with_levels(made, [[0, *NOTHING, 0, 0.9 - 0.1 * n, 2] for n in range(3)] + [[0, *A, 0, 0.6, 2]])
    assert handled_by(made, many, np.array([2, 2]), 0.0, limit=3)[2].found == 0
    assert handled_by(made, many, np.array([2, 2]), 0.0, limit=4)[2].found == 1


@pytest.mark.parametrize("seed", [0, 1])
def test_levels_add_up_to_the_numbers_of_coco(seed: int):
    made, results = random_case(seed)
    rng = np.random.default_rng(seed)
    results = replace(results, levels=rng.integers(2, 6, len(results.scores)))
    own = handled_by(made, results, rng.integers(0, 6, len(made.boxes)), threshold=0.3)
    total, metrics = own.pop(ALL), score(made, results)
    assert pytest.approx(metrics["AP"], abs=1e-9) == total.AP and pytest.approx(metrics["AR100"], abs=1e-9) == total.AR
    assert 0.05 < total.AP < 1 and len(own) >= 4
    assert sorted(np.concatenate([one.rows for one in own.values()]).tolist()) == total.rows.tolist()
    assert total.rows.tolist() == np.flatnonzero(~made.ignore).tolist()
    assert sum(one.found for one in own.values()) == total.found > 0
    assert sum(one.false for one in own.values()) == total.false > 0


def test_only_images_that_were_looked_at_count():
    made = make_split([[[*A, 0, 0]], [[*A, 0, 0]]], ("a",))
    results = replace(with_levels(made, [[0, *A, 0, 0.9, 2]]), images=np.array([0]))
    own = handled_by(made, results, np.array([2, 3]), threshold=0.5)
    assert set(own) == {2, ALL} and own[ALL].rows.tolist() == [0] and own[ALL].AR == 1


def test_an_object_belongs_to_the_level_of_most_of_its_places():
    levels, index = torch.tensor([3, 3, 4, 4, 5, 4]), torch.tensor([0, 0, 0, 2, 2, 3])
    assert level_of_most(levels, index, 5).tolist() == [3, NOWHERE, 4, 4, NOWHERE]
    assert level_of_most(levels[:0], index[:0], 2).tolist() == [NOWHERE, NOWHERE]
    assert level_of_most(levels, index, 4).tolist()[2] == 4, "the finer of P4 and P5"


def test_levels_by_the_rules_of_the_models():
    boxes = torch.tensor([[8.0, 8, 24, 24], [0.0, 0, 448, 448], [0, 0, 112, 112]])
    detector = of_model("faster_rcnn")
    assert pyramid.region_levels(detector, boxes).tolist() == [2, 5, 3]  # Eq. 1: 16 px is below P2, 448 = 2 * 224
    levels, index = matched_places(detector, boxes, (448, 448))
    assert level_of_most(levels[index >= 0], index[index >= 0], 3).tolist() == [2, 6, 4]  # anchors of 32, 512, 128
    fcos, boxes = of_model("fcos"), torch.tensor([[8.0, 8, 24, 24], [0.0, 0, 400, 400]])
    levels, index = matched_places(fcos, boxes, (448, 448))
    # Places less than 1.5 strides from the centre: of the large box those at 176, 208 and 240 on P5, whose farthest
    # sides are at most 240 pixels away, and on P6 only those at 288, from where it is more than 256.
    counts = [((index == n)[:, None] & (levels[:, None] == torch.arange(3, 8))).sum(0).tolist() for n in (0, 1)]
    assert counts == [[4, 0, 0, 0, 0], [0, 0, 9, 5, 0]]
    assert level_of_most(levels[index >= 0], index[index >= 0], 2).tolist() == [3, 5]


@pytest.mark.parametrize("model", MODELS)
def test_every_model_and_its_sums(model: str, split: Split, tmp_path: Path):
    detector, made = of_model(model, **MODELS[model]), split
    if model == "fast_rcnn":
        proposals = detect_split(of_model("rpn", **FEW), split, device="cpu", workers=0, progress=False)
        write_regions(tmp_path / "regions.safetensors", split, proposals)
        made = with_regions(split, tmp_path / "regions.safetensors")
    results, watch = watched(detector, made)
    report = pyramid_report(detector, made, results, watch, tmp_path, threshold=0.0, pictures=1)

    metrics = score_for(detector, made, results)
    if model != "rpn":
        assert pytest.approx(metrics["AP"], abs=1e-9) == report.all.AP
        assert pytest.approx(metrics["AR100"], abs=1e-9) == report.all.AR
    else:
        assert pytest.approx(metrics["AR1000"], abs=1e-9) == report.all.AR
    assert set(report.levels) - {NOWHERE} == set(detector.levels)
    for name in ("by_region", "by_anchor", "anchors", "matched", "proposals", "regions"):
        parts = [getattr(row, name) for row in report.levels.values()]
        total = getattr(report.all, name)
        assert total == (None if parts[0] is None else sum(parts)), name
    for name in ("objects", "found", "missed", "false"):
        assert sum(getattr(row, name) for row in report.levels.values()) == getattr(report.all, name), name
    assert report.all.objects == 5 and report.all.found + report.all.missed == 5 and report.images == 3
    two_stages, places = "rcnn" in model, model != "fast_rcnn"
    assert report.all.by_region == (5 if two_stages else None) and report.all.by_anchor == (5 if places else None)
    assert (report.all.regions is not None) == two_stages
    assert (report.all.proposals is not None) == (two_stages and places or model == "rpn")
    if two_stages and places:
        # 64 x 96, 96 x 64 and 64 x 64 pixels; P6 has one row or column of every two of P5.
        cells = [(16 * 24, 16 * 16), (8 * 12, 8 * 8), (4 * 6, 4 * 4), (2 * 3, 2 * 2), (1 * 2, 1)]
        assert report.all.anchors == 3 * sum(2 * wide + square for wide, square in cells)

    content = json.loads((tmp_path / "pyramid.json").read_text())
    assert content["all"]["objects"] == 5 and content["levels"].keys() >= {f"P{k}" for k in detector.levels}
    page = (tmp_path / "pyramid.html").read_text()
    assert page.count("<img") == 1 + len(detector.levels) and "://" not in page and ">nan" not in page.lower()
    names = {file.name for file in (tmp_path / "pictures").iterdir()}
    assert names == {"pyramid-01.jpg", *(f"pyramid-01-P{k}.png" for k in detector.levels)}
    assert len(report.table().splitlines()) == 2 * (len(report.levels) + 2) + 1


@pytest.mark.parametrize("model", ["faster_rcnn", "fcos"])
def test_watching_does_not_change_what_is_detected(model: str, split: Split):
    detector = of_model(model, **MODELS[model])
    results, _ = watched(detector, split)
    alone = detect_split(detector, split, batch=2, device="cpu", workers=0, progress=False)
    assert len(results.scores) > 20
    for name in ("images", "indices", "boxes", "scores", "labels", "levels"):
        np.testing.assert_array_equal(getattr(results, name), getattr(alone, name))


def test_no_objects_and_no_detections(split: Split, tmp_path: Path):
    empty = split.select(np.array([2]), "val")
    detector = of_model("faster_rcnn", score=0.99)
    report = pyramid_report(detector, empty, *watched(detector, empty), tmp_path)
    assert (report.all.objects, report.all.found, report.all.false, report.all.AP) == (0, 0, 0, -1)
    assert report.all.anchors == 768 + 192 + 48 + 12 + 3 and report.all.matched == 0
    assert report.advice == ["no objects in 1 image: there is nothing to judge the levels by"]
    assert (tmp_path / "pyramid.html").exists() and "-1" not in report.table()


def test_what_cannot_be_reported_is_refused(split: Split):
    detector = of_model("faster_rcnn")
    with pytest.raises(OptionError, match=r"threshold is 1.5"):
        pyramid_report(detector, split, *watched(detector, split), threshold=1.5)
    with pytest.raises(OptionError, match="no pyramid report of mask_proposals"):
        Watch(fpn.build("mask_proposals", backbone="tiny", weights="none", classes=("object",), short=64), split)


def row(objects: int, found: int, anchors: int, by: int | None = None, side: float = 20.0) -> Level:
    by = objects if by is None else by
    return Level(by, by, anchors, objects, 0, 0, objects, found, objects - found, 0, 0.5, 0.5, side)


def advice_for(detector: fpn.model.detector.Detector, split: Split, **rows: Level) -> list[str]:
    levels = {NOWHERE if name == "none" else int(name[1:]): own for name, own in rows.items()}
    sums = {name: sum(getattr(own, name) for own in rows.values()) for name in ("objects", "found", "anchors")}
    watch = Watch(detector, split)
    watch.sides[:] = 20.0
    return advise(PyramidReport(levels, row(**sums), 10, 0.5), watch)


def test_advice_where_a_level_has_nothing_to_do(split: Split):
    detector, work = of_model("faster_rcnn"), {"P2": row(500, 400, 16000), "P3": row(400, 300, 4000)}
    more = {"P4": row(300, 200, 1000), "P5": row(200, 150, 250)}
    assert advice_for(detector, split, **work, **more, P6=row(150, 0, 60)) == []
    (text,) = advice_for(detector, split, **work, **more, P6=row(0, 0, 60))
    assert text == (
        "P6 was given 0 of 1,400 objects and found nothing: --levels 2 5 would save 6 anchors an image, 0.3 % of all"
    )
    (text,) = advice_for(detector, split, P2=row(0, 0, 16000), P3=row(400, 300, 4000), **more, P6=row(0, 0, 60))
    assert "P2 and P6 were given 0 of 900 objects" in text and "--levels 3 5 would save 1,606 anchors an image" in text
    (text,) = advice_for(detector, split, **work, **(more | {"P5": row(0, 0, 250)}), P6=row(0, 0, 60))
    assert text.startswith("P6 was given") and "--levels 2 5 " in text, "P5 brings what C5 has seen down"
    sized = of_model("faster_rcnn", anchor_sizes=(8, 16, 32, 64, 128))
    (text,) = advice_for(sized, split, **work, **more, P6=row(0, 0, 60))
    assert "--levels 2 5 --anchors 8 16 32 64 would" in text


def test_advice_where_a_level_has_too_much(split: Split):
    levels = {"P3": row(950, 800, 4000), "P4": row(30, 20, 1000), "P5": row(30, 30, 250), "P6": row(20, 10, 60)}
    (text,) = advice_for(of_model("fcos"), split, **levels, P7=row(10, 5, 10))
    assert text.startswith("P3 has 91 % of the objects (median side 20 pixels") and "--short 128" in text
    few = {"P3": row(30, 30, 4000), "P4": row(30, 20, 1000), "P5": row(30, 30, 250), "P6": row(20, 10, 60)}
    (text,) = advice_for(of_model("fcos"), split, **few, P7=row(950, 900, 10))
    assert "P7 has 90 %" in text and "--short 32 would do in a quarter of the time" in text
    even = {f"P{k}": row(100, 90, 100) for k in range(3, 7)}
    assert advice_for(of_model("fcos"), split, **even, P7=row(100, 90, 10), none=row(0, 0, 0)) == []
    (text,) = advice_for(of_model("fcos"), split, **even, P7=row(100, 90, 10), none=row(0, 0, 0, by=12))
    assert text.startswith("12 of 500 objects (2 %) would have no anchor or place")
    (text,) = advice_for(of_model("fcos"), split, **(even | {"P3": row(100, 10, 100)}), P7=row(100, 90, 10))
    assert text.startswith("P3 finds 10 % of its objects, the other levels 90 %")


def test_pictures_of_the_maps():
    flat = torch.full((4, 3, 5), 7.0)
    assert (contrast(flat) == 0).all(), "a map without contrast is no error"
    flat[:, 1, 2] = 9
    assert contrast(flat).argmax() == 7
    picture = np.asarray(painted(np.array([[0.0, 1.0], [0.0, 0.0]]), 3, 2.0, (30, 20)))
    assert picture.shape == (20, 30, 3)
    bright = picture.sum(-1) > 600
    assert bright[:16, 16:].all() and not bright[16:].any() and not bright[:, :16].any(), "cells of 8 pixels, doubled"


def test_images_with_most_levels_are_chosen_and_seen_as_the_detector_does(split: Split):
    results = with_levels(split, [
        [0, 0, 0, 48, 32, 0, 0.9, 2], [0, 0, 0, 9, 9, 0, 0.8, 2], [0, 0, 0, 9, 9, 0, 0.1, 3],
        [1, 0, 0, 9, 9, 0, 0.9, 2], [1, 0, 0, 9, 9, 0, 0.8, 4],
    ])  # fmt: skip
    assert chosen(results, 0.5, 2) == [1, 0] and chosen(results, 0.05, 5) == [0, 1, 2]
    shown = look(of_model("faster_rcnn", short=32, long=48), split, results, 0, 0.5)
    assert shown is not None and shown.image.shape == (3, 32, 48)
    assert shown.maps[2].shape == (8, 12) and shown.maps[6].shape == (1, 1)
    assert shown.boxes[0].tolist() == [0, 0, 24, 16] and shown.levels.tolist() == [2, 2]
