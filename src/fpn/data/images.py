"""A file -> uint8 RGB pixels, whatever Pillow can read, in the orientation in which viewers display it."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Shaped, UInt8
from PIL import ExifTags, Image
from torch import Tensor

from fpn.errors import ImageError

MARGIN = 1.75  # times the size wanted, at least, at which a JPEG file is decoded smaller than it is
_EXIF_KEYS = {"exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"}


def read_image(path: str | os.PathLike[str], apply_exif: bool = True, shrink: int = 1) -> UInt8[Tensor, "3 H W"]:
    """The pixels of an image file as RGB; of several frames the first.

    Alpha is dropped. 16-bit and integer images are scaled so that 65535 becomes 255, unless nothing in them exceeds
    255; float images count as 0..1, 0..255 or 0..65535 after their largest value. With `apply_exif` the image is
    turned upright as its EXIF orientation says. A JPEG file is decoded with its height and width divided by `shrink`,
    1, 2, 4 or 8, which takes less time (see `shrink_for`); other files are not.

    Raises:
        ImageError: the file is missing, not an image, cut off, or larger than Pillow takes as safe to decode.
    """
    try:
        with Image.open(path) as image:
            if shrink > 1:
                image.draft(None, (image.width // shrink, image.height // shrink))
            return pixels_of(image, apply_exif)
    except Exception as error:  # Pillow's decoders raise nearly every built-in exception on broken files
        raise _image_error(path, error) from error


def pixels_of(image: Image.Image, apply_exif: bool = True) -> UInt8[Tensor, "3 H W"]:
    """The same of an image that Pillow has opened; raises what Pillow raises."""
    orientation = orientation_of(image) if apply_exif else 1
    return torch.from_numpy(np.ascontiguousarray(_upright(_rgb(image), orientation))).permute(2, 0, 1)


def shrink_for(size: tuple[int, int], wanted: tuple[int, int]) -> int:
    """The `shrink` for an image of a size that is going to be resized to the one wanted, (height, width) both.

    What is decoded is still `MARGIN` times as large, so that the resizing smooths what JPEG's own scaling leaves. The
    pixels of COCO's photographs are then 0.5 (by 2) to 1.2 (by 8) grey levels in the mean, 32 at most, from those by
    the whole image. Sizes must divide, so that boxes do not move.
    """
    fits = (
        by
        for by in (8, 4, 2)
        if all(side % by == 0 and side >= MARGIN * by * new for side, new in zip(size, wanted, strict=True))
    )
    return next(fits, 1)


def image_size(path: str | os.PathLike[str], apply_exif: bool = True) -> tuple[int, int]:
    """Height and width that `read_image` would give, from the file's header alone.

    Raises:
        ImageError: as `read_image`, except that a file cut off after its header is not noticed.
    """
    try:
        with Image.open(path) as image:
            width, height = image.size
            turned = apply_exif and orientation_of(image) >= 5
    except Exception as error:  # as in read_image
        raise _image_error(path, error) from error
    return (width, height) if turned else (height, width)


def _image_error(path: str | os.PathLike[str], error: Exception) -> ImageError:
    if isinstance(error, FileNotFoundError):
        return ImageError(f"{path}: no such image file")
    if isinstance(error, Image.UnidentifiedImageError):
        size = Path(path).stat().st_size
        return ImageError(f"{path}: not an image that Pillow can read ({size} bytes); replace the file or remove it")
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        limit = Image.MAX_IMAGE_PIXELS or 0
        return ImageError(f"{path}: more pixels than is safe to decode (limit {2 * limit}); cut it into tiles")
    return ImageError(f"{path}: cannot be read, it may be cut off or damaged ({error}); replace the file or remove it")


def orientation_of(image: Image.Image) -> int:
    """The EXIF orientation, 1 (upright) to 8, without decoding the pixels."""
    if image.format == "TIFF":
        return 1  # Pillow turns TIFF files itself, in `size` and in the pixels
    if image.format == "PNG" and not _EXIF_KEYS & image.info.keys():
        return 1  # Pillow would decode the whole file to look for EXIF behind the pixels
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF must not cost the image
        return 1
    return value if value in range(1, 9) else 1


def _rgb(image: Image.Image) -> UInt8[np.ndarray, "H W 3"]:
    image.load()
    mode = image.mode
    if mode.startswith("I") or mode == "F":
        grey = _to_8_bit(np.asarray(image))
        return np.repeat(grey[:, :, None], 3, axis=2)
    if mode == "LAB":
        from PIL import ImageCms

        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        image = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB") or image
    elif mode in ("RGBa", "La"):
        image = image.convert("RGBA" if mode == "RGBa" else "LA")
    elif mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # straight to RGB, Pillow warns about some palettes with alpha
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))  # convert copies in any case


def _to_8_bit(values: Shaped[np.ndarray, "H W"]) -> UInt8[np.ndarray, "H W"]:
    """Grey values of any type as 0..255."""
    values = np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=65535.0, neginf=0.0).clip(0, 65535)
    largest = values.max()
    if largest > 255:
        values = values / 257
    elif largest <= 1 and (values % 1).any():
        values = values * 255
    return np.rint(values).astype(np.uint8)


def _upright(pixels: UInt8[np.ndarray, "h w 3"], orientation: int) -> UInt8[np.ndarray, "H W 3"]:
    """Undoes an EXIF orientation (EXIF 2.32, tag 0x0112)."""
    match orientation:
        case 2:
            return pixels[:, ::-1]
        case 3:
            return pixels[::-1, ::-1]
        case 4:
            return pixels[::-1]
        case 5:
            return pixels.swapaxes(0, 1)
        case 6:
            return np.rot90(pixels, -1)
        case 7:
            return pixels[::-1, ::-1].swapaxes(0, 1)
        case 8:
            return np.rot90(pixels)
        case _:
            return pixels
