"""ATSS: which anchors are positive, by hand and against a plain loop over boxes; its losses term by term."""

from __future__ import annotations

import math

import pytest
import torch
from one_stage import LABELS, TRUTH, batch_of, detector_on, maps_of
from torchvision.ops import box_iou, generalized_box_iou_loss, sigmoid_focal_loss

import fpn
from fpn.model.anchors import Anchors
from fpn.model.atss import assign
from fpn.model.fcos import centerness_of

SMALL = torch.tensor([[0.0, 0, 4, 4], [4, 0, 8, 4], [8, 0, 12, 4]])
LARGE = torch.tensor([[0.0, 0, 8, 8]])


def test_the_threshold_by_hand():
    # Box (0, 0, 6, 4), its centre at x = 3: the two nearest small anchors have IoU 16/24 and 8/32, the only large one
    # 24/64. Mean 31/72, deviation 0.2138 (of a sample): only what is above 0.6444 is positive.
    every = torch.ones(1, 1, dtype=torch.bool)
    box = torch.tensor([[[0.0, 0, 6, 4]]])
    assert assign(box, every, [SMALL, LARGE], 2).tolist() == [[0, -1, -1, -1]]
    # Moved right by 1.5, IoU 10/30, 14/26 ... the second would be alone; its centre x = 6 must also be inside.
    assert assign(box + torch.tensor([1.5, 0, 1.5, 0]), every, [SMALL, LARGE], 2)[0, 1] == 0
    assert assign(box, ~every, [SMALL, LARGE], 2).tolist() == [[-1] * 4]


def test_an_anchor_wanted_by_two_boxes_takes_the_one_it_overlaps_most():
    boxes = torch.tensor([[[0.0, 0, 4, 3], [0, 0, 4, 4], [0, 0, 4, 4]]])
    assert assign(boxes, torch.ones(1, 3, dtype=torch.bool), [SMALL], 3)[0, 0] == 1  # and of equals the first


def slow(truth: torch.Tensor, levels: list[torch.Tensor], nearest: int) -> list[int]:
    """Algorithm 1 of the paper, line by line."""
    anchors, owner = torch.cat(levels).tolist(), {}
    for g, (x1, y1, x2, y2) in enumerate(truth.tolist()):
        candidates, first = [], 0
        for level in levels:
            away = [
                (math.dist(((a + c) / 2, (b + d) / 2), ((x1 + x2) / 2, (y1 + y2) / 2)), first + i)
                for i, (a, b, c, d) in enumerate(level.tolist())
            ]
            candidates += [i for _, i in sorted(away)[:nearest]]
            first += len(level)
        ious = box_iou(truth[g : g + 1], torch.cat(levels)[candidates])[0].tolist()
        mean = sum(ious) / len(ious)
        threshold = mean + math.sqrt(sum((v - mean) ** 2 for v in ious) / (len(ious) - 1))
        for i, value in zip(candidates, ious, strict=True):
            a, b, c, d = anchors[i]
            inside = x1 < (a + c) / 2 < x2 and y1 < (b + d) / 2 < y2
            if value >= threshold and inside and value > owner.get(i, (0, 0))[0]:
                owner[i] = (value, g)
    return [owner[i][1] if i in owner else -1 for i in range(len(anchors))]


@pytest.fixture(scope="module")
def crowd() -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    torch.manual_seed(0)
    low = torch.rand(2, 25, 2) * 150
    truth = torch.cat([low, low + 4 + torch.rand(2, 25, 2) ** 2 * 120], dim=2)
    maps = {k: torch.zeros(1, 1, math.ceil(160 / 2**k), math.ceil(192 / 2**k)) for k in range(3, 8)}
    levels = Anchors({k: 8.0 * 2**k for k in maps}, (1.0,), offset=0.5)(maps, (160, 192))
    return truth, torch.rand(2, 25) < 0.9, list(levels.values())


def test_assignment_is_that_of_a_plain_loop(crowd):
    truth, valid, levels = crowd
    found = assign(truth, valid, levels, 9)
    for i in range(2):
        kept = valid[i].nonzero()[:, 0].tolist()
        wanted = [kept[g] if g >= 0 else -1 for g in slow(truth[i, valid[i]], levels, 9)]
        assert found[i].tolist() == wanted and len(set(wanted)) > 15


def test_chunks_of_boxes_make_no_difference(crowd, monkeypatch):
    truth, valid, levels = crowd
    whole = assign(truth, valid, levels, 9)
    monkeypatch.setattr("fpn.model.atss.CHUNK", 3000)
    assert torch.equal(assign(truth, valid, levels, 9), whole)


def test_losses_term_by_term():
    padded, images = (224, 320), 3
    maps = maps_of(padded, images)
    detector = detector_on(maps, "atss")
    torch.manual_seed(0)
    for layer in (detector.head.classes, detector.head.offsets, detector.head.centerness):
        torch.nn.init.normal_(layer.weight, std=0.05)
    mine = detector.losses(batch_of(padded, [padded] * images, images))

    levels = list(detector.cells(maps, padded).values())
    anchors, out = torch.cat(levels), detector.head(maps)
    sums, positives, weight = dict.fromkeys(mine, 0.0), 0, 0.0
    for i in range(images):
        found = torch.tensor(slow(TRUTH[i], levels, 9))
        logits, offsets, central = (torch.cat([part[k][i] for k in maps]) for part in vars(out).values())
        positive, wanted = found >= 0, torch.zeros_like(logits)
        truth = TRUTH[i][found[positive]]
        wanted[positive, LABELS[i][found[positive]]] = 1
        goal = centerness_of(anchors[positive], truth[None])[0]
        boxes = fpn.boxes.decode(offsets, anchors, (10, 10, 5, 5))[positive]
        sums["class"] += sigmoid_focal_loss(logits, wanted, reduction="sum")
        sums["box"] += (generalized_box_iou_loss(boxes, truth) * goal).sum()
        sums["centerness"] += torch.nn.functional.binary_cross_entropy_with_logits(
            central[positive], goal, reduction="sum"
        )
        positives, weight = positives + int(positive.sum()), weight + float(goal.sum())
    assert positives > 5
    for name, count in (("class", positives), ("box", weight), ("centerness", positives)):
        torch.testing.assert_close(mine[name], sums[name] / count, rtol=1e-5, atol=1e-6)
    assert detector.loss_weights == {"class": 1.0, "box": 2.0, "centerness": 1.0}


@pytest.mark.parametrize("geometric_mean, wanted", [(True, 0.5 * math.sqrt(0.5)), (False, 0.125)])
def test_scores_are_class_times_centerness(geometric_mean, wanted):
    maps = maps_of((64, 64), 1)
    detector = detector_on(maps, "atss", geometric_mean=geometric_mean, tower_norm="none", score=0.01)
    for layer, bias in ((detector.head.classes, -1e9), (detector.head.centerness, 0.0), (detector.head.offsets, 0.0)):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.constant_(layer.bias, bias)
    detector.head.classes.bias.data[1] = math.log(1 / 3)  # 0.25
    found = detector.detect(batch_of((64, 64), [(64, 64)]))[0]
    assert len(found) and (found.labels == 1).all()
    torch.testing.assert_close(found.scores, torch.full_like(found.scores, wanted))
