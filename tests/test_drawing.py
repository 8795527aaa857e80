"""Drawn pictures: the boxes are where they belong, labels inside, colours stable, and no size or count breaks it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from fpn import drawing
from fpn.drawing import ALARM, annotate, colour_of, draw, to_picture
from fpn.errors import OptionError

GREY = torch.full((3, 120, 200), 128, dtype=torch.uint8)


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture).astype(int)


def test_lines_lie_on_the_edge_pixels_of_the_box() -> None:
    picture = pixels(annotate(GREY, np.array([[20.0, 30.0, 90.0, 100.0]]), [""], [(255, 0, 0)]))
    red = (picture == (255, 0, 0)).all(axis=2)
    rows, columns = np.flatnonzero(red.any(axis=1)), np.flatnonzero(red.any(axis=0))
    assert (columns[0], rows[0], columns[-1], rows[-1]) == (20, 30, 89, 99)
    assert red[30, 20:90].all() and red[99, 20:90].all() and red[30:100, 20].all() and red[30:100, 89].all()
    assert not red[40:90, 30:80].any()


def test_the_given_image_is_not_changed() -> None:
    image = Image.new("RGB", (50, 50), "navy")
    draw(image, torch.tensor([[5.0, 5.0, 40.0, 40.0]]), torch.tensor([0]))
    assert image.getcolors() == [(2500, (0, 0, 128))]
    draw(GREY, torch.tensor([[5.0, 5.0, 40.0, 40.0]]), torch.tensor([0]))
    assert (GREY == 128).all()


def test_no_boxes_give_the_image_itself() -> None:
    picture = draw(GREY, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0), ("a",))
    assert picture.size == (200, 120) and (pixels(picture) == 128).all()


@pytest.mark.parametrize("size", [(1, 1), (20, 20), (4000, 20), (20, 900), (2400, 1600)])
@pytest.mark.parametrize("count", [1, 500])
def test_any_size_and_count(size: tuple[int, int], count: int) -> None:
    rng = np.random.default_rng(0)
    width, height = size
    corners = np.sort(rng.uniform(-0.1, 1.1, (count, 2, 2)), axis=1).reshape(count, 4)
    boxes = torch.tensor(corners * [width, height, width, height])
    picture = draw(Image.new("L", size, 90), boxes, rng.integers(0, 30, count), rng.random(count), ["name"] * 30)
    assert picture.size == size and picture.mode == "RGB"
    assert (pixels(picture) != 90).any()


def test_lines_and_letters_grow_with_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    plate = drawing._label
    monkeypatch.setattr(drawing, "_label", lambda *a: (seen.append((a[4], a[5])), plate(*a)))
    for side in (64, 320, 1000, 6000):
        image = Image.new("RGB", (side, side))
        draw(image, np.array([[0.2, 0.2, 0.8, 0.8]]) * side, [0], [0.5], ["cell"])
    letters, lines = zip(*seen, strict=True)
    assert list(letters) == sorted(letters) and letters[0] >= 9 and letters[-1] > 80
    assert list(lines) == sorted(lines) and lines[0] == 1 and lines[-1] > 10


def plates(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """Collects the rectangles of the labels while they are drawn."""
    drawn: list[tuple] = []
    original = ImageDraw.ImageDraw.rounded_rectangle

    def collect(self, xy, *args, **kwargs):
        drawn.append((xy[0], xy[1], xy[2] + 1, xy[3] + 1))
        original(self, xy, *args, **kwargs)

    monkeypatch.setattr(ImageDraw.ImageDraw, "rounded_rectangle", collect)
    return drawn


def test_labels_stay_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = plates(monkeypatch)
    boxes = np.array([[0, 0, 60, 40], [150, 0, 200, 30], [0, 90, 40, 120], [170, 100, 200, 120], [0, 0, 200, 120.0]])
    draw(GREY, boxes, [0] * 5, [0.9, 0.8, 0.7, 0.6, 0.5], ["platelet"])
    assert len(drawn) == 5
    assert all(x1 >= 0 and y1 >= 0 and x2 <= 200 and y2 <= 120 for x1, y1, x2, y2 in drawn)


def test_labels_of_one_place_do_not_cover_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = plates(monkeypatch)
    draw(Image.new("RGB", (300, 300)), np.array([[100.0, 100.0, 180.0, 180.0]] * 4), [0, 1, 2, 3], None, list("abcd"))
    assert len(drawn) == 4
    for i, a in enumerate(drawn):
        assert all(drawing._overlap(a, b) <= 0.15 * (a[2] - a[0]) * (a[3] - a[1]) for b in drawn[:i])


def test_in_a_crowd_high_scores_keep_their_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", lambda self, xy, text, **_: written.append(text))
    scores = np.linspace(0.01, 0.99, 300)
    draw(Image.new("RGB", (200, 200)), np.array([[50.0, 50.0, 90.0, 90.0]] * 300), [0] * 300, scores, ["x"])
    assert written[0] == "x 0.99" and 1 < len(written) < 40


def test_names_of_any_alphabet_and_none() -> None:
    names = ["Größe", "клетка", "細胞", "خلية", "", "a\nb", "x" * 300, "🙂"]
    boxes = np.array([[10.0, 10 + 8.0 * i, 60, 40 + 8.0 * i] for i in range(len(names))])
    assert draw(GREY, boxes, range(len(names)), None, names).size == (200, 120)


def test_a_font_with_the_letters_is_taken() -> None:
    assert drawing._known("клетка")[1] == 6, "matplotlib's font has Cyrillic"
    assert drawing.font_for(16, "клетка") is drawing._fonts(16)[int(np.argmax(drawing._known("клетка")))]
    assert drawing.font_for(16, "cell") is drawing._fonts(16)[0]


def test_label_without_a_name_is_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", lambda self, xy, text, **_: written.append(text))
    draw(GREY, np.array([[10.0, 30.0, 60.0, 60.0], [110.0, 30.0, 160.0, 60.0]]), [7, 0], [0.5, 0.25], ["cell"])
    assert written == ["7 0.50", "cell 0.25"]


def test_broken_boxes_are_left_out_or_cut() -> None:
    boxes = np.array([[np.nan, 0, 10, 10], [np.inf, 0, np.inf, 5], [-50, -50, 500, 500], [300, 300, 400, 400]])
    picture = pixels(draw(GREY, boxes, [0, 0, 1, 2]))
    assert (picture[60, 0] == colour_of(1)).all() and (picture[119, 100] == colour_of(1)).all()
    assert not (picture == colour_of(0)).all(axis=2).any()


def test_dashed_lines_have_white_between() -> None:
    picture = pixels(annotate(GREY, np.array([[20.0, 20.0, 120.0, 100.0]]), [""], [ALARM], [True]))
    edge = picture[20, 20:120]
    assert 0.3 < (edge == ALARM).all(axis=1).mean() < 0.7
    assert ((edge == ALARM).all(axis=1) | (edge == 255).all(axis=1)).all()


def test_colours_are_stable_and_different() -> None:
    colours = [colour_of(i) for i in range(40)]
    assert colours[:12] == list(drawing.PALETTE) and colours == [colour_of(i) for i in range(40)]
    gaps = [np.linalg.norm(np.subtract(a, b)) for i, a in enumerate(colours) for b in colours[:i]]
    assert min(gaps) > 15
    assert all(0 <= c <= 255 for colour in (*colours, colour_of(100_000)) for c in colour)


def test_wrong_input_is_named() -> None:
    box = np.array([[1.0, 1.0, 5.0, 5.0]])
    with pytest.raises(OptionError, match="1 boxes, 2 labels"):
        draw(GREY, box, [0, 1])
    with pytest.raises(OptionError, match="3 scores"):
        draw(GREY, box, [0], [0.1, 0.2, 0.3])
    with pytest.raises(OptionError, match=r"\(D, 4\)"):
        draw(GREY, np.zeros((2, 5)), [0, 1])
    with pytest.raises(OptionError, match=r"float32 \(3, 4, 4\)"):
        to_picture(torch.zeros(3, 4, 4))
    with pytest.raises(OptionError, match="uint8"):
        to_picture(torch.zeros(1, 4, 4, dtype=torch.uint8))
