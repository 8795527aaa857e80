"""Mask proposals from a pyramid: small MLPs slid over every level say where an object is, and which pixels are its own
(Lin et al. 2017, section 6 and appendix A, after DeepMask, Pinheiro et al. 2015).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from fpn.errors import OptionError
from fpn.model.anchors import Anchors
from fpn.model.detector import Detector, chance_of
from fpn.model.losses import number_of, objectness_loss
from fpn.model.mask_head import mask_loss, of_class, outlines_in
from fpn.model.matching import BACKGROUND, CHUNK, IGNORED
from fpn.model.sampling import RPN, sample
from fpn.structures import Batch, Detections


def scales_of(windows: Sequence[int]) -> tuple[float, ...]:
    """The sizes of the objects that windows of so many cells a side are for, as shares of those of a 5x5 window.

    To the nearest half octave, so that windows and levels share out all sizes evenly: 7x7 is sqrt 2 times 5x5. Raises
    OptionError for windows without a middle, or two of one size.
    """
    if not windows or any(window < 1 or window % 2 == 0 for window in windows):
        raise OptionError(f"windows {list(windows)}: at least one is needed, and each an odd number of cells")
    halves = [round(2 * math.log2(window / 5)) for window in windows]
    if len(set(halves)) < len(halves):
        raise OptionError(f"windows {list(windows)}: two of them are for objects of one size; 5 and 7 differ enough")
    return tuple(2 ** (half / 2) for half in halves)


class WindowHead(nn.Module):
    """An MLP on windows of window x window cells: one hidden layer, a mask of size x size and an object score."""

    def __init__(self, width: int, window: int, hidden: int = 512, size: int = 14):
        super().__init__()
        self.window, self.size = window, size
        self.hidden = nn.Conv2d(width, hidden, window, padding=window // 2)
        self.score = nn.Conv2d(hidden, 1, 1)
        self.mask = nn.Conv2d(hidden, size**2, 1)
        nn.init.kaiming_normal_(self.hidden.weight, nonlinearity="relu")
        for layer in (self.score, self.mask):
            nn.init.normal_(layer.weight, std=0.01)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, p: Float[Tensor, "B d h w"]) -> Float[Tensor, "B h w"]:
        """The score, a logit, of the window around every place of a map."""
        return self.score(F.relu(self.hidden(p)))[:, 0].float()

    def judge(self, windows: Float[Tensor, "R d _s _s"]) -> tuple[Float[Tensor, " R"], Float[Tensor, "R m m"]]:
        """The score and the mask, logits, of windows cut out of a map; what lies beyond the head's own is left out."""
        rim = (windows.shape[-1] - self.window) // 2
        own = windows[..., rim : rim + self.window, rim : rim + self.window]
        hidden = F.relu(F.conv2d(own, self.hidden.weight, self.hidden.bias))
        masks = self.mask(hidden).float().unflatten(1, (self.size, self.size))
        return self.score(hidden).float().flatten(), masks[..., 0, 0]


@dataclass(frozen=True)
class Places:
    """All windows of a pyramid, in the order (level, row, column, window).

    boxes: the squares of the size that each window's objects have, in pixels. levels: of the pyramid. windows: which of
    the model's it is, counted from 0; kinds: the same of all pairs of level and window.
    """

    boxes: Float[Tensor, "A 4"]
    levels: Int64[Tensor, " A"]
    windows: Int64[Tensor, " A"]
    kinds: Int64[Tensor, " A"]

    @property
    def centres(self) -> Float[Tensor, "A 2"]:
        return (self.boxes[:, :2] + self.boxes[:, 2:]) / 2

    @property
    def cells(self) -> Int64[Tensor, "A 2"]:
        """Column and row of the cell that each window is centred on."""
        return (self.centres / self.strides[:, None]).floor().to(torch.int64)

    @property
    def strides(self) -> Float[Tensor, " A"]:
        return torch.exp2(self.levels.float())

    def regions(self, padding: float) -> Float[Tensor, "A 4"]:
        """The squares that the masks cover: `padding`, a share of the side, goes around the boxes."""
        rim = (self.boxes[:, 2:] - self.boxes[:, :2]) * (padding / 2)
        return torch.cat([self.boxes[:, :2] - rim, self.boxes[:, 2:] + rim], dim=1)

    def inside(self, sizes: Int64[Tensor, "B 2"]) -> Bool[Tensor, "B A"]:
        """Whether the cell lies, at least in part, in an image of (height, width), not in its padding."""
        corner = self.cells * self.strides[:, None]
        return (corner < sizes.flip(1)[:, None]).all(-1)


