"""Mask R-CNN: worked numbers, degenerate input, and torchvision's numbers from the same weights."""

import math
from functools import partial

import pytest
import torch
from fresh import run
from test_torchvision_parity import WIDE, pixels
from torch import nn
from torchvision.models.detection import maskrcnn_resnet50_fpn, maskrcnn_resnet50_fpn_v2
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import paste_masks_in_image, project_masks_on_boxes

import fpn
from fpn.errors import OptionError
from fpn.model import mask_head
from fpn.model.mask_head import MaskBranch, MaskHead, mask_loss, of_class, outlines_in
from fpn.model.masks import paste, window
from fpn.model.matching import BACKGROUND
from fpn.model.sampling import BOX_HEAD, Examples, Sampled, sample
from fpn.structures import Batch, Detections, Targets


def fill_head(head: MaskHead, towers: nn.Module, predictor: nn.Module) -> None:
    for conv, theirs in zip(head.convs, towers, strict=True):
        if isinstance(conv, nn.Conv2d):
            conv.load_state_dict(theirs[0].state_dict())
        else:
            conv[0].load_state_dict(theirs[0].state_dict())
            conv[1].load_state_dict(theirs[1].state_dict())
    head.up.load_state_dict(predictor.conv5_mask.state_dict())
    last = predictor.mask_fcn_logits.state_dict()
    head.logits.load_state_dict({name: value[1:] for name, value in last.items()})  # background has no mask


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_the_head_is_torchvisions(norm):
    torch.manual_seed(0)
    towers = MaskRCNNHeads(16, [24] * 4, 1, norm_layer=nn.BatchNorm2d if norm == "batch" else None)
    predictor = MaskRCNNPredictor(24, 24, 6)
    for module in towers.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            module.weight.data.uniform_(0.5, 1.5)
    ours = MaskHead(16, 5, 24, norm=norm)
    fill_head(ours, towers, predictor)
    regions = torch.randn(3, 16, 7, 7)
    with torch.no_grad():
        theirs = predictor.eval()(towers.eval()(regions))[:, 1:]
        mine = ours.eval()(regions)
    assert mine.shape == (3, 5, 14, 14)
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)


@pytest.fixture(scope="module", params=[maskrcnn_resnet50_fpn, maskrcnn_resnet50_fpn_v2])
def models(request):
    """torchvision's model with random weights and running statistics, lively enough to detect something, and ours."""
    torch.manual_seed(0)
    model = request.param(
        weights=None,
        weights_backbone=None,
        num_classes=5,
        rpn_batch_size_per_image=WIDE,
        box_batch_size_per_image=WIDE,
        rpn_post_nms_top_n_train=60,
        rpn_post_nms_top_n_test=60,
        box_positive_fraction=0.5,
    )
    for name, parameter in model.named_parameters():
        if "cls_" in name or "bbox_pred" in name or "mask_fcn_logits" in name:
            nn.init.normal_(parameter, std=0.05)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            module.weight.data.uniform_(0.5, 1.0)
    ours = fpn.weights.from_torchvision(model.eval())
    # The backbone is not what is compared; in torchvision's memory format sums are taken in the same order.
    for body in (ours.backbone, model.backbone.body):
        body.requires_grad_(False)
    ours.to(memory_format=torch.contiguous_format)
    ours.backbone.register_forward_pre_hook(lambda _, images: images[0].contiguous())
    return model, ours


def test_masks_of_detections_are_torchvisions(models):
    peer, ours = models
    padded, sizes = (96, 160), [(96, 160), (90, 150)]
    batch, normal = pixels(padded, sizes)
    with torch.no_grad():
        maps = peer.backbone(normal)
        proposals, _ = peer.rpn(ImageList(normal, sizes), maps)
        results, _ = peer.roi_heads(maps, proposals, sizes)
        detections = ours.detect(batch)
    assert detections.masks.shape[2:] == (28, 28)
    for i, (theirs, size) in enumerate(zip(results, sizes, strict=True)):
        mine = detections[i]
        assert len(mine) == len(theirs["boxes"]) > 10
        same = (mine.boxes - theirs["boxes"]).abs().amax(1) < 1e-3  # all but pairs of the same score in another order
        same &= mine.labels + 1 == theirs["labels"]
        assert same.float().mean() > 0.9
        assert theirs["masks"].std() > 0.01  # not all 0.5
        torch.testing.assert_close(mine.masks[same], theirs["masks"][same, 0], atol=1e-4, rtol=0)
        wanted = paste_masks_in_image(theirs["masks"], theirs["boxes"], size)[:, 0]
        pasted, clear = paste(mine.masks, mine.boxes, size), (wanted - 0.5).abs() > 1e-4
        assert torch.equal((pasted & clear)[same], ((wanted >= 0.5) & clear)[same])


