"""One backend on a detector: how soon it is ready, its time an image beside eager's, its memory, its AP."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from fpn.backends.choose import ready
from fpn.backends.file import as_file
from fpn.data import Split, read_image
from fpn.errors import ImageError
from fpn.evaluation.evaluate import detect_split, score_for
from fpn.exported import Exported
from fpn.exporting.compare import counterparts
from fpn.exporting.scenes import scene
from fpn.exporting.whole import reason
from fpn.inference.finder import Finder, finder
from fpn.inference.tiles import accept_large_pictures
from fpn.memory import most
from fpn.model.detector import Detector
from fpn.structures import Detections
from fpn.weights.checkpoint import load_detector

CALIBRATION = 300  # images of the training split, at most, to fit the steps of int8 to
SHOWN = 8  # images of the data that are timed


@dataclass(frozen=True)
class Task:
    """What is measured: a checkpoint, the backend, the data if there are some, and how often.

    size: (height, width) of a generated image where there are no data. split: what AP is of; train: what int8 is fitted
    to. batch: images at a time.
    """

    checkpoint: Path | str
    backend: str
    precision: str
    device: str
    split: Split | None = None
    train: Split | None = None
    size: tuple[int, int] = (800, 1216)
    batch: int = 1
    repeats: int = 5


@dataclass(frozen=True)
class Row:
    """What was measured; `error` in words where nothing could be. Times are in seconds, memory in MiB."""

    backend: str
    precision: str
    ready: float = 0.0  # until the backend has detected in the first image of every size
    seconds: list[float] = field(default_factory=list)  # an image, of each turn
    ratios: list[float] = field(default_factory=list)  # times as fast as eager in the same turn
    memory: float | None = None  # most at once while detecting, where the system tells it
    compared: int = 0  # boxes of eager
    again: int = 0  # those of them that this backend finds too
    apart: float = 0.0  # pixels between these, at most
    AP: float | None = None
    measure: str = "AP"  # what `AP` is: of masks "mask_AP", of proposals "AR1000"
    error: str = ""

    @property
    def name(self) -> str:
        return f"{self.backend} {self.precision}"

    @property
    def median(self) -> float:
        """Seconds an image."""
        return statistics.median(self.seconds)

    @property
    def times(self) -> float:
        """How many times as fast as eager: unlike seconds, the same whatever else the machine did meanwhile."""
        return statistics.median(self.ratios)


def measure(task: Task) -> Row:
    """Everything about one backend, in a process that has done nothing else, so that its memory is its own."""
    try:
        return measured(task)
    except Exception as error:  # whatever a compiler or a runtime raises must not cost the other backends their rows
        return Row(task.backend, task.precision, error=reason(error))


def measured(task: Task) -> Row:
    start = time.perf_counter()
    detector = load_detector(task.checkpoint, task.device)
    waited = time.perf_counter() - start
    if detector.spec.tile:
        accept_large_pictures()
    images = pictures(task)
    batch = [images[place % len(images)] for place in range(max(task.batch, len(images)))]
    calls = [batch[start : start + task.batch] for start in range(0, len(batch), task.batch)]
    start = time.perf_counter()
    fast = made(task, detector)
    find = finder(fast, "auto" if isinstance(fast, Exported) else task.device, progress=False)
    found = asked(find, calls)
    waited += time.perf_counter() - start
    del detector
    memory = most(lambda: asked(find, calls), torch.device("cpu" if isinstance(fast, Exported) else task.device))
    eager = finder(load_detector(task.checkpoint, task.device), task.device, progress=False)
    expected = asked(eager, calls)
    own, ratios = [], []
    for _ in range(task.repeats):  # in turn, so that what else the machine does falls on both
        theirs, ours = (timed(one, calls) for one in (eager, find))
        own.append(ours / sum(map(len, calls)))
        ratios.append(theirs / ours)
    row = Row(task.backend, task.precision, waited, own, ratios, memory, *agreement(expected, found))
    if task.split is None:
        return row
    results = detect_split(fast, task.split, batch=task.batch, device=task.device, progress=False)
    metrics = score_for(fast, task.split, results)
    return replace(row, AP=metrics.with_masks()[metrics.main], measure=metrics.main)


def pictures(task: Task) -> list[Tensor]:
    """Images of the data, evenly spaced, or where there are none a generated one."""
    if task.split is None:
        return [scene(task.size, seed=0)]
    return readable(task.split.evenly(SHOWN)) or [scene(task.size, seed=0)]


def readable(split: Split) -> list[Tensor]:
    """The pixels of its images, but for those that cannot be read."""
    images = []
    for place in range(len(split)):
        try:
            images.append(read_image(split.path(place)))
        except ImageError:  # `fpn data check` names it
            continue
    return images


def made(task: Task, detector: Detector) -> Detector | Exported:
    """The backend, ready to detect; one of 8 bits fitted to images of the training split."""
    if task.precision != "int8":
        return ready(detector, task.backend, task.precision)
    assert task.train is not None
    return as_file(detector, task.backend, "int8", readable(task.train.evenly(CALIBRATION)))


def asked(find: Finder, calls: Sequence[Sequence[Tensor]]) -> list[Detections]:
    return [found for call in calls for found in find(call)]


def timed(find: Finder, calls: Sequence[Sequence[Tensor]]) -> float:
    """Seconds; finders give results on the CPU, so that a GPU is done when they are."""
    start = time.perf_counter()
    asked(find, calls)
    return time.perf_counter() - start


def agreement(expected: Sequence[Detections], found: Sequence[Detections]) -> tuple[int, int, float]:
    """How many boxes were to be found, how many of them were, and how far apart any side of these is, in pixels."""
    again, apart = 0, 0.0
    for a, b in zip(expected, found, strict=True):
        pairs = counterparts(a, b)
        both = pairs >= 0
        again += int(both.sum())
        apart = max(apart, float((a.boxes[both] - b.boxes[pairs[both]]).abs().max()) if both.any() else 0.0)
    return sum(map(len, expected)), again, apart
