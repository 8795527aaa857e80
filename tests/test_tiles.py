"""Detection in tiles: what borders cut comes whole and once; training on tiles; all of it on painted objects."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fpn
from fpn.boxes import area, clip
from fpn.data import DetectionDataset, Split
from fpn.data.generated import generate
from fpn.data.outlines import Column
from fpn.data.tiles import TileDataset, grid, starts, tiles_of
from fpn.errors import OptionError
from fpn.evaluation.command import watchable
from fpn.evaluation.evaluate import detect_split, score_for
from fpn.inference import tiles
from fpn.inference.finder import finder
from fpn.inference.tiles import absorb, find_in_whole, join, shrunk, tiled
from fpn.model.masks import resampled
from fpn.structures import Detections


def painted(size, boxes, labels=None):
    """An image with whole-pixel boxes: red is the number of the object, from 1, green its label."""
    image = torch.zeros(3, *size, dtype=torch.uint8)
    for n, (x1, y1, x2, y2) in enumerate(boxes):
        image[0, y1:y2, x1:x2] = n + 1
        image[1, y1:y2, x1:x2] = 0 if labels is None else labels[n]
    return image


def seen(image, masks=False, label_of=None):
    """What a perfect detector finds in a painted image, with the box of what can be seen of each object."""
    boxes, labels = [], []
    for n in image[0].unique().tolist():
        if n:
            rows, columns = (image[0] == n).nonzero(as_tuple=True)
            boxes.append([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
            labels.append(int(image[1, rows[0], columns[0]]) if label_of is None else label_of(boxes[-1]))
    found = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    scores = (found[:, 2:] - found[:, :2]).prod(dim=1) / 1e6 + 0.5  # the more of it, the surer
    outlines = torch.ones(len(found), 8, 8) if masks else None
    levels = torch.full((len(found),), 3)
    return Detections(
        found, scores, torch.tensor(labels).long(), levels, torch.tensor(len(found)), ("a", "b"), outlines
    )


def oracle(images):
    return [seen(image) for image in images]


def near_sighted(images):
    """Of images that are larger than a tile it sees nothing."""
    return [seen(image if max(image.shape) <= 200 else image[:, :1, :1] * 0) for image in images]


def boxes_of(found):
    return sorted(found.boxes.int().tolist())


def test_tiles_cover_every_pixel_and_share_what_they_must():
    for length in (1, 199, 200, 201, 360, 361, 1000, 1777):
        for overlap in (0.0, 0.1, 0.25, 0.5, 0.9):
            begins = starts(length, 200, overlap)
            assert begins[0] == 0 and begins[-1] == max(0, length - 200)
            steps = np.diff(begins)
            assert (steps > 0).all() and (200 - steps >= int(200 * overlap)).all()
            assert np.ptp(steps) <= 1 if len(steps) else True  # spread evenly
    assert grid((50, 500), 200, 0.25).windows.tolist() == [[0, 0, 50, 200], [0, 150, 50, 200], [0, 300, 50, 200]]


@pytest.mark.parametrize(
    ("tile", "overlap", "word"), [(31, 0.2, "tile is 31"), (200, -0.1, "overlap"), (200, 1.0, "overlap is 1.0")]
)
def test_tiles_that_cannot_work_are_refused(tile, overlap, word):
    with pytest.raises(OptionError, match=word):
        tiled(oracle, tile, overlap)


def test_objects_no_longer_than_the_overlap_are_found_once_each_wherever_they_lie():
    random = np.random.default_rng(0)
    find = tiled(near_sighted, 200, 0.25, progress=False)
    for _ in range(4):
        boxes = []
        for cell in random.permutation(64)[:30]:  # one object at most in each cell of 80 pixels
            high, wide = random.integers(3, 42, size=2)
            y, x = (80 * (cell // 8) + random.integers(0, 81 - high), 80 * (cell % 8) + random.integers(0, 81 - wide))
            boxes.append([int(x), int(y), int(x + wide), int(y + high)])
        found = find([painted((640, 640), boxes)])[0]
        assert boxes_of(found) == sorted(boxes)
        assert found.scores.tolist() == sorted(found.scores.tolist(), reverse=True)
        assert int(found.count) == 30 and set(found.levels.tolist()) == {3} and found.classes == ("a", "b")


@pytest.mark.parametrize("overlap", [0.0, 0.1, 0.25])
@pytest.mark.parametrize(
    "box",
    [
        [100, 20, 280, 60],  # over one border
        [20, 90, 60, 270],
        [120, 110, 260, 290],  # where four tiles meet
        [10, 30, 630, 80],  # through four tiles
        [60, 70, 570, 590],  # over nine
    ],
)
def test_longer_objects_are_put_together_from_their_pieces(box, overlap):
    found = tiled(near_sighted, 200, overlap, progress=False)([painted((640, 640), [box])])[0]
    assert boxes_of(found) == [box]


def test_objects_larger_than_a_tile_come_from_the_whole_image_without_their_pieces():
    """Also where the pieces do not meet: this one finds nothing in every second tile."""

    class Forgetful:
        calls = 0

        def __call__(self, images):
            self.calls += 1
            return [seen(image if max(image.shape) > 200 or self.calls % 2 else image * 0) for image in images]

    boxes = [[40, 50, 560, 600], [600, 600, 630, 630]]
    found = tiled(Forgetful(), 200, 0.25, batch=1, progress=False)([painted((640, 640), boxes)])[0]
    assert boxes[0] in boxes_of(found) and set(map(tuple, boxes_of(found))) <= set(map(tuple, boxes))


def test_neighbours_cut_by_one_border_stay_two_and_classes_do_not_mix():
    boxes = [[100, 20, 280, 50], [100, 52, 280, 82], [100, 86, 280, 120]]
    found = tiled(near_sighted, 200, 0.1, progress=False)([painted((200, 640), boxes, [0, 0, 1])])[0]
    assert boxes_of(found) == boxes
    assert sorted(zip(boxes_of(found), found.labels[found.boxes[:, 1].argsort()].tolist(), strict=True)) == [
        (boxes[0], 0),
        (boxes[1], 0),
        (boxes[2], 1),
    ]


def test_a_sliver_that_looks_like_another_class_gives_way_to_the_tile_that_sees_the_object():
    def fooled(images):
        return [seen(image, label_of=lambda box: int(box[2] - box[0] < 20)) for image in images]

    boxes = [[x, y, x + 36, y + 36] for x, y in ((188, 10), (120, 90), (305, 150), (430, 40))]
    found = tiled(fooled, 200, 0.25, progress=False)([painted((300, 640), boxes)])[0]
    assert boxes_of(found) == sorted(boxes) and found.labels.tolist() == [0] * 4


def test_of_small_things_only_the_tiles_tell():
    def seeing_dust(images):
        """In whole images it takes noise for objects, and large ones it finds only there."""
        dust = seen(painted((640, 640), [[300, 300, 310, 310], [100, 100, 500, 500]]))
        return [dust if max(image.shape) > 200 else seen(image) for image in images]

    found = tiled(seeing_dust, 200, 0.25, progress=False)([painted((640, 640), [[10, 10, 30, 30]])])[0]
    assert boxes_of(found) == [[10, 10, 30, 30], [100, 100, 500, 500]]


def test_images_no_larger_than_a_tile_are_left_to_the_detector():
    image = painted((200, 150), [[0, 0, 150, 200], [9, 9, 145, 195], [15, 15, 140, 190]])  # NMS would thin these
    together = tiled(oracle, 200, 0.25, progress=False)([image, painted((640, 300), []), image[:, :1, :1]])
    assert [len(found) for found in together] == [3, 0, 1]
    assert torch.equal(together[0].boxes, seen(image).boxes)
    assert tiled(oracle, 200)([]) == []


def test_the_masks_of_pieces_become_one():
    def find(images):
        return [seen(image if max(image.shape) <= 200 else image[:, :1, :1] * 0, masks=True) for image in images]

    image = painted((640, 640), [[120, 110, 260, 290], [10, 10, 30, 30]])
    found = tiled(find, 200, 0.1, progress=False)([image])[0]
    assert len(found) == 2 and found.masks is not None and found.masks.min() > 0.5


def test_a_mask_on_another_box_keeps_its_place():
    mask = torch.zeros(8, 8)
    mask[:, 4:] = 1  # the right half
    wider = resampled(mask[None], torch.tensor([[10.0, 0, 18, 8]]), torch.tensor([[10.0, 0, 26, 8]]))[0]
    torch.testing.assert_close(wider[0], torch.tensor([0.0, 0, 1, 1, 0, 0, 0, 0]), atol=0.5, rtol=0)
    assert wider[0, 2:4].min() > 0.7 and wider[0, [0, 1, 5, 6, 7]].max() == 0
    assert torch.equal(resampled(mask[None], torch.tensor([[0.0, 0, 8, 8]]), torch.tensor([[0.0, 0, 8, 8]]))[0], mask)


def test_huge_images_are_made_smaller_by_the_mean_of_squares():
    image = torch.randint(0, 256, (3, 7, 9000), dtype=torch.uint8)
    small = shrunk(image, 4)
    assert small.shape == (3, 2, 2250)
    expected = image[:, :4, :4].float().mean(dim=(1, 2)).round()
    assert torch.equal(small[:, 0, 0].float(), expected)
    assert torch.equal(small[:, 1, 0].float(), image[:, 4:, :4].float().mean(dim=(1, 2)).round())  # the rest of it
    found = find_in_whole(oracle, painted((50, 9001), [[4000, 20, 9001, 50]]))
    assert boxes_of(found) == [[4000, 20, 9001, 50]]


def test_pieces_are_compared_with_objects_a_few_at_a_time(monkeypatch):
    chance = torch.Generator().manual_seed(0)

    def some(count, side):
        corners = torch.rand(count, 2, generator=chance) * 100
        sides = (torch.rand(count, 2, generator=chance) + 0.5) * side
        boxes, scores = torch.cat([corners, corners + sides], 1), torch.rand(count, generator=chance)
        levels = torch.full((count,), 2)
        return Detections(boxes, scores, torch.arange(count) % 2, levels, torch.tensor(count), ("a", "b"))

    objects, pieces = some(7, 40), some(50, 8)
    whole, left = absorb(objects, pieces)
    assert 5 < len(left) < 45 and (whole.scores > objects.scores).any()
    monkeypatch.setattr(tiles, "PAIRS", 20)
    raised, rest = absorb(objects, pieces)
    assert torch.equal(raised.scores, whole.scores) and torch.equal(rest.boxes, left.boxes)
    for none in (absorb(objects, some(0, 1)), absorb(some(0, 1), pieces)):
        assert len(none[0]) + len(none[1]) in (7, 50)


def test_pieces_without_a_partner_stay_as_they_are():
    one = seen(painted((200, 200), [[150, 20, 200, 60]]))
    joined, open_ = join(one, torch.tensor([[0, 0]]), torch.tensor([[False, False, True, False]]))
    assert torch.equal(joined.boxes, one.boxes) and open_.tolist() == [True]


# Training on tiles.


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return fpn.data.load(generate(tmp_path_factory.mktemp("data"), 8, (150, 200), seed=3), outlines=True)


def test_tiles_to_train_on_show_what_their_window_does(data):
    split = data["train"]
    tiles, whole = tiles_of(split, 64, 0.25, seed=1), DetectionDataset(split, masks=True)
    samples = TileDataset(tiles, training=True, masks=True)
    assert len(tiles) > len(split) and tiles.files.tolist() == split.files[tiles.owners].tolist()
    for place in range(len(tiles)):
        sample, image = samples[place], whole[int(tiles.owners[place])]
        top, left, height, width = tiles.windows[place].tolist()
        assert torch.equal(sample.image, image.image[:, top : top + height, left : left + width])
        box = image.boxes - torch.tensor([left, top, left, top])
        cut = clip(box, torch.tensor([height, width]))
        share = area(cut.clamp(min=0)) / area(box)
        learnt = (share > 0.999) | ((share >= 0.3) & ((cut[:, 2:] - cut[:, :2]).amin(dim=1) >= 2))
        learnt &= (cut[:, 2:] > cut[:, :2]).all(dim=1)
        torch.testing.assert_close(sample.boxes, cut[learnt], atol=1e-4, rtol=0)
        assert torch.equal(sample.labels, image.labels[learnt])
        expected = image.masks[learnt][:, top : top + height, left : left + width]
        assert (sample.masks != expected).float().mean() < 0.01 if len(expected) else len(sample.masks) == 0
        assert sample.original_size == (height, width)


def test_of_the_tiles_without_an_object_some_are_taken_and_the_others_all(data):
    split = data["train"]
    tiles = tiles_of(split, 48, 0.25, seed=1)
    with_object = np.bincount(tiles.image_of[~tiles.ignore], minlength=len(tiles)) > 0
    assert 0 < (~with_object).sum() <= round(0.25 * with_object.sum())
    found = {(int(owner), *window) for owner, window in zip(tiles.owners, tiles.windows.tolist(), strict=True)}
    assert len(found) == len(tiles)
    for index in range(len(split)):
        boxes = split.boxes[split.rows(index)]
        for top, left, height, width in grid((150, 200), 48, 0.25).windows.tolist():
            inside = (boxes[:, :2] >= [left, top]).all(1) & (boxes[:, 2:] <= [left + width, top + height]).all(1)
            assert not inside.any() or (index, top, left, height, width) in found
        longest = (boxes[:, 2:] - boxes[:, :2]).max()
        assert ((index, 0, 0, 150, 200) in found) == (longest > 12)
    again, other = tiles_of(split, 48, 0.25, seed=1), tiles_of(split, 48, 0.25, seed=2)
    assert np.array_equal(again.windows, tiles.windows) and not np.array_equal(other.windows, tiles.windows)


def test_images_no_larger_than_a_tile_are_trained_on_as_they_are(data):
    split = data["train"]
    tiles = tiles_of(split, 200, 0.2)
    assert tiles.files.tolist() == split.files.tolist() and np.array_equal(tiles.boxes, split.boxes)
    assert np.array_equal(tiles.offsets, split.offsets) and np.array_equal(tiles.areas, split.areas)
    few = tiles.select(np.array([4, 2]), "few")
    assert few.owners.tolist() == [4, 2] and len(few.windows) == 2 and few.whole is split


def test_outlines_given_as_runs_are_cut_with_their_tile():
    column = Column()
    column.add(None)
    column.add({"size": [100, 100], "counts": [5000, 20, 4980]})  # 20 pixels of column 50
    assert not column.broken
    boxes = np.array([[0.0, 0, 30, 30], [50, 0, 51, 20]])
    split = Split(
        "train", ("a",), np.ones(1, np.int64), Path(), np.array(["a.png"]), np.ones(1, np.int64),
        np.array([[100, 100]]), np.array([0, 2]), boxes, np.zeros(2, np.int64), np.array([True, False]),
        np.array([900.0, 20]), column.outlines(),
    )  # fmt: skip
    tiles = tiles_of(split, 60, 0.2)
    windows = [[0, 0, 60, 60], [0, 40, 60, 60], [40, 0, 60, 60], [0, 0, 100, 100]]  # the third has no object
    assert tiles.windows.tolist() == windows
    assert tiles.ignore.tolist() == [True, False, False, True, False] and tiles.offsets.tolist() == [0, 2, 3, 3, 5]
    mask = tiles.outlines.mask(2, tiles.boxes[2], (60, 60))
    assert mask.sum() == 20 and mask[:20, 10].all()


def test_a_detector_that_is_made_for_tiles_finds_trains_and_is_kept_with_them(data, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10**7)
    torch.manual_seed(0)
    keywords = {"backbone": "tiny", "classes": data.classes, "weights": "none", "width": 16, "hidden": 16}
    detector = fpn.build(**keywords, short=64, tile=128, overlap=0.25)
    run = fpn.train(
        detector,
        data,
        out=tmp_path / "run",
        epochs=1,
        batch=16,
        workers=0,
        quiet=True,
        device="cpu",
        augment="light",
        precision="32",
    )
    assert len(run.history) == 1 and "AP" in run.history[0]
    loaded = fpn.load(run.best)
    assert (loaded.spec.tile, loaded.spec.overlap) == (128, 0.25)
    image = fpn.data.read_image(data["val"].path(0))
    found = finder(loaded, "cpu")([image])[0]
    in_tiles = tiled(finder(loaded, "cpu", tile=0), 128, 0.25)([image])[0]
    whole = finder(loaded, "cpu", tile=0)([image])[0]
    assert torch.equal(found.boxes, in_tiles.boxes) and len(found) != len(whole)
    results = detect_split(
        loaded, data["val"], batch=1, device="cpu", workers=0, progress=False, find=finder(loaded, "cpu")
    )
    assert score_for(loaded, data["val"], results)["AP"] == pytest.approx(run.history[0]["AP"], abs=1e-4)
    assert Image.MAX_IMAGE_PIXELS == tiles.PIXELS // 2  # by training

    with pytest.raises(OptionError, match="overlap 0.1: it is of tiles"):
        finder(loaded, "cpu", tile=0, overlap=0.1)
    with pytest.raises(OptionError, match="detect stands in on whole images"):
        detect_split(loaded, data["val"], detect=loaded.detect)
    with pytest.raises(OptionError, match="give --tile 0"):
        watchable(loaded, False)
    assert torch.equal(finder(watchable(loaded, True), "cpu")([image])[0].boxes, whole.boxes)


def test_tiles_a_detector_cannot_have_are_refused():
    with pytest.raises(OptionError, match="tile is 5"):
        fpn.build(classes=["a"], weights="none", tile=5)
    with pytest.raises(OptionError, match="fast_rcnn has no such option"):
        fpn.build("fast_rcnn", classes=["a"], weights="none", tile=800)
    with pytest.raises(OptionError, match="overlap 0.3: it is of tiles"):
        fpn.build(classes=["a"], weights="none", overlap=0.3)
