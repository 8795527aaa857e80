"""Thousands of boxes in one image, and images that are hardly more than a line."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fpn
from fpn.data import collate
from fpn.model import matching
from fpn.structures import Sample


class Largest(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that is made while it is on."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        # A view shows memory that is there already: what an expanded tensor shows is more than it holds.
        sizes = [t.untyped_storage().nbytes() // t.itemsize for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return result


def batch_of(height, width, boxes):
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
    batch = collate([Sample(image, boxes, torch.arange(len(boxes)) % 2, 0, (height, width), key=5)])
    assert batch is not None
    return batch


def detector_with(**options):
    torch.manual_seed(0)
    return fpn.build(backbone="tiny", classes=["a", "b"], weights="none", width=16, hidden=32, **options)


@pytest.mark.slow
def test_5000_boxes_in_one_image_take_no_more_memory_than_a_chunk():
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(5000, 2, generator=generator) * torch.tensor([370.0, 240.0])
    batch = batch_of(256, 384, torch.cat([corner, corner + 3 + torch.rand(5000, 2, generator=generator) * 12], dim=1))
    detector = detector_with()
    anchors = sum(-(-256 // 2**k) * -(-384 // 2**k) for k in range(2, 7)) * 3
    assert 5000 * anchors > 20 * matching.CHUNK
    with Largest() as made:
        losses = detector.losses(batch)
        sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values()) and losses["box"] > 0
    assert made.elements <= 2 * matching.CHUNK


def test_5000_detections_an_image_are_given_when_they_are_asked_for():
    detector = detector_with(max_detections=5000, proposals=(100, 5000), proposals_per_level=(100, 5000), score=0.0,
                             rpn_nms=0.95, box_nms=0.95).eval()  # fmt: skip
    torch.nn.init.normal_(detector.box_head.offsets.weight, std=0.1)
    with torch.no_grad(), Largest() as made:
        found = detector.detect(batch_of(416, 608, torch.zeros(0, 4)))
    assert found.count.tolist() == [5000] and (found.scores.diff() <= 0).all()
    assert made.elements <= 5000 * 49 * 16 * 2  # features of the regions, nothing of their pairs


@pytest.mark.parametrize("height, width", [(1, 4000), (4000, 1), (1, 1)])
def test_images_of_one_pixels_breadth_have_losses_gradients_and_detections(height, width):
    # One value a channel has no variance over the batch.
    detector = detector_with(score=0.0, backbone_norm="frozen" if (height, width) == (1, 1) else None)
    box = torch.tensor([[0.0, 0.0, min(width, 90), min(height, 90)]])
    for boxes in (box, torch.zeros(0, 4)):
        detector.zero_grad()
        losses = detector.train().losses(batch_of(height, width, boxes))
        sum(losses.values()).backward()
        assert all(torch.isfinite(loss) for loss in losses.values())
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in detector.parameters())
    with torch.no_grad():
        found = detector.eval().detect(batch_of(height, width, box))
    assert torch.isfinite(found.boxes).all() and torch.isfinite(found.scores).all()
    assert (found.boxes[..., 2:].amax((0, 1)) <= torch.tensor([width, height])).all()
