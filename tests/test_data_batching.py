"""From a split to batches: samples, padding, grouping, sharding, and runs that repeat."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from data_folders import PICTURES, Picture, coco_content, save_json, write_coco, write_image
from PIL import Image

import fpn.data
from fpn.data import (
    Augmentation,
    DetectionDataset,
    GroupedBatches,
    Split,
    batching,
    collate,
    loader,
    resize_transform,
    train_transform,
    training_transform,
)
from fpn.data.dataset import SavedRegions
from fpn.data.mixing import Mixing
from fpn.errors import DataError, OptionError
from fpn.exporting.scenes import scene
from fpn.structures import Batch, Sample


@pytest.fixture
def split(tmp_path: Path) -> Split:
    return fpn.data.load(write_coco(tmp_path))["train"]


def many(number: int, tall: int = 0) -> Split:
    """A split of `number` images, the first `tall` of them upright; there are no files."""
    heights = np.arange(number) + 100
    widths = np.where(np.arange(number) < tall, heights // 2, heights * 2)
    none = np.zeros(0)
    return Split(
        name="train",
        classes=("cat",),
        category_ids=np.array([1]),
        root=Path("nowhere"),
        files=np.array([f"{index}.png" for index in range(number)], dtype=np.str_),
        image_ids=np.arange(number),
        sizes=np.stack([heights, widths], axis=1),
        offsets=np.zeros(number + 1, dtype=np.int64),
        boxes=none.reshape(0, 4),
        labels=none.astype(np.int64),
        ignore=none.astype(bool),
        areas=none,
    )


def sample(height: int, width: int, boxes: Sequence[Sequence[float]], index: int = 0) -> Sample:
    image = torch.full((3, height, width), 7, dtype=torch.uint8)
    values = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return Sample(image, values, torch.arange(len(values)), index, (height * 2, width * 2))


def contents(batch: Batch) -> list[torch.Tensor]:
    assert batch.targets is not None
    return [batch.images, batch.sizes, batch.indices, batch.targets.boxes, batch.targets.labels]


# Samples


def test_sample(split: Split) -> None:
    first = DetectionDataset(split, resize_transform(20, 100), training=False)[0]
    assert first is not None
    assert first.image.dtype == torch.uint8 and first.image.shape == (3, 20, 40)
    assert first.boxes.dtype == torch.float32 and first.boxes.tolist() == [[4, 2, 12, 10], [20, 5, 40, 20]]
    assert first.labels.tolist() == [0, 1]
    assert (first.index, first.original_size) == (0, (40, 80))
    assert type(first.image) is type(first.boxes) is torch.Tensor


def test_ignored_boxes_are_not_learnt_and_negatives_are_samples(split: Split) -> None:
    split = replace(split, ignore=np.array([True, False, True]))
    samples = [DetectionDataset(split, None, training)[index] for training in (True, False) for index in range(3)]
    boxes = [item.boxes.tolist() for item in samples if item is not None]
    assert boxes == [[[40, 10, 80, 40]], [], []] * 2
    assert all(item is not None and item.boxes.shape[1:] == (4,) for item in samples)


def test_boxes_without_size_after_a_transform_are_dropped(split: Split) -> None:
    def shrink(image, target):
        boxes = target["boxes"].clone()
        boxes[0, 2] = boxes[0, 0]
        return image, {**target, "boxes": boxes}

    first = DetectionDataset(split, shrink, training=True)[0]
    assert first is not None and first.labels.tolist() == [1]


@pytest.mark.parametrize("size", [(1, 1), (20, 4000), (4000, 1)])
def test_extreme_images(size: tuple[int, int], tmp_path: Path) -> None:
    height, width = size
    picture = Picture("a.png", size, (("cat", 0, 0, width, height), ("dog", 0, 0, 1, 1)))
    split = fpn.data.load(write_coco(tmp_path, {"val": (picture,)}))["val"]
    batch = collate([DetectionDataset(split, train_transform((64,), 100, jitter=0.2), training=True)[0]])
    assert batch is not None and batch.targets is not None
    boxes = batch.targets.boxes[0, batch.targets.valid[0]]
    assert len(boxes) == 2 and ((boxes[:, 2:] - boxes[:, :2]) > 0).all()


def test_exif_rule(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees: stored 10 high and 30 wide, displayed 30 high and 10 wide
    write_coco(tmp_path, {"val": (Picture("a.jpg"), Picture("b.jpg"), Picture("c.jpg"))})
    content = coco_content(tuple(Picture(name, boxes=(("cat", 1, 1, 5, 5),)) for name in ("a.jpg", "b.jpg", "c.jpg")))
    for entry, (height, width) in zip(content["images"], [(30, 10), (10, 30), (300, 100)], strict=True):
        entry |= {"height": height, "width": width}
        Image.new("RGB", (30, 10)).save(tmp_path / "images" / entry["file_name"], exif=exif)
    save_json(tmp_path / "annotations" / "instances_val.json", content)
    dataset = DetectionDataset(fpn.data.load(tmp_path)["val"], None, training=False)

    sizes = [item.original_size for item in (dataset[0], dataset[1]) if item is not None]
    assert sizes == [(30, 10), (10, 30)]  # the second was annotated by a tool that knows no EXIF
    with pytest.warns(UserWarning, match=r"c\.jpg: is 10x30, but annotated as 100x300"):
        third = dataset[2]
    assert third is not None and third.original_size == (30, 10)


def test_unreadable_images(split: Split) -> None:
    split.path(0).write_bytes(split.path(0).read_bytes()[:60])
    training = DetectionDataset(split, None, training=True)
    with pytest.warns(UserWarning, match=r"a\.png.*; the next image takes its place"):
        instead = training[0]
    assert instead is not None and instead.index == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a second warning would be one too many
        assert training[0] is not None
    evaluation = DetectionDataset(split, None, training=False)
    with pytest.warns(UserWarning, match=r"a\.png.*; it is left out"):
        assert evaluation[0] is None

    for index in range(3):
        split.path(index).write_bytes(b"")
    with (
        pytest.warns(UserWarning, match="not an image"),
        pytest.raises(DataError, match=r"b\.png and the 2 images after it cannot be read"),
    ):
        training[1]


# Large JPEG files


def large(folder: Path, size: tuple[int, int] = (600, 800), boxes: int = 3, name: str = "a.jpg") -> Split:
    """One image with random boxes, which the transforms of these tests make 6 times smaller."""
    chance, limit = np.random.default_rng(0), np.array(size[::-1])
    low = chance.integers(0, limit, (boxes, 2))
    corners = np.concatenate([low, low + chance.integers(1, limit - low + 1)], axis=1)
    picture = Picture(name, size, tuple(("cat", *row) for row in corners.tolist()))
    write_coco(folder, {"val": (picture,)})
    Image.fromarray(scene(size, 0).permute(1, 2, 0).numpy()).save(folder / "images" / name, quality=95)
    return fpn.data.load(folder)["val"]


def both(
    split: Split, monkeypatch: pytest.MonkeyPatch, training: bool = True, mixing: Mixing | None = None
) -> tuple[Sample, Sample]:
    """The sample as it is made, and as it would be of the whole image."""
    dataset = DetectionDataset(split, train_transform((60, 100), 150, jitter=0.2), training, seed=4, mixing=mixing)
    with monkeypatch.context() as patched:
        patched.setattr(batching, "shrink_for", lambda size, wanted: 1)
        whole = dataset[0]
    sample = dataset[0]
    assert sample is not None and whole is not None
    return sample, whole


@pytest.mark.parametrize(("size", "boxes"), [((600, 800), 0), ((600, 800), 3), ((800, 600), 5000), ((20, 4000), 3)])
def test_large_files_in_training_are_decoded_smaller(
    size: tuple[int, int], boxes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = large(tmp_path, size, boxes)
    regions = SavedRegions(np.array([0, 1]), np.array([[8, 4, 200, 404]], np.float32), np.ones(1, np.float32))
    sample, whole = both(replace(split, regions=regions), monkeypatch)
    assert sample.original_size == whole.original_size == size
    assert torch.equal(sample.boxes, whole.boxes) and torch.equal(sample.labels, whole.labels)
    assert sample.regions is not None and whole.regions is not None and torch.equal(sample.regions, whole.regions)
    apart = (sample.image.float() - whole.image.float()).abs()
    assert 0 < apart.mean() < 0.7 and apart.max() < 40


def test_where_large_files_are_decoded_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split = large(tmp_path / "jpeg")
    _, mixing = training_transform(Augmentation(mixup=1.0), (100,), 150, epochs=10)
    for given, training, mixed in (
        (split, False, None),
        (split, True, mixing),
        (large(tmp_path / "odd", (599, 800)), True, None),
        (large(tmp_path / "png", name="a.png"), True, None),
        (large(tmp_path / "pixel", (1, 1)), True, None),
    ):
        sample, whole = both(given, monkeypatch, training, mixed)
        assert torch.equal(sample.image, whole.image) and torch.equal(sample.boxes, whole.boxes)
        assert sample.original_size == tuple(given.sizes[0])

    wrong = replace(split, sizes=split.sizes * 2)  # its size is that of the file, however it is decoded
    with pytest.warns(UserWarning, match=r"a\.jpg: is 800x600, but annotated as 1600x1200"):
        sample, whole = both(wrong, monkeypatch)
    assert torch.equal(sample.image, whole.image) and sample.original_size == (600, 800)


def test_a_large_file_that_is_cut_off_is_named(tmp_path: Path) -> None:
    split = large(tmp_path)
    split.path(0).write_bytes(split.path(0).read_bytes()[:4000])
    dataset = DetectionDataset(split, train_transform((100,), 150), training=True)
    with pytest.warns(UserWarning, match=r"a\.jpg: cannot be read"), pytest.raises(DataError):
        dataset[0]


# Batches


def test_collate_pads_right_and_below() -> None:
    batch = collate([sample(30, 50, [[1, 2, 3, 4]], 5), None, sample(40, 20, [[0, 0, 5, 5], [1, 1, 9, 9]], 3)])
    assert batch is not None and batch.targets is not None
    assert batch.images.shape == (2, 3, 64, 64) and batch.images.dtype == torch.uint8
    assert batch.images.is_contiguous(
        memory_format=torch.channels_last
    )  # as decoded pixels lie, so that rows are copied
    for image, (height, width) in zip(batch.images, [(30, 50), (40, 20)], strict=True):
        assert (image[:, :height, :width] == 7).all()
        assert int(image.sum()) == 7 * 3 * height * width  # zero elsewhere
    assert batch.sizes.tolist() == [[30, 50], [40, 20]]
    assert batch.original_sizes.tolist() == [[60, 100], [80, 40]]
    assert batch.indices.tolist() == [5, 3]
    assert batch.targets.valid.tolist() == [[True, False], [True, True]]
    assert batch.targets.boxes.tolist() == [[[1, 2, 3, 4], [0, 0, 0, 0]], [[0, 0, 5, 5], [1, 1, 9, 9]]]
    assert batch.targets.labels.tolist() == [[0, 0], [0, 1]]


def test_collate_degenerate() -> None:
    assert collate([]) is None and collate([None, None]) is None
    batch = collate([sample(32, 64, [])], multiple=32)
    assert batch is not None and batch.targets is not None
    assert batch.images.shape == (1, 3, 32, 64)
    assert batch.targets.boxes.shape == (1, 1, 4) and not batch.targets.valid.any()
    odd = collate([sample(33, 65, [])], multiple=1)
    assert odd is not None and odd.images.shape == (1, 3, 33, 65)


# Order


@pytest.mark.parametrize("world", [1, 2, 3])
def test_training_batches_cover_everything_and_group_by_shape(world: int) -> None:
    split = many(53, tall=19)
    samplers = [GroupedBatches(split, 4, True, seed=3, rank=rank, world=world) for rank in range(world)]
    ranks = [list(sampler) for sampler in samplers]
    assert {len(batches) for batches in ranks} == {len(samplers[0])}  # as many on each rank
    batches = [[index for _, index in batch] for rank in ranks for batch in rank]
    counts = Counter(index for batch in batches for index in batch)
    assert set(counts) == set(range(53))
    if world == 1:
        assert set(counts.values()) == {1}
    assert sum(counts.values()) < 53 + 4 * world
    mixed = [batch for batch in batches if len({index < 19 for index in batch}) == 2]
    assert len({tuple(batch) for batch in mixed}) <= 1  # the rest of both groups shares a batch


def test_training_order_follows_seed_and_epoch() -> None:
    split = many(20)
    first, again, other = (GroupedBatches(split, 4, True, seed) for seed in (1, 1, 2))
    assert list(first) == list(again) != list(other)
    before = [index for batch in first for _, index in batch]
    first.set_epoch(1)
    assert {epoch for batch in first for epoch, _ in batch} == {1}
    assert [index for batch in first for _, index in batch] != before
    assert first.sampler is first  # where Lightning looks for set_epoch


def test_drop_last_gives_full_batches_only() -> None:
    for world in (1, 2):
        batches = [
            batch for rank in range(world) for batch in GroupedBatches(many(23, 9), 4, True, 0, rank, world, True)
        ]
        assert {len(batch) for batch in batches} == {4} and len(batches) % world == 0
        assert max(Counter(index for batch in batches for _, index in batch).values()) == 1
    with pytest.raises(OptionError, match="3 images do not fill a batch of 4"):
        GroupedBatches(many(3), 4, True, drop_last=True)


@pytest.mark.parametrize(("number", "world"), [(53, 1), (53, 2), (53, 3), (8, 4), (3, 4), (1, 2), (0, 1)])
def test_evaluation_sees_each_image_once(number: int, world: int) -> None:
    split = many(number, tall=number // 3)
    samplers = [GroupedBatches(split, 4, False, rank=rank, world=world) for rank in range(world)]
    ranks = [list(sampler) for sampler in samplers]
    assert {len(batches) for batches in ranks} == {len(samplers[0])}
    assert sorted(index for rank in ranks for batch in rank for _, index in batch) == list(range(number))
    assert all(len(batch) <= 4 for rank in ranks for batch in rank)


def test_evaluation_puts_similar_sizes_together() -> None:
    (*batches,) = GroupedBatches(many(16, tall=8), 4, False)
    assert all(len({index < 8 for _, index in batch}) == 1 for batch in batches)


def test_options_that_cannot_work(split: Split) -> None:
    for wrong in ({"batch_size": 0}, {"rank": 2, "world": 2}, {"rank": -1}):
        with pytest.raises(OptionError):
            GroupedBatches(split, **{"batch_size": 2, "shuffle": True, **wrong})
    with pytest.raises(OptionError):
        loader(split, None, 2, training=True, workers=-1)


# All together


def test_runs_repeat_whatever_the_number_of_workers(tmp_path: Path) -> None:
    pictures = tuple(Picture(f"{index}.png", (30 + index, 40), (("cat", 2, 3, 20, 9),)) for index in range(7))
    split = fpn.data.load(write_coco(tmp_path, {"val": pictures}))["val"]
    transform = train_transform((24, 32, 40), 100, jitter=0.3)

    def run(workers: int, seed: int = 5) -> list[torch.Tensor]:
        torch.manual_seed(workers)  # must not matter
        batches = loader(split, transform, 2, training=True, seed=seed, workers=workers)
        found = []
        for epoch in range(2):
            batches.batch_sampler.set_epoch(epoch)  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]
            found += [value.clone() for batch in batches for value in contents(batch)]
        return found

    alone, workers = run(0), run(2)
    assert len(alone) == len(workers) == 2 * 4 * 5
    assert all(torch.equal(a, b) for a, b in zip(alone, workers, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(alone, run(0, seed=6), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(alone[:20], alone[20:], strict=True))  # epochs differ


def test_each_epoch_changes_an_image_anew(split: Split) -> None:
    dataset = DetectionDataset(split, train_transform((40,), 100, flip=0.0, jitter=0.5), training=True, seed=1)
    first, again, later = (dataset[item] for item in ((0, 0), (0, 0), (1, 0)))
    assert first is not None and again is not None and later is not None
    assert torch.equal(first.image, again.image) and not torch.equal(first.image, later.image)
    dataset.set_epoch(1)
    plain = dataset[0]
    assert plain is not None and torch.equal(plain.image, later.image)


def test_the_caller_s_random_state_is_left_alone(split: Split) -> None:
    before = torch.get_rng_state()
    for _ in loader(split, train_transform((20,), 50, jitter=0.2), 2, training=True):
        pass
    assert torch.equal(before, torch.get_rng_state())


def test_evaluation_loader_with_unreadable_images(split: Split) -> None:
    split.path(1).write_bytes(b"")
    with pytest.warns(UserWarning, match="left out"):
        batches = list(loader(split, resize_transform(20, 50), 1, training=False))
    assert sum(batch is None for batch in batches) == 1
    assert sorted(int(batch.indices[0]) for batch in batches if batch is not None) == [0, 2]


def test_real_images(shared: Path) -> None:
    data = fpn.data.load(shared / "data" / "coco_tiny")
    chosen = data["train"].select(np.arange(12), "train")
    batches = list(loader(chosen, train_transform((64,), 107), 4, training=True))
    assert sum(len(batch) for batch in batches) == 12
    for batch in batches:
        assert batch.images.shape[2] % 32 == batch.images.shape[3] % 32 == 0
        limits = batch.sizes[:, None, [1, 0, 1, 0]]
        assert (batch.targets.boxes <= limits).all() and (batch.targets.boxes >= 0).all()
        count = [int((~chosen.ignore[chosen.rows(index)]).sum()) for index in batch.indices.tolist()]
        assert batch.targets.valid.sum(dim=1).tolist() == count


def test_grey_images_make_batches_too(tmp_path: Path) -> None:
    write_coco(tmp_path, {"val": PICTURES["train"]})
    Image.fromarray(np.full((40, 80), 65535, dtype=np.uint16)).save(tmp_path / "images" / "a.png")
    write_image(tmp_path / "images" / "unused.png", (4, 4))
    first = DetectionDataset(fpn.data.load(tmp_path)["val"], None, False)[0]
    assert first is not None and first.image.shape == (3, 40, 80) and (first.image == 255).all()
