"""Cascade R-CNN and the box heads: worked numbers, torchvision's head as the oracle, degenerate input, round trips."""

import math

import pytest
import torch
import torch.nn.functional as F
from fresh import run
from torch import nn
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.roi_heads import fastrcnn_loss
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import box_iou

import fpn
from fpn import boxes as box
from fpn.errors import OptionError
from fpn.model import cascade_rcnn
from fpn.model.box_head import ConvHead, TwoLayerHead
from fpn.model.cascade_rcnn import CascadeRCNN, refined, rematched, scaled_gradient
from fpn.model.fast_rcnn import examples_at, head_losses
from fpn.model.matching import BACKGROUND, IGNORED
from fpn.model.rpn import Proposals, RpnHead
from fpn.model.sampling import Sampled, filled
from fpn.structures import Batch, Targets

SIZE = torch.tensor([[256, 256]])
STAGES = ((10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0))


def cascade(model: str = "cascade_rcnn", classes: int = 2, **options) -> CascadeRCNN:
    torch.manual_seed(0)
    names = [f"class {k}" for k in range(classes)]
    small = {"backbone": "tiny", "width": 8, "hidden": 16, "short": 64, "weights": "none"}
    few = {"proposals_per_level": (50, 50), "proposals": (60, 60)}
    detector = fpn.build(model, classes=names, **{**small, **few, **options})
    assert isinstance(detector, CascadeRCNN)
    return detector


def set_by_hand(detector: CascadeRCNN, offsets: list[list[float]], chances: list[list[float]]) -> None:
    """Every stage says the same of every region."""
    for head, offset, chance in zip(detector.box_head, offsets, chances, strict=True):
        nn.init.zeros_(head.offsets.weight)
        nn.init.zeros_(head.classes.weight)
        head.offsets.bias.data = torch.tensor(offset)
        head.classes.bias.data = torch.tensor(chance).log()


def maps(detector: CascadeRCNN, images: int = 1, seed: int = 0) -> dict[int, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {k: torch.rand(images, 8, 256 >> k, 256 >> k, generator=generator) for k in detector.levels}


def proposals_at(*boxes: list[float], padding: int = 0) -> Proposals:
    found = torch.tensor([[*boxes, *[[0.0] * 4] * padding]], dtype=torch.float32)
    valid = torch.tensor([[True] * len(boxes) + [False] * padding])
    return Proposals(found, valid.float(), valid)


def objects(*boxes: list[float]) -> Targets:
    count = len(boxes)
    some = torch.tensor([boxes]) if boxes else torch.zeros(1, 0, 4)
    return Targets(some, torch.arange(count)[None] % 2, torch.ones(1, count, dtype=torch.bool))


def close(found, wanted, atol=1e-4):
    torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(wanted), atol=atol, rtol=0)


def regions_seen(detector: CascadeRCNN, monkeypatch) -> list[torch.Tensor]:
    """The list that the boxes of every call of `pool` will be added to."""
    seen, pool = [], detector.pool
    monkeypatch.setattr(
        detector, "pool", lambda pyramid, boxes, *rest: (seen.append(boxes), pool(pyramid, boxes, *rest))[1]
    )
    return seen


WIDER = 5 * math.log(1.2)  # with weight 5, width times 1.2
MOVES = [[1.0, -1.0, WIDER, 0.0], [2.0, 0.0, 0.0, 0.0], [-3.0, 0.0, 0.0, 0.0]]
CHANCES = [[0.6, 0.2, 0.2], [0.3, 0.3, 0.4], [0.3, 0.4, 0.3]]


def test_each_stage_refines_the_boxes_of_the_last(monkeypatch):
    detector = cascade(score=0.35).eval()
    set_by_hand(detector, MOVES, CHANCES)
    seen = regions_seen(detector, monkeypatch)
    with torch.no_grad():
        found = detector.detect_in(maps(detector), proposals_at([100, 100, 200, 200], [150, 0, 250, 100]), SIZE)
    # Centre (150, 150) moves by a tenth of the side, the width grows by a fifth; the second box is cut at the image.
    close(seen[0][0], [[100.0, 100, 200, 200], [150, 0, 250, 100]])
    close(seen[1][0], [[100.0, 90, 220, 190], [150, 0, 256, 90]])
    close(seen[2][0], [[112.0, 90, 232, 190], [160.6, 0, 256, 90]])
    assert len(seen) == 3
    # Stage 3 moves back by a tenth of the width: 12, and 9.54.
    assert found[0].labels.tolist() == [0, 0]
    close(found[0].scores, [0.4, 0.4])
    close(found[0].boxes, [[100.0, 90, 220, 190], [151.06, 0, 246.46, 90]])


