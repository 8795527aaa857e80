"""The report: one page on its own, every number and picture in it, and words for what is missing."""

from __future__ import annotations

import base64
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fpn.drawing import ALARM, colour_of
from fpn.errors import FpnError
from fpn.evaluation import report
from fpn.evaluation.charts import training_charts
from fpn.evaluation.page import LEVEL_COLOURS, annotated
from fpn.evaluation.report import ReportSample, write_report
from fpn.structures import Detections

CLASSES = ("ball", "<crate>")
METRICS = {"AP": 0.6124, "AP50": 0.893, "AP75": 0.67, "AP_small": 0.41, "AP_medium": 0.68, "AP_large": -1.0}
PER_CLASS = {"ball": {"AP": 0.7, "AP50": 0.9, "objects": 12.0}, "<crate>": {"AP": -1.0, "AP50": -1.0, "objects": 0.0}}
HISTORY = [
    {"epoch": 1, "loss": 2.5, "rpn_class": 0.7, "class": 1.0, "AP": -1, "lr": 0.02},
    {"epoch": 2, "loss": math.nan, "rpn_class": 0.4, "class": 0.6, "AP": 0.3, "lr": 0.02},
    {"epoch": 3, "loss": 1.1, "class": 0.5, "AP": 0.5, "lr": 0.002},
]


def sample(rows: list[tuple[list[float], float, int, int]], truth: list[tuple[list[float], int]]) -> ReportSample:
    """A grey image with detections (box, score, label, level) and true boxes (box, label)."""
    detections = Detections(
        torch.tensor([r[0] for r in rows]).reshape(-1, 4).float(),
        torch.tensor([r[1] for r in rows]).float(),
        torch.tensor([r[2] for r in rows]).long(),
        torch.tensor([r[3] for r in rows]).long(),
        torch.tensor(len(rows)),
        CLASSES,
    )
    boxes = torch.tensor([t[0] for t in truth]).reshape(-1, 4).float()
    image = torch.full((3, 100, 200), 90, dtype=torch.uint8)
    return ReportSample(image, boxes, torch.tensor([t[1] for t in truth]).long(), detections)


BOX, OTHER = [10.0, 10.0, 50.0, 50.0], [120.0, 20.0, 180.0, 90.0]
MIXED = sample(
    [(BOX, 0.9, 0, 2), ([12.0, 10.0, 50.0, 50.0], 0.8, 0, 2), (OTHER, 0.7, 0, 4), (OTHER, 0.3, 1, 4)],
    [(BOX, 0), (OTHER, 1)],
)


def write(out: Path, **changes) -> str:
    given = {"title": "A <run>", "metrics": METRICS, "per_class": PER_CLASS, "history": HISTORY, "samples": [MIXED]}
    path = write_report(out, **(given | {"facts": {"machine": "two & a half cores"}} | changes))
    assert path == out / "report.html"
    return path.read_text(encoding="utf-8")


