"""Backbones, pyramid, anchors, NMS, losses: shapes, worked numbers, oracles."""

import math

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

import fpn
from fpn.errors import CheckpointError, OptionError
from fpn.model.anchors import Anchors
from fpn.model.backbone import BACKBONES, build_backbone
from fpn.model.losses import box_loss, classification_loss, number_of, objectness_loss
from fpn.model.nms import nms
from fpn.model.pyramid import FPN, BatchNorm, convolution, every_second, upsample_to
from fpn.model.rpn import RpnOutput, propose
from fpn.structures import Batch

LIGHT = ["tiny", "resnet18", "resnet50", "resnext50_32x4d", "vgg11", "vgg16_bn", "mobilenet_v2", "mobilenet_v3_large"]


@pytest.mark.parametrize("name", LIGHT)
def test_levels_have_the_stride_of_their_number(name):
    backbone = build_backbone(name).eval()
    with torch.no_grad():
        levels = backbone(torch.zeros(1, 3, 128, 160))
    assert {k: tuple(c.shape[1:]) for k, c in levels.items()} == {
        k: (channels, 128 // 2**k, 160 // 2**k) for k, channels in backbone.channels.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in BACKBONES if name not in LIGHT])
def test_the_larger_backbones_too(name):
    test_levels_have_the_stride_of_their_number(name)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "vgg11"])
@pytest.mark.parametrize("size", [(1, 1), (65, 33), (97, 130)])
def test_any_size_goes_through_backbone_and_pyramid(name, size):
    backbone = build_backbone(name).eval()
    if name == "vgg11" and size == (1, 1):
        pytest.skip("VGG's pooling needs 32 pixels; batches are padded to that")
    with torch.no_grad():
        pyramid = FPN(backbone.channels, 16)(backbone(torch.zeros(2, 3, *size)))
    assert list(pyramid) == [2, 3, 4, 5, 6] and all(p.shape[1] == 16 for p in pyramid.values())


def test_weights_from_a_file_are_torchvisions(tmp_path):
    torch.manual_seed(0)
    model = torchvision.models.resnet18().eval()
    file = tmp_path / "resnet18.pth"
    torch.save(model.state_dict(), file)
    backbone = build_backbone("resnet18", file).eval()
    images = torch.randn(1, 3, 64, 64)
    wanted = create_feature_extractor(model, {"layer4": "x"})(images)["x"]
    torch.testing.assert_close(backbone(images)[5], wanted)
    learning = {name.split(".")[1] for name, p in backbone.named_parameters() if p.requires_grad}
    assert learning == {"3", "4", "5"}  # stages 1 and 2 are frozen where there are weights
    assert not any(isinstance(m, nn.BatchNorm2d) for m in backbone.modules())


def test_mobilenet_weights_at_hand(shared):
    backbone = build_backbone("mobilenet_v2", shared / "weights" / "mobilenet_v2-b0353104.pth")
    assert backbone.channels == {2: 24, 3: 32, 4: 96, 5: 320}


def test_weights_that_do_not_fit_say_so(tmp_path):
    file = tmp_path / "w.pth"
    torch.save(torchvision.models.resnet18().state_dict(), file)
    with pytest.raises(CheckpointError, match="does not fit this backbone"):
        build_backbone("resnet50", file)
    file.write_bytes(b"not weights")
    with pytest.raises(CheckpointError, match="not a readable weights file"):
        build_backbone("resnet18", file)
    with pytest.raises(CheckpointError, match="no such file"):
        build_backbone("resnet18", tmp_path / "missing.pth")
    with pytest.raises(OptionError, match="unknown backbone 'resnet51'"):
        build_backbone("resnet51")


def test_a_pickle_with_code_is_not_run(tmp_path):
    import pickle

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "touched"), "w"))

    file = tmp_path / "evil.pth"
    file.write_bytes(pickle.dumps({"a": Evil()}, protocol=2))
    with pytest.raises(CheckpointError):
        build_backbone("resnet18", file)
    assert not (tmp_path / "touched").exists()


