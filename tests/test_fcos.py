"""FCOS: which places learn which box, worked by hand, and torchvision's results from torchvision's weights."""

from __future__ import annotations

import math

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
from torchvision.models.detection import FCOS
from torchvision.models.detection.image_list import ImageList

import fpn
from fpn.errors import OptionError
from fpn.model.anchors import Anchors
from fpn.model.fcos import assign, centerness_of
from fpn.model.losses import centerness_loss

HABITS = {"distances": "relu", "anchor_offset": 0.0, "floor_stride": True}


def cells_of(padded: tuple[int, int], levels: range = range(3, 8), offset: float = 0.5) -> list[torch.Tensor]:
    maps = {k: torch.zeros(1, 1, math.ceil(padded[0] / 2**k), math.ceil(padded[1] / 2**k)) for k in levels}
    return list(Anchors({k: 2.0**k for k in levels}, (1.0,), offset=offset)(maps, padded).values())


def test_a_box_is_learnt_near_its_centre_on_the_level_of_its_size():
    # A box around (26, 26). Of the cell centres 4, 12, 20 ... of P3, 20, 28 and 36 are less than 1.5 * 8 away. No side
    # is farther than 64 from any of them: no other level learns it.
    truth = torch.tensor([[[4.0, 4, 48, 48]]])
    matched = assign(truth, torch.ones(1, 1, dtype=torch.bool), cells_of((64, 64)), 1.5, 8.0)[0]
    wanted = torch.full((8, 8), -1)
    wanted[2:5, 2:5] = 0
    assert torch.equal(matched[:64].view(8, 8), wanted) and (matched[64:] == -1).all()


def test_a_long_box_is_learnt_by_the_level_that_reaches_its_far_side():
    # 200 wide around (110, 60): cells near its centre are some 100 from its far side, which P4 learns. There the cell
    # centres 88, 104, 120 are less than 1.5 * 16 from 110, and only y = 56 lies inside 50 to 70.
    truth = torch.tensor([[[10.0, 50, 210, 70]]])
    cells = cells_of((128, 256))
    matched = assign(truth, torch.ones(1, 1, dtype=torch.bool), cells, 1.5, 8.0)[0]
    places = torch.cat(cells)[matched == 0]
    assert places.tolist() == [[x - 8.0, 48.0, x + 8.0, 64.0] for x in (88, 104, 120)]


def test_the_smallest_box_wins_and_padding_never():
    truth = torch.tensor([[[0.0, 0, 60, 60], [20, 20, 40, 40], [24, 24, 36, 36]]])
    cells = cells_of((64, 64))
    both = assign(truth, torch.tensor([[True, True, False]]), cells, 1.5, 8.0)[0][:64].view(8, 8)
    assert both[3, 3] == 1 and both[2, 2] == 0  # centres (28, 28), and (20, 20), which is on a side: not inside


def test_chunks_of_boxes_make_no_difference(monkeypatch):
    torch.manual_seed(0)
    low = torch.rand(2, 40, 2) * 200
    truth = torch.cat([low, low + 3 + torch.rand(2, 40, 2) ** 3 * 150], dim=2)
    valid, cells = torch.rand(2, 40) < 0.8, cells_of((256, 256))
    whole = assign(truth, valid, cells, 1.5, 8.0)
    monkeypatch.setattr("fpn.model.fcos.CHUNK", 7000)
    assert torch.equal(assign(truth, valid, cells, 1.5, 8.0), whole) and whole.unique().numel() > 30


def test_centerness_by_hand():
    # Centre (2, 4) of the cell, box (0, 0, 8, 8): left 2, right 6, top 4, bottom 4: sqrt(2 / 6 * 4 / 4).
    value = centerness_of(torch.tensor([[0.0, 2, 4, 6]]), torch.tensor([[[0.0, 0, 8, 8]]]))
    assert value.item() == pytest.approx(math.sqrt(1 / 3))
    loss = centerness_loss(
        torch.zeros(1, 2), torch.tensor([[0.3, torch.nan]]), torch.tensor([[True, False]]), value.sum()
    )
    assert loss.item() == pytest.approx(math.log(2) / math.sqrt(1 / 3))


