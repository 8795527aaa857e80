"""Several images in one: worked mosaics, boxes that stay on their objects, partners, and runs that repeat."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from data_folders import Picture, write_coco
from marked_images import COLOURS, assert_in_place, assert_sound, extent, marked
from PIL import Image
from torch import Tensor

import fpn.data
from fpn.data import PRESETS, Augmentation, DetectionDataset, Split, loader, training_transform
from fpn.data import mixing as parts
from fpn.data.augment import pair_of
from fpn.data.mixing import copy_paste, covered, mixup, mosaic

EVERYTHING = Augmentation(0.5, 0.5, (0.5, 2.0), 0.5, 0.3, 0.5, 0.5, 0.5)


def one_colour(label: int, size: tuple[int, int] = (50, 50)):
    return marked(size, {label: (0, 0, size[1], size[0])})


# Mosaic


def test_a_mosaic_of_four_images_of_one_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "TILE", (0.5, 0.5))
    torch.manual_seed(0)
    image, target = mosaic([one_colour(label) for label in range(4)], (100, 100), [1.0] * 4)
    assert sorted(target["labels"].tolist()) == [0, 1, 2, 3]
    corners = set()
    for box, label in zip(target["boxes"].tolist(), target["labels"].tolist(), strict=True):
        x, y = int(box[0]), int(box[1])
        corners.add((x, y))
        assert box == [x, y, x + 50, y + 50]
        tile = image[:, y : y + 50, x : x + 50].as_subclass(Tensor)
        assert (tile == COLOURS[label][:, None, None]).all()
    assert corners == {(0, 0), (50, 0), (0, 50), (50, 50)}


def test_boxes_of_a_mosaic_stay_on_their_objects() -> None:
    sources = [
        marked((60, 90), {0: (20, 20, 50, 45)}),
        marked((90, 60), {1: (5, 50, 40, 80)}),
        marked((40, 40), {2: (0, 0, 40, 25)}),
        marked((200, 300), {3: (150, 60, 260, 160)}),
    ]
    for seed in range(30):
        torch.manual_seed(seed)
        scales = (torch.rand(4) + 0.5).tolist()
        mixed = mosaic(sources, (96, 128), scales)
        assert mixed[0].shape == (3, 96, 128)
        assert_sound(mixed)
        assert_in_place(mixed)


def test_tiles_are_covered_where_the_images_are_large_enough() -> None:
    for seed in range(20):
        torch.manual_seed(seed)
        image, _ = mosaic([one_colour(0, (80, 120))] * 4, (96, 144), [0.5] * 4)  # tiles need up to 0.84
        assert (image.as_subclass(Tensor) == COLOURS[0][:, None, None]).all()


# Mixup


def test_mixup_blends_pixels_and_joins_boxes() -> None:
    first, second = marked((10, 20), {0: (0, 0, 10, 10)}), marked((10, 20), {2: (5, 0, 20, 10)})
    image, target = mixup(first, second, 0.4)
    assert image.dtype == torch.uint8
    assert image[:, 0, 0].tolist() == [153, 0, 0] and image[:, 0, 7].tolist() == [153, 0, 102]
    assert image[:, 0, 15].tolist() == [0, 0, 102]
    assert target["boxes"].tolist() == [[0, 0, 10, 10], [5, 0, 20, 10]] and target["labels"].tolist() == [0, 2]


# Copy-paste


def test_pasted_pixels_are_the_source_s() -> None:
    noise = torch.randint(0, 256, (3, 60, 60), dtype=torch.uint8)
    source = pair_of(noise, torch.tensor([[10.0, 20.0, 30.0, 35.0]]), torch.tensor([4]))
    empty = marked((80, 90), {})
    torch.manual_seed(2)
    image, target = copy_paste(empty, source, 1.0)
    ((x1, y1, x2, y2),) = target["boxes"].int().tolist()
    assert (x2 - x1, y2 - y1) == (20, 15) and target["labels"].tolist() == [4]
    assert torch.equal(image[:, y1:y2, x1:x2].as_subclass(Tensor), noise[:, 20:35, 10:30])
    assert int((image != 0).any(dim=0).sum()) <= 20 * 15  # the rest is as it was
    assert not empty[0].any()  # also in the image that was given


def test_an_object_of_the_source_that_lies_in_the_rectangle_comes_with_its_box() -> None:
    boxes = torch.tensor([[10.0, 10, 40, 40], [20, 20, 30, 30]])
    source = pair_of(torch.zeros(3, 60, 60, dtype=torch.uint8), boxes, torch.tensor([0, 1]))
    found = []
    for seed in range(20):
        torch.manual_seed(seed)
        _, target = copy_paste(marked((100, 100), {}), source, 1.0)
        rows = dict(zip(target["labels"].tolist(), target["boxes"].tolist(), strict=False))
        if target["labels"].tolist()[:2] == [0, 1]:  # the large one first, with the small one inside
            found.append([inner - outer for inner, outer in zip(rows[1], rows[0], strict=True)])
    assert found


def test_what_a_rectangle_leaves_of_boxes() -> None:
    boxes = torch.tensor([[10.0, 10, 30, 30], [10, 10, 20, 20], [40, 40, 60, 60], [0, 0, 10, 40], [12, 5, 18, 35]])
    left, hidden = covered(boxes, torch.tensor([5, 5, 20, 35]))
    assert left.tolist() == [
        [20, 10, 30, 30],  # the left half is gone over the whole height
        [20, 20, 10, 10],  # all of it is gone: nothing is left
        [40, 40, 60, 60],  # untouched
        [0, 0, 10, 40],  # a bite out of the right side
        [18, 35, 12, 5],
    ]
    assert hidden.tolist() == [200, 100, 0, 150, 180]


def test_pasting_keeps_boxes_on_what_can_be_seen() -> None:
    scene = marked((100, 120), {0: (10, 10, 60, 50), 1: (70, 10, 110, 90), 2: (10, 60, 60, 95)})
    source = marked((60, 60), {3: (10, 10, 55, 55)})
    cut, pasted = 0, 0
    for seed in range(40):
        torch.manual_seed(seed)
        mixed = copy_paste(scene, source, 1.0)
        assert_sound(mixed)
        assert_in_place(mixed)
        boxes, labels = mixed[1]["boxes"], mixed[1]["labels"].tolist()
        assert labels[:3] == [0, 1, 2]
        pasted += 3 in labels
        cut += not torch.equal(boxes[:3].as_subclass(Tensor), scene[1]["boxes"].as_subclass(Tensor))
        for label, (x1, y1, x2, y2) in enumerate(scene[1]["boxes"].int().tolist()):
            seen = (mixed[0].as_subclass(Tensor) == COLOURS[label][:, None, None]).all(dim=0).sum()
            assert seen >= 0.3 * (x2 - x1) * (y2 - y1)
    assert pasted == 40 and cut > 3


def test_nothing_to_paste_or_no_place_for_it() -> None:
    scene = marked((50, 50), {0: (10, 10, 30, 30)})
    for source in (marked((50, 50), {}), marked((50, 50), {1: (0, 0, 50, 40)}), marked((50, 50), {1: (3, 3, 4, 4)})):
        image, target = copy_paste(scene, source, 1.0)
        assert torch.equal(image, scene[0]) and target["labels"].tolist() == [0]
    crowded = {0: (0, 0, 5, 5), 1: (6, 0, 11, 5), 2: (0, 6, 5, 11), 3: (6, 6, 11, 11)}
    _, target = copy_paste(marked((11, 11), crowded), marked((50, 50), {4: (0, 0, 5, 5)}), 1.0)
    assert {0, 1, 2, 3} <= set(target["labels"].tolist())


# In the data set


@pytest.fixture
def split(tmp_path: Path) -> Split:
    """Eight images of noise, wide, tall and one without objects."""
    sizes = [(40, 60 + i) if i % 3 else (60 + i, 40) for i in range(8)]
    boxes = (("cat", 5.0, 5.0, 30.0, 30.0), ("dog", 10.0, 20.0, 40.0, 40.0))
    pictures = tuple(Picture(f"{i}.png", size, boxes[: i % 3]) for i, size in enumerate(sizes))
    return fpn.data.load(write_coco(tmp_path, {"train": pictures, "val": pictures[:1]}))["train"]


def dataset(split: Split, chosen: Augmentation, epochs: int = 100) -> DetectionDataset:
    transform, mixing = training_transform(chosen, (64,), 107, epochs)
    return DetectionDataset(split, transform, training=True, seed=3, mixing=mixing)


@pytest.mark.parametrize(
    "chosen",
    [PRESETS["strong"], EVERYTHING, *(Augmentation(**{n: 1.0}) for n in ("mosaic", "mixup", "copy_paste"))],
    ids=["strong", "everything", "mosaic", "mixup", "copy_paste"],
)
def test_samples_are_sound_and_keep_the_shape_of_their_image(chosen: Augmentation, split: Split) -> None:
    samples = dataset(split, chosen)
    for item in [(epoch, index) for epoch in range(4) for index in range(8)]:
        sample = samples[item]
        assert sample is not None and sample.index == item[1]
        assert_sound(pair_of(sample.image, sample.boxes, sample.labels))
        height, width = split.sizes[sample.index].tolist()
        assert sample.original_size == (height, width)
        assert (sample.image.shape[2] >= sample.image.shape[1]) == (width >= height)
        assert len(sample.boxes) or not split.rows(sample.index).stop - split.rows(sample.index).start


def test_the_last_epochs_show_images_alone(split: Split) -> None:
    samples = dataset(split, Augmentation(mosaic=1.0), epochs=12)
    assert samples.mixing is not None and samples.mixing.until == 10
    plain = dataset(split, Augmentation())
    for epoch, alone in ((0, False), (9, False), (10, True), (11, True)):
        same = [torch.equal(samples[(epoch, i)].image, plain[(epoch, i)].image) for i in range(8)]
        assert all(same) if alone else not any(same)
    assert training_transform(PRESETS["strong"], (64,), 107, 1)[1].until == 0
    assert training_transform(PRESETS["light"], (64,), 107, 12)[1] is None


def test_runs_repeat_whatever_the_number_of_workers_and_where_they_begin(split: Split) -> None:
    transform, mixing = training_transform(EVERYTHING, (48, 64), 107, 4)

    def run(workers: int, seed: int = 5) -> list[Tensor]:
        torch.manual_seed(workers)  # must not matter
        batches = loader(split, transform, 2, training=True, seed=seed, workers=workers, mixing=mixing)
        found = []
        for epoch in range(2):
            batches.batch_sampler.set_epoch(epoch)  # pyright: ignore
            found += [value.clone() for batch in batches for value in (batch.images, batch.targets.boxes)]
        return found

    alone, workers, other = run(0), run(2), run(0, seed=6)
    assert len(alone) == len(workers) == 2 * 4 * 2
    assert all(torch.equal(a, b) for a, b in zip(alone, workers, strict=True))
    assert any(a.shape != b.shape or not torch.equal(a, b) for a, b in zip(alone, other, strict=True))

    fresh, used = dataset(split, EVERYTHING), dataset(split, EVERYTHING)
    for index in range(8):
        used[(0, index)]
    assert torch.equal(fresh[(1, 4)].image, used[(1, 4)].image)


def test_partners_come_from_the_whole_split(tmp_path: Path) -> None:
    pictures = tuple(Picture(f"{i}.png", (64, 64), ((("cat", "dog")[i % 2], 0, 0, 64, 64),)) for i in range(6))
    split = fpn.data.load(write_coco(tmp_path, {"train": pictures, "val": pictures[:1]}))["train"]
    for i in range(6):
        Image.fromarray(np.full((64, 64, 3), 40 * i, dtype=np.uint8)).save(split.path(i))
    samples = dataset(split, Augmentation(mosaic=1.0))
    seen = {value for epoch in range(12) for value in samples[(epoch, 0)].image.unique().tolist()}
    assert seen == {0, 40, 80, 120, 160, 200}
    for epoch in range(5):  # a label says of which image a box is: odd greys are dogs
        sample = samples[(epoch, 0)]
        for (x1, y1, x2, y2), label in zip(sample.boxes.int().tolist(), sample.labels.tolist(), strict=True):
            assert int(sample.image[0, (y1 + y2) // 2, (x1 + x2) // 2]) // 40 % 2 == label


def test_an_unreadable_partner_costs_nothing(split: Split) -> None:
    samples = dataset(split, EVERYTHING)
    for index in range(1, 8):
        split.path(index).write_bytes(b"")
    with pytest.warns(UserWarning, match=r"\.png.*; it is not mixed into others"):
        found = [samples[(epoch, 0)] for epoch in range(20)]
    assert all(sample is not None and sample.index == 0 for sample in found)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # each file has been warned of
        samples[(0, 0)]


def test_a_data_set_of_one_image(split: Split) -> None:
    samples = dataset(split.select(np.array([2]), "train"), EVERYTHING)
    for epoch in range(20):
        sample = samples[(epoch, 0)]
        assert_sound(pair_of(sample.image, sample.boxes, sample.labels))
        assert len(sample.boxes)


def test_crowds_are_not_mixed_in(split: Split) -> None:
    ignored = replace(split, ignore=np.ones(len(split.labels), dtype=bool))
    samples = dataset(ignored, EVERYTHING)
    assert not any(len(samples[(epoch, index)].boxes) for epoch in range(2) for index in range(8))


def test_thousands_of_boxes() -> None:
    torch.manual_seed(0)
    corners = torch.rand(5000, 2) * 300
    boxes = torch.cat([corners, corners + 3 + 20 * torch.rand(5000, 2)], dim=1)
    crowded = pair_of(torch.zeros(3, 330, 330, dtype=torch.uint8), boxes.clamp(max=330), torch.zeros(5000).long())
    _, mixing = training_transform(replace(EVERYTHING, mosaic=1.0, mixup=1.0, copy_paste=1.0), (320,), 533, 100)
    for seed in range(2):
        torch.manual_seed(seed)
        mixed = mixing(crowded, lambda: crowded)
        assert_sound(mixed)
        assert len(mixed[1]["boxes"]) > 2000


def test_images_of_extreme_shapes() -> None:
    long, wide = marked((1, 4000), {0: (0, 0, 4000, 1)}), marked((60, 90), {1: (20, 20, 50, 45)})
    _, mixing = training_transform(replace(EVERYTHING, mosaic=0.7, mixup=0.7, copy_paste=0.7), (64,), 107, 100)
    for seed in range(12):
        for first, second in ((long, wide), (wide, long), (long, long)):
            torch.manual_seed(seed)
            mixed = mixing(first, lambda other=second: other)
            assert_sound(mixed, smallest=0.0)
            assert len(mixed[1]["boxes"])


def test_bloodcells(shared: Path) -> None:
    split = fpn.data.load(shared / "data" / "bccd")["train"]
    samples = dataset(split, PRESETS["strong"])
    counts = []
    for index in range(12):
        sample = samples[(0, index)]
        assert_sound(pair_of(sample.image, sample.boxes, sample.labels))
        counts.append(len(sample.boxes))
    assert min(counts) >= 1 and max(counts) > 20
    assert extent(samples[(0, 0)].image, 3) is None  # no pure yellow under a microscope
