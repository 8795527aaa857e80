"""One cell: build, train, measure, keep. A folder holds each; its cell.json is written last and says that it is done.

A cell that was stopped goes on where it was; one that is done is never run again. asked.json, written first, holds all
that its numbers follow from, so that numbers of two different experiments never stand in one table.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fpn.build import build
from fpn.data import Split
from fpn.errors import DataError, OptionError
from fpn.hardware import cores, is_main_process
from fpn.model.detector import Detector
from fpn.paper.scales import Scale, on
from fpn.paper.tables import WINDOWS, Cell
from fpn.training.resume import STATE
from fpn.writing import write_json

ASKED, DONE, WEIGHTS = "asked.json", "cell.json", "last.safetensors"
MODEL = {"shared_rpn": "rpn", "shared_fast_rcnn": "fast_rcnn"}  # of the kinds that are not called as their model


@dataclass(frozen=True)
class Setup:
    """What all cells of a run have in common: where they are kept, the images, the scale."""

    out: Path
    train: Split
    val: Split
    scale: Scale

    def folder(self, cell: Cell) -> Path:
        return self.out / "cells" / cell.key

    @cached_property
    def images(self) -> dict[str, str]:
        """A digest of each split: its files, sizes and boxes."""
        return {"train": digest(self.train), "val": digest(self.val)}

    @cached_property
    def weights(self) -> str:
        """What the backbone starts from, a file by its content."""
        return digest_of_file(str(self.scale.detector["weights"]))


def digest(split: Split) -> str:
    content = hashlib.sha256("\n".join(map(str, [*split.classes, *split.files])).encode())
    for column in (split.sizes, split.offsets, split.boxes, split.labels, split.ignore, split.areas):
        content.update(np.ascontiguousarray(column).tobytes())
    return content.hexdigest()[:16]


def digest_of_file(file: str) -> str:
    """A weights file by its content, anything else by its name."""
    if not os.path.isfile(file):
        return file
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()[:16]


def asked(cell: Cell, setup: Setup) -> dict[str, Any]:
    """Everything that the numbers of a cell follow from, as JSON gives it back."""
    detector = options_of(cell, setup.scale)
    needs = {need.key: asked(need, setup) for need in cell.needs}
    everything = {
        "scale": setup.scale.name,
        "detector": {**detector, "weights": setup.weights},
        "training": training_of(cell, setup.scale),
        "images": setup.images,
        "devices": f"{setup.scale.run.get('devices', 1) * setup.scale.run.get('nodes', 1)} {on(setup.scale.run).type}",
        "needs": needs,
    }
    return json.loads(json.dumps(everything))


def options_of(cell: Cell, scale: Scale) -> dict[str, Any]:
    """The options of `fpn.build` for a cell."""
    from fpn.paper.variants import options

    model = MODEL.get(cell.kind, cell.kind)
    base = {"model": model, **scale.detector, **scale.own[model]}
    if cell.kind == "mask_proposals":
        return {**base, "windows": WINDOWS[cell.row]}
    return options(cell.row, base)


def training_of(cell: Cell, scale: Scale) -> dict[str, Any]:
    """The options of `fpn.train` that its result depends on."""
    return {**scale.training[MODEL.get(cell.kind, cell.kind)], "seed": cell.seed}


def check_kept(cells: Iterable[Cell], setup: Setup) -> None:
    """Raises OptionError where a cell that is kept was asked for in another way than now."""
    for cell in cells:
        folder = setup.folder(cell)
        if not (folder / ASKED).is_file() or not any((folder / name).is_file() for name in (DONE, STATE)):
            continue  # nothing was made of it
        before = flat(read(folder / ASKED))
        now = flat(asked(cell, setup))
        different = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
        if different:
            name = different[0]
            raise OptionError(
                f"{folder}: was made with {name} {before.get(name, 'left out')}, and now it is "
                f"{now.get(name, 'left out')}, so its numbers do not belong with those asked for: choose another "
                f"--out, or remove that folder and all others that were made so"
            )


def flat(content: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """
    >>> flat({"a": {"b": 1}, "c": 2})
    {'a b': 1, 'c': 2}
    """
    entries: dict[str, Any] = {}
    for name, value in content.items():
        entries |= flat(value, f"{before}{name} ") if isinstance(value, Mapping) else {before + name: value}
    return entries


def read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("no entries")
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: damaged ({error}); remove its folder, and the cell is made anew") from error
    return content


def finished(cell: Cell, setup: Setup) -> dict[str, Any] | None:
    """What a cell that is done has written; None for one that is not."""
    file = setup.folder(cell) / DONE
    if not file.is_file():
        return None
    content = read(file)
    numbers = content.get("numbers")
    if not isinstance(numbers, dict) or not all(isinstance(value, int | float) for value in numbers.values()):
        raise DataError(f"{file}: damaged (no numbers); remove its folder, and the cell is made anew")
    return content


def run_cell(cell: Cell, setup: Setup) -> dict[str, Any]:
    """Train and measure a cell, or give what it has written before; the cells that it needs are done."""
    if (content := finished(cell, setup)) is not None:
        tidy(setup.folder(cell))
        return content
    folder, main = setup.folder(cell), is_main_process()
    if main:
        write_json(folder / ASKED, asked(cell, setup), indent=2)
    detector, seconds = trained(cell, setup)
    if not main:
        return wait_for(cell, setup)
    started = time.monotonic()
    numbers = measured(cell, detector, setup)
    content = {
        "key": cell.key,
        "numbers": numbers,
        "anchors": anchors_of(detector, setup.val),
        "weights": sum(parameter.numel() for parameter in detector.parameters()),
        "seconds": {"training": seconds, "measuring": round(time.monotonic() - started, 1)},
        "asked": asked(cell, setup),
        **circumstances(setup),
    }
    write_json(folder / DONE, content, indent=2)
    tidy(folder)
    return content


def trained(cell: Cell, setup: Setup) -> tuple[Detector, float]:
    """The detector of a cell after its training, and the seconds that this took."""
    import fpn

    folder = setup.folder(cell)
    torch.manual_seed(cell.seed)
    detector = fresh(cell, setup)
    split = with_proposals(cell, setup, setup.train)
    resume = (folder / STATE).is_file()
    options = {} if resume else {**training_of(cell, setup.scale), **setup.scale.run}
    run = fpn.train(detector, {"train": split}, out=folder, resume=resume, quiet=True, bar=True, **options)
    return detector, round(sum(row["seconds"] for row in run.history), 1)


def fresh(cell: Cell, setup: Setup) -> Detector:
    """The detector of a cell before its training: Fast R-CNN with shared features goes on from where it was without."""
    import fpn
    from fpn.paper.sharing import on_features_of

    options = options_of(cell, setup.scale)
    if options["model"] == "fast_rcnn":
        options["classes"] = setup.train.classes
    if cell.features is None:
        return build(**options)
    before = fpn.weights.load_detector(setup.folder(cell.features) / WEIGHTS)
    return on_features_of(before if cell.kind == "shared_fast_rcnn" else build(**options), before)


def with_proposals(cell: Cell, setup: Setup, split: Split) -> Split:
    """The split with the proposals that the cell learns from or is measured on, which are made once and kept.

    For training as many as the RPN itself would hand on in training: 2000 an image in the paper, and 1000 in detection.
    """
    if cell.proposer is None:
        return split
    import fpn
    from fpn.evaluation.evaluate import detect_split

    file = setup.folder(cell.proposer) / f"proposals-{split.name}.safetensors"
    if is_main_process() and not file.is_file():
        rpn: Any = fpn.weights.load_detector(setup.folder(cell.proposer) / WEIGHTS)
        if split is setup.train:
            rpn.proposals, rpn.proposals_per_level = rpn.proposals[:1] * 2, rpn.proposals_per_level[:1] * 2
        results = detect_split(rpn, split, device=str(on(setup.scale.run)), workers=setup.scale.run.get("workers"))
        fpn.data.write_regions(file, split, results)
    while not file.is_file():  # of another process
        time.sleep(1)
    return fpn.data.with_regions(split, file)


def measured(cell: Cell, detector: Detector, setup: Setup) -> dict[str, float]:
    """The numbers of a cell's table, from 0 to 1, or -1 where there is no object to measure them on."""
    import fpn
    from fpn.evaluation.evaluate import detect_split
    from fpn.evaluation.metrics import score
    from fpn.evaluation.proposals import average_recall

    split = setup.val
    if cell.kind == "shared_fast_rcnn":
        from fpn.paper.sharing import joined

        assert cell.proposer is not None
        detector = joined(fpn.weights.load_detector(setup.folder(cell.proposer) / WEIGHTS), detector)
    else:
        split = with_proposals(cell, setup, split)
    results = detect_split(detector, split, device=str(on(setup.scale.run)), workers=setup.scale.run.get("workers"))
    if detector.proposes:
        return average_recall(split, results, kind="segm" if detector.has_masks else "bbox")
    return dict(score(split, results))


