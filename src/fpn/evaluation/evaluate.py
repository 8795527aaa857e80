"""A detector on a split -> detections in original pixels -> metrics."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fpn.data import Split, loader, resize_transform
from fpn.errors import OptionError
from fpn.evaluation.metrics import Metrics, Results, score
from fpn.hardware import pick_device, pick_workers
from fpn.model.detector import Detector
from fpn.rle import encode_pasted
from fpn.structures import Batch, Detections

NOTHING = (np.zeros(0, np.int64), np.zeros((0, 4)), np.zeros(0), np.zeros(0, np.int64))  # image, box, score, label


def evaluate(
    detector: Detector,
    split: Split,
    *,
    batch: int = 4,
    device: str = "auto",
    workers: int | None = None,
    progress: bool = True,
) -> Metrics:
    """The COCO numbers of a detector on one split, such as `data["val"]`."""
    results = detect_split(detector, split, batch=batch, device=device, workers=workers, progress=progress)
    return score(split, results, max(100, detector.max_detections))


def detect_split(
    detector: Detector,
    split: Split,
    *,
    batch: int = 4,
    device: str = "auto",
    workers: int | None = None,
    progress: bool = True,
) -> Results:
    """All detections on a split, in pixels of the original images; labels are the split's.

    Raises OptionError where detector and data do not have the same class names.
    """
    check_classes(detector, split)
    target = pick_device(device)
    batches = loader(
        split,
        resize_transform(*detector.spec.sides),
        batch,
        training=False,
        workers=pick_workers(workers),
        square=detector.spec.square_side,
    )
    bar = tqdm(total=len(split), desc=f"detecting in {split.name}", unit=" images", disable=not progress, leave=False)
    detector.eval().to(target)
    with bar, torch.inference_mode():
        shards = [collect([], detector, split)]
        for images in batches:
            if images is not None:
                found = detect_original(detector, images.to(target)).to("cpu")
                shards.append(collect([(images.indices, found)], detector, split))
                bar.update(len(images))
        return merge(shards)


def check_classes(detector: Detector, split: Split) -> None:
    missing = [name for name in split.classes if name not in detector.classes]
    if missing:
        raise OptionError(
            f"the data's classes {', '.join(split.classes)} are not the detector's, {', '.join(detector.classes)}: "
            f"it does not know {', '.join(missing)}"
        )


def detect_original(detector: Detector, batch: Batch) -> Detections:
    """`detector.detect`, with the boxes in pixels of the images as they were before resizing."""
    found = detector.detect(batch)
    sizes = batch.original_sizes.to(found.boxes.dtype)
    scale = (sizes / batch.sizes)[:, None, [1, 0, 1, 0]]
    return replace(found, boxes=torch.minimum(found.boxes * scale, sizes[:, None, [1, 0, 1, 0]]))


def collect(found: Iterable[tuple[Tensor, Detections]], detector: Detector, split: Split) -> Results:
    """The detections of many batches, each with the positions (B,) of its images, on the CPU, in flat arrays.

    Classes that the split does not have are left out. Masks are laid into images of the annotated size and encoded.
    """
    images: list[np.ndarray] = [np.zeros(0, np.int64)]
    parts: list[tuple[np.ndarray, ...]] = [NOTHING]
    masks: list[str] = []
    to_split = np.array([split.classes.index(c) if c in split.classes else -1 for c in detector.classes])
    for indices, detections in found:
        images.append(indices.numpy())
        real = torch.arange(detections.scores.shape[1]) < detections.count[:, None]
        labels = to_split[detections.labels[real].numpy()]
        owner = indices[:, None].expand_as(real)[real].numpy()
        boxes, scores = detections.boxes[real].double().numpy(), detections.scores[real].double().numpy()
        parts.append(tuple(column[labels >= 0] for column in (owner, boxes, scores, labels)))
        for row, index in enumerate(indices.tolist() if detections.masks is not None else ()):
            one, (height, width) = detections[row], split.sizes[index].tolist()
            kept = torch.from_numpy(to_split[one.labels.numpy()] >= 0)
            assert one.masks is not None
            masks += encode_pasted(one.masks[kept], one.boxes[kept], (height, width))
    owners, boxes, scores, labels = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Results(np.concatenate(images), owners, boxes, scores, labels, masks if detector.has_masks else None)


def merge(shards: Iterable[Results]) -> Results:
    """The results of several processes as one."""
    shards = list(shards)
    masks = [shard.masks for shard in shards if shard.masks is not None]
    return Results(
        np.concatenate([shard.images for shard in shards]),
        np.concatenate([shard.indices for shard in shards]),
        np.concatenate([shard.boxes for shard in shards]),
        np.concatenate([shard.scores for shard in shards]),
        np.concatenate([shard.labels for shard in shards]),
        [text for part in masks for text in part] if masks else None,
    )
