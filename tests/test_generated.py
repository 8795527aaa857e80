"""The generated data set: exact boxes, visible objects, all sizes, the same bytes every time, nothing half-written."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fpn.data import generated
from fpn.errors import DataError, OptionError

SIZE = (128, 160)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return generated.generate(tmp_path_factory.mktemp("generated") / "shapes", images=12, size=SIZE, seed=3)


def read(path: Path, split: str) -> dict:
    return json.loads((path / "annotations" / f"instances_{split}.json").read_text(encoding="utf-8"))


def test_layout_and_boxes(small: Path) -> None:
    for split, images in (("train", 12), ("val", 2)):
        content = read(small, split)
        assert len(content["images"]) == images
        assert [c["name"] for c in content["categories"]] == list(generated.CLASSES)
        for row in content["images"]:
            with Image.open(small / "images" / split / row["file_name"]) as picture:
                assert picture.size == (SIZE[1], SIZE[0]) == (row["width"], row["height"])
        assert len({a["id"] for a in content["annotations"]}) == len(content["annotations"]) > images
        for annotation in content["annotations"]:
            x, y, width, height = annotation["bbox"]
            assert min(x, y) >= 0 and x + width <= SIZE[1] and y + height <= SIZE[0]
            assert annotation["area"] == width * height > 0
            assert 1 <= annotation["category_id"] <= len(generated.CLASSES)


def test_same_seed_same_bytes_and_other_seed_other_picture(small: Path, tmp_path: Path) -> None:
    again = generated.generate(tmp_path / "again", images=12, size=SIZE, seed=3)
    files = sorted(p.relative_to(small) for p in small.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(again) for p in again.rglob("*") if p.is_file())
    assert all((small / f).read_bytes() == (again / f).read_bytes() for f in files)
    other = generated.generate(tmp_path / "other", images=1, size=SIZE, seed=4)
    name = Path("images/train/000001.jpg")
    assert (small / name).read_bytes() != (other / name).read_bytes()
    assert (small / name).read_bytes() != (small / "images/val/000001.jpg").read_bytes()


def test_kept_when_complete_and_made_again_when_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = generated.generate(tmp_path / "data", images=2, size=(64, 64))
    picture = out / "images/train/000002.jpg"
    before = picture.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(generated, "render", lambda *_: pytest.fail("drawn again although all was there"))
        generated.generate(out, images=2, size=(64, 64))
    picture.unlink()
    generated.generate(out, images=2, size=(64, 64))
    assert picture.read_bytes() == before
    monkeypatch.setattr(generated, "ODD_COLOUR", 1.0)
    generated.generate(out, images=2, size=(64, 64))
    assert picture.read_bytes() != before, "a changed constant must give new data"


def test_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = generated.render

    def breaks(size, textures, rng):
        if rng.random() < 0.5:
            raise MemoryError
        return draw(size, textures, rng)

    monkeypatch.setattr(generated, "render", breaks)
    with pytest.raises(MemoryError):
        generated.generate(tmp_path / "data", images=20, size=(64, 64))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("three years of work")
    with pytest.raises(DataError, match="something other than a generated data set"):
        generated.generate(tmp_path, images=1, size=(64, 64))
    assert (tmp_path / "thesis.txt").read_text() == "three years of work"
    for split in ("train", "val"):  # somebody's own COCO data is not ours either
        (tmp_path / "coco/annotations").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"coco/annotations/instances_{split}.json").write_text('{"info": {"year": 2017}, "images": []}')
    with pytest.raises(DataError):
        generated.generate(tmp_path / "coco", images=1, size=(64, 64))


@pytest.mark.parametrize("options", [{"images": 0}, {"size": (63, 320)}, {"size": (320, 5000)}, {"seed": -1}])
def test_impossible_options(tmp_path: Path, options: dict) -> None:
    with pytest.raises(OptionError, match=str(next(iter(options)))):
        generated.generate(tmp_path / "data", **options)


def test_objects_of_every_class_and_size() -> None:
    textures = generated._textures(512, seed=0)
    labels, sides = [], []
    for index in range(40):
        _, objects = generated.render((320, 320), textures, np.random.default_rng((0, index)))
        labels += [label for label, _, _ in objects]
        sides += [float(np.sqrt((x2 - x1) * (y2 - y1))) for _, (x1, y1, x2, y2), _ in objects]
    share = np.histogram(sides, [0, 32, 96, 320])[0] / len(sides)
    assert (share > (0.25, 0.25, 0.1)).all(), f"small, medium, large: {share}"
    assert np.mean(np.array(sides) < 10) < 0.08
    assert (np.bincount(labels, minlength=5) > 0.1 * len(labels)).all()


def test_visible_pixels_decide_the_box() -> None:
    canvas = generated._Canvas(np.zeros((40, 50, 3), dtype=np.float32))
    canvas.own(np.ones((10, 20), dtype=bool), top=5, left=8, need=90)
    assert canvas.box(0).tolist() == [8, 5, 28, 15]
    right_half = np.ones((10, 10), dtype=bool)
    assert canvas.free(right_half, top=5, left=18, need=100)
    assert not canvas.free(np.ones((10, 12), dtype=bool), top=5, left=16, need=100), "leaves 80 of the needed 90"
    assert not canvas.free(right_half, top=35, left=0, need=51), "half of it lies outside"
    canvas.own(right_half, top=5, left=18, need=100)
    assert [canvas.box(i).tolist() for i in (0, 1)] == [[8, 5, 18, 15], [18, 5, 28, 15]]
    canvas.own(np.ones((2, 4), dtype=bool), top=5, left=8, need=None)
    assert canvas.box(0).tolist() == [8, 5, 18, 15], "the corner hidden by clutter is not the whole edge"


def test_no_object_is_hidden_more_than_allowed() -> None:
    rng = np.random.default_rng(5)
    textures = generated._textures(160, seed=0)
    canvas = generated._Canvas(np.zeros((96, 96, 3), dtype=np.float32))
    lamp = generated._Lamp(np.array([0.0, 0.0, 1.0]), 0.5)
    placed = sum(
        generated._put(canvas, generated._object("star", rng), scale, textures, lamp, rng, label=3)
        for scale in rng.uniform(10, 50, 40)
    )
    visible = np.bincount(canvas.owner[canvas.owner >= 0], minlength=placed)
    assert 3 < placed == len(canvas.need) < 40
    assert (visible >= canvas.need).all()


def test_cover_is_the_area_of_the_polygon() -> None:
    circle = generated._circle(1.0) * 20 + 25
    assert generated._cover([circle], 50, 50).sum() == pytest.approx(np.pi * 20**2, rel=0.01)
    hole = generated._circle(0.5) * 20 + 25
    assert generated._cover([circle, hole], 50, 50).sum() == pytest.approx(np.pi * (20**2 - 10**2), rel=0.01)
