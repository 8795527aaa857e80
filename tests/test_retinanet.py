"""RetinaNet: its losses in numbers, and torchvision's results from torchvision's weights."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from one_stage import (
    CLASSES,
    LABELS,
    TRUTH,
    WIDTH,
    batch_of,
    copy_head,
    detector_on,
    liven,
    maps_of,
    same_detections,
    same_gradients,
)
from torch import nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import generalized_box_iou_loss, sigmoid_focal_loss

import fpn
from fpn.errors import OptionError
from fpn.model.losses import focal_loss, giou_loss
from fpn.model.matching import match
from fpn.structures import Batch, Targets

ONE = torch.tensor(1.0)
HABITS = {"whole_pixels": True, "floor_stride": True, "per_image": True}


def test_focal_loss_by_hand():
    # p = 0.9 for a class that is there: 0.25 * 0.1^2 * -log 0.9; for one that is not: 0.75 * 0.9^2 * -log 0.1.
    logit = torch.log(torch.tensor([[[9.0, 9.0]]]))
    valid = torch.ones(1, 1, dtype=torch.bool)
    there, not_there = 0.25 * 0.01 * 0.1053605, 0.75 * 0.81 * 2.3025851
    for label, wanted in ((0, there + not_there), (-1, 2 * not_there)):
        value = focal_loss(logit, torch.tensor([[label]]), valid, 0.25, 2.0, ONE)
        assert value.item() == pytest.approx(wanted, rel=1e-5)
    assert focal_loss(logit, torch.tensor([[0]]), ~valid, 0.25, 2.0, ONE) == 0


def test_focal_loss_and_its_gradient_are_torchvisions():
    torch.manual_seed(0)
    logits = (torch.randn(2, 50, 4) * 10).requires_grad_(True)
    labels, valid = torch.randint(-1, 4, (2, 50)), torch.rand(2, 50) < 0.8
    hot = nn.functional.one_hot(labels + 1, 5)[..., 1:].float()
    theirs = sigmoid_focal_loss(logits, hot, 0.3, 1.5, reduction="none")[valid].sum() / 7
    ours = focal_loss(logits, labels, valid, 0.3, 1.5, torch.tensor(7.0))
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (ours, theirs)))


def test_giou_loss_by_hand_and_as_torchvisions():
    # 2x2 boxes that share a quarter: IoU 1/7, hull 9 of which 2 are in neither. 1 - 1/7 + 2/9. And far apart: nearly 2.
    boxes = torch.tensor([[[0.0, 0, 2, 2], [0, 0, 1, 1], [5, 5, 5, 5], [0, 0, 1, 1]]], requires_grad=True)
    wanted = torch.tensor([[[1.0, 1, 3, 3], [99, 99, 100, 100], [0, 0, 0, 0], [0, 0, 1, 1]]])
    first = torch.tensor([[True, False, False, False]])
    assert giou_loss(boxes, wanted, first, ONE).item() == pytest.approx(1 - 1 / 7 + 2 / 9, rel=1e-5)
    weights = torch.tensor([[2.0, 1, 0, 0]])
    weighted = giou_loss(boxes, wanted, first, ONE, weights)
    assert weighted.item() == pytest.approx(2 * (1 - 1 / 7 + 2 / 9), rel=1e-5)
    every = torch.tensor([[True, True, False, True]])
    ours, theirs = giou_loss(boxes, wanted, every, ONE), generalized_box_iou_loss(boxes[every], wanted[every])
    torch.testing.assert_close(ours, theirs.sum())
    gradient = torch.autograd.grad(ours, boxes)[0]
    assert torch.isfinite(gradient).all() and (gradient[0, 2] == 0).all()


class Stub(nn.Module):
    out_channels = WIDTH


def peer_of(version: int) -> RetinaNet:
    norm = None if version == 1 else partial(nn.GroupNorm, 32)
    peer = RetinaNet(
        Stub(), CLASSES + 1, head=RetinaNetHead(WIDTH, 9, CLASSES + 1, norm_layer=norm), detections_per_img=5000
    )
    if version == 2:
        peer.head.regression_head._loss_type = "giou"
    liven(peer.head)
    return peer.eval()


OPTIONS = {1: {}, 2: {"tower_norm": "group", "box_loss": "giou"}}


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("padded, sizes", [((224, 320), [(224, 320), (200, 250)]), ((192, 256), [(180, 255)])])
def test_detections_are_torchvisions(version, padded, sizes):
    maps = maps_of(padded, len(sizes))
    peer, ours = peer_of(version), detector_on(maps, "retinanet", max_detections=5000, **HABITS, **OPTIONS[version])
    copy_head(ours.head, peer.head)
    features = list(maps.values())
    with torch.no_grad():
        out = peer.head(features)
        anchors = peer.anchor_generator(ImageList(torch.zeros(len(sizes), 3, *padded), sizes), features)
        counts = [maps[k].shape[2] * maps[k].shape[3] * 9 for k in maps]
        split = {name: list(value.split(counts, dim=1)) for name, value in out.items()}
        theirs = peer.postprocess_detections(split, [list(a.split(counts)) for a in anchors], sizes)
        same_detections(ours.detect(batch_of(padded, sizes)), theirs)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("images", [1, 3])
def test_losses_and_gradients_are_torchvisions(version, images):
    padded, sizes = (224, 320), [(224, 320)] * images
    maps = {k: p.requires_grad_(True) for k, p in maps_of(padded, images).items()}
    peer, ours = peer_of(version), detector_on(maps, "retinanet", **HABITS, **OPTIONS[version])
    copy_head(ours.head, peer.head)
    features = list(maps.values())
    targets = [{"boxes": b, "labels": k + 1} for b, k in zip(TRUTH[:images], LABELS, strict=False)]
    anchors = peer.anchor_generator(ImageList(torch.zeros(images, 3, *padded), sizes), features)
    theirs = peer.compute_loss(targets, peer.head(features), anchors)
    mine = ours.losses(batch_of(padded, sizes, images))
    for name, other in (("class", "classification"), ("box", "bbox_regression")):
        torch.testing.assert_close(mine[name], theirs[other], rtol=1e-5, atol=1e-6)
        same_gradients(mine[name], theirs[other], features)


def test_losses_are_divided_by_the_positives_of_the_batch_or_of_each_image():
    padded, sizes = (224, 320), [(224, 320)] * 2
    maps, batch = maps_of(padded, 2), batch_of(padded, sizes, 2)
    detector = detector_on(maps, "retinanet")
    nn.init.normal_(detector.head.classes.weight, std=0.1)
    anchors = torch.cat(list(detector.anchors(maps, padded).values()))[None]
    matched = match(batch.targets.boxes, batch.targets.valid, anchors, 0.5, 0.4, keep_best=True)
    counts = (matched >= 0).sum(1).tolist()
    assert 0 < counts[0] != counts[1] > 0
    each = []
    for i in range(2):
        detector.features = lambda batch, i=i: {k: p[i : i + 1] for k, p in maps.items()}
        each.append(detector.losses(image_of(batch, i))["class"].item())
    detector.features = lambda batch: maps
    of_batch = detector.losses(batch)["class"].item()
    detector.per_image = True
    assert detector.losses(batch)["class"].item() == pytest.approx(sum(each) / 2, rel=1e-5)
    assert of_batch == pytest.approx(sum(a * n for a, n in zip(each, counts, strict=True)) / sum(counts), rel=1e-5)


def image_of(batch: Batch, i: int) -> Batch:
    targets = Targets(*(part[i : i + 1] for part in (batch.targets.boxes, batch.targets.labels, batch.targets.valid)))
    return Batch(*(part[i : i + 1] for part in (batch.images, batch.sizes, batch.sizes, batch.indices)), targets)


def test_anchors_are_the_papers():
    detector = fpn.build("retinanet", backbone="tiny", weights="none", classes=("a",), width=WIDTH)
    anchors = detector.anchors.on(3, torch.zeros(1, WIDTH, 1, 1), (8, 8))
    sides = (anchors[:, 2:] - anchors[:, :2]).prod(1).sqrt()
    torch.testing.assert_close(sides, torch.tensor([32, 40.3175, 50.7968]).repeat(3), rtol=1e-4, atol=0)
    assert detector.anchors.sizes == {3: 32, 4: 64, 5: 128, 6: 256, 7: 512}


def test_a_new_head_gives_everything_the_prior():
    detector = fpn.build("retinanet", backbone="tiny", weights="none", classes=("a",), width=WIDTH)
    out = detector.head({3: torch.zeros(1, WIDTH, 4, 4)})
    torch.testing.assert_close(out.logits[3].sigmoid(), torch.full((1, 144, 1), 0.01))


def test_options_that_cannot_work_are_refused():
    for options, words in (
        ({"box_loss": "l3"}, "box loss 'l3'"),
        ({"tower_norm": "batch"}, "tower norm 'batch'"),
        ({"tower_norm": "group", "width": 24}, "multiples of 32, not 24"),
        ({"tower_convolutions": 0}, "tower_convolutions is 0"),
        ({"radius": 2.0}, "retinanet has no option radius"),
    ):
        with pytest.raises(OptionError, match=words):
            fpn.build("retinanet", backbone="tiny", weights="none", classes=("a",), **options)
