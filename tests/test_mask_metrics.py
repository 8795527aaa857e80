"""The AP of masks against pycocotools, and masks on their way from a detector into results, files and pictures."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as api
from test_metrics import make_results, make_split, random_case

import fpn
from fpn.data import loader, resize_transform
from fpn.data.dataset import Split
from fpn.data.generated import generate
from fpn.data.outlines import Column, polygon_mask
from fpn.drawing import colour_of, draw
from fpn.errors import OptionError
from fpn.evaluation.evaluate import collect, evaluate, merge
from fpn.evaluation.metrics import Results, ground_truth, score, to_coco
from fpn.model.detector import Detector
from fpn.model.masks import paste
from fpn.predict import segmentations
from fpn.rle import encode, encode_pasted, mask_of, runs_of, runs_of_mask
from fpn.structures import Detections

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools


def ellipse(box: np.ndarray, points: int = 16) -> list[float]:
    angle = np.linspace(0, 2 * np.pi, points, endpoint=False)
    x = box[0] + (box[2] - box[0]) * (1 + np.cos(angle)) / 2
    y = box[1] + (box[3] - box[1]) * (1 + np.sin(angle)) / 2
    return np.stack([x, y], 1).ravel().tolist()


def random_masks(seed: int) -> tuple[Split, Results]:
    """The case of the boxes, with ellipses: polygons, run lengths (of crowds too), and some objects without."""
    split, results = random_case(seed)
    column = Column()
    for row, box in enumerate(split.boxes):
        if row % 3 == 0:
            runs = runs_of_mask(polygon_mask([ellipse(box)], (400, 400))).tolist()
            column.add({"size": [400, 400], "counts": runs})
        else:
            column.add([ellipse(box)] if row % 7 else [])
    masks = [encode(torch.from_numpy(polygon_mask([ellipse(box)], (400, 400))[None] > 0))[0] for box in results.boxes]
    return replace(split, outlines=column.outlines()), replace(results, masks=masks)


def by_pycocotools(split: Split, results: Results) -> Any:
    """The evaluation of masks by pycocotools."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth, found = COCO(), COCO()
    truth.dataset = json.loads(json.dumps(ground_truth(split)))
    detections = json.loads(json.dumps(to_coco(split, results)))
    for n, d in enumerate(detections, 1):
        d |= {"id": n, "area": float(api.area(d["segmentation"])), "iscrowd": 0}
        del d["bbox"]
    found.dataset = {**truth.dataset, "annotations": detections}
    truth.createIndex()
    found.createIndex()
    evaluation = COCOeval(truth, found, "segm")
    evaluation.evaluate()
    evaluation.accumulate()
    return evaluation


@pytest.mark.parametrize("seed", range(3))
def test_equals_pycocotools(seed: int) -> None:
    split, results = random_masks(seed)
    metrics = score(split, results)
    evaluation = by_pycocotools(split, results)
    evaluation.summarize()
    assert metrics.masks is not None
    np.testing.assert_allclose(list(metrics.masks.values()), evaluation.stats, atol=1e-6)
    assert 0.05 < metrics.masks["AP"] < 0.95 and metrics.masks["AP"] != metrics["AP"]
    precision = evaluation.eval["precision"]
    for row, category in enumerate(sorted(split.category_ids)):
        values = precision[:, :, row, 0, 2]
        name = split.classes[split.category_ids.tolist().index(category)]
        expected = float(values[values > -1].mean()) if (values > -1).any() else -1.0
        assert metrics.masks.per_class[name]["AP"] == pytest.approx(expected, abs=1e-6)
    boxes_only = score(split, replace(results, masks=None))
    assert dict(boxes_only) == dict(metrics) and boxes_only.masks is None, "masks do not change the numbers of boxes"


def test_what_is_printed_and_written() -> None:
    split, results = random_masks(0)
    metrics = score(split, results)
    assert metrics.masks is not None
    table = metrics.table()
    assert table.count("AP50") == 4 and table.startswith("boxes\n") and "\n\nmasks\n" in table
    assert metrics.summary().endswith(f"masks {metrics.masks['AP']:.3f}")
    stored = json.loads(json.dumps(metrics.as_dict()))
    assert stored["AP"] == metrics["AP"] and stored["masks"]["AP"] == metrics.masks["AP"]
    assert set(stored["masks"]["per_class"]) == set("wxyz")
    assert metrics.with_masks()["mask_AP50"] == metrics.masks["AP50"]
    without = score(replace(split, outlines=None), results)
    assert without.masks is None and any("masks are not scored" in note for note in without.notes)


def test_a_perfect_mask_and_half_of_one() -> None:
    """By hand: the right box with half of its mask has an IoU of 0.5, which counts at the first threshold only."""
    column = Column()
    column.add([[100, 100, 200, 100, 200, 200, 100, 200]])
    split = replace(make_split([[(100, 100, 200, 200, 0, 0)]], classes=("a",)), outlines=column.outlines())
    results = make_results(split, [(0, 100, 100, 200, 200, 0, 0.9)])
    for right, ap in ((200, 1.0), (150, 0.1)):
        mask = torch.zeros(1, 400, 400, dtype=torch.bool)
        mask[:, 100:200, 100:right] = True
        metrics = score(split, replace(results, masks=encode(mask)))
        assert metrics.masks is not None and metrics["AP"] == pytest.approx(1.0)
        assert metrics.masks["AP"] == pytest.approx(ap)


