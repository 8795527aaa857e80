"""`fpn data check` finds one planted defect of each kind exactly once, nothing in clean data, and mends what it can."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_folders import CLASSES, save_json, write_voc
from PIL import Image, ImageFilter

import fpn.data
import fpn.data.scan
from fpn.cli import main
from fpn.data.defects import KINDS, Defect, find_defects
from fpn.data.duplicates import DISTANCE, alike, close_pairs, near_pairs, perceptual_hashes
from fpn.data.repair import repair
from fpn.data.scan import scan
from fpn.errors import OptionError

Content = dict[str, Any]


def texture(seed: int, size: tuple[int, int] = (96, 128), coarse: float = 6.0) -> Image.Image:
    """Blobs, like a field of view of a microscope: two seeds share every statistic, and nothing else."""
    noise = np.random.default_rng(seed).normal(size=(size[0], size[1], 3))
    smooth = Image.fromarray((128 + 40 * noise).clip(0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(coarse))
    values = np.asarray(smooth, dtype=np.float64)
    return Image.fromarray((128 + 40 * (values - values.mean()) / values.std()).clip(0, 255).astype(np.uint8))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Clean data: four images of 128x96 pixels in train, two in val, with a cat and a dog each."""
    path = tmp_path / "data"
    (path / "images").mkdir(parents=True)
    seed = 0
    for split, number in (("train", 4), ("val", 2)):
        content: Content = {"images": [], "annotations": [], "categories": []}
        content["categories"] = [{"id": k, "name": name} for k, name in enumerate(CLASSES, 1)]
        for index in range(1, number + 1):
            seed += 1
            texture(seed).save(path / "images" / f"{split}{index}.png")
            content["images"].append({"id": index, "file_name": f"{split}{index}.png", "height": 96, "width": 128})
            for category, box in ((1, [10, 20, 30, 40]), (2, [60, 30, 50.5, 20])):
                entry = {"id": len(content["annotations"]) + 1, "image_id": index, "category_id": category}
                content["annotations"].append({**entry, "bbox": box, "area": box[2] * box[3], "iscrowd": 0})
        save_json(path / "annotations" / f"instances_{split}.json", content)
    return path


def edit(folder: Path, split: str, change: Callable[[Content], object]) -> None:
    file = folder / "annotations" / f"instances_{split}.json"
    content = json.loads(file.read_text())
    change(content)
    save_json(file, content)


def add_box(folder: Path, box: list[float], split: str = "train", category: int = 1, image: int = 1) -> None:
    def change(content: Content) -> None:
        number = len(content["annotations"]) + 1
        entry = {"id": number, "image_id": image, "category_id": category, "bbox": box, "area": 1.0, "iscrowd": 0}
        content["annotations"].append(entry)

    edit(folder, split, change)


def add_image(folder: Path, name: str, split: str = "train", size: tuple[int, int] = (96, 128)) -> None:
    entry = {"id": 77, "file_name": name, "height": size[0], "width": size[1]}
    edit(folder, split, lambda content: content["images"].append(entry))


def rename_class(folder: Path, split: str, old: str, new: str, number: int | None = None) -> None:
    def change(content: Content) -> None:
        (category,) = (c for c in content["categories"] if c["name"] == old)
        for annotation in content["annotations"]:
            if number is not None and annotation["category_id"] == category["id"]:
                annotation["category_id"] = number
        category |= {"name": new, "id": category["id"] if number is None else number}

    edit(folder, split, change)
    files = sorted((folder / "annotations").iterdir())
    categories = {c["id"]: c for file in files for c in json.loads(file.read_text())["categories"]}
    for name in ("train", "val"):
        edit(folder, name, lambda content: content.update(categories=list(categories.values())))


def cows(folder: Path, split: str) -> None:
    edit(folder, split, lambda content: content["categories"].append({"id": 5, "name": "cow"}))
    add_box(folder, [100, 60, 20, 30], split, category=5)


def found(folder: Path, **options: Any) -> list[Defect]:
    return find_defects(fpn.data.load(folder), workers=1, **options)


def image(folder: Path, name: str) -> Path:
    return folder / "images" / name


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-500])


