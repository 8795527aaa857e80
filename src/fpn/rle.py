"""Masks as COCO's run-length encoding: how many pixels are 0, then 1, then 0 and so on, column by column.

Compressed, the runs are a text: each is written as its difference from the run before the last, in groups of five bits
from the lowest, each a character from "0" on, with a sixth bit where more groups follow.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor

PIXELS = 2**25  # of masks that are laid out at once: 32 MiB


def encode(masks: Bool[Tensor, "D H W"]) -> list[str]:
    """The compressed runs of each mask, the "counts" of COCO."""
    from faster_coco_eval.core import mask as api

    if not masks.numel():
        return [""] * len(masks)
    columns = masks.permute(0, 2, 1).contiguous().cpu().numpy().view(np.uint8)
    return [text_of(each) for each in api.encode(columns.transpose(2, 1, 0))]  # type: ignore[arg-type]


def encode_pasted(masks: Float[Tensor, "D m m"], boxes: Float[Tensor, "D 4"], size: tuple[int, int]) -> list[str]:
    """The compressed runs of the masks of detections in their image of this (height, width), a few laid out at once."""
    from fpn.model.masks import paste

    step = max(1, PIXELS // max(1, size[0] * size[1]))
    parts = (slice(first, first + step) for first in range(0, len(masks), step))
    return [text for part in parts for text in encode(paste(masks[part], boxes[part], size))]


def text_of(encoded: dict[str, Any]) -> str:
    """The compressed runs of what the evaluator's functions give."""
    counts = encoded["counts"]
    return counts.decode("ascii") if isinstance(counts, bytes) else counts


def runs_of(text: str) -> Int64[np.ndarray, " r"]:
    """The runs of a compressed text. Raises ValueError for one that is none; what they add up to is not looked at."""
    codes = np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8).astype(np.int64) - ord("0")
    if not codes.size or codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        raise ValueError("has characters that are none of RLE, or is cut off")
    ends = np.flatnonzero(codes & 32 == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > 8:  # of five bits: a run of 2**39 pixels
        raise ValueError("has a number that is too large")
    group = np.arange(len(codes)) - np.repeat(starts, lengths)
    runs = np.add.reduceat((codes & 31) << (5 * group), starts)
    runs -= np.where(codes[ends] & 16, np.int64(1) << (5 * lengths), 0)
    for parity in (1, 2):  # the third run, at 2, is the first even one that is written in full
        runs[parity::2] = np.cumsum(runs[parity::2])
    return runs


def runs_of_mask(mask: np.ndarray) -> Int64[np.ndarray, " r"]:
    """The runs of one mask (H, W)."""
    flat = np.asarray(mask, dtype=bool).ravel(order="F")
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    runs = np.diff(np.concatenate([[0], edges, [flat.size]]))
    return np.concatenate([[0], runs]) if flat[:1].any() else runs


def mask_of(runs: np.ndarray, size: tuple[int, int]) -> UInt8[np.ndarray, "H W"]:
    """The mask of runs that add up to height times width."""
    values = (np.arange(len(runs)) & 1).astype(np.uint8)
    return np.repeat(values, np.asarray(runs).astype(np.int64)).reshape(size[1], size[0]).T
