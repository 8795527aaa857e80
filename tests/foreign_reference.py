"""Seeded weights, images and objects on which other libraries' detectors were run, and the comparison with ours.

The scripts in benchmarks/parity run the other library on these and store a sample of what it gives in tests/reference.
"""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fpn.model.detector import Detector
from fpn.model.faster_rcnn import FasterRCNN
from fpn.structures import Batch, Targets

REFERENCE = Path(__file__).parent / "reference"
PADDED, SIZES = (160, 224), [(160, 224), (150, 200)]
BOXES = [[[10.0, 12, 90, 140], [120, 30, 165, 72], [100, 5, 215, 150]], [[20.0, 30, 60, 50]]]
LABELS = [[1, 4, 6], [2]]
CLASSES = 7
EVERY = 2**30  # examples, so that no luck is involved
CANDIDATES = 5000  # of ATSS for its NMS: all there are, as mmdetection chooses them by class score alone

# Outputs that decide: (what the name says, how strong the weights are). Classes must differ, boxes should stay near.
STRENGTHS = (
    (r"anchor_deltas|rpn_reg|bbox_pred|fc_reg|retina_reg|atss_reg", 0.1),
    (r"predictor.*cls_score|fc_cls|objectness|rpn_cls", 3.0),
    (r"", 1.0),
)


def seeded_weights(shapes: Mapping[str, tuple[int, ...]], pixel_std: float) -> dict[str, Tensor]:
    """Lively random weights and running statistics for these names, the same on every machine.

    pixel_std: of the pixels that the first convolution gets.
    """
    state = {}
    for name, shape in shapes.items():
        random = np.random.RandomState(zlib.crc32(name.encode()))
        value = random.random_sample(shape).astype(np.float32)  # from 0 to 1
        if len(shape) > 1:
            strength = next(strength for pattern, strength in STRENGTHS if re.search(pattern, name))
            first = 1 / pixel_std if shape[1] == 3 else 1.0
            value = (value * 2 - 1) * strength * first * math.sqrt(3 / math.prod(shape[1:]))
        elif name.endswith(("running_var", "scale")):
            value = value + 0.5
        elif name.endswith("weight"):  # of a norm
            value = value / 2 + 0.5
        elif name.endswith("num_batches_tracked"):
            value = np.zeros(shape, dtype=np.int64)
        else:
            value = (value - 0.5) / 5
        state[name] = torch.from_numpy(np.asarray(value))
    return state


def batch() -> Batch:
    images = torch.zeros(len(SIZES), 3, *PADDED, dtype=torch.uint8)
    for i, (height, width) in enumerate(SIZES):
        pixels = np.random.RandomState(i).randint(0, 256, (3, height, width), dtype=np.uint8)
        images[i, :, :height, :width] = torch.from_numpy(pixels)
    count = max(len(boxes) for boxes in BOXES)
    boxes, labels = torch.zeros(len(BOXES), count, 4), torch.zeros(len(BOXES), count, dtype=torch.int64)
    for i, (some, kinds) in enumerate(zip(BOXES, LABELS, strict=True)):
        boxes[i, : len(some)], labels[i, : len(some)] = torch.tensor(some), torch.tensor(kinds)
    valid = torch.arange(count) < torch.tensor([len(some) for some in BOXES])[:, None]
    masks = torch.stack([torch.stack([outline(box) for box in some]) for some in boxes])
    shape = torch.tensor(SIZES)
    return Batch(images, shape, shape, torch.arange(len(SIZES)), Targets(boxes, labels, valid, masks))


def outline(box: Tensor) -> Tensor:
    """The ellipse in a box, as a mask of the padded image."""
    y, x = torch.meshgrid(torch.arange(PADDED[0]) + 0.5, torch.arange(PADDED[1]) + 0.5, indexing="ij")
    centre, half = (box[:2] + box[2:]) / 2, ((box[2:] - box[:2]) / 2).clamp(min=1e-3)
    return ((((x - centre[0]) / half[0]) ** 2 + ((y - centre[1]) / half[1]) ** 2) <= 1).to(torch.uint8)


