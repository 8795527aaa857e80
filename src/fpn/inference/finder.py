"""Finder: a detector as a function of images, each of its own size. What is around a trained detector is made of these.

Tiles, views and files stand in for a detector by giving such a function; predicting, measuring and serving take one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from jaxtyping import UInt8
from torch import Tensor
from torchvision.transforms.v2.functional import resize

from fpn.data.batching import collate
from fpn.data.sizes import resized_size
from fpn.errors import OptionError
from fpn.exported import Exported
from fpn.hardware import pick_device
from fpn.model.detector import Detector
from fpn.structures import Batch, Detections, Sample

# Images, uint8 (3, H, W) each -> the detections of each, on the CPU, highest score first, boxes in pixels of the image.
Finder = Callable[[Sequence[Tensor]], list[Detections]]


def finder(
    detector: Detector | Exported,
    device: str | torch.device = "auto",
    tile: int | None = None,
    overlap: float | None = None,
    *,
    progress: bool = True,
) -> Finder:
    """The detector as a function of images, on a device. All images of one call are one batch.

    tile, overlap: in tiles, see `fpn.inference.tiles.tiled`; as the detector was trained when None, and with tile 0 in
    whole images. progress: a bar for images of which the tiles take long. Raises OptionError for a device that an
    exported file cannot run on, and for an overlap without tiles.
    """
    from fpn.inference.tiles import tiled  # it is made of what is above

    if isinstance(detector, Exported):
        if str(device) != "auto" and pick_device(device).type != "cpu":
            raise OptionError(f"device {device}: {detector.path} is an exported file and runs on the CPU; leave it out")
        one = detector.find
    else:
        target = pick_device(device)
        detector.eval().to(target)
        one = partial(find, detector, device=target)
    tile = detector.spec.tile if tile is None else tile
    if not tile:
        if overlap is not None:
            raise OptionError(f"overlap {overlap}: it is of tiles; give --tile too, such as 800")
        return one
    settings = detector.spec.settings
    iou = settings.get("box_nms", settings.get("rpn_nms", 0.5))
    return tiled(one, tile, detector.spec.overlap if overlap is None else overlap, iou=iou, progress=progress)


def check_threshold(threshold: float) -> None:
    """Raises OptionError for a lowest score that cannot be."""
    if not 0 <= threshold <= 1:
        raise OptionError(f"threshold is {threshold}: it must be from 0 to 1")


@torch.inference_mode()
def find(detector: Detector, images: Sequence[UInt8[Tensor, "3 _ _"]], device: torch.device) -> list[Detections]:
    """All detections in each of the images, which are resized and go through the detector as one batch."""
    batch = collate([sample_of(image, detector) for image in images], square=detector.spec.square_side)
    if batch is None:
        return []
    found = detect_original(detector, batch.to(device)).to("cpu")
    return [found[place] for place in range(len(images))]


def sample_of(image: UInt8[Tensor, "3 _ _"], detector: Detector) -> Sample:
    height, width = image.shape[1:]
    resized = resize(image, list(resized_size((height, width), *detector.spec.sides)), antialias=True)
    return Sample(resized, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), 0, (height, width))


def detect_original(
    detector: Detector, batch: Batch, detect: Callable[[Batch], Detections] | None = None
) -> Detections:
    """`detector.detect`, with the boxes in pixels of the images as they were before resizing."""
    found = (detect or detector.detect)(batch)
    sizes = batch.original_sizes.to(found.boxes.dtype)
    scale = (sizes / batch.sizes)[:, None, [1, 0, 1, 0]]
    # Rounding must not push a box out of the image; the windows of mask proposals may reach beyond it.
    inside = found.boxes <= batch.sizes[:, None, [1, 0, 1, 0]]
    limits = torch.where(inside, sizes[:, None, [1, 0, 1, 0]], torch.inf)
    return replace(found, boxes=torch.minimum(found.boxes * scale, limits))
