"""fpn.evaluation.metrics against pycocotools, which defines the numbers, and against numbers worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fpn.data.dataset import Split
from fpn.errors import OptionError
from fpn.evaluation.metrics import Metrics, Results, ground_truth, score, to_coco

AP_NAMES = ["AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large"]
NAMES = [*AP_NAMES, "AR1", "AR10", "AR100", "AR_small", "AR_medium", "AR_large"]


def make_split(boxes_per_image, classes=("a", "b"), category_ids=None, image_ids=None, areas=None) -> Split:
    """A split from rows (x1, y1, x2, y2, label, ignore), one list an image."""
    rows = np.array([row for image in boxes_per_image for row in image], dtype=np.float64).reshape(-1, 6)
    counts = [len(image) for image in boxes_per_image]
    boxes = rows[:, :4]
    return Split(
        name="val",
        classes=classes,
        category_ids=np.array(category_ids or range(1, len(classes) + 1), dtype=np.int64),
        root=Path("nowhere"),
        files=np.array([f"{i}.jpg" for i in range(len(counts))], dtype=str),
        image_ids=np.array(image_ids or range(1, len(counts) + 1), dtype=np.int64),
        sizes=np.full((len(counts), 2), 400, dtype=np.int64),
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        boxes=boxes,
        labels=rows[:, 4].astype(np.int64),
        ignore=rows[:, 5].astype(bool),
        areas=(boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) if areas is None else areas,
    )


def make_results(split: Split, rows, images=None) -> Results:
    """Results from rows (image, x1, y1, x2, y2, label, score)."""
    rows = np.array(rows, dtype=np.float64).reshape(-1, 7)
    images = np.arange(len(split)) if images is None else np.array(images, dtype=np.int64)
    return Results(images, rows[:, 0].astype(np.int64), rows[:, 1:5], rows[:, 6], rows[:, 5].astype(np.int64))


def random_case(seed: int) -> tuple[Split, Results]:
    """Images with and without objects, three classes with and one without any, crowds, mask areas, tied scores."""
    rng = np.random.default_rng(seed)

    def random_boxes(n):
        centre, size = rng.uniform(0, 400, (n, 2)), np.exp(rng.uniform(np.log(4), np.log(250), (n, 2)))
        return np.concatenate([centre - size / 2, centre + size / 2], axis=1)

    counts = [*rng.integers(1, 12, 22), 0, 0]
    truth = [
        np.column_stack([random_boxes(n), rng.choice([0, 1, 3], n), rng.random(n) < 0.15]) for n in counts
    ]  # class 2 has no object
    areas = np.concatenate([(t[:, 2] - t[:, 0]) * (t[:, 3] - t[:, 1]) for t in truth]) * rng.uniform(
        0.4, 1, sum(counts)
    )
    split = make_split(truth, ("w", "x", "y", "z"), [7, 3, 90, 13], (rng.permutation(1000)[:24] + 1).tolist(), areas)

    found = []
    for image, t in enumerate(truth):
        hits = np.repeat(t[:, :4], 3, axis=0) + rng.normal(0, 3, (3 * len(t), 4)) * rng.integers(0, 2, (3 * len(t), 1))
        boxes = np.concatenate([hits, random_boxes(6)])
        boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2])
        labels = np.concatenate([np.repeat(t[:, 4], 3), rng.integers(0, 4, 6)])
        labels = np.where(rng.random(len(labels)) < 0.1, rng.integers(0, 4, len(labels)), labels)
        scores = np.round(rng.random(len(boxes)), 1)  # many ties
        found.append(np.column_stack([np.full(len(boxes), image), boxes, labels, scores]))
    return split, make_results(split, np.concatenate(found))


def reference(split: Split, results: Results, images=None, limits=(1, 10, 100)):
    """pycocotools on the JSON that we write: its precision (T, R, K, A, M) and recall (T, K, A, M)."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth, found = COCO(), COCO()
    truth.dataset = json.loads(json.dumps(ground_truth(split)))
    detections = json.loads(json.dumps(to_coco(split, results)))
    for n, d in enumerate(detections, 1):
        d |= {"id": n, "area": d["bbox"][2] * d["bbox"][3], "iscrowd": 0}
    found.dataset = {**truth.dataset, "annotations": detections}
    truth.createIndex()
    found.createIndex()
    evaluation = COCOeval(truth, found, "bbox")
    evaluation.params.maxDets = list(limits)
    if images is not None:
        evaluation.params.imgIds = split.image_ids[images].tolist()
    evaluation.evaluate()
    evaluation.accumulate()
    return evaluation


def mean(values: np.ndarray) -> float:
    return float(values[values > -1].mean()) if (values > -1).any() else -1.0