def sampled(values: Tensor, count: int = 48) -> np.ndarray:
    """A few of a map's values, from all over it."""
    flat = values.detach().float().flatten()
    return flat[:: max(1, len(flat) // count)][:count].numpy()


def load(file: Path) -> tuple[dict[str, np.ndarray], dict[str, Tensor]]:
    """What the other library gave, and the weights it had."""
    with np.load(file, allow_pickle=False) as archive:
        reference = dict(archive)
    about = json.loads(str(reference.pop("about")))
    return reference, seeded_weights({name: tuple(shape) for name, shape in about["shapes"]}, about["pixel_std"])


def save(file: Path, reference: Mapping[str, np.ndarray], state: Mapping[str, Tensor], pixel_std: float) -> None:
    file.parent.mkdir(exist_ok=True)
    about = json.dumps({"shapes": [(n, list(v.shape)) for n, v in state.items()], "pixel_std": pixel_std})
    small = {k: v.astype(np.float32) if v.dtype == np.float64 else v for k, v in reference.items()}
    np.savez_compressed(file, allow_pickle=False, about=np.array(about), **small)


def prepared(detector: Detector) -> Detector:
    """The detector with samplers that take every example, in the memory format that the others compute in."""
    detector.to(memory_format=torch.contiguous_format)
    detector.backbone.register_forward_pre_hook(lambda _, images: (images[0].contiguous(),))
    for name, value in (("rpn_examples", EVERY), ("box_examples", EVERY), ("box_positive_fraction", 0.5)):
        if hasattr(detector, name):
            setattr(detector, name, value)
    if detector.spec.model == "atss":
        setattr(detector, "candidates", CANDIDATES)  # noqa: B010
    return detector


def differences(detector: Detector, reference: Mapping[str, np.ndarray]) -> dict[str, float]:
    """How far ours are from the reference: maps and losses relative to their size, boxes to that of the images.

    Proposals and detections count as found where ours has one of the same label whose box and score are within 1e-4.
    """
    given, found, proposals = batch(), {}, None
    with torch.no_grad():
        pyramid, detections, losses = detector.features(given), detector.detect(given), detector.losses(given)
    for level, values in pyramid.items():
        wanted = reference[f"P{level}"]
        found[f"P{level}"] = float(np.abs(sampled(values) - wanted).max() / np.abs(wanted).max())
    if "proposals_0" in reference:
        assert isinstance(detector, FasterRCNN)
        with torch.no_grad():
            anchors = detector.anchors(pyramid, PADDED)
            proposals = detector.propose(detector.rpn(pyramid), anchors, given.sizes, training=False)
    for i in range(len(SIZES)):
        if f"proposals_{i}" in reference:
            assert proposals is not None
            wanted = torch.from_numpy(reference[f"proposals_{i}"])
            found[f"proposals {i}"] = missed(wanted, proposals.boxes[i][proposals.valid[i]], max(PADDED))
        mine = detections[i]
        rows = [torch.from_numpy(reference[f"{part}_{i}"]) for part in ("boxes", "scores", "labels")]
        assert len(mine) == len(rows[0]), f"{len(mine)} detections, not {len(rows[0])}"
        wanted = torch.cat([rows[0] / max(PADDED), rows[1][:, None], rows[2][:, None].float()], 1)
        ours = torch.cat([mine.boxes / max(PADDED), mine.scores[:, None], mine.labels[:, None].float()], 1)
        found[f"detections {i}"] = missed(wanted, ours, 1.0)
        if f"masks_{i}" in reference:
            assert mine.masks is not None
            wanted = reference[f"masks_{i}"]
            found[f"masks {i}"] = float(np.abs(mine.masks[: len(wanted), ::5, ::5].numpy() - wanted).max())
    for name, value in losses.items():
        if f"loss_{name}" not in reference:
            continue
        wanted = float(reference[f"loss_{name}"])
        found[f"loss {name}"] = abs(value.item() - wanted) / max(1.0, abs(wanted))
    return found


def missed(wanted: Tensor, ours: Tensor, unit: float) -> float:
    """The distance of the wanted row that is farthest from the nearest of ours."""
    return float((wanted[:, None] - ours[None]).abs().amax(-1).amin(1).max() / unit)
