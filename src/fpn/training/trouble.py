"""What goes wrong in a step, put into words and files: numbers that are not finite, and memory that runs out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from fpn.data import Split
from fpn.structures import Batch
from fpn.writing import replacing

BAD_BATCH = "bad-batch.safetensors"


def write_batch(batch: Batch, split: Split, values: Mapping[str, float], out: Path) -> Path:
    """The batch as the model saw it, for inspection: pixels, sizes and targets, with its files and losses as metadata.

    Each image is drawn with its boxes beside it, as bad-batch-1.jpg and so on.
    """
    from fpn.drawing import draw

    assert batch.targets is not None
    batch, targets = batch.to("cpu"), batch.targets.to("cpu")
    tensors = {"images": batch.images, "sizes": batch.sizes, **vars(targets)}
    about = {"files": [str(split.path(i)) for i in batch.indices.tolist()], "values": dict(values)}
    path = out / BAD_BATCH
    with replacing(path) as unfinished:
        save_file(
            {name: t.contiguous() for name, t in tensors.items() if t is not None},
            unfinished,
            {"fpn": json.dumps(about)},
        )
    for row, (height, width) in enumerate(batch.sizes.tolist()):
        valid = targets.valid[row]
        boxes, labels = targets.boxes[row, valid], targets.labels[row, valid]
        picture = draw(batch.images[row, :, :height, :width], boxes, labels, None, split.classes)
        with replacing(out / f"bad-batch-{row + 1}.jpg") as unfinished:
            picture.save(unfinished, format="JPEG")
    return path


def not_finite(files: list[str], values: Mapping[str, float], step: int, lr: float, batch: Path) -> str:
    numbers = ", ".join(f"{name} {value:.3g}" for name, value in values.items())
    return (
        f"the loss is not finite at step {step} ({numbers}) on {', '.join(files)}. The batch is in {batch} and beside "
        "it as pictures; last.safetensors holds the last good weights. Look at the boxes, or begin again with a lower "
        f"--lr (now {lr:g}), or dropping such batches with --on-nan skip"
    )


def out_of_memory(batch: int, scales: tuple[int, ...], error: Exception) -> str | None:
    """Words for an error of too little memory; None for any other error."""
    words = ("out of memory", "can't allocate memory", "not enough memory")
    if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and not any(w in str(error) for w in words):
        return None
    return (
        f"out of memory with batches of {batch} images whose shorter side is up to {max(scales)} pixels. "
        f"Two settings help: a smaller --batch (with --accumulate, which keeps the result), or a smaller --short. "
        "--batch auto finds the largest that fits"
    )
