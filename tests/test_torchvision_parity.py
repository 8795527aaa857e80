"""The same numbers as torchvision from the same weights: maps, proposals, detections, losses, gradients."""

import pytest
import torch
from torch import nn
from torchvision.models.detection import fasterrcnn_resnet50_fpn
from torchvision.models.detection.image_list import ImageList

import fpn
from fpn.errors import CheckpointError
from fpn.structures import Batch, Targets
from fpn.weights.torchvision import their_names
from fpn.weights.torchvision_names import without_background

WIDE = 2**30  # samplers that take every example, so that no luck is involved


@pytest.fixture(autouse=True)
def two_threads():
    """Random weights blow rounding up: sums in the order of one thread put conv1's gradient 0.3 % away from itself."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def peer_model(seed: int = 0, classes: int = 6) -> nn.Module:
    """torchvision's model with random weights and running statistics, lively enough to detect something."""
    torch.manual_seed(seed)
    model = fasterrcnn_resnet50_fpn(
        weights=None,
        weights_backbone=None,
        num_classes=classes + 1,
        box_score_thresh=0.05,
        rpn_batch_size_per_image=WIDE,
        box_batch_size_per_image=WIDE,
        rpn_post_nms_top_n_train=300,
        box_positive_fraction=0.5,
    )
    for name, parameter in model.named_parameters():
        if "cls_" in name or "bbox_pred" in name:
            nn.init.normal_(parameter, std=0.05)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            module.weight.data.uniform_(0.5, 1.0)
    return model.eval()


