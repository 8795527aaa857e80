"""The description of a data set counts right, and the screen shows it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from data_folders import PICTURES, Picture, coco_content, save_json, write_coco, write_voc

import fpn.data
from fpn.data import describe, print_info


def test_numbers(tmp_path: Path) -> None:
    write_coco(tmp_path)
    content = coco_content(PICTURES["train"])
    content["annotations"][2]["iscrowd"] = 1
    save_json(tmp_path / "annotations" / "instances_train.json", content)
    facts = describe(fpn.data.load(tmp_path))
    assert facts["format"] == "coco" and facts["problem_count"] == 0
    assert facts["splits"]["train"] == {
        "images": 3,
        "boxes": 2,
        "ignored": 1,
        "images_without_objects": 1,
        "most_boxes_in_an_image": 2,
        "height": {"min": 20, "median": 40, "max": 80},
        "width": {"min": 20, "median": 40, "max": 80},
    }
    assert facts["classes"] == [
        {"name": "cat", "boxes": {"train": 1, "val": 1}},
        {"name": "dog", "boxes": {"train": 1, "val": 0}},
    ]
    sizes = facts["box_sizes"]  # 16x16, 40x30, 50x20
    assert (sizes["small"], sizes["medium"], sizes["large"]) == (2, 1, 0)
    assert sizes["percentiles"]["50"] == pytest.approx(np.sqrt(1000), abs=0.05)
    assert (sizes["min"], sizes["max"]) == (16, pytest.approx(np.sqrt(1200), abs=0.05))


def test_screen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_voc(tmp_path)
    with (tmp_path / "ImageSets" / "Main" / "val.txt").open("a") as stream:
        stream.write("[red]gone\n" * 30)
    print_info(describe(fpn.data.load(tmp_path)))
    screen = capsys.readouterr().out
    for part in ("VOC format, 2 classes", "train", "cat", "dog", "30 problems", "[red]gone", "and 10 more"):
        assert part in screen


def test_screen_without_boxes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = describe(fpn.data.load(write_coco(tmp_path, {"val": (Picture("a.png"),)})))
    assert facts["box_sizes"]["percentiles"] == {}
    print_info(facts)
    screen = capsys.readouterr().out
    assert "none" in screen and "No problems found" in screen


def test_bccd(shared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = describe(fpn.data.load(shared / "data" / "bccd"))
    assert {entry["name"]: sum(entry["boxes"].values()) for entry in facts["classes"]} == {
        "WBC": 372,
        "RBC": 4153,
        "Platelets": 361,
    }
    print_info(facts)
    assert "2 problems" in capsys.readouterr().out
