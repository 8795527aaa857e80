"""The verb `fpn export`: a thin skin over `fpn.export`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal


def export(
    checkpoint: Path,
    /,
    *,
    to: Literal["onnx", "openvino", "torch"] | None = None,
    out: Path | None = None,
    precision: Literal["fp32", "bf16", "int8"] = "fp32",
    calibrate: list[Path] | None = None,
    images: list[Path] | None = None,
    data: Path | None = None,
    split: str | None = None,
    limit: int | None = None,
    licence: str | None = None,
) -> None:
    """Turn a detector into a file for another runtime, from the pixels of an image to boxes in it.

    The file is compared with the detector before it is written out as done: on images of odd sizes, 1 pixel wide, with
    nothing in them and several at once, and on yours. The differences are printed and kept in it, and `fpn eval FILE`
    looks at them again.

    Parameters
    ----------
    checkpoint
        A .safetensors file written by `fpn train`, or torchvision://NAME for torchvision's published weights.
    to
        onnx: one .onnx file, for ONNX Runtime and others. openvino: .xml and .bin, for CPUs and GPUs of Intel. torch: a
        program for this machine's kind of CPU, compiled by PyTorch (.pt2), which needs PyTorch and fpn to run. What the
        ending of --out tells when left out, else onnx.
    out
        The file to write; beside the checkpoint, or here for published weights, and named like it when left out.
    precision
        fp32 is the detector as it is. bf16 and int8, of openvino, are smaller or faster and less exact.
    calibrate
        For int8: images, folders and patterns; a few hundred images like those that will be met.
    images
        Images, folders and patterns to compare on.
    data
        Labelled images to compare on, by AP too: a folder in COCO, Pascal VOC or YOLO format, or a COCO JSON file.
    split
        Which split of the data; val when left out.
    limit
        Most images of the split, evenly spaced; all when left out.
    licence
        The licence of the weights, as you want it to stand in the file.
    """
    import fpn
    from fpn.errors import OptionError
    from fpn.exported import SUFFIXES
    from fpn.exporting.export import export as run
    from fpn.inference.sources import find_sources
    from fpn.weights.checkpoint import load_detector

    if limit is not None and limit < 1:
        raise OptionError(f"--limit is {limit}: it must be 1 or more")
    if data is None and (split is not None or limit is not None):
        raise OptionError("--split and --limit choose from labelled images: add --data")
    part = None
    if data is not None:
        part = fpn.data.load(data, outlines=load_detector(checkpoint).has_masks)[split or "val"]
        part = part if limit is None else part.evenly(limit)
    calibration, shown = (find_sources(paths or [])[0] for paths in (calibrate, images))
    name = f"{checkpoint.stem}.{precision}" if precision != "fp32" else checkpoint.stem
    folder = Path() if str(checkpoint).startswith("torchvision:") else checkpoint.parent
    out = out or folder / (name + SUFFIXES[to or "onnx"])
    made = run(checkpoint, out, to, precision, calibrate=calibration, images=shown, data=part, licence=licence)
    for note in made.about["certificate"]["notes"]:
        print(f"note: {note}")
    print(f"written to {out}")
