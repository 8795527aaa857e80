"""Test-time augmentation: several views of an image, and what they find made one."""

import random
from functools import partial
from types import SimpleNamespace

import pytest
import torch

import fpn
from fpn.cli import main
from fpn.data.generated import CLASSES
from fpn.errors import OptionError
from fpn.exported import Exported
from fpn.inference.finder import finder
from fpn.inference.fusion import fuse, resampled
from fpn.inference.views import augmented, mirrored, scaled, views
from fpn.structures import Detections


def found(rows, masks=None):
    """Detections of (x1, y1, x2, y2, score, label, level)."""
    table = torch.tensor(rows, dtype=torch.float32).reshape(-1, 7)
    return Detections(
        table[:, :4], table[:, 4], table[:, 5].long(), table[:, 6].long(), torch.tensor(len(table)), ("a", "b"), masks
    )


def test_two_views_of_an_object_become_their_mean_weighted_by_score():
    one = found([(0, 0, 10, 10, 0.8, 0, 3), (100, 0, 110, 10, 0.5, 0, 2)])
    two = found([(0, 0, 12, 10, 0.4, 0, 4), (0, 0, 10, 10, 0.3, 1, 2)])
    fused = fuse([one, two])
    # (0.8 * 10 + 0.4 * 12) / 1.2 = 10.667 with (0.8 + 0.4) / 2; what one view of two has found keeps half its score.
    expected = [[0, 0, 32 / 3, 10], [100, 0, 110, 10], [0, 0, 10, 10]]
    torch.testing.assert_close(fused.boxes, torch.tensor(expected))
    torch.testing.assert_close(fused.scores, torch.tensor([0.6, 0.25, 0.15]))
    assert fused.labels.tolist() == [0, 0, 1] and fused.levels.tolist() == [3, 2, 2] and int(fused.count) == 3
    assert fused.classes == ("a", "b")


def test_a_cluster_moves_with_its_members():
    # The third overlaps the first by 0.5 only, but the mean of the first two by 0.55 and more.
    rows = [(0, 0, 10, 10, 0.9, 0, 2), (0, 0, 10, 14, 0.8, 0, 2), (0, 0, 10, 20, 0.7, 0, 2)]
    assert len(fuse([found(rows[::2]), found([])])) == 2
    assert len(fuse([found(rows[:1]), found(rows[1:2]), found(rows[2:])])) == 1


def test_what_nobody_or_one_view_has_found():
    assert len(fuse([found([]), found([])])) == 0
    alone = found([(1, 2, 3, 4, 0.9, 1, 5), (5, 6, 7, 8, 0.6, 0, 2)])
    same = fuse([alone])
    torch.testing.assert_close(same.boxes, alone.boxes)
    torch.testing.assert_close(same.scores, alone.scores)
    assert same.levels.tolist() == [5, 2]
    empty = fuse([found([(3, 3, 3, 3, 0.5, 0, 2)]), found([(3, 3, 3, 3, 0.5, 0, 2)])])
    assert empty.boxes.tolist() == [[3, 3, 3, 3]] * 2  # boxes without an area overlap nothing


def by_the_paper(seen, iou):
    """Section 3 of the paper in its own steps, with lists."""
    entries = sorted((row for view in seen for row in view), key=lambda row: -row[4])
    lists, boxes = [], []
    for row in entries:
        overlap = [
            float(fpn.boxes.iou(torch.tensor([row[:4]]), torch.tensor([box[:4]]))) if box[5] == row[5] else 0.0
            for box in boxes
        ]
        place = max(range(len(boxes)), key=overlap.__getitem__, default=None)
        if place is None or overlap[place] <= iou:
            lists.append([row])
            boxes.append(row)
            continue
        lists[place].append(row)
        total = sum(member[4] for member in lists[place])
        mean = [sum(member[4] * member[k] for member in lists[place]) / total for k in range(4)]
        boxes[place] = (*mean, total / len(lists[place]), row[5], row[6])
    whole = [(*b[:4], b[4] * min(len(members), len(seen)) / len(seen)) for b, members in zip(boxes, lists, strict=True)]
    return sorted(whole, key=lambda row: -row[4])