@pytest.mark.parametrize(
    "average, wanted",
    [
        ("scores", [0.4, 0.3]),
        ("logits", [0.054 ** (1 / 3), 0.024 ** (1 / 3)]),  # geometric means, to be divided by their sum
    ],
)
def test_scores_are_averaged_over_the_stages(average, wanted):
    detector = cascade(average=average).eval()
    set_by_hand(detector, MOVES, CHANCES)
    with torch.no_grad():
        found = detector.detect_in(maps(detector), proposals_at([100, 100, 200, 200]), SIZE)[0]
    total = 1.0 if average == "scores" else 0.054 ** (1 / 3) + 2 * 0.024 ** (1 / 3)
    assert found.labels.tolist() == [0, 1]  # one box for both classes
    close(found.scores, [w / total for w in wanted])
    close(found.boxes, [[100.0, 90, 220, 190]] * 2)


TRUTH = [0.0, 0, 100, 100]
OVERLAPS = ([0.0, 0, 100, 45], [0.0, 0, 100, 55], [0.0, 0, 100, 65], [0.0, 0, 100, 75])  # IoU 0.45 .. 0.75


def examples_seen(detector: CascadeRCNN, monkeypatch, proposals: Proposals, targets: Targets):
    seen = []

    def spy(logits, offsets, examples, *rest):
        seen.append(examples)
        return head_losses(logits, offsets, examples, *rest)

    monkeypatch.setattr(cascade_rcnn, "head_losses", spy)
    losses = detector.region_losses(maps(detector), proposals, targets, SIZE, torch.zeros(1, dtype=torch.int64))
    return seen, losses


def test_each_stage_matches_all_regions_anew_with_its_own_iou(monkeypatch):
    detector = cascade(box_examples=8, box_positive_fraction=1.0)
    set_by_hand(detector, [[0.0] * 4] * 3, [[1.0] * 3] * 3)  # boxes stay where they are
    seen, losses = examples_seen(detector, monkeypatch, proposals_at(*OVERLAPS, padding=1), objects(TRUTH))
    overlap = [box_iou(e.boxes[0], torch.tensor([TRUTH]))[:, 0] for e in seen]
    for examples, found, iou in zip(seen, overlap, (0.5, 0.6, 0.7), strict=True):
        assert examples.chosen.valid.sum() == 5  # four proposals and the object itself
        assert torch.equal(examples.chosen.positive[0], found >= iou)
        assert torch.equal(examples.labels[0], torch.where(found >= iou, 0, 2))
    assert [int(e.chosen.positive.sum()) for e in seen] == [4, 3, 2]
    for n in (1, 2, 3):
        close(losses[f"class_{n}"], math.log(3))
    # Offsets of (0, 0, 0.55 .. 1) of the height: dy = (1 / h - 1) / 2, dh = -ln h, each with the stage's weights.
    heights = [[0.55, 0.65, 0.75], [0.65, 0.75], [0.75]]
    for n, (weights, some) in enumerate(zip(STAGES, heights, strict=True), 1):
        close(losses[f"box_{n}"], sum(weights[1] * (1 / h - 1) / 2 - weights[3] * math.log(h) for h in some) / 5)


def test_a_region_that_was_background_becomes_positive_where_it_is_moved(monkeypatch):
    detector = cascade(box_examples=8, box_positive_fraction=0.5)
    set_by_hand(detector, [[5.0, 0.0, 0.0, 0.0], [0.0] * 4, [0.0] * 4], [[1.0] * 3] * 3)
    proposals = proposals_at([60.0, 100, 160, 200], [10.0, 10, 30, 30])
    seen, _ = examples_seen(detector, monkeypatch, proposals, objects([110.0, 100, 210, 200]))
    at = (seen[0].boxes[0] == proposals.boxes[0, 0]).all(-1)
    assert [e.labels[0][at].item() for e in seen] == [2, 0, 0]  # moved by half a side onto the object
    close(seen[1].boxes[0][at], [[110.0, 100, 210, 200]])


