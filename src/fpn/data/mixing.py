"""Several training images in one: mosaic, copy-paste of objects, mixup; and the whole of what training does to images.

Every function takes pairs (image, target) as the transforms of `augment.py` and returns one that keeps their promises.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from fpn.boxes import area
from fpn.data.augment import (
    MIN_SIDE,
    TRIES,
    Augmentation,
    Masks,
    Pair,
    Window,
    anywhere,
    blank,
    chance,
    enough,
    finishing,
    laid,
    masks_in,
    masks_of,
    pair_of,
    place,
    plain,
    scaling,
    shown,
    uniform,
    with_pixels,
)
from fpn.data.transforms import ResizeSides

ALONE = 0.15  # of the epochs, the last, in which images come alone again (in Ge et al. 2021 15 of 300)
TILE = (0.3, 0.7)  # where the four images of a mosaic meet, of its height and width
TILE_SCALE = (0.4, 1.0)  # of the size of training
SHARE = (0.4, 0.6)  # of the second image in a mixup
PASTED = 6  # most objects put into an image
PASTED_SCALE = (0.7, 1.4)  # of the size of training
LARGEST_PASTED = 0.5  # of the sides of the image that an object is put into

Another = Callable[[], Pair | None]  # another image of the data set, None where it cannot be read


def training_transform(
    chosen: Augmentation, short: Sequence[int], long: int, epochs: int
) -> tuple[v2.Transform, Mixing | None]:
    """What `loader` needs to train for `epochs` with images of one of the `short` sides: `transform` and `mixing`."""
    first, last = scaling(chosen, short, long), finishing(chosen)
    transform = v2.Compose([first, last])
    if not (chosen.mosaic or chosen.mixup or chosen.copy_paste):
        return transform, None
    return transform, Mixing(chosen, ResizeSides(short, long), first, last, epochs - math.ceil(ALONE * epochs))


@dataclass(frozen=True)
class Mixing:
    """One training image out of several; before the epoch `until` (from 0) this stands in for the plain transform.

    resize: gives the size of training. first, last: what is done to a single image before and after others join it.
    """

    chosen: Augmentation
    resize: ResizeSides
    first: v2.Transform
    last: v2.Transform
    until: int

    def __call__(self, pair: Pair, another: Another) -> Pair:
        """The pair at the size of training, mixed with what `another` gives and finished."""
        mixed = self.mosaic(pair, another) if chance(self.chosen.mosaic) else self.first(*pair)
        if chance(self.chosen.copy_paste) and (other := another()):
            mixed = copy_paste(mixed, other, self.scale(other) * uniform(*PASTED_SCALE))
        if chance(self.chosen.mixup) and (other := another()):
            size = (mixed[0].shape[1], mixed[0].shape[2])
            smallest, largest = self.chosen.lsj
            scale = covering(self.scale(other) * uniform(smallest, largest), other, size)
            mixed = mixup(mixed, place(*other, size, scale), uniform(*SHARE))
        return self.last(*mixed)

    def mosaic(self, pair: Pair, another: Another) -> Pair:
        """A mosaic of the size that the image itself would have, or the image alone where no object would be left."""
        size = self.resize.size_for(*pair[0].shape[1:])
        pairs = [pair, *(another() or pair for _ in range(3))]
        mixed = mosaic(pairs, size, [self.scale(each) * uniform(*TILE_SCALE) for each in pairs])
        return self.first(*pair) if len(pair[1]["boxes"]) and not len(mixed[1]["boxes"]) else mixed

    def scale(self, pair: Pair) -> float:
        """By how much the image would be resized."""
        height, width = pair[0].shape[1:]
        size = self.resize.size_for(height, width)
        return max(size[0] / height, size[1] / width)


def mosaic(pairs: Sequence[Pair], size: tuple[int, int], scales: Sequence[float]) -> Pair:
    """Four images side by side and below each other (Bochkovskiy et al. 2020), meeting at a random point.

    Each shows a random window at its scale, or larger where it would not fill its tile.
    """
    canvas = blank(size)
    y, x = (round(side * uniform(*TILE)) for side in size)
    tiles = [(0, 0, y, x), (0, x, y, size[1]), (y, 0, size[0], x), (y, x, size[0], size[1])]
    boxes, labels, masks = [], [], []
    for place_of, pair, scale in zip(torch.randperm(4).tolist(), pairs, scales, strict=True):
        top, left, bottom, right = tiles[place_of]
        tile = (bottom - top, right - left)
        if min(tile) < 1:  # of an image one pixel high
            continue
        image, target = place(*pair, tile, covering(scale, pair, tile))
        canvas[:, top:bottom, left:right] = image
        boxes.append(plain(target["boxes"]) + torch.tensor([left, top, left, top]))
        labels.append(target["labels"])
        masks.append(laid(masks_of(target), (top, left), size))
    return pair_of(canvas, torch.cat(boxes), torch.cat(labels), joined(masks))


def covering(scale: float, pair: Pair, size: tuple[int, int]) -> float:
    """The scale, up to twice as large if that is what it takes to cover `size`."""
    height, width = pair[0].shape[1:]
    return max(scale, min(2 * scale, max(size[0] / height, size[1] / width)))


def mixup(first: Pair, second: Pair, share: float) -> Pair:
    """Two images of one size shining through each other, with the objects of both (Zhang et al. 2019).

    share: of the second, 0 to 1.
    """
    (image, target), (other, others) = first, second
    blend = image.as_subclass(Tensor).float().lerp_(other.as_subclass(Tensor).float(), share)
    boxes = torch.cat([plain(target["boxes"]), plain(others["boxes"])])
    labels, masks = torch.cat([target["labels"], others["labels"]]), joined([masks_of(target), masks_of(others)])
    return pair_of(blend.round_().to(torch.uint8), boxes, labels, masks)


def joined(masks: Sequence[Masks]) -> Masks:
    """The masks of all objects, None where there are none."""
    given = [each for each in masks if each is not None]
    return torch.cat(given) if given else None


def copy_paste(pair: Pair, source: Pair, scale: float) -> Pair:
    """Rectangles around objects of `source`, at `scale`, at random places in the image (after Dwibedi et al. 2017).

    Boxes are cut to what a rectangle leaves of them; an object for which no place is found where every other stays
    visible is left out. Whatever else of the source can be seen in a rectangle comes with its box.
    """
    image, boxes, labels = pair[0].as_subclass(Tensor).clone(), plain(pair[1]["boxes"]), pair[1]["labels"]
    whole, visible, masks = area(boxes), area(boxes), joined([masks_of(pair[1])])  # a copy
    pixels, objects = source[0].as_subclass(Tensor), plain(source[1]["boxes"])
    number = int(torch.randint(1, PASTED + 1, ()))
    for row in torch.randperm(len(objects))[:number].tolist():
        window = around(objects[row], (pixels.shape[1], pixels.shape[2]))
        high, wide = (round(side * scale) for side in window[2:])
        spot = free_spot(boxes, visible, whole, (high, wide), (image.shape[1], image.shape[2]))
        if spot is None:
            continue
        y, x = spot
        image[:, y : y + high, x : x + wide] = F.resized_crop(pixels, *window, [high, wide], antialias=True)
        left, hidden = covered(boxes, torch.tensor([x, y, x + wide, y + high]))
        added, keep = shown(objects, window, (high, wide))
        keep = with_pixels(source[1], keep, window)
        added = added[keep] + torch.tensor([x, y, x, y])
        boxes, labels = torch.cat([left, added]), torch.cat([labels, source[1]["labels"][keep]])
        whole, visible = torch.cat([whole, area(added)]), torch.cat([visible - hidden, area(added)])
        if masks is not None:
            new = laid(masks_in(source[1], keep, window, (high, wide)), spot, (image.shape[1], image.shape[2]))
            masks[:, y : y + high, x : x + wide] = 0
            masks = joined([masks, new])
    return pair_of(image, boxes, labels, masks)


def around(box: Float[Tensor, "4"], size: tuple[int, int]) -> Window:
    """The whole pixels that a box touches, in an image of this size."""
    x1, y1, x2, y2 = box.tolist()
    top, left = max(0, math.floor(y1)), max(0, math.floor(x1))
    return top, left, min(size[0], math.ceil(y2)) - top, min(size[1], math.ceil(x2)) - left


def free_spot(
    boxes: Float[Tensor, "N 4"],
    seen: Float[Tensor, " N"],
    whole: Float[Tensor, " N"],
    rectangle: tuple[int, int],
    size: tuple[int, int],
) -> tuple[int, int] | None:
    """Top and left of a random place for a rectangle (height, width) that leaves enough of every object, or None.

    None also for a rectangle too small to be seen or so large that it would take the scene over.
    """
    if not all(
        MIN_SIDE <= side <= LARGEST_PASTED * whole_side for side, whole_side in zip(rectangle, size, strict=True)
    ):
        return None
    for _ in range(TRIES):
        y, x = anywhere(rectangle, size)
        left, hidden = covered(boxes, torch.tensor([x, y, x + rectangle[1], y + rectangle[0]]))
        if (enough(left, seen - hidden, whole) | (hidden == 0)).all():
            return y, x
    return None


def covered(
    boxes: Float[Tensor, "N 4"], rectangle: Int64[Tensor, "4"]
) -> tuple[Float[Tensor, "N 4"], Float[Tensor, " N"]]:
    """Boxes around what a rectangle leaves of them, and the area that it hides of each.

    A box shrinks where the rectangle reaches over a whole side of it; where it takes a corner or a hole, the rest is
    as wide and as high as before.
    """
    over = torch.cat([torch.maximum(boxes[:, :2], rectangle[:2]), torch.minimum(boxes[:, 2:], rectangle[2:])], dim=1)
    hidden = (over[:, 2:] - over[:, :2]).clamp(min=0).prod(dim=1)
    spans = (over[:, :2] == boxes[:, :2]) & (over[:, 2:] == boxes[:, 2:])  # the whole width, the whole height
    cuts = spans.flip(1) & (hidden > 0)[:, None]  # x where the whole height is hidden, y where the width is
    low = torch.where(cuts & (over[:, :2] == boxes[:, :2]), over[:, 2:], boxes[:, :2])
    high = torch.where(cuts & (over[:, 2:] == boxes[:, 2:]), over[:, :2], boxes[:, 2:])
    return torch.cat([low, high], dim=1), hidden
