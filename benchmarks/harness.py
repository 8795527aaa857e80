"""What benchmarks share: several sides in turn in one process, their times and how far their results are apart."""

from __future__ import annotations

import datetime
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from torchvision.ops import box_iou
from tqdm import tqdm

from fpn.hardware import processor_name
from fpn.structures import Detections


def alternate(sides: Mapping[str, Callable[[], Any]], repeats: int, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of each side in each turn. They take turns, so that what else the machine does falls on all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    with tqdm(total=(repeats + warmup) * len(sides), leave=False, unit=" runs") as bar:
        for turn in range(repeats + warmup):
            for name, run in sides.items():
                bar.set_description(name)
                wait()
                start = time.perf_counter()
                run()
                wait()
                if turn >= warmup:
                    seconds[name].append(time.perf_counter() - start)
                bar.update()
    return seconds


def alone(work: Callable[..., Any], *arguments: Any) -> Any:
    """What a function gives in a new process that does nothing else, so that its memory is its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def ratios(seconds: Mapping[str, list[float]], peer: str) -> dict[str, list[float]]:
    """How many times as fast as the peer each side was, turn by turn."""
    return {
        name: [theirs / ours for theirs, ours in zip(seconds[peer], own, strict=True)] for name, own in seconds.items()
    }


def spread(values: list[float]) -> tuple[float, float, float]:
    """Median, lower and upper quartile."""
    low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return statistics.median(values), low, high


def shown(values: list[float], digits: int = 2) -> str:
    """The median and, in brackets, the quartiles, for a table."""
    return "{:.{d}f} ({:.{d}f} to {:.{d}f})".format(*spread(values), d=digits)


def apart(ours: Detections, theirs: Detections, iou: float = 0.9) -> str:
    """How far the detections of one image are from the peer's, in words for a table.

    Each of theirs is paired with the one of ours, of its class, that overlaps it most, by `iou` at least. Of the pairs
    the largest differences of a corner in pixels and of a score; and how many of theirs have no pair.
    """
    overlap = box_iou(theirs.boxes, ours.boxes) * (theirs.labels[:, None] == ours.labels[None])
    corner, score, missing = 0.0, 0.0, 0
    for row, ones in enumerate(overlap):
        if not len(ours) or ones.max() < iou:
            missing += 1
            continue
        place = int(ones.argmax())
        overlap[:, place] = 0
        corner = max(corner, float((theirs.boxes[row] - ours.boxes[place]).abs().max()))
        score = max(score, float((theirs.scores[row] - ours.scores[place]).abs()))
    return f"{corner:.3f} px, score {score:.5f}, {missing} of {len(theirs)} missing"


def machine() -> str:
    """What the figures hold for: processor, versions, date."""
    import torchvision

    model = processor_name()
    if torch.cuda.is_available():
        model = f"{torch.cuda.get_device_name()}, {model}"
    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}, Python {platform.python_version()}"
    return f"{model}, {torch.get_num_threads()} threads; {versions}; {datetime.date.today()}"