class MaskProposals(Detector):
    """Which windows have an object in their middle, and its outline; of no class, and not thinned by NMS.

    cells: squares of ratio 1 and offset 0.5, one size a level times a scale for each window: the larger side of the
        objects that the window is for. 32 to 512 pixels on P2 to P6 in the paper.
    heads: one `WindowHead` for each of `windows`, shared by the levels.
    padding: what the mask's region has more than those squares, as a share of their side.
    reach: a window is positive if the centre of an object of its size is this near to its own, in strides, along both
        axes. Every object is of the nearest size in octaves, so the smallest and the largest windows take all beyond.
    examples, positive_fraction: windows of each image to learn from, 2048 for 16 images in the paper.
    mask_size: cells along the side of a mask. hidden: see `WindowHead`. score, max_detections: the lowest score and the
        number of an image's proposals.
    """

    cells: Anchors
    proposes = True
    has_masks = True
    loss_weights = {"score": 1.0, "mask": 10.0}

    def __init__(
        self,
        backbone: nn.Module,
        pyramid: nn.Module,
        cells: Anchors,
        heads: nn.ModuleList,
        classes: tuple[str, ...],
        *,
        windows: tuple[int, ...] = (5, 7),
        mask_size: int = 14,
        padding: float = 0.25,
        reach: float = 1.0,
        examples: int = 128,
        positive_fraction: float = 0.25,
        score: float = 0.0,
        max_detections: int = 1000,
        **pixels: Any,
    ):
        super().__init__(backbone, pyramid, classes, **pixels)
        if padding < 0 or reach < 0.5:
            raise OptionError(f"padding {padding}, reach {reach}: at least 0 and 0.5, or some objects have no window")
        if cells.ratios != (1.0,) or cells.offset != 0.5 or cells.floor_stride or cells.whole_pixels:
            raise OptionError(
                "windows are squares in the middle of their cells: leave out anchor_ratios, anchor_offset, "
                "whole_pixels and floor_stride"
            )
        self.cells, self.heads, self.windows, self.mask_size = cells, heads, windows, mask_size
        self.padding, self.reach = padding, reach
        self.examples, self.positive_fraction = examples, positive_fraction
        self.score, self.max_detections = score, max_detections
        self.sides = [side * scale for side in cells.sizes.values() for scale in cells.scales]

    def detect(self, batch: Batch) -> Detections:
        """The windows of the highest scores; their regions, which may reach beyond the image, with the masks in them.

        Only these are given masks: the 5x5 and 7x7 cells around each are taken from the pyramid and judged again. At
        800 pixels that is a hundredth of the work of scoring all windows, whose hidden layers need not be kept.
        """
        pyramid = self.features(batch)
        places = self.places(pyramid, batch.images.shape[-2:])
        scores = torch.where(places.inside(batch.sizes), self.rate(pyramid).sigmoid(), -1.0)
        value, position = F.pad(scores, (0, self.max_detections), value=-1.0).topk(self.max_detections, dim=1)
        position = position.clamp(max=scores.shape[1] - 1)
        real = value >= max(self.score, 0.0)
        _, masks = self.judge(pyramid, places, position)
        return Detections(
            # Chosen, not multiplied: weights that went NaN must not show in the padding.
            boxes=torch.where(real[..., None], places.regions(self.padding)[position], 0.0),
            scores=torch.where(real, value, 0.0),
            labels=torch.where(real, 0, -1),
            levels=torch.where(real, places.levels[position], -1),
            count=real.sum(1),
            classes=self.classes,
            masks=torch.where(real[..., None, None], masks.sigmoid(), 0.0),
        )

    def losses(self, batch: Batch) -> dict[str, Float[Tensor, ""]]:
        """The unweighted loss terms: score, of all examples, and mask, of the positives.

        Raises OptionError for targets without masks.
        """
        targets = batch.targets
        assert targets is not None, "losses need a batch with targets"
        if targets.masks is None:
            raise OptionError(
                "the data has no outlines for mask proposals to learn from: give every object one (a segmentation in "
                'COCO\'s format), or train "rpn" for proposals that are boxes'
            )
        pyramid = self.features(batch)
        places = self.places(pyramid, batch.images.shape[-2:])
        matched = assign(targets.boxes, targets.valid, places, self.sides, self.reach)
        matched = torch.where(places.inside(batch.sizes) | (matched >= 0), matched, IGNORED)
        # Only the chosen windows are judged: a small part of the work of all.
        chosen = sample(matched, self.examples, self.positive_fraction, chance_of(batch), RPN)
        scores, masks = self.judge(pyramid, places, chosen.positions)
        rows = int(self.positive_fraction * scores.shape[1])  # positives come first
        positive, position = chosen.positive[:, :rows], chosen.positions[:, :rows]
        regions, index = places.regions(self.padding)[position], matched.gather(1, position)
        wanted = outlines_in(targets.masks, regions, index, positive, self.mask_size, half_pixel=True)
        return {
            "score": objectness_loss(scores, chosen.positive, chosen.valid, number_of(chosen.valid)),
            "mask": mask_loss(masks[:, :rows], (wanted >= 0.5).float(), positive, number_of(positive)),
        }

    def places(self, pyramid: Mapping[int, Tensor], image_size: Sequence[int]) -> Places:
        """The windows of a pyramid of images that are padded to this (height, width)."""
        boxes, count = self.cells(pyramid, image_size), len(self.windows)
        # Not len(some), which is a number, so that an exported program would be for one size of image.
        numbers = [torch.arange(some.shape[0], device=some.device) for some in boxes.values()]
        return Places(
            torch.cat(list(boxes.values())),
            torch.cat([torch.full_like(own, level) for level, own in zip(boxes, numbers, strict=True)]),
            torch.cat([own % count for own in numbers]),
            torch.cat([own % count + n * count for n, own in enumerate(numbers)]),
        )

    def rate(self, pyramid: Mapping[int, Float[Tensor, "B d _ _"]]) -> Float[Tensor, "B A"]:
        """The score, a logit, of every window."""
        levels = [torch.stack([head(p) for head in self.heads], dim=-1).flatten(1) for p in pyramid.values()]
        return torch.cat(levels, dim=1)

    def judge(
        self, pyramid: Mapping[int, Tensor], places: Places, position: Int64[Tensor, "B R"]
    ) -> tuple[Float[Tensor, "B R"], Float[Tensor, "B R m m"]]:
        """The scores and masks, logits, of some windows of each image."""
        around = windows_at(pyramid, places.levels[position], places.cells[position], max(self.windows))
        judged = [head.judge(around) for head in self.heads]  # pyright: ignore[reportCallIssue]
        scores, masks = zip(*judged, strict=True)
        own = places.windows[position]
        score = torch.stack(scores, dim=1).gather(1, own.flatten()[:, None])
        return score.view(own.shape), of_class(torch.stack(masks, dim=1), own)


