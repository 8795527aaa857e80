"""Random changes of one training image and its boxes: scale, crop, flips, colours; and how much of each.

All are transforms as in `transforms.py`: they keep pixels uint8, boxes inside the image and labels and masks beside
their boxes. An object of which a cut leaves too little is no longer one to be learnt and loses its box; an image that
has objects keeps at least one. Everything random is drawn from torch's global generator.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from fpn.boxes import area
from fpn.data.sizes import LONG, SHORT
from fpn.data.transforms import ResizeSides, resize_masks
from fpn.errors import OptionError

MIN_VISIBLE = 0.3  # of its area, for an object that a cut leaves in the picture to keep its box
MIN_SIDE = 2.0  # pixels of such a box's shorter side
TRIES = 20  # places looked at for one that keeps an object
CROP = 0.5  # shortest side of a crop, of the image's
FILL = (124, 116, 104)  # the mean of ImageNet, which is 0 once normalised: what the padding of a batch is, too
HUE = 0.1  # turn of the colour circle at full `jitter`, against changes of 1 in brightness and so on
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601: how bright red, green and blue look

Target = dict[str, Any]  # "boxes" and "labels", where asked for "masks", and "regions" where there are proposals
Pair = tuple[tv_tensors.Image, Target]
Window = tuple[int, int, int, int]  # top, left, height, width
Masks = UInt8[Tensor, "_ _ _"] | None


@dataclass(frozen=True)
class Augmentation:
    """How much training images are changed. Probabilities, unless said otherwise; as it stands, nothing is done.

    flip, vertical_flip: mirrored left to right, upside down (for images without an up, from above or a microscope).
    lsj: smallest and largest factor of scale jitter; (1, 1) is off. crop: cut to a part that shows objects.
    jitter: strength of changes of brightness, contrast, saturation and hue, 0 to 1.
    mosaic: four images in one. mixup: two, one shining through the other. copy_paste: objects of another image put in.

    Raises OptionError for values that cannot work.
    """

    flip: float = 0.0
    vertical_flip: float = 0.0
    lsj: tuple[float, ...] = (1.0, 1.0)
    crop: float = 0.0
    jitter: float = 0.0
    mosaic: float = 0.0
    mixup: float = 0.0
    copy_paste: float = 0.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name != "lsj" and not 0 <= value <= 1:
                raise OptionError(f"{name} is {value}: it must be from 0 to 1")
        if not (len(self.lsj) == 2 and 0.05 <= self.lsj[0] <= self.lsj[1] <= 10):
            given = " ".join(f"{factor:g}" for factor in self.lsj)
            raise OptionError(f"lsj is {given}: it must be two factors from 0.05 to 10, the smaller first, as in 0.5 2")


PRESETS = {
    "none": Augmentation(),
    "light": Augmentation(flip=0.5),
    "strong": Augmentation(flip=0.5, lsj=(0.5, 2.0), jitter=0.3, mosaic=0.5, mixup=0.1, copy_paste=0.3),
}


def train_transform(
    short: Sequence[int] = (SHORT,), long: int = LONG, flip: float = 0.5, jitter: float = 0.0
) -> v2.Transform:
    """`resize_transform` to one of the `short` sides at random, a horizontal flip, and changes of colour.

    Args:
        short: lengths of the shorter side in pixels to draw from; several make multi-scale training.
        long: most pixels of the longer side.
        flip: probability of a horizontal flip.
        jitter: strength of random changes of brightness, contrast, saturation and hue, from 0 (off) to 1.

    Raises:
        OptionError: a size below 1 pixel, or a probability or strength outside 0..1.
    """
    chosen = Augmentation(flip=flip, jitter=jitter)
    return v2.Compose([scaling(chosen, short, long), finishing(chosen)])


def scaling(chosen: Augmentation, short: Sequence[int], long: int) -> v2.Transform:
    """The first half: crop, scale jitter, and resizing to the size of training."""
    steps: list[v2.Transform] = [CropWithObjects(chosen.crop)] if chosen.crop else []
    smallest, largest = chosen.lsj
    steps.append(
        ResizeSides(short, long) if smallest == largest == 1 else ScaleJitter(short, long, (smallest, largest))
    )
    return v2.Compose(steps)


def finishing(chosen: Augmentation) -> v2.Transform:
    """The second half: flips and colours."""
    steps: list[v2.Transform] = []
    if chosen.flip:
        steps.append(v2.RandomHorizontalFlip(chosen.flip))
    if chosen.vertical_flip:
        steps.append(v2.RandomVerticalFlip(chosen.vertical_flip))
    if chosen.jitter:
        steps.append(ColourJitter(chosen.jitter))
    return v2.Compose([*steps, v2.ClampBoundingBoxes()])


class ScaleJitter(v2.Transform):
    """Large-scale jitter (Ghiasi et al. 2021): the size of training times a random factor, at the size of training.

    What is larger is cut to a random window, what is smaller lies at a random place on `FILL`. Only the pixels that
    stay are computed, so this takes no longer than resizing.
    """

    def __init__(self, short: Sequence[int], long: int, factors: tuple[float, float]) -> None:
        super().__init__()
        self.resize, self.factors = ResizeSides(short, long), factors

    def forward(self, image: tv_tensors.Image, target: Target) -> Pair:
        height, width = image.shape[1:]
        size = self.resize.size_for(height, width)
        scale = max(size[0] / height, size[1] / width) * uniform(*self.factors)
        changed = place(image, target, size, scale)
        if len(target["boxes"]) and not len(changed[1]["boxes"]):
            return v2.Resize(size)(image, target)
        return changed


class CropWithObjects(v2.Transform):
    """With probability `p` a random part of the image, wide if it was wide, with at least one of its objects."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, image: tv_tensors.Image, target: Target) -> Pair:
        if not chance(self.p):
            return image, target
        whole, boxes = (image.shape[1], image.shape[2]), plain(target["boxes"])
        for _ in range(TRIES):
            part = (max(1, round(whole[0] * uniform(CROP, 1))), max(1, round(whole[1] * uniform(CROP, 1))))
            top, left = anywhere(part, whole)
            cut, keep = shown(boxes, (top, left, *part), part)
            keep = with_pixels(target, keep, (top, left, *part))
            as_wide = (part[1] >= part[0]) == (whole[1] >= whole[0])
            if as_wide and (keep.any() or not len(boxes)):
                pixels = image.as_subclass(Tensor)[:, top : top + part[0], left : left + part[1]]
                masks = masks_in(target, keep, (top, left, *part), part)
                return pair_of(pixels, cut[keep], target["labels"][keep], masks)
        return image, target


