"""A detector that was exported to one file: what is known of it, and how it is asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fpn.structures import Detections

if TYPE_CHECKING:
    from fpn.spec import Spec


@dataclass(frozen=True)
class Exported:
    """An exported detector, with the names under which `fpn.model.detector.Detector` tells the same.

    kind: "onnx", "openvino" or "torch". find: see `fpn.inference.finder.Finder`. about: what was written into the file
    when it was checked against the detector that it was made from.
    """

    path: Path
    kind: str
    spec: Spec
    find: Callable[[Sequence[Tensor]], list[Detections]]
    score: float
    max_detections: int
    has_masks: bool
    proposes: bool
    about: Mapping[str, Any]

    needs_regions = False

    @property
    def classes(self) -> tuple[str, ...]:
        return self.spec.classes
