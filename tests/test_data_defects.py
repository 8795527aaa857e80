"""Defects in a data set are listed by file and item, and only what they touch is left out; nothing crashes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_folders import PICTURES, Picture, coco_content, save_json, write_coco, write_image, write_voc, write_yolo, xml

import fpn.data
from fpn.data.dataset import Data
from fpn.errors import DataError


def coco_with(folder: Path, content: dict[str, Any]) -> Data:
    write_coco(folder, {"val": PICTURES["train"]})
    save_json(folder / "annotations" / "instances_val.json", content)
    return fpn.data.load(folder)


def listed(data: Data) -> list[str]:
    return [str(problem) for problem in data.problems]


# Nothing to read


def test_missing_path(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing/here: no such file or folder"):
        fpn.data.load(tmp_path / "nothing" / "here")


def test_empty_and_unknown_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="it is empty") as error:
        fpn.data.load(tmp_path)
    assert all(word in str(error.value) for word in ("annotations/", "ImageSets/Main", "data.yaml"))
    (tmp_path / "notes.txt").write_text("no data")
    with pytest.raises(DataError, match=r"it has notes\.txt\."):
        fpn.data.load(tmp_path)
    with pytest.raises(DataError, match="a data set is a folder, a COCO JSON file or a YOLO data.yaml"):
        fpn.data.load(tmp_path / "notes.txt")
    write_voc(tmp_path / "cells")
    with pytest.raises(DataError, match="Did you mean .*cells"):
        fpn.data.load(tmp_path)


def test_two_formats_in_one_folder(tmp_path: Path) -> None:
    write_coco(tmp_path)
    write_yolo(tmp_path)
    with pytest.raises(DataError, match="looks like coco and yolo at once"):
        fpn.data.load(tmp_path)
    assert fpn.data.load(tmp_path / "data.yaml").format == "yolo"
    assert fpn.data.load(tmp_path / "annotations" / "instances_val.json").format == "coco"


# COCO


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.999])
def test_truncated_json_names_the_place(share: float, tmp_path: Path) -> None:
    file = write_coco(tmp_path) / "annotations" / "instances_train.json"
    text = file.read_text()
    file.write_text(text[: int(share * len(text))])
    with pytest.raises(DataError, match=r"instances_train.json: not valid JSON at line 1, column \d+ .*cut off"):
        fpn.data.load(tmp_path)


def test_json_that_is_something_else(tmp_path: Path) -> None:
    for content in ([1, 2], {"images": [], "annotations": {}}, 5):
        with pytest.raises(DataError, match="not a COCO instances file, it has no list"):
            fpn.data.load(save_json(tmp_path / "x.json", content))
    (tmp_path / "x.json").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(DataError, match="x.json"):
        fpn.data.load(tmp_path / "x.json")


def test_coco_boxes(tmp_path: Path) -> None:
    content = coco_content((Picture("a.png", (40, 80), (("cat", 8, 4, 24, 20),) * 12),))
    edit = content["annotations"]
    edit[1]["bbox"] = [8, 4, 0, 16]
    edit[2]["bbox"] = [8, 4, -2, 16]
    edit[3]["bbox"] = [8, math.nan, 4, 4]
    edit[4]["bbox"] = [8, 4, math.inf, 16]
    edit[5]["bbox"] = [80, 4, 5, 5]
    edit[6]["bbox"] = [-6, 30, 16, 16]
    edit[7]["bbox"] = [1, 2, 3]
    edit[8]["bbox"] = None
    edit[9]["category_id"] = 99
    edit[10]["image_id"] = 1234
    edit[11]["bbox"] = [70, 4, 10.2, 5]  # over the border by less than coordinates are rounded to
    data = coco_with(tmp_path, content)
    np.testing.assert_allclose(data["val"].boxes, [[8, 4, 24, 20], [0, 30, 10, 40], [70, 4, 80, 9]])
    where = "(annotations/instances_val.json, annotation id {})"
    missing = "has a coordinate that is missing or not a finite number; left out, mend or delete it"
    assert listed(data) == [
        "annotations/instances_val.json: annotation id 11 is of image id 1234, which no image has; left out",
        f"images/a.png: box 2 has width 0 and height 16; left out, mend or delete it {where.format(2)}",
        f"images/a.png: box 3 has width -2 and height 16; left out, mend or delete it {where.format(3)}",
        f"images/a.png: box 4 {missing} {where.format(4)}",
        f"images/a.png: box 5 {missing} {where.format(5)}",
        f"images/a.png: box 6 (80, 4, 85, 9) lies outside the 80x40 image; "
        f"left out, mend or delete it {where.format(6)}",
        f"images/a.png: box 7 (-6, 30, 10, 46) reaches outside the 80x40 image; cut at the border {where.format(7)}",
        f"images/a.png: box 8 {missing} {where.format(8)}",
        f"images/a.png: box 9 {missing} {where.format(9)}",
        f"images/a.png: box 10 has category_id 99, which no category has; left out {where.format(10)}",
    ]
    assert [problem.kind for problem in data.problems] == [
        *("unknown-image", "box-zero-size", "box-zero-size", "box-not-finite", "box-not-finite"),
        *("box-outside", "box-cut", "box-not-finite", "box-not-finite", "unknown-class"),
    ]


def test_coco_ids_that_stand_twice(tmp_path: Path) -> None:
    content = coco_content(PICTURES["train"])
    content["images"].append({**content["images"][1], "id": 1})
    content["annotations"].append({**content["annotations"][2], "bbox": [1, 1, 5, 5]})
    data = coco_with(tmp_path, content)
    assert data["val"].files.tolist() == ["images/b.png", "images/c.png"] and len(data["val"].boxes) == 2
    assert listed(data) == [
        "annotations/instances_val.json: image id 1 is that of images/a.png, images/b.png; "
        "left out with 2 boxes of one or the other, renumber",
        "annotations/instances_val.json: annotation id 3 stands 2 times; all are kept, renumber",
    ]


def test_one_image_in_two_entries(tmp_path: Path) -> None:
    content = coco_content(PICTURES["train"])
    content["images"].append({**content["images"][0], "id": 9, "file_name": "elsewhere/a.png"})
    data = coco_with(tmp_path / "coco", content)
    assert len(data["val"]) == 3
    assert "images/a.png: has 2 entries in annotations/instances_val.json (image ids 1, 9)" in listed(data)[0]

    folder = write_voc(tmp_path / "voc")
    (folder / "Annotations" / "other.xml").write_text(xml(PICTURES["train"][0]))
    (folder / "ImageSets" / "Main" / "train.txt").write_text("a\nother\n")
    voc = fpn.data.load(folder)
    assert listed(voc) == [
        "Annotations/other.xml: its image JPEGImages/a.png is also that of a.xml; both are kept, delete one"
    ]

    folder = write_yolo(tmp_path / "yolo")
    write_image(folder / "images" / "train" / "a.bmp", (40, 80))
    yolo = fpn.data.load(folder)
    assert listed(yolo) == ["labels/train/a.txt: belongs to 2 images of this name; all are kept, delete all but one"]
    assert {problem.kind for problem in (*data.problems, *voc.problems, *yolo.problems)} == {"duplicate-entry"}


def test_numbers_as_text_count_and_nested_ones_do_not(tmp_path: Path) -> None:
    content = coco_content((Picture("a.png", (40, 80), (("cat", 8, 4, 24, 20),) * 3),))
    content["annotations"][0]["bbox"] = ["8", "4.0", "16", "1.6e1"]
    content["annotations"][1]["bbox"] = [[8, 4], [16, 16]]
    content["annotations"][2]["bbox"] = [[8], [4], [16], [16]]
    data = coco_with(tmp_path, content)
    assert data["val"].boxes.tolist() == [[8, 4, 24, 20]]
    assert [problem.kind for problem in data.problems] == ["box-not-finite"] * 2


def test_words_from_files_cannot_break_the_terminal(tmp_path: Path) -> None:
    content = coco_content(PICTURES["train"])
    content["images"][0]["file_name"] = "\x1b[2J\ud800\n" + "x" * 10_000
    problem = coco_with(tmp_path, content).problems[0]
    assert problem.file.startswith("\\x1b[2J\\ud800\\nxxx") and len(problem.file) < 1020 and str(problem).isprintable()


def test_coco_missing_and_unreadable_images(tmp_path: Path) -> None:
    pictures = (*PICTURES["train"], *PICTURES["val"])
    content = coco_content(pictures)
    del content["images"][1]["height"]  # has to be read from the image, which is none
    write_coco(tmp_path, {"val": pictures})
    save_json(tmp_path / "annotations" / "instances_val.json", content)
    (tmp_path / "images" / "a.png").unlink()
    (tmp_path / "images" / "b.png").write_bytes(b"not an image")
    data = fpn.data.load(tmp_path)
    assert data["val"].files.tolist() == ["images/c.png", "images/d.png"]
    assert data["val"].boxes.tolist() == [[25, 10, 75, 30]] and data["val"].offsets.tolist() == [0, 0, 1]
    assert "a.png: image not found in images, . " in listed(data)[0]
    assert listed(data)[1].startswith("images/b.png: not an image that Pillow can read")
    assert len(data.problems) == 2


def test_coco_entries_of_the_wrong_kind(tmp_path: Path) -> None:
    content = coco_content(PICTURES["train"])
    content["images"] += [7, {"id": 9}, {"id": [1], "file_name": "x.png"}]
    content["annotations"] += ["box", {"image_id": {}}, {}]
    data = coco_with(tmp_path, content)
    assert len(data["val"]) == 3 and len(data["val"].boxes) == 3 and len(data.problems) == 6

    content["categories"] = [{"id": 1}]
    with pytest.raises(DataError, match=r"category \{'id': 1\} needs a whole number 'id' and a 'name'"):
        coco_with(tmp_path, content)
    content["categories"] = []
    with pytest.raises(DataError):
        coco_with(tmp_path, content)


def test_coco_ids_that_are_text(tmp_path: Path) -> None:
    content = coco_content(PICTURES["train"])
    for entry in content["images"]:
        entry["id"] = f"image {entry['id']}"
    for entry in content["annotations"]:
        entry["image_id"] = f"image {entry['image_id']}"
    data = coco_with(tmp_path, content)
    assert data["val"].image_ids.tolist() == [1, 2, 3] and len(data["val"].boxes) == 3
    assert "numbered from 1" in listed(data)[0]


def test_nothing_usable_is_an_error(tmp_path: Path) -> None:
    content = coco_content(PICTURES["train"])
    for annotation in content["annotations"]:
        annotation["bbox"] = [1, 1, 0, 0]
    with pytest.raises(DataError, match=r"not one usable box; problems:\n.*a.png: box 1 has width 0"):
        coco_with(tmp_path, content)

    for image in (tmp_path / "images").iterdir():
        image.unlink()
    with pytest.raises(DataError, match=r"not one usable image; problems:\n.*none of its 3 images \(a.png"):
        fpn.data.load(tmp_path)


def test_a_split_without_images_is_left_out(tmp_path: Path) -> None:
    write_coco(tmp_path)
    (tmp_path / "images" / "d.png").unlink()
    data = fpn.data.load(tmp_path)
    assert "val" not in data.notes and any("the split val has no usable images" in note for note in data.notes)
    assert sum(len(split) for split in data.values()) == 3


# Pascal VOC


def test_voc_defects(tmp_path: Path) -> None:
    write_voc(tmp_path)
    annotations, main = tmp_path / "Annotations", tmp_path / "ImageSets" / "Main"
    broken = (
        "<object><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>5</xmax><ymax>5</ymax></bndbox></object>"
        "<object><name>cat</name></object>"
        "<object><name>cat</name><bndbox><xmin>9</xmin><ymin>1</ymin><xmax>5</xmax><ymax>5</ymax></bndbox></object>"
    )
    (annotations / "a.xml").write_text(xml(PICTURES["train"][0], broken))
    (annotations / "b.xml").write_text(xml(PICTURES["train"][1])[:-20])
    (tmp_path / "JPEGImages" / "c.png").unlink()
    (main / "train.txt").write_text("a\nb\nc\na\nnone\n")
    data = fpn.data.load(tmp_path)
    assert {name: (len(split), len(split.boxes)) for name, split in data.items()} == {"train": (1, 2), "val": (1, 1)}
    texts = "\n".join(listed(data))
    for part in (
        "Annotations/a.xml: box 3 has no class",
        "Annotations/a.xml: box 4 has a coordinate that is missing",
        "Annotations/a.xml: box 5 has width -4 and height 4",
        "Annotations/b.xml: not valid XML",
        "Annotations/c.xml: its image (c.* or c.png) was not found",
        "ImageSets/Main/train.txt: line 4 names a again",
        "ImageSets/Main/train.txt: line 5 names none, but Annotations/none.xml does not exist",
    ):
        assert part in texts
    assert len(data.problems) == 7


def test_voc_entities_are_refused(tmp_path: Path) -> None:
    write_voc(tmp_path)
    file = tmp_path / "Annotations" / "a.xml"
    entities = '<!ENTITY l0 "ha">' + "".join(f'<!ENTITY l{n} "{f"&l{n - 1};" * 10}">' for n in range(1, 10))
    file.write_text(f"<!DOCTYPE annotation [{entities}]>" + file.read_text().replace("cat", "&l9;"))
    data = fpn.data.load(tmp_path)
    assert listed(data) == [
        "Annotations/a.xml: has a DOCTYPE or is not plain text; left out, save it as XML without one"
    ]


def test_voc_without_a_readable_annotation(tmp_path: Path) -> None:
    write_voc(tmp_path)
    for file in (tmp_path / "Annotations").iterdir():
        file.write_text("<annotation>")
    with pytest.raises(
        DataError, match="no object in its 0 readable annotation files has a class; first problem: .*XML"
    ):
        fpn.data.load(tmp_path)


# YOLO


def test_yolo_defects(tmp_path: Path) -> None:
    write_yolo(tmp_path)
    lines = ["0 0.5 0.5 0.5 0.5", "9 .5 .5 .1 .1", "0 .5 .5 .1", "0 a b c d", "0 nan .5 .1 .1", "0 .5 .5 0 .1"]
    lines += ["0.5 .5 .5 .1 .1", "0 3 3 .1 .1", "", "1 1 .5 .5 .5"]
    (tmp_path / "labels/train/a.txt").write_text("\n".join(lines))
    (tmp_path / "labels/train/b.txt").write_bytes(b"\xff\xfe\x80")
    (tmp_path / "images/train/c.png").write_bytes(b"")
    data = fpn.data.load(tmp_path)
    assert data["train"].files.tolist() == ["images/train/a.png"]
    np.testing.assert_allclose(data["train"].boxes, [[20, 10, 60, 30], [60, 10, 80, 30]])
    texts = listed(data)
    for part in (
        "labels/train/a.txt: line 2 has class 9, but 'names' has no such number; left out",
        "labels/train/a.txt: line 3 has 3 numbers after the class",
        "labels/train/a.txt: line 4 is not a row of numbers",
        "labels/train/a.txt: line 5 has a number that is not finite",
        "labels/train/a.txt: line 6 has width 0 and height 4",
        "labels/train/a.txt: line 7 has class 0.5",
        "labels/train/a.txt: line 8 (236, 118, 244, 122) lies outside the 80x40 image",
        "labels/train/a.txt: line 10 (60, 10, 100, 30) reaches outside the 80x40 image; cut at the border",
        "labels/train/b.txt: cannot be read as text",
        "images/train/c.png: not an image that Pillow can read (0 bytes)",
    ):
        assert any(text.startswith(part) for text in texts), part
    assert len(texts) == 10


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("names: [cat\ntrain: x", "not valid YAML"),
        ("", "has no keys"),
        ("train: images/train", "'names' gives no classes"),
        ("names: {a: cat}\ntrain: images/train", "must be class numbers"),
        ("names: [cat, cat]\ntrain: images/train", "same class twice"),
        ("names: [cat]\ntrain: {a: 1}", "must be a folder, a text file or a list"),
        ("names: [cat]\ntrain: nowhere", "not one usable image"),
        ("names: [cat]", "not one usable image"),
    ],
)
def test_yolo_yaml_that_cannot_be_used(text: str, message: str, tmp_path: Path) -> None:
    write_yolo(tmp_path)
    (tmp_path / "data.yaml").write_text(text)
    with pytest.raises(DataError, match=message):
        fpn.data.load(tmp_path)


def test_yolo_without_any_label_file(tmp_path: Path) -> None:
    write_yolo(tmp_path)
    (tmp_path / "labels").rename(tmp_path / "texts")
    with pytest.raises(DataError, match="none of its 4 images has a label file"):
        fpn.data.load(tmp_path)


def test_problems_can_be_written_as_json(tmp_path: Path) -> None:
    content = coco_content(PICTURES["train"])
    content["annotations"][0]["bbox"] = [1, 1, 0, 0]
    description = fpn.data.describe(coco_with(tmp_path, content))
    assert json.loads(json.dumps(description, allow_nan=False)) == description
    assert description["problem_count"] == 1 and description["problems"][0]["item"] == "box 1"


def test_images_without_boxes_alone_are_no_defect(tmp_path: Path) -> None:
    write_image(tmp_path / "images" / "a.png", (8, 8))
    save_json(tmp_path / "annotations" / "val.json", coco_content((Picture("a.png", (8, 8)),)))
    data = fpn.data.load(tmp_path)
    assert len(data["val"]) == 1 and data.problems == [] and "no box has the class" in data.notes[0]
