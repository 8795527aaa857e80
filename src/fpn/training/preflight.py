"""Before a training run: the checks that take seconds, and one screen that says what is about to happen."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fpn.data import GroupedBatches, Split, read_image
from fpn.data.batching import seed_from
from fpn.data.fit import (
    CANDIDATES,
    DETECTIONS,
    LIMITS,
    MULTIPLE,
    caps,
    measure,
    most_boxes,
    objects_by_image,
    percent,
    resized_sizes,
)
from fpn.data.images import image_size
from fpn.data.tiles import Tiles, whole_of
from fpn.errors import DataError, ImageError
from fpn.evaluation.metrics import Metrics, Results, score
from fpn.model.detector import Detector
from fpn.model.region_proposals import RPN
from fpn.training.settings import Settings
from fpn.words import some_of

__all__ = ["Finding", "caps", "preflight", "print_preflight"]

IMAGES, PIXELS = 5, 10**8  # of each split are opened; fewer where they are huge
SCORED_IMAGES, SCORED_BOXES = 1000, 20_000  # of the validation split; more would take more than seconds
PERFECT = 0.9995
POOR_RECALL = 0.75  # of the boxes by the anchors, at IoU 0.5
MANY_MASKS = 2 * 2**30  # bytes that the outlines of a batch take


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: what was found and, where it is not good, what to do about it."""

    good: bool
    text: str


def preflight(detector: Detector, train: Split, val: Split | None, settings: Settings) -> list[Finding]:
    """What can be known about a run in seconds, before it takes hours.

    The limits that a data set needs (see `caps`) are part of a detector, so they are only compared here.

    Raises DataError where training cannot work: no image can be opened, or `val` has classes that are never learnt.
    """
    return [
        *_images(whole_of(train), val, settings.seed),
        *_classes(train, val),
        *_overlap(train, val),
        *_truth(detector, val),
        _limits(detector, train, None if detector.spec.tile else val),
        _anchors(detector, train),
        *_masks(detector, train, settings),
    ]


def _images(train: Split, val: Split | None, seed: int) -> list[Finding]:
    """A few images of each split can be opened and are as large as their annotations say."""
    looked, faults = [], []
    for split in (train, val):
        if split is None or not len(split):
            continue
        chosen = np.random.default_rng(seed_from(seed)).permutation(len(split))[:IMAGES]
        chosen = chosen[: max(1, int((np.cumsum(split.sizes[chosen].prod(axis=1)) <= PIXELS).sum()))]
        unread = [fault for fault in (_fault(split, int(index)) for index in chosen) if fault]
        if len(unread) == len(chosen) and all(unreadable for unreadable, _ in unread):
            raise DataError(
                f"{unread[0][1]}. None of the {len(chosen)} images of {split.name!r} that were tried can be read: is "
                "the data set complete?"
            )
        looked.append(f"{len(chosen)} of {split.name}")
        faults += [text for _, text in unread]
    if faults:
        more = f" (and {len(faults) - 1} more of those tried)" if len(faults) > 1 else ""
        return [Finding(False, f"{faults[0]}{more}; fpn data check lists all such images")]
    return [Finding(True, f"images can be opened: {' and '.join(looked)} tried")]


def _fault(split: Split, index: int) -> tuple[bool, str] | None:
    """Whether an image is unreadable, and what is wrong with it; None where all is well."""
    try:
        height, width = read_image(split.path(index)).shape[1:]
    except ImageError as error:
        return True, str(error)
    annotated = tuple(split.sizes[index].tolist())
    if annotated in ((height, width), image_size(split.path(index), apply_exif=False)):  # both are read as annotated
        return None
    return False, f"{split.path(index)}: is {width}x{height}, but annotated as {annotated[1]}x{annotated[0]} pixels"


def _classes(train: Split, val: Split | None) -> list[Finding]:
    """Every class can be learnt from `train` and measured on `val`."""
    unknown = [] if val is None else [name for name in val.classes if name not in train.classes]
    if val is not None and unknown:
        raise DataError(
            f"{val.root}: the split {val.name!r} has classes that {train.name!r} has not ({some_of(unknown)}), which "
            "can never be learnt: give all splits the same list of classes"
        )
    never_learnt = _absent(train, train.classes)
    never_measured = [] if val is None else _absent(val, train.classes)
    never_measured = [name for name in never_measured if name not in never_learnt]
    findings = []
    if never_learnt:
        findings.append(Finding(False, f"no box in {train.name}, so never learnt: {some_of(never_learnt)}"))
    if val is not None and never_measured:
        names = some_of(never_measured)
        findings.append(Finding(False, f"no box in {val.name}, so AP is -1 there and leaves them out: {names}"))
    where = train.name if val is None else f"{train.name} and {val.name}"
    return findings or [Finding(True, f"every class has boxes in {where}")]


