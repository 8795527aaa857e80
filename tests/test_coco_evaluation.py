"""fpn.evaluation.coco, array by array against pycocotools, and its rules on numbers worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from pycocotools.cocoeval import COCOeval
from test_mask_metrics import by_pycocotools, random_masks
from test_metrics import make_results, make_split, random_case, reference

from fpn.data.dataset import Split
from fpn.evaluation import coco
from fpn.evaluation.coco import best_of_each, box_pairs, find, mask_pairs
from fpn.evaluation.matches import matches
from fpn.evaluation.metrics import Results, evaluated, score

LIMITS = (1, 10, 100)


def on_a_grid(seed: int, classes: int = 40) -> tuple[Split, Results]:
    """Many classes, and boxes of whole tens and scores of whole tenths, so that overlaps and scores are often equal."""
    rng = np.random.default_rng(seed)

    def boxes(n):
        corner = rng.integers(0, 4, (n, 2)) * 10
        return np.concatenate([corner, corner + rng.integers(1, 13, (n, 2)) * 10], axis=1)

    counts = rng.integers(0, 30, 12)
    truth = [
        np.column_stack([boxes(n), rng.integers(0, classes, n) // rng.integers(1, 20, n), rng.random(n) < 0.2])
        for n in counts
    ]
    areas = np.concatenate([np.prod(t[:, 2:4] - t[:, :2], axis=1) for t in truth]) * rng.choice([0.5, 1], sum(counts))
    ids = (rng.permutation(500)[: len(counts)] + 1).tolist()
    category_ids = (rng.permutation(900)[:classes] + 1).tolist()
    split = make_split(truth, tuple(f"c{n}" for n in range(classes)), category_ids, ids, areas)
    n = 1500
    image, label = rng.integers(0, len(counts), n), rng.integers(0, classes, n) // rng.integers(1, 20, n)
    rows = np.column_stack([image, boxes(n), label, rng.integers(0, 11, n) / 10])
    return split, make_results(split, rows)


def assert_equal(split: Split, results: Results, evaluation: COCOeval, limits=LIMITS, kind="bbox") -> None:
    precision, recall = evaluated(split, results, limits, kind)
    order = np.argsort(split.category_ids)
    np.testing.assert_allclose(precision[:, :, order], evaluation.eval["precision"][..., -1], atol=1e-12, rtol=0)
    np.testing.assert_allclose(recall[:, order], evaluation.eval["recall"], atol=1e-12, rtol=0)
    assert len(np.unique(recall)) > 5, "the case is too easy to tell evaluators apart"


@pytest.mark.parametrize("limits", [LIMITS, (1, 2, 5), (10,)], ids=str)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("case", [random_case, on_a_grid])
def test_every_number_equals_pycocotools(case, seed, limits) -> None:
    split, results = case(seed)
    assert_equal(split, results, reference(split, results, limits=limits), limits)


def test_images_in_several_parts_and_pairs_in_many(monkeypatch: pytest.MonkeyPatch) -> None:
    split, results = on_a_grid(5)
    images = np.array([7, 2, 3, 11])
    kept = np.isin(results.indices, images)
    some = Results(images, results.indices[kept], results.boxes[kept], results.scores[kept], results.labels[kept])
    evaluation = reference(split, some, images)
    assert_equal(split, some, evaluation)
    monkeypatch.setattr(coco, "_AT_ONCE", 3)
    assert_equal(split, some, evaluation)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools
@pytest.mark.parametrize("seed", range(2))
def test_every_number_of_masks_equals_pycocotools(seed: int) -> None:
    split, results = random_masks(seed)
    evaluation = by_pycocotools(split, results)
    assert_equal(split, results, evaluation, kind="segm")


def found_by(objects: list[tuple], detections: list[tuple], left_out: list[bool] | None = None) -> list[list[int]]:
    """By IoU, the object that each detection finds; objects (x, y, width, height, crowd), best detection first."""
    rows = np.array(objects, dtype=np.float64).reshape(-1, 5)
    crowd, boxes = rows[:, 4] > 0, np.array(detections, dtype=np.float64).reshape(-1, 4)
    group, groups_of = np.zeros(len(boxes), np.int64), np.zeros(len(rows), np.int64)
    pairs = box_pairs(group, boxes, groups_of, rows[:, :4], crowd)
    found = find(pairs, group, crowd, crowd[None] if left_out is None else np.array([left_out]))
    table = np.full((10, len(boxes)), -1)
    table[:, found.finders] = found.objects[:, 0]
    return table.tolist()


def test_each_takes_the_free_object_that_it_overlaps_most() -> None:
    """IoU 0.8 with the first object and 1 with the second; the next best gets what is left, at 0.8 and below."""
    found = found_by([(0, 0, 80, 100, 0), (0, 0, 100, 100, 0)], [(0, 0, 100, 100), (0, 0, 100, 100)])
    assert found == [[1, 0]] * 7 + [[1, -1]] * 3


def test_of_equal_overlaps_the_last_is_taken() -> None:
    assert found_by([(0, 0, 10, 10, 0)] * 3, [(0, 0, 10, 10)] * 4) == [[2, 1, 0, -1]] * 10


def test_a_crowd_is_taken_again_and_again_but_after_all_others() -> None:
    """All of the detection lies on the crowd (1), though it overlaps the object by 0.6 only."""
    objects = [(0, 0, 100, 60, 0), (0, 0, 400, 400, 1)]
    found = found_by(objects, [(0, 0, 100, 100), (0, 0, 100, 100), (5, 5, 10, 10)])
    assert found == [[0, 1, 1]] * 3 + [[1, 1, 1]] * 7


def test_what_is_left_out_is_taken_last_and_once() -> None:
    objects = [(0, 0, 100, 100, 0), (0, 0, 100, 90, 0)]
    found = found_by(objects, [(0, 0, 100, 100)] * 3, left_out=[True, False])
    assert found == [[1, 0, -1]] * 9 + [[0, -1, -1]]


def test_best_of_each() -> None:
    groups, scores = np.array([2, 0, 2, 2, 0]), np.array([0.5, 0.1, 0.9, 0.5, 0.2])
    rows, ranks = best_of_each(groups, scores, 2)
    assert rows.tolist() == [4, 1, 2, 0] and ranks.tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("objects", [[], [(0, 0, 0, 0, 0)], [(0, 0, 0, 5, 1)], [(300, 300, 9, 9, 0)]], ids=str)
@pytest.mark.parametrize("detections", [[], [(0, 0, 0, 0)], [(0, 0, 10, 10)] * 2], ids=str)
def test_nothing_is_found_where_nothing_overlaps(objects, detections) -> None:
    assert found_by(objects, detections) == [[-1] * len(detections)] * 10


def test_masks_of_nothing() -> None:
    none, crowd = np.zeros(0, np.int64), np.zeros(0, bool)
    pairs = mask_pairs(none, lambda row: {}, none, lambda row: {}, crowd)
    assert not len(pairs.detections) and find(pairs, none, crowd, crowd[None]).objects.shape == (10, 1, 0)


def test_matches_are_those_of_the_numbers() -> None:
    """What is right at each IoU, and how many of a class's objects, give COCO's recall of all sizes."""
    split, results = on_a_grid(2)
    found = matches(split, results)
    _, recall = evaluated(split, results, LIMITS, "bbox")
    for label in range(len(split.classes)):
        objects = ((split.labels == label) & ~split.ignore).sum()
        right = found.right[:, results.labels == label].sum(axis=1)
        np.testing.assert_allclose(recall[:, label, 0, 2], right / objects if objects else -1.0)
    assert (found.finder >= 0).sum() == found.right.sum() > 0 and found.counted[found.right].all()
    assert not found.counted.all()
    crowds = score(replace(split, ignore=np.ones_like(split.ignore)), results)
    assert set(crowds.values()) == {-1.0}
