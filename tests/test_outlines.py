"""Outlines of objects: read, checked, written, turned, and kept in place by everything that is done to images."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_folders import PICTURES, coco_content, save_json, write_coco, write_image, write_voc, write_yolo
from marked_images import assert_sound, marked
from PIL import Image
from pycocotools import mask as api
from torch import Tensor

from fpn.data import DetectionDataset, collate, convert, load, repair, resize_transform, split, training_transform
from fpn.data.augment import Augmentation, Pair, pair_of
from fpn.data.generated import generate
from fpn.data.outlines import Column, Move, fitted, join, resized
from fpn.data.repair import turning
from fpn.errors import DataError
from fpn.rle import encode, mask_of, runs_of, runs_of_mask

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools

TRIANGLE = [8.0, 4.0, 24.0, 4.0, 8.0, 20.0]


@pytest.mark.parametrize("seed", range(30))
def test_run_lengths_are_those_of_pycocotools(seed: int) -> None:
    rng = np.random.default_rng(seed)
    height, width = rng.integers(1, 70, 2).tolist()
    mask = rng.random((height, width)) < rng.choice([0, 0.01, 0.5, 0.99, 1])
    text = api.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()
    assert encode(torch.from_numpy(mask[None])) == [text]
    assert runs_of(text).tolist() == runs_of_mask(mask).tolist()
    assert (mask_of(runs_of(text), (height, width)) == mask).all()


def test_large_differences_of_run_lengths() -> None:
    """By hand: 1000 is 8, 31 from the lowest five bits, the first with the sixth bit set: chr(48 + 40), chr(48 + 31)
    has the fifth bit, a sign, and so a third group of 0 follows."""
    assert runs_of("Xo00").tolist() == [1000, 0]
    assert runs_of("123O").tolist() == [1, 2, 3, 1], "the fourth is the second and the difference -1"
    for text in ("", "P", "Xo", "~", "ö", "o" * 12 + "0"):
        with pytest.raises(ValueError, match="RLE|large"):
            runs_of(text)


def outlined(folder: Path, change: Callable[[list[dict[str, Any]]], None]) -> Path:
    """The COCO test data, with what `change` makes of the annotations of train."""
    write_coco(folder)
    content = coco_content(PICTURES["train"])
    change(content["annotations"])
    save_json(folder / "annotations" / "instances_train.json", content)
    return folder


def test_three_kinds_of_segmentation(tmp_path: Path) -> None:
    """Polygons, runs as numbers and as text: the masks that pycocotools makes of them."""
    expected: list[np.ndarray] = []

    def change(entries: list[dict[str, Any]]) -> None:
        expected[:] = [np.zeros((40, 80), np.uint8), np.zeros((40, 80), np.uint8), np.zeros((80, 40), np.uint8)]
        entries[0]["segmentation"] = [TRIANGLE, [10.0, 30.0, 14.0, 30.0, 14.0, 36.0, 10.0, 36.0]]
        expected[0] = api.decode(api.merge(api.frPyObjects(entries[0]["segmentation"], 40, 80)))
        expected[1][12:30, 45:60] = 1
        entries[1]["segmentation"] = {"size": [40, 80], "counts": runs_of_mask(expected[1]).tolist()}
        expected[2][0:15, 2:9] = 1
        text = api.encode(np.asfortranarray(expected[2]))["counts"].decode()
        entries[2]["segmentation"] = {"size": [80, 40], "counts": text}

    data = load(outlined(tmp_path / "data", change), outlines=True)
    train, outlines = data["train"], data["train"].outlines
    assert outlines is not None and outlines.known.all() and not data.problems
    sizes = [tuple(train.sizes[i].tolist()) for i in train.image_of]
    for row, mask in enumerate(expected):
        assert (outlines.mask(row, train.boxes[row], sizes[row]) == mask).all()
    assert "1 of 1 object of val have no usable outline; their boxes stand in" in data.notes
    box = data["val"].outlines.mask(0, data["val"].boxes[0], (50, 100))
    assert box.sum() == 50 * 20 and (box[10:30, 25:75] == 1).all()
    assert load(tmp_path / "data")["train"].outlines is None, "only where asked for"


@pytest.mark.parametrize(
    ("segmentation", "kind", "text", "left"),
    [
        ([TRIANGLE[:5]], "outline-broken", "odd number of coordinates (5)", False),
        ([TRIANGLE[:4]], "outline-broken", "has 2 points, and needs 3", False),
        ([[*TRIANGLE[:5], float("nan")]], "outline-broken", "not a finite number", False),
        ([[*TRIANGLE[:5], 1e12]], "outline-broken", "far outside of any image", False),
        ([[*TRIANGLE[:5], "x"]], "outline-broken", "that is no number", False),
        ([[*TRIANGLE[:5], 10**400]], "outline-broken", "that is no number", False),
        ([TRIANGLE, TRIANGLE[:4]], "outline-broken", "that part is left out", True),
        ([[-9.0, -9.0, -1.0, -9.0, -1.0, -1.0]], "outline-broken", "lies outside the 80x40 image", False),
        ("here", "outline-broken", "neither polygons nor RLE", False),
        ({"size": [40, 80]}, "outline-broken", "is not RLE", False),
        ({"size": [40, 80], "counts": "Xo"}, "outline-broken", "is not RLE", False),
        ({"size": [40, 80], "counts": [5, 5]}, "outline-broken", "do not add up", False),
        ({"size": [40, 80], "counts": [3205, -5]}, "outline-broken", "do not add up", False),
        ({"size": [80, 40], "counts": [0, 3200]}, "outline-size", "a mask of 40x80 pixels on an image of 80x40", False),
        ({"size": [10**9, 10**9], "counts": [0, 10**18]}, "outline-size", "on an image of 80x40", False),
    ],
)
def test_broken_outlines_are_listed(tmp_path: Path, segmentation: Any, kind: str, text: str, left: bool) -> None:
    """The object stays, with what is left of its outline, or with its box."""

    def change(entries: list[dict[str, Any]]) -> None:
        entries[0]["segmentation"] = segmentation
        entries[1]["segmentation"] = [[40.0, 10.0, 80.0, 10.0, 80.0, 40.0]]

    data = load(outlined(tmp_path / "data", change), outlines=True)
    (problem,) = data.problems
    assert problem.kind == kind and text in problem.text and problem.file == "images/a.png"
    assert "annotation id 1" in problem.text
    train = data["train"]
    assert train.outlines is not None and train.outlines.known.tolist() == [left, True, False]
    mask = train.outlines.mask(0, train.boxes[0], (40, 80))
    assert mask.sum() == (api.decode(api.frPyObjects([TRIANGLE], 40, 80)).sum() if left else 16 * 16)
    assert not load(tmp_path / "data").problems, "who needs no outlines is not told of them"


@pytest.mark.parametrize("nothing", [[], [[]], None, {}])
def test_data_without_outlines(tmp_path: Path, nothing: Any) -> None:
    def change(entries: list[dict[str, Any]]) -> None:
        for entry in entries:
            entry["segmentation"] = nothing

    for folder in (outlined(tmp_path / "coco", change), write_voc(tmp_path / "voc"), write_yolo(tmp_path / "yolo")):
        data = load(folder, outlines=True)
        assert data["train"].outlines is None and not data.problems
        assert not [note for note in data.notes if "outline" in note]
        with pytest.raises(DataError, match="train: has no outlines"):
            DetectionDataset(data["train"], masks=True)


def test_polygons_of_yolo(tmp_path: Path) -> None:
    folder = write_yolo(tmp_path / "yolo")
    label = folder / "labels" / "train" / "a.txt"
    label.write_text("0 0.1 0.1 0.3 0.1 0.1 0.5\n" + label.read_text().splitlines()[1] + "\n")
    train = load(folder, outlines=True)["train"]
    assert train.outlines is not None and train.outlines.known.tolist() == [True, False, False]
    assert train.outlines.segmentation(0) == [pytest.approx([8, 4, 24, 4, 8, 20])]
    assert train.boxes[0].tolist() == pytest.approx([8, 4, 24, 20])


def two_kinds(entries: list[dict[str, Any]]) -> None:
    entries[0]["segmentation"] = [TRIANGLE, [10.25, 30.1, 14.0, 30.0, 14.7, 36.0]]
    mask = np.zeros((80, 40), bool)
    mask[3:15, 2:9] = True
    entries[2]["segmentation"] = {"size": [80, 40], "counts": runs_of_mask(mask).tolist()}


def test_a_copy_keeps_outlines(tmp_path: Path) -> None:
    data = load(outlined(tmp_path / "data", two_kinds), draw=False, outlines=True)
    assert not [text for text in convert(data, tmp_path / "coco", "coco") if "outlines" in text]
    again = load(tmp_path / "coco", draw=False, outlines=True)
    before, after = data["train"].outlines, again["train"].outlines
    assert before is not None and after is not None
    assert [after.segmentation(row) for row in range(3)] == [before.segmentation(row) for row in range(3)]
    assert before.segmentation(0) == [TRIANGLE, [10.25, 30.1, 14.0, 30.0, 14.7, 36.0]] and not before.known[1]
    assert "outlines of 2 objects: only their boxes" in " ".join(convert(data, tmp_path / "voc", "voc"))
    plain = load(tmp_path / "data", draw=False)
    convert(plain, tmp_path / "plain", "coco")
    assert "segmentation" not in (tmp_path / "plain/annotations/instances_train.json").read_text()


def test_dividing_anew_keeps_each_outline_with_its_box(tmp_path: Path) -> None:
    data = load(generate(tmp_path / "data", images=12, size=(64, 96)), outlines=True)
    divided = split(data, 0.3, 0.2, seed=1)
    known = {}
    for part in data.values():
        for row, image in enumerate(part.image_of):
            known[(str(part.files[image]), *part.boxes[row].tolist())] = part.outlines.segmentation(row)
    for part in divided.values():
        for row, image in enumerate(part.image_of):
            assert part.outlines.segmentation(row) == known[(str(part.files[image]), *part.boxes[row].tolist())]
    shared = {id(part.outlines.points) for part in divided.values()}
    assert len(shared) == 1, "selections share the points"


def test_join_of_splits_with_and_without() -> None:
    column = Column()
    column.add([TRIANGLE])
    outlines = column.outlines()
    both = join([(outlines, 1), (None, 2), (outlines, 1)])
    assert both is not None and both.known.tolist() == [True, False, False, True]
    assert both.segmentation(0) == both.segmentation(3) == [TRIANGLE] and len(both.points) == len(outlines.points)
    assert join([(None, 2), (None, 0)]) is None


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_outlines_turn_with_the_image(orientation: int) -> None:
    """As Pillow turns the picture that the mask is."""
    mask = np.zeros((30, 50), np.uint8)
    mask[4:10, 8:40] = 1
    way = {
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    expected = np.asarray(Image.fromarray(mask).transpose(way[orientation]))
    column = Column()
    column.add([[8, 4, 40, 4, 40, 10, 8, 10]])
    column.add({"size": [30, 50], "counts": runs_of_mask(mask).tolist()})
    move = turning(orientation, (30, 50))
    turned = column.outlines().changed({0: move, 1: move})
    for row in (0, 1):
        assert (turned.mask(row, np.zeros(4), (50, 30)) == expected).all()


def test_repair_corrects_outlines_with_sizes(tmp_path: Path) -> None:
    """Of images made half as large after annotating, outlines shrink with the boxes."""

    def change(entries: list[dict[str, Any]]) -> None:
        entries[0]["segmentation"] = [TRIANGLE]
        mask = np.zeros((40, 80), bool)
        mask[10:40, 40:80] = True
        entries[1]["segmentation"] = {"size": [40, 80], "counts": runs_of_mask(mask).tolist()}

    folder = outlined(tmp_path / "data", change)
    write_image(folder / "images" / "a.png", (20, 40))
    done = repair(load(folder, draw=False, outlines=True), tmp_path / "out", workers=1)
    assert "boxes made smaller" in " ".join(map(str, done.changes))
    train = load(tmp_path / "out", draw=False, outlines=True)["train"]
    assert train.outlines is not None and train.outlines.segmentation(0) == [[x / 2 for x in TRIANGLE]]
    mask = train.outlines.mask(1, train.boxes[1], (20, 40))
    assert mask.sum() == 15 * 20 and (mask[5:20, 20:40] == 1).all()


def test_fitting_and_resizing_masks() -> None:
    mask = np.arange(6).reshape(2, 3)
    assert fitted(mask, (3, 2)).tolist() == [[0, 1], [3, 4], [0, 0]]
    assert resized(mask, (4, 3)).tolist() == [[0, 1, 2], [0, 1, 2], [3, 4, 5], [3, 4, 5]]
    assert resized(mask, (1, 1)).tolist() == [[4]], "the pixel in the middle"
    column = Column()
    column.add([])
    assert column.outlines().changed({0: Move(np.copy, np.copy)}).segmentation(0) is None


# Everything that is done to images.


def masked(size: tuple[int, int], rectangles: dict[int, tuple[int, int, int, int]]) -> Pair:
    """`marked`, with masks: each rectangle without its upper left quarter."""
    image, target = marked(size, rectangles)
    masks = torch.zeros(len(rectangles), *size, dtype=torch.uint8)
    pixels = image.as_subclass(Tensor).clone()
    for mask, (x1, y1, x2, y2) in zip(masks, rectangles.values(), strict=True):
        mask[y1:y2, x1:x2] = 1
        mask[y1 : (y1 + y2) // 2, x1 : (x1 + x2) // 2] = 0
        pixels[:, y1 : (y1 + y2) // 2, x1 : (x1 + x2) // 2] = 0
    return pair_of(pixels, target["boxes"].as_subclass(Tensor), target["labels"], masks)


def colour_share(pair: Pair) -> float:
    """How much of the pixels of all masks have a colour rather than the black around, at the least of the objects."""
    image, masks = pair[0].as_subclass(Tensor).float().amax(dim=0), pair[1]["masks"].as_subclass(Tensor).bool()
    return min([float((image[mask] > 60).float().mean()) for mask in masks if mask.sum() > 50] or [1.0])


@pytest.mark.parametrize(
    "chosen",
    [
        Augmentation(flip=1.0),
        Augmentation(vertical_flip=1.0, crop=1.0),
        Augmentation(lsj=(0.4, 2.5)),
        Augmentation(lsj=(0.4, 2.5), crop=0.5, mosaic=1.0, flip=0.5),
        Augmentation(copy_paste=1.0),
        Augmentation(mixup=1.0),
    ],
    ids=["flip", "crop", "lsj", "mosaic", "copy-paste", "mixup"],
)
def test_masks_stay_on_their_objects(chosen: Augmentation) -> None:
    """The colours under a mask are its object's. And boxes, labels and pixels are to the bit those without masks."""
    rectangles = {0: (10, 12, 60, 70), 1: (80, 20, 140, 90), 2: (20, 85, 70, 120)}
    first, second = masked((128, 160), rectangles), masked((100, 90), {3: (20, 20, 70, 80)})
    transform, mixing = training_transform(chosen, (96, 128), 220, epochs=4)
    for seed in range(12):
        results = []
        for with_masks in (True, False):
            pairs = [(i, t if with_masks else {n: t[n] for n in ("boxes", "labels")}) for i, t in (first, second)]
            torch.manual_seed(seed)
            results.append(mixing(pairs[0], lambda p=pairs: p[1]) if mixing else transform(*pairs[0]))
        (image, target), (same, plain_target) = results
        assert_sound((image, target), smallest=1.0)
        assert target["masks"].shape == (len(target["boxes"]), *image.shape[1:]) and "masks" not in plain_target
        assert colour_share((image, target)) > 0.9, seed
        if len(target["boxes"]) == len(plain_target["boxes"]):
            assert torch.equal(image, same) and torch.equal(target["boxes"], plain_target["boxes"])
        for box, mask in zip(target["boxes"].tolist(), target["masks"].as_subclass(Tensor), strict=True):
            y, x = mask.nonzero(as_tuple=True)
            inside = (x >= box[0] - 1.5) & (x < box[2] + 1.5) & (y >= box[1] - 1.5) & (y < box[3] + 1.5)
            assert inside.all(), (seed, box)


