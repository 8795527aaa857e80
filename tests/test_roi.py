"""Eq. 1 and RoIAlign: worked numbers, and torchvision as the oracle for values and gradients."""

import pytest
import torch
import torchvision

from fpn.model.roi import assign_levels, pool_regions


def square(*sides: float) -> torch.Tensor:
    return torch.tensor([[[0.0, 0.0, side, side] for side in sides]])


def test_equation_1_on_worked_numbers():
    # 224 -> P4, half of it -> P3, a quarter -> P2; a hair less than 224 is P3; everything else is clamped.
    levels = assign_levels(square(224, 112, 111.9, 56, 448, 447.9, 5000, 1, 0), 2, 5)
    assert levels[0].tolist() == [4, 3, 2, 2, 5, 4, 5, 2, 2]


def some_regions(seed: int = 0) -> tuple[dict[int, torch.Tensor], torch.Tensor, torch.Tensor]:
    """A pyramid of odd sizes and regions of all scales, at and over the borders, empty ones and one of no level."""
    generator = torch.Generator().manual_seed(seed)
    sides = {2: (51, 67), 3: (26, 34), 4: (13, 17), 5: (7, 9)}
    pyramid = {k: torch.randn(2, 8, *hw, generator=generator) for k, hw in sides.items()}
    corner = torch.rand(2, 60, 2, generator=generator) * torch.tensor([260.0, 200.0])
    size = torch.exp(torch.rand(2, 60, 2, generator=generator) * 6)
    boxes = torch.cat([corner, corner + size], dim=-1)
    boxes[:, 0] = torch.tensor([0.0, 0, 268, 204])
    boxes[:, 1] = torch.tensor([267.9, 203.9, 268, 204])
    boxes[:, 2] = torch.tensor([30.0, 30, 30, 30])
    boxes[:, 3] = torch.tensor([-40.0, -30, 20, 300])
    levels = assign_levels(boxes, 2, 5)
    levels[0, 4] = -1
    return pyramid, boxes, levels


def torchvisions(pyramid, boxes, levels, operator) -> torch.Tensor:
    image = torch.arange(2.0)[:, None, None].expand(-1, boxes.shape[1], 1)
    rois = torch.cat([image, boxes], -1).flatten(0, 1)
    out = torch.zeros(len(rois), 8, 7, 7)
    for level, features in pyramid.items():
        rows = (levels.flatten() == level).nonzero()[:, 0]
        out = out.index_put((rows,), operator(features, rois[rows], 2.0**-level))
    return out


@pytest.mark.parametrize("method, aligned", [("align", True), ("align_v1", False)])
@pytest.mark.parametrize("samples", [1, 2, 3])
def test_roi_align_and_its_gradient_are_torchvisions(method, aligned, samples):
    pyramid, boxes, levels = some_regions()
    weights = torch.randn(120, 8, 7, 7, generator=torch.Generator().manual_seed(1))
    results = []
    for pool in (
        lambda maps: pool_regions(maps, boxes, levels, 7, samples, method),
        lambda maps: torchvisions(
            maps, boxes, levels, lambda f, r, s: torchvision.ops.roi_align(f, r, 7, s, samples, aligned)
        ),
    ):
        maps = {k: p.clone().requires_grad_() for k, p in pyramid.items()}
        out = pool(maps)
        (out * weights).sum().backward()
        results.append((out.detach(), *(m.grad for m in maps.values())))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)
    assert results[0][0][4].abs().max() == 0  # the region of no level


def test_roi_max_pooling_is_torchvisions():
    pyramid, boxes, levels = some_regions()
    theirs = torchvisions(pyramid, boxes, levels, lambda f, r, s: torchvision.ops.roi_pool(f, r, 7, s))
    torch.testing.assert_close(pool_regions(pyramid, boxes, levels, method="pool"), theirs)


def test_a_linear_map_is_averaged_exactly():
    """On features that grow by 1 a pixel, RoIAlign gives the mean position in each bin."""
    features = torch.arange(32.0).expand(1, 1, 32, 32)
    out = pool_regions({2: features}, torch.tensor([[[8.0, 8, 120, 120]]]), torch.tensor([[2]]), size=7)
    # 28 feature pixels from 2 to 30, bins of 4 pixels: centres 4, 8, ... 28, minus half a pixel.
    torch.testing.assert_close(out[0, 0, 0], torch.arange(4.0, 29, 4) - 0.5)