def many_cats(folder: Path) -> None:
    """60 small cats, and one as large as its image."""
    for step in range(60):
        add_box(folder, [step, step // 2, 12, 14], image=2)
    add_box(folder, [0, 0, 128, 96], image=2)


def save_turned(folder: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    texture(1).save(image(folder, "train1.png"), exif=exif)


def copy_image(folder: Path, source: str, name: str, split: str) -> None:
    image(folder, name).write_bytes(image(folder, source).read_bytes())
    add_image(folder, name, split)


def recode_image(folder: Path, source: str, name: str, split: str, size: tuple[int, int] = (64, 48)) -> None:
    Image.open(image(folder, source)).resize(size).save(image(folder, name), quality=40)
    add_image(folder, name, split, (size[1], size[0]))


# Kind of defect: how it is planted, the file or item that must be named, whether the copy is mended.
PLANTED: dict[str, tuple[Callable[[Path], object], str, bool]] = {
    "missing-image": (lambda f: image(f, "train3.png").unlink(), "train3.png", True),
    "unreadable-image": (lambda f: image(f, "train3.png").write_text("no image"), "train3.png", True),
    "damaged-image": (lambda f: cut_off(image(f, "val2.png")), "val2.png", True),
    "image-size": (lambda f: texture(9, (90, 120)).save(image(f, "train2.png")), "train2.png", True),
    "exif-ignored": (lambda f: save_turned(f, 6), "train1.png", True),
    "leak": (lambda f: copy_image(f, "val1.png", "other.png", "train"), "other.png", True),
    "near-leak": (lambda f: recode_image(f, "val1.png", "other.jpg", "train"), "other.jpg", False),
    "duplicate-image": (lambda f: copy_image(f, "train1.png", "other.png", "train"), "other.png", True),
    "near-duplicate": (lambda f: recode_image(f, "train1.png", "other.jpg", "train"), "other.jpg", False),
    "box-zero-size": (lambda f: add_box(f, [5, 5, 0, 10]), "train1.png", True),
    "box-not-finite": (lambda f: add_box(f, [5, 5, float("nan"), 10]), "train1.png", True),
    "box-outside": (lambda f: add_box(f, [200, 5, 20, 10]), "train1.png", True),
    "box-cut": (lambda f: add_box(f, [100, 5, 50, 50]), "train1.png", True),
    "tiny-box": (lambda f: add_box(f, [100, 5, 1.5, 50]), "(100, 5, 101.5, 55)", True),
    "huge-box": (many_cats, "(0, 0, 128, 96)", True),
    "duplicate-box": (lambda f: add_box(f, [10.1, 20, 30, 40]), "(10.1, 20, 40.1, 60)", True),
    "unknown-class": (lambda f: add_box(f, [5, 50, 9, 9], category=7), "train1.png", True),
    "unknown-image": (lambda f: add_box(f, [5, 50, 9, 9], image=8), "annotation id 9", True),
    "duplicate-id": (lambda f: edit(f, "val", lambda c: c["annotations"][0].update(id=2)), "annotation id 2", True),
    "class-spelling": (lambda f: rename_class(f, "val", "dog", "Dog ", 5), "class 'dog'", True),
    "unused-class": (
        lambda f: [edit(f, s, lambda c: c["categories"].append({"id": 5, "name": "cow"})) for s in ("train", "val")],
        "class 'cow'",
        True,
    ),
    "class-sets": (lambda f: cows(f, "train"), "instances_val.json", True),
    "untrained-class": (lambda f: rename_class(f, "val", "dog", "cow", 5), "class 'cow'", False),
}


def test_clean_data_has_no_defect(folder: Path) -> None:
    assert found(folder) == []


@pytest.mark.parametrize("kind", PLANTED)
def test_each_planted_defect_is_found_once_and_mended_where_promised(folder: Path, tmp_path: Path, kind: str) -> None:
    plant, named, mended = PLANTED[kind]
    plant(folder)
    done = repair(fpn.data.load(folder), tmp_path / "copy", workers=1)
    defects = [defect for defect in done.defects if defect.severity != "note"]
    assert [defect.kind for defect in defects] == [kind], list(map(str, defects))
    assert named in str(defects[0]) and defects[0].remedy
    assert [change.kind for change in done.changes] == [kind] * mended, list(map(str, done.changes))
    assert [defect.kind for defect in done.remaining if defect.severity != "note"] == [kind] * (not mended)
    assert fpn.data.load(tmp_path / "copy").problems == []


def test_every_kind_of_the_readers_has_a_title_and_a_remedy() -> None:
    from fpn.data import dataset

    assert dataset.KINDS.keys() <= KINDS.keys()


def test_copy_of_clean_data_is_the_same_data(folder: Path, tmp_path: Path) -> None:
    before = fpn.data.load(folder)
    repair(before, tmp_path / "copy", workers=1)
    after = fpn.data.load(tmp_path / "copy")
    assert after.classes == before.classes and list(after) == list(before)
    for name, split in before.items():
        for field in ("boxes", "labels", "sizes", "offsets", "areas", "ignore", "image_ids", "category_ids"):
            np.testing.assert_array_equal(getattr(after[name], field), getattr(split, field))
        for index in range(len(split)):
            assert after[name].path(index).read_bytes() == split.path(index).read_bytes()


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_boxes_turn_with_the_exif_rotation(folder: Path, tmp_path: Path, orientation: int) -> None:
    """The box is around a white patch, before and after."""
    canvas = texture(1)
    canvas.paste((255, 255, 255), (10, 20, 40, 60))
    exif = Image.Exif()
    exif[0x0112] = orientation
    canvas.save(image(folder, "train1.png"), exif=exif)
    repair(fpn.data.load(folder), tmp_path / "copy", workers=1)
    split = fpn.data.load(tmp_path / "copy")["train"]
    pixels = fpn.data.read_image(split.path(0))
    assert tuple(split.sizes[0]) == tuple(pixels.shape[1:]) == (128, 96)
    x1, y1, x2, y2 = split.boxes[0].astype(int).tolist()
    assert (x2 - x1) * (y2 - y1) == 30 * 40 and (pixels[:, y1:y2, x1:x2] == 255).all()


def test_boxes_follow_images_that_were_made_smaller(folder: Path, tmp_path: Path) -> None:
    texture(1).resize((64, 48)).save(image(folder, "train1.png"))  # half the size; its dog reaches to x = 110.5
    done = repair(fpn.data.load(folder), tmp_path / "copy", workers=1)
    split = fpn.data.load(tmp_path / "copy")["train"]
    np.testing.assert_array_equal(split.boxes[:2], [[5, 10, 20, 30], [30, 15, 55.25, 25]])
    np.testing.assert_array_equal(split.areas[:2], [300, 50.5 * 20 / 4])
    assert "made smaller" in done.changes[0].text and done.remaining == []


def test_leaks_are_taken_out_of_train_before_val_before_test(folder: Path, tmp_path: Path) -> None:
    edit(folder, "val", lambda content: save_json(folder / "annotations" / "instances_test.json", content))
    done = repair(fpn.data.load(folder), tmp_path / "copy", workers=1, ignore=["unmeasured-class"])
    assert [(d.kind, d.split) for d in done.defects] == [("leak", "val")] * 2
    assert "is listed in val and in test" in done.defects[0].text
    copy = fpn.data.load(tmp_path / "copy")
    assert len(copy["train"]) + len(copy.get("val", [])) == 4 and len(copy["test"]) == 2


def test_of_the_same_picture_in_one_split_the_one_with_more_boxes_stays(folder: Path, tmp_path: Path) -> None:
    image(folder, "train4.png").write_bytes(image(folder, "train2.png").read_bytes())
    add_box(folder, [90, 60, 9, 9], image=4)
    repair(fpn.data.load(folder), tmp_path / "copy", workers=1)
    kept = [Path(file).name for file in fpn.data.load(tmp_path / "copy")["train"].files]
    assert kept == ["train1.png", "train3.png", "train4.png"]


def test_twice_spelt_classes_become_one(folder: Path, tmp_path: Path) -> None:
    rename_class(folder, "val", "dog", "Dog ", 5)
    before = fpn.data.load(folder)
    assert before.classes == ("cat", "dog", "Dog ")
    repair(before, tmp_path / "copy", workers=1)
    after = fpn.data.load(tmp_path / "copy")
    assert after.classes == ("cat", "dog")
    np.testing.assert_array_equal(after["val"].labels, [0, 1, 0, 1])


def test_notes_are_no_defects(folder: Path) -> None:
    edit(folder, "val", lambda c: c.update(annotations=[a for a in c["annotations"] if a["category_id"] == 1]))
    save_turned(folder, 3)
    defects = found(folder, short=9)  # a tenth of the size: sides of 20 pixels become 1.9
    assert {(d.kind, d.severity) for d in defects} == {
        ("unmeasured-class", "note"),
        ("exif-unclear", "note"),
        ("small-when-resized", "note"),
    }
    assert "has no box of dog" in str(defects[0])


def test_an_image_that_is_all_one_class_is_no_slip(folder: Path) -> None:
    for picture in (1, 2, 3, 4):
        add_box(folder, [0, 0, 128, 96], image=picture)
    assert found(folder) == []


def test_voc_data_is_repaired_too(tmp_path: Path) -> None:
    write_voc(tmp_path / "data")
    file = tmp_path / "data" / "Annotations" / "a.xml"
    file.write_text(file.read_text().replace("<xmax>24</xmax>", "<xmax>8</xmax>", 1))
    done = repair(fpn.data.load(tmp_path / "data"), tmp_path / "copy", workers=1, ignore=["untrained-class"])
    assert [d.kind for d in done.defects if d.severity != "note"] == ["box-zero-size"]
    assert fpn.data.load(tmp_path / "copy").format == "coco"
    assert {d.kind for d in done.remaining} == {"unmeasured-class"}  # a note


def test_one_image_entry_per_box_loses_no_box(folder: Path, tmp_path: Path) -> None:
    """As naive exporters write it: each box comes with an entry of its own for the image."""

    def one_entry_a_box(content: Content) -> None:
        files = {entry["id"]: entry["file_name"] for entry in content["images"]}
        content["images"] = []
        for annotation in content["annotations"]:
            name = files[annotation["image_id"]]
            content["images"].append({"id": 100 + annotation["id"], "file_name": name, "height": 96, "width": 128})
            annotation["image_id"] = 100 + annotation["id"]

    before = fpn.data.load(folder)["train"]
    edit(folder, "train", one_entry_a_box)
    done = repair(fpn.data.load(folder), tmp_path / "copy", workers=1)
    assert [defect.kind for defect in done.defects] == ["duplicate-entry"] * 4 and done.remaining == []
    assert "has 2 entries" in done.defects[0].text and "joined" in done.defects[0].text
    after = fpn.data.load(tmp_path / "copy")["train"]
    np.testing.assert_array_equal(after.offsets, before.offsets)
    np.testing.assert_array_equal(after.boxes, before.boxes)
    np.testing.assert_array_equal(after.labels, before.labels)


def test_an_image_with_two_annotation_files_is_no_duplicate_of_itself(tmp_path: Path) -> None:
    folder = write_voc(tmp_path / "data")
    (folder / "Annotations" / "z.xml").write_text((folder / "Annotations" / "a.xml").read_text())
    with (folder / "ImageSets" / "Main" / "train.txt").open("a") as stream:
        stream.write("z\n")
    assert [defect.kind for defect in found(folder) if defect.severity != "note"] == ["duplicate-entry"]


def test_a_class_that_loses_its_last_box_stays(folder: Path, tmp_path: Path) -> None:
    for split in ("train", "val"):
        edit(folder, split, lambda content: content["categories"].append({"id": 5, "name": "cow"}))
    add_box(folder, [100, 60, 1, 30], category=5)
    done = repair(fpn.data.load(folder), tmp_path / "copy", workers=1)
    assert [change.kind for change in done.changes] == ["tiny-box"]
    assert fpn.data.load(tmp_path / "copy").classes == ("cat", "dog", "cow")
    assert [defect.kind for defect in done.remaining] == ["unused-class"]


def test_boxes_of_an_id_that_two_files_have_are_left_out_and_remain_a_defect(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(folder, "train", lambda content: content["images"][1].update(id=1))  # those of train2.png are now unknown
    edit(folder, "train", lambda content: [entry.update(image_id=1) for entry in content["annotations"][2:4]])
    data = fpn.data.load(folder)
    assert [Path(file).stem for file in data["train"].files] == ["train3", "train4"]
    assert [str(problem) for problem in data.problems] == [
        "annotations/instances_train.json: image id 1 is that of images/train1.png, images/train2.png; "
        "left out with 4 boxes of one or the other, renumber"
    ]
    code, screen = run(capsys, folder, "--fix", "--out", tmp_path / "copy")
    assert code == 1 and "1 defect remains and needs a person" in screen and "it is clean" not in screen
    assert screen.count("left out with 4 boxes") == 2  # among the changes, and as what remains


def test_no_split_is_drawn_to_look_for_leaks(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "annotations" / "instances_val.json").unlink()
    for number in (1, 2, 3, 4):  # every other picture is nearly one before: some would be in a split drawn at random
        Image.open(image(folder, f"train{number}.png")).save(image(folder, f"other{number}.jpg"), quality=60)
        entry = {"id": 50 + number, "file_name": f"other{number}.jpg", "height": 96, "width": 128}
        edit(folder, "train", lambda content, entry=entry: content["images"].append(entry))
    code, text = run(capsys, folder, "--json", "--fix", "--out", tmp_path / "copy")
    content = json.loads(text)
    assert code == 1 and content["counts"] == {"near-duplicate": 4} and content["changes"] == []
    assert list(fpn.data.load(tmp_path / "copy", draw=False)) == ["train"]


def test_data_without_a_box_need_a_person(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "val"):
        edit(folder, split, lambda content: content.update(annotations=[]))
    code, screen = run(capsys, folder)
    assert code == 1 and "the data have 6 images and no box" in screen and "1 defect. It needs a person." in screen
    assert "unused-class" not in screen
    code, _ = run(capsys, folder, "--fix", "--out", tmp_path / "copy")
    assert "no box would be left" in code


# Boxes


def test_boxes_drawn_twice_are_found_as_comparing_all_with_all_finds_them(folder: Path) -> None:
    import torchvision

    rng = np.random.default_rng(0)
    corners = rng.integers(0, 30, (300, 2)).astype(float)
    boxes = np.concatenate([corners, corners + rng.integers(20, 24, (300, 2))], axis=1)

    def fill(content: Content) -> None:
        content["annotations"] = [
            {"id": i, "image_id": 1, "category_id": 1 + i % 2, "bbox": [x1, y1, x2 - x1, y2 - y1], "iscrowd": 0}
            for i, (x1, y1, x2, y2) in enumerate(boxes.tolist())
        ]

    edit(folder, "train", fill)
    import torch

    iou = torchvision.ops.box_iou(torch.tensor(boxes), torch.tensor(boxes)).numpy()
    same = (iou >= 0.95) & (np.arange(300)[:, None] % 2 == np.arange(300) % 2)
    expected = np.flatnonzero(np.tril(same, -1).any(axis=1)).tolist()
    assert expected
    assert [d.box for d in found(folder) if d.kind == "duplicate-box"] == expected


# Pictures


def test_hash_of_waves_worked_by_hand() -> None:
    """A wave of frequency 1 along x sets the sign of the first coefficient, one along y that of the second."""
    wave = np.rint(128 + 100 * np.cos(np.pi / 32 * (np.arange(32) + 0.5))).astype(np.uint8)
    along_x, along_y = np.tile(wave, (32, 1)), np.tile(wave[:, None], (1, 32))
    codes = perceptual_hashes(np.stack([along_x, along_y, 255 - along_x, np.full((32, 32), 7, np.uint8)]))
    assert [int(code) & 0b11 for code in codes] == [0b01, 0b10, 0b00, 0b00]
    assert int(codes[3]) == 0


def test_close_hashes_are_found_as_comparing_all_with_all_finds_them() -> None:
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**63, 600, dtype=np.uint64)
    for index in range(300):
        flips = rng.choice(64, index % (DISTANCE + 3), replace=False)
        hashes[300 + index] = hashes[index] ^ np.bitwise_or.reduce(
            np.uint64(1) << flips.astype(np.uint64), initial=np.uint64(0)
        )
    distances = np.bitwise_count(hashes[:, None] ^ hashes[None])
    expected = np.argwhere(np.triu(distances <= DISTANCE, 1))
    assert len(expected) > 200
    np.testing.assert_array_equal(close_pairs(hashes), expected)


def test_a_hundred_thousand_pictures_are_compared_in_seconds_even_from_a_camera_that_stands_still() -> None:
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**63, 100_000, dtype=np.uint64)
    hashes[:5000] = hashes[0] ^ rng.integers(0, 8, 5000, dtype=np.uint64)
    start = time.process_time()
    pairs = close_pairs(hashes)
    assert time.process_time() - start < 20
    assert len(np.unique(pairs)) == 5000  # each of them was linked to another


def thumbnails(pictures: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(p.convert("L").resize((32, 32), Image.Resampling.BOX)) for p in pictures])


def test_fields_of_view_with_the_same_texture_are_different_pictures() -> None:
    assert len(near_pairs(thumbnails([texture(seed, coarse=c) for seed in range(40) for c in (3.0, 6.0)]))) == 0
    plain = np.zeros((3, 32, 32), dtype=np.uint8)
    assert not alike(plain, plain).any()  # empty pictures say nothing


@pytest.mark.parametrize("size, quality", [((128, 96), 20), ((64, 48), 60), ((416, 416), 90), ((39, 30), 95)])
def test_the_same_picture_is_known_after_compression_and_resizing(
    tmp_path: Path, size: tuple[int, int], quality: int
) -> None:
    originals = [texture(seed) for seed in range(10)]
    again = []
    for picture in originals:
        picture.resize(size).save(tmp_path / "a.jpg", quality=quality)
        again.append(Image.open(tmp_path / "a.jpg").copy())
    pairs = near_pairs(thumbnails([*originals, *again]))
    assert pairs.tolist() == [[index, index + 10] for index in range(10)]


def test_one_thing_that_moved_makes_two_pictures() -> None:
    scenes = [texture(0, coarse=12.0) for _ in range(2)]
    scenes[0].paste((255, 255, 255), (20, 20, 36, 36))
    scenes[1].paste((255, 255, 255), (90, 60, 106, 76))
    assert not alike(thumbnails(scenes[:1]), thumbnails(scenes[1:])).any()


# Decoding


def test_scan_tells_sizes_and_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texture(0).save(tmp_path / "a.png")
    Image.open(tmp_path / "a.png").save(tmp_path / "b.bmp")  # the same pixels in another file
    Image.new("RGB", (4000, 1)).save(tmp_path / "long.png")
    Image.new("1", (20_000, 20_000)).save(tmp_path / "huge.png")
    paths = [tmp_path / name for name in ("a.png", "b.bmp", "long.png", "huge.png", "gone.png")]
    seen = scan(paths, workers=2)
    assert seen.sizes.tolist() == [[96, 128], [96, 128], [1, 4000], [0, 0], [0, 0]]
    assert (seen.digests[0] == seen.digests[1]).all() and (seen.digests[0] != seen.digests[2]).any()
    assert {index: kind for index, (kind, _) in seen.errors.items()} == {3: "huge-image", 4: "missing-image"}
    assert "cut it into tiles" in seen.errors[3][1]


def test_a_file_that_crashes_or_hangs_the_decoder_costs_itself_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fpn.data.scan.multiprocessing.get_start_method() != "fork":
        pytest.skip("the stand-in for a decoder reaches the processes only where they are forked")
    decode = fpn.data.scan.decode

    def hostile(path: str) -> Any:
        if "crash" in Path(path).name:
            os.kill(os.getpid(), signal.SIGKILL)
        if "hang" in Path(path).name:
            time.sleep(600)
        return decode(path)

    monkeypatch.setattr(fpn.data.scan, "decode", hostile)
    names = [f"{index}{'crash' * (index in (3, 4, 39))}{'hang' * (index == 20)}.png" for index in range(40)]
    for name in names:
        texture(0, (8, 8)).save(tmp_path / name)
    seen = scan([tmp_path / name for name in names], workers=2, patience=2.0)
    assert {index: text.split(";")[0] for index, (_, text) in seen.errors.items()} == {
        3: "crashes the decoder",
        4: "crashes the decoder",
        20: "cannot be decoded within 2 seconds",
        39: "crashes the decoder",
    }
    assert (seen.sizes[[0, 5, 19, 21, 38]] == 8).all()


# The command


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[Any, str]:
    try:
        main(["data", "check", *map(str, arguments), "--workers", "1"])
        code: Any = 0
    except SystemExit as stop:
        code = stop.code
    return code, capsys.readouterr().out


def test_exit_codes_and_screen(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, screen = run(capsys, folder)
    assert code == 0 and "No defects found" in screen
    add_box(folder, [100, 5, 1, 50])
    copy_image(folder, "val1.png", "[red]other.png", "train")
    code, screen = run(capsys, folder)
    assert code == 1 and "[red]other.png" in screen and "2 defects." in screen and "--fix --out DIR" in screen
    assert screen.index("the same picture in two splits") < screen.index("box with a side under 2 pixels")
    code, screen = run(capsys, folder, "--fix", "--out", tmp_path / "copy")
    assert code == 0 and "The copy was checked too: it is clean." in screen and "the box is left out" in screen
    assert screen.count("(100, 5, 101, 55)") == screen.count("[red]other.png") == 1  # what was mended is said once
    code, screen = run(capsys, folder, "--ignore", "leak", "tiny-box")
    assert code == 0 and "No defects found" in screen


def test_a_copy_in_which_a_defect_remains_says_so(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recode_image(folder, "train1.png", "other.jpg", "train")
    code, screen = run(capsys, folder)
    assert code == 1 and "1 defect. It needs a person." in screen
    code, screen = run(capsys, folder, "--fix", "--out", tmp_path / "copy")
    assert code == 1 and "1 defect remains and needs a person" in screen


def test_json(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add_box(folder, [100, 5, 1, 50])
    code, text = run(capsys, folder, "--json")
    content = json.loads(text)
    assert code == 1 and content["clean"] is False and content["counts"] == {"tiny-box": 1}
    (defect,) = content["defects"]
    assert defect["file"] == "images/train1.png" and defect["item"] == "cat (100, 5, 101, 55)" and defect["remedy"]
    code, text = run(capsys, folder, "--json", "--fix", "--out", tmp_path / "copy")
    content = json.loads(text)
    assert code == 0 and content["clean"] is True and content["remaining"] == [] and len(content["changes"]) == 1


def test_options_that_cannot_work_are_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    for arguments, words in (
        (["--fix"], "give --out"),
        (["--out", tmp_path / "copy"], "give --fix too"),
        (["--fix", "--out", tmp_path / "full"], "not an empty folder"),
        (["--fix", "--out", folder], "not an empty folder"),
        (["--fix", "--out", folder / "copy"], "lies inside the data"),
        (["--ignore", "leaks"], "no such kind of defect"),
    ):
        code, _ = run(capsys, folder, *arguments)
        assert words in code
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "full"]


def test_nothing_is_left_where_the_copy_fails(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(sys.modules["fpn.data.repair"], "write_coco", full_disk)
    with pytest.raises(fpn.errors.FpnError, match="no space left"):
        repair(fpn.data.load(folder), tmp_path / "copy", workers=1)
    with pytest.raises(OptionError, match="lies inside the data"):
        repair(fpn.data.load(folder), folder / "copy", workers=1)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_bccd(shared: Path, tmp_path: Path) -> None:
    """Two boxes without a size; and one field of view, refocused, in train and in val, as looking at both shows."""
    done = repair(fpn.data.load(shared / "data" / "bccd"), tmp_path / "copy")
    assert [(d.kind, Path(d.file).name) for d in done.defects] == [
        ("near-leak", "BloodImage_00038.jpg"),
        ("box-zero-size", "BloodImage_00343.xml"),
        ("box-zero-size", "BloodImage_00338.xml"),
    ]
    assert [d.kind for d in done.remaining] == ["near-leak"]
    assert sum(map(len, fpn.data.load(tmp_path / "copy").values())) == 364


def test_coco_tiny_is_clean(shared: Path) -> None:
    assert found(shared / "data" / "coco_tiny") == []