def _absent(split: Split, classes: tuple[str, ...]) -> list[str]:
    present = {split.classes[label] for label in np.unique(split.labels[~split.ignore])}
    return [name for name in classes if name not in present]


def _overlap(train: Split, val: Split | None) -> list[Finding]:
    """Nothing is measured on images that were learnt from."""
    if val is None:
        return []
    known = {f"{train.root}/{file}" for file in train.files.tolist()}
    both = [path for path in (f"{val.root}/{file}" for file in val.files.tolist()) if path in known]
    if not both:
        return []
    return [
        Finding(
            False,
            f"{len(both):,} of {len(val):,} images of {val.name} are in {train.name} too, such as {both[0]}: AP will "
            "be too good to be true; fpn data split divides anew",
        )
    ]


def _truth(detector: Detector, val: Split | None) -> list[Finding]:
    """Scored as if it were a prediction the ground truth is perfect, within the detector's limit of detections."""
    if val is None:
        return [Finding(False, "no split 'val': nothing is measured, and the last epoch counts as the best")]
    part = _sample(val)
    limit = most_boxes([part])[0] if detector.spec.tile else detector.max_detections  # which is of a tile
    results, cut = truth_as_results(part, limit)
    metrics = score(part, results, max(100, detector.max_detections))
    if metrics["AP"] < 0:
        return [Finding(False, f"{val.name} has no object to find: every number will be -1, the last epoch is kept")]
    size = f"{len(part):,} images" if len(part) == len(val) else f"{len(part):,} of {len(val):,} images"
    if metrics["AP"] >= PERFECT:
        return [Finding(True, f"ground truth scored as prediction gives AP 1.000 on {size} of {val.name}")]
    return [
        Finding(
            False,
            f"ground truth scored as prediction gives AP {metrics['AP']:.3f}, not 1, on {size} of {val.name}, and no "
            f"detector can do better: {_why_not_perfect(metrics, cut, detector.max_detections)}",
        )
    ]


def _why_not_perfect(metrics: Metrics, cut: int, limit: int) -> str:
    if cut:
        return f"{cut:,} objects are beyond the {limit:,} detections an image"
    low = [name for name, row in metrics.per_class.items() if 0 <= row["AP"] < PERFECT]
    crowded = [note for note in metrics.notes if "recall cannot reach 1" in note]
    return "; ".join(crowded) or f"look at the boxes of {some_of(low)} with fpn data check"


def truth_as_results(split: Split, limit: int) -> tuple[Results, int]:
    """The objects of a split as detections of score 1, at most `limit` an image, and how many that leaves out."""
    owners = split.image_of[~split.ignore]
    counts = np.bincount(owners, minlength=len(split))
    place = np.arange(len(owners)) - (np.cumsum(counts) - counts)[owners]
    kept = place < limit
    boxes, labels = split.boxes[~split.ignore][kept], split.labels[~split.ignore][kept]
    return Results(np.arange(len(split)), owners[kept], boxes, np.ones(len(boxes)), labels), int((~kept).sum())


def _sample(split: Split) -> Split:
    """The densest image and some at random, as many as can be scored in a moment."""
    counts = np.diff(split.offsets)
    order = np.random.default_rng(0).permutation(len(split))
    if len(order):
        order = np.concatenate([[counts.argmax()], order[order != counts.argmax()]])[:SCORED_IMAGES]
    enough = max(1, int((np.cumsum(counts[order]) <= SCORED_BOXES).sum()))
    return split.select(order[:enough], split.name)


def _limits(detector: Detector, train: Split, val: Split | None) -> Finding:
    """The densest image does not have more objects than the detector can find."""
    splits = {split.name: split for split in (train, val) if split is not None}
    most, file = most_boxes(splits.values())
    detections = detector.max_detections
    limits, lowest = f"a limit of {detections:,} detections an image", detections
    if isinstance(detector, RPN):
        proposals = detector.proposals[1]
        limits = f"limits of {detections:,} detections and {proposals:,} proposals an image"
        limits = f"a limit of {proposals:,} proposals an image" if detector.proposes else limits
        lowest = min(detections, proposals, detector.proposals_per_level[1])
    elif isinstance(candidates := getattr(detector, "candidates", None), int):
        limits = f"limits of {detections:,} detections an image and {candidates:,} candidates a level"
        lowest = min(detections, candidates)
    if most <= lowest:
        beyond = detections > DETECTIONS and not detector.proposes
        counted = f"; AP counts up to {detections:,}, where COCO's counts 100" if beyond else ""
        return Finding(True, f"{limits}, the densest has {most:,} objects{counted}")
    usual = {**LIMITS, "candidates": CANDIDATES}
    wanted = {**usual, **caps(splits, usual)}
    had = {name: getattr(detector, name) for name in wanted if hasattr(detector, name)}
    needed = ", ".join(f"{name}={wanted[name]}" for name, limit in had.items() if _lower(limit, wanted[name]))
    return Finding(False, f"{limits}, but {file} has {most:,} objects: use fpn.build(..., {needed})")


