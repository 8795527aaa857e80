"""What flows between the parts: Sample -> Batch (with Targets and Regions) -> Detections.

Legend, used in every shape of this library: B images, N ground-truth boxes, A anchors, R regions, D detections,
K classes, H and W height and width in pixels. Boxes are (x1, y1, x2, y2) in float pixels, sizes are (height, width),
labels run from 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Self

import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor
from torch.utils._pytree import register_dataclass

if TYPE_CHECKING:
    import supervision


class _Tensors:
    """Moves every tensor of a dataclass at once; DataLoader and Lightning look for these two names."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        return self._each(lambda value: value.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        return self._each(lambda value: value.pin_memory())

    def _each(self, change) -> Self:
        values = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        return type(self)(**{n: change(v) if isinstance(v, (Tensor, _Tensors)) else v for n, v in values.items()})


@dataclass(frozen=True)
class Sample:
    """One image on its way to the model, with the boxes to be learnt from it (no crowds, no difficult objects)."""

    image: UInt8[Tensor, "3 H W"]
    boxes: Float[Tensor, "N 4"]
    labels: Int64[Tensor, " N"]
    index: int  # position of the image in its split
    original_size: tuple[int, int]  # height, width before any resizing
    key: int | None = None  # decides all chance in training on this sample: the same key, the same examples
    masks: UInt8[Tensor, "N H W"] | None = None  # 1 where the object is; only where outlines are asked for
    regions: Float[Tensor, "R 4"] | None = None  # where objects may be; only where the split has proposals


@dataclass(frozen=True)
class Targets(_Tensors):
    """Ground truth of a batch, padded to the image with the most boxes; `valid` tells boxes from padding."""

    boxes: Float[Tensor, "B N 4"]
    labels: Int64[Tensor, "B N"]
    valid: Bool[Tensor, "B N"]
    masks: UInt8[Tensor, "B N H W"] | None = None  # of the padded images


@dataclass(frozen=True)
class Regions(_Tensors):
    """Given regions of a batch, padded to the image with the most; `valid` tells regions from padding."""

    boxes: Float[Tensor, "B R 4"]
    valid: Bool[Tensor, "B R"]


@dataclass(frozen=True)
class Batch(_Tensors):
    """Images padded at the right and bottom to one size, still uint8: the detector normalises on its own device."""

    images: UInt8[Tensor, "B 3 H W"]
    sizes: Int64[Tensor, "B 2"]  # height, width of each image inside the padding
    original_sizes: Int64[Tensor, "B 2"]  # before resizing
    indices: Int64[Tensor, " B"]  # position of each image in its split
    targets: Targets | None = None
    keys: Int64[Tensor, " B"] | None = None  # of the samples; without them chance is torch's global generator
    regions: Regions | None = None

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class Detections(_Tensors):
    """Detections of a batch, highest score first and padded to D, or of one image, when taken with `detections[i]`.

    `count` says how many of the D are real; in the padding boxes and scores are 0, labels and levels -1. `levels` is
    the pyramid level (2 for P2 ...) that each detection was made from. `classes` are the names the labels stand for.
    `masks`, where the detector has them, are the probabilities that a place in the box is of the object, on a grid of
    m x m cells over the box; `fpn.model.masks.paste` lays them into the image.
    """

    boxes: Float[Tensor, "*B D 4"]
    scores: Float[Tensor, "*B D"]
    labels: Int64[Tensor, "*B D"]
    levels: Int64[Tensor, "*B D"]
    count: Int64[Tensor, "*B"]
    classes: tuple[str, ...] = ()
    masks: Float[Tensor, "*B D m m"] | None = None

    def __len__(self) -> int:
        return self.scores.shape[0]

    def __getitem__(self, image: int) -> Detections:
        """The detections of one image of the batch, without padding."""
        assert self.scores.ndim == 2, "these are the detections of one image already"
        n = int(self.count[image])
        return Detections(
            self.boxes[image, :n],
            self.scores[image, :n],
            self.labels[image, :n],
            self.levels[image, :n],
            self.count[image],
            self.classes,
            None if self.masks is None else self.masks[image, :n],
        )

    @classmethod
    def stack(cls, parts: Sequence[Detections]) -> Detections:
        """The detections of one image each as those of a batch; there must be one at least."""
        longest = max(len(part) for part in parts)

        def padded(name: str, value: float) -> Tensor:
            columns = [getattr(part, name) for part in parts]
            return torch.stack(
                [
                    torch.cat([column, column.new_full((longest - len(column), *column.shape[1:]), value)])
                    for column in columns
                ]
            )

        return cls(
            padded("boxes", 0),
            padded("scores", 0),
            padded("labels", -1),
            padded("levels", -1),
            torch.tensor([len(part) for part in parts]),
            parts[0].classes,
            None if parts[0].masks is None else padded("masks", 0),
        )

    @property
    def names(self) -> list[str]:
        """The class name of each detection of one image."""
        return [self.classes[label] for label in self.labels.tolist()]

    def above(self, threshold: float) -> Detections:
        """The detections of one image that score at least `threshold`."""
        return self.take(self.scores >= threshold)

    def take(self, rows: Tensor) -> Detections:
        """Some of the detections of one image: where a mask is true, or in the order of given rows."""
        scores = self.scores[rows]
        return Detections(
            self.boxes[rows],
            scores,
            self.labels[rows],
            self.levels[rows],
            self.count.new_tensor(len(scores)),
            self.classes,
            None if self.masks is None else self.masks[rows],
        )

    def to_supervision(self, size: tuple[int, int] | None = None) -> supervision.Detections:
        """The detections of one image as `supervision.Detections`, class names under the key "class_name".

        size: height and width of the image that the boxes are in. supervision's masks are of whole images: with this,
        masks become those, true where the probability is at least a half; without it they are left out.
        """
        import numpy as np
        import supervision as sv

        from fpn.model.masks import paste

        masks = None if self.masks is None or size is None else paste(self.masks, self.boxes, size).cpu().numpy()
        return sv.Detections(
            xyxy=self.boxes.cpu().numpy(),
            confidence=self.scores.cpu().numpy(),
            mask=masks,
            class_id=self.labels.cpu().numpy(),
            data={"class_name": np.array(self.names, dtype=object)},
        )


# Known to torch.export and torch.compile as containers of tensors.
for _container in (Targets, Regions, Batch):
    torch.export.register_dataclass(_container)
register_dataclass(
    Detections,
    field_names=["boxes", "scores", "labels", "levels", "count", "masks"],
    drop_field_names=["classes"],
)