def test_empty_and_padded_regions_are_no_examples():
    boxes = torch.tensor([[[0.0, 0, 100, 90], [0.0, 0, 0, 50], [5.0, 5, 9, 9], [0.0, 0, 100, 100]]])
    valid = torch.tensor([[True, True, True, False]])
    before = examples_at(
        boxes + 1, torch.full((1, 4), BACKGROUND), Sampled(torch.arange(4)[None], valid, ~valid), objects(TRUTH), 2
    )
    after = rematched(before, boxes, objects(TRUTH), 0.6, 2)
    assert after.index.tolist() == [[0, IGNORED, BACKGROUND, IGNORED]]
    assert after.chosen.valid.tolist() == [[True, False, True, False]]
    assert after.chosen.positive.tolist() == [[True, False, False, False]]
    assert after.labels.tolist() == [[0, 2, 2, 2]]


def test_images_without_objects_teach_the_classes_only():
    detector = cascade(box_examples=8)
    for targets in (
        objects(),
        Targets(torch.zeros(1, 2, 4), torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 2) > 0),
    ):
        losses = detector.region_losses(
            maps(detector), proposals_at(*OVERLAPS), targets, SIZE, torch.zeros(1, dtype=torch.int64)
        )
        for n in (1, 2, 3):
            assert losses[f"class_{n}"] > 0 and losses[f"box_{n}"] == 0


def test_weights_that_went_nan_detect_nothing():
    detector = cascade().eval()
    set_by_hand(detector, [[math.nan] * 4, [math.inf] * 4, [math.nan] * 4], [[math.nan] * 3] * 3)
    with torch.no_grad():
        found = detector.detect_in(maps(detector), proposals_at(*OVERLAPS), SIZE)
    assert found.count.tolist() == [0]
    close(refined(torch.full((1, 2, 1, 4), math.nan), torch.full((1, 2, 3), math.nan), SIZE), torch.zeros(1, 2, 4))


def test_where_each_class_has_its_box_the_likeliest_is_refined(monkeypatch):
    detector = cascade(class_agnostic=False).eval()
    still = [[0.0] * 8] * 2
    set_by_hand(detector, [[0.0] * 4 + [1.0, 0.0, 0.0, 0.0], *still], [[0.2, 0.3, 0.5]] * 3)
    seen = regions_seen(detector, monkeypatch)
    with torch.no_grad():
        detector.detect_in(maps(detector), proposals_at([100, 100, 200, 200]), SIZE)
    close(seen[1][0], [[110.0, 100, 210, 200]])


@pytest.mark.parametrize("scale", [1 / 3, 1.0])
def test_the_pyramids_gradient_is_scaled_the_heads_is_not(scale):
    x = torch.tensor([2.0, -3.0], requires_grad=True)
    y = scaled_gradient(x, scale)
    assert torch.equal(x, y)
    (y * y).sum().backward()
    close(x.grad, [4.0 * scale, -6.0 * scale])

    def gradients(gradient_scale):
        detector = cascade(box_examples=8, gradient_scale=gradient_scale)
        for head in detector.box_head:
            nn.init.normal_(head.offsets.weight, std=0.1)
        pyramid = {k: p.requires_grad_() for k, p in maps(detector).items()}
        losses = detector.region_losses(
            pyramid, proposals_at(*OVERLAPS), objects(TRUTH), SIZE, torch.zeros(1, dtype=torch.int64)
        )
        torch.stack([*losses.values()]).sum().backward()
        return pyramid[2].grad, detector.box_head[1].fc1.weight.grad

    (below, own), (whole, same) = gradients(scale), gradients(1.0)
    assert whole.abs().max() > 0
    torch.testing.assert_close(below, whole * scale)
    torch.testing.assert_close(own, same)


def test_every_term_has_its_weight():
    detector = cascade("cascade_mask_rcnn", stage_weights=(1.0, 0.5, 0.25))
    assert detector.loss_weights == {
        **{"rpn_class": 1.0, "rpn_box": 1.0, "mask": 1.0},
        **{"class_1": 1.0, "box_1": 1.0, "class_2": 0.5, "box_2": 0.5, "class_3": 0.25, "box_3": 0.25},
    }