def test_the_mask_loss_and_its_gradients_are_torchvisions(models):
    peer, ours = models
    ours.rpn_examples = ours.box_examples = WIDE
    ours.box_positive_fraction, ours.proposals = 0.5, (60, 60)
    padded, sizes = (96, 128), [(96, 128), (90, 100), (96, 110)]
    batch, normal = pixels(padded, sizes, seed=1)
    boxes = [torch.tensor([[10.0, 12, 80, 90], [60, 30, 75, 52]]), torch.zeros(0, 4), torch.tensor([[5.0, 5, 99, 70]])]
    labels = [torch.tensor([1, 4]), torch.zeros(0, dtype=torch.int64), torch.tensor([2])]
    masks = [discs(b, padded) for b in boxes]

    peer.train()
    for module in peer.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    targets = [{"boxes": b, "labels": k, "masks": m} for b, k, m in zip(boxes, labels, masks, strict=True)]
    maps = peer.backbone(normal)
    proposals, _ = peer.rpn(ImageList(normal, sizes), maps, targets)
    _, theirs = peer.roi_heads(maps, proposals, sizes, targets)
    peer.zero_grad()
    theirs["loss_mask"].backward()
    peer.eval()

    padded_targets = Targets(
        torch.stack([nn.functional.pad(b, (0, 0, 0, 2 - len(b))) for b in boxes]),
        torch.stack([nn.functional.pad(k - 1, (0, 2 - len(k))) for k in labels]),
        torch.stack([torch.arange(2) < len(b) for b in boxes]),
        torch.stack([nn.functional.pad(m, (0, 0, 0, 0, 0, 2 - len(m))) for m in masks]),
    )
    mine = ours.losses(Batch(batch.images, batch.sizes, batch.original_sizes, batch.indices, padded_targets))
    mine["mask"].backward()
    assert set(mine) == set(ours.loss_weights) == {"rpn_class", "rpn_box", "class", "box", "mask"}
    assert abs(mine["mask"].item() - theirs["loss_mask"].item()) < 1e-5
    for parameter, other in (
        (ours.masks.head.logits.weight, peer.roi_heads.mask_predictor.mask_fcn_logits.weight),
        (ours.masks.head.up.weight, peer.roi_heads.mask_predictor.conv5_mask.weight),
        (next(ours.masks.head.convs[0].parameters()), peer.roi_heads.mask_head[0][0].weight),
        (next(ours.pyramid.lateral["4"].parameters()), peer.backbone.fpn.inner_blocks[2][0].weight),
    ):
        wanted = other.grad[1:] if parameter is ours.masks.head.logits.weight else other.grad
        assert wanted.norm() > 0 and (parameter.grad - wanted).norm() < 5e-4 * wanted.norm()


