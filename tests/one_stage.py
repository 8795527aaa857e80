"""What the tests of the one-stage detectors share: pyramids and targets without a backbone, and torchvision's heads."""

from __future__ import annotations

import torch
from torch import nn

import fpn
from fpn.model.detector import Detector
from fpn.structures import Batch, Detections, Targets

WIDTH, CLASSES = 32, 3
TRUTH = [
    torch.tensor([[10.3, 12.1, 90.2, 140.6], [60.4, 30.7, 75.1, 52.3], [100.9, 5.2, 240.6, 190.8]]),
    torch.tensor([[20.7, 20.2, 170.1, 150.9]]),
    torch.zeros(0, 4),
]
LABELS = [torch.tensor([0, 2, 1]), torch.tensor([2]), torch.zeros(0, dtype=torch.int64)]


def batch_of(padded: tuple[int, int], sizes: list[tuple[int, int]], images: int = 0) -> Batch:
    """`images` of the images above have targets; their pixels do not matter."""
    most = max([len(boxes) for boxes in TRUTH[:images]], default=0)
    padding = [(0, most - len(boxes)) for boxes in TRUTH[:images]]
    targets = Targets(
        torch.stack([nn.functional.pad(b, (0, 0, *p)) for b, p in zip(TRUTH, padding, strict=False)]),
        torch.stack([nn.functional.pad(k, p) for k, p in zip(LABELS, padding, strict=False)]),
        torch.stack([torch.arange(most) < len(b) for b in TRUTH[:images]]),
    ) if images else None  # fmt: skip
    shape = torch.tensor(sizes)
    pixels = torch.zeros(len(sizes), 3, *padded, dtype=torch.uint8)
    return Batch(pixels, shape, shape, torch.arange(len(sizes)), targets)


def maps_of(padded: tuple[int, int], count: int) -> dict[int, torch.Tensor]:
    """Random P3 to P7 of `count` images, the sizes as convolutions of stride 2 make them."""
    generator = torch.Generator().manual_seed(0)
    sides = {k: (-(-padded[0] // 2**k), -(-padded[1] // 2**k)) for k in range(3, 8)}
    return {k: torch.randn(count, WIDTH, *side, generator=generator) for k, side in sides.items()}


def detector_on(maps: dict[int, torch.Tensor], model: str, **options: object) -> Detector:
    """A detector whose pyramid is always the one given."""
    names = tuple("abc"[:CLASSES])
    detector = fpn.build(model, backbone="tiny", weights="none", classes=names, width=WIDTH, **options)
    # torchvision's memory format: another sums in another order, and a ReLU at 0 makes that visible in gradients.
    detector.to(memory_format=torch.contiguous_format)
    detector.features = lambda batch: maps
    return detector.eval()


def liven(head: nn.Module) -> None:
    """Random weights with which a head of torchvision detects something, and nothing of class 0, its background."""
    torch.manual_seed(0)
    for name, parameter in head.named_parameters():
        if parameter.ndim == 4:
            nn.init.normal_(parameter, std=(2 / (9 * WIDTH)) ** 0.5)
        else:
            nn.init.normal_(parameter, 1.0 if "bbox_reg" in name else 0.0, std=0.1)
    classes = head.classification_head.cls_logits
    classes.weight.data /= 2
    classes.weight.data.view(-1, CLASSES + 1, WIDTH, 3, 3)[:, 0] = 0
    classes.bias.data.view(-1, CLASSES + 1)[:] = torch.tensor([-1e4, -1.0, -1.0, -1.0])


def copy_head(ours: nn.Module, theirs: nn.Module) -> None:
    """The weights of torchvision's head in ours: layer by layer in order, less the rows of class 0."""
    pairs = [
        (ours.class_tower, theirs.classification_head.conv),
        (ours.box_tower, theirs.regression_head.conv),
        (ours.offsets, theirs.regression_head.bbox_reg),
    ]
    if ours.centerness is not None:
        pairs.append((ours.centerness, theirs.regression_head.bbox_ctrness))
    for mine, other in pairs:
        for target, source in zip(mine.parameters(), other.parameters(), strict=True):
            target.data.copy_(source)
    classes = theirs.classification_head.cls_logits
    for target, source in ((ours.classes.weight, classes.weight), (ours.classes.bias, classes.bias)):
        target.data.copy_(source.data.unflatten(0, (-1, CLASSES + 1))[:, 1:].flatten(0, 1))


def same_detections(ours: Detections, theirs: list[dict[str, torch.Tensor]]) -> None:
    """The same boxes, but for the empty ones that torchvision gives out too; no limit may cut them.

    Boxes of (nearly) the same score may come in another order.
    """
    for i, other in enumerate(theirs):
        mine = ours[i]
        real = (other["boxes"][:, 2:] - other["boxes"][:, :2]).amin(1) >= 1e-2
        boxes, scores, labels = (other[name][real] for name in ("boxes", "scores", "labels"))
        assert 20 < len(mine) == len(boxes)
        torch.testing.assert_close(mine.scores, scores, atol=1e-5, rtol=0)
        apart = (mine.boxes[:, None] - boxes).abs().amax(-1)
        alike = ((mine.scores[:, None] - scores).abs() < 2e-6) & (mine.labels[:, None] + 1 == labels)
        assert torch.where(alike, apart, torch.inf).amin(1).max() < 1e-3
        assert (apart.diagonal() < 1e-3).float().mean() > 0.98


def same_gradients(a: torch.Tensor, b: torch.Tensor, inputs: list[torch.Tensor]) -> None:
    grads = (torch.autograd.grad(loss, inputs, retain_graph=True) for loss in (a, b))
    for mine, other in zip(*grads, strict=True):
        assert (mine - other).norm() <= 1e-4 * other.norm() + 1e-9