def test_decoded_distances():
    detector = fpn.build("fcos", backbone="tiny", weights="none", classes=("a",), width=WIDTH)
    cell, output = torch.tensor([[8.0, 8, 16, 16]]), torch.tensor([[[0.0, math.log(2), -1e9, 1e9]]])
    limit = 12 + 8 * 62.5
    torch.testing.assert_close(detector.decode(output, cell), torch.tensor([[[4.0, -4, 12, limit]]]))
    detector.distances = "relu"
    torch.testing.assert_close(
        detector.decode(torch.tensor([[[1.0, 0.5, -3, 2]]]), cell), torch.tensor([[[4.0, 8, 12, 28]]])
    )


def test_each_level_scales_its_offsets():
    detector = fpn.build("fcos", backbone="tiny", weights="none", classes=("a",), width=WIDTH)
    maps = {3: torch.randn(1, WIDTH, 4, 4), 4: torch.randn(1, WIDTH, 2, 2)}
    before = detector.head(maps)
    detector.head.scales["4"].data.fill_(3.0)
    after = detector.head(maps)
    torch.testing.assert_close(after.offsets[4], before.offsets[4] * 3)
    assert torch.equal(after.offsets[3], before.offsets[3])


class Stub(nn.Module):
    out_channels = WIDTH


@pytest.fixture(scope="module")
def peer() -> FCOS:
    peer = FCOS(Stub(), CLASSES + 1, detections_per_img=5000)
    liven(peer.head)
    return peer.eval()


@pytest.mark.parametrize("padded, sizes", [((224, 320), [(224, 320), (200, 250)]), ((192, 256), [(180, 255)])])
def test_detections_are_torchvisions(peer, padded, sizes):
    maps = maps_of(padded, len(sizes))
    ours = detector_on(maps, "fcos", max_detections=5000, **HABITS)
    copy_head(ours.head, peer.head)
    features = list(maps.values())
    with torch.no_grad():
        anchors = peer.anchor_generator(ImageList(torch.zeros(len(sizes), 3, *padded), sizes), features)
        counts = [p.shape[2] * p.shape[3] for p in features]
        split = {name: list(value.split(counts, dim=1)) for name, value in peer.head(features).items()}
        theirs = peer.postprocess_detections(split, [list(a.split(counts)) for a in anchors], sizes)
        same_detections(ours.detect(batch_of(padded, sizes)), theirs)


@pytest.mark.parametrize("images", [1, 3])
def test_losses_and_gradients_are_torchvisions(peer, images):
    padded, sizes = (224, 320), [(224, 320)] * images
    maps = {k: p.requires_grad_(True) for k, p in maps_of(padded, images).items()}
    ours = detector_on(maps, "fcos", **HABITS)
    copy_head(ours.head, peer.head)
    features = list(maps.values())
    targets = [{"boxes": b, "labels": k + 1} for b, k in zip(TRUTH[:images], LABELS, strict=False)]
    anchors = peer.anchor_generator(ImageList(torch.zeros(images, 3, *padded), sizes), features)
    counts = [p.shape[2] * p.shape[3] for p in features]
    theirs = peer.compute_loss(targets, peer.head(features), anchors, counts)
    mine = ours.losses(batch_of(padded, sizes, images))
    for name, other in (("class", "classification"), ("box", "bbox_regression"), ("centerness", "bbox_ctrness")):
        torch.testing.assert_close(mine[name], theirs[other], rtol=1e-5, atol=1e-6)
        same_gradients(mine[name], theirs[other], features)


def test_options_that_cannot_work_are_refused():
    with pytest.raises(OptionError, match="distances 'log': it must be exp, relu"):
        fpn.build("fcos", backbone="tiny", weights="none", classes=("a",), distances="log")
