"""The verb `fpn predict`: a thin skin over `predict_files` and `predict_video`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from fpn.backends.names import Backend, Precision
from fpn.errors import OptionError
from fpn.words import counted, printable

if TYPE_CHECKING:
    from fpn.exported import Exported
    from fpn.inference.finder import Finder
    from fpn.model.detector import Detector


def predict(
    checkpoint: Path,
    /,
    *inputs: Path,
    out: Path = Path("predictions"),
    threshold: float = 0.5,
    output: Annotated[list[Literal["json", "coco", "csv", "yolo", "grid"]] | None, Parameter(name="--format")] = None,
    pictures: Annotated[bool, Parameter(negative="--no-pictures")] = True,
    batch: int = 4,
    tile: int | None = None,
    overlap: float | None = None,
    tta: bool = False,
    track: bool = False,
    device: str = "auto",
    backend: Backend = "auto",
    precision: Precision = "fp32",
    workers: int | None = None,
) -> None:
    """Detect objects in images and videos; write annotated pictures and predictions.json.

    Many images are no matter: what is done is kept as it comes, and the same command goes on where it was stopped. On
    8 GPUs: torchrun --nproc-per-node 8 -m fpn.cli predict ...

    Parameters
    ----------
    checkpoint
        A .safetensors file written by `fpn train`, or what `fpn export` has made of one.
    inputs
        Images, folders (searched through for images), videos, webcam:0 and glob patterns.
    out
        Folder for the results.
    threshold
        Lowest score of a detection that is shown and written, 0 to 1.
    output
        json: predictions.json (when left out). coco: coco.json, a data set whose annotations have a score. csv:
        predictions.csv, a line a detection. yolo: labels/*.txt. grid: pages of small pictures. Several may be given.
    pictures
        Write each image, or video, with its boxes.
    batch
        Images at a time.
    tile
        Look at large images in tiles with this side in pixels; 0: never, also where the detector was trained on tiles.
    overlap
        Share of a tile that the next one sees too, 0 to 0.9; 0.2 when left out.
    tta
        Look at each image in three sizes and mirrored, and fuse what is found: better boxes, in several times the time.
    track
        Follow objects through a video; each gets a number.
    device
        auto, cpu, cuda, cuda:N or mps.
    backend
        What runs the detector of a checkpoint. auto: the fastest that needs no waiting; eager: the detector as it was
        trained; fused: batch norms folded into convolutions; compiled: by torch.compile, a minute for each new image
        size; onnx, openvino: as `fpn export` does it, with the extra of that name.
    precision
        fp32: the same results but for rounding. bf16: twice as fast or more where the device has arithmetic for it.
    workers
        Threads that read and draw images; one a core up to 4 when left out.
    """
    if not inputs:
        raise OptionError("nothing to look at: name images, folders, videos or patterns after the checkpoint")
    from fpn.inference.journal import journals
    from fpn.inference.sources import check_apart, find_sources
    from fpn.inference.stream import check, predict_files

    formats = output or ["json"]
    check(threshold, batch, formats)
    if pictures or "grid" in formats:
        check_apart(inputs, out)
    files, videos = find_sources(inputs, out)
    if track and not videos:
        raise OptionError("--track is for videos, and there is none among the inputs")
    if output is not None and not files:
        raise OptionError("--format is for images, and there are only videos among the inputs")
    detector = loaded(checkpoint, device, backend, precision)
    find = finder_of(detector, device, tile, overlap, tta)
    given = {"tile": tile, "overlap": overlap, "tta": tta or None}
    given |= {
        "backend": None if backend == "auto" else backend,
        "precision": None if precision == "fp32" else precision,
    }
    about = {"checkpoint": str(checkpoint), **{name: value for name, value in given.items() if value is not None}}
    unreadable: tuple[str, ...] = ()
    if files:
        try:
            done = predict_files(
                find, files, out, classes=detector.classes, threshold=threshold, batch=batch, formats=formats,
                pictures=pictures, about=about, version=version_of(checkpoint), workers=workers,
            )  # fmt: skip
        except KeyboardInterrupt:
            if not journals(out):
                raise
            sys.exit("\nfpn: interrupted. What is done is kept: the same command goes on from here")
        if done is not None:
            print(printable(f"{counted(done.objects, 'object')} in {counted(done.images, 'image')}: {out}"))
            unreadable = done.unreadable
    if videos:
        unreadable += predict_videos(
            find, videos, out, threshold, track=track, batch=batch, pictures=pictures, about=about
        )
    if unreadable:
        sys.exit(f"fpn: {len(unreadable)} files could not be read; they are named above")


def loaded(checkpoint: Path, device: str, backend: str, precision: str) -> Detector | Exported:
    """What detects, on the device of this process; which backend that is, is said."""
    import fpn
    from fpn.backends.choose import described
    from fpn.exported import is_exported
    from fpn.hardware import is_main_process
    from fpn.inference.shards import own_device

    on = "cpu" if is_exported(checkpoint) else own_device(device)
    detector = fpn.load(checkpoint, on, backend=backend, precision=precision)
    if is_main_process():
        print(printable(f"{checkpoint.name}: {described(detector)}"), file=sys.stderr)
    return detector


def finder_of(detector: Detector | Exported, device: str, tile: int | None, overlap: float | None, tta: bool) -> Finder:
    """The detector as a function of images, on the device of this process."""
    from fpn.exported import Exported
    from fpn.inference.finder import finder
    from fpn.inference.shards import own_device
    from fpn.inference.tiles import accept_large_pictures
    from fpn.inference.views import augmented

    if detector.spec.tile if tile is None else tile:
        accept_large_pictures()
    device = device if isinstance(detector, Exported) else own_device(device)
    return (augmented if tta else finder)(detector, device, tile=tile, overlap=overlap)


def version_of(checkpoint: Path) -> list[int] | None:
    """What changes when another detector is written to the same file."""
    if not checkpoint.exists():  # torchvision://NAME
        return None
    status = checkpoint.stat()
    return [status.st_size, status.st_mtime_ns]


def predict_videos(find: Finder, videos: Sequence[str], out: Path, threshold: float, **options: Any) -> tuple[str, ...]:
    """One after the other; processes that torchrun has started have some each. Those that cannot be read come back.

    Only the first process is told of them, once all are done: one that ends with an error ends the others.
    """
    from fpn.errors import DataError
    from fpn.inference.shards import shard
    from fpn.inference.video import predict_video

    unreadable: list[str] = []
    with shard() as own:
        for video, name in video_names(videos, out)[own.rank :: own.world]:
            try:
                seen = predict_video(find, video, out, threshold, name=name, **options)
            except DataError as error:
                print(f"skipped: {error}", file=sys.stderr)
                unreadable.append(video)
                continue
            for note in seen.notes:
                print(f"note: {note}", file=sys.stderr)
            tracks = f", {counted(seen.tracks, 'track')}" if seen.tracks is not None else ""
            found = f"{counted(seen.objects, 'object')} in {counted(seen.frames, 'frame')}{tracks}"
            print(printable(f"{video}: {found}: {out}"))
        unreadable = own.gathered(unreadable)
    return () if own.rank else tuple(unreadable)


def video_names(videos: Sequence[str], out: Path) -> list[tuple[str, str]]:
    """Each video with the name of its results, none of which takes the place of other results or of a video."""
    from fpn.inference.stream import free_name

    taken = {"predictions", "coco"}
    taken |= {Path(video).stem.lower() for video in videos if Path(video).resolve().parent == out.resolve()}
    return [(video, free_name(Path(video).stem.replace(":", "-"), taken)) for video in videos]