def test_settings_that_cannot_work():
    with pytest.raises(OptionError, match="box_positive has 3, box_weights 3 and stage_weights 2"):
        cascade(stage_weights=(1.0, 1.0))
    with pytest.raises(OptionError, match="box_positive has 0"):
        cascade(box_positive=())
    with pytest.raises(OptionError, match="average 'votes': it must be scores, logits"):
        cascade(average="votes")
    with pytest.raises(OptionError, match="box_convolutions is -1"):
        cascade(box_convolutions=-1)
    two = cascade(box_positive=[0.5, 0.7], box_weights=[[1, 1, 1, 1], [2, 2, 2, 2]], stage_weights=[1, 1])
    assert len(two.box_head) == 2 and two.spec.settings["box_weights"] == ((1, 1, 1, 1), (2, 2, 2, 2))


def one_batch(seed: int = 0, masks: bool = False) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 80, (2, 3, 64, 96), dtype=torch.uint8, generator=generator)
    boxes = torch.tensor([[[8.0, 8, 40, 40], [50, 20, 90, 60]], [[20.0, 10, 60, 50], [0, 0, 0, 0]]])
    valid = torch.tensor([[True, True], [True, False]])
    outlines = torch.zeros(2, 2, 64, 96, dtype=torch.uint8)
    for image, n in ((0, 0), (0, 1), (1, 0)):
        x1, y1, x2, y2 = boxes[image, n].int().tolist()
        images[image, n, y1:y2, x1:x2] = 255
        outlines[image, n, y1:y2, x1:x2] = 1
    sizes = torch.tensor([[64, 96]] * 2)
    targets = Targets(boxes, torch.tensor([[0, 1], [0, 0]]), valid, outlines if masks else None)
    return Batch(images, sizes, sizes, torch.arange(2), targets, torch.tensor([3, 4]))


@pytest.mark.parametrize(
    "model, options",
    [
        ("cascade_rcnn", {"preset": "paper"}),
        ("cascade_rcnn", {"box_convolutions": 1, "box_norm": "batch"}),
        ("cascade_mask_rcnn", {}),
    ],
)
def test_a_few_steps_of_training_make_every_loss_fall(model, options):
    detector = cascade(model, box_examples=24, rpn_examples=64, **options).train()
    some = one_batch(masks=model == "cascade_mask_rcnn")
    optimizer = torch.optim.AdamW(detector.parameters(), lr=1e-2)
    history = []
    for _ in range(8):
        losses = detector.losses(some)
        assert losses.keys() == detector.loss_weights.keys()
        loss = torch.stack([detector.loss_weights[name] * value for name, value in losses.items()]).sum()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in detector.parameters() if p.requires_grad)
        optimizer.step()
        history.append({name: value.item() for name, value in losses.items()})
    first, last = history[0], history[-1]
    assert sum(last.values()) < 0.8 * sum(first.values())
    for n in (1, 2, 3):
        assert last[f"class_{n}"] < first[f"class_{n}"]


@pytest.mark.parametrize(
    "options", [{}, {"box_convolutions": 1, "box_norm": "batch", "average": "logits", "rpn_convolutions": 2}]
)
def test_a_loaded_cascade_is_the_saved_one(tmp_path, options):
    detector = cascade(score=0.01, **options).eval()
    again = fpn.load(fpn.weights.save(detector, tmp_path / "a.safetensors"))
    assert isinstance(again, CascadeRCNN) and again.spec == detector.spec
    assert again.spec.class_agnostic is True and again.spec.settings["box_weights"] == STAGES
    some = one_batch()
    with torch.no_grad():
        before, after = detector.detect(some), again.detect(some)
    assert before.count.min() > 0
    for name in ("boxes", "scores", "labels", "levels", "count"):
        assert torch.equal(getattr(before, name), getattr(after, name))


def v2_head(
    classes: int, width: int = 8, hidden: int = 16, dense: bool = False
) -> tuple[nn.Module, nn.Module, ConvHead]:
    """torchvision's head of Faster R-CNN v2 with random weights and statistics, and ours with the same."""
    tower = FastRCNNConvFCHead((width, 7, 7), [width] * 4, [hidden], norm_layer=nn.BatchNorm2d)
    predictor = FastRCNNPredictor(hidden, classes + 1)
    for module in tower.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.1)
    ours = ConvHead(width, 7, classes, hidden, 4, "batch")
    for n, conv in enumerate(ours.convs):
        conv[0].load_state_dict(tower[n][0].state_dict())
        conv[1].load_state_dict(tower[n][1].state_dict())
    ours.fc1.load_state_dict(tower[5].state_dict())
    order = [*range(1, classes + 1), 0]  # torchvision's background comes first
    for name in ("weight", "bias"):
        getattr(ours.classes, name).data = getattr(predictor.cls_score, name).data[order]
        getattr(ours.offsets, name).data = getattr(predictor.bbox_pred, name).data[4:]
    return tower, predictor, ours