def test_the_pyramid_is_the_papers_sum():
    """With laterals and outputs that copy, P3 is C3 plus C4 upsampled and so on."""
    pyramid = FPN({2: 1, 3: 1, 4: 1, 5: 1}, 1)
    for part in (pyramid.lateral, pyramid.output):
        for conv in part.values():
            nn.init.dirac_(conv.weight)
    sides = {2: 7, 3: 4, 4: 2, 5: 1}
    c = {k: torch.full((1, 1, n, n), 10.0**k) for k, n in sides.items()}
    p = pyramid(c)
    assert [p[k].unique().item() for k in (5, 4, 3, 2)] == [1e5, 1.1e5, 1.11e5, 1.111e5]
    assert p[6].shape[-2:] == (1, 1)
    averaged = FPN({2: 1, 3: 1, 4: 1, 5: 1}, 1, fuse="average")
    averaged.load_state_dict(pyramid.state_dict())
    assert averaged(c)[4].unique().item() == pytest.approx(0.55e5)


@pytest.mark.parametrize("norm, kind", [("batch", nn.BatchNorm2d), ("group", nn.GroupNorm)])
def test_norms_replace_biases(norm, kind):
    pyramid = FPN({2: 8, 3: 8, 4: 8, 5: 8}, 32, norm=norm)
    assert sum(isinstance(m, kind) for m in pyramid.modules()) == 8
    assert all(m.bias is None for m in pyramid.modules() if isinstance(m, nn.Conv2d))


def test_upsampling_repeats_neighbours():
    up = upsample_to(torch.tensor([[[[1.0, 2, 3]]]]), torch.zeros(1, 1, 1, 5))
    assert up[0, 0, 0].tolist() == [1, 1, 2, 2, 3]  # nearest, to the size given


@pytest.mark.parametrize("height, width", [(1, 1), (2, 5), (7, 4)])
def test_p6_is_p5_at_every_second_place(height, width):
    p5 = torch.randn(2, 3, height, width, requires_grad=True)
    p6 = every_second(p5)
    assert torch.equal(p6, p5[..., ::2, ::2])
    p6.sum().backward()
    assert torch.equal(p5.grad[..., ::2, ::2], torch.ones_like(p6)) and p5.grad.sum() == p6.numel()


def test_anchors_on_worked_numbers():
    anchors = Anchors({2: 32.0, 3: 64.0}, (0.5, 1.0, 2.0))
    found = anchors({2: torch.zeros(1, 1, 2, 3), 3: torch.zeros(1, 1, 1, 2)}, (8, 12))
    assert {k: len(a) for k, a in found.items()} == {2: 18, 3: 6}
    square = found[2].view(2, 3, 3, 4)[1, 2, 1]  # row 1, column 2, ratio 1: around (8, 4)
    assert square.tolist() == [8 - 16, 4 - 16, 8 + 16, 4 + 16]
    flat = found[3].view(1, 2, 3, 4)[0, 0, 0]
    assert flat[2].item() == pytest.approx(32 * math.sqrt(2)) and flat[3].item() == pytest.approx(32 / math.sqrt(2))


def test_nms_is_torchvisions_within_image_and_group():
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(2, 200, 4, generator=generator) * 60
    boxes = torch.cat([corner[..., :2], corner[..., :2] + corner[..., 2:] + 1], -1)
    scores, groups = torch.rand(2, 200, generator=generator), torch.randint(0, 3, (2, 200), generator=generator)
    valid = torch.rand(2, 200, generator=generator) < 0.7
    keep = nms(boxes, scores, groups, valid, 0.5)
    for i in range(2):
        wanted = torch.zeros(200, dtype=torch.bool)
        for group in range(3):
            rows = (valid[i] & (groups[i] == group)).nonzero()[:, 0]
            wanted[rows[torchvision.ops.nms(boxes[i, rows], scores[i, rows], 0.5)]] = True
        assert torch.equal(keep[i], wanted) and 0 < wanted.sum() < valid[i].sum()
    assert not nms(boxes, scores, groups, torch.zeros_like(valid), 0.5).any()


