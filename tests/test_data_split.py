"""Data divided anew: every split has its share of everything, groups stay together, the same seed gives the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from data_folders import Picture, write_coco, write_image, write_voc

import fpn.data
from fpn.cli import main
from fpn.data import Data, Split
from fpn.data.stratify import stratify
from fpn.errors import DataError, OptionError

COUNTS = np.array([800, 100, 100])


def made(number: int = 1000, classes: int = 12, seed: int = 0) -> Split:
    """Images of 0 to hundreds of boxes; the frequencies of classes fall like 1, 1/2, 1/3; each image has a main one."""
    rng = np.random.default_rng(seed)
    frequency = 1 / np.arange(1, classes + 1)
    frequency /= frequency.sum()
    boxes = rng.geometric(0.15, number) - 1
    boxes[rng.random(number) < 0.02] *= 15
    image_of = np.repeat(np.arange(number), boxes)
    main_class = rng.choice(classes, number, p=frequency)[image_of]
    labels = np.where(rng.random(len(image_of)) < 0.6, main_class, rng.choice(classes, len(image_of), p=frequency))
    return Split(
        name="all",
        classes=tuple(f"class {label}" for label in range(classes)),
        category_ids=np.arange(classes),
        root=Path("/data"),
        files=np.array([f"{index // 10:05}_{index % 10}.jpg" for index in range(number)]),
        image_ids=np.arange(number),
        sizes=np.full((number, 2), 100),
        offsets=np.concatenate([[0], np.cumsum(boxes)]),
        boxes=np.tile(np.array([[0.0, 0.0, 10.0, 10.0]]), (len(labels), 1)),
        labels=labels,
        ignore=np.zeros(len(labels), dtype=bool),
        areas=np.full(len(labels), 100.0),
    )


def as_data(split: Split) -> Data:
    return Data(Path("/data"), "coco", split.classes, {"train": split})


def shares(split: Split, part_of: np.ndarray) -> np.ndarray:
    """(3, K): the share of each class's boxes that each part holds."""
    held = np.zeros((3, len(split.classes)))
    np.add.at(held, (np.repeat(part_of, np.diff(split.offsets)), split.labels), 1)
    return held / held.sum(axis=0)


@pytest.mark.parametrize("seed", range(3))
def test_every_part_holds_its_share_of_every_class_and_of_full_images(seed: int) -> None:
    split = made(seed=seed)
    part_of = stratify(split, COUNTS, seed)
    assert np.bincount(part_of).tolist() == COUNTS.tolist()
    off = np.abs(shares(split, part_of) - COUNTS[:, None] / 1000).max()
    by_chance = [np.random.default_rng(number).permutation(np.repeat(np.arange(3), COUNTS)) for number in range(20)]
    typical = np.median([np.abs(shares(split, part) - COUNTS[:, None] / 1000).max() for part in by_chance])
    assert off < 0.02 < 0.06 < typical
    boxes = np.diff(split.offsets)
    for full in (boxes == 0, (boxes > 3) & (boxes <= 7), boxes > 31):
        found = np.bincount(part_of[full], minlength=3)
        np.testing.assert_allclose(found, COUNTS / 1000 * full.sum(), atol=1.5)


def test_large_sets_are_balanced_too_and_quickly() -> None:
    split = made(20_000, 40)
    part_of = stratify(split, np.array([16_000, 2_000, 2_000]), 0)
    assert np.abs(shares(split, part_of) - np.array([[0.8], [0.1], [0.1]])).max() < 0.005


