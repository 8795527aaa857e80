"""The `fpn` command: a thin skin over the functions of the same names."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, Parameter
from cyclopts.config import Yaml

from fpn.errors import FpnError, OptionError
from fpn.training.settings import Options

app = App(
    name="fpn", help="Object detection with Feature Pyramid Networks: labelled images in, a measured detector out."
)
data_app = App(name="data", help="Look at a data set.")
app.command(data_app)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; a mistake of the user's gives one line on stderr and exit code 1, never a traceback."""
    try:
        app.meta(arguments, result_action="return_value")
    except FpnError as error:
        sys.exit(f"fpn: {error}")
    except KeyboardInterrupt:
        print("\nfpn: interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader, such as head, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@app.meta.default
def with_config(
    *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    config: Annotated[
        Path | None, Parameter(help="YAML file with options by verb, such as `train: {epochs: 24}`.")
    ] = None,
) -> None:
    if config is not None:
        if not config.is_file():
            raise OptionError(f"{config}: no such configuration file")
        app.config = Yaml(config, must_exist=True)
    app(tokens, result_action="return_value")


@data_app.command(name="info")
def data_info(path: Path, /, *, as_json: Annotated[bool, Parameter(name="--json", negative="")] = False) -> None:
    """Format, splits, classes, sizes of images and boxes, and defects of a data set.

    Parameters
    ----------
    path
        A folder in COCO, Pascal VOC or YOLO format, or a COCO JSON file.
    as_json
        Print JSON for other programs.
    """
    from fpn import data

    description = data.describe(data.load(path))
    if as_json:
        print(json.dumps(description, indent=2, ensure_ascii=False))
    else:
        data.print_info(description)


@app.command
def train(
    path: Path,
    /,
    *,
    out: Path | None = None,
    model: Literal["faster_rcnn"] = "faster_rcnn",
    backbone: str | None = None,
    weights: str | None = None,
    preset: Literal["modern", "paper"] = "modern",
    short: int | None = None,
    long: int | None = None,
    freeze: int | None = None,
    width: int = 256,
    norm: Literal["none", "batch", "group"] = "none",
    fuse: Literal["sum", "average"] = "sum",
    anchors: Annotated[list[float], Parameter(consume_multiple=True, negative="")] = [32, 64, 128, 256, 512],  # noqa: B006
    options: Annotated[Options, Parameter(name="*")] = Options(),  # noqa: B008
    resume: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Train a detector on a data set and measure it after every epoch.

    Parameters
    ----------
    path
        A folder in COCO, Pascal VOC or YOLO format, or a COCO JSON file.
    out
        Folder for checkpoints and logs; runs/NAME-OF-DATA when left out.
    model
        The kind of detector.
    backbone
        Such as resnet50, resnet18, mobilenet_v2, vgg16; resnet50 on a GPU and resnet18 on a CPU when left out.
    weights
        The backbone's: imagenet, none, or a file with the state dict of torchvision's model. When left out imagenet, or
        none if they cannot be downloaded.
    preset
        modern, or paper for the settings of Lin et al. 2017.
    short
        Pixels of the shorter side of the resized images; 800 on a GPU and 384 on a CPU when left out.
    long
        Most pixels of the longer side; 1333 for a short side of 800, in proportion for others.
    freeze
        Stages of the backbone that do not learn, 0 to 5; 2 with weights, else 0.
    width
        Channels of the pyramid.
    norm
        Norm in the pyramid.
    fuse
        How the pyramid merges lateral and top-down maps.
    anchors
        Sides of the square anchors on P2 to P6, in pixels of the resized image.
    resume
        Go on with the run in --out from its last whole epoch, with its own options.
    """
    import fpn
    from fpn.build import Spec, from_spec
    from fpn.hardware import pick_device

    data = fpn.data.load(path, seed=options.seed)
    tell(data)
    if resume:
        stored = read_config(out)
        detector = from_spec(Spec.from_dict(stored["detector"]))
        chosen = stored["training"]
    else:
        small = pick_device(options.device).type == "cpu"
        detector = first_build(
            weights,
            model=model,
            backbone=backbone or ("resnet18" if small else "resnet50"),
            classes=data.classes,
            preset=preset,
            short=short or (384 if small else 800),
            long=long,
            freeze=freeze,
            width=width,
            norm=norm,
            fuse=fuse,
            anchor_sizes=anchors,
        )
        chosen = asdict(options)
    out = out or free_folder(Path("runs"), path.resolve().stem)
    try:
        run = fpn.train(detector, data, out=out, resume=resume, config={"data": str(path)}, **chosen)
    except KeyboardInterrupt:
        sys.exit(f"\nfpn: interrupted. To go on from the last whole epoch: fpn train {path} --out {out} --resume")
    best = run.history[run.best_epoch - 1]
    print(f"best epoch {run.best_epoch}" + (f", AP {best['AP']:.3f}" if "AP" in best else "") + f": {run.best}")


def first_build(weights: str | None, **options: Any):
    """Build with ImageNet weights unless told otherwise; without internet go on from scratch, and say so."""
    import fpn
    from fpn.errors import CheckpointError

    try:
        return fpn.build(weights=weights or "imagenet", **options)
    except CheckpointError as error:
        if weights is not None:
            raise
        print(f"warning: {error}.\nwarning: training from scratch, which needs far more data and time", file=sys.stderr)
        return fpn.build(weights="none", **options)


def tell(data: Any) -> None:
    """What reading the data decided and left out, on stderr."""
    for note in data.notes:
        print(f"note: {note}", file=sys.stderr)
    shown = data.problems[:10]
    for problem in shown:
        print(f"warning: {problem}", file=sys.stderr)
    if len(data.problems) > len(shown):
        print(f"warning: and {len(data.problems) - len(shown)} more; see fpn data info {data.path}", file=sys.stderr)


def read_config(out: Path | None) -> dict[str, Any]:
    import yaml

    if out is None:
        raise OptionError("--resume needs --out with the folder of the run to go on with")
    file = out / "config.yaml"
    if not file.is_file():
        raise OptionError(f"{file}: not there, so there is no run to resume in {out}")
    return yaml.safe_load(file.read_text(encoding="utf-8"))


def free_folder(parent: Path, name: str) -> Path:
    """parent/name, or parent/name-2 and so on where that is taken."""
    folder, n = parent / name, 1
    while folder.exists():
        n += 1
        folder = parent / f"{name}-{n}"
    return folder


@app.command(name="eval")
def evaluate(
    checkpoint: Path,
    path: Path,
    /,
    *,
    split: str = "val",
    out: Path | None = None,
    batch: int = 4,
    device: str = "auto",
    workers: int | None = None,
) -> None:
    """Measure a detector on labelled images: the 12 COCO numbers, and AP of every class.

    Parameters
    ----------
    checkpoint
        A .safetensors file written by `fpn train`.
    path
        A folder in COCO, Pascal VOC or YOLO format, or a COCO JSON file.
    split
        Which split of the data.
    out
        Folder for metrics.json and predictions.json (COCO results); nothing is written when left out.
    batch
        Images at a time.
    device
        auto, cpu, cuda, cuda:N or mps.
    workers
        Processes that load images; one a core up to 4 when left out.
    """
    import fpn
    from fpn.evaluation.evaluate import detect_split
    from fpn.evaluation.metrics import score, to_coco

    detector = fpn.load(checkpoint)
    data = fpn.data.load(path)
    tell(data)
    part = data[split]
    results = detect_split(detector, part, batch=batch, device=device, workers=workers)
    metrics = score(part, results, max(100, detector.max_detections))
    print(metrics.table())
    for note in metrics.notes:
        print(f"note: {note}")
    if out is not None:
        about = {"checkpoint": str(checkpoint), "data": str(path), "split": split, "images": len(results.images)}
        write_json(out / "metrics.json", {**about, **metrics.as_dict()})
        write_json(out / "predictions.json", to_coco(part, results))
        print(f"written to {out}")


@app.command
def predict(
    checkpoint: Path,
    /,
    *inputs: Path,
    out: Path = Path("predictions"),
    threshold: float = 0.5,
    device: str = "auto",
) -> None:
    """Detect objects in images; write annotated pictures and predictions.json.

    Parameters
    ----------
    checkpoint
        A .safetensors file written by `fpn train`.
    inputs
        Images, folders (searched through) and glob patterns.
    out
        Folder for the results.
    threshold
        Lowest score of a detection that is shown and written, 0 to 1.
    device
        auto, cpu, cuda, cuda:N or mps.
    """
    from tqdm import tqdm

    import fpn
    from fpn.drawing import draw
    from fpn.errors import ImageError
    from fpn.predict import find_pictures

    detector = fpn.load(checkpoint)
    if not inputs:
        raise OptionError("nothing to look at: name images, folders or patterns after the checkpoint")
    rows, unreadable, taken = [], 0, set()
    for file in tqdm(find_pictures(inputs), desc="detecting", unit=" images", disable=None):
        try:
            image = fpn.data.read_image(file)
        except ImageError as error:
            tqdm.write(f"skipped: {error}", sys.stderr)
            unreadable += 1
            continue
        found = fpn.predict(detector, image, threshold, device)
        picture = draw(image, found.boxes, found.labels, found.scores, found.classes)
        save_picture(picture, out / free_name(file.stem, taken))
        rows.append(row_of(file, image, found))
    write_json(out / "predictions.json", {"checkpoint": str(checkpoint), "threshold": threshold, "images": rows})
    objects = sum(len(row["detections"]) for row in rows)
    print(f"{objects} objects in {len(rows)} images: {out}")
    if unreadable:
        sys.exit(f"fpn: {unreadable} files could not be read; they are named above")


def row_of(file: Path, image: Any, found: Any) -> dict[str, Any]:
    """One image of predictions.json; box is x1, y1, x2, y2 in pixels of the image as it is displayed."""
    detections = [
        {"class": name, "score": round(score, 5), "box": [round(side, 2) for side in box], "level": level}
        for name, score, box, level in zip(
            found.names, found.scores.tolist(), found.boxes.tolist(), found.levels.tolist(), strict=True
        )
    ]
    return {"file": str(file), "height": image.shape[1], "width": image.shape[2], "detections": detections}


def free_name(stem: str, taken: set[str]) -> str:
    """A file name for the picture: images of the same name from different folders must not overwrite each other."""
    name, n = f"{stem}.jpg", 1
    while name.lower() in taken:
        n += 1
        name = f"{stem}-{n}.jpg"
    taken.add(name.lower())
    return name


def save_picture(picture: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.tmp")
    picture.save(unfinished, format="JPEG", quality=92)
    os.replace(unfinished, path)


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.tmp")
    unfinished.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    os.replace(unfinished, path)


@app.command
def demo(*, out: Path = Path("runs/demo")) -> None:
    """The whole way on generated images: make data, train, evaluate, predict, report. About 6 minutes on two cores.

    Parameters
    ----------
    out
        Folder for everything that comes of it; begin with report.html.
    """
    from fpn.demo import run_demo

    run_demo(out)


if __name__ == "__main__":
    main()
