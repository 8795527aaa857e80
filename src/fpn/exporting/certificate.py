"""What is written into an exported file about how far it is from its original, and what confirms that anywhere later.

The file holds what the original found on images that every machine can make (`fpn.exporting.scenes`), so that neither
the original nor any data is needed to see whether the file still does the same here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fpn.data import DetectionDataset, Split, class_agnostic
from fpn.errors import CheckpointError
from fpn.evaluation.evaluate import check_classes, collect, merge, score_for
from fpn.evaluation.metrics import Metrics
from fpn.exported import Exported
from fpn.exporting.compare import COUNTS, DIFFERENCES, Bound, Tally, best, compare, faults, typical
from fpn.exporting.scenes import Case, cases, digest
from fpn.inference.finder import find, finder
from fpn.model.detector import Detector
from fpn.structures import Detections
from fpn.words import listed

# Whoever sums in another order decides now and then otherwise between two boxes; bf16 keeps 8 bits, int8 less.
BOUNDS = {
    "fp32": Bound(missing=0.03, score=0.002, box=0.1, mask=0.005, AP=0.002),
    "bf16": Bound(missing=0.10, score=0.02, box=1.0, mask=0.03, AP=0.02),
    "int8": Bound(missing=0.20, score=0.10, box=3.0, mask=0.10, AP=0.03),
}
KEPT = 100  # detections an image that a certificate keeps
FEW = 10  # detections, below which a comparison says little
GIVEN = "images given"


@dataclass(frozen=True)
class Certificate:
    """How an exported file compares with its original.

    rows: by kind of image. AP: numbers of the original and of the file on labelled images, by name; data: which images
    these are. scenes: the digest of the images of `cases`, and what the original finds on them.
    """

    precision: str
    rows: Mapping[str, Tally]
    AP: Mapping[str, tuple[float, float]]
    data: Mapping[str, Any]
    scenes: Mapping[str, Any]

    @property
    def faults(self) -> list[str]:
        """Where the bound of the precision is exceeded, in words."""
        bound = BOUNDS[self.precision]
        found = [fault for case, tally in self.rows.items() for fault in faults(case, tally, bound)]
        for name, (before, after) in self.AP.items():
            if not abs(before - after) <= bound.AP:
                found.append(f"{name} was {before:.4f} and is {after:.4f} (they may differ by {bound.AP})")
        return found

    @property
    def notes(self) -> list[str]:
        """What the comparison does not say."""
        whole = Tally.total(self.rows.values())
        found = []
        if len(whole.scores) < FEW:
            found.append(
                f"only {len(whole.scores)} detections could be compared: give images that the detector finds something "
                "in, with --data or --images"
            )
        if not whole.empty:
            found.append("the detector finds something in every image, so that none without a detection was compared")
        return found

    def table(self) -> str:
        """A line for each kind of image, then the AP."""
        bound = BOUNDS[self.precision]
        wide = max(20, *map(len, self.rows))
        head = f"{'':<{wide}}{'images':>8}{'original':>10}{'exported':>10}{'missing':>9}{'score':>10}{'box':>9}"
        lines = [head + (f"{'mask':>9}" if Tally.total(self.rows.values()).masks.numel() else "")]
        for case, tally in self.rows.items():
            counts = f"{tally.images:>8}{tally.original:>10}{tally.exported:>10}{tally.missing:>9}"
            columns = [(tally.scores, 10, 5), (tally.boxes, 9, 3)] + (
                [(tally.masks, 9, 4)] if tally.masks.numel() else []
            )
            numbers = (f"{typical(values):>{w}.{d}f}" if len(values) else f"{'-':>{w}}" for values, w, d in columns)
            lines.append(f"{case:<{wide}}{counts}{''.join(numbers)}")
        most = f"{bound.missing:>9.0%}{bound.score:>10}{bound.box:>9}"
        lines.append(f"{'at most':<{wide}}{'':>28}{most}" + (f"{bound.mask:>9}" if "mask" in lines[0] else ""))
        for name, (before, after) in self.AP.items():
            where = f"{self.data['split']} ({self.data['images']} images)"
            lines.append(f"{name} on {where}: {before:.4f} before, {after:.4f} exported, at most {bound.AP} apart")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        rows = {case: summary(tally) for case, tally in self.rows.items()}
        bound = asdict(BOUNDS[self.precision])
        AP = {name: list(pair) for name, pair in self.AP.items()}
        about = {"data": dict(self.data), "scenes": dict(self.scenes), "notes": self.notes}
        return {"precision": self.precision, "bound": bound, "rows": rows, "AP": AP, **about}


def summary(tally: Tally) -> dict[str, Any]:
    numbers: dict[str, Any] = {name: getattr(tally, name) for name in COUNTS}
    for name in DIFFERENCES:
        values = getattr(tally, name)
        if values.numel():
            numbers[name] = {"typical": round(typical(values), 6), "largest": round(float(values.max()), 6)}
    return numbers


def certify(
    detector: Detector,
    exported: Exported,
    precision: str,
    images: Sequence[Tensor] = (),
    split: Split | None = None,
    progress: bool = True,
) -> Certificate:
    """The certificate of a file made from a detector, which is asked on the CPU.

    images: uint8 (3, H, W), which are compared on besides those of `cases`; one at a time is taken from the sequence.
    split: labelled images, which are compared on too, and by their AP.
    """
    rows, scenes = {}, cases(detector.spec.short)
    given = [Case(GIVEN, images)] if len(images) else []
    kept, cpu = [], torch.device("cpu")
    detector.eval().to(cpu)
    total = sum(len(case.images) for case in (*scenes, *given)) + (len(split) if split is not None else 0)
    with tqdm(total=total, desc="comparing", unit=" images", disable=not progress, leave=False) as bar:
        for case in (*scenes, *given):
            tallies = []
            for call in case.calls:
                before, after = find(detector, call, cpu), exported.find(call)
                tallies += [tally(exported, precision, *three) for three in zip(before, after, call, strict=True)]
                kept += [] if case.name == GIVEN else before
                bar.update(len(call))
            rows[case.name] = Tally.total(tallies)
        AP, data = {}, {}
        if split is not None:
            rows[f"images of {split.name}"], AP, data = measured(detector, exported, precision, split, bar)
    pictures = [image for case in scenes for image in case.images]
    found = [written(best(one, KEPT)) for one in kept]
    return Certificate(precision, rows, AP, data, {"digest": digest(pictures), "found": found})


def tally(exported: Exported, precision: str, before: Detections, after: Detections, image: Tensor) -> Tally:
    size = (image.shape[1], image.shape[2])
    margin = BOUNDS[precision].margin
    return compare(before, after, size, exported.spec.sides, exported.score, exported.max_detections, margin)


def measured(
    detector: Detector, exported: Exported, precision: str, split: Split, bar: tqdm
) -> tuple[Tally, dict[str, tuple[float, float]], dict[str, Any]]:
    """The detections of both on labelled images compared, their AP or AR by name, and which images these are."""
    split = class_agnostic(split) if detector.proposes else split
    check_classes(detector, split)
    finds, tallies, samples = (finder(detector, "cpu"), finder(exported)), [], DetectionDataset(split)
    nothing = collect([], detector, split)
    shards = ([nothing], [nothing])  # of the original, of the file
    for sample in (samples[index] for index in range(len(split))):
        bar.update()
        if sample is None:  # an image that cannot be read, which has been told
            continue
        ours, theirs = (find([sample.image])[0] for find in finds)
        tallies.append(tally(exported, precision, ours, theirs, sample.image))
        for shard, found in zip(shards, (ours, theirs), strict=True):
            shard.append(collect([(torch.tensor([sample.index]), Detections.stack([found]))], detector, split))
    before, after = (score_for(detector, split, merge(shard)) for shard in shards)
    numbers = {name: (before.with_masks()[name], after.with_masks()[name]) for name in judging(before)}
    about = {"split": split.name, "images": len(split), "digest": digest_of(split)}
    return Tally.total(tallies), numbers, about


def judging(metrics: Metrics) -> list[str]:
    """The names of the numbers that a detector is judged by."""
    return [name for name in dict.fromkeys((metrics.main, "mask_AP")) if name in metrics.with_masks()]


def digest_of(split: Split) -> str:
    """The SHA-256 of the annotations of a split and the names and sizes of its files, wherever they lie."""
    state = hashlib.sha256()
    names = [str(file).replace("\\", "/").rsplit("/", 1)[-1] for file in split.files]
    state.update("\0".join((*names, *split.classes)).encode())
    for column in (split.sizes, split.offsets, np.round(split.boxes, 3) + 0.0, split.labels, split.ignore):
        state.update(np.ascontiguousarray(column).tobytes())
    return state.hexdigest()


def written(found: Detections) -> list[list[float]]:
    """x1, y1, x2, y2, score, label, level of each detection of one image."""
    columns = (found.boxes, found.scores[:, None], found.labels[:, None], found.levels[:, None])
    return [[round(value, 5) for value in row] for row in torch.cat([c.double() for c in columns], dim=1).tolist()]


def read(rows: Iterable[Sequence[float]], classes: tuple[str, ...]) -> Detections:
    """The inverse of `written`."""
    values = torch.tensor([list(row) for row in rows], dtype=torch.float64).reshape(-1, 7)
    labels, levels = values[:, 5].long(), values[:, 6].long()
    return Detections(values[:, :4].float(), values[:, 4].float(), labels, levels, torch.tensor(len(values)), classes)


def confirm(
    exported: Exported, split: Split | None = None, metrics: Metrics | None = None, progress: bool = True
) -> str:
    """Words on whether a file does here what it did when it was exported.

    It is asked on the images of `cases` and compared with what its original found there. Where `split` is what it was
    compared on then, `metrics`, of the file on it here, are compared with the original's too. Raises CheckpointError
    where a difference is above the bound, or the certificate is damaged.
    """
    try:
        stored = exported.about["certificate"]
        precision, scenes, data = stored["precision"], stored["scenes"], dict(stored["data"])
        before = [read(rows, exported.classes) for rows in scenes["found"]]
        numbers = {str(name): (float(pair[0]), float(pair[1])) for name, pair in stored["AP"].items()}
        made_on, maker = str(scenes["digest"]), str(exported.about["versions"]["fpn"])
        assert precision in BOUNDS
        assert not data or {"split", "images", "digest"} <= set(data)
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, AssertionError) as error:
        raise CheckpointError(f"{exported.path}: its certificate is missing or damaged; export it again") from error
    pictures = cases(exported.spec.short)
    images = [image for case in pictures for image in case.images]
    if digest(images) != made_on or len(before) != len(images):
        raise CheckpointError(f"{exported.path}: its certificate is of another version of fpn; export it again")
    now = Certificate(precision, rows_now(exported, precision, pictures, before, progress), {}, {}, scenes)
    on, note = f"{len(images)} images of its own", ""
    if split is not None and metrics is not None and digest_of(split) == data.get("digest"):
        AP = {name: (numbers[name][0], metrics.with_masks()[name]) for name in judging(metrics) if name in numbers}
        on += f" and by {listed([*AP])} on {split.name}"
        now = replace(now, AP=AP, data=data)
    elif split is not None:
        known = f"that of other images ({data['images']} of {data['split']}) or asked otherwise" if data else "none"
        note = f"\nnote: AP was not compared: the certificate has {known}"
    if now.faults:
        raise CheckpointError(f"{exported.path}: does not do what it did when it was exported: {'; '.join(now.faults)}")
    return f"certificate confirmed on {on} ({precision}, made by fpn {maker})\n{now.table()}{note}"


def rows_now(
    exported: Exported, precision: str, pictures: Sequence[Case], before: Sequence[Detections], progress: bool
) -> dict[str, Tally]:
    """A file's detections here against those of its original, KEPT of each at most."""
    rows, left = {}, iter(before)
    most, margin = min(KEPT, exported.max_detections), BOUNDS[precision].margin
    for case in tqdm(pictures, desc="confirming", disable=not progress, leave=False):
        tallies = []
        for image, now in [pair for call in case.calls for pair in zip(call, exported.find(call), strict=True)]:
            size = (image.shape[1], image.shape[2])
            pair = next(left), best(now, KEPT)
            tallies.append(compare(*pair, size, exported.spec.sides, exported.score, most, margin))
        rows[case.name] = Tally.total(tallies)
    return rows
