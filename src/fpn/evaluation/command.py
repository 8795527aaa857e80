"""The verb `fpn eval`: a thin skin over `detect_split` and `score_for`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from fpn.backends.names import Backend, Precision
from fpn.data.command import tell
from fpn.errors import OptionError
from fpn.writing import write_json

if TYPE_CHECKING:
    from fpn.exported import Exported
    from fpn.model.detector import Detector


def evaluate(
    checkpoint: Path,
    path: Path,
    /,
    *,
    split: str = "val",
    out: Path | None = None,
    pyramid: bool = False,
    proposals: Path | None = None,
    tile: int | None = None,
    overlap: float | None = None,
    tta: bool = False,
    batch: int = 4,
    device: str = "auto",
    backend: Backend = "auto",
    precision: Precision = "fp32",
    workers: int | None = None,
) -> None:
    """Measure a detector on labelled images: the 12 COCO numbers, and AP of every class.

    Of a detector that finds objects without telling their classes: average recall with 100 and 1000 proposals.

    Parameters
    ----------
    checkpoint
        A .safetensors file written by `fpn train`, or what `fpn export` has made of one; of such a file it is also
        confirmed that it does here what it did when it was exported.
    path
        A folder in COCO, Pascal VOC or YOLO format, or a COCO JSON file.
    split
        Which split of the data.
    out
        Folder for metrics.json and predictions.json (COCO results), and proposals.safetensors of an rpn; nothing is
        written when left out.
    pyramid
        Tell what each level of the pyramid is given and finds, with advice; in --out as pyramid.html with pictures.
    proposals
        For fast_rcnn: file with the regions to look at, see `fpn train`.
    tile
        Look at images in tiles with this side in pixels; 0: never, also where the detector was trained on tiles.
    overlap
        Share of a tile that the next one sees too, 0 to 0.9; 0.2 when left out.
    tta
        Look at each image in three sizes and mirrored, and fuse what is found.
    batch
        Images at a time.
    device
        auto, cpu, cuda, cuda:N or mps.
    backend
        What runs the detector of a checkpoint: auto, eager, fused, compiled, onnx or openvino; see `fpn predict`.
    precision
        fp32, or bf16 for what the detector is worth in that.
    workers
        Processes that load images; one a core up to 4 when left out.
    """
    import fpn
    from fpn.evaluation.evaluate import detect_split, score_for
    from fpn.evaluation.metrics import to_coco
    from fpn.evaluation.pyramid import Watch
    from fpn.evaluation.pyramid_page import pyramid_report
    from fpn.exported import Exported, is_exported
    from fpn.inference.command import finder_of, loaded
    from fpn.inference.tiles import accept_large_pictures

    if pyramid and backend not in ("auto", "eager", "fused"):
        raise OptionError(
            f"--pyramid looks into the detector, where backend {backend} cannot be looked into: leave it out"
        )
    detector = loaded(checkpoint, device, backend, precision)
    if proposals is not None and not detector.needs_regions:
        raise OptionError(f"--proposals is for detectors that look at given regions; {checkpoint} finds its own")
    find, looked_at = None, tile is not None or overlap is not None or tta
    if looked_at and detector.needs_regions:
        raise OptionError("--tile, --overlap and --tta are for detectors that find regions by themselves")
    if looked_at and not pyramid:
        find = finder_of(detector, device, tile, overlap, tta)
    elif detector.spec.tile:
        accept_large_pictures()
    data = fpn.data.load(path, outlines=detector.has_masks)
    tell(data)
    part = data[split] if proposals is None else fpn.data.with_regions(data[split], proposals)
    part = fpn.data.class_agnostic(part) if detector.proposes else part
    whole = not (detector.spec.tile if tile is None else tile) and overlap is None and not tta
    watch = Watch(watchable(detector, whole), part) if pyramid else None
    detect = watch.detect if watch else None
    results = detect_split(detector, part, batch=batch, device=device, workers=workers, detect=detect, find=find)
    metrics = score_for(detector, part, results)
    print(metrics.table())
    for note in metrics.notes:
        print(f"note: {note}")
    if isinstance(detector, Exported) and is_exported(checkpoint):
        from fpn.exporting.certificate import confirm

        print(f"\n{confirm(detector, part, metrics if find is None else None)}")
    if watch is not None:
        report = pyramid_report(watch.detector, part, results, watch, out, title=f"{checkpoint.name} on {split}")
        print(f"\n{report.table()}\n")
        for advice in report.advice:
            print(f"advice: {advice}")
    if out is not None:
        about = {"checkpoint": str(checkpoint), "data": str(path), "split": split, "images": len(results.images)}
        about |= {"backend": detector.backend, "precision": detector.precision}
        write_json(out / "metrics.json", {**about, **metrics.as_dict()})
        write_json(out / "predictions.json", to_coco(part, results))
        if detector.proposes:
            fpn.data.write_regions(out / "proposals.safetensors", part, results)
        print(f"written to {out}")


def watchable(detector: Detector | Exported, on_whole_images: bool) -> Detector:
    """For --pyramid. Raises OptionError where the levels of the pyramid cannot be looked at."""
    from fpn.exported import Exported

    if isinstance(detector, Exported):
        raise OptionError(f"--pyramid looks into the detector: take the checkpoint that {detector.path} was made from")
    if not on_whole_images:
        raise OptionError(
            "--pyramid looks at whole images as they are: leave --overlap and --tta out, and where the detector was "
            "trained on tiles give --tile 0"
        )
    detector.spec = replace(detector.spec, tile=None)
    return detector
