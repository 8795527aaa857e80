"""A detector from the pixels of images as they are to boxes in these pixels, as one program without Python."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Int64, UInt8
from torch import Tensor, nn
from torch.types import IntLikeType

from fpn.errors import FpnError, OptionError
from fpn.inference.finder import detect_original
from fpn.model.detector import Detector
from fpn.structures import Batch, Detections

MULTIPLE = 32  # of pixels, to which images are padded
OUTPUTS = ("boxes", "scores", "labels", "levels", "count")  # and, of detectors that have some, "masks"


class Whole(nn.Module):
    """What `fpn.inference.finder.find` does with images of one size, as one module: resize, pad, detect, scale back.

    Images are uint8 (B, 3, H, W), not resized. It gives the fields of `fpn.structures.Detections` by name: boxes
    (B, D, 4) in the pixels of these images, scores, labels and levels (B, D), count (B,), and masks (B, D, m, m) where
    the detector has some. Raises OptionError for a detector that looks at given regions.
    """

    def __init__(self, detector: Detector):
        super().__init__()
        check_exportable(detector)
        self.detector = detector

    def forward(self, images: UInt8[Tensor, "B 3 H W"]) -> dict[str, Tensor]:
        count, _, height, width = (torch.full((), side) for side in images.shape)
        original = torch.stack([height, width])
        size = resized(original, *self.detector.spec.sides)
        pixels = bring_to(images, count, size, self.detector.spec.sides[1], self.detector.spec.square_side)
        each = torch.zeros((pixels.shape[0], 1), dtype=torch.int64, device=images.device)
        sizes, originals = (each + value.to(images.device) for value in (size, original))
        found = detect_original(self.detector, Batch(pixels, sizes, originals, each[:, 0]))
        return outputs_of(found)


def check_exportable(detector: Detector) -> None:
    """Raises OptionError for a detector that looks at given regions."""
    if detector.needs_regions:
        raise OptionError(
            f"{detector.spec.model} looks at given regions, which an exported file cannot be given: export a model "
            "that proposes its own, such as faster_rcnn"
        )


def outputs_of(found: Detections) -> dict[str, Tensor]:
    """The tensors of detections, by the names under which an exported program gives them."""
    outputs = {name: getattr(found, name) for name in OUTPUTS}
    return outputs if found.masks is None else outputs | {"masks": found.masks}


def resized(size: Int64[Tensor, "2"], short: int, long: int) -> Int64[Tensor, "2"]:
    """`fpn.data.sizes.resized_size` on a tensor (height, width)."""
    smaller, larger = size.min(), size.max()
    new_larger = short * larger // smaller
    new_smaller = torch.where(
        new_larger > long, (torch.full_like(larger, long * short) // new_larger).clamp(min=1), short
    )
    new_larger = new_larger.clamp(max=long)
    portrait = size[0] > size[1]
    return torch.stack([torch.where(portrait, new_larger, new_smaller), torch.where(portrait, new_smaller, new_larger)])


def bring_to(
    images: UInt8[Tensor, "B 3 H W"], count: Int64[Tensor, ""], size: Int64[Tensor, "2"], long: int, square: int | None
) -> UInt8[Tensor, "B 3 _h _w"]:
    """The images, `count` of them, resized to (height, width), none above `long`, and padded as `collate` does it."""
    # Numbers of which an exporter knows no example, only a range: all that it makes of them holds for any of them.
    height, width = (number(side, 1, long) for side in size)
    most = -(-long // MULTIPLE)
    tiles = [number((side + MULTIPLE - 1) // MULTIPLE, 1, most) for side in size] if square is None else [most, most]
    below, right = (MULTIPLE * some - side for some, side in zip(tiles, (height, width), strict=True))
    torch._check(below >= 0)
    torch._check(right >= 0)
    pixels = F.interpolate(images, size=(height, width), mode="bilinear", antialias=True)
    return F.pad(pixels, (0, right, 0, below)).narrow(0, 0, number(count, 1, images.shape[0]))


def number(value: Int64[Tensor, ""], low: int, high: IntLikeType) -> Any:
    """A tensor's value, which lies between these two: an int, or while an exporter looks on what stands for one."""
    found = value.item()
    torch._check(found >= low)
    torch._check(found <= high)
    return found


def export_program(detector: Detector) -> torch.export.ExportedProgram:
    """`Whole` by `torch.export`, for any number of images of any size, in the precision that the detector has.

    Raises OptionError for a detector with a part, such as a backbone of somebody else's, that cannot be exported so.
    """
    whole = Whole(detector.eval())
    images = torch.zeros((2, 3, 96, 160), dtype=torch.uint8, device=detector.mean.device)
    sides = {axis: torch.export.Dim.DYNAMIC for axis in (0, 2, 3)}
    with torch.no_grad(), exportable(detector):
        return torch.export.export(whole, (images,), dynamic_shapes={"images": sides}, strict=False)


@contextmanager
def exportable(detector: Detector) -> Iterator[None]:
    """Raises OptionError for whatever a network of somebody else's can raise where it is exported."""
    try:
        yield
    except FpnError:
        raise
    except Exception as error:
        raise OptionError(
            f"{detector.spec.model} with backbone {detector.spec.backbone} cannot be exported for images of every size "
            f"({reason(error)}); networks of convolutions can, such as resnet50"
        ) from error


@contextmanager
def silence(*names: str) -> Iterator[None]:
    """Without what the loggers of these names, and warnings, have to say about an exporter's own steps."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def reason(error: BaseException, line: int = 0) -> str:
    """What an error says, or the one that it came of, in a line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip().splitlines() or [type(error).__name__])[line][:300]
