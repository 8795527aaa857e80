"""A trained detector -> one for other classes, with all the weights that still fit."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from fpn.backends.names import check_whole
from fpn.build import from_spec
from fpn.errors import CheckpointError
from fpn.model.backbone import OWN
from fpn.model.detector import Detector
from fpn.spec import Spec, as_tuple

# How images are read and which part learns may differ from the source; all else belongs to the weights.
FREE = ("short", "long", "square", "tile", "overlap", "freeze")


@dataclass(frozen=True)
class FineTuned:
    """The new detector, how many of its tensors came from the source, and the names of those that start anew."""

    detector: Detector
    kept: int
    replaced: list[str]

    def __str__(self) -> str:
        if not self.replaced:
            return f"all {self.kept} tensors kept"
        parts = sorted({name.rsplit(".", 1)[0] for name in self.replaced})
        return (
            f"{self.kept} tensors kept, these start anew for {len(self.detector.classes)} classes: {', '.join(parts)}"
        )


def adapt(source: Detector, classes: Sequence[str], **options: Any) -> FineTuned:
    """A detector for `classes` with the weights of `source`; only layers with outputs by class are made anew.

    Where the classes are the source's, in its order, these are kept too. options: `short`, `long`, `square`, `tile`,
    `overlap`, `freeze`, or settings of the detector's class, such as `max_detections`. Raises CheckpointError for any
    other option that is not the source's own, and for a setting that other layers would belong to, such as another
    `pooled_size`.
    """
    check_whole(source)
    own = {field.name for field in fields(Spec)} - {"settings"}
    given = {name: as_tuple(value) for name, value in options.items()}
    other = [name for name in given.keys() & own - {*FREE} if given[name] != getattr(source.spec, name)]
    if other:
        theirs = ", ".join(f"{name} {getattr(source.spec, name)}" for name in sorted(other))
        raise CheckpointError(
            f"the weights are those of a detector with {theirs}: leave out {', '.join(sorted(other))}"
        )
    settings = {**source.spec.settings, **{name: value for name, value in given.items() if name not in own}}
    changed = {name: value for name, value in given.items() if name in FREE}
    if "short" in changed and "long" not in changed:
        changed["long"] = None  # it follows the shorter side
    names = source.classes if source.proposes else tuple(classes)  # one that proposes regions knows no classes
    spec = replace(source.spec, classes=names, settings=settings, **changed)
    own_module = copy.deepcopy(source.backbone) if spec.backbone.startswith(OWN) else None
    if own_module is not None and "freeze" in changed:
        own_module.requires_grad_(True)  # what the source has frozen is not frozen here
    return fill_fitting(from_spec(spec, module=own_module), source.state_dict(), names == source.classes)


def fill_fitting(detector: Detector, state: Mapping[str, torch.Tensor], same_classes: bool) -> FineTuned:
    """Load what fits into a new detector.

    A layer by class is known by its size, which follows the number of classes. With as many other classes as before all
    sizes agree; so the sizes with one class more are asked for too.
    """
    wanted, by_class = detector.state_dict(), set()
    if not same_classes:
        new = "+".join(detector.classes) + "+"  # longer than any of them, so none of them
        larger = replace(detector.spec, classes=(*detector.classes, new))
        own_module = detector.backbone if larger.backbone.startswith(OWN) else None
        more = from_spec(larger, module=own_module).state_dict()
        by_class = {name for name, value in wanted.items() if more[name].shape != value.shape}
    kept = {name: state.get(name) for name in wanted if name not in by_class}
    if other := [name for name, value in kept.items() if value is None or value.shape != wanted[name].shape]:
        raise CheckpointError(
            f"the options make {', '.join(other[:3])} of another shape than the weights have: leave out those that are "
            "not the source's own, such as pooled_size"
        )
    detector.load_state_dict({**wanted, **kept})
    return FineTuned(detector, len(kept), [name for name in wanted if name in by_class])
