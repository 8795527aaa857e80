"""Region features -> the outline of the object in each region (He et al. 2017, Mask R-CNN, section 3)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor, nn

from fpn.errors import OptionError
from fpn.model.losses import number_of
from fpn.model.pyramid import convolution
from fpn.model.sampling import Examples, filled
from fpn.structures import Detections, Targets

# (boxes, which are valid, side) -> the level and the features of each region: `FasterRCNN.pool` of a pyramid.
Pool = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]

ROWS = 100  # detections of each image whose masks are made at once
PIXELS = 2**25  # of ground-truth masks that are held as floats at once: 128 MiB


class MaskHead(nn.Module):
    """3x3 convolutions with ReLU, a 2x2 deconvolution with ReLU, and a 1x1 convolution to one map a class (figure 4).

    norm: "none" (the paper), "batch" (torchvision's v2) or "group", after each 3x3 convolution.
    """

    def __init__(self, inputs: int, classes: int, width: int = 256, convolutions: int = 4, norm: str = "none"):
        super().__init__()
        self.convs = nn.ModuleList(convolution(n, width, 3, norm) for n in [inputs, *[width] * convolutions][:-1])
        self.up = nn.ConvTranspose2d(width, width, 2, 2)
        self.logits = nn.Conv2d(width, classes, 1)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 4:
                nn.init.kaiming_normal_(parameter, mode="fan_out", nonlinearity="relu")
            elif name in ("up.bias", "logits.bias"):
                nn.init.zeros_(parameter)
        nn.init.normal_(self.logits.weight, std=0.001)  # starts at a probability of a half everywhere, as in detectron2

    def forward(self, regions: Float[Tensor, "BR d s s"]) -> Float[Tensor, "BR K m m"]:
        """Logits on a grid twice as fine as that of the features: m = 2 s."""
        x = regions
        for conv in self.convs:
            x = F.relu(conv(x))
        return self.logits(F.relu(self.up(x))).float()


class MaskBranch(nn.Module):
    """What outlines add to a two-stage detector: a loss on its positive regions, and masks of its detections.

    head: pooled features -> logits of every class, see `MaskHead`.
    pooled_size: s, the side of the features that are pooled for it.
    binary: what is learnt is 0 or 1 in each cell of the grid (the paper, detectron2), not the part of the cell that
        the object covers (torchvision).
    half_pixel: the truth is sampled by RoIAlign with half-pixel correction, see `fpn.model.roi.pool_regions`.
    """

    def __init__(self, head: nn.Module, pooled_size: int = 14, binary: bool = True, half_pixel: bool = True):
        super().__init__()
        self.head, self.pooled_size, self.binary, self.half_pixel = head, pooled_size, binary, half_pixel

    def loss(self, pool: Pool, examples: Examples, targets: Targets) -> Float[Tensor, ""]:
        """Unweighted, from the positives, which must stand first among the examples of an image.

        Raises OptionError for targets without masks.
        """
        if targets.masks is None:
            raise OptionError(
                "the data has no outlines for the mask branch to learn from: give every object one (a segmentation in "
                "COCO's format), or train a model without masks"
            )
        boxes, positive = examples.boxes, examples.chosen.positive
        # A norm over the batch must see the positives alone, as it will with detections: they are repeated to fill the
        # rows. An image without any fills them with one region that is none.
        row = filled(positive)
        repeated = boxes.gather(1, row[..., None].expand(-1, -1, 4))
        _, regions = pool(repeated, examples.chosen.valid.gather(1, row), self.pooled_size)
        logits = of_class(self.head(regions), examples.labels)
        wanted = outlines_in(targets.masks, boxes, examples.index, positive, logits.shape[-1], self.half_pixel)
        if self.binary:
            wanted = (wanted >= 0.5).float()
        return mask_loss(logits, wanted, positive, number_of(positive))

    def outline(self, pool: Pool, detections: Detections) -> Detections:
        """The detections with the masks of their classes; 0 in the padding."""
        valid = detections.labels >= 0
        boxes = torch.where(valid[..., None], detections.boxes, 0.0)  # weights that went NaN must not become indices
        count = rows = valid.shape[1]
        # The padding need not be computed, but a GPU would have to be waited for; is_compiling is true in export too.
        if valid.device.type == "cpu" and not torch.compiler.is_compiling():
            rows = max(1, int(detections.count.max()))
        masks = []
        for first in range(0, rows, ROWS):
            some = slice(first, first + ROWS)
            _, regions = pool(boxes[:, some], valid[:, some], self.pooled_size)
            masks.append(of_class(self.head(regions), detections.labels[:, some]).sigmoid())
        made = torch.cat(masks, dim=1)
        made = F.pad(made, (0, 0, 0, 0, 0, count - made.shape[1]))
        return replace(detections, masks=made * valid[..., None, None])


def of_class(maps: Float[Tensor, "BR _K m m"], labels: Int64[Tensor, "B R"]) -> Float[Tensor, "B R m m"]:
    """The map of each region's class; any map where the label names none."""
    kind = labels.flatten().clamp(0, maps.shape[1] - 1)[:, None, None, None].expand(-1, 1, *maps.shape[2:])
    return maps.gather(1, kind)[:, 0].unflatten(0, labels.shape)


def mask_loss(
    logits: Float[Tensor, "B S m m"],
    wanted: Float[Tensor, "B S m m"],
    positive: Bool[Tensor, "B S"],
    count: Float[Tensor, ""],
) -> Float[Tensor, ""]:
    """Binary cross-entropy, the mean over the cells of a mask, of the positives (section 3); `count` of them."""
    loss = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none").mean((-2, -1))
    return loss.masked_fill(~positive, 0.0).sum() / count


@torch.no_grad()
def outlines_in(
    masks: UInt8[Tensor, "B N H W"],
    boxes: Float[Tensor, "B S 4"],
    index: Int64[Tensor, "B S"],
    positive: Bool[Tensor, "B S"],
    size: int,
    half_pixel: bool,
) -> Float[Tensor, "B S m m"]:
    """How much of each cell of a size x size grid over a box the mask in row `index` covers; 0 where not positive.

    RoIAlign with as many points a cell as the cell has pixels, or more. The masks become floats a few at a time, which
    is what bounds the memory: each time all boxes of other masks shrink to nothing.
    """
    from torchvision.ops import roi_align

    flat = masks.flatten(0, 1)
    own = (index.clamp(min=0) + torch.arange(len(masks), device=masks.device)[:, None] * masks.shape[1]).flatten()
    own = torch.where(positive.flatten(), own, -1)
    found = boxes.new_zeros((len(own), size, size))
    step = max(1, PIXELS // (masks.shape[2] * masks.shape[3]))
    for first in range(0, len(flat), step):
        some = flat[first : first + step, None].to(boxes.dtype)
        here = (own >= first) & (own < first + len(some))
        rois = torch.cat([(own - first)[:, None].to(boxes.dtype), boxes.flatten(0, 1)], dim=1) * here[:, None]
        found += roi_align(some, rois, size, sampling_ratio=-1, aligned=half_pixel)[:, 0] * here[:, None, None]
    return found.unflatten(0, boxes.shape[:2])
