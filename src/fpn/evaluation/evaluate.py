"""A detector on a split -> detections in original pixels -> metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fpn.data import Split, class_agnostic, loader, resize_transform
from fpn.errors import OptionError
from fpn.evaluation.metrics import Metrics, Results, score
from fpn.evaluation.proposals import score_proposals
from fpn.hardware import pick_device, pick_workers
from fpn.model.detector import Detector
from fpn.rle import encode_pasted
from fpn.structures import Batch, Detections

# Image, box, score, label, level.
NOTHING = (np.zeros(0, np.int64), np.zeros((0, 4)), np.zeros(0), np.zeros(0, np.int64), np.zeros(0, np.int64))


def evaluate(
    detector: Detector,
    split: Split,
    *,
    batch: int = 4,
    device: str = "auto",
    workers: int | None = None,
    progress: bool = True,
) -> Metrics:
    """The COCO numbers of a detector on one split, such as `data["val"]`; the AR of one that proposes regions."""
    results = detect_split(detector, split, batch=batch, device=device, workers=workers, progress=progress)
    return score_for(detector, split, results)


def score_for(detector: Detector, split: Split, results: Results) -> Metrics:
    """The numbers that a detector is judged by, of its results on a split."""
    if detector.proposes:
        return score_proposals(split, results)
    return score(split, results, max(100, detector.max_detections))


def detect_split(
    detector: Detector,
    split: Split,
    *,
    batch: int = 4,
    device: str = "auto",
    workers: int | None = None,
    progress: bool = True,
    detect: Callable[[Batch], Detections] | None = None,
) -> Results:
    """All detections on a split, in pixels of the original images.

    Labels are the split's, or 0, of `class_agnostic(split)`, where the detector proposes regions. detect: stands in for
    `detector.detect`. Raises OptionError where detector and data do not have the same class names, or the data has no
    regions for a detector that needs them.
    """
    split = class_agnostic(split) if detector.proposes else split
    check_classes(detector, split)
    check_regions(detector, split)
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
                found = detect_original(detector, images.to(target), detect).to("cpu")
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


def check_regions(detector: Detector, split: Split) -> None:
    if detector.needs_regions and split.regions is None:
        raise OptionError(
            f"{detector.spec.model} looks at given regions, and the split {split.name!r} has none: add another "
            "detector's proposals with --proposals or fpn.data.with_regions(split, file)"
        )


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
        levels = detections.levels[real].numpy()
        parts.append(tuple(column[labels >= 0] for column in (owner, boxes, scores, labels, levels)))
        for row, index in enumerate(indices.tolist() if detections.masks is not None else ()):
            one, (height, width) = detections[row], split.sizes[index].tolist()
            kept = torch.from_numpy(to_split[one.labels.numpy()] >= 0)
            assert one.masks is not None
            masks += encode_pasted(one.masks[kept], one.boxes[kept], (height, width))
    owners, boxes, scores, labels, levels = (np.concatenate(column) for column in zip(*parts, strict=True))
    outlines = masks if detector.has_masks else None
    return Results(np.concatenate(images), owners, boxes, scores, labels, outlines, levels)


def merge(shards: Iterable[Results]) -> Results:
    """The results of several processes as one."""
    shards = list(shards)
    masks = [shard.masks for shard in shards if shard.masks is not None]
    levels = [shard.levels for shard in shards if shard.levels is not None]
    return Results(
        np.concatenate([shard.images for shard in shards]),
        np.concatenate([shard.indices for shard in shards]),
        np.concatenate([shard.boxes for shard in shards]),
        np.concatenate([shard.scores for shard in shards]),
        np.concatenate([shard.labels for shard in shards]),
        [text for part in masks for text in part] if masks else None,
        np.concatenate(levels) if levels else None,
    )