@pytest.mark.parametrize("training", [False, True])
def test_the_head_of_faster_rcnn_v2_is_torchvisions(training):
    torch.manual_seed(0)
    classes, regions = 3, torch.rand(12, 8, 7, 7)
    tower, predictor, ours = (part.train(training) for part in v2_head(classes))
    logits, offsets = predictor(tower(regions))
    mine, places = ours(regions)
    close(mine, logits[:, [1, 2, 3, 0]], 1e-5)
    close(places, offsets.unflatten(1, (-1, 4))[:, 1:], 1e-5)
    assert torch.equal(ours.convs[0][1].running_var, tower[0][1].running_var)

    anchors = torch.tensor([[10.0, 10, 60, 60]]).expand(12, -1) + torch.arange(12)[:, None]
    truth = anchors + torch.tensor([1.0, -2, 3, 4])
    labels = torch.arange(12) % 4  # torchvision's: 0 is background
    wanted = box.encode(truth, anchors, STAGES[0])
    theirs = fastrcnn_loss(logits, offsets, [labels], [wanted])
    positive = labels[None] > 0
    valid = torch.ones_like(positive)
    index = torch.where(positive, torch.arange(12), BACKGROUND)
    chosen = Sampled(torch.arange(12)[None], valid, positive)
    targets = Targets(truth[None], (labels[None] - 1).clamp(min=0), valid)
    examples = examples_at(anchors[None], index, chosen, targets, classes)
    found = head_losses(mine[None], places[None], examples, STAGES[0], 1 / 9)
    for a, b in zip(found, theirs, strict=True):
        torch.testing.assert_close(a, b)
    sum(theirs).backward()
    sum(found).backward()
    for a, b in zip(ours.convs, tower, strict=False):
        torch.testing.assert_close(a[0].weight.grad, b[0].weight.grad, rtol=1e-4, atol=1e-6)


def test_the_head_with_group_norm_is_convolution_norm_relu_layer():
    torch.manual_seed(0)
    head, regions = ConvHead(32, 3, 5, 8, convolutions=2, norm="group", class_agnostic=True), torch.rand(4, 32, 3, 3)
    x = regions
    for conv, norm in head.convs:
        assert conv.bias is None and norm.num_groups == 32
        nn.init.normal_(norm.weight)
        x = F.relu(F.group_norm(F.conv2d(x, conv.weight, padding=1), 32, norm.weight, norm.bias))
    x = F.relu(x.flatten(1) @ head.fc1.weight.T + head.fc1.bias)
    logits, offsets = head(regions)
    close(logits, x @ head.classes.weight.T + head.classes.bias, 1e-5)
    assert logits.shape == (4, 6) and offsets.shape == (4, 1, 4)
    with pytest.raises(OptionError, match="group norm needs"):
        ConvHead(8, 7, 2, norm="group")


def test_one_box_for_all_classes_is_an_option_of_faster_rcnn_too():
    assert TwoLayerHead(8, 3, 4, class_agnostic=True)(torch.zeros(2, 8, 1, 1))[1].shape == (2, 1, 4)
    detector = fpn.build(backbone="tiny", classes=["a", "b"], weights="none", width=8, hidden=8, class_agnostic=True)
    nn.init.normal_(detector.box_head.offsets.weight)
    losses = detector.losses(one_batch())
    losses["box"].backward()
    assert losses["box"] > 0 and detector.box_head.offsets.weight.grad.abs().sum() > 0
    with torch.no_grad():
        found = detector.eval().detect(one_batch())[0]
    assert {*found.labels.tolist()} == {0, 1}
    assert (box_iou(found.boxes[found.labels == 0], found.boxes[found.labels == 1]).amax(1) > 0.999).any()


