"""A detector on a split -> detections in original pixels -> metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from fpn.data import DetectionDataset, GroupedBatches, Split, class_agnostic, loader, resize_transform
from fpn.errors import OptionError
from fpn.evaluation.metrics import Metrics, Results, score
from fpn.evaluation.proposals import score_proposals
from fpn.exported import Exported
from fpn.hardware import pick_device, pick_workers
from fpn.inference.finder import Finder, detect_original, finder
from fpn.model.detector import Detector
from fpn.rle import encode_pasted
from fpn.structures import Batch, Detections, Sample

# Image, box, score, label, level.
NOTHING = (np.zeros(0, np.int64), np.zeros((0, 4)), np.zeros(0), np.zeros(0, np.int64), np.zeros(0, np.int64))


def evaluate(
    detector: Detector | Exported,
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


def score_for(detector: Detector | Exported, split: Split, results: Results) -> Metrics:
    """The numbers that a detector is judged by, of its results on a split."""
    if detector.proposes:
        return score_proposals(split, results)
    return score(split, results, max(100, detector.max_detections))


def detect_split(
    detector: Detector | Exported,
    split: Split,
    *,
    batch: int = 4,
    device: str = "auto",
    workers: int | None = None,
    progress: bool = True,
    detect: Callable[[Batch], Detections] | None = None,
    find: Finder | None = None,
) -> Results:
    """All detections on a split, in pixels of the original images.

    Labels are the split's, or 0, of `class_agnostic(split)`, where the detector proposes regions. detect: stands in for
    `detector.detect` on whole images. find: stands in for the whole, from images of any size on. Raises OptionError
    where detector and data do not have the same class names, the data has no regions for a detector that needs them, or
    `detect` would not be asked.
    """
    split = class_agnostic(split) if detector.proposes else split
    check_classes(detector, split)
    check_regions(detector, split)
    if isinstance(detector, Exported) or find is not None or detector.spec.tile:
        if detect is not None:
            raise OptionError("detect stands in on whole images: not with a finder, tiles or an exported file")
        batches = found_in(split, find or finder(detector, device, progress=False), batch, pick_workers(workers))
    else:
        batches = detected_in(split, detector, detect, batch, pick_device(device), pick_workers(workers))
    bar = tqdm(total=len(split), desc=f"detecting in {split.name}", unit=" images", disable=not progress, leave=False)
    with bar, torch.inference_mode():
        shards = [collect([], detector, split)]
        for indices, found in batches:
            shards.append(collect([(indices, found)], detector, split))
            bar.update(len(indices))
        return merge(shards)


def detected_in(
    split: Split,
    detector: Detector,
    detect: Callable[[Batch], Detections] | None,
    batch: int,
    device: torch.device,
    workers: int,
) -> Iterator[tuple[Tensor, Detections]]:
    """The positions of the images of each batch and their detections, the images resized by the loading processes."""
    resizing = resize_transform(*detector.spec.sides)
    batches = loader(split, resizing, batch, training=False, workers=workers, square=detector.spec.square_side)
    detector.eval().to(device)
    for images in batches:
        if images is not None:
            yield images.indices, detect_original(detector, images.to(device), detect).to("cpu")


def found_in(split: Split, find: Finder, batch: int, workers: int) -> Iterator[tuple[Tensor, Detections]]:
    """The same of a finder, which is given the images as they are."""
    order = GroupedBatches(split, batch, shuffle=False)
    for samples in DataLoader(DetectionDataset(split), batch_sampler=order, num_workers=workers, collate_fn=readable):
        if samples:
            found = Detections.stack(find([sample.image for sample in samples]))
            yield torch.tensor([sample.index for sample in samples]), found


def readable(samples: list[Sample | None]) -> list[Sample]:
    return [sample for sample in samples if sample is not None]


def check_classes(detector: Detector | Exported, split: Split) -> None:
    missing = [name for name in split.classes if name not in detector.classes]
    if missing:
        raise OptionError(
            f"the data's classes {', '.join(split.classes)} are not the detector's, {', '.join(detector.classes)}: "
            f"it does not know {', '.join(missing)}"
        )


def check_regions(detector: Detector | Exported, split: Split) -> None:
    if detector.needs_regions and split.regions is None:
        raise OptionError(
            f"{detector.spec.model} looks at given regions, and the split {split.name!r} has none: add another "
            "detector's proposals with --proposals or fpn.data.with_regions(split, file)"
        )


def collect(found: Iterable[tuple[Tensor, Detections]], detector: Detector | Exported, split: Split) -> Results:
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