def discs(boxes: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Ellipses that fill their boxes."""
    y, x = torch.meshgrid(torch.arange(size[0]) + 0.5, torch.arange(size[1]) + 0.5, indexing="ij")
    x1, y1, x2, y2 = boxes[:, :, None, None].unbind(1)
    return ((((2 * x - x1 - x2) / (x2 - x1)) ** 2 + ((2 * y - y1 - y2) / (y2 - y1)) ** 2) <= 1).to(torch.uint8)


# What is learnt from: the truth on the grid of a region.


def test_the_grid_over_a_box_in_numbers():
    masks = torch.zeros(1, 2, 16, 16, dtype=torch.uint8)
    masks[0, 1, 4:12, 4:9] = 1  # of the second object: columns 4 to 8
    boxes = torch.tensor([[[4.0, 4, 12, 12], [0, 0, 16, 16], [4, 4, 12, 12]]])
    found = outlines_in(masks, boxes, torch.tensor([[1, 1, 0]]), torch.tensor([[True, True, False]]), 4, True)
    # Cells of 2 x 2 pixels: points at 5.5 and 6.5, that is between the centres of two pixels in one of which it ends.
    torch.testing.assert_close(found[0, 0], torch.tensor([1.0, 1, 0.5, 0]).expand(4, 4))
    # Cells of 4 x 4 pixels: of columns 8 to 11 the first is covered.
    rows = torch.tensor([0.0, 1, 1, 0])[:, None]
    torch.testing.assert_close(found[0, 1], rows * torch.tensor([0.0, 1, 0.25, 0]))
    assert not found[0, 2].any()


@pytest.mark.parametrize("pixels_at_once", [1, 5 * 40 * 60, 2**25])
def test_the_grid_is_torchvisions_however_few_masks_are_held_at_once(monkeypatch, pixels_at_once):
    monkeypatch.setattr(mask_head, "PIXELS", pixels_at_once)
    generator = torch.Generator().manual_seed(0)
    masks = torch.randint(0, 2, (3, 4, 40, 60), generator=generator, dtype=torch.uint8)
    corner = torch.rand((3, 9, 2), generator=generator) * 60 - 10
    boxes = torch.cat([corner, corner + torch.rand((3, 9, 2), generator=generator) * 40], dim=2)
    boxes[0, 0], boxes[1, 1] = torch.tensor([5.0, 5, 5, 5]), torch.tensor([100.0, 100, 120, 130])
    index = torch.randint(-2, 4, (3, 9), generator=generator)
    found = outlines_in(masks, boxes, index, index >= 0, 28, half_pixel=False)
    for i in range(3):
        real = index[i] >= 0
        wanted = project_masks_on_boxes(masks[i], boxes[i][real], index[i][real], 28)
        torch.testing.assert_close(found[i][real], wanted)
        assert not found[i][~real].any()
    assert 0 < found.max() <= 1 + 1e-6


def test_a_box_outside_and_an_empty_box_have_no_mask():
    masks = torch.ones(1, 1, 8, 8, dtype=torch.uint8)
    boxes = torch.tensor([[[20.0, 20, 30, 30], [3, 3, 3, 3]]])
    index = torch.zeros((1, 2), dtype=torch.int64)
    found = outlines_in(masks, boxes, index, torch.ones((1, 2), dtype=torch.bool), 4, True)
    assert found.isfinite().all() and not found.any()


def test_the_loss_in_numbers():
    logits = torch.tensor([0.0, 100.0, -100.0]).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    wanted = torch.ones(1, 3, 2, 2)
    of = partial(mask_loss, logits, wanted)
    torch.testing.assert_close(of(torch.tensor([[True, False, False]]), torch.tensor(1.0)), torch.tensor(math.log(2)))
    torch.testing.assert_close(of(torch.tensor([[False, True, True]]), torch.tensor(2.0)), torch.tensor(50.0))
    assert of(torch.tensor([[False, False, False]]), torch.tensor(1.0)) == 0


def test_each_region_gets_the_map_of_its_class():
    maps = torch.arange(4 * 3.0).view(4, 3, 1, 1)
    found = of_class(maps, torch.tensor([[0, 2], [-1, 3]]))[..., 0, 0]
    assert found[0].tolist() == [0, 5] and found.shape == (2, 2)


# The branch.


def examples(positive: list[bool]) -> Examples:
    """One image with as many regions, all of the same object; positives first."""
    count = len(positive)
    here = torch.tensor([positive])
    boxes = torch.tensor([[8.0, 8, 40, 40]]).repeat(count, 1) + torch.arange(count)[:, None]
    index = torch.where(here, 0, BACKGROUND)
    chosen = Sampled(torch.arange(count)[None], torch.ones_like(here), here)
    return Examples(boxes[None], torch.where(here, 1, 3), boxes[None], index, chosen)


def branch(norm: str = "none", **options) -> MaskBranch:
    torch.manual_seed(0)
    return MaskBranch(MaskHead(8, 3, 32, convolutions=1, norm=norm), pooled_size=4, **options).train()


def pool(boxes, valid, size):
    """Features that tell the boxes apart."""
    value = boxes.sum(-1).flatten()[:, None, None, None] * torch.linspace(0.1, 1, 8)[:, None, None]
    return valid, (value / 100 * valid.flatten()[:, None, None, None]).expand(-1, 8, size, size)


def targets(masks: bool = True) -> Targets:
    boxes = torch.tensor([[[8.0, 8, 40, 40]]])
    return Targets(
        boxes,
        torch.ones((1, 1), dtype=torch.int64),
        torch.tensor([[True]]),
        discs(boxes[0], (48, 48))[None] if masks else None,
    )


@pytest.mark.parametrize("norm", ["none", "batch", "group"])
def test_only_positives_count_also_in_batch_norm(norm):
    alone = branch(norm).loss(pool, examples([True, True]), targets())
    among = branch(norm).loss(pool, examples([True, True, False, False, False, False]), targets())
    torch.testing.assert_close(alone, among)


def test_binary_truth_is_cut_at_a_half():
    soft, hard = (branch(binary=b).loss(pool, examples([True]), targets()) for b in (False, True))
    assert soft != hard
    one = examples([True])
    grid = outlines_in(targets().masks, one.boxes, one.index, one.chosen.positive, 8, True)
    assert ((grid > 0.1) & (grid < 0.9)).any()  # there is something to cut


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_without_positives_the_loss_is_0_and_every_weight_has_a_gradient(norm):
    some = branch(norm)
    loss = some.loss(pool, examples([False, False]), targets())
    loss.backward()
    assert loss == 0 and all(p.grad is not None and not p.grad.any() for p in some.parameters())


def test_data_without_outlines_is_refused():
    with pytest.raises(OptionError, match="the data has no outlines"):
        branch().loss(pool, examples([True]), targets(masks=False))


def test_positives_come_first_in_a_sample():
    matched = torch.tensor([[BACKGROUND, 3, BACKGROUND, 0, 1, BACKGROUND], [BACKGROUND] * 6])
    chosen = sample(matched, 6, 0.5, torch.tensor([7, 8]), BOX_HEAD)
    assert chosen.positive.tolist() == [[True] * 3 + [False] * 3, [False] * 6]


# The whole detector, small.


def small(model: str = "mask_rcnn", **options) -> nn.Module:
    torch.manual_seed(0)
    options = {"width": 32, "hidden": 32, "proposals_per_level": (50, 50), "proposals": (60, 60)} | options
    return fpn.build(model, backbone="tiny", classes=["a", "b", "c"], weights="none", **options).eval()


def some_batch(size: tuple[int, int] = (64, 96), with_targets: bool = False) -> Batch:
    images = torch.randint(0, 256, (2, 3, *size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    sizes = torch.tensor([size, (size[0] - 8, size[1] - 16)])
    found = None
    if with_targets:
        boxes = torch.tensor([[[4.0, 4, 40, 44], [50, 10, 90, 40]], [[0, 0, 0, 0], [0, 0, 0, 0]]])
        valid = torch.tensor([[True, True], [False, False]])
        masks = torch.stack([discs(boxes[0], size), torch.zeros((2, *size), dtype=torch.uint8)])
        found = Targets(boxes, torch.tensor([[0, 2], [0, 0]]), valid, masks)
    return Batch(images, sizes, sizes, torch.arange(2), found, torch.tensor([1, 2]))


def test_masks_of_the_padding_are_0():
    detector = small(score=0.05, max_detections=180)
    with torch.no_grad():
        detections, none = detector.detect(some_batch()), small(score=0.9).detect(some_batch())
    assert detections.masks.shape == (2, 180, 28, 28) and 0 < detections.count.sum() < 360
    real = detections.labels >= 0
    assert not detections.masks[~real].any() and (detections.masks[real] > 0).all()
    assert none.count.sum() == 0 and not none.masks.any()
    assert paste(none[0].masks, none[0].boxes, (64, 96)).shape == (0, 64, 96)


def test_weights_that_went_nan_give_no_masks_but_no_crash_either():
    detector = small(score=0.05)
    detector.box_head.offsets.weight.data.fill_(torch.nan)
    with torch.no_grad():
        detections = detector.detect(some_batch())
    assert detections.count.sum() == 0 and not detections.masks.any()


def test_only_detectors_with_masks_say_so():
    assert small().has_masks and small().masks is not None
    plain = fpn.build("faster_rcnn", backbone="tiny", classes=["a"], weights="none", width=32, hidden=32)
    assert not plain.has_masks and "mask" not in plain.loss_weights


def test_a_cascade_with_masks():
    cascade = small(model="cascade_mask_rcnn")
    assert cascade.has_masks and "mask" in cascade.loss_weights
    with torch.no_grad():
        losses = cascade.losses(some_batch(with_targets=True))
        assert cascade.detect(some_batch()).masks.shape[2:] == (28, 28)
    assert losses["mask"] > 0 and set(losses) == set(cascade.loss_weights)


def test_it_learns_an_outline():
    detector = small(mask_norm="group").train()
    batch = some_batch(with_targets=True)
    optimizer = torch.optim.Adam(detector.masks.parameters(), 1e-2)
    losses = []
    for _ in range(15):
        loss = detector.losses(batch)["mask"]
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # From a half everywhere; the share of an ellipse in its box, pi / 4, everywhere would come to 0.52.
    assert abs(losses[0] - math.log(2)) < 0.01 and losses[-1] < 0.4


def test_a_finer_grid():
    with torch.no_grad():
        assert small(mask_pooled_size=7).detect(some_batch()).masks.shape[-2:] == (14, 14)
    with pytest.raises(OptionError, match="mask_pooled_size is 0"):
        small(mask_pooled_size=0)


def test_a_checkpoint_keeps_the_masks(tmp_path):
    detector = small(score=0.2, mask_norm="batch", mask_binary=False)
    fpn.weights.save(detector, tmp_path / "a.safetensors")
    again = fpn.load(tmp_path / "a.safetensors")
    assert again.spec == detector.spec and not again.masks.binary
    with torch.no_grad():
        one, other = detector.detect(some_batch()), again.eval().detect(some_batch())
    assert one.count.sum() > 0 and torch.equal(one.masks, other.masks)


@pytest.mark.slow
def test_detect_compiles_and_exports_whole():
    run("""
        import torch, fpn
        from torch.export import Dim
        from fpn.structures import Batch

        torch.manual_seed(0)
        detector = fpn.build("mask_rcnn", backbone="tiny", classes=["a", "b", "c"], weights="none", width=32, hidden=32,
                             score=0.2, proposals_per_level=(50, 50), proposals=(60, 60), max_detections=20).eval()
        for layer in (detector.box_head.classes, detector.box_head.offsets, detector.rpn.objectness):
            torch.nn.init.normal_(layer.weight, std=0.2)

        def batch(height, width):
            images = torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8)
            sizes = torch.tensor([[height, width]] * 2)
            return Batch(images, sizes, sizes, torch.arange(2))

        def same(a, b):
            assert a.count.sum() > 0 and torch.equal(a.labels, b.labels) and a.masks.std() > 0
            torch.testing.assert_close(a.masks, b.masks, atol=1e-4, rtol=0)

        sides = {2: 32 * Dim("h", min=3, max=40), 3: 32 * Dim("w", min=3, max=40)}
        with torch.no_grad():
            shapes = {"batch": [sides, {}, {}, {}]}
            exported = torch.export.export(detector, (batch(128, 160),), dynamic_shapes=shapes).module()
            for shape in ((128, 160), (96, 224)):
                some = batch(*shape)
                same(detector.detect(some), exported(some))
            compiled = torch.compile(detector.detect, fullgraph=True, backend="aot_eager")
            some = batch(128, 160)
            same(detector.detect(some), compiled(some))
    """)


# Pasting.


def test_pasting_in_numbers():
    # Two cells over a box of 4 pixels: with the border four cells on the pixels from -2 to 6, the last included.
    part, top, left = window(torch.ones(2, 2), torch.tensor([4.0, 4, 8, 8]), (20, 20))
    assert (top, left) == (2, 2) and part.shape == (9, 9)
    places = (torch.arange(9) + 0.5) * 4 / 9 - 0.5  # of the pixels, in cells
    torch.testing.assert_close(part[4], (1.5 - (places - 1.5).abs()).clamp(0, 1), atol=1e-6, rtol=0)
    covered = paste(torch.ones(1, 2, 2), torch.tensor([[4.0, 4, 8, 8]]), (20, 20))
    assert covered[0, 6].nonzero()[:, 0].tolist() == [4, 5, 6, 7, 8]


def random_boxes(count: int, height: int, width: int, seed: int) -> torch.Tensor:
    """Most inside; some cross the border, some are empty, one is the image."""
    generator = torch.Generator().manual_seed(seed)
    a = (torch.rand(count, 2, generator=generator) * 1.2 - 0.1) * torch.tensor([width, height])
    b = a + torch.rand(count, 2, generator=generator) ** 2 * torch.tensor([width, height])
    boxes = torch.cat([a.clamp(min=-5), b], dim=1)
    boxes = boxes[((boxes[:, :2] < torch.tensor([width - 1, height - 1])) & (boxes[:, 2:] > 0)).all(1)]
    boxes[0] = torch.tensor([0.0, 0, width, height])
    boxes[1] = torch.tensor([3.0, 4, 3, 4])
    boxes[2] = boxes[2].round()
    return boxes


@pytest.mark.parametrize("height, width, cells", [(60, 90, 28), (201, 33, 14), (3, 400, 5), (1, 1, 28)])
def test_pasted_masks_are_torchvisions(height, width, cells):
    boxes = random_boxes(40, height, width, cells) if height > 1 else torch.tensor([[0.0, 0, 1, 1], [0.2, 0.3, 0.4, 1]])
    masks = torch.rand((len(boxes), cells, cells), generator=torch.Generator().manual_seed(1))
    wanted = paste_masks_in_image(masks[:, None], boxes, (height, width))[:, 0]
    found = torch.zeros_like(wanted)
    for i in range(len(boxes)):
        part, top, left = window(masks[i], boxes[i], (height, width))
        found[i, top : top + part.shape[0], left : left + part.shape[1]] = part
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    for threshold in (0.3, 0.5):
        clear = (wanted - threshold).abs() > 1e-4
        assert torch.equal(paste(masks, boxes, (height, width), threshold) & clear, (wanted >= threshold) & clear)


def test_pasting_outside_the_image_leaves_it_empty():
    boxes = torch.tensor([[50.0, 50, 60, 60], [-40, -40, -20, -20], [-40, 5, -30, 8], [-1e6, -1e6, 1e6, 1e6]])
    covered = paste(torch.ones(4, 28, 28), boxes, (20, 30))
    assert not covered[:3].any() and covered[3].all()
    assert paste(torch.zeros(0, 28, 28), torch.zeros(0, 4), (20, 30)).shape == (0, 20, 30)


@pytest.mark.parametrize("rows", [1, 7, 100])
def test_masks_are_the_same_however_many_are_made_at_once(monkeypatch, rows):
    detector, seen = small(score=0.05, max_detections=40), []
    with torch.no_grad():
        whole = detector.detect(some_batch())
        monkeypatch.setattr(mask_head, "ROWS", rows)
        detector.masks.head.register_forward_hook(lambda _, regions, __: seen.append(len(regions[0]) // 2))
        parts = detector.detect(some_batch())
    torch.testing.assert_close(parts.masks, whole.masks)
    assert max(seen) <= rows and sum(seen) < int(whole.count.max()) + rows


def test_padding_is_not_outlined():
    calls = []
    some = branch()
    some.head.register_forward_hook(lambda _, regions, __: calls.append(len(regions[0])))
    zeros = torch.zeros(1, 250)
    labels = torch.full((1, 250), -1)
    labels[:, :3] = 1
    found = Detections(torch.zeros(1, 250, 4), zeros, labels, labels, torch.tensor([3]))
    masks = some.outline(pool, found).masks
    assert calls == [100] and masks.shape[:2] == (1, 250) and masks[:, :3].any() and not masks[:, 3:].any()


def test_supervision_gets_whole_masks():
    sv = pytest.importorskip("supervision")
    box = torch.tensor([[8.0, 4, 24, 20]])
    found = Detections(
        box, torch.ones(1), torch.tensor([0]), torch.tensor([2]), torch.tensor(1), ("a",), torch.ones(1, 8, 8)
    )
    assert found.to_supervision().mask is None
    given = found.to_supervision((32, 48))
    assert isinstance(given, sv.Detections) and given.mask.shape == (1, 32, 48)
    assert given.mask[0, 6:18, 10:22].all() and not given.mask[0, 24:].any()