def test_the_rpn_of_faster_rcnn_v2_is_torchvisions():
    torch.manual_seed(0)
    theirs, ours = RPNHead(8, 3, conv_depth=2), RpnHead(8, 3, convolutions=2)
    for n, conv in enumerate(ours.shared):
        conv.load_state_dict(theirs.conv[n][0].state_dict())
    ours.objectness.load_state_dict(theirs.cls_logits.state_dict())
    ours.offsets.load_state_dict(theirs.bbox_pred.state_dict())
    x = torch.randn(2, 8, 5, 4)
    (logits,), (offsets,) = theirs([x])
    out = ours({3: x})
    torch.testing.assert_close(out.logits[3], logits.permute(0, 2, 3, 1).flatten(1))
    torch.testing.assert_close(out.offsets[3], offsets.unflatten(1, (3, 4)).permute(0, 3, 4, 1, 2).flatten(1, 3))


PRELUDE = """
    import torch, fpn
    from fpn.structures import Batch

    torch.manual_seed(0)
    detector = fpn.build("cascade_mask_rcnn", backbone="tiny", classes=["a", "b"], weights="none", width=8, hidden=16,
                         score=0.2, proposals_per_level=(50, 50), proposals=(100, 100), max_detections=20,
                         box_convolutions=1, box_norm="batch").eval()
    for head in detector.box_head:
        for layer in (head.classes, head.offsets):
            torch.nn.init.normal_(layer.weight, std=0.2)

    def batch(height, width):
        images = torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8)
        sizes = torch.tensor([[height, width]] * 2) - torch.arange(2)[:, None] * 8
        return Batch(images, sizes, sizes, torch.arange(2))

    def same(a, b):
        assert a.count.sum() > 0 and torch.equal(a.count, b.count) and torch.equal(a.labels, b.labels)
        torch.testing.assert_close(a.boxes, b.boxes, atol=1e-2, rtol=0)
        torch.testing.assert_close(a.scores, b.scores, atol=1e-4, rtol=0)
        torch.testing.assert_close(a.masks, b.masks, atol=1e-3, rtol=0)
"""


@pytest.mark.slow
def test_detect_compiles_without_a_graph_break():
    run(
        PRELUDE,
        """
        compiled = torch.compile(detector.detect, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            some = batch(128, 160)
            same(detector.detect(some), compiled(some))
    """,
    )


@pytest.mark.slow
def test_detect_exports_with_dynamic_height_and_width():
    run(
        PRELUDE,
        """
        from torch.export import Dim
        sides = {2: 32 * Dim("h", min=3, max=40), 3: 32 * Dim("w", min=3, max=40)}
        with torch.no_grad():
            shapes = {"batch": [sides, {}, {}, {}]}
            exported = torch.export.export(detector, (batch(128, 160),), dynamic_shapes=shapes).module()
            for shape in ((128, 160), (96, 320), (224, 128)):
                some = batch(*shape)
                same(detector.detect(some), exported(some))
    """,
    )


@pytest.mark.parametrize("model", ["faster_rcnn", "cascade_rcnn"])
def test_padding_does_not_reach_the_batch_norm_of_the_head(model, monkeypatch):
    """Twice as many places for examples as there are regions: the statistics are those of the regions alone."""
    means = []
    for count in (3, 6):
        torch.manual_seed(0)
        detector = fpn.build(model, backbone="tiny", classes=["a"], weights="none", width=32, hidden=16,
                             box_convolutions=1, box_norm="batch").train()  # fmt: skip
        boxes = torch.zeros(1, count, 4)
        boxes[0, :3] = torch.tensor([[8.0, 8, 72, 72], [100, 40, 180, 200], [16, 16, 80, 80]])
        valid = (torch.arange(count) < 3)[None]
        chosen = Sampled(torch.arange(count)[None], valid, valid)
        index = torch.where(valid, 0, IGNORED)
        one = objects([8.0, 8, 72, 72])
        examples = examples_at(boxes, index, chosen, one, 1)
        losses = detector.box_losses(maps_of_width(32), examples, one, SIZE)
        heads = detector.box_head if model == "cascade_rcnn" else [detector.box_head]
        means.append((heads[0].convs[0][1].running_mean, losses))
    torch.testing.assert_close(means[0], means[1])


def maps_of_width(width: int) -> dict[int, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {k: torch.randn(1, width, 256 // 2**k, 256 // 2**k, generator=generator) for k in range(2, 7)}


def test_rows_that_do_not_count_repeat_those_that_do():
    wanted = torch.tensor([[False, True, False, True, False], [False] * 5, [True] * 5])
    assert filled(wanted).tolist() == [[1, 1, 1, 3, 1], [0] * 5, [0, 1, 2, 3, 4]]
