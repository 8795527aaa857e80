"""The verb `fpn bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from fpn.errors import OptionError
from fpn.words import printable


def bench(
    checkpoint: Path,
    path: Path | None = None,
    /,
    *,
    split: str = "val",
    limit: int = 100,
    backends: list[Literal["eager", "fused", "compiled", "onnx", "openvino"]] | None = None,
    precisions: list[Literal["fp32", "bf16", "int8"]] | None = None,
    size: tuple[int, int] | None = None,
    batch: int = 1,
    repeats: int = 5,
    device: str = "auto",
    out: Path | None = None,
) -> None:
    """Measure how fast every backend runs a detector here, in how much memory, and what it costs in AP.

    Each runs in a process of its own, in turn with the detector as it is, so that what else the machine does falls on
    both. Nothing else should run meanwhile all the same.

    Parameters
    ----------
    checkpoint
        A .safetensors file written by `fpn train`, or torchvision://NAME for torchvision's published weights.
    path
        Labelled images, for AP and for images of your own: a folder in COCO, Pascal VOC or YOLO format, or a COCO JSON
        file. Its split train is what int8 is fitted to.
    split
        Which split of the data AP is of.
    limit
        Most images of it, evenly spaced.
    backends
        Some of eager, fused, compiled, onnx and openvino; all that there are when left out.
    precisions
        Some of fp32, bf16 and int8; all when left out.
    size
        Height and width of the image where there are no data; what the detector resizes images to, 2 to 3, when left
        out.
    batch
        Images at a time.
    repeats
        How often each is timed.
    device
        auto, cpu, cuda, cuda:N or mps.
    out
        Folder for bench.json, bench.md and bench.png; nothing is written when left out.
    """
    import fpn
    from fpn.benching.measure import Task
    from fpn.benching.page import about_machine, write
    from fpn.benching.run import advice, candidates, measure_all, table
    from fpn.evaluation.evaluate import check_classes
    from fpn.hardware import pick_device
    from fpn.inference.tiles import accept_large_pictures
    from fpn.weights.checkpoint import load_detector

    for name, value in (("limit", limit), ("batch", batch), ("repeats", repeats), ("size", min(size or (1, 1)))):
        if value < 1:
            raise OptionError(f"--{name} is {value}: it must be 1 or more")
    detector = load_detector(checkpoint)
    if detector.needs_regions:
        raise OptionError(f"{checkpoint}: looks at given regions only; measure a detector that finds its own")
    if detector.spec.tile:
        accept_large_pictures()
    data = fpn.data.load(path, outlines=detector.has_masks) if path is not None else None
    part = None if data is None else data[split].evenly(limit)
    if part is not None:
        check_classes(detector, fpn.data.class_agnostic(part) if detector.proposes else part)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    train = None if data is None else data.get("train")
    wanted, notes = candidates(device, train is not None)
    wanted = [
        one for one in wanted if (not backends or one[0] in backends) and (not precisions or one[1] in precisions)
    ]
    if not wanted:
        raise OptionError(f"nothing to measure: {'; '.join(notes) or 'no backend has that precision'}")
    short, long = detector.spec.sides
    sides = size or (short, min(long, short * 3 // 2))
    task = Task(checkpoint, "", "", str(pick_device(device)), part, train, sides, batch, repeats)
    rows = measure_all(task, wanted)
    where = about_machine(task, part)
    title = f"{checkpoint.name}: {detector.spec.model}, {detector.spec.backbone}"
    print(printable(f"{title}; {where}"))
    print(f"\n{table(rows)}\n")
    for note in notes:
        print(f"note: {note}")
    for words in advice(rows):
        print(f"advice: {words}")
    if out is not None:
        write(out, title, where, rows)
        print(f"written to {out}")
    if all(row.error for row in rows):
        raise OptionError("no backend could be measured; the table says why")
