"""Random changes of one image: boxes stay on their objects, numbers are right, presets and overrides are heard."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from data_folders import Picture, write_coco
from marked_images import assert_in_place, assert_sound, extent, marked
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

import fpn.data
from fpn.cli import main
from fpn.data import PRESETS, Augmentation, training_transform
from fpn.data.augment import FILL, ColourJitter, CropWithObjects, ScaleJitter, hue_matrix, pair_of, place, shown
from fpn.data.show import save_grid
from fpn.data.transforms import resized_size
from fpn.errors import DataError, OptionError
from fpn.training.settings import Options, augmentation_of, resolve

THREE = {0: (10, 10, 40, 60), 1: (70, 20, 118, 44), 2: (50, 70, 90, 88)}

ALONE = {
    "light": PRESETS["light"],
    "flips": Augmentation(flip=0.5, vertical_flip=0.5),
    "lsj": Augmentation(lsj=(0.1, 2.0)),
    "lsj_large": Augmentation(lsj=(2.0, 4.0)),
    "crop": Augmentation(crop=1.0),
    "all": Augmentation(flip=0.5, vertical_flip=0.5, lsj=(0.5, 2.0), crop=0.5),
}


def changed(chosen: Augmentation, pair, seed: int, short: int = 96, long: int = 160):
    transform, _ = training_transform(chosen, (short,), long, 1)
    torch.manual_seed(seed)
    return transform(*pair)


# Every transform


@pytest.mark.parametrize("name", ALONE)
def test_boxes_stay_on_their_objects(name: str) -> None:
    shown_before = set()
    for seed in range(25):
        after = changed(ALONE[name], marked((96, 120), THREE), seed)
        assert_sound(after)
        assert_in_place(after)
        assert len(after[1]["boxes"]) > 0
        shown_before.add(tuple(after[1]["boxes"].flatten().tolist()))
    assert len(shown_before) > 1  # it does something


@pytest.mark.parametrize("name", [*ALONE, "strong"])
@pytest.mark.parametrize("size", [(1, 4000), (4000, 1), (1, 1), (3, 5), (90, 60)])
def test_extreme_sizes_and_images_without_boxes(name: str, size: tuple[int, int]) -> None:
    chosen = {**ALONE, "strong": PRESETS["strong"]}[name]
    height, width = size
    for seed in range(5):
        after = changed(chosen, marked(size, {}), seed)
        assert_sound(after)
        assert after[1]["boxes"].shape == (0, 4)
        with_object = changed(chosen, marked(size, {0: (0, 0, width, height)}), seed)
        assert_sound(with_object, smallest=0.0)  # an image one pixel high has no larger ones
        assert len(with_object[1]["boxes"]) == 1


def test_thousands_of_boxes() -> None:
    torch.manual_seed(0)
    corners = torch.rand(5000, 2) * torch.tensor([300.0, 200.0])
    boxes = torch.cat([corners, corners + 1 + 20 * torch.rand(5000, 2)], dim=1)
    labels = torch.arange(5000)
    for seed in range(3):
        image, target = changed(ALONE["all"], pair_of(torch.zeros(3, 220, 320, dtype=torch.uint8), boxes, labels), seed)
        assert_sound((image, target))
        assert 0 < len(target["boxes"]) <= 5000 and len(target["labels"].unique()) == len(target["labels"])


def test_sizes_are_those_of_plain_resizing_so_that_batches_stay_tight() -> None:
    for size in ((60, 100), (100, 60), (50, 50)):
        for seed in range(5):
            image, _ = changed(Augmentation(lsj=(0.3, 3.0)), marked(size, {}), seed)
            assert tuple(image.shape[1:]) == resized_size(size, 96, 160)
            cut, _ = changed(Augmentation(crop=1.0), marked(size, {}), seed)
            assert (cut.shape[2] >= cut.shape[1]) == (size[1] >= size[0])


# Windows and places


def test_boxes_in_a_window() -> None:
    boxes = torch.tensor([[10.0, 10, 30, 20], [0, 0, 20, 100], [0, 0, 5, 5], [30, 0, 31, 40]])
    cut, keep = shown(boxes, (10, 15, 40, 20), (20, 20))  # y from 10 to 50 at half size, x from 15 to 35 as it is
    assert cut.tolist()[0] == [0, 0, 15, 5]  # x 10..30 -> -5..15, y 10..20 -> 0..5
    # A 3/4 left; B 500 of 2000 square pixels at full size, 0.1 left; C outside; D one pixel wide.
    assert keep.tolist() == [True, False, False, False]


def test_place_at_scale_one_moves_pixels_and_boxes_as_they_are() -> None:
    pair = marked((40, 50), {0: (10, 5, 30, 25)})
    noise = torch.randint(0, 256, (3, 40, 50), dtype=torch.uint8)
    torch.manual_seed(1)
    image, target = place(tv_tensors.Image(noise), pair[1], (60, 45), 1.0)
    x1, y1, x2, y2 = (int(side) for side in target["boxes"][0].tolist())
    assert (x2 - x1, y2 - y1) == (20, 20)
    assert torch.equal(image[:, y1:y2, x1:x2].as_subclass(Tensor), noise[:, 5:25, 10:30])
    filled = (image.as_subclass(Tensor) == torch.tensor(FILL)[:, None, None]).all(dim=0)
    assert 20 * 45 <= int(filled.sum()) < 22 * 45  # 40 of 60 rows are the image, but for pixels that happen to match


def test_scale_jitter_draws_the_range() -> None:
    widths = []
    for seed in range(50):
        torch.manual_seed(seed)
        _, target = ScaleJitter((100,), 200, (0.5, 1.5))(*marked((50, 50), {0: (24, 24, 27, 27)}))
        widths.append(float(target["boxes"][0, 2] - target["boxes"][0, 0]) / 6)
    assert 0.48 < min(widths) < 0.6 and 1.4 < max(widths) < 1.52
    assert sum(widths) / 50 == pytest.approx(1.0, abs=0.1)


def test_a_crop_keeps_every_object_that_can_be_seen() -> None:
    for seed in range(50):
        torch.manual_seed(seed)
        image, target = CropWithObjects(1.0)(*marked((96, 120), THREE))
        assert 48 <= image.shape[1] <= 96 and 60 <= image.shape[2] <= 120
        for label, (x1, y1, x2, y2) in THREE.items():
            seen = extent(image, label) or [0, 0, 0, 0]
            share = (seen[2] - seen[0]) * (seen[3] - seen[1]) / ((x2 - x1) * (y2 - y1))
            assert (label in target["labels"].tolist()) == (share >= 0.3)


def test_an_image_whose_objects_fit_no_window_is_left_as_it_is() -> None:
    everywhere = marked((50, 50), {0: (0, 0, 1, 1)})  # one pixel: too small to be kept by any window
    torch.manual_seed(0)
    image, target = CropWithObjects(1.0)(*everywhere)
    assert torch.equal(image, everywhere[0]) and target["boxes"].tolist() == [[0, 0, 1, 1]]
    image, target = ScaleJitter((50,), 50, (0.5, 0.9))(*everywhere)
    assert torch.equal(image, everywhere[0]) and target["boxes"].tolist() == [[0, 0, 1, 1]]


# Colour


def noise(seed: int = 0) -> Tensor:
    return torch.randint(60, 180, (3, 40, 50), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_colours_are_torchvision_s_for_brightness_contrast_and_saturation() -> None:
    image = F.resize(noise(), [160, 200])  # smooth, so that every 8th pixel has the mean of all
    for brightness, contrast, saturation in ((1.2, 1.0, 1.0), (1.0, 0.6, 1.0), (1.0, 1.0, 1.4), (0.9, 1.1, 0.5)):
        ours = recoloured(image, brightness, contrast, saturation, 0.0)
        expected = F.adjust_brightness(image, brightness)
        expected = F.adjust_contrast(expected, contrast)
        expected = F.adjust_saturation(expected, saturation)
        assert (ours.int() - expected.int()).abs().max() <= 4  # torchvision rounds three times


def recoloured(image: Tensor, brightness: float, contrast: float, saturation: float, angle: float) -> Tensor:
    from fpn.data.augment import saturation_matrix

    matrix = brightness * contrast * hue_matrix(angle) @ saturation_matrix(saturation)
    params = {"matrix": matrix, "brightness": brightness, "contrast": contrast}
    return ColourJitter(0.5).transform(v2.functional.to_image(image), params)


def test_a_third_of_a_turn_makes_red_green_and_leaves_greys() -> None:
    third = hue_matrix(2 * math.pi / 3)
    torch.testing.assert_close(third @ torch.tensor([255.0, 0, 0]), torch.tensor([0.0, 255, 0]), atol=1e-3, rtol=0)
    torch.testing.assert_close(hue_matrix(0.7) @ torch.ones(3), torch.ones(3))


def test_colour_jitter_changes_pixels_only() -> None:
    pair = marked((96, 120), THREE)
    image, target = changed(Augmentation(jitter=1.0), (pair[0] // 2 + 60, pair[1]), 3)
    assert image.dtype == torch.uint8 and not torch.equal(image, pair[0])
    torch.testing.assert_close(target["boxes"].as_subclass(Tensor), pair[1]["boxes"].as_subclass(Tensor))
    pixel, _ = changed(Augmentation(jitter=0.5), marked((1, 1), {}), 0)
    assert pixel.shape == (3, 96, 96)


# Options


@pytest.fixture
def data(tmp_path: Path) -> Path:
    pictures = tuple(
        Picture(f"{i}.png", (40, 60 + i), (("cat", 5, 5, 30, 20), ("dog", 20, 10, 60, 40))) for i in range(4)
    )
    return write_coco(tmp_path / "data", {"train": pictures, "val": pictures[:1]})


def test_presets_and_overrides(data: Path) -> None:
    split = fpn.data.load(data)["train"]

    def settings(**options):
        return resolve(Options(device="cpu", **options), split, 64)

    assert settings(epochs=12).augment == "light" and settings(epochs=50).augment == "strong"
    for name, preset in PRESETS.items():
        assert augmentation_of(settings(augment=name)) == preset
    one = settings(augment="strong", lsj=[1, 1], flip=0.0, vertical_flip=0.5)
    assert augmentation_of(one) == Augmentation(
        **{**vars(PRESETS["strong"]), "lsj": (1, 1), "flip": 0, "vertical_flip": 0.5}
    )
    assert resolve(Options(**vars(one)), split, 64) == one  # a run's config.yaml repeats it


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"augment": "heavy"}, "augment 'heavy': it must be auto, none, light, strong"),
        ({"mosaic": 1.5}, "mosaic is 1.5: it must be from 0 to 1"),
        ({"mixup": math.nan}, "mixup is nan"),
        ({"lsj": [2, 0.5]}, "lsj is 2 0.5: it must be two factors from 0.05 to 10"),
        ({"lsj": [1]}, "lsj is 1:"),
        ({"lsj": []}, "lsj is :"),
        ({"lsj": [0, 1]}, "lsj is 0 1:"),
    ],
)
def test_options_that_cannot_work(wrong: dict, words: str, data: Path) -> None:
    with pytest.raises(OptionError, match=words):
        resolve(Options(device="cpu", **wrong), fpn.data.load(data)["train"], 64)


# The picture


def test_show(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    files = {name: tmp_path / f"{name}.png" for name in ("plain", "again", "auto", "strong", "rows")}
    base = ["data", "show", str(data), "--short", "64"]
    for name, extra in {"plain": [], "again": [], "auto": ["--augment"], "strong": ["--augment", "strong"]}.items():
        main([*base, *extra, "--out", str(files[name])])
    main([*base, "--augment", "strong", "--times", "3", "--count", "2", "--out", str(files["rows"])])
    said = capsys.readouterr().out
    assert f"4 images of train, augmentation none: {files['plain']}" in said
    assert "2 images of train, augmentation strong" in said
    assert files["plain"].read_bytes() == files["again"].read_bytes() != files["strong"].read_bytes()
    with Image.open(files["plain"]) as two_by_two, Image.open(files["rows"]) as three_by_two:
        assert (two_by_two.width, three_by_two.width) == (10 + 2 * 170, 10 + 3 * 170)  # columns of 160 at least
        colours = {colour for _, colour in two_by_two.getcolors(2**24)}
    assert {(30, 136, 229), (255, 112, 0)} <= colours  # the boxes of both classes
    assert not list(tmp_path.glob(".*"))


def test_show_leaves_out_what_it_cannot_read(data: Path, tmp_path: Path) -> None:
    split = fpn.data.load(data)["train"]
    split.path(1).write_bytes(b"no image")
    transform, _ = training_transform(PRESETS["none"], (64,), 100, 1)
    words = rf"1 image could not be read: {re.escape(str(split.path(1)))}; "
    with pytest.warns(UserWarning, match=words) as warned:
        assert save_grid(split, transform, tmp_path / "show.png", seed=-1) == len(split) - 1
    assert len(warned) == 1
    for index in range(len(split)):
        split.path(index).write_bytes(b"no image")
    with pytest.raises(DataError, match=f"{len(split)} images could not be read"):
        save_grid(split, transform, tmp_path / "show.png")


def test_show_refuses_what_it_cannot_draw(data: Path, tmp_path: Path) -> None:
    split = fpn.data.load(data)["train"]
    transform, _ = training_transform(PRESETS["none"], (64,), 100, 1)
    with pytest.raises(OptionError, match=r"show\.bmp: the name of the picture must end in \.png or \.jpg"):
        save_grid(split, transform, tmp_path / "show.bmp")
    for numbers in ({"count": 0}, {"times": 0}, {"count": 100, "times": 100}):
        with pytest.raises(OptionError, match="--count .* --times"):
            save_grid(split, transform, tmp_path / "show.png", **numbers)
    with pytest.raises(DataError, match="no images to show"):
        save_grid(split.select(torch.zeros(0, dtype=torch.int64).numpy(), "train"), transform, tmp_path / "show.png")
    with pytest.raises(SystemExit, match="name one of"):
        main(["data", "show", str(data), "--augment", "light", "strong"])
    assert not list(tmp_path.glob("show*"))
