"""Sizes, boxes and pixels after resizing and flipping, against worked numbers and torchvision."""

from __future__ import annotations

import pytest
import torch
from torchvision import tv_tensors
from torchvision.transforms import v2

from fpn.data import resize_transform, resized_size, train_transform
from fpn.errors import OptionError


def pair(size: tuple[int, int], boxes: list[list[float]]):
    image = torch.arange(3 * size[0] * size[1]).reshape(3, *size).remainder(251).to(torch.uint8)
    values = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    target = {
        "boxes": tv_tensors.BoundingBoxes(values, format="XYXY", canvas_size=size),  # pyright: ignore[reportCallIssue]
        "labels": torch.arange(len(values)),
    }
    return tv_tensors.Image(image), target


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((480, 640), (800, 1066)),  # 640 * 800 / 480 = 1066.67
        ((640, 480), (1066, 800)),
        ((600, 600), (800, 800)),
        ((400, 1000), (533, 1333)),  # 2000 would be too long: 800 * 1333 / 2000 = 533.2
        ((20, 4000), (6, 1333)),
        ((1, 4000), (1, 1333)),
        ((1, 1), (800, 800)),
        ((3000, 2000), (1200, 800)),
    ],
)
def test_sizes(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert resized_size(size, 800, 1333) == expected
    image, target = pair(size, [[0, 0, size[1], size[0]]])
    image, target = resize_transform()(image, target)
    assert tuple(image.shape) == (3, *expected)
    assert image.dtype == torch.uint8
    height, width = expected
    assert target["boxes"].tolist() == [[0, 0, width, height]]


def test_sizes_are_torchvision_s() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        height, width, short = torch.randint(30, 200, (3,), generator=generator).tolist()
        image = torch.zeros(3, height, width, dtype=torch.uint8)
        expected = v2.functional.resize(image, [short], max_size=230).shape[1:]
        assert resized_size((height, width), short, 230) == tuple(expected)


def test_pixels_are_torchvision_s() -> None:
    image, target = pair((30, 50), [])
    resized, _ = resize_transform(20, 100)(image, target)
    expected = v2.functional.resize(torch.Tensor(image).to(torch.uint8), [20, 33], antialias=True)
    torch.testing.assert_close(resized.as_subclass(torch.Tensor), expected)


def test_flip_and_resize_of_boxes() -> None:
    image, target = pair((40, 80), [[8, 4, 24, 20], [40, 10, 80, 40]])
    flipped, moved = train_transform(short=(20,), long=100, flip=1.0)(image, target)
    assert moved["boxes"].tolist() == [[28, 2, 36, 10], [0, 5, 20, 20]]  # half as large, x -> 40 - x
    assert moved["labels"].tolist() == [0, 1]
    straight, _ = resize_transform(20, 100)(image, target)
    torch.testing.assert_close(flipped, straight.flip(-1))


def test_several_short_sides_are_all_drawn() -> None:
    transform = train_transform(short=(10, 20, 30), long=100, flip=0.0)
    torch.manual_seed(0)
    heights = {transform(*pair((40, 80), []))[0].shape[1] for _ in range(40)}
    assert heights == {10, 20, 30}


def test_jitter_changes_pixels_and_not_boxes() -> None:
    image, target = pair((40, 80), [[8, 4, 24, 20]])
    torch.manual_seed(0)
    changed, moved = train_transform(short=(40,), flip=0.0, jitter=0.5)(image, target)
    assert changed.dtype == torch.uint8 and changed.shape == image.shape
    assert (changed != image).float().mean() > 0.5
    assert moved["boxes"].tolist() == [[8, 4, 24, 20]]
    plain, _ = train_transform(short=(40,), flip=0.0, jitter=0.0)(image, target)
    assert torch.equal(plain, image)


def test_boxes_are_clipped() -> None:
    _, target = resize_transform(20, 100)(*pair((40, 80), [[-8, -8, 100, 20]]))
    assert target["boxes"].tolist() == [[0, 0, 40, 10]]


@pytest.mark.parametrize("wrong", [{"short": ()}, {"short": (0,)}, {"long": 0}, {"flip": 1.5}, {"jitter": -1.0}])
def test_options_that_cannot_work(wrong: dict) -> None:
    with pytest.raises(OptionError):
        train_transform(**wrong)