def test_many_random_boxes_as_by_the_steps_of_the_paper():
    chance = random.Random(3)
    objects = [(chance.uniform(0, 60), chance.uniform(0, 60), chance.uniform(8, 30)) for _ in range(12)]

    def view():
        for place, (x, y, side) in enumerate(objects):
            if chance.random() < 0.8:
                x1, y1, w, h = (value + chance.uniform(-3, 3) for value in (x, y, side, side))
                yield (x1, y1, x1 + w, y1 + h, chance.uniform(0.05, 1), place % 2, 2 + place % 3)

    for _ in range(20):
        seen = [list(view()) for _ in range(3)]
        fused = fuse([found(rows) for rows in seen], 0.4)
        expected = torch.tensor(by_the_paper(seen, 0.4))
        torch.testing.assert_close(fused.boxes, expected[:, :4], atol=1e-4, rtol=0)
        torch.testing.assert_close(fused.scores, expected[:, 4], atol=1e-5, rtol=0)


def test_masks_are_laid_onto_the_new_box_and_averaged():
    mask = torch.rand(1, 4, 4)
    box = torch.tensor([[0.0, 0.0, 8.0, 8.0]])
    torch.testing.assert_close(resampled(mask, box, box), mask)
    moved = resampled(mask, box, box + torch.tensor([2.0, 0.0, 2.0, 0.0]))  # by one cell
    torch.testing.assert_close(moved[..., :3], mask[..., 1:])
    assert (moved[..., 3] == 0).all()
    assert (resampled(mask, box, box + 50) == 0).all()

    row = (0, 0, 8, 8)
    ones, zeros = torch.ones(1, 4, 4), torch.zeros(1, 4, 4)
    fused = fuse([found([(*row, 0.9, 0, 2)], ones), found([(*row, 0.3, 0, 2)], zeros)])
    assert fused.masks is not None
    torch.testing.assert_close(fused.masks, torch.full((1, 4, 4), 0.75))
    none = fuse([found([], torch.zeros(0, 4, 4))])
    assert none.masks is not None and none.masks.shape == (0, 4, 4)


def brightest(images, left_half=False):
    """A finder of one object, the bright part of the image; where told, it is blind on the right."""
    answers = []
    for image in images:
        row, column = torch.where(image[0] > 128)
        seen = len(row) > 0 and not (left_half and column.min() >= image.shape[2] / 2)
        box = (int(column.min()), int(row.min()), int(column.max()) + 1, int(row.max()) + 1) if seen else ()
        answers.append(found([(*box, 0.8, 1, 3)] if seen else []))
    return answers


def picture(x1, y1, x2, y2, size=(40, 60)):
    image = torch.zeros(3, *size, dtype=torch.uint8)
    image[:, y1:y2, x1:x2] = 255
    return image


def test_a_mirrored_view_finds_an_object_at_its_place():
    images = [picture(5, 6, 15, 20), picture(0, 0, 7, 9, (30, 31)), torch.zeros(3, 8, 8, dtype=torch.uint8)]
    both = views(brightest)(images)
    assert [one.boxes.tolist() for one in both] == [[[5, 6, 15, 20]], [[0, 0, 7, 9]], []]
    assert both[0].scores.tolist() == pytest.approx([0.8])
    blind = partial(brightest, left_half=True)
    right = picture(45, 6, 55, 20)
    assert len(blind([right])[0]) == 0
    (seen,) = views(blind)([right])
    assert seen.boxes.tolist() == [[45, 6, 55, 20]] and seen.scores.tolist() == pytest.approx([0.4])
    assert len(views(blind, flip=False)([right])[0]) == 0
    assert views(brightest)([]) == []
    with pytest.raises(OptionError, match="one finder at least"):
        views()


