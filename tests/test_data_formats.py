"""Folders in COCO, VOC and YOLO format become the same arrays; splits and classes are those of the data."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from data_folders import (
    PICTURES,
    Picture,
    coco_content,
    save_json,
    write_coco,
    write_image,
    write_voc,
    write_yolo,
    xml,
)

import fpn.data
from fpn.errors import DataError

WRITERS = {"coco": write_coco, "voc": write_voc, "yolo": write_yolo}


@pytest.mark.parametrize("form", WRITERS)
def test_same_content_gives_the_same_arrays(form: str, tmp_path: Path) -> None:
    data = fpn.data.load(WRITERS[form](tmp_path))
    assert data.format == form
    assert data.classes == ("cat", "dog")
    assert data.problems == []
    assert data.notes == ["no box of val has the class 'dog', so there is no score for it"]
    assert list(data) == ["train", "val"]

    train = data["train"]
    assert [Path(file).name for file in train.files] == ["a.png", "b.png", "c.png"]
    assert all(train.path(index).is_file() for index in range(3))
    np.testing.assert_array_equal(train.sizes, [[40, 80], [80, 40], [20, 20]])
    np.testing.assert_array_equal(train.offsets, [0, 2, 3, 3])
    np.testing.assert_allclose(train.boxes, [[8, 4, 24, 20], [40, 10, 80, 40], [0, 0, 10, 20]], atol=1e-12)
    np.testing.assert_array_equal(train.labels, [0, 1, 1])
    np.testing.assert_allclose(train.areas, [256, 1200, 200], atol=1e-9)
    assert not train.ignore.any()
    np.testing.assert_allclose(data["val"].boxes, [[25, 10, 75, 30]], atol=1e-12)
    assert train.boxes.dtype == np.float64 and train.labels.dtype == train.sizes.dtype == np.int64
    assert len(np.unique(train.image_ids)) == 3


@pytest.mark.parametrize("form", WRITERS)
def test_a_set_without_val_is_split_and_says_so(form: str, tmp_path: Path) -> None:
    pictures = tuple(
        Picture(f"{index:02}.png", (16, 16), (("cat" if index % 4 else "dog", 2, 2, 8, 10),)) for index in range(40)
    )
    folder = WRITERS[form](tmp_path, {"train": pictures})
    data = fpn.data.load(folder, seed=1)
    assert {name: len(split) for name, split in data.items()} == {"train": 32, "val": 4, "test": 4}
    assert "seed 1" in data.notes[0] and "train 32" in data.notes[0]
    files = [file for split in data.values() for file in split.files.tolist()]
    assert sorted(set(files)) == sorted(files) and len(files) == 40
    # A quarter of the images show the rarer class; the parts hold their share of it.
    assert [int((split.labels == data.classes.index("dog")).sum()) for split in data.values()] == [8, 1, 1]

    again, other = fpn.data.load(folder, seed=1), fpn.data.load(folder, seed=2)
    assert again["val"].files.tolist() == data["val"].files.tolist()
    assert other["val"].files.tolist() != data["val"].files.tolist()


def test_no_split_is_drawn_where_none_is_wanted(tmp_path: Path) -> None:
    pictures = tuple(Picture(f"{index}.png", (16, 16), (("cat", 2, 2, 8, 10),)) for index in range(20))
    write_coco(tmp_path / "whole", {"default": pictures})
    assert list(fpn.data.load(tmp_path / "whole")) == ["train", "val", "test"]
    whole = fpn.data.load(tmp_path / "whole", draw=False)
    assert {name: len(split) for name, split in whole.items()} == {"train": 20}
    assert not any("divided" in note for note in whole.notes)


def test_only_val_is_drawn_where_test_exists(tmp_path: Path) -> None:
    pictures = tuple(Picture(f"{index}.png", (16, 16), (("cat", 2, 2, 8, 10),)) for index in range(30))
    data = fpn.data.load(write_coco(tmp_path, {"train": pictures[:20], "test": pictures[20:]}))
    assert {name: len(split) for name, split in data.items()} == {"train": 18, "val": 2, "test": 10}


@pytest.mark.parametrize(("number", "expected"), [(1, [1]), (2, [1, 1]), (3, [1, 1, 1]), (4, [2, 1, 1])])
def test_small_sets_are_split_as_far_as_they_go(number: int, expected: list[int], tmp_path: Path) -> None:
    pictures = tuple(Picture(f"{index}.png", (16, 16), (("cat", 2, 2, 8, 10),)) for index in range(number))
    data = fpn.data.load(write_voc(tmp_path, {"train": pictures}))
    assert [len(split) for split in data.values()] == expected
    assert data.notes


def test_a_lone_val_split_stays_as_it_is(tmp_path: Path) -> None:
    data = fpn.data.load(write_coco(tmp_path, {"val": PICTURES["train"]}))
    assert list(data) == ["val"] and len(data["val"]) == 3


def test_an_unknown_split_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no split 'test'; it has train, val"):
        fpn.data.load(write_coco(tmp_path))["test"]


# COCO


def test_coco_keeps_its_ids_and_the_order_of_its_categories(tmp_path: Path) -> None:
    content = coco_content(PICTURES["train"], ids=(90, 13))
    content["images"][0]["id"] = 532481
    for annotation in content["annotations"][:2]:
        annotation["image_id"] = 532481
    write_coco(tmp_path, {"val": PICTURES["train"]})
    save_json(tmp_path / "annotations" / "instances_val.json", content)
    val = fpn.data.load(tmp_path)["val"]
    assert val.classes == ("cat", "dog")
    assert val.category_ids.tolist() == [90, 13]
    assert val.image_ids.tolist() == [532481, 2, 3]
    assert val.labels.tolist() == [0, 1, 1]


def test_coco_crowds_are_ignored_and_areas_are_the_data_s(tmp_path: Path) -> None:
    write_coco(tmp_path, {"val": PICTURES["train"]})
    content = coco_content(PICTURES["train"])
    content["annotations"][0] |= {"iscrowd": 1, "area": 77.5}
    content["annotations"][1] |= {"ignore": 1, "area": None}
    save_json(tmp_path / "annotations" / "instances_val.json", content)
    val = fpn.data.load(tmp_path)["val"]
    assert val.ignore.tolist() == [True, True, False]
    assert val.areas.tolist() == [77.5, 1200, 200]


@pytest.mark.parametrize(
    ("json_name", "image_folder"),
    [
        ("annotations/instances_train2017.json", "train2017"),
        ("annotations/instances_train2017.json", "images/train2017"),
        ("annotations/train.json", "train"),
        ("annotations/train.json", "images/train"),
        ("train/_annotations.coco.json", "train"),
        ("train.json", "."),
        ("train.json", "train/images"),
        ("labels.json", "data"),
    ],
)
def test_coco_layouts(json_name: str, image_folder: str, tmp_path: Path) -> None:
    save_json(tmp_path / json_name, coco_content(PICTURES["train"]))
    save_json(tmp_path / "metrics.json", {"AP": 0.5, "images": 3})
    for picture in PICTURES["train"]:
        write_image(tmp_path / image_folder / picture.name, picture.size)
    data = fpn.data.load(tmp_path)
    assert data.format == "coco" and data.problems == []
    assert {name: len(split) for name, split in data.items()} == {"train": 1, "val": 1, "test": 1}
    assert fpn.data.load(tmp_path / json_name).classes == data.classes


def test_coco_images_of_one_name_in_two_splits(tmp_path: Path) -> None:
    for split, size in (("train", (10, 20)), ("valid", (30, 40))):
        picture = Picture("1.png", size, (("cat", 1, 1, 9, 9),))
        save_json(tmp_path / split / "_annotations.coco.json", coco_content((picture,)))
        write_image(tmp_path / split / "1.png", size)
    data = fpn.data.load(tmp_path)
    assert [split.files.tolist() for split in data.values()] == [["train/1.png"], ["valid/1.png"]]


def test_coco_folders_in_file_names(tmp_path: Path) -> None:
    content = coco_content(PICTURES["val"])
    content["images"][0]["file_name"] = "C:\\photos\\d.png"
    save_json(tmp_path / "annotations" / "val.json", content)
    write_image(tmp_path / "images" / "d.png", (50, 100))
    assert fpn.data.load(tmp_path)["val"].files.tolist() == ["images/d.png"]


def test_coco_takes_instances_and_leaves_captions(tmp_path: Path) -> None:
    write_coco(tmp_path)
    save_json(tmp_path / "annotations" / "captions_train.json", {"images": [], "annotations": []})
    save_json(tmp_path / "annotations" / "person_keypoints_train.json", coco_content(PICTURES["train"]))
    data = fpn.data.load(tmp_path)
    assert list(data) == ["train", "val"]

    for file in sorted((tmp_path / "annotations").glob("instances_*")):
        file.rename(file.with_name(file.name.removeprefix("instances_")))
    save_json(tmp_path / "annotations" / "colours.json", {"cat": "red"})
    data = fpn.data.load(tmp_path)
    assert list(data) == ["train", "val"]
    assert "colours.json is ignored" in data.notes[0]


def test_coco_classes_are_joined_over_the_splits(tmp_path: Path) -> None:
    write_coco(tmp_path)
    content = coco_content(PICTURES["val"])
    content["categories"] = [{"id": 7, "name": "owl"}, {"id": 1, "name": "cat"}]
    save_json(tmp_path / "annotations" / "instances_val.json", content)
    data = fpn.data.load(tmp_path)
    assert data.classes == ("cat", "dog", "owl")
    assert data["val"].category_ids.tolist() == data["train"].category_ids.tolist() == [1, 2, 7]
    assert data["val"].labels.tolist() == [0]
    lacks = "{}: lacks 1 of the 3 classes of the data, such as '{}'; all splits get the same classes, make sure that "
    assert [str(problem) for problem in data.problems] == [
        lacks.format("instances_train.json", "owl") + "its images show no such objects",
        lacks.format("instances_val.json", "dog") + "its images show no such objects",
    ]
    assert {problem.kind for problem in data.problems} == {"class-sets"}
    assert data.notes == [
        "no box has the class 'owl'",
        "no box of val has the class 'dog', so there is no score for it",
    ]


def test_coco_category_that_means_two_things(tmp_path: Path) -> None:
    write_coco(tmp_path)
    content = coco_content(PICTURES["val"])
    content["categories"][0]["name"] = "owl"
    save_json(tmp_path / "annotations" / "instances_val.json", content)
    with pytest.raises(DataError, match=r"category id 1 is 'owl', but 'cat' in .*instances_train.json"):
        fpn.data.load(tmp_path)


def test_coco_parent_category_of_the_same_name(tmp_path: Path) -> None:
    write_coco(tmp_path, {"val": PICTURES["train"]})
    content = coco_content(PICTURES["train"])
    content["categories"].insert(0, {"id": 0, "name": "cat"})
    save_json(tmp_path / "annotations" / "instances_val.json", content)
    data = fpn.data.load(tmp_path)
    assert data.classes == ("cat", "dog")
    assert data["val"].category_ids.tolist() == [1, 2]  # the one that the boxes use
    assert "[0, 1]" in data.problems[0].text

    content["annotations"] = [entry for entry in content["annotations"] if entry["category_id"] == 2]
    save_json(tmp_path / "annotations" / "instances_val.json", content)
    assert fpn.data.load(tmp_path)["val"].category_ids.tolist() == [0, 2]  # unused: the first


def test_coco_boxes_of_an_image_keep_their_order(tmp_path: Path) -> None:
    boxes = tuple(("cat", x, 0, x + 5, 5) for x in range(70))
    content = coco_content((Picture("a.png", (40, 80), boxes), Picture("b.png", (40, 80), boxes)))
    content["annotations"] = [
        entry for two in zip(*np.split(np.array(content["annotations"]), 2), strict=True) for entry in two
    ]
    write_coco(tmp_path, {"val": (Picture("a.png", (40, 80)), Picture("b.png", (40, 80)))})
    save_json(tmp_path / "annotations" / "instances_val.json", content)
    val = fpn.data.load(tmp_path)["val"]
    assert val.offsets.tolist() == [0, 70, 140]
    assert val.boxes[:, 0].tolist() == [*range(70), *range(70)]


def test_coco_tiny(shared: Path) -> None:
    data = fpn.data.load(shared / "data" / "coco_tiny")
    assert {name: (len(split), len(split.boxes)) for name, split in data.items()} == {
        "train": (80, 705),
        "val": (80, 815),
    }
    assert len(data.classes) == 80 and data.problems == []
    assert data["train"].category_ids[[0, 11, 79]].tolist() == [1, 13, 90]

    content = json.loads((shared / "data/coco_tiny/annotations/instances_val2017.json").read_text())
    val = data["val"]
    assert int(val.ignore.sum()) == sum(annotation["iscrowd"] for annotation in content["annotations"]) > 0
    first = [annotation for annotation in content["annotations"] if annotation["image_id"] == val.image_ids[0]]
    expected = [[x, y, x + w, y + h] for x, y, w, h in (annotation["bbox"] for annotation in first)]
    np.testing.assert_allclose(val.boxes[val.rows(0)], expected, atol=0.01)
    assert val.category_ids[val.labels[val.rows(0)]].tolist() == [annotation["category_id"] for annotation in first]


# Pascal VOC


def test_voc_lists(tmp_path: Path) -> None:
    main = write_voc(tmp_path) / "ImageSets" / "Main"
    (main / "trainval.txt").write_text("a\nb\nc\nd\n")
    (main / "dog_train.txt").write_text("a  1\nb -1\n")
    (main / "val.txt").write_text("d  1\n\n")
    (main / "small.txt").write_text("a\n")
    data = fpn.data.load(tmp_path)
    assert {name: len(split) for name, split in data.items()} == {"train": 3, "val": 1, "small": 1}
    assert data["small"].image_ids.tolist() == data["train"].image_ids[:1].tolist()

    (main / "val.txt").unlink()
    assert len(fpn.data.load(tmp_path)["train"]) + len(fpn.data.load(tmp_path)["val"]) == 4  # of trainval


def test_voc_details(tmp_path: Path) -> None:
    write_voc(tmp_path, {"val": ()})
    picture = Picture("photo 1.png", (30, 50), (("owl & co", 1, 2, 21.5, 12),))
    difficult = (
        "<object><name>cat</name><difficult>1</difficult><part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>"
        "<bndbox><xmax>9</xmax><xmin>3</xmin><ymin>4</ymin><ymax>8</ymax></bndbox></object>"
    )
    text = xml(picture, difficult).replace("<width>50</width>", "<width>0</width>")
    (tmp_path / "Annotations" / "photo 1.xml").write_text(text)
    write_image(tmp_path / "JPEGImages" / "photo 1.png", picture.size)
    (tmp_path / "ImageSets" / "Main" / "val.txt").write_text("photo 1\n")
    val = fpn.data.load(tmp_path)["val"]
    assert val.classes == ("owl & co", "cat") and val.category_ids.tolist() == [1, 2]
    assert val.sizes.tolist() == [[30, 50]]  # from the image, as the annotation has no width
    assert val.boxes.tolist() == [[1, 2, 21.5, 12], [3, 4, 9, 8]]
    assert val.ignore.tolist() == [False, True]


def test_voc_split_folders_without_lists(tmp_path: Path) -> None:
    for split, name in (("train", "train"), ("val", "valid")):
        for picture in PICTURES[split]:
            write_image(tmp_path / name / picture.name, picture.size)
            (tmp_path / name / f"{Path(picture.name).stem}.xml").write_text(xml(picture))
    data = fpn.data.load(tmp_path)
    assert data.format == "voc"
    assert {name: len(split) for name, split in data.items()} == {"train": 3, "val": 1}


def test_voc_flat_folder(tmp_path: Path) -> None:
    for picture in PICTURES["train"]:
        write_image(tmp_path / picture.name, picture.size)
        (tmp_path / f"{Path(picture.name).stem}.xml").write_text(xml(picture))
    assert {name: len(split) for name, split in fpn.data.load(tmp_path).items()} == {"train": 1, "val": 1, "test": 1}


def test_bccd(shared: Path) -> None:
    data = fpn.data.load(shared / "data" / "bccd")
    assert {name: len(split) for name, split in data.items()} == {"train": 205, "val": 87, "test": 72}
    labels = np.concatenate([split.labels for split in data.values()])
    counts = dict(zip(data.classes, np.bincount(labels).tolist(), strict=True))
    assert counts == {"RBC": 4153, "WBC": 372, "Platelets": 361}
    assert data.classes == ("WBC", "RBC", "Platelets")  # the order of first appearance
    assert sorted(problem.file for problem in data.problems) == [
        "Annotations/BloodImage_00338.xml",
        "Annotations/BloodImage_00343.xml",
    ]
    assert all("width 0 and height 0" in problem.text for problem in data.problems)


# YOLO


def test_yolo_names_with_gaps_and_polygons(tmp_path: Path) -> None:
    write_yolo(tmp_path)
    (tmp_path / "data.yaml").write_text("path: .\nnames: {3: cat, 7: dog}\ntrain: [images/train]\nval: images/val\n")
    (tmp_path / "labels/train/a.txt").write_text("7 0.5 0.25 0.75 0.5 0.5 0.75\n")
    (tmp_path / "labels/train/b.txt").write_text("")
    (tmp_path / "labels/val/d.txt").write_text("3 0.5 0.5 0.5 0.2\n")
    data = fpn.data.load(tmp_path)
    assert data.problems == []
    assert data["val"].category_ids.tolist() == [3, 7]
    assert data["train"].labels.tolist() == [1]
    np.testing.assert_allclose(data["train"].boxes, [[40, 10, 60, 30]])
    np.testing.assert_allclose(data["val"].boxes, [[25, 20, 75, 30]])
    assert data["train"].image_ids.tolist() + data["val"].image_ids.tolist() == [1, 2, 3, 4]


def test_yolo_keypoints_are_not_taken_for_polygons(tmp_path: Path) -> None:
    write_yolo(tmp_path)
    with (tmp_path / "data.yaml").open("a") as stream:
        stream.write("kpt_shape: [1, 2]\n")
    (tmp_path / "labels/val/d.txt").write_text("0 0.5 0.5 0.5 0.2 0.1 0.1\n")
    np.testing.assert_allclose(fpn.data.load(tmp_path)["val"].boxes, [[25, 20, 75, 30]])


def test_yolo_lists_of_images_and_roboflow_paths(tmp_path: Path) -> None:
    write_yolo(tmp_path)
    (tmp_path / "train.txt").write_text("./images/train/a.png\nimages/train/b.png\n\nimages/train/none.png\n")
    (tmp_path / "data.yaml").write_text("names: [cat, dog]\ntrain: train.txt\nvalid: ../images/val\ntest:\n")
    for path in (tmp_path, tmp_path / "data.yaml"):
        data = fpn.data.load(path)
        assert {name: len(split) for name, split in data.items()} == {"train": 2, "val": 1}
        assert [str(problem)[:27] for problem in data.problems] == ["train.txt: line 4 images/tr"]


def test_yolo_another_name_for_the_yaml_file_and_labels_beside_images(tmp_path: Path) -> None:
    write_yolo(tmp_path)
    (tmp_path / "data.yaml").rename(tmp_path / "pets.yaml")
    for split in ("train", "val"):
        for label in (tmp_path / "labels" / split).iterdir():
            label.rename(tmp_path / "images" / split / label.name)
    data = fpn.data.load(tmp_path)
    assert data.format == "yolo" and len(data["train"].boxes) == 3