class ColourJitter(v2.Transform):
    """Random brightness, contrast, saturation and hue, as far as SSD (Liu et al. 2016) at a `strength` around 0.5.

    Each of the four is linear in red, green and blue (hue as a turn about the grey axis), so one matrix does them all:
    several times as fast as torchvision's `ColorJitter`.
    """

    def __init__(self, strength: float) -> None:
        super().__init__()
        self.strength = strength

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        brightness, contrast, saturation = (uniform(1 - self.strength, 1 + self.strength) for _ in range(3))
        angle = 2 * math.pi * HUE * self.strength * uniform(-1, 1)
        matrix = brightness * contrast * hue_matrix(angle) @ saturation_matrix(saturation)
        return {"matrix": matrix, "brightness": brightness, "contrast": contrast}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if not isinstance(inpt, tv_tensors.Image):
            return inpt
        pixels = inpt.as_subclass(Tensor)
        grey = (pixels[:, ::8, ::8].float().mean(dim=(1, 2)) * torch.tensor(LUMA)).sum()  # every 64th pixel will do
        shift = params["brightness"] * (1 - params["contrast"]) * grey
        rows = pixels.permute(1, 2, 0).reshape(-1, 3).float()  # no copy of what Pillow has decoded
        changed = torch.addmm(shift.expand(3), rows, params["matrix"].T).round_().clamp_(0, 255).to(torch.uint8)
        return tv_tensors.Image(changed.reshape(*pixels.shape[1:], 3).permute(2, 0, 1))


def saturation_matrix(saturation: float) -> Float[Tensor, "3 3"]:
    """A colour to its grey (0), to itself (1), or beyond."""
    return saturation * torch.eye(3) + (1 - saturation) * torch.tensor(LUMA).expand(3, 3)


def hue_matrix(angle: float) -> Float[Tensor, "3 3"]:
    """A turn by `angle` radians about the axis of greys (Rodrigues' formula), from red towards green."""
    cross = torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]) / math.sqrt(3)
    return math.cos(angle) * torch.eye(3) + math.sin(angle) * cross + (1 - math.cos(angle)) / 3 * torch.ones(3, 3)


def place(image: tv_tensors.Image, target: Target, size: tuple[int, int], scale: float) -> Pair:
    """The image at `scale` (pixels out for a pixel in) on a canvas of `size`, for each axis a random window or place.

    Of `TRIES` windows the first is taken that shows an object; where none does, the pair comes back without boxes.
    """
    source, boxes = (image.shape[1], image.shape[2]), plain(target["boxes"])
    (high, tall), (wide, broad) = (along(n, m, scale) for n, m in zip(source, size, strict=True))
    for _ in range(TRIES):
        top, left = anywhere((high, wide), source)
        moved, keep = shown(boxes, (top, left, high, wide), (tall, broad))
        keep = with_pixels(target, keep, (top, left, high, wide))
        if keep.any() or not len(boxes):
            break
    pixels = F.resized_crop(image.as_subclass(Tensor), top, left, high, wide, [tall, broad], antialias=True)
    masks = masks_in(target, keep, (top, left, high, wide), (tall, broad))
    y, x = anywhere((tall, broad), size)
    if (tall, broad) != size:
        canvas = blank(size)
        canvas[:, y : y + tall, x : x + broad] = pixels
        pixels, masks = canvas, laid(masks, (y, x), size)
    return pair_of(pixels, moved[keep] + torch.tensor([x, y, x, y]), target["labels"][keep], masks)


