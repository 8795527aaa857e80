"""How well anchors fit boxes: the best IoU is exact, advice comes where it matters, limits follow the densest image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from data_folders import Picture, save_json, write_coco, write_image

import fpn.data
from fpn.boxes import iou
from fpn.data import Split, resized_size
from fpn.data.fit import (
    Fit,
    advise,
    best_ious,
    better_sizes,
    caps,
    default_short,
    measure,
    most_boxes,
    resized_sizes,
    round_up,
)
from fpn.data.info import describe, print_info
from fpn.data.overview import save_overview
from fpn.errors import OptionError
from fpn.model.anchors import Anchors

RNG = np.random.default_rng(0)


def split_of(boxes: list[list[list[float]]], sizes: list[tuple[int, int]], ignore: tuple[int, ...] = ()) -> Split:
    """A split with the boxes (x1, y1, x2, y2) of each image, all of one class."""
    rows = np.array([box for image in boxes for box in image], dtype=np.float64).reshape(-1, 4)
    return Split(
        name="train",
        classes=("thing",),
        category_ids=np.array([1]),
        root=Path("nowhere"),
        files=np.array([f"{i}.jpg" for i in range(len(boxes))]),
        image_ids=np.arange(1, len(boxes) + 1),
        sizes=np.array(sizes, dtype=np.int64).reshape(-1, 2),
        offsets=np.cumsum([0, *map(len, boxes)]),
        boxes=rows,
        labels=np.zeros(len(rows), dtype=np.int64),
        ignore=np.isin(np.arange(len(rows)), ignore),
        areas=np.prod(rows[:, 2:] - rows[:, :2], axis=1),
    )


def squares(sides: np.ndarray, ratio: float = 1.0, size: int = 800) -> Split:
    """One box of each side and of one height / width at a random place in an image of its own."""
    width, height = sides / np.sqrt(ratio), sides * np.sqrt(ratio)
    x, y = RNG.uniform(0, 1, (2, len(sides))) * (size - np.stack([width, height]))
    boxes = np.stack([x, y, x + width, y + height], axis=1)
    return split_of([[box.tolist()] for box in boxes], [(size, size)] * len(sides))


def fit_of(split: Split, short: int = 800, anchors: Anchors | None = None) -> Fit:
    return measure([split], short, round(short * 1333 / 800), anchors or Anchors())


def topics(fit: Fit) -> list[str]:
    return [advice.topic for advice in advise(fit)]


def all_anchors(anchors: Anchors, height: int, width: int) -> dict[int, torch.Tensor]:
    """The anchors as a detector lays them on an image of this size, padded to multiples of 32."""
    padded = [-(-side // 32) * 32 for side in (height, width)]
    strides = {level: torch.zeros(1, 1, *(-(-side // 2**level) for side in padded)) for level in anchors.sizes}
    return anchors(strides, padded)


def test_a_box_on_an_anchor_has_iou_1() -> None:
    # P3 has cells every 8 pixels: (200, 104) is one, and its square anchor has sides of 64.
    fit = fit_of(split_of([[[168, 72, 232, 136]]], [(800, 800)]))
    assert fit.best[0] == pytest.approx(1) and fit.levels[0] == 3 and fit.sides[0] == 64
    # Moved by half a cell in x, the nearest anchor still covers 60 of 64 columns: 60 / (64 + 64 - 60).
    moved = fit_of(split_of([[[172, 72, 236, 136]]], [(800, 800)]))
    assert moved.ious[0, 1] == pytest.approx(60 / 68)
    table = fit.as_dict()
    assert table["levels"]["P3"] == {"anchor": 64.0, "boxes": 1, "mean_iou": 1, "recall_50": 1, "recall_70": 1}
    assert table["levels"]["P2"] == {"anchor": 32.0, "boxes": 0} and table["recall_70"] == 1


@pytest.mark.parametrize("like_torchvision", [False, True])
@pytest.mark.parametrize(("height", "width"), [(256, 416), (75, 333), (1, 4000), (32, 32)])
def test_best_iou_is_that_of_all_anchors(height: int, width: int, like_torchvision: bool) -> None:
    anchors = Anchors(ratios=(0.3, 1.0, 2.5), whole_pixels=like_torchvision, floor_stride=like_torchvision)
    corners = np.sort(RNG.uniform(0, 1, (100, 2, 2)) ** 2, axis=1) * [width, height]
    boxes = np.concatenate([corners.reshape(-1, 4), [[0, 0, width, height], [0, 0, 1, 1], [width - 1, 0, width, 1]]])
    found = best_ious(boxes, np.tile([height, width], (len(boxes), 1)), anchors)
    for column, grid in enumerate(all_anchors(anchors, height, width).values()):
        wanted = iou(torch.from_numpy(boxes), grid.double()).amax(dim=1).numpy()
        np.testing.assert_allclose(found[:, column], wanted, atol=1e-5)


def test_the_grids_are_those_of_a_detector() -> None:
    detector = fpn.build(backbone="tiny", classes=("a",), weights="none", width=8, hidden=8)
    pyramid = detector.pyramid(detector.backbone(torch.zeros(1, 3, 96, 160)))
    laid = detector.anchors(pyramid, (96, 160))
    for level, grid in all_anchors(detector.anchors, 70, 155).items():
        torch.testing.assert_close(laid[level], grid)


def test_sizes_are_those_of_the_transform() -> None:
    sizes = np.concatenate([RNG.integers(1, 3000, (500, 2)), [[4000, 1], [1, 4000], [1, 1], [640, 480]]])
    for short, long in ((800, 1333), (384, 640), (64, 64)):
        wanted = [resized_size((int(height), int(width)), short, long) for height, width in sizes]
        np.testing.assert_array_equal(resized_sizes(sizes, short, long), wanted)


def test_boxes_are_resized_with_their_images_and_ignored_ones_left_out() -> None:
    split = split_of([[[10, 20, 30, 60], [0, 0, 5, 5]], [], [[0, 0, 100, 50]]], [(100, 200), (9, 9), (50, 100)], (1,))
    fit = measure([split, split], 200, 300, Anchors())
    assert fit.sizes.tolist() == [[150, 300], [150, 300]] * 2
    np.testing.assert_allclose(fit.boxes[:2], [[15, 30, 45, 90], [0, 0, 300, 150]])
    assert fit.ratios[0] == 2


def test_no_boxes_and_strange_ones() -> None:
    empty = fit_of(split_of([[], []], [(10, 10), (1, 4000)]))
    assert advise(empty) == [] and empty.as_dict()["boxes"] == 0
    strip = fit_of(split_of([[[0, 0, 4000, 1]], [[5, 5, 6, 6]]], [(1, 4000), (4000, 4000)]))
    assert np.isfinite(strip.best).all() and len(advise(strip)) >= 1
    assert fit_of(split_of([], [])).as_dict()["boxes"] == 0


def test_no_advice_where_all_is_well() -> None:
    sides = np.concatenate([np.full(60, side) for side in (30.0, 32, 34, 60, 64, 68, 128, 250, 256, 500)])
    assert advise(fit_of(squares(sides))) == []


def test_small_boxes_call_for_a_larger_input() -> None:
    sides = np.concatenate([np.full(50, 12.0), np.full(150, 40.0)])
    (advice,) = [a for a in advise(fit_of(squares(sides))) if a.topic == "input size"]
    assert advice.options == {"short": 1088} and "25 % of the boxes are under 16 pixels" in advice.text
    assert "leaves 0 %" in advice.text and "1.8 times the time" in advice.text
    assert "input size" not in topics(fit_of(squares(sides), short=1088))


def test_very_small_boxes_call_for_tiles() -> None:
    advice = advise(fit_of(squares(np.full(100, 4.0))))[0]
    assert advice.topic == "input size" and "tiles" in advice.text and "4x4" in advice.text


def test_large_boxes_leave_levels_idle() -> None:
    (advice,) = [a for a in advise(fit_of(squares(RNG.uniform(110, 500, 200)))) if a.topic == "levels"]
    assert advice.options == {"short": 224} and "P2 and P3 fit hardly any box" in advice.text
    assert "levels" not in topics(fit_of(squares(RNG.uniform(110, 500, 200)), short=224))


def test_better_anchor_sizes_reach_what_they_promise() -> None:
    fit = fit_of(squares(np.concatenate([RNG.normal(90, 4, 300), RNG.normal(180, 8, 100)])))
    (advice,) = [a for a in advise(fit) if a.topic == "anchor sizes"]
    sizes = advice.options["anchor_sizes"]
    assert sizes == sorted(sizes) and len(sizes) == 5
    other = fit.with_anchors(Anchors(sizes=dict(zip(range(2, 7), sizes, strict=True))))
    assert fit.recall(0.7) < 0.3 and other.recall(0.7) > 0.95
    assert f"to {100 * other.recall(0.7):.0f} % at IoU 0.7" in advice.text
    assert topics(other) == ["levels"]  # nothing more to say about anchors


def test_the_search_keeps_sizes_that_no_box_needs() -> None:
    assert better_sizes(fit_of(squares(np.full(50, 64.0))))[6] == 512


def test_long_boxes_call_for_long_anchors() -> None:
    sides = RNG.uniform(30, 200, 300)
    wide, square = squares(sides, 1 / 6, size=1000), squares(sides, 1.0, size=1000)
    (advice,) = [a for a in advise(fit_of(wide, 1000)) if a.topic == "anchor ratios"]
    assert advice.options["anchor_ratios"] == [pytest.approx(0.17)]
    assert ": --ratios 0.17 " in advice.text  # as the command takes it
    assert "anchor ratios" not in topics(fit_of(square, 1000))


def test_limits_follow_the_densest_image() -> None:
    few = split_of([[[0, 0, 9, 9]] * 100], [(10, 10)])
    dense = split_of([[], [[0, 0, 9, 9]] * 5000], [(10, 10), (10, 10)])
    ignored = split_of([[[0, 0, 9, 9]] * 5000], [(10, 10)], tuple(range(5000)))
    assert caps({"train": few, "val": ignored}) == {} and caps({}) == {}
    assert caps({"train": few, "val": dense}) == {
        "max_detections": 6000,
        "proposals": (12000, 12000),
        "proposals_per_level": (12000, 12000),
    }
    assert most_boxes([few, dense]) == (5000, "1.jpg")
    assert caps({"train": split_of([[[0, 0, 9, 9]] * 120], [(10, 10)])}) == {"max_detections": 150}
    # Only what a detector has is raised, and nothing is lowered.
    assert caps({"train": dense}, {"max_detections": 300, "candidates": 1000, "score": 0.05}) == {
        "max_detections": 6000,
        "candidates": 12000,
    }
    own = {"max_detections": 9000, "proposals": (20000, 50), "proposals_per_level": (20000, 20000)}
    assert caps({"train": dense}, own) == {"proposals": (20000, 12000)}
    assert [round_up(n) for n in (1, 99.5, 137, 6000, 6001)] == [1, 100, 140, 6000, 6100]
    detector = fpn.build(backbone="tiny", classes=("a",), weights="none", width=8, hidden=8, **caps({"train": dense}))
    assert detector.max_detections == 6000 and detector.spec.settings["proposals"] == (12000, 12000)


def test_100_000_images_take_seconds() -> None:
    images, boxes = 100_000, 800_000
    corner, side = RNG.uniform(0, 500, (boxes, 2)), np.exp(RNG.uniform(2, 5, (boxes, 2)))
    rows = np.concatenate([corner, corner + side], axis=1)
    split = Split(
        "train", ("a",), np.array([1]), Path("x"), np.full(images, "a.jpg"), np.arange(images),
        np.tile([480, 640], (images, 1)), np.arange(0, boxes + 1, 8), rows, np.zeros(boxes, np.int64),
        np.zeros(boxes, bool), np.ones(boxes),
    )  # fmt: skip
    fit = fit_of(split)
    assert len(advise(fit)) < 4 and fit.as_dict()["boxes"] == boxes


def test_the_default_size_is_smaller_without_a_gpu() -> None:
    assert default_short(torch.device("cpu")) == 384 and default_short(torch.device("cuda", 0)) == 800


def test_picture_and_screen_with_hostile_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = {
        "images": [{"id": 1, "file_name": "a.png", "height": 50, "width": 100}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 2, "bbox": [5, 5, 20, 10], "area": 200, "iscrowd": 0}],
        "categories": [{"id": 1, "name": "$x$ " * 40}, {"id": 2, "name": "[red]猫$"}],
    }
    save_json(tmp_path / "annotations" / "instances_train.json", content)
    write_image(tmp_path / "images" / "a.png", (50, 100))
    data = fpn.data.load(tmp_path)
    fit = measure(data.values(), 384, 640, Anchors())
    save_overview(data, fit, tmp_path / "out" / "a.png")
    save_overview(data, fit, tmp_path / "out" / "a.svg")
    assert (tmp_path / "out" / "a.png").read_bytes()[:4] == b"\x89PNG"
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["a.png", "a.svg"]
    with pytest.raises(OptionError, match=r"must end in \.png"):
        save_overview(data, fit, tmp_path / "a.docx")
    print_info(describe(data, fit))
    screen = capsys.readouterr().out
    assert "shorter side of 384" in screen and "recall at IoU 0.5" in screen and "Densest image" in screen


def test_picture_without_boxes(tmp_path: Path) -> None:
    data = fpn.data.load(write_coco(tmp_path, {"train": (Picture("a.png"),)}))
    save_overview(data, measure(data.values(), 384, 640, Anchors()), tmp_path / "a.png")
    assert (tmp_path / "a.png").is_file()