def anchors_of(detector: Detector, split: Split) -> int | None:
    """The anchors on an image of the median size, None for a detector without."""
    from fpn.data.fit import MULTIPLE, resized_sizes

    if detector.anchors is None:
        return None
    sizes = np.median(resized_sizes(split.sizes, *detector.spec.sides), axis=0)
    height, width = (-(-int(side) // MULTIPLE) * MULTIPLE for side in sizes)
    cells = sum(-(-height // 2**level) * -(-width // 2**level) for level in detector.anchors.sizes)
    return cells * detector.anchors.per_cell


def circumstances(setup: Setup) -> dict[str, Any]:
    """When, on what and with which versions."""
    from fpn import __version__

    device = on(setup.scale.run)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{cores()} cores ({platform.machine()})"
    count = setup.scale.run.get("devices", 1) * setup.scale.run.get("nodes", 1)
    return {
        "machine": name if count == 1 else f"{count} x {name}",
        "versions": {"fpn": __version__, "torch": str(torch.__version__), "python": platform.python_version()},
        "finished": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }


def tidy(folder: Path) -> None:
    """Remove what only training needs, after a cell is done: the optimizer's state, a second copy of the weights."""
    if is_main_process():
        for name in (STATE, "best.safetensors"):
            (folder / name).unlink(missing_ok=True)


def wait_for(cell: Cell, setup: Setup) -> dict[str, Any]:
    """What the main process writes of a cell; where that one fails, torchrun ends the others."""
    while (content := finished(cell, setup)) is None:
        time.sleep(1)
    return content
