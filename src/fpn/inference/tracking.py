"""Objects followed from frame to frame: ByteTrack (Zhang et al. 2022, arXiv 2110.06864), of the package trackers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fpn.errors import OptionError
from fpn.structures import Detections

LOW = 0.1  # lowest score with which an object that is followed is still believed; the paper's


class Tracks:
    """Gives every object a number, frame by frame. Each class is followed by itself, so a number has one class.

    threshold: the lowest score with which an object is followed from then on. frame_rate: frames a second; an object
    that is not seen for one second is given up. Raises OptionError where the package is not installed.
    """

    def __init__(self, threshold: float, frame_rate: float):
        try:
            from trackers import ByteTrackTracker
        except ImportError as error:
            raise OptionError("tracking needs trackers: pip install 'fpn[track]'") from error
        self._new = lambda: ByteTrackTracker(
            frame_rate=frame_rate, track_activation_threshold=threshold, high_conf_det_threshold=threshold
        )
        self.threshold = threshold
        self._of_class: dict[int, Any] = {}
        self._numbers: dict[tuple[int, int], int] = {}

    @property
    def count(self) -> int:
        """How many objects have a number so far."""
        return len(self._numbers)

    def follow(self, found: Detections) -> tuple[Detections, list[int | None]]:
        """What is shown of the next frame's detections, all of them, and the number of each: 1, 2, ..

        Shown is what scores `threshold`, and with a lower score, of `LOW` at least, what is followed already. An object
        gets its number in the second frame in a row; before, it has None.
        """
        found = found.above(min(LOW, self.threshold))
        labels = found.labels.numpy()
        numbers: list[int | None] = [None] * len(found)
        for label in sorted({*self._of_class, *labels.tolist()}):  # those not in this frame have to get older
            for row, track in self._matched(label, found, np.flatnonzero(labels == label)):
                numbers[row] = self._numbers.setdefault((label, track), len(self._numbers) + 1)
        followed = torch.tensor([number is not None for number in numbers], dtype=torch.bool)
        keep = followed | (found.scores >= self.threshold)
        masks = None if found.masks is None else found.masks[keep]
        shown = Detections(
            found.boxes[keep],
            found.scores[keep],
            found.labels[keep],
            found.levels[keep],
            keep.sum(),
            found.classes,
            masks,
        )
        return shown, [number for number, kept in zip(numbers, keep.tolist(), strict=True) if kept]

    def _matched(self, label: int, found: Detections, rows: np.ndarray) -> list[tuple[int, int]]:
        """The rows of a class that are followed, each with the number that the class's own tracker has for it."""
        import supervision as sv

        if label not in self._of_class:
            self._of_class[label] = self._new()
        tracker = self._of_class[label]
        given = sv.Detections(
            xyxy=found.boxes.numpy()[rows], confidence=found.scores.numpy()[rows], data={"row": rows.copy()}
        )
        known = tracker.update(given)
        if not len(known) or known.tracker_id is None:
            return []
        pairs = zip(known.data["row"].tolist(), known.tracker_id.tolist(), strict=True)
        return [(row, track) for row, track in pairs if track >= 0]
