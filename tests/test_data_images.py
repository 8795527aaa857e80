"""Every kind of image that Pillow reads becomes upright uint8 RGB; broken files are named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from fpn.data import image_size, read_image, resized_size
from fpn.data.images import shrink_for
from fpn.errors import ImageError

COLOURS = np.random.default_rng(0).integers(0, 256, (6, 4, 3), dtype=np.uint8)  # height 6, width 4


def pixels(path: Path, apply_exif: bool = True) -> np.ndarray:
    image = read_image(path, apply_exif)
    assert image.dtype == torch.uint8 and image.shape[0] == 3
    assert tuple(image.shape[1:]) == image_size(path, apply_exif)
    return image.permute(1, 2, 0).numpy()


def test_rgb_is_rgb(tmp_path: Path) -> None:
    Image.fromarray(COLOURS).save(tmp_path / "a.png")
    np.testing.assert_array_equal(pixels(tmp_path / "a.png"), COLOURS)


WRITABLE = {
    "png": ("1", "L", "P", "LA", "RGBA"),
    "tif": ("1", "L", "P", "LA", "RGBA", "CMYK", "YCbCr", "LAB", "RGBX"),
    "bmp": ("1", "L", "P", "RGBA"),
    "webp": ("L", "LA", "RGBA"),
}


@pytest.mark.parametrize(("mode", "suffix"), [(mode, suffix) for suffix in WRITABLE for mode in WRITABLE[suffix]])
def test_modes(mode: str, suffix: str, tmp_path: Path) -> None:
    image = Image.fromarray(COLOURS).convert("RGB" if mode == "LAB" else mode)
    if mode == "LAB":
        from PIL import ImageCms

        profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        image = ImageCms.profileToProfile(image, *profiles, outputMode="LAB")
    assert image is not None
    if mode in ("LA", "RGBA"):
        image.putalpha(Image.fromarray(np.arange(24, dtype=np.uint8).reshape(6, 4)))
    path = tmp_path / f"a.{suffix}"
    if suffix == "webp":
        image.save(path, lossless=True, exact=True)
    else:
        image.save(path)
    expected = image.convert("RGBA").convert("RGB") if mode not in ("LAB", "CMYK") else Image.fromarray(COLOURS)
    difference = np.abs(pixels(path).astype(int) - np.asarray(expected).astype(int))
    assert difference.mean() <= 4 if mode == "LAB" else difference.max() <= 1


def test_cmyk_jpeg(tmp_path: Path) -> None:
    flat = Image.new("RGB", (16, 16), (200, 30, 90))
    flat.convert("CMYK").save(tmp_path / "a.jpg", quality=95)
    np.testing.assert_allclose(pixels(tmp_path / "a.jpg")[8, 8], (200, 30, 90), atol=4)


def test_palette_with_transparency(tmp_path: Path) -> None:
    image = Image.fromarray(COLOURS).quantize(8)
    image.save(tmp_path / "a.png", transparency=bytes(range(8)))
    np.testing.assert_array_equal(pixels(tmp_path / "a.png"), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_is_scaled(suffix: str, tmp_path: Path) -> None:
    values = np.array([[0, 257, 32768], [65535, 128, 129]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / f"a.{suffix}")
    expected = np.array([[0, 1, 128], [255, 0, 1]])  # value / 257, rounded
    np.testing.assert_array_equal(pixels(tmp_path / f"a.{suffix}"), np.repeat(expected[:, :, None], 3, 2))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 255], [7, 100]], dtype=np.uint16), [[0, 255], [7, 100]]),
        (np.array([[0, 255], [7, 65535]], dtype=np.int32), [[0, 1], [0, 255]]),
        (np.array([[-5, 70000]], dtype=np.int32), [[0, 255]]),
        (np.array([[0, 0.5, 1]], dtype=np.float32), [[0, 128, 255]]),
        (np.array([[0, 0.5, 200]], dtype=np.float32), [[0, 0, 200]]),
        (np.array([[np.nan, np.inf, 257]], dtype=np.float32), [[0, 255, 1]]),
    ],
)
def test_ranges_of_grey(values: np.ndarray, expected: list[list[int]], tmp_path: Path) -> None:
    Image.fromarray(values).save(tmp_path / "a.tif")
    np.testing.assert_array_equal(pixels(tmp_path / "a.tif")[:, :, 0], expected)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(10))
def test_exif_orientation_as_pillow_turns_it(orientation: int, suffix: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(COLOURS).save(path, exif=exif, lossless=True)
    with Image.open(path) as image:
        image.load()
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    assert expected.shape[:2] == ((4, 6) if 5 <= orientation <= 8 else (6, 4))
    np.testing.assert_array_equal(pixels(path), expected)
    if suffix != "tif":
        assert pixels(path, apply_exif=False).shape == (6, 4, 3)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_does_not_cost_the_image(tmp_path: Path) -> None:
    Image.fromarray(COLOURS).save(tmp_path / "a.jpg", exif=b"Exif\x00\x00MM\x00*\x00\x00\xff\xffgarbage")
    assert pixels(tmp_path / "a.jpg").shape == (6, 4, 3)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "gif", "bmp", "tif"])
def test_truncated_files_are_named(suffix: str, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = tmp_path / f"cut.{suffix}"
    Image.fromarray(noise).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ImageError, match=rf"cut\.{suffix}: .*replace the file or remove it"):
        read_image(path)


def test_what_is_no_image(tmp_path: Path) -> None:
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("hello")
    for read in (read_image, image_size):
        with pytest.raises(ImageError, match=r"none\.jpg: no such image file"):
            read(tmp_path / "none.jpg")
        with pytest.raises(ImageError, match=r"empty\.jpg: not an image that Pillow can read \(0 bytes\)"):
            read(tmp_path / "empty.jpg")
        with pytest.raises(ImageError, match=r"text\.jpg: not an image"):
            read(tmp_path / "text.jpg")
        with pytest.raises(ImageError):
            read(tmp_path)


def test_decompression_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(COLOURS).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(ImageError, match=r"a\.png: more pixels than is safe to decode"):
        read_image(tmp_path / "a.png")


def test_one_pixel(tmp_path: Path) -> None:
    Image.new("L", (1, 1), 9).save(tmp_path / "a.png")
    assert pixels(tmp_path / "a.png").tolist() == [[[9, 9, 9]]]


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((3000, 4000), 2),  # to 800 x 1066: 3.75 times smaller, 1.88 of them left for resizing
        ((4000, 3000), 2),
        ((6000, 8000), 4),
        ((12000, 16000), 8),
        ((2800, 2800), 2),  # 3.5 times, just enough
        ((2798, 2798), 1),
        ((3001, 4000), 1),  # odd
        ((1080, 1920), 1),
        ((480, 640), 1),
        ((20, 4000), 1),
        ((1, 1), 1),
    ],
)
def test_how_much_smaller_files_are_decoded(size: tuple[int, int], expected: int) -> None:
    assert shrink_for(size, resized_size(size, 800, 1333)) == expected


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("shrink", [1, 2, 4, 8])
def test_a_jpeg_file_decoded_smaller(shrink: int, mode: str, tmp_path: Path) -> None:
    halves = np.full((32, 64, 3), (200, 90, 30), np.uint8)
    halves[:, 32:] = (20, 120, 220)
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(halves).convert(mode).save(tmp_path / "a.jpg", quality=95, subsampling=0, exif=exif)
    small, whole = (read_image(tmp_path / "a.jpg", shrink=by).int() for by in (shrink, 1))
    assert small.shape == (3, 32 // shrink, 64 // shrink)
    assert (small - whole[:, ::shrink, ::shrink]).abs().max() <= 2  # flat, with its edge between blocks
    assert small[0, 0, 0] < small[0, 0, -1]


def test_other_files_are_decoded_whole(tmp_path: Path) -> None:
    Image.fromarray(COLOURS).save(tmp_path / "a.png")
    assert torch.equal(read_image(tmp_path / "a.png", shrink=2), read_image(tmp_path / "a.png"))