@pytest.mark.parametrize("seed", range(5))
def test_equals_pycocotools(seed):
    split, results = random_case(seed)
    metrics = score(split, results)
    evaluation = reference(split, results)
    evaluation.summarize()
    assert list(metrics) == NAMES
    np.testing.assert_allclose(list(metrics.values()), evaluation.stats, atol=1e-6)
    assert 0.05 < metrics["AP"] < 0.95, "the case is too easy or too hard to tell evaluators apart"

    precision, recall = evaluation.eval["precision"], evaluation.eval["recall"]
    for row, category in enumerate(sorted(split.category_ids)):
        ours = metrics.per_class[split.classes[split.category_ids.tolist().index(category)]]
        assert ours["AP"] == pytest.approx(mean(precision[:, :, row, 0, 2]), abs=1e-6)
        assert ours["AP50"] == pytest.approx(mean(precision[0, :, row, 0, 2]), abs=1e-6)
        assert ours["AP75"] == pytest.approx(mean(precision[5, :, row, 0, 2]), abs=1e-6)
        assert ours["AR100"] == pytest.approx(mean(recall[:, row, 0, 2]), abs=1e-6)
    assert [metrics.per_class[c]["objects"] for c in "wxyz"] == [
        float(((split.labels == k) & ~split.ignore).sum()) for k in range(4)
    ]
    assert metrics.per_class["y"]["AP"] == -1
    assert any("1 of 4 classes" in note and note.endswith(": y") for note in metrics.notes)


def test_equals_pycocotools_on_some_of_the_images():
    split, results = random_case(7)
    images = np.arange(0, 24, 2)
    keep = np.isin(results.indices, images)
    some = Results(images, results.indices[keep], results.boxes[keep], results.scores[keep], results.labels[keep])
    metrics = score(split, some)
    evaluation = reference(split, some, images)
    evaluation.summarize()
    np.testing.assert_allclose(list(metrics.values()), evaluation.stats, atol=1e-6)
    assert metrics.notes[0].startswith("12 of 24 images of split 'val' are not scored: 1.jpg, 3.jpg")
    assert "and 7 more" in metrics.notes[0]


def test_max_detections_for_dense_scenes():
    rng = np.random.default_rng(0)
    corners = rng.permutation([(x, y) for x in range(0, 400, 20) for y in range(0, 400, 20)])[:250]
    split = make_split([np.column_stack([corners, corners + 15, np.zeros(250), np.zeros(250)])])
    rows = np.column_stack([np.zeros(250), corners, corners + 15, np.zeros(250), rng.random(250)])
    results = make_results(split, rows)

    at_100 = score(split, results)
    assert at_100["AR100"] == pytest.approx(0.4)  # 100 of 250
    assert any("250 objects of one class" in note and "max_detections to 250" in note for note in at_100.notes)

    at_300 = score(split, results, max_detections=300)
    assert at_300["AP"] == at_300["AR300"] == at_300.per_class["a"]["AR300"] == 1
    assert "AR100" not in at_300
    assert any("up to 300" in note for note in at_300.notes)
    precision = reference(split, results, limits=(1, 10, 300)).eval["precision"]
    assert mean(precision[:, :, :, 0, 2]) == pytest.approx(at_300["AP"])

    with pytest.raises(OptionError, match="max_detections is 10"):
        score(split, results, max_detections=10)


def test_perfect_detections_score_one():
    split, _ = random_case(3)
    image = np.repeat(np.arange(24), np.diff(split.offsets))
    rows = np.column_stack([image, split.boxes, split.labels, np.ones(len(image))])
    metrics = score(split, make_results(split, rows))
    assert [metrics[name] for name in NAMES if name not in ("AR1", "AR10")] == [1.0] * 10
    assert {row["AP"] for name, row in metrics.per_class.items() if name != "y"} == {1.0}


def test_worked_by_hand():
    """Four 100x100 objects; found: one exactly, one 80 of 100 columns wide (IoU 0.8), one wrong place, in that order.

    Precision is 1 up to recall 0.25 and, up to IoU 0.80 (7 of the 10 thresholds), up to 0.5: 26 or 51 of 101 recalls.
    """
    split = make_split([[(0, 0, 100, 100, 0, 0), (200, 0, 300, 100, 0, 0)]] * 2, classes=("a",))
    rows = [(0, 0, 0, 100, 100, 0, 0.9), (0, 200, 0, 280, 100, 0, 0.8), (1, 100, 200, 200, 300, 0, 0.7)]
    metrics = score(split, make_results(split, rows))
    assert metrics["AP50"] == metrics["AP75"] == pytest.approx(51 / 101)
    assert metrics["AP"] == metrics["AP_large"] == pytest.approx((7 * 51 + 3 * 26) / 1010)
    assert metrics["AR1"] == pytest.approx(0.25)
    assert metrics["AR10"] == metrics["AR100"] == metrics["AR_large"] == pytest.approx((7 * 0.5 + 3 * 0.25) / 10)
    assert metrics["AP_small"] == metrics["AR_medium"] == -1
    assert metrics.notes == [
        "AP_small and AR_small are -1: no ground-truth object of at most 32x32 pixels in split 'val'",
        "AP_medium and AR_medium are -1: no ground-truth object between 32x32 and 96x96 pixels in split 'val'",
    ]


