"""Comparing an exported detector with its original, and the certificate that comes of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import fpn
from fpn.data.generated import CLASSES, generate
from fpn.errors import CheckpointError
from fpn.evaluation.evaluate import evaluate
from fpn.exported import Exported, detections_of, find_in
from fpn.exporting import certificate, scenes
from fpn.exporting.certificate import BOUNDS, GIVEN, certify, confirm, digest_of
from fpn.exporting.compare import Bound, Tally, compare, counterparts, faults, typical
from fpn.exporting.scenes import cases, digest, plain, scene
from fpn.inference import finder
from fpn.structures import Detections

BOUND = Bound(missing=0.1, score=0.01, box=1.0, mask=0.1, AP=0.1)


def found(boxes, scores, labels=None, levels=None, masks=None) -> Detections:
    n = len(boxes)
    return Detections(
        torch.tensor(boxes, dtype=torch.float32).reshape(n, 4),
        torch.tensor(scores, dtype=torch.float32),
        torch.tensor(labels or [0] * n, dtype=torch.int64),
        torch.tensor(levels or [2] * n, dtype=torch.int64),
        torch.tensor(n),
        ("a", "b"),
        masks,
    )


def test_counterparts_are_of_one_class_and_the_nearest_of_both():
    a = found([[0, 0, 10, 10], [20, 0, 30, 10], [0, 0, 10, 10]], [0.9, 0.8, 0.7], [0, 0, 1])
    b = found([[20, 0, 30, 11], [0, 0, 10, 9], [0, 0, 10, 10], [21, 0, 31, 10]], [0.9, 0.8, 0.7, 0.1], [0, 0, 0, 1])
    assert counterparts(a, b).tolist() == [2, 0, -1]
    assert counterparts(b, a).tolist() == [1, -1, 0, -1]
    twice = found([[0, 0, 10, 10]] * 3, [0.9, 0.8, 0.8], levels=[2, 3, 2])
    assert counterparts(twice, twice).tolist() == [0, 1, 2]
    nothing = found([], [])
    assert counterparts(a, nothing).tolist() == [-1] * 3 and counterparts(nothing, a).tolist() == []


def test_a_worked_comparison():
    # Resized from 50 x 100 to 100 x 200, all differences in pixels count double.
    a = found([[0, 0, 10, 10], [20, 0, 30, 10], [60, 0, 80, 30]], [0.9, 0.8, 0.5], levels=[2, 3, 4])
    b = found([[0, 0, 10, 11], [20, 0, 30, 10], [60, 0, 62, 30]], [0.86, 0.8, 0.5], levels=[2, 2, 4])
    tally = compare(a, b, (50, 100), (100, 1000), lowest=0.05, most=100, margin=0.1)
    assert (tally.images, tally.empty, tally.original, tally.exported) == (1, 0, 3, 3)
    assert (tally.missing, tally.moved) == (2, 1)  # the third of each; the second is of another level
    torch.testing.assert_close(tally.scores, torch.tensor([0.04, 0.0]))
    torch.testing.assert_close(tally.boxes, torch.tensor([2 / 4, 0.0]))
    words = faults("x", tally, BOUND)
    assert [word.split(": ")[1][:4] for word in words] == ["2 of", "2 of", "scor"]
    assert faults("x", tally, replace(BOUND, missing=0.34, score=0.021)) == []
    assert len(faults("x", replace(tally, boxes=torch.tensor([torch.nan, 0.0])), BOUND)) == 4  # NaN is above all
    assert typical(torch.tensor([0.0] * 18 + [1.0] * 15)) == 0 and typical(torch.tensor([3.0, 1.0, 2.0, 9.0])) == 2.5


def test_what_chance_decides_is_not_missing():
    strong, weak, nothing = ([0, 0, 10, 10], 0.9), ([50, 50, 60, 60], 0.14), found([], [])
    both, first = found(*zip(strong, weak, strict=True)), found([strong[0]], [strong[1]])
    keywords = {"size": (100, 100), "sides": (100, 100), "lowest": 0.05, "margin": 0.1}
    assert compare(both, first, most=100, **keywords).missing == 0  # 0.14 lies within 0.1 of 0.05
    assert compare(both, first, most=100, **{**keywords, "margin": 0.08}).missing == 1
    assert compare(first, both, most=100, **{**keywords, "margin": 0.08}).missing == 1
    far = found([[80, 80, 90, 90]], [0.85])
    assert compare(both, far, most=100, **keywords).missing == 2
    assert compare(first, far, most=1, **keywords).missing == 0  # each list is full, and could have had the other's
    assert compare(nothing, first, most=100, **keywords).missing == 1
    assert compare(nothing, nothing, most=100, **keywords).empty == 1


def test_masks_are_compared_where_both_have_some():
    boxes = [[0, 0, 10, 10], [20, 0, 30, 10]]
    a = found(boxes, [0.9, 0.8], masks=torch.zeros(2, 4, 4))
    b = found(boxes, [0.9, 0.8], masks=torch.stack([torch.zeros(4, 4), torch.full((4, 4), 0.5)]))
    tally = compare(a, b, (100, 100), (100, 100), 0.05, 100, 0.1)
    assert tally.masks.tolist() == [0, 0.5]
    assert faults("x", tally, BOUND) == ["x: masks differ by 0.25 (at most 0.1)"]
    total = Tally.total([tally, tally])
    assert total.images == 2 and len(total.masks) == 4 == len(total.boxes)


def test_the_images_are_the_same_everywhere(monkeypatch):
    every = [image for case in cases(96) for image in case.images]
    assert digest(every) == "337407ae23f0d12b62b553847f0263d93bb8658ae642dccd9ac148bc96d55f92"
    assert {min(image.shape[1:]) for image in every} >= {1} and all(image.dtype == torch.uint8 for image in every)
    monkeypatch.setattr(scenes, "LARGEST", 96)
    assert digest([image for case in cases(10**9) for image in case.images]) == digest(every)
    assert not torch.equal(scene((64, 64), 1), scene((64, 64), 2)) and scene((64, 64), 1).float().std() > 10
    assert plain((64, 64), 128, 1).float().std() < 6


@pytest.fixture(scope="module")
def detector():
    torch.manual_seed(0)
    made = fpn.build(backbone="tiny", classes=CLASSES, weights="none", width=32, hidden=64, short=64, long=128)
    for layer in (made.box_head.classes, made.box_head.offsets, made.rpn.objectness, made.rpn.offsets):
        torch.nn.init.normal_(layer.weight, std=0.2)
    return made.eval()


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    return fpn.data.load(generate(tmp_path_factory.mktemp("data"), 12, (64, 96), seed=1))["val"]


REMEMBERED: dict[tuple, list[Detections]] = {}


def remembering(detector, images, device):
    """`finder.find`, which asks the detector only once about images that many tests here look at."""
    key = (id(detector), digest(images))
    if key not in REMEMBERED:
        REMEMBERED[key] = finder.find(detector, images, device)
    return REMEMBERED[key]


@pytest.fixture(autouse=True)
def remembered(monkeypatch):
    monkeypatch.setattr(certificate, "find", remembering)


def exported_of(detector, change=lambda found: found, about=None) -> Exported:
    """A file that does what the detector does, but for a change of its detections."""
    cpu = torch.device("cpu")

    def changed(images):
        return [change(found) for image in images for found in remembering(detector, [image], cpu)]

    facts = detector.score, detector.max_detections, detector.has_masks, detector.proposes
    return Exported(Path("a.onnx"), "onnx", detector.spec, changed, *facts, about or {})


def shifted(pixels):
    return lambda found: replace(found, boxes=found.boxes + pixels)


def certificate_of(detector, exported, precision="fp32", **keywords):
    return certify(detector, exported, precision, progress=False, **keywords)


def test_the_same_detector_has_no_faults(detector, split):
    images = [torch.randint(0, 256, (3, 70, 50), dtype=torch.uint8)]
    made = certificate_of(detector, exported_of(detector), images=images, split=split)
    assert made.faults == [] and made.rows[GIVEN].images == 1 and made.rows["images of val"].images == len(split)
    assert sum(tally.images for tally in made.rows.values()) == 13 + 1 + len(split)
    assert all(tally.original > 0 == tally.missing for tally in made.rows.values())
    before, after = made.AP["AP"]
    assert before == after == pytest.approx(evaluate(detector, split, batch=1, progress=False)["AP"])
    assert json.loads(json.dumps(made.as_dict()))["rows"][GIVEN]["scores"]["typical"] == 0
    lines = made.table().splitlines()
    assert lines[1].startswith("usual sizes") and lines[-1].startswith("AP on val (2 images)")


def test_one_that_finds_nothing_is_told(detector, split):
    quiet = fpn.build(backbone="tiny", classes=CLASSES, weights="none", width=16, hidden=32, short=64, score=0.99)
    made = certificate_of(quiet, exported_of(quiet))
    assert made.faults == [] and made.notes == [
        "only 0 detections could be compared: give images that the detector finds something in, with --data or --images"
    ]
    assert "without a detection" in certificate_of(detector, exported_of(detector)).notes[0]


@pytest.mark.parametrize(
    "change",
    [
        shifted(0.5),
        lambda found: replace(found, scores=found.scores * 0.98),
        lambda found: replace(found, labels=(found.labels + 1) % len(CLASSES)),
        lambda found: replace(found, levels=found.levels + 1),
        lambda found: replace(found, boxes=found.boxes[:, [1, 0, 3, 2]]),
        lambda found: replace(found, boxes=found.boxes * torch.nan),
    ],
    ids=["half a pixel", "scores", "labels", "levels", "x and y", "nan"],
)
def test_a_changed_one_has_faults(detector, change):
    assert certificate_of(detector, exported_of(detector, change)).faults


def test_a_mistake_on_one_kind_of_image_is_not_averaged_away(detector):
    honest = exported_of(detector)
    find = honest.find

    def thin(images):
        return [shifted(1.0)(found) if 1 in image.shape else found for image, found in zip(images, find(images))]  # noqa: B905

    made = certificate_of(detector, replace(honest, find=thin))
    assert [fault.split(":")[0] for fault in made.faults] == ["1 pixel wide or high"]

    def mixed(images):  # as where all images of a batch are resized like the first
        return find([images[0]] * len(images))

    made = certificate_of(detector, replace(honest, find=mixed))
    assert {fault.split(":")[0] for fault in made.faults} == {"a batch of 3"}


def test_the_bound_follows_the_precision(detector):
    def worse(by):
        return exported_of(detector, lambda found: replace(found, scores=found.scores - by))

    passing = {by: [p for p in BOUNDS if not certificate_of(detector, worse(by), p).faults] for by in (0.01, 0.03)}
    assert passing == {0.01: ["bf16", "int8"], 0.03: ["int8"]}
    assert [bound.AP for bound in BOUNDS.values()] == sorted(bound.AP for bound in BOUNDS.values())


def test_AP_beyond_the_bound_is_a_fault(detector, split):
    made = certificate_of(detector, exported_of(detector))
    assert replace(made, AP={"AP": (0.5, 0.499)}).faults == []
    (fault,) = replace(made, AP={"AP": (0.5, 0.49)}).faults
    assert fault == "AP was 0.5000 and is 0.4900 (they may differ by 0.002)"


def stored(detector, split=None):
    made = certificate_of(detector, exported_of(detector), split=split)
    return json.loads(json.dumps({"certificate": made.as_dict(), "versions": {"fpn": "0.1.0"}}))


def test_a_certificate_is_confirmed_without_the_original(detector, split):
    about = stored(detector, split)
    here = exported_of(detector, about=about)
    assert confirm(here, progress=False).startswith("certificate confirmed on 13 images of its own (fp32, made by fpn")
    metrics = evaluate(here, split, progress=False)
    assert "and by AP on val" in confirm(here, split, metrics, progress=False)
    moved = replace(split, root=split.root.parent)  # the same data, elsewhere
    assert digest_of(moved) == digest_of(split) != digest_of(split.select(np.arange(1), "val"))
    told = confirm(here, split.select(np.arange(1), "val"), metrics, progress=False)
    assert "and by AP" not in told and told.endswith(
        "the certificate has that of other images (2 of val) or asked otherwise"
    )
    alone = exported_of(detector, about=stored(detector))
    assert confirm(alone, split, metrics, progress=False).endswith("AP was not compared: the certificate has none")
    metrics["AP"] += 0.01
    with pytest.raises(CheckpointError, match=r"a\.onnx: does not do what it did when it was exported: AP was"):
        confirm(here, split, metrics, progress=False)
    with pytest.raises(CheckpointError, match=r"usual sizes: boxes differ by 0\.5"):
        confirm(exported_of(detector, shifted(0.5), about), progress=False)


def test_a_damaged_certificate_is_told(detector):
    about = stored(detector)
    damages = [
        {},
        {**about, "certificate": 3},
        {**about, "certificate": {**about["certificate"], "precision": "fp7"}},
        {**about, "certificate": {**about["certificate"], "scenes": {"digest": "x", "found": [[["a"] * 7]]}}},
        {**about, "certificate": {**about["certificate"], "AP": {"AP": 1}}},
        {**about, "certificate": {**about["certificate"], "data": {"digest": "x"}}},
        {"certificate": about["certificate"]},
        {**about, "versions": 3},
    ]
    for damaged in damages:
        with pytest.raises(CheckpointError, match="missing or damaged"):
            confirm(exported_of(detector, about=damaged), progress=False)
    about["certificate"]["scenes"]["digest"] = "another"
    with pytest.raises(CheckpointError, match="another version"):
        confirm(exported_of(detector, about=about), progress=False)


def test_images_of_several_sizes_come_back_in_their_order():
    calls = []

    def run(images):
        calls.append(images.shape)
        width = images.shape[3]
        batch, side = len(images), images.reshape(len(images), -1)[:, 0].astype(np.float32)
        boxes = np.zeros((batch, 2, 4), np.float32)
        boxes[:, 0, 2], boxes[:, 0, 3] = width, side
        return {
            "boxes": boxes,
            "scores": np.array([[0.9, 0]] * batch, np.float32),
            "labels": np.array([[0, -1]] * batch, np.int32),
            "levels": np.array([[2, -1]] * batch, np.int32),
            "count": np.ones(batch, np.int32),
        }

    sizes = [(3, 10, 20), (3, 10, 30), (3, 10, 20), (3, 5, 20)]
    images = [torch.full(size, place, dtype=torch.uint8) for place, size in enumerate(sizes)]
    together = find_in(run, ("a",), images)
    assert [one.boxes.tolist() for one in together] == [[[0, 0, w, n]] for n, w in enumerate((20, 30, 20, 20))]
    assert calls == [(2, 3, 10, 20), (1, 3, 10, 30), (1, 3, 5, 20)]
    assert find_in(run, ("a",), []) == []
    assert detections_of(run(np.ones((1, 3, 4, 4), np.uint8)), ("a",)).labels.dtype == torch.int64