def test_masks_are_mirrored_with_their_boxes():
    masks = torch.arange(16.0).view(1, 4, 4)
    one = mirrored(found([(1, 2, 5, 9, 0.5, 0, 2)], masks), 20)
    assert (
        one.boxes.tolist() == [[15, 2, 19, 9]]
        and one.masks is not None
        and torch.equal(one.masks[0], masks[0].fliplr())
    )
    again = mirrored(one, 20)
    assert again.boxes.tolist() == [[1, 2, 5, 9]] and again.masks is not None and torch.equal(again.masks, masks)


@pytest.fixture(scope="module")
def detector():
    torch.manual_seed(0)
    made = fpn.build(backbone="tiny", classes=CLASSES, weights="none", width=32, hidden=64, short=96, long=160)
    for layer in (made.box_head.classes, made.box_head.offsets, made.rpn.objectness, made.rpn.offsets):
        torch.nn.init.normal_(layer.weight, std=0.2)
    return made


def test_an_image_and_its_mirror_image_give_the_same(detector):
    """Which no detector does by itself, and what views that are turned back wrongly would not do either."""
    image = torch.randint(0, 256, (3, 90, 140), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    plain, both = finder(detector, "cpu"), augmented(detector, "cpu", scales=(1.0, 1.25))

    def apart(find):
        one, other = find([image])[0], mirrored(find([image.flip(-1)])[0], 140)
        return [(one.scores.sum() - other.scores.sum()).abs(), (one.boxes.sum(0) - other.boxes.sum(0)).abs().max()]

    assert both([image])[0].boxes.shape[0] > 5
    assert max(apart(both)) < 0.1 < max(apart(plain))


def test_the_same_detector_in_another_size(detector):
    larger = scaled(detector, 1.5)
    assert larger.spec.sides == (144, 240) and detector.spec.sides == (96, 160)
    assert larger.backbone is detector.backbone and scaled(detector, 1) is detector
    image = torch.randint(0, 256, (3, 96, 160), dtype=torch.uint8)
    sizes = []
    hook = detector.backbone.register_forward_pre_hook(lambda _, given: sizes.append(tuple(given[0].shape[2:])))
    finder(larger, "cpu")([image])
    finder(detector, "cpu")([image])
    hook.remove()
    assert sizes == [(160, 256), (96, 160)]  # padded to multiples of 32
    for scale in (0, -1, 0.2, 11, float("nan")):
        with pytest.raises(OptionError, match="scale"):
            scaled(detector, scale)


def test_given_regions_are_of_one_view(tmp_path):
    detector = fpn.build("fast_rcnn", backbone="tiny", classes=CLASSES, weights="none", width=16, hidden=16, short=64)
    file = fpn.weights.save(detector, tmp_path / "x.safetensors")
    for options in (["--tta"], ["--tile", "64"], ["--overlap", "0.1"]):
        with pytest.raises(SystemExit, match="for detectors that find regions by themselves"):
            main(["eval", str(file), str(tmp_path / "data"), "--proposals", "p.safetensors", *options])


def test_an_exported_file_is_mirrored_and_has_one_size(tmp_path):
    spec = SimpleNamespace(classes=("a", "b"), tile=None, overlap=0.2)
    file = Exported(tmp_path / "x.onnx", "onnx", spec, brightest, 0.05, 100, False, False, {})  # type: ignore[arg-type]
    (seen,) = augmented(file)([picture(5, 6, 15, 20)])
    assert seen.boxes.tolist() == [[5, 6, 15, 20]]
    with pytest.raises(OptionError, match="x.onnx: an exported file"):
        augmented(file, scales=(1.0, 1.5))
    with pytest.raises(OptionError, match="device meta"):
        augmented(file, "meta")
