"""What each level of the pyramid does on a split: how much it is given, and what it makes of it.

Every object belongs to one level, so that the numbers of the levels add up to those of all:

- An object was *handled* by the level whose detection found it, however low its score. One that nobody found was
  handled by the level it is assigned to: by Eq. 1 of the paper where regions are pooled, else by the model's own rule
  for its anchors or places. (At IoUs above 0.5 an object that is not found any more stays with the level that found it
  at 0.5.)
- *Found* are the objects whose detection scores at least the threshold, *missed* the others that were handled; *false*
  are the level's detections from the threshold up that found nothing. All this at IoU 0.5 and within the class.
- AP and AR are COCO's, of the handled objects and the level's own detections. Those of all levels together are COCO's
  of the split.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor

from fpn.data.dataset import Split, class_agnostic
from fpn.data.fit import MULTIPLE
from fpn.errors import OptionError
from fpn.evaluation.matches import IOUS, Matches, average_precision, best_first, matches
from fpn.evaluation.metrics import Results
from fpn.inference.finder import check_threshold
from fpn.model import atss, fcos
from fpn.model.atss import ATSS
from fpn.model.backbone import SPLIT_MOBILENET
from fpn.model.detector import Detector
from fpn.model.fast_rcnn import FastRCNN
from fpn.model.fcos import FCOS
from fpn.model.matching import BACKGROUND, match
from fpn.model.region_proposals import RPN
from fpn.model.retinanet import RetinaNet
from fpn.model.roi import assign_levels
from fpn.model.rpn import Proposals
from fpn.structures import Batch, Detections

NOWHERE, ALL = 0, -1  # in place of a level: of objects that no level has, and for all levels together
THRESHOLD = 0.5  # lowest score of a detection that counts as found or false

# The numbers of a level and their headings.
GIVEN = {
    "by_region": "objects by Eq. 1",
    "by_anchor": "by anchors",
    "anchors": "anchors/image",
    "matched": "matched",
    "proposals": "proposals/image",
    "regions": "regions/image",
}
MADE = {
    "objects": "handled",
    "side": "side px",
    "found": "found",
    "missed": "missed",
    "false": "false",
    "AP": "AP",
    "AR": "AR",
}


@dataclass(frozen=True)
class Level:
    """The numbers of one level, or of all; None where the model has no such thing.

    by_region: objects by Eq. 1. by_anchor: objects by the level that most of their anchors (or places) are on. anchors,
    matched: anchors on all images, and those that are positive examples. proposals: of the RPN, by the level of their
    anchors. regions: pooled in detection (in a cascade: by its first stage). objects: handled, as the module says,
    of them found and missed; false detections. AP, AR: -1 without objects. side: the median of the handled objects'
    sides (square roots of their areas) in pixels of the resized images.
    """

    by_region: int | None
    by_anchor: int | None
    anchors: int | None
    matched: int | None
    proposals: int | None
    regions: int | None
    objects: int
    found: int
    missed: int
    false: int
    AP: float
    AR: float
    side: float | None


@dataclass(frozen=True)
class PyramidReport:
    """`levels` by number, with NOWHERE for objects that no level has, where there are any; `all` of them together."""

    levels: dict[int, Level]
    all: Level
    images: int
    threshold: float
    advice: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        rows = {name_of(level): asdict(row) for level, row in self.levels.items()}
        about = {"images": self.images, "threshold": self.threshold, "iou": 0.5}
        return {**about, "levels": rows, "all": asdict(self.all), "advice": self.advice}

    def table(self) -> str:
        """For a terminal: what each level is given, then what it makes of it."""
        return "\n\n".join(_aligned(*columns(self, kinds)) for kinds in (GIVEN, MADE))


def name_of(level: int) -> str:
    """How a level is called: P2 and so on."""
    return "none" if level == NOWHERE else f"P{level}"


def columns(report: PyramidReport, kinds: Mapping[str, str]) -> tuple[list[str], list[list[str]]]:
    """The headings and rows of some of the numbers (GIVEN, MADE), without those that the model has not."""
    kinds = {name: head for name, head in kinds.items() if getattr(report.all, name) is not None}
    rows = [*((name_of(level), row) for level, row in report.levels.items()), ("all", report.all)]
    images = max(1, report.images)
    return ["level", *kinds.values()], [
        [name, *(_cell(kind, head, getattr(row, kind), images) for kind, head in kinds.items())] for name, row in rows
    ]


def _aligned(heads: list[str], rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    first = [line[0].ljust(widths[0]) for line in (heads, *rows)]
    rest = [[c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True)] for line in (heads, *rows)]
    return "\n".join("  ".join([one, *others]).rstrip() for one, others in zip(first, rest, strict=True))


def _cell(kind: str, head: str, value: float | None, images: int) -> str:
    if value is None or value < 0:
        return "-"
    if kind in ("AP", "AR"):
        return f"{value:.3f}"
    if head.endswith("/image"):
        value = value / images
        return f"{value:,.0f}" if value >= 10 or value == round(value) else f"{value:.1f}"
    return f"{value:,.0f}"


class Watch:
    """Stands in for `Detector.detect` in a pass over a split, and notes what each level has to do on the way.

    by_region, by_anchor: the level of each of the split's M objects, NOWHERE where it has none, or its image was not
    seen. sides: of the objects, resized. Raises OptionError for a model whose rules are not known here.
    """

    def __init__(self, detector: Detector, split: Split):
        if not isinstance(detector, FastRCNN | RPN | RetinaNet | FCOS | ATSS):
            raise OptionError(
                f"there is no pyramid report of {detector.spec.model}: it is for detectors of boxes by one or two "
                "stages and for the RPN"
            )
        if detector.spec.backbone == SPLIT_MOBILENET:
            raise OptionError(f"there is no pyramid report on {SPLIT_MOBILENET}: its P6 has the stride of P5")
        self.detector, self.split = detector, split
        self.anchors, self.matched, self.proposals, self.regions = (Counter[int]() for _ in range(4))
        self.by_region, self.by_anchor = (np.full(len(split.boxes), NOWHERE) for _ in range(2))
        self.sides = np.full(len(split.boxes), np.nan)

    def detect(self, batch: Batch) -> Detections:
        """`detector.detect`, for `fpn.evaluation.evaluate.detect_split(..., detect=watch.detect)`."""
        detector = self.detector
        found, proposals = _detected(detector, batch)
        if proposals is not None:
            assert isinstance(detector, FastRCNN)
            self.regions += _count(region_levels(detector, proposals.boxes)[proposals.valid])
            if proposals.levels is not None:
                self.proposals += _count(proposals.levels[proposals.valid])
        elif isinstance(detector, RPN):
            self.proposals += _count(found.levels[found.levels > NOWHERE])
        scale = (batch.sizes / batch.original_sizes).flip(1).repeat(1, 2).cpu().numpy()
        for index, size, factor in zip(batch.indices.tolist(), batch.sizes.tolist(), scale, strict=True):
            rows = np.arange(*self.split.rows(index).indices(len(self.split.boxes)))
            rows = rows[~self.split.ignore[rows]]
            boxes = torch.from_numpy(self.split.boxes[rows] * factor).float().to(batch.images.device)
            self.assign(rows, boxes, size)
        return found

    def assign(self, rows: Int[np.ndarray, " N"], boxes: Float[Tensor, "N 4"], size: Sequence[int]) -> None:
        """Note the levels of the objects of one image; boxes are in pixels of the resized image of this size."""
        detector = self.detector
        self.sides[rows] = (boxes[:, 2:] - boxes[:, :2]).prod(1).sqrt().cpu().numpy()
        if isinstance(detector, FastRCNN):
            self.by_region[rows] = region_levels(detector, boxes).cpu().numpy()
        if has_places(detector):
            levels, index = matched_places(detector, boxes, padded(size, detector.spec.square_side))
            self.anchors += _count(levels)
            self.matched += _count(levels[index >= 0])
            self.by_anchor[rows] = level_of_most(levels[index >= 0], index[index >= 0], len(rows))


def _detected(detector: Detector, batch: Batch) -> tuple[Detections, Proposals | None]:
    """The detections, and the regions that they were made from."""
    if not isinstance(detector, FastRCNN):
        return detector.detect(batch), None
    pyramid = detector.features(batch)
    proposals = detector.regions_of(batch, pyramid)
    return detector.detect_in(pyramid, proposals, batch.sizes), proposals


def _count(levels: Int64[Tensor, " n"]) -> Counter[int]:
    values, counts = levels.unique(return_counts=True)
    return Counter(dict(zip(values.tolist(), counts.tolist(), strict=True)))


def region_levels(detector: FastRCNN, boxes: Float[Tensor, "*b 4"]) -> Int64[Tensor, "*b"]:
    """The level that each region is pooled from (Eq. 1), or would be."""
    lowest, highest = detector.pooled_levels[0], detector.pooled_levels[-1]
    return assign_levels(boxes, lowest, highest, canonical=detector.canonical)


def has_places(detector: Detector) -> bool:
    """Whether a detector assigns objects to anchors, or to places that are none."""
    return not isinstance(detector, FastRCNN) or isinstance(detector, RPN)


def padded(size: Sequence[int], square: int | None) -> tuple[int, int]:
    """The height and width of an image padded by itself, as in a batch of one."""
    height, width = ([max(square, *size)] * 2) if square is not None else size
    return -(-height // MULTIPLE) * MULTIPLE, -(-width // MULTIPLE) * MULTIPLE


def matched_places(
    detector: Detector, boxes: Float[Tensor, "N 4"], size: tuple[int, int]
) -> tuple[Int64[Tensor, " A"], Int64[Tensor, " A"]]:
    """The level of each anchor or place of an image of this size, and the box it learns in training; negative: none."""
    grid = detector.cells if isinstance(detector, FCOS | ATSS) else detector.anchors
    assert grid is not None
    maps = {k: boxes.new_empty(1, 1, -(-size[0] // 2**k), -(-size[1] // 2**k)) for k in detector.levels}
    places = grid(maps, size)
    levels = torch.cat([torch.full((len(own),), k, device=own.device) for k, own in places.items()])
    if not len(boxes):
        return levels, torch.full_like(levels, BACKGROUND)
    truth, valid = boxes[None], torch.ones((1, len(boxes)), dtype=torch.bool, device=boxes.device)
    anchors, by_level = torch.cat(list(places.values()))[None], list(places.values())
    match detector:
        case RPN():
            index = match(truth, valid, anchors, detector.rpn_positive, detector.rpn_negative, keep_best=True)
        case RetinaNet():
            index = match(truth, valid, anchors, detector.positive, detector.negative, keep_best=True)
        case FCOS():
            index = fcos.assign(truth, valid, by_level, detector.radius, detector.reach)
        case ATSS():
            index = atss.assign(truth, valid, by_level, detector.nearest * detector.cells.per_cell)
        case _:
            raise AssertionError(f"{type(detector).__name__} has no rule here; see Watch")
    return levels, index[0]


def level_of_most(levels: Int64[Tensor, " p"], index: Int64[Tensor, " p"], count: int) -> Int[np.ndarray, " N"]:
    """For each of `count` objects the level that most of its positives are on, the finest of several; or NOWHERE."""
    highest = int(levels.max()) if len(levels) else NOWHERE
    votes = np.zeros((count, highest + 1), dtype=np.int64)
    np.add.at(votes, (index.cpu().numpy(), levels.cpu().numpy()), 1)
    return votes.argmax(axis=1)  # level 0 has no votes, and is the first of equals where no level has any


@dataclass(frozen=True)
class Handled:
    """What became of the objects of one level, or of all; `rows` are those of the split."""

    rows: Int[np.ndarray, " objects"]
    found: int
    false: int
    AP: float
    AR: float


def handled_by(
    split: Split, results: Results, home: Int[np.ndarray, " M"], threshold: float = THRESHOLD, limit: int = 100
) -> dict[int, Handled]:
    """By level, as the module says, and under ALL of all levels together.

    home: the level that each of the split's objects is assigned to. limit: detections of a class in an image that
    count.
    """
    assert results.levels is not None, "the levels of the detections are needed"
    found = matches(split, results, limit)
    counted = ~split.ignore & np.isin(split.image_of, results.images)
    owners = np.where(found.finder[0] >= 0, _levels_at(found.finder[0], results.levels), home)
    owners = np.where(found.finder >= 0, _levels_at(found.finder, results.levels), owners)
    levels = np.unique(np.concatenate([owners[:, counted].flatten(), results.levels])).tolist()
    every = np.ones(len(results.scores), dtype=bool)
    by_level = {
        k: _handled(split, results, found, (owners == k) & counted, results.levels == k, threshold) for k in levels
    }
    return by_level | {ALL: _handled(split, results, found, np.tile(counted, (len(IOUS), 1)), every, threshold)}


def _levels_at(rows: Int[np.ndarray, "*s"], levels: Int[np.ndarray, " n"]) -> Int[np.ndarray, "*s"]:
    """The levels of some detections; of row -1 any."""
    return np.append(levels, NOWHERE)[rows]


def _handled(
    split: Split,
    results: Results,
    found: Matches,
    objects: Bool[np.ndarray, "10 M"],
    own: Bool[np.ndarray, " n"],
    threshold: float,
) -> Handled:
    """objects: those handled, at each IoU. own: the detections of the level."""
    shown = own & found.counted[0] & (results.scores >= threshold)
    order = best_first(split, results)
    order = order[own[order]]
    of_class = [order[results.labels[order] == label] for label in range(len(split.classes))]
    precision, recall = [], []
    for at, some in enumerate(objects):
        for label, number in enumerate(np.bincount(split.labels[some], minlength=len(of_class)).tolist()):
            if number:
                rows = of_class[label]
                right = found.right[at, rows[found.counted[at, rows]]]
                precision.append(average_precision(right, number))
                recall.append(right.sum() / number)
    right = int(found.right[0, shown].sum())
    mean = [float(np.mean(values)) if values else -1.0 for values in (precision, recall)]
    return Handled(np.flatnonzero(objects[0]), right, int(shown.sum()) - right, *mean)


def report_of(
    detector: Detector, split: Split, results: Results, watch: Watch, threshold: float = THRESHOLD
) -> PyramidReport:
    """The numbers of every level, from what a pass over the split found (`results`) and saw (`watch`)."""
    check_threshold(threshold)
    split = class_agnostic(split) if detector.proposes else split
    pools, places = isinstance(detector, FastRCNN), has_places(detector)
    home = watch.by_region if pools else watch.by_anchor
    handled = handled_by(split, results, home, threshold, max(100, detector.max_detections))
    seen = handled[ALL].rows
    given = {
        "by_region": Counter(watch.by_region[seen].tolist()) if pools else None,
        "by_anchor": Counter(watch.by_anchor[seen].tolist()) if places else None,
        "anchors": watch.anchors if places else None,
        "matched": watch.matched if places else None,
        "proposals": watch.proposals if isinstance(detector, RPN) else None,
        "regions": watch.regions if pools else None,
    }
    lost = NOWHERE in handled or places and bool((watch.by_anchor[seen] == NOWHERE).any())
    levels = {k: _level(handled.get(k), given, watch, k) for k in [*detector.levels, *[NOWHERE] * lost]}
    return PyramidReport(levels, _level(handled[ALL], given, watch, ALL), len(results.images), threshold)


def _level(own: Handled | None, given: Mapping[str, Counter[int] | None], watch: Watch, level: int) -> Level:
    own = own or Handled(np.zeros(0, dtype=np.int64), 0, 0, -1.0, -1.0)
    counts = {
        name: None if count is None else sum(count.values()) if level == ALL else count[level]
        for name, count in given.items()
    }
    objects, side = len(own.rows), float(np.median(watch.sides[own.rows])) if len(own.rows) else None
    return Level(
        **counts,
        objects=objects,
        found=own.found,
        missed=objects - own.found,
        false=own.false,
        AP=own.AP,
        AR=own.AR,
        side=side,
    )