def test_proposals_have_one_shape_whatever_the_map():
    for count in (1, 3, 5000):
        anchors = {2: torch.tensor([0.0, 0, 8, 8]).repeat(count, 1) + torch.arange(count)[:, None] * 10.0}
        output = RpnOutput({2: torch.linspace(-1, 1, count)[None]}, {2: torch.zeros(1, count, 4)})
        found = propose(output, anchors, torch.tensor([[10**6, 10**6]]), per_level=100, total=50, iou=0.7)
        assert found.boxes.shape == (1, 50, 4) and found.valid.sum() == min(count, 50)
        best = anchors[2][-1]
        torch.testing.assert_close(found.boxes[0, 0], best)


def test_losses_on_worked_numbers():
    valid = torch.tensor([[True, True, True, False]])
    count = number_of(valid)
    positive = torch.tensor([[True, False, False, False]])
    zeros = torch.zeros(1, 4)
    assert objectness_loss(zeros, positive, valid, count).item() == pytest.approx(math.log(2))
    logits = torch.zeros(1, 4, 5)
    labels = torch.zeros(1, 4, dtype=torch.int64)
    assert classification_loss(logits, labels, valid, count).item() == pytest.approx(math.log(5))
    wanted = torch.zeros(1, 4, 4)
    wanted[0, 0] = torch.tensor([2.0, 0, 0, 0.1])
    wanted[0, 3] = torch.nan
    # |2| - 1/2 + 0.1^2 / 2, over three valid examples
    loss = box_loss(torch.zeros(1, 4, 4), wanted, positive, 1.0, count)
    assert loss.item() == pytest.approx((1.5 + 0.005) / 3)


def test_an_empty_selection_has_a_loss_of_zero_that_is_still_attached():
    offsets = torch.zeros(1, 2, 4, requires_grad=True)
    no = torch.zeros(1, 2, dtype=torch.bool)
    loss = box_loss(offsets, torch.full((1, 2, 4), torch.nan), no, 0.1, number_of(no))
    loss.backward()
    assert loss.item() == 0 and torch.equal(offsets.grad, torch.zeros(1, 2, 4))


@pytest.mark.parametrize(
    "option", [{"norm": "layer"}, {"fuse": "max"}, {"preset": "new"}, {"model": "yolo"}, {"scor": 1}]
)
def test_options_that_do_not_exist_are_refused_in_words(option):
    with pytest.raises(OptionError, match=next(iter(option.values())) if "scor" not in option else "scor"):
        fpn.build(backbone="tiny", classes=["a"], weights="none", **option)


@pytest.mark.parametrize("classes", [[], ["a", "a"]])
def test_classes_must_be_some_and_different(classes):
    with pytest.raises(OptionError, match="at least one name is needed, and none twice"):
        fpn.build(backbone="tiny", classes=classes, weights="none")


def test_the_paper_preset_pools_by_maximum():
    detector = fpn.build(backbone="tiny", classes=["a"], weights="none", preset="paper", width=16)
    assert detector.pooling == "pool" and detector.box_beta == 1.0


@pytest.mark.parametrize("norm", ["none", "batch", "group"])
def test_one_place_of_one_image_can_be_learnt_from(norm):
    layer = convolution(32, 32, 3, norm).train()
    out = layer(torch.randn(1, 32, 1, 1, requires_grad=True))
    out.sum().backward()
    assert out.isfinite().all() and all(p.grad is not None for p in layer.parameters())


def test_batch_norm_of_one_place_uses_its_running_statistics():
    norm, x = BatchNorm(4), torch.randn(1, 4, 1, 1)
    norm(torch.randn(2, 4, 3, 3))
    kept = norm.running_mean.clone()
    torch.testing.assert_close(norm(x), norm.eval()(x))
    assert torch.equal(norm.running_mean, kept)


def test_a_detector_runs_in_bfloat16():
    detector = fpn.build("mask_rcnn", backbone="tiny", classes=["a"], weights="none", width=32, hidden=32).eval()
    sizes = torch.tensor([[64, 96]])
    with torch.no_grad():
        found = detector.bfloat16().detect(
            Batch(torch.zeros(1, 3, 64, 96, dtype=torch.uint8), sizes, sizes, sizes[0, :1])
        )
    assert found.boxes.isfinite().all()
