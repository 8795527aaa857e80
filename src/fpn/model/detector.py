"""What every detector has: pixels in, losses or detections out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Self

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn

from fpn.model.anchors import Anchors
from fpn.structures import Batch, Detections

if TYPE_CHECKING:
    from fpn.spec import Spec

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Detector(nn.Module):
    """A backbone, a pyramid and the class names; what comes after them makes the detector.

    backbone: images -> {level: map}, with the channels of each level in `channels`.
    pyramid: such a dictionary -> {level: map} for its `levels`, each of `width` channels. Level k has stride 2**k.
    mean, std: of the pixels the backbone was trained on, red, green, blue, from 0 to 1; bgr: it wants blue first.
    fixed_features: backbone and pyramid do not learn, and their norms keep their statistics.
    """

    spec: Spec  # set by `fpn.build`
    mean: Tensor
    std: Tensor
    anchors: Anchors | None = None  # where it has some
    score: float  # lowest score of a detection
    max_detections: int  # boxes an image, of all classes
    loss_weights: Mapping[str, float]  # every term of `losses`, and what it counts in training
    has_masks: bool = False  # learns from outlines, and gives a mask with each detection
    proposes: bool = False  # gives regions that may hold an object, of whatever class; its only class is "object"
    needs_regions: bool = False  # looks at given regions, `Batch.regions`
    backend: str = "eager"  # what runs it, see `fpn.backends.choose.ready`
    precision: str = "fp32"  # in which it detects

    def __init__(
        self,
        backbone: nn.Module,
        pyramid: nn.Module,
        classes: tuple[str, ...],
        *,
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
        bgr: bool = False,
        fixed_features: bool = False,
    ):
        super().__init__()
        self.levels: tuple[int, ...] = tuple(pyramid.levels)  # pyright: ignore[reportArgumentType]
        self.backbone, self.pyramid, self.classes, self.bgr = backbone, pyramid, tuple(classes), bgr
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1) * 255, persistent=False)
        self.fixed_features = fixed_features
        if fixed_features:
            self.fix_features()

    def fix_features(self) -> None:
        """From now on backbone and pyramid do not learn."""
        self.fixed_features = True
        self.backbone.requires_grad_(False)
        self.pyramid.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if self.fixed_features:
            self.backbone.eval()
            self.pyramid.eval()
        return self

    def losses(self, batch: Batch) -> dict[str, Float[Tensor, ""]]:
        """The unweighted loss terms by name; the batch must have targets."""
        raise NotImplementedError

    def detect(self, batch: Batch) -> Detections:
        """Detections in the pixels of the batch's (resized) images."""
        raise NotImplementedError

    def forward(self, batch: Batch) -> Detections:
        """`detect`, under the name that torch.export and hooks call."""
        return self.detect(batch)

    def features(self, batch: Batch) -> dict[int, Float[Tensor, "B d _ _"]]:
        """The pyramid of a batch: {2: P2, ...}."""
        pixels = self.normalise(batch.images, batch.sizes)
        weights = next(self.backbone.parameters(), pixels)  # of a detector made to detect in bfloat16 these are so
        return self.pyramid(self.backbone(pixels.to(weights.dtype)))

    def normalise(self, images: UInt8[Tensor, "B 3 H W"], sizes: Int64[Tensor, "B 2"]) -> Float[Tensor, "B 3 H W"]:
        """Pixels with the mean and deviation of the backbone's training data; exactly 0 in the padding."""
        pixels = (images.contiguous() - self.mean) / self.std  # batches come with channels last in memory
        row = torch.arange(images.shape[2], device=images.device)[:, None]
        column = torch.arange(images.shape[3], device=images.device)
        inside = (row < sizes[:, 0, None, None]) & (column < sizes[:, 1, None, None])
        pixels = pixels * inside[:, None]
        return pixels.flip(1) if self.bgr else pixels


def chance_of(batch: Batch) -> Int64[Tensor, " B"]:
    """The keys that decide chance in the losses of each image; from torch's global generator where it has none."""
    if batch.keys is not None:
        return batch.keys
    return torch.randint(2**62, batch.indices.shape, device=batch.indices.device)
