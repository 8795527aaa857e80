"""From each format to each other and back nothing is lost but what the format cannot hold, and that is said."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from data_folders import Picture, coco_content, save_json, write_coco, write_image, write_voc, write_yolo
from PIL import ExifTags, Image

import fpn.data
from fpn.cli import main
from fpn.data import Data, convert, copies
from fpn.data.copies import new_names
from fpn.errors import DataError, FpnError, OptionError

FORMATS = ("coco", "voc", "yolo")
CLASS_NAMES = ("yes", "a & <b>", "Käfer klein", "1.0", "never used")


def hostile(folder: Path) -> Data:
    """COCO with awkward names of files and classes, fractions, crowds, gaps in the ids; no two images of one size."""
    names = {
        "train": ("b.png", "a/b.png", "a/b.bmp", "ein Bild ü.png", "images/x.png", "many.dots 1.png", "empty.png"),
        "val": ("b.png", "Z.png", "z.png"),
    }
    rng = np.random.default_rng(0)
    sizes = iter(range(20, 100))
    ids = (90, 7, 8, 1000, 3)
    for split, files in names.items():
        content = coco_content(())
        content["categories"] = [{"id": number, "name": name} for number, name in zip(ids, CLASS_NAMES, strict=True)]
        for image_id, file in enumerate(files, 11):
            height, width = next(sizes), 37
            write_image(folder / "images" / split / file, (height, width))
            content["images"].append({"id": image_id, "file_name": file, "height": height, "width": width})
            for _ in range(0 if file == "empty.png" else 6):
                x, y = rng.random(2) * (20, 10)
                box = [x, y, *(0.001 + rng.random(2) * (37 - x, 10))]
                entry = {"id": len(content["annotations"]), "image_id": image_id, "bbox": box, "area": 5.5}
                crowd = int(rng.random() < 0.3)
                content["annotations"].append({**entry, "category_id": int(rng.choice(ids[:4])), "iscrowd": crowd})
        save_json(folder / "annotations" / f"instances_{split}.json", content)
    return fpn.data.load(folder)


def by_image(data: Data, split: str, with_ignored: bool = True) -> dict[tuple[int, ...], tuple[np.ndarray, ...]]:
    """What each image has, by its size, of which no two here are the same."""
    own = data[split]
    found = {}
    for index in range(len(own)):
        chosen = np.arange(len(own.boxes))[own.rows(index)]
        chosen = chosen if with_ignored else chosen[~own.ignore[chosen]]
        found[tuple(own.sizes[index].tolist())] = (own.boxes[chosen], own.labels[chosen], own.ignore[chosen])
    assert len(found) == len(own)
    return found


def assert_same(new: Data, old: Data, with_ignored: bool = True) -> None:
    assert new.classes == old.classes
    assert list(new) == list(old)
    assert new.problems == []
    for split in old:
        expected, found = by_image(old, split, with_ignored), by_image(new, split)
        assert found.keys() == expected.keys()
        for size, (boxes, labels, ignore) in expected.items():
            np.testing.assert_allclose(found[size][0], boxes, rtol=0, atol=1e-9)
            np.testing.assert_array_equal(found[size][1], labels)
            np.testing.assert_array_equal(found[size][2], ignore)
        for index in range(len(new[split])):  # each name leads to its own image
            assert fpn.data.image_size(new[split].path(index)) == tuple(new[split].sizes[index].tolist())


@pytest.mark.parametrize("first", FORMATS)
@pytest.mark.parametrize("second", FORMATS)
def test_there_and_back_nothing_is_lost(first: str, second: str, tmp_path: Path) -> None:
    original = hostile(tmp_path / "data")
    data = original
    for number, form in enumerate((first, second, first)):
        convert(data, tmp_path / str(number), form)
        data = fpn.data.load(tmp_path / str(number))
        assert data.format == form
    assert_same(data, original, with_ignored="yolo" not in (first, second))


def test_coco_keeps_ids_and_areas(tmp_path: Path) -> None:
    original = hostile(tmp_path / "data")
    lost = convert(original, tmp_path / "new", "coco")
    data = fpn.data.load(tmp_path / "new")
    for split in original:
        for name in ("image_ids", "category_ids", "areas", "labels", "offsets", "sizes", "ignore"):
            np.testing.assert_array_equal(getattr(data[split], name), getattr(original[split], name))
    assert data["train"].files.tolist()[3] == "images/train/ein Bild ü.png"
    assert [text.split(" (")[0] for text in lost if "masks" not in text] == ["names of 1 image"]  # Z.png beside z.png


def test_what_a_format_cannot_hold_is_said(tmp_path: Path) -> None:
    data = hostile(tmp_path / "data")
    ignored = sum(int(split.ignore.sum()) for split in data.values())
    voc = " ".join(convert(data, tmp_path / "voc", "voc"))
    yolo = " ".join(convert(data, tmp_path / "yolo", "yolo"))
    for text in (voc, yolo):
        assert "masks, keypoints" in text and "image ids" in text and "areas of 54 masks" in text
    assert "3 to 1000 become 1 to 5" in voc and "sub-folders" in voc and "ignored" not in voc
    assert "3 to 1000 become 0 to 4" in yolo and f"{ignored} ignored boxes" in yolo and ignored > 3
    plain = fpn.data.load(write_coco(tmp_path / "plain"))
    assert len(convert(plain, tmp_path / "plain_voc", "voc")) == 2  # masks and the like, image ids


@pytest.mark.parametrize("form", FORMATS)
def test_images_are_links_or_else_copies(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = fpn.data.load(write_voc(tmp_path / "data"))
    convert(data, tmp_path / "links", form)
    linked = fpn.data.load(tmp_path / "links")["val"].path(0)
    assert os.path.samefile(linked, data["val"].path(0))

    def refuse(*_: object) -> None:
        raise OSError("another disk")

    monkeypatch.setattr(os, "link", refuse)
    convert(data, tmp_path / "copies", form)
    copied = fpn.data.load(tmp_path / "copies")["val"].path(0)
    assert copied.read_bytes() == linked.read_bytes() and not os.path.samefile(copied, linked)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_nothing_half_written_stays(error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = fpn.data.load(write_coco(tmp_path / "data"))

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(os, "link", fail)
    monkeypatch.setattr(copies.shutil, "copyfile", fail)
    expected = FpnError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        convert(data, tmp_path / "new", "yolo")
    assert [entry.name for entry in tmp_path.iterdir()] == ["data"]


def test_out_must_be_new_and_outside_the_data(tmp_path: Path) -> None:
    data = fpn.data.load(write_coco(tmp_path / "data"))
    with pytest.raises(OptionError, match="lies inside the data"):
        convert(data, tmp_path / "data" / "new", "coco")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept.txt").write_text("kept")
    for out in (tmp_path / "full", tmp_path / "full" / "kept.txt"):
        with pytest.raises(OptionError, match="not an empty folder"):
            convert(data, out, "coco")
    assert (tmp_path / "full" / "kept.txt").read_text() == "kept"
    (tmp_path / "empty").mkdir()
    convert(data, tmp_path / "empty", "coco")
    assert_same(fpn.data.load(tmp_path / "empty"), data)
    with pytest.raises(OptionError, match="no format 'csv'"):
        convert(data, tmp_path / "csv", "csv")


@pytest.mark.parametrize("name", ["two\nlines", " blank ahead", "", "half \ud800 a pair"])
@pytest.mark.parametrize("form", FORMATS)
def test_class_names_that_would_not_come_back_are_refused(name: str, form: str, tmp_path: Path) -> None:
    data = fpn.data.load(write_coco(tmp_path / "data"))
    with pytest.raises(DataError, match="rename the class"):
        convert(replace(data, classes=("cat", name)), tmp_path / "new", form)
    assert not (tmp_path / "new").exists()


def test_yolo_refuses_sizes_that_it_would_lose(tmp_path: Path) -> None:
    """Boxes drawn on the stored pixels of an image that its EXIF orientation turns."""
    write_coco(tmp_path / "data", {"train": (Picture("a.png"),), "val": (Picture("b.jpg", (40, 60)),)})
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (60, 40)).save(tmp_path / "data" / "images" / "b.jpg", exif=exif)
    data = fpn.data.load(tmp_path / "data")
    with pytest.raises(DataError, match=r"b\.jpg: is annotated as 60x40, but shows 40x60"):
        convert(data, tmp_path / "new", "yolo")
    convert(data, tmp_path / "new", "voc")
    assert fpn.data.load(tmp_path / "new")["val"].sizes.tolist() == [[40, 60]]


def test_an_image_in_two_voc_lists_has_one_annotation(tmp_path: Path) -> None:
    folder = write_voc(tmp_path / "data")
    (folder / "ImageSets" / "Main" / "small.txt").write_text("a\nd\n")
    data = fpn.data.load(folder)
    convert(data, tmp_path / "voc", "voc")
    assert len(list((tmp_path / "voc" / "Annotations").iterdir())) == 4
    assert_same(fpn.data.load(tmp_path / "voc"), data)
    convert(data, tmp_path / "coco", "coco")
    assert_same(fpn.data.load(tmp_path / "coco"), data)
    assert any("the split small" in text for text in convert(data, tmp_path / "yolo", "yolo"))


def test_links_are_followed(tmp_path: Path) -> None:
    folder = write_coco(tmp_path / "data")
    (folder / "images").rename(tmp_path / "elsewhere")
    (folder / "images").mkdir()
    for file in (tmp_path / "elsewhere").iterdir():
        (folder / "images" / file.name).symlink_to(Path("..") / ".." / "elsewhere" / file.name)
    convert(fpn.data.load(folder), tmp_path / "deep" / "down" / "new", "coco")
    assert fpn.data.read_image(tmp_path / "deep" / "down" / "new" / "images" / "val" / "d.png").shape == (3, 50, 100)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["train2017/a.jpg", "val2017/b.jpg"], ["a.jpg", "b.jpg"]),
        (["train/a.jpg", "val/a.jpg"], ["train/a.jpg", "val/a.jpg"]),
        (["JPEGImages/p1/a.jpg", "JPEGImages/p2/a.jpg"], ["p1/a.jpg", "p2/a.jpg"]),
        (["../../x/a.jpg", "/y/.hidden.jpg"], ["x/a.jpg", "y/hidden.jpg"]),
        (["images/a.jpg", "data/a.jpg", "A.jpg"], ["a.jpg", "a_2.jpg", "A_3.jpg"]),
        (["data/a.jpg", "a.jpg", "a_2.jpg"], ["a.jpg", "a_3.jpg", "a_2.jpg"]),
        (["back\\slash\n.jpg", "\udcff.jpg"], ["back_slash_.jpg", "_.jpg"]),
    ],
)
def test_names_in_a_copy(files: list[str], expected: list[str]) -> None:
    assert new_names(files) == expected


def test_the_command_says_what_it_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_yolo(tmp_path / "data")
    main(["data", "convert", str(tmp_path / "data"), "--to", "voc", "--out", str(tmp_path / "new")])
    screen = capsys.readouterr().out
    assert "VOC format, 4 boxes, images: train 3, val 1" in screen
    assert "category ids: 0 to 1 become 1 to 2" in screen
    assert_same(fpn.data.load(tmp_path / "new"), fpn.data.load(tmp_path / "data"))


def test_convert_writes_no_split_that_the_data_do_not_have(tmp_path: Path) -> None:
    pictures = tuple(Picture(f"{n}.png", (16, 16 + n), (("cat", 2, 2, 8, 10),)) for n in range(10))
    write_coco(tmp_path / "data", {"train": pictures})
    for form in FORMATS:
        main(["data", "convert", str(tmp_path / "data"), "--to", form, "--out", str(tmp_path / form)])
        copy = fpn.data.load(tmp_path / form, draw=False)
        assert {name: len(part) for name, part in copy.items()} == {"train": 10}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", ["bccd", "coco_tiny"])
def test_real_data_survive(name: str, form: str, shared: Path, tmp_path: Path) -> None:
    data = fpn.data.load(shared / "data" / name)
    convert(data, tmp_path / "new", form)
    new = fpn.data.load(tmp_path / "new")
    for split in data:
        assert new.classes == data.classes and len(new[split]) == len(data[split])
        order = np.argsort(data[split].files) if form == "yolo" else np.arange(len(data[split]))
        expected = data[split].select(order, split)
        kept = ~expected.ignore if form == "yolo" else slice(None)
        np.testing.assert_allclose(new[split].boxes, expected.boxes[kept], rtol=0, atol=1e-9)
        np.testing.assert_array_equal(new[split].labels, expected.labels[kept])
        np.testing.assert_array_equal(new[split].ignore, expected.ignore[kept])