@torch.no_grad()
def assign(
    truth: Float[Tensor, "B N 4"],
    valid: Bool[Tensor, "B N"],
    places: Places,
    sides: Sequence[float],
    reach: float,
) -> Int64[Tensor, "B A"]:
    """For each window the index of the object that it is for, or BACKGROUND.

    The object's larger side is nearest, in octaves, to that of the window's kind among all `sides`, and its centre at
    most `reach` strides from the window's along both axes (appendix A). Of several objects a window takes the nearest.
    """
    centres, (width, height) = (truth[..., :2] + truth[..., 2:]) / 2, (truth[..., 2:] - truth[..., :2]).unbind(-1)
    octave = torch.maximum(width, height).clamp(min=1e-6).log2()
    kind = torch.stack([(octave - math.log2(side)).abs() for side in sides], dim=-1).argmin(-1)
    best = truth.new_full((len(truth), len(places.kinds)), torch.inf)
    index = torch.full_like(best, BACKGROUND, dtype=torch.int64)
    step = max(1, CHUNK // max(1, best.numel()))
    for start in range(0, truth.shape[1], step):
        some = slice(start, start + step)
        away = centres[:, some, None] - places.centres
        fits = (away.abs() <= reach * places.strides[:, None]).all(-1)
        fits &= (kind[:, some, None] == places.kinds) & valid[:, some, None]
        distance, which = away.square().sum(-1).where(fits, torch.inf).min(dim=1)
        index = torch.where(distance < best, which + start, index)
        best = torch.minimum(distance, best)
    return index


def windows_at(
    pyramid: Mapping[int, Float[Tensor, "B d _ _"]],
    levels: Int64[Tensor, "B R"],
    cells: Int64[Tensor, "B R 2"],
    side: int,
) -> Float[Tensor, "BR d s s"]:
    """The side x side features around cells (column, row) of the given levels; zeros beyond the map, as a convolution
    has them. `side` is odd.
    """
    rim, (batch, count) = side // 2, levels.shape
    # All maps with their rims, laid end to end as the rows of one table: no shape depends on which level is asked for.
    padded = {level: F.pad(p, (rim, rim, rim, rim)) for level, p in pyramid.items()}
    table = torch.cat([p.permute(0, 2, 3, 1).flatten(1, 2) for p in padded.values()], dim=1)
    start, pitch, begin = torch.zeros_like(levels), torch.zeros_like(levels), 0
    for level, p in padded.items():
        here, (height, width) = levels == level, p.shape[-2:]
        start, pitch = torch.where(here, begin, start), torch.where(here, width, pitch)
        begin = begin + height * width
    column, row = cells.unbind(-1)
    image = torch.arange(batch, device=levels.device)[:, None]
    first, step = image * begin + start + row * pitch + column, torch.arange(side, device=levels.device)
    index = first[..., None, None] + pitch[..., None, None] * step[:, None] + step
    found = F.embedding(index.flatten(), table.flatten(0, 1))
    return found.view(batch * count, side, side, -1).permute(0, 3, 1, 2)
