"""Images whose objects are rectangles of one colour each, so that a picture itself says where its boxes must be."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fpn.data.augment import Pair, pair_of

COLOURS = torch.tensor([(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255)])  # by label
BLUR = 1.6  # pixels by which resizing may move the visible edge of a rectangle


def marked(size: tuple[int, int], rectangles: dict[int, tuple[int, int, int, int]]) -> Pair:
    """A black image of (height, width) with a rectangle (x1, y1, x2, y2) for each label."""
    image = torch.zeros(3, *size, dtype=torch.uint8)
    for label, (x1, y1, x2, y2) in rectangles.items():
        image[:, y1:y2, x1:x2] = COLOURS[label].to(torch.uint8)[:, None, None]
    boxes = torch.tensor(list(rectangles.values()), dtype=torch.float32).reshape(-1, 4)
    return pair_of(image, boxes, torch.tensor(list(rectangles), dtype=torch.int64))


def extent(image: Tensor, label: int) -> list[int] | None:
    """The box around all pixels of the label's colour, None where there are none."""
    far = image.numpy().astype(np.int16) - COLOURS[label].numpy()[:, None, None]
    mask = (abs(far) < 100).all(axis=0)
    if not mask.any():
        return None
    (y, *_, y_end), (x, *_, x_end) = mask.any(axis=1).nonzero()[0].repeat(2), mask.any(axis=0).nonzero()[0].repeat(2)
    return [int(x), int(y), int(x_end) + 1, int(y_end) + 1]


def assert_sound(pair: Pair, smallest: float = 2.0) -> None:
    """What every transform promises: uint8 pixels, finite boxes of some size inside the image, a label for each."""
    image, target = pair
    boxes, labels = target["boxes"].as_subclass(Tensor), target["labels"]
    height, width = image.shape[1:]
    assert image.dtype == torch.uint8 and image.shape[0] == 3 and height > 0 and width > 0
    assert boxes.dtype == torch.float32 and boxes.shape == (len(labels), 4) and labels.dtype == torch.int64
    assert torch.isfinite(boxes).all() and (boxes >= 0).all()
    assert (boxes <= torch.tensor([width, height, width, height])).all()
    assert (boxes[:, 2:] - boxes[:, :2] >= smallest).all()
    assert target["boxes"].canvas_size == (height, width)


def assert_in_place(pair: Pair) -> None:
    """Every box lies around the pixels of its label's colour, of which there is one object at most."""
    image, target = pair
    assert len(set(target["labels"].tolist())) == len(target["labels"])
    for box, label in zip(target["boxes"].tolist(), target["labels"].tolist(), strict=True):
        seen = extent(image, label)
        assert seen is not None, (label, box)
        assert max(abs(a - b) for a, b in zip(box, seen, strict=True)) <= BLUR, (label, box, seen)
