"""Test-time augmentation: several views of an image, mirrored and in other sizes, and what they find made one.

It costs as many times the time as there are views, larger ones more, and mostly buys well placed boxes.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from fpn.errors import OptionError
from fpn.exported import Exported
from fpn.inference.finder import Finder, finder
from fpn.inference.fusion import IOU, fuse
from fpn.model.detector import Detector
from fpn.structures import Detections

SCALES = (0.8, 1.0, 1.25)


def augmented(
    detector: Detector | Exported,
    device: str | torch.device = "auto",
    scales: Sequence[float] | None = None,
    flip: bool = True,
    **options: Any,
) -> Finder:
    """The detector as a function of images that looks at each in several sizes, and mirrored where `flip`.

    scales: times the size that the detector resizes images to; 0.8, 1 and 1.25 when left out. An exported file resizes
    by itself, so its images are mirrored only. options: of `fpn.inference.finder.finder`. Raises OptionError for scales
    that cannot be.
    """
    if isinstance(detector, Exported):
        if scales is not None and tuple(scales) != (1.0,):
            raise OptionError(f"{detector.path}: an exported file has one size of images; scales are for checkpoints")
        return views(finder(detector, device, **options), flip=flip)
    return views(*[finder(scaled(detector, scale), device, **options) for scale in scales or SCALES], flip=flip)


def views(*finds: Finder, flip: bool = True, iou: float = IOU) -> Finder:
    """What all of the finders find in an image, and in its mirror image where `flip`, fused by `fuse`."""
    if not finds:
        raise OptionError("no view: give one finder at least")
    return partial(looked_at, finds, flip=flip, iou=iou)


def looked_at(
    finds: Sequence[Finder], images: Sequence[UInt8[Tensor, "3 _ _"]], flip: bool, iou: float
) -> list[Detections]:
    if not images:
        return []
    seen = [find(images) for find in finds]
    if flip:
        mirror_images = [image.flip(-1) for image in images]
        widths = [image.shape[2] for image in images]
        for find in finds:
            seen.append([mirrored(one, width) for one, width in zip(find(mirror_images), widths, strict=True)])
    return [fuse(of_image, iou) for of_image in zip(*seen, strict=True)]


def mirrored(found: Detections, width: int) -> Detections:
    """The detections of the mirror image of an image of this width, left and right exchanged."""
    x1, y1, x2, y2 = found.boxes.unbind(-1)
    boxes = torch.stack([width - x2, y1, width - x1, y2], dim=-1)
    return replace(found, boxes=boxes, masks=None if found.masks is None else found.masks.flip(-1))


def scaled(detector: Detector, scale: float) -> Detector:
    """The same detector, weights and all, that resizes images to `scale` times the size."""
    if not 0.1 <= scale <= 10 or detector.spec.sides[0] * scale < 32:
        raise OptionError(f"scale {scale}: it must be from 0.1 to 10 and leave 32 pixels of {detector.spec.sides[0]}")
    if scale == 1:
        return detector
    short, long = (round(side * scale) for side in detector.spec.sides)
    other = copy.copy(detector)  # the modules in it are the same ones; only the size is its own
    other.spec = replace(detector.spec, short=short, long=long)
    return other