def test_an_object_without_a_pixel_in_the_window_goes() -> None:
    """Of a long diagonal the box may be half in view and the object not at all."""
    image, masks = torch.zeros(3, 100, 100, dtype=torch.uint8), torch.zeros(2, 100, 100, dtype=torch.uint8)
    masks[0, 95:, 95:], masks[1, :50, :50] = 1, 1
    boxes = torch.tensor([[0.0, 0.0, 100.0, 100.0], [0.0, 0.0, 50.0, 50.0]])
    pair = pair_of(image, boxes, torch.tensor([0, 1]), masks)
    transform, _ = training_transform(Augmentation(crop=1.0), (64,), 128, epochs=1)
    seen = set()
    for seed in range(20):
        torch.manual_seed(seed)
        _, target = transform(*pair)
        assert (target["masks"].as_subclass(Tensor).flatten(1).sum(1) > 0).all()
        seen.add(tuple(target["labels"].tolist()))
    assert {(1,), (0, 1)} <= seen


def test_samples_and_batches_with_masks(tmp_path: Path) -> None:
    data = load(generate(tmp_path / "data", images=6, size=(64, 96)), outlines=True)
    train = data["train"]
    dataset = DetectionDataset(train, resize_transform(32, 64), masks=True)
    plain = DetectionDataset(train, resize_transform(32, 64))
    samples = [dataset[index] for index in range(3)]
    for index, sample in enumerate(samples):
        other = plain[index]
        assert sample is not None and other is not None and sample.masks is not None and other.masks is None
        assert sample.masks.shape == (len(sample.boxes), 32, 48)
        assert torch.equal(sample.image, other.image) and torch.equal(sample.boxes, other.boxes)
    batch = collate(samples)
    assert batch is not None and batch.targets is not None and batch.targets.masks is not None
    most = max(len(sample.boxes) for sample in samples if sample is not None)
    assert batch.targets.masks.shape == (3, most, 32, 64) and batch.targets.masks.dtype == torch.uint8
    assert not batch.targets.masks[~batch.targets.valid].any() and not batch.targets.masks[..., 48:].any()
    without = collate([plain[0]])
    assert without is not None and without.targets is not None and without.targets.masks is None


def test_ignored_objects_have_no_mask_in_samples(tmp_path: Path) -> None:
    def change(entries: list[dict[str, Any]]) -> None:
        two_kinds(entries)
        entries[0]["iscrowd"] = 1

    train = load(outlined(tmp_path / "data", change), outlines=True)["train"]
    sample = DetectionDataset(train, masks=True)[0]
    assert sample is not None and sample.masks is not None and len(sample.masks) == 1
    assert sample.masks[0].sum() == 40 * 30, "the second object of the image, whose box stands in"


def test_generated_outlines_fill_their_boxes(tmp_path: Path) -> None:
    """Boxes are the tight boxes of the visible pixels, and those are the outline."""
    folder = generate(tmp_path / "data", images=6, size=(64, 96))
    content = json.loads((folder / "annotations" / "instances_train.json").read_text())
    for entry in content["annotations"]:
        assert api.toBbox(entry["segmentation"]).tolist() == entry["bbox"]
