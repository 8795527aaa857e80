"""A detector as a function of images."""

import pytest
import torch

import fpn
from fpn.data.generated import CLASSES, generate
from fpn.evaluation.evaluate import detect_split
from fpn.inference.finder import finder
from fpn.structures import Detections


@pytest.fixture(scope="module")
def detector():
    torch.manual_seed(0)
    made = fpn.build(backbone="tiny", classes=CLASSES, weights="none", width=32, hidden=64, short=96, long=160)
    for layer in (made.box_head.classes, made.box_head.offsets, made.rpn.objectness, made.rpn.offsets):
        torch.nn.init.normal_(layer.weight, std=0.2)
    return made


def test_images_of_several_sizes_are_found_each_in_its_own_pixels(detector):
    find = finder(detector, "cpu")
    sizes = ((96, 160), (48, 80), (192, 320))  # all padded alike
    images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in sizes]
    together, alone = find(images), [find([image])[0] for image in images]
    assert [len(one) for one in together] == [len(one) for one in alone] and len(alone[0]) > 0
    for a, b, image in zip(together, alone, images, strict=True):
        torch.testing.assert_close(a.boxes, b.boxes, atol=1e-2, rtol=0)
        assert (a.boxes[:, 2] <= image.shape[2]).all() and (a.boxes[:, 3] <= image.shape[1]).all()
    assert find([]) == []


def test_stacked_detections_are_those_of_each_image_again():
    def some(n, masks=False):
        outlines = torch.rand(n, 4, 4) if masks else None
        return Detections(
            torch.rand(n, 4), torch.rand(n), torch.arange(n), torch.arange(n) + 2, torch.tensor(n), ("a",), outlines
        )

    for masks in (False, True):
        parts = [some(3, masks), some(0, masks), some(5, masks)]
        stacked = Detections.stack(parts)
        assert stacked.boxes.shape == (3, 5, 4) and stacked.labels[1].tolist() == [-1] * 5 == stacked.levels[1].tolist()
        for place, part in enumerate(parts):
            again = stacked[place]
            assert torch.equal(again.boxes, part.boxes) and torch.equal(again.scores, part.scores)
            assert torch.equal(again.levels, part.levels) and again.classes == ("a",)
            assert (again.masks is None) if part.masks is None else torch.equal(again.masks, part.masks)


def test_a_split_measured_through_a_finder_gives_the_same(detector, tmp_path):
    split = fpn.data.load(generate(tmp_path, 12, (96, 128), seed=1))["val"]
    keywords = {"batch": 2, "device": "cpu", "workers": 0, "progress": False}
    usual = detect_split(detector, split, **keywords)
    found = detect_split(detector, split, find=finder(detector, "cpu"), **keywords)
    assert len(usual.scores) > 0
    assert usual.images.tolist() == found.images.tolist() and usual.levels.tolist() == found.levels.tolist()
    torch.testing.assert_close(torch.from_numpy(found.boxes), torch.from_numpy(usual.boxes), atol=1e-2, rtol=0)