def pixels(padded: tuple[int, int], sizes: list[tuple[int, int]], seed: int = 0) -> tuple[Batch, torch.Tensor]:
    """A batch of ours and the same images normalised and padded as torchvision does it."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (len(sizes), 3, *padded), generator=generator, dtype=torch.uint8)
    normal = (images / 255 - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor(
        [0.229, 0.224, 0.225]
    ).view(3, 1, 1)
    for image, other, (h, w) in zip(images, normal, sizes, strict=True):
        for tensor in (image, other):
            tensor[:, h:] = 0
            tensor[:, :, w:] = 0
    shape = torch.tensor(sizes)
    return Batch(images, shape, shape, torch.arange(len(sizes))), normal


def agree_but_for_ties(boxes, scores, other_boxes, other_scores, box_tol=1e-2, score_tol=1e-4, tie=2e-6):
    """Same number, same scores in the same order, and each box found among those of (nearly) the same score."""
    assert len(boxes) == len(other_boxes)
    torch.testing.assert_close(scores, other_scores, atol=score_tol, rtol=0)
    apart = (boxes[:, None] - other_boxes[None]).abs().amax(-1)
    tied = (scores[:, None] - other_scores[None]).abs() < tie
    assert (torch.where(tied, apart, torch.inf).amin(1) < box_tol).all()


SHAPES = [
    ((224, 320), [(224, 320), (200, 250)]),  # mixed sizes, P6 stride 56 by torchvision's rounding
    ((201, 333), [(201, 333)]),  # odd, without any padding
    ((384, 256), [(370, 255)]),
]


@pytest.fixture(scope="module")
def models():
    peer = peer_model()
    return peer, fpn.weights.from_torchvision(peer)


@pytest.mark.parametrize("padded, sizes", SHAPES)
def test_maps_proposals_and_detections_are_torchvisions(models, padded, sizes):
    peer, ours = models
    batch, normal = pixels(padded, sizes)
    with torch.no_grad():
        maps = peer.backbone(normal)
        proposals, _ = peer.rpn(ImageList(normal, sizes), maps)
        results, _ = peer.roi_heads(maps, proposals, sizes)
        pyramid = ours.pyramid(ours.backbone(ours.normalise(batch.images, batch.sizes)))
        found = ours.propose(ours.rpn(pyramid), ours.anchors(pyramid, padded), batch.sizes, training=False)
        detections = ours.detect(batch)
    for theirs, mine in zip(maps.values(), pyramid.values(), strict=True):
        assert (theirs - mine).abs().max() < 1e-4 * theirs.abs().max()
    for i, result in enumerate(results):
        valid = found.valid[i]
        agree_but_for_neighbours(found.boxes[i][valid], proposals[i])
        mine = detections[i]
        assert len(mine) > 20
        agree_but_for_ties(mine.boxes, mine.scores, result["boxes"], result["scores"])
        assert (mine.labels + 1 == result["labels"]).float().mean() > 0.98  # all but tied ones


def agree_but_for_neighbours(boxes, others):
    """For proposals, whose scores torchvision keeps to itself: the same boxes in the same order, ties up to 3 apart."""
    assert len(boxes) == len(others)
    position = (boxes[:, None] - others[None]).abs().amax(-1).min(1)
    assert (position.values < 1e-2).all()
    assert (position.indices - torch.arange(len(boxes))).abs().max() <= 3


@pytest.mark.parametrize("padded, sizes", [SHAPES[0], SHAPES[1]])
def test_losses_and_gradients_are_torchvisions(padded, sizes):
    peer = peer_model(1).train()
    for module in peer.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    ours = fpn.weights.from_torchvision(peer)
    ours.requires_grad_(True)
    # Convolutions on channels-last tensors sum in another order, which 50 layers of random weights blow up to 0.4% of
    # some gradients. In torchvision's own memory format the arithmetic is the same.
    ours.to(memory_format=torch.contiguous_format)
    ours.backbone.register_forward_pre_hook(lambda _, images: images[0].contiguous())
    ours.rpn_examples = ours.box_examples = WIDE
    ours.box_positive_fraction = 0.5
    ours.proposals = (300, 1000)
    batch, normal = pixels(padded, sizes, seed=1)
    truth = [torch.tensor([[10.0, 12, 90, 140], [60, 30, 75, 52], [100, 5, 240, 190]]), torch.zeros(0, 4)][: len(sizes)]
    labels = [torch.tensor([1, 4, 6]), torch.zeros(0, dtype=torch.int64)][: len(sizes)]
    targets = [{"boxes": b, "labels": k} for b, k in zip(truth, labels, strict=True)]

    maps = peer.backbone(normal)
    proposals, theirs = peer.rpn(ImageList(normal, sizes), maps, targets)
    _, more = peer.roi_heads(maps, proposals, sizes, targets)
    theirs |= more
    sum(theirs.values()).backward()

    padding = [(0, 3 - len(b)) for b in truth]
    padded_targets = Targets(
        torch.stack([nn.functional.pad(b, (0, 0, *p)) for b, p in zip(truth, padding, strict=True)]),
        torch.stack([nn.functional.pad(k - 1, p) for k, p in zip(labels, padding, strict=True)]),
        torch.stack([torch.arange(3) < len(b) for b in truth]),
    )
    mine = ours.losses(Batch(batch.images, batch.sizes, batch.original_sizes, batch.indices, padded_targets))
    sum(mine.values()).backward()

    names = {
        "rpn_class": "loss_objectness",
        "rpn_box": "loss_rpn_box_reg",
        "class": "loss_classifier",
        "box": "loss_box_reg",
    }
    for name, value in mine.items():
        assert abs(value.item() - theirs[names[name]].item()) < 1e-5, name
    parameters = dict(ours.named_parameters())
    compared = 0
    ours_of = {theirs: mine for mine, theirs in their_names(ours).items()}
    for name, parameter in peer.named_parameters():
        other, wanted = parameters[ours_of[name]].grad, without_background(name, parameter.grad, 1)
        assert (other - wanted).norm() <= 1e-4 * wanted.norm() + 1e-9, name
        compared += 1
    assert compared == len(parameters)


def test_a_state_dict_from_before_torchvision_0_13_loads():
    peer = peer_model()
    old = {
        name.replace("_blocks.0.0.", "_blocks.0.")
        .replace("_blocks.1.0.", "_blocks.1.")
        .replace("rpn.head.conv.0.0.", "rpn.head.conv."): value
        for name, value in peer.state_dict().items()
    }
    ours = fpn.weights.from_torchvision(old, norm_eps=1e-5)
    assert torch.equal(ours.pyramid.lateral["2"].weight, peer.backbone.fpn.inner_blocks[0][0].weight)


def test_published_form_gets_coco_names_and_its_epsilon():
    from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights
    from torchvision.ops import FrozenBatchNorm2d

    state = {
        k: v
        for k, v in fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None).state_dict().items()
        if "num_batches" not in k
    }
    ours = fpn.weights.from_torchvision(state)
    coco = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    assert len(ours.classes) == 90 and ours.classes[0] == coco[1] == "person" and ours.classes[-1] == coco[-1]
    assert {m.eps for m in ours.modules() if isinstance(m, FrozenBatchNorm2d)} == {0.0}


def test_weights_that_do_not_fit_are_refused_in_words():
    state = peer_model().state_dict()
    with pytest.raises(CheckpointError, match="2 class names for 6 classes"):
        fpn.weights.from_torchvision(state, classes=["a", "b"])
    short = {k: v for k, v in state.items() if "fc6" not in k}
    with pytest.raises(CheckpointError, match=r"roi_heads\.box_head\.fc6\.weight is missing"):
        fpn.weights.from_torchvision(short)
    with pytest.raises(CheckpointError, match="not torchvision's Faster R-CNN"):
        fpn.weights.from_torchvision({"a": torch.zeros(1)})
