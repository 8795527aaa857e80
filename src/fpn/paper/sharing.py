"""Features that RPN and Fast R-CNN share, by training in four steps (Ren et al. 2015, section 3.2; paper, Table 5).

1. An RPN learns, from the backbone's pretrained weights.
2. A Fast R-CNN learns on the proposals of step 1, from the same pretrained weights: nothing is shared yet.
3. A new RPN learns on the features of step 2, which stay as they are: `on_features_of(new_rpn, fast)`.
4. The Fast R-CNN learns on, from step 2, on the proposals of step 3, its features fixed: `on_features_of(fast, fast)`.

`joined` makes one Faster R-CNN of steps 3 and 4.
"""

from __future__ import annotations

import copy
from dataclasses import fields, replace
from typing import TypeVar

import torch

from fpn.build import from_spec
from fpn.errors import OptionError
from fpn.model.backbone import OWN
from fpn.model.detector import Detector
from fpn.model.faster_rcnn import FasterRCNN
from fpn.spec import Spec
from fpn.weights.checkpoint import fill

FEATURES = ("backbone", "pyramid")
PIXELS = ("mean", "std", "bgr")
# What the joined detector has of its RPN's spec: these, and all that begins with rpn_ or anchor_.
OF_RPN = ("levels", "extra", "whole_pixels", "floor_stride")

Kind = TypeVar("Kind", bound=Detector)


def on_features_of(detector: Kind, other: Detector) -> Kind:
    """A copy of `detector` with the backbone and pyramid of `other`, which do not learn; only its own layers do.

    Raises OptionError where the two are not built for the same features and the same size of image.
    """
    check_alike(detector, other)
    made = copy.deepcopy(detector)
    for name in FEATURES:
        getattr(made, name).load_state_dict(getattr(other, name).state_dict())
    made.spec = replace(made.spec, settings={**made.spec.settings, "fixed_features": True})
    made.fix_features()
    return made


def joined(rpn: Detector, fast: Detector) -> FasterRCNN:
    """One Faster R-CNN of an RPN and a Fast R-CNN that stand on the same features, computed once for both.

    Raises OptionError for other models, and where the features are not the same.
    """
    if (rpn.spec.model, fast.spec.model) != ("rpn", "fast_rcnn"):
        raise OptionError(f"joined needs an rpn and a fast_rcnn, not {rpn.spec.model} and {fast.spec.model}")
    check_alike(rpn, fast)
    mine, theirs = features_of(rpn), features_of(fast)
    if different := [name for name, value in mine.items() if not torch.equal(value.cpu(), theirs[name].cpu())]:
        raise OptionError(
            f"the features of the two differ in {len(different)} of {len(mine)} tensors, such as {different[0]}: make "
            "both with on_features_of the same detector"
        )
    first = {f.name for f in fields(Spec) if f.name in OF_RPN or f.name.startswith(("rpn_", "anchor_"))}
    spec = replace(
        fast.spec,
        model="faster_rcnn",
        settings={**rpn.spec.settings, **fast.spec.settings, "fixed_features": False},
        **{name: getattr(rpn.spec, name) for name in first},
    )
    own = copy.deepcopy(fast.backbone) if spec.backbone.startswith(OWN) else None
    made = from_spec(spec, module=own)
    assert isinstance(made, FasterRCNN)
    fill(made, {**rpn.state_dict(), **fast.state_dict()}, "the joined detector")
    return made.eval()


def check_alike(one: Detector, other: Detector) -> None:
    """Raises OptionError where the features of one detector cannot be those of the other."""
    mine, theirs = ({name: value.shape for name, value in features_of(d).items()} for d in (one, other))
    if unlike := sorted(name for name in {*mine, *theirs} if mine.get(name) != theirs.get(name)):
        raise OptionError(
            f"the backbones and pyramids of {one.spec.model} and {other.spec.model} differ in {len(unlike)} tensors, "
            f"such as {unlike[0]}: build both with the same options"
        )
    seen = [(d.spec.sides, d.spec.square_side, *(d.spec.settings[name] for name in PIXELS)) for d in (one, other)]
    if seen[0] != seen[1]:
        raise OptionError(
            f"{one.spec.model} and {other.spec.model} take images of different sizes or pixels, so they cannot share "
            "features: build both with the same short, long, square, mean, std and bgr"
        )


def features_of(detector: Detector) -> dict[str, torch.Tensor]:
    """The weights and statistics of backbone and pyramid, by their names in the detector."""
    return {key: value for key, value in detector.state_dict().items() if key.split(".")[0] in FEATURES}