def along(source: int, size: int, scale: float) -> tuple[int, int]:
    """On one axis: how many pixels of the source are seen at this scale, and how many of the canvas they take."""
    part = max(1, round(size / scale))
    return (part, size) if part < source else (source, min(size, max(1, round(source * scale))))


def anywhere(part: tuple[int, int], whole: tuple[int, int]) -> tuple[int, int]:
    """Top and left of a part at a random place of the whole, both (height, width)."""
    return int(torch.randint(whole[0] - part[0] + 1, ())), int(torch.randint(whole[1] - part[1] + 1, ()))


def shown(
    boxes: Float[Tensor, "N 4"], window: Window, size: tuple[int, int]
) -> tuple[Float[Tensor, "N 4"], Bool[Tensor, " N"]]:
    """Boxes as they are in a window (pixels) that is resized to `size`, cut at its border, and which are kept."""
    top, left, height, width = window
    moved = (boxes - boxes.new_tensor([left, top, left, top])) * boxes.new_tensor(
        [size[1] / width, size[0] / height] * 2
    )
    cut = torch.minimum(moved.clamp(min=0), moved.new_tensor([size[1], size[0]] * 2))
    return cut, enough(cut, area(cut), area(moved))


def with_pixels(target: Target, keep: Bool[Tensor, " N"], window: Window) -> Bool[Tensor, " N"]:
    """Of the objects to be kept those of which, where there are masks, a pixel lies in the window."""
    if "masks" not in target:
        return keep
    top, left, height, width = window
    return keep & plain(target["masks"])[:, top : top + height, left : left + width].any(dim=2).any(dim=1).bool()


def masks_in(target: Target, keep: Bool[Tensor, " N"], window: Window, size: tuple[int, int]) -> Masks:
    """The masks of the objects that are kept, as they are in a window that is resized to `size`."""
    if "masks" not in target:
        return None
    top, left, height, width = window
    return resize_masks(plain(target["masks"])[keep, top : top + height, left : left + width], size)


def laid(masks: Masks, place: tuple[int, int], size: tuple[int, int]) -> Masks:
    """Masks on an empty canvas of `size`, with their top and left at a place."""
    if masks is None:
        return None
    (y, x), canvas = place, masks.new_zeros(len(masks), *size)
    canvas[:, y : y + masks.shape[1], x : x + masks.shape[2]] = masks
    return canvas


def masks_of(target: Target) -> Masks:
    return plain(target["masks"]) if "masks" in target else None


def enough(boxes: Float[Tensor, "N 4"], seen: Float[Tensor, " N"], whole: Float[Tensor, " N"]) -> Bool[Tensor, " N"]:
    """Whether objects of the area `whole`, of which `seen` is left inside `boxes`, can still be learnt."""
    return (seen >= MIN_VISIBLE * whole) & ((boxes[:, 2:] - boxes[:, :2]).amin(dim=1) >= MIN_SIDE)


def blank(size: tuple[int, int]) -> tv_tensors.Image:
    """A canvas of `FILL`, with its channels last in memory, as decoded images have them."""
    return tv_tensors.Image(torch.tensor(FILL, dtype=torch.uint8).expand(*size, 3).contiguous().permute(2, 0, 1))


def pair_of(pixels: Tensor, boxes: Tensor, labels: Tensor, masks: Masks = None) -> Pair:
    """What transforms take and return, of plain tensors: uint8 (3, H, W), boxes (N, 4), labels (N,), masks."""
    target = {"boxes": boxes_in(boxes, (pixels.shape[1], pixels.shape[2])), "labels": labels}
    return tv_tensors.Image(pixels), target if masks is None else {**target, "masks": tv_tensors.Mask(masks)}


def boxes_in(boxes: Tensor, size: tuple[int, int]) -> tv_tensors.BoundingBoxes:
    """Boxes (N, 4) as transforms move them with an image of this size."""
    form = tv_tensors.BoundingBoxFormat.XYXY
    return tv_tensors.BoundingBoxes(boxes, format=form, canvas_size=size)  # pyright: ignore[reportCallIssue]


def plain(boxes: Tensor) -> Tensor:
    """Boxes or masks without torchvision's wrapper, which costs time at every operation."""
    return boxes.as_subclass(Tensor)


def uniform(low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand(()))


def chance(p: float) -> bool:
    return p > 0 and float(torch.rand(())) < p