def detections_of(boxes: list[list[float]], labels: list[int], m: int = 4) -> Detections:
    """Of one image; the upper half of each box."""
    n = len(boxes)
    masks = torch.zeros(1, n + 1, m, m)
    masks[0, :n, : m // 2] = 1.0
    padded = torch.tensor([[*boxes, [0.0, 0.0, 0.0, 0.0]]])
    scores = torch.linspace(0.9, 0.5, n + 1)[None] * (torch.arange(n + 1) < n)
    return Detections(
        padded,
        scores,
        torch.tensor([[*labels, -1]]),
        torch.zeros(1, n + 1).long(),
        torch.tensor([n]),
        ("a", "b"),
        masks,
    )


def test_results_of_batches_with_masks() -> None:
    """Masks are in their order beside the boxes, of the image's own size, without classes that the split lacks."""
    split = make_split([[(0, 0, 10, 10, 0, 0)], []], classes=("a",))
    pyramid = torch.nn.Module()
    pyramid.levels = (2,)
    detector = Detector(torch.nn.Identity(), pyramid, ("a", "b"))
    detector.has_masks = True
    found = detections_of([[10, 20, 50, 60], [0, 0, 9, 9], [100, 100, 399, 399]], [0, 1, 0])
    shards = [collect([(torch.tensor([image]), found)], detector, split) for image in (1, 0)]
    results = merge([collect([], detector, split), *shards])
    assert results.indices.tolist() == [1, 1, 0, 0] and results.masks is not None
    assert found.masks is not None
    expected = paste(found.masks[0, [0, 2]], found.boxes[0, [0, 2]], (400, 400)).numpy()
    for text, mask in zip(results.masks, [*expected, *expected], strict=True):
        assert (mask_of(runs_of(text), (400, 400)) == mask).all()
    one = mask_of(runs_of(results.masks[0]), (400, 400))
    assert one[22:38, 12:48].all() and not one[42:].any()
    entry = to_coco(split, results)[0]["segmentation"]
    assert entry == {"size": [400, 400], "counts": results.masks[0]}


def test_large_images_are_encoded_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    found = detections_of([[5.0 * i, 3.0 * i, 5.0 * i + 9, 3.0 * i + 7] for i in range(7)], [0] * 7)[0]
    assert found.masks is not None
    whole = encode_pasted(found.masks, found.boxes, (50, 60))
    monkeypatch.setattr("fpn.rle.PIXELS", 2 * 50 * 60)
    assert encode_pasted(found.masks, found.boxes, (50, 60)) == whole and len(whole) == 7
    assert segmentations(found, (50, 60)) == [{"size": [50, 60], "counts": text} for text in whole]
    assert segmentations(replace(found, masks=None), (50, 60)) is None
    assert encode_pasted(found.masks[:0], found.boxes[:0], (50, 60)) == []


def test_masks_are_drawn_under_the_boxes() -> None:
    """Half through inside, the colour itself at the edge, and nothing where the mask is not."""
    found = detections_of([[100.0, 100.0, 300.0, 300.0], [320.0, 10.0, 390.0, 40.0]], [0, 1])[0]
    picture = Image.new("RGB", (400, 400), (200, 200, 200))
    plain = np.asarray(draw(picture, found.boxes, found.labels, found.scores, found.classes)).astype(int)
    drawn = np.asarray(draw(picture, found.boxes, found.labels, found.scores, found.classes, found.masks)).astype(int)
    middle = np.round(0.55 * np.array([200] * 3) + 0.45 * np.array(colour_of(0)))
    assert (drawn[150, 150] == middle).all(), "inside the mask of the upper half"
    assert (drawn[250, 150] == 200).all() and (drawn[350] == plain[350]).all()
    edge = [row for row in range(190, 210) if (drawn[row, 130:270] == colour_of(0)).all()]
    assert len(edge) == 1 and abs(edge[0] - 199.5) <= 1, "the line at its lower edge"
    full = [np.zeros((400, 400), np.uint8) for _ in range(2)]
    full[0][100:200, 100:300] = 1
    again = np.asarray(draw(picture, found.boxes, found.labels, found.scores, found.classes, full)).astype(int)
    assert (again[120:180, 120:280] == drawn[120:180, 120:280]).all()
    with pytest.raises(OptionError, match="1 masks"):
        draw(picture, found.boxes, found.labels, masks=full[:1])


def test_from_generated_outlines_to_mask_ap(tmp_path: Path) -> None:
    """Mask R-CNN on generated data: finite losses with gradients for the mask head, masks in results and metrics."""
    data = fpn.data.load(generate(tmp_path / "data", images=6, size=(64, 96)), outlines=True)
    torch.manual_seed(0)
    detector = fpn.build(
        "mask_rcnn", backbone="resnet18", classes=data.classes, weights="none", short=64, long=96, width=16, hidden=16
    )
    assert detector.has_masks
    (batch, *_) = loader(data["train"], resize_transform(64, 96), 2, training=True, masks=True)
    losses = detector.losses(batch)
    assert torch.isfinite(torch.stack(list(losses.values()))).all()
    losses["mask"].backward()
    assert sum(float(p.grad.abs().sum()) for p in detector.parameters() if p.grad is not None) > 0
    metrics = evaluate(detector, data["val"], device="cpu", workers=0, progress=False)
    assert metrics.masks is not None and 0 <= metrics.masks["AP"] <= 1
    found = fpn.predict(detector, data["val"].path(0), threshold=0.0, device="cpu")
    encoded = segmentations(found, (64, 96))
    assert encoded is not None and len(encoded) == len(found) > 0 and encoded[0]["size"] == [64, 96]
