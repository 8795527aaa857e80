"""The box convention: worked numbers, round trips, torchvision as oracle."""

import pytest
import torch
import torchvision

from fpn import boxes as box


def random_boxes(*shape: int, seed: int = 0) -> torch.Tensor:
    corner = torch.rand(*shape, 4, generator=torch.Generator().manual_seed(seed)) * 100
    return torch.cat([corner[..., :2], corner[..., :2] + corner[..., 2:] + 1], dim=-1)


def test_worked_numbers():
    a = torch.tensor([[0.0, 0, 10, 10], [5, 5, 5, 5]])
    b = torch.tensor([[5.0, 0, 15, 10], [0, 0, 10, 10], [5, 5, 5, 5]])
    assert box.area(a).tolist() == [100, 0]
    # halves overlap: 50 / 150; an empty box overlaps nothing, not even itself
    torch.testing.assert_close(box.iou(a, b), torch.tensor([[1 / 3, 1, 0], [0, 0, 0]]))


def test_iou_is_torchvisions_and_takes_batches():
    a, b = random_boxes(2, 5), random_boxes(2, 7, seed=1)
    for i in range(2):
        torch.testing.assert_close(box.iou(a, b)[i], torchvision.ops.box_iou(a[i], b[i]))


def test_clip_keeps_height_and_width_apart():
    boxes = torch.tensor([[[-5.0, -5, 500, 500]]])
    assert box.clip(boxes, torch.tensor([[20, 30]]))[0, 0].tolist() == [0, 0, 30, 20]


def test_encode_on_worked_numbers():
    anchor, target = torch.tensor([0.0, 0, 10, 20]), torch.tensor([5.0, 10, 25, 20])
    # centre (5, 10) -> (15, 15); size (10, 20) -> (20, 10)
    wanted = torch.tensor([1.0, 0.25, 2.0, -2.0]) * torch.tensor([10, 10, 5 * 0.6931472 / 2, 5 * 0.6931472 / 2])
    torch.testing.assert_close(box.encode(target, anchor, (10.0, 10.0, 5.0, 5.0)), wanted)


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0, 1.0), (10.0, 10.0, 5.0, 5.0)])
def test_decode_undoes_encode(weights):
    boxes, anchors = random_boxes(3, 50), random_boxes(3, 50, seed=1)
    torch.testing.assert_close(
        box.decode(box.encode(boxes, anchors, weights), anchors, weights), boxes, atol=1e-3, rtol=1e-4
    )


def test_decode_limits_growth():
    grown = box.decode(torch.tensor([[0.0, 0, 1e6, 0]]), torch.tensor([[0.0, 0, 16, 16]]), (1.0, 1.0, 1.0, 1.0))
    assert (grown[0, 2] - grown[0, 0]).item() == pytest.approx(1000)