@pytest.mark.parametrize("side, sizes", [(32, {"small", "medium"}), (96, {"medium", "large"}), (97, {"large"})])
def test_sizes_include_both_ends(side, sizes):
    split = make_split([[(0, 0, side, side, 0, 0)]], classes=("a",))
    metrics = score(split, make_results(split, [(0, 0, 0, side, side, 0, 1.0)]))
    assert {size for size in ("small", "medium", "large") if metrics[f"AP_{size}"] == 1} == sizes
    assert len(metrics.notes) == 3 - len(sizes)


def test_detections_inside_a_crowd_cost_nothing():
    """Any number of detections may lie in an ignored region, as long as that is where they lie."""
    split = make_split([[(0, 0, 50, 50, 0, 0), (100, 100, 300, 300, 0, 1)]], classes=("a",))
    inside = [(0, 120 + 30 * i, 120, 150 + 30 * i, 150, 0, 0.99) for i in range(4)]
    assert score(split, make_results(split, [*inside, (0, 0, 0, 50, 50, 0, 0.5)]))["AP"] == 1
    outside = (0, 310, 310, 340, 340, 0, 0.99)
    assert score(split, make_results(split, [outside, (0, 0, 0, 50, 50, 0, 0.5)]))["AP"] == 0.5


@pytest.mark.parametrize("truth", [[[], []], [[(0, 0, 50, 50, 0, 1)], []]], ids=["nothing", "only a crowd"])
@pytest.mark.parametrize("rows", [[], [(0, 0, 0, 20, 20, 1, 0.5)]], ids=["no detections", "one detection"])
def test_no_objects(truth, rows):
    split = make_split(truth)
    metrics = score(split, make_results(split, rows))
    assert list(metrics.values()) == [-1.0] * 12
    evaluation = reference(split, make_results(split, rows))
    evaluation.summarize()
    np.testing.assert_array_equal(evaluation.stats, -1)
    assert len(metrics.notes) == 1 and metrics.notes[0].startswith("every number is -1: there is no object to find")
    assert metrics.summary() == "AP -  AP50 -  small - medium - large -"


def test_no_detections():
    split = make_split([[(0, 0, 50, 50, 0, 0)], []])
    results = make_results(split, [])
    metrics = score(split, results)
    evaluation = reference(split, results)
    evaluation.summarize()
    np.testing.assert_array_equal(list(metrics.values()), evaluation.stats)
    assert metrics["AP"] == metrics["AR100"] == metrics["AP_medium"] == 0 and metrics["AP_large"] == -1
    assert to_coco(split, results) == []


def test_no_images_and_no_classes():
    assert set(score(make_split([]), make_results(make_split([]), [])).values()) == {-1.0}
    unread = make_split([[(0, 0, 50, 50, 0, 0)]])
    assert set(score(unread, make_results(unread, [], images=[])).values()) == {-1.0}
    no_classes = make_split([[]], classes=())
    assert score(no_classes, make_results(no_classes, [])).per_class == {}


def test_long_image_ids_stay_apart():
    """2**62 and 2**62 + 1 are one number in floating point, in which the evaluator keeps ids."""
    boxes = [[(0, 0, 50, 50, 0, 0)], [(100, 100, 200, 200, 0, 0)]]
    split = make_split(boxes, classes=("a",), image_ids=[2**62 + 1, 2**62])
    assert score(split, make_results(split, [(0, 0, 0, 50, 50, 0, 0.9)]))["AR100"] == 0.5
    assert score(split, make_results(split, [(1, 0, 0, 50, 50, 0, 0.9)]))["AR100"] == 0.0


def test_written_forms():
    split = make_split(
        [[(0.1, 0.2, 30.3, 40.4, 1, 0)], [(5, 5, 10, 10, 0, 1)]], category_ids=[3, 8], image_ids=[20, 10]
    )
    results = make_results(split, [(1, 0.12345, 1, 10.12345, 21, 1, np.float32(0.9))])
    assert to_coco(split, results) == [{"image_id": 10, "category_id": 8, "bbox": [0.123, 1, 10, 20], "score": 0.9}]
    truth = ground_truth(split)
    assert truth["categories"] == [{"id": 3, "name": "a"}, {"id": 8, "name": "b"}]
    assert truth["images"][0] == {"id": 20, "file_name": "0.jpg", "height": 400, "width": 400}
    assert truth["annotations"][0] == {
        "id": 1, "image_id": 20, "category_id": 8, "bbox": [0.1, 0.2, 30.2, 40.2], "area": split.areas[0], "iscrowd": 0
    }  # fmt: skip
    assert truth["annotations"][1]["iscrowd"] == 1

    metrics = score(split, results)
    assert isinstance(metrics, Metrics)
    assert json.loads(json.dumps(metrics.as_dict())) == {
        **metrics,
        "per_class": metrics.per_class,
        "notes": metrics.notes,
    }
    lines = metrics.table().splitlines()
    assert lines[0].split() == ["AP", "0.000"]
    assert lines[13].split() == ["class", "objects", "AP", "AP50", "AP75", "AR100"]
    assert lines[14].split() == ["a", "0", "-", "-", "-", "-"]
    assert len(lines) == 12 + 1 + 1 + 2