class Page(HTMLParser):
    """Checks that elements close in order, and collects what is embedded."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[dict] = []
        self.tags: set[str] = set()
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag == "img":
            self.images.append(dict(attrs))
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_stands_on_its_own(tmp_path: Path) -> None:
    text = write(tmp_path)
    page = Page(text)
    assert "http" not in text and "script" not in page.tags and "link" not in page.tags and "url(" in text
    assert not re.findall(r'(?:src|href)="(?!data:|#)', text)
    assert not re.findall(r"url\((?!#)", text)
    assert "A &lt;run&gt;" in text and "<run>" not in text
    assert "&lt;crate&gt;" in text and "<crate>" not in text
    assert "two &amp; a half cores" in text


def test_pictures_are_in_the_page_and_beside_it(tmp_path: Path) -> None:
    page = Page(write(tmp_path))
    names = {p.name for p in (tmp_path / "pictures").iterdir()}
    assert names == {"01-truth.jpg", "01-found.jpg", "01-levels.jpg", "losses.png", "ap.png"}
    embedded = {base64.b64decode(image["src"].partition("base64,")[2]) for image in page.images}
    assert embedded == {p.read_bytes() for p in (tmp_path / "pictures").glob("*.jpg")}
    for file in (tmp_path / "pictures").iterdir():
        with Image.open(file) as picture:
            picture.load()
    assert all(image["alt"] for image in page.images)


def test_numbers_and_words_for_those_that_are_missing(tmp_path: Path) -> None:
    text = write(tmp_path, notes=["AP_large is -1: nothing is that large"])
    for value in ("0.612", "0.893", "0.670", "0.410", "0.680"):
        assert f"<dd>{value}</dd>" in text
    assert re.search(r"AP large</dt><dd>–</dd>.*?not measured: no large objects", text)
    assert "AP_large is -1: nothing is that large" in text
    assert "-1.000" not in text and "-100" not in text
    assert "the images hold no object of this class" in text
    some = write(tmp_path, metrics={"AP": math.nan})
    assert "<dd>–</dd>" in some and "AP50</dt>" not in some


def test_right_missed_and_false() -> None:
    judged = report._judge(MIXED, threshold=0.5)
    assert judged.right == [True, False, False], "the second takes nothing, the third has the wrong class"
    assert judged.found == [True, False]
    assert report._judge(MIXED, threshold=0.2).found == [True, True]
    # 40x40 boxes moved by 13: IoU 27/53 = 0.509; by 14: 26/54 = 0.481
    for shift, right in ((13.0, True), (14.0, False)):
        moved = sample([([10 + shift, 10.0, 50 + shift, 50.0], 0.9, 0, 3)], [(BOX, 0)])
        assert report._judge(moved, 0.5).right == [right]
    empty = report._judge(sample([], []), 0.5)
    assert empty.right == empty.found == []


def test_a_detection_takes_the_object_it_overlaps_most() -> None:
    near = [12.0, 10.0, 52.0, 50.0]
    judged = report._judge(sample([(near, 0.9, 0, 2)], [(BOX, 0), (near, 0)]), 0.5)
    assert judged.found == [False, True]


def test_caption_and_colours_tell_errors(tmp_path: Path) -> None:
    text = write(tmp_path)
    assert "2 objects · 1 found · <b>1 missed</b> · <b>2 false</b>" in text
    judged = report._judge(MIXED, 0.5)
    truth = np.asarray(report._truth_picture(judged)).reshape(-1, 3)
    assert (truth == ALARM).all(axis=1).any() and (truth == colour_of(0)).all(axis=1).any()
    right = report._judge(sample([(BOX, 0.9, 0, 2)], [(BOX, 0)]), 0.5)
    for picture in (report._truth_picture(right), report._found_picture(right)):
        assert not (np.asarray(picture).reshape(-1, 3) == ALARM).all(axis=1).any()


def test_levels_are_counted_and_coloured(tmp_path: Path) -> None:
    text = write(tmp_path)
    rows = re.findall(r"P(\d)</th><td>(\d+) px</td><td>(\d+)</td>", text)
    assert rows == [("2", "4", "2"), ("3", "8", "0"), ("4", "16", "1"), ("5", "32", "0")]
    with Image.open(tmp_path / "pictures/01-levels.jpg") as picture:
        assert picture.size == (640, 320)
        across = np.asarray(picture).astype(int)[140, 384:386].mean(axis=0)  # left side of OTHER, read from P4
    nearest = min(LEVEL_COLOURS, key=lambda n: np.abs(across - LEVEL_COLOURS[n]).sum())
    assert nearest == 4


def test_small_and_large_images_are_brought_to_a_readable_size() -> None:
    for shape, expected in (((3, 20, 10), (320, 640)), ((3, 700, 800), (800, 700)), ((3, 1000, 4000), (960, 240))):
        picture = annotated(torch.zeros(shape, dtype=torch.uint8), torch.zeros(0, 4), [], [], [])
        assert picture.size == expected


def test_nothing_to_show(tmp_path: Path) -> None:
    text = write(tmp_path, metrics={}, per_class={}, history=[], samples=[], facts={})
    Page(text)
    assert "<h2>" not in text
    assert list((tmp_path / "pictures").iterdir()) == []
    Page(write(tmp_path, samples=[sample([], [])]))


def test_charts_show_each_loss_and_ap() -> None:
    losses, precision = training_charts(HISTORY)
    assert [losses.name, precision.name] == ["losses", "ap"]
    assert ">rpn class<" in losses.svg and ">loss<" in losses.svg
    assert ">lr<" not in losses.svg and ">AP<" not in losses.svg and ">AP<" in precision.svg
    assert losses.png.startswith(b"\x89PNG")
    assert "currentColor" in losses.svg and "var(--line)" in losses.svg and "xmlns" not in losses.svg
    assert training_charts(HISTORY)[0].svg == losses.svg, "the same every time"


def test_charts_leave_out_what_is_no_number() -> None:
    assert training_charts([]) == []
    assert training_charts([{"epoch": 1, "loss": None, "AP": -1, "lr": 0.1}]) == []
    (only,) = training_charts([{"loss": 1.0}])
    assert only.name == "losses"


def test_a_failure_leaves_no_half_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = write(tmp_path)

    def full(self, content):
        with open(self, "wb") as file:
            file.write(content[:5])
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(FpnError, match="no space"):
        write(tmp_path, title="another")
    monkeypatch.undo()
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == before
    assert not list(tmp_path.rglob("*.tmp"))