def test_the_seed_decides() -> None:
    split = made(300)
    first, again, other = (stratify(split, np.array([200, 50, 50]), seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).mean() > 0.1


def test_groups_stay_together() -> None:
    split = made()
    divided = fpn.data.split(as_data(split), 0.2, 0.1, group=r"^(\d+)_")
    groups = {name: {file[:5] for file in part.files.tolist()} for name, part in divided.items()}
    assert sum(map(len, groups.values())) == 100 == len(set.union(*groups.values()))
    assert sum(map(len, divided.values())) == 1000
    assert [len(part) / 1000 for part in divided.values()] == pytest.approx([0.7, 0.2, 0.1], abs=0.02)
    off = [len(divided[name].boxes) / len(split.boxes) for name in divided]
    assert off == pytest.approx([0.7, 0.2, 0.1], abs=0.03)
    assert divided.notes == ["100 groups, each in one split"]


def test_no_part_stays_empty_however_large_the_groups() -> None:
    split = made(100)
    for sizes in ([90, 5, 5], [30, 30, 40], [25, 25, 25, 25]):
        groups = np.repeat(np.arange(len(sizes)), sizes)
        part_of = stratify(split, np.array([80, 10, 10]), 0, groups)
        assert len(set(zip(groups.tolist(), part_of.tolist(), strict=True))) == len(sizes)
        assert set(part_of.tolist()) == {0, 1, 2}


def test_groups_from_a_table(tmp_path: Path) -> None:
    files = [f"{patient}/{index}.png" for patient in "abcdef" for index in range(4)]
    data = fpn.data.load(write_coco(tmp_path, {"train": tuple(Picture(f) for f in files)}), seed=0)
    table = tmp_path / "groups.csv"
    rows = [f"images/{file},{file[0] in 'ab' or file[0]}" for file in files]
    table.write_text("\n".join(["file,group", *rows]))
    divided = fpn.data.split(data, group_file=table)
    where = {file.split("/")[1]: name for name, part in divided.items() for file in part.files.tolist()}
    assert where["a"] == where["b"] and set(where.values()) == {"train", "val", "test"}

    table.write_text("\n".join(["file,group", *rows[3:]]))
    with pytest.raises(DataError, match=r"no row for images/a/0.png, nor for 2 more of 24"):
        fpn.data.split(data, group_file=table)
    table.write_text("\n".join(["file,group", *rows, "images/a/0.png,other"]))
    with pytest.raises(DataError, match=r"line 26: images/a/0.png is in 'True' and 'other'"):
        fpn.data.split(data, group_file=table)
    table.write_text("\n".join(["file,group", "a.png,"]))
    with pytest.raises(DataError, match="line 2 has no file or no group"):
        fpn.data.split(data, group_file=table)
    table.write_text("name;patient\n")
    with pytest.raises(DataError, match="needs the columns file and group"):
        fpn.data.split(data, group_file=table)
    with pytest.raises(DataError, match="cannot be read"):
        fpn.data.split(data, group_file=tmp_path / "none.csv")


def test_bad_options_are_refused() -> None:
    data = as_data(made(30))
    for val, test in ((0.5, 0.5), (-0.1, 0.1), (float("nan"), 0.1)):
        with pytest.raises(OptionError, match="must be shares"):
            fpn.data.split(data, val, test)
    with pytest.raises(OptionError, match="not both"):
        fpn.data.split(data, group="a", group_file="b.csv")
    with pytest.raises(OptionError, match="not a regular expression"):
        fpn.data.split(data, group="(")
    with pytest.raises(DataError, match=r"00001_0.jpg: does not match --group '\^00000', nor do 19 more of 30"):
        fpn.data.split(data, group="^00000")
    with pytest.raises(DataError, match="1 group of images, too few for 3 splits"):
        fpn.data.split(data, group="jpg")
    with pytest.raises(DataError, match="2 images, too few for 3 splits"):
        fpn.data.split(as_data(made(2)))


@pytest.mark.parametrize(
    ("number", "val", "test", "expected"),
    [
        (3, 0.6, 0.3, {"train": 1, "val": 1, "test": 1}),
        (10, 0.0, 0.0, {"train": 10}),
        (10, 0.2, 0.0, {"train": 8, "val": 2}),
        (10, 0.01, 0.3, {"train": 6, "val": 1, "test": 3}),
    ],
)
def test_numbers_of_images(number: int, val: float, test: float, expected: dict[str, int]) -> None:
    divided = fpn.data.split(as_data(made(number)), val, test)
    assert {name: len(part) for name, part in divided.items()} == expected


def test_images_without_any_box_can_be_divided() -> None:
    empty = made(200)
    empty = empty.select(np.flatnonzero(np.diff(empty.offsets) == 0), "all")
    divided = fpn.data.split(as_data(empty), 0.25, 0.25)
    assert [round(4 * len(part) / len(empty)) for part in divided.values()] == [2, 1, 1]


def test_old_splits_do_not_matter_and_files_are_taken_once(tmp_path: Path) -> None:
    folder = write_voc(tmp_path, {"train": tuple(Picture(f"{n}.png") for n in range(10))})
    (folder / "Annotations" / "0.xml").write_text((folder / "Annotations" / "0.xml").read_text())
    with pytest.raises(DataError):
        fpn.data.load(folder)  # no class at all
    pictures = tuple(Picture(f"{n}.png", (30, 30), (("cat", 1, 1, 9, 9), ("dog", 2, 2, 9, 9))) for n in range(10))
    whole = fpn.data.split(fpn.data.load(write_voc(tmp_path / "one", {"train": pictures})))
    write_voc(tmp_path / "two", {"train": pictures[:5], "val": pictures[4:]})
    divided = fpn.data.split(fpn.data.load(tmp_path / "two"))
    assert "1 image is in several splits" in divided.notes[0]
    assert {name: part.files.tolist() for name, part in divided.items()} == {
        name: part.files.tolist() for name, part in whole.items()
    }


def test_notes_about_the_data_stay_and_those_about_its_old_splits_do_not(tmp_path: Path) -> None:
    pictures = tuple(Picture(f"{n}.png", (30, 30), (("cat", 1, 1, 9, 9),)) for n in range(10))
    folder = write_coco(tmp_path, {"train": pictures})
    (folder / "annotations" / "instances_other.json").write_text("{}")
    data = fpn.data.load(folder)
    assert any("no val split" in note for note in data.notes)
    assert fpn.data.split(data).notes == [note for note in data.notes if "is ignored" in note or "no box has" in note]


def test_ids_used_in_two_splits_are_numbered_anew(tmp_path: Path) -> None:
    pictures = {split: tuple(Picture(f"{split}{n}.png") for n in range(5)) for split in ("train", "val")}
    divided = fpn.data.split(fpn.data.load(write_coco(tmp_path, pictures)))
    ids = np.concatenate([part.image_ids for part in divided.values()])
    assert sorted(ids.tolist()) == list(range(1, 11))
    assert any("numbered anew" in note for note in divided.notes)


def test_the_command_writes_what_load_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split, first in (("train", 0), ("val", 20)):
        pictures = tuple(
            Picture(f"{split}2017/p{n // 4}/{n % 4}.png", (16, 16 + first + n), (("cat", 2, 2, 8, 10),))
            for n in range(20)
        )
        write_coco(tmp_path / "data", {split: pictures})
        for picture in pictures:
            write_image(tmp_path / "data" / "images" / picture.name, picture.size)
    arguments = ["data", "split", str(tmp_path / "data"), "--out", str(tmp_path / "new")]
    main([*arguments, "--val", "0.2", "--test", "0", "--group", "p[0-9]+"])
    screen = capsys.readouterr().out
    assert "40 images divided with seed 0" in screen and "80.0 %" in screen and "5 groups" in screen
    assert "train 32, val 8" in screen
    data = fpn.data.load(tmp_path / "new")
    assert data.problems == [] and {name: len(part) for name, part in data.items()} == {"train": 32, "val": 8}
    patients = [{file.split("/")[-2] for file in part.files.tolist()} for part in data.values()]
    assert len(patients[1]) == 1 and not patients[0] & patients[1]
    for part in data.values():  # images of one name from two folders are still themselves
        for index in range(len(part)):
            assert fpn.data.image_size(part.path(index)) == tuple(part.sizes[index].tolist())


def test_bccd_is_divided_evenly(shared: Path) -> None:
    divided = fpn.data.split(fpn.data.load(shared / "data" / "bccd"), seed=0)
    counts = np.array([np.bincount(part.labels, minlength=3) for part in divided.values()])
    np.testing.assert_allclose(counts / counts.sum(axis=0), np.tile([[0.8], [0.1], [0.1]], (1, 3)), atol=0.01)
