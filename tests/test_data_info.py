"""The description of a data set counts right, and the screen shows it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from data_folders import PICTURES, Picture, coco_content, save_json, write_coco, write_voc

import fpn.data
from fpn.cli import main
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
    assert "none" in screen and "No defects met while reading; fpn data check" in screen


def test_fit_advice_and_limits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_coco(tmp_path)
    picture = tmp_path / "out" / "picture.svg"
    options = ["--short", "64", "--long", "128", "--anchors", "8", "16", "32", "64", "128"]
    options += ["--ratios", "0.5", "1"]
    main(["data", "info", str(tmp_path), *options, "--out", str(picture), "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert picture.read_text().startswith("<?xml")
    fit = facts["fit"]
    assert (fit["short"], fit["long"], fit["anchors"], fit["ratios"]) == (64, 128, [8, 16, 32, 64, 128], [0.5, 1])
    assert fit["boxes"] == 4 and sum(level["boxes"] for level in fit["levels"].values()) == 4
    assert fit["levels"]["P6"] == {"anchor": 128, "boxes": 0}
    assert facts["caps"] == {
        "densest_image": "images/a.png",
        "objects": 2,
        "max_detections": 100,
        "proposals": [2000, 1000],
    }
    main(["data", "info", str(tmp_path), *options])
    screen = " ".join(capsys.readouterr().out.split())
    assert "a shorter side of 64 and at most 128 pixels" in screen and "2 objects, the usual limits suffice" in screen


def test_advice_is_on_the_screen_and_in_the_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = tuple(("cat", float(x), float(x), x + 4.0, x + 4.0) for x in range(0, 80, 8))
    write_coco(tmp_path, {"train": (Picture("a.png", (100, 100), tiny),)})
    main(["data", "info", str(tmp_path), "--short", "200", "--json"])
    advice = json.loads(capsys.readouterr().out)["advice"]
    assert advice[0]["topic"] == "input size" and advice[0]["options"] == {"short": 416}  # 8 pixels become 16
    main(["data", "info", str(tmp_path), "--short", "200"])
    screen = " ".join(capsys.readouterr().out.split())
    assert all(entry["text"] in screen for entry in advice)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--anchors", "32", "64"], "need 5"),
        (["--short", "8"], "at least 32"),
        (["--ratios", "0"], "above 0"),
        (["--out", "a.docx"], "must end in .png"),
    ],
)
def test_options_that_cannot_work_are_refused(tmp_path: Path, options: list[str], words: str) -> None:
    with pytest.raises(SystemExit, match=words):
        main(["data", "info", str(write_coco(tmp_path)), *options])


def test_a_dense_image_raises_the_limits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    boxes = tuple(("cat", float(x), float(y), x + 4.0, y + 4.0) for x in range(0, 400, 4) for y in range(0, 200, 4))
    data = fpn.data.load(write_coco(tmp_path, {"train": (Picture("a.png", (200, 400), boxes),)}))
    facts = describe(data)
    assert facts["caps"]["objects"] == 5000 and facts["caps"]["max_detections"] == 6000
    print_info(facts)
    screen = " ".join(capsys.readouterr().out.split())
    assert "5,000 objects, fpn train allows 6,000 detections and 12,000 proposals" in screen


def test_bccd(shared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = describe(fpn.data.load(shared / "data" / "bccd"))
    assert {entry["name"]: sum(entry["boxes"].values()) for entry in facts["classes"]} == {
        "WBC": 372,
        "RBC": 4153,
        "Platelets": 361,
    }
    print_info(facts)
    assert "2 problems" in capsys.readouterr().out