def _lower(limit: Any, needed: Any) -> bool:
    """Limits are numbers, or pairs for training and detection."""
    return limit < needed if isinstance(limit, int) else limit[1] < needed[1]


def _anchors(detector: Detector, train: Split) -> Finding:
    """The anchors overlap most boxes well enough to learn from."""
    if not _boxes(train):
        return Finding(False, f"{train.name} has no box to learn from")
    if detector.anchors is None:
        return Finding(True, f"{detector.spec.model} has no anchors that could miss boxes")
    fit = measure([train], *detector.spec.sides, detector.anchors)
    good, well = fit.recall(0.5), fit.recall(0.7)
    if good >= POOR_RECALL:
        return Finding(True, f"anchors fit {percent(good)} of the boxes at IoU 0.5, {percent(well)} at 0.7")
    return Finding(
        False,
        f"anchors fit only {percent(good)} of the boxes at IoU 0.5: fpn data info PATH --short {fit.short} suggests a "
        "better size or anchors",
    )


def _masks(detector: Detector, train: Split, settings: Settings) -> list[Finding]:
    """The outlines of a batch fit into memory: one byte a pixel of every image, times the objects of the densest."""
    if not detector.has_masks or not len(train):
        return []
    short, long = max(settings.scales), detector.spec.sides[1]
    padded = -(-resized_sizes(train.sizes, short, long) // MULTIPLE) * MULTIPLE
    if side := detector.spec.square_side:
        padded = np.full_like(padded, -(-side // MULTIPLE) * MULTIPLE)
    objects = objects_by_image(train)
    needed = settings.batch * objects * padded.prod(axis=1)
    worst = int(needed.argmax())
    if needed[worst] <= MANY_MASKS:
        return []
    height, width = padded[worst].tolist()
    return [
        Finding(
            False,
            f"{train.files[worst]} has {int(objects[worst]):,} objects: the outlines of {settings.batch} images of "
            f"{width}x{height} pixels with as many take {needed[worst] / 2**30:.1f} GiB; take a smaller --batch or "
            "--short",
        )
    ]


def print_preflight(
    findings: list[Finding], detector: Detector, train: Split, val: Split | None, settings: Settings
) -> None:
    """One screen: what is trained on what, for how long, and what `preflight` found."""
    console = Console(highlight=False)
    tick, warning = ("ok", "!") if console.options.ascii_only else ("✓", "▲")
    table = Table.grid(padding=(0, 2))
    for name, text in _facts(detector, train, val, settings).items():
        table.add_row(f"[bold]{name}[/]", escape(text))
    for finding in sorted(findings, key=lambda finding: not finding.good):
        mark = f"[green]{tick}[/]" if finding.good else f"[bold yellow]{warning}[/]"
        table.add_row(mark, escape(finding.text))
    console.print()
    console.print(table)
    console.print()


def _facts(detector: Detector, train: Split, val: Split | None, settings: Settings) -> dict[str, str]:
    spec, world = detector.spec, settings.devices * settings.nodes
    batches = len(GroupedBatches(train, settings.batch, shuffle=True, seed=settings.seed, world=world))
    steps = math.ceil(batches / settings.accumulate)
    images = settings.batch * settings.accumulate * world
    weights = [(p.numel(), p.requires_grad) for p in detector.parameters()]
    learnt, total = sum(n for n, learns in weights if learns), sum(n for n, _ in weights)
    sides, anchors = "/".join(map(str, settings.scales)), ""
    if detector.anchors is not None:
        anchors = f"; anchors {' '.join(f'{size:g}' for size in detector.anchors.sizes.values())}"
    what = f"tiles of {len(train.whole):,} images" if isinstance(train, Tiles) else "images"
    measured = "" if val is None else f"; measured on {len(val):,} images, {_boxes(val):,} boxes"
    machines = f"{world} x {settings.device}" if world > 1 else settings.device
    return {
        "data": f"{len(train):,} {what}, {_boxes(train):,} boxes, {len(train.classes):,} classes{measured}",
        "model": f"{spec.model}, {spec.backbone}, {total / 1e6:.1f} M weights of which {learnt / 1e6:.1f} M learn",
        "input": f"shorter side {sides}, at most {spec.sides[1]} pixels" + anchors,
        "plan": f"{settings.epochs} epochs of {steps:,} steps of {images} images, {steps * settings.epochs:,} steps in "
        f"all; learning rate {settings.lr:.3g}, {settings.schedule}; augmentation {settings.augment}; {machines}, "
        f"{'bfloat16' if settings.precision == 'bf16' else 'float32'}",
    }


def _boxes(split: Split) -> int:
    return int((~split.ignore).sum())
