"""Any neck under any detector on any backbone, on images of odd sizes: learns, detects, and has the levels it says."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

import fpn
from fpn.model.detector import Detector
from fpn.spec import MODELS, NECKS, OPTIONS_OF, Spec, all_settings, class_of
from fpn.structures import Batch, Regions, Targets

SIZES = torch.tensor([[75, 49], [33, 95]])
SMALL = {
    "proposals_per_level": (40, 40),
    "proposals": (40, 40),
    "rpn_examples": 32,
    "box_examples": 16,
    "score": 0.0,
    "max_detections": 20,
}


def detector_of(model: str, neck: str, backbone: str | nn.Module = "tiny", **options) -> Detector:
    torch.manual_seed(0)
    classes = ("object",) if class_of(model).proposes else ("a", "b")
    known = all_settings(Spec(model, classes)).keys()
    settings = {name: value for name, value in SMALL.items() if name in known}
    few = {"repeats": 1, "tower_convolutions": 1, "hidden": 16}
    own = {name: value for name, value in few.items() if {model, neck} & {*OPTIONS_OF[name]}}
    return fpn.build(model, backbone=backbone, classes=classes, weights="none", neck=neck, width=32,
                     **own, **settings, **options)  # fmt: skip


def batch() -> Batch:
    """Two images of odd sizes, one with two objects, one with none, padded to 96x96."""
    images = torch.randint(0, 256, (2, 3, 96, 96), dtype=torch.uint8)
    boxes = torch.tensor([[[5.0, 7, 31, 40], [10, 3, 47, 74]], [[0, 0, 0, 0], [0, 0, 0, 0]]])
    valid = torch.tensor([[True, True], [False, False]])
    masks = torch.zeros(2, 2, 96, 96, dtype=torch.uint8)
    masks[0, 0, 7:40, 5:31] = masks[0, 1, 3:74, 10:47] = 1
    targets = Targets(boxes, torch.tensor([[0, 1], [0, 0]]), valid, masks)
    regions = Regions(torch.tensor([[[4.0, 8, 30, 44], [12, 0, 40, 70]]] * 2), torch.ones(2, 2, dtype=torch.bool))
    return Batch(images, SIZES, SIZES, torch.arange(2), targets, torch.tensor([3, 4]), regions)


def check(detector: Detector) -> None:
    some, levels = batch(), detector.spec.levels
    assert levels is not None and detector.levels == tuple(range(levels[0], levels[1] + 1))
    losses = detector.train().losses(some)
    assert losses.keys() == detector.loss_weights.keys() and all(loss.isfinite() for loss in losses.values())
    torch.stack(list(losses.values())).sum().backward()
    learning = {name: p.grad for name, p in detector.named_parameters() if p.requires_grad}
    # Weights without a gradient stop DistributedDataParallel.
    assert not [name for name, grad in learning.items() if grad is None]
    assert all(grad.isfinite().all() for grad in learning.values() if grad is not None)
    assert any(grad.any() for name, grad in learning.items() if name.startswith("backbone") and grad is not None)
    with torch.no_grad():
        found = detector.eval().detect(some)
    assert found.count.min() > 0 and found.boxes.isfinite().all()
    assert set(found.levels.unique().tolist()) <= {-1, *detector.levels}
    if detector.spec.model != "mask_proposals":  # whose windows reach beyond the image
        assert (found.boxes <= SIZES[:, None, [1, 0, 1, 0]]).all()


@pytest.mark.parametrize("model, neck", list(itertools.product(MODELS, NECKS)))
def test_every_neck_works_under_every_detector(model, neck):
    check(detector_of(model, neck))


@pytest.mark.parametrize(
    "backbone, neck, model",
    [
        ("resnet18", "bifpn", "fcos"),
        ("mobilenet_v2", "nas_fpn", "retinanet"),
        ("vgg11", "pafpn", "faster_rcnn"),
        ("mobilenet_v3_large", "fpn", "cascade_rcnn"),
    ],
)
def test_necks_take_any_backbone(backbone, neck, model):
    check(detector_of(model, neck, backbone, backbone_norm="frozen"))


class Strided(nn.Module):
    """A backbone with levels 3, 4 and 5 only, without a word about its channels."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 8, 8)
        self.down = nn.ModuleList([nn.Conv2d(6, 7, 3, 2, 1), nn.Conv2d(7, 9, 3, 2, 1)])

    def forward(self, images: Tensor) -> dict[int, Tensor]:
        levels = {3: self.stem(images).relu()}
        for level, conv in enumerate(self.down, 4):
            levels[level] = conv(levels[level - 1]).relu()
        return levels


@pytest.mark.parametrize("neck, model", [("bifpn", "faster_rcnn"), ("pafpn", "mask_rcnn"), ("nas_fpn", "atss")])
def test_levels_follow_from_the_backbone(neck, model):
    detector = detector_of(model, neck, Strided())
    assert detector.levels[0] == 3
    check(detector)


@pytest.mark.parametrize("neck", NECKS)
def test_levels_follow_from_what_is_asked_for(neck):
    detector = detector_of("retinanet", neck, levels=(4, 8), extra="p5")
    assert detector.anchors is not None and list(detector.anchors.sizes) == [4, 5, 6, 7, 8]
