"""The `fpn` command: a thin skin over the functions of the same names."""

from __future__ import annotations

import os
import select
import shlex
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, Parameter
from cyclopts.config import Dict

from fpn.benching.command import bench
from fpn.data.command import data_app, tell
from fpn.errors import FpnError, OptionError
from fpn.evaluation.command import evaluate
from fpn.exporting.command import export
from fpn.help import Help
from fpn.inference.command import predict
from fpn.paper.command import paper
from fpn.serve.command import serve
from fpn.training.options import Options
from fpn.words import counted

app = App(
    name="fpn",
    help="Object detection with Feature Pyramid Networks: labelled images in, a measured detector out.",
    default_parameter=Parameter(consume_multiple=True, negative=""),
    suppress_keyboard_interrupt=False,  # `main` says what to do
    help_format="plaintext",
    help_formatter=Help(),
)
app.meta.suppress_keyboard_interrupt = False  # it does not take this over from `app`
app.command(data_app)
app.command(bench)
app.command(evaluate, name="eval")
app.command(export)
app.command(paper)
app.command(predict)
app.command(serve)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; a mistake of the user's gives one line on stderr and exit code 1, never a traceback."""
    try:
        with as_command():
            try:
                app.meta(arguments, result_action="return_value")
            except SystemExit:
                sys.stdout.flush()  # here, where a reader that has gone can still be answered for
                raise
            sys.stdout.flush()
    except FpnError as error:
        sys.exit(f"fpn: {error}")
    except KeyboardInterrupt as interrupt:
        print(f"\nfpn: interrupted{f'. {interrupt}' if str(interrupt) else ''}", file=sys.stderr)
        sys.exit(130)
    except OSError as error:  # a full disk, a folder that may not be read, a file where a folder should be
        if isinstance(error, BrokenPipeError) and reader_has_gone():
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(141)  # as shells say of a program that the signal of a broken pipe ended
        sys.exit(f"fpn: {error}")


def reader_has_gone() -> bool:
    """Whether stdout leads nowhere, as where `head` has had enough; a broken pipe may also be one to a process."""
    if not hasattr(select, "poll"):
        return True
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


@contextmanager
def as_command() -> Iterator[None]:
    """SIGTERM ends the command as Ctrl-C does, so that it tidies up; a warning is one line, without a line of code."""
    usual, before = warnings.formatwarning, None
    if threading.current_thread() is threading.main_thread():
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)

    def one_line(message: Any, category: Any, filename: str, lineno: int, line: str | None = None) -> str:
        if issubclass(category, UserWarning):
            return f"warning: {message}\n"
        return usual(message, category, filename, lineno, line)

    warnings.formatwarning = one_line
    try:
        yield
    finally:
        warnings.formatwarning = usual
        if before is not None:
            signal.signal(signal.SIGTERM, before)


@app.meta.default
def with_config(
    *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    config: Annotated[
        Path | None,
        Parameter(help="YAML file with options by verb, such as `train: {epochs: 24}`, or a run's config.yaml."),
    ] = None,
) -> None:
    app.config = () if config is None else (Dict(read_options(config), source=str(config)),)
    app(tokens, result_action="return_value")


def read_options(file: Path) -> dict[str, Any]:
    """The options by verb in a YAML file; the configuration that a run has written becomes options of `fpn train`."""
    import yaml

    if not file.is_file():
        raise OptionError(f"{file}: no such configuration file")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise OptionError(f"{file}: not YAML ({error})") from error
    if not isinstance(content, dict):
        raise OptionError(f"{file}: holds no options; it should look like `train: {{epochs: 24}}`")
    if "training" not in content or "detector" not in content:
        return content
    if not content.get("weights"):
        raise OptionError(f"{file}: of a run that was started from Python, so only Python can repeat it")
    stored = {**content["detector"], "weights": content["weights"]}
    names = {field.name: OF_SPEC.get(field.name, field.name) for field in fields(BuildOptions)}
    build = {name: stored[key] for name, key in names.items() if stored.get(key) is not None}
    if build.get("norm") == "layer":  # the only one of its neck, and no choice
        del build["norm"]
    if content.get("proposals"):
        build["proposals"] = content["proposals"]
    training = {name: value for name, value in content["training"].items() if value is not None}
    return {"train": {**build, **training}}


OF_SPEC = {"anchors": "anchor_sizes", "ratios": "anchor_ratios"}  # options whose name in `fpn.spec.Spec` is longer


Model = Literal["faster_rcnn", "mask_rcnn", "cascade_rcnn", "cascade_mask_rcnn", "retinanet", "fcos", "atss", "rpn",
                "fast_rcnn", "mask_proposals"]  # fmt: skip


@dataclass(frozen=True)
class BuildOptions:
    """What the detector is made of; what is left out fits the data and the machine.

    Parameters
    ----------
    model
        The kind of detector; faster_rcnn when left out. rpn and mask_proposals find objects without telling what they
        are; fast_rcnn looks at --proposals.
    backbone
        Such as resnet50, resnet18, mobilenet_v2, vgg16, or timm:NAME; resnet50 on a GPU and resnet18 on a CPU when left
        out.
    weights
        The backbone's: imagenet, none, or a file with its state dict. Or those of a whole detector to go on from: a
        .safetensors file of fpn, or torchvision://NAME. When left out imagenet, or none if they cannot be downloaded.
    preset
        modern (when left out), or paper for the settings of Lin et al. 2017.
    short
        Pixels of the shorter side of the resized images; 800 on a GPU and 384 on a CPU when left out.
    long
        Most pixels of the longer side; 1333 for a short side of 800, in proportion for others, when left out.
    square
        Pad images to squares.
    tile
        Learn from tiles of this many pixels a side, and look at images in them ever after; for objects that are small
        in large images.
    overlap
        The share of a tile that the next one sees too; 0.2 when left out.
    freeze
        Stages of the backbone that do not learn, 0 to 5; 2 with weights, else 0, when left out.
    neck
        How the pyramid is made; fpn when left out. simple is for plain ViTs, none takes one level of the backbone.
    levels
        The lowest and the highest level of the pyramid, such as 2 6; those of the model when left out.
    extra
        How levels above the backbone's are made: pool, max, or convolutions from p5 or c5; as the model does when left
        out.
    repeats
        Layers of a neck that repeats itself.
    width
        Channels of the pyramid; 256 when left out.
    norm
        Norm in the pyramid; as the neck has it when left out.
    fuse
        How the pyramid merges lateral and top-down maps; sum when left out.
    anchors
        Sides of the square anchors, one a level, in pixels of the resized image; 32 64 128 256 512 on P2 to P6 when
        left out.
    ratios
        Heights over widths of the anchors; 0.5 1 2 when left out.
    """

    model: Model | None = None
    backbone: str | None = None
    weights: str | None = None
    preset: Literal["modern", "paper"] | None = None
    short: int | None = None
    long: int | None = None
    square: bool | None = None
    tile: int | None = None
    overlap: float | None = None
    freeze: int | None = None
    neck: Literal["fpn", "pafpn", "bifpn", "nas_fpn", "simple", "none"] | None = None
    levels: tuple[int, int] | None = None
    extra: Literal["pool", "max", "p5", "c5"] | None = None
    repeats: int | None = None
    width: int | None = None
    norm: Literal["none", "batch", "group"] | None = None
    fuse: Literal["sum", "average"] | None = None
    anchors: list[float] | None = None
    ratios: list[float] | None = None


@app.command
def train(
    path: Path,
    /,
    *,
    out: Path | None = None,
    parts: Annotated[BuildOptions, Parameter(name="*")] = BuildOptions(),
    options: Annotated[Options, Parameter(name="*")] = Options(),  # noqa: B008
    proposals: list[Path] | None = None,
    resume: bool = False,
) -> None:
    """Train a detector on a data set and measure it after every epoch.

    Parameters
    ----------
    path
        A folder in COCO, Pascal VOC or YOLO format, or a COCO JSON file.
    out
        Folder for checkpoints and logs; runs/NAME-OF-DATA when left out.
    proposals
        For fast_rcnn: files with the regions to look at, of the train and of the val split, as `fpn eval --out` writes
        them for an rpn.
    resume
        Go on with the run in --out where it was stopped or killed, with its own options.
    """
    import torch

    import fpn
    from fpn.build import from_spec
    from fpn.data.regions import attach
    from fpn.hardware import is_main_process
    from fpn.inference.tiles import accept_large_pictures
    from fpn.spec import Spec
    from fpn.training.resume import STATE
    from fpn.training.settings import check
    from fpn.training.train import read_config
    from fpn.weights.checkpoint import is_detector

    if resume and out is None:
        raise OptionError("--resume needs --out, the folder of the run that is to go on")
    stored = read_config(out) if resume and out is not None else {}
    weights = parts.weights
    source = fpn.weights.load_detector(weights) if weights is not None and is_detector(weights) else None
    model = stored["detector"]["model"] if resume else source.spec.model if source else parts.model or "faster_rcnn"
    if parts.tile or (source and source.spec.tile) or (resume and stored["detector"].get("tile")):
        accept_large_pictures()
    data = fpn.data.load(path, outlines="mask" in model)
    tell(data)
    regions = stored.get("proposals", []) if resume else [str(file) for file in proposals or ()]
    if regions and model != "fast_rcnn":
        raise OptionError(f"--proposals is for --model fast_rcnn; {model} finds its own")
    data = attach(data, regions)
    out = out or default_folder(path)
    chosen = asdict(options)
    if resume:
        if parts != BuildOptions() or proposals:
            raise OptionError("a run that is resumed keeps its detector and proposals; leave out these options")
        detector, weights = from_spec(Spec.from_dict(stored["detector"])), stored.get("weights")
        chosen = {name: value for name, value in chosen.items() if value != getattr(Options(), name)}
    else:
        check(**chosen)
        torch.manual_seed(options.seed)
        detector, weights = first_build(data, parts, options.device, source)
    config = {"data": str(path), "weights": weights, **({"proposals": regions} if regions else {})}
    try:
        run = fpn.train(detector, data, out=out, resume=resume, config=config, **chosen)
    except KeyboardInterrupt:
        if not is_main_process() or not (out / STATE).is_file():
            raise
        again = shlex.join(["fpn", "train", str(path), "--out", str(out), "--resume"])
        sys.exit(f"\nfpn: interrupted. To go on from here: {again}")
    if is_main_process():
        best = run.history[run.best_epoch - 1]
        main = next((name for name in ("AP", "mask_AR1000", "AR1000") if name in best), None)
        print(f"best epoch {run.best_epoch}" + (f", {main} {best[main]:.3f}" if main else "") + f": {run.best}")


def first_build(data: Any, parts: BuildOptions, device: str, source: Any = None):
    """A detector for the data, with ImageNet weights unless told otherwise, and which weights it got.

    source: the detector that it goes on from, where the weights are those of a whole one. Without internet it goes on
    from scratch, and says so.
    """
    import fpn
    from fpn.data.fit import caps, default_short
    from fpn.errors import CheckpointError
    from fpn.hardware import pick_device
    from fpn.spec import Spec, all_settings, class_of

    target = pick_device(device)
    given = {OF_SPEC.get(name, name): value for name, value in asdict(parts).items() if value is not None}
    weights = given.pop("weights", None)
    if source is not None:
        tuned = fpn.weights.adapt(source, data.classes, **{**caps(data, source.spec.settings), **given})
        print(f"note: {weights}: {tuned}", file=sys.stderr)
        return tuned.detector, weights
    fitting = {"backbone": "resnet18" if target.type == "cpu" else "resnet50", "short": default_short(target)}
    model = given.get("model", "faster_rcnn")
    classes = None if class_of(model).proposes else tuple(data.classes)
    usual = all_settings(Spec(model, classes or (), neck=given.get("neck", "fpn")))
    options = {**fitting, **caps(data, usual), **given, "classes": classes}
    try:
        return fpn.build(weights=weights or "imagenet", **options), weights or "imagenet"
    except CheckpointError as error:
        if weights is not None:
            raise
        print(f"warning: {error}.\nwarning: training from scratch, which needs far more data and time", file=sys.stderr)
        return fpn.build(weights="none", **options), "none"


def default_folder(path: Path) -> Path:
    """runs/NAME-OF-DATA, or the next that is free.

    The processes that Lightning starts for further devices run the command again; they get the folder of the first.
    """
    from fpn.hardware import is_main_process

    if is_main_process():
        os.environ["FPN_OUT"] = str(free_folder(Path("runs"), path.resolve().stem))
    if "FPN_OUT" not in os.environ:
        raise OptionError("a run on several machines needs --out, a folder that all of them see")
    return Path(os.environ["FPN_OUT"])


def free_folder(parent: Path, name: str) -> Path:
    """parent/name, or parent/name-2 and so on where that is taken."""
    folder, n = parent / name, 1
    while folder.exists():
        n += 1
        folder = parent / f"{name}-{n}"
    return folder


@app.command
def convert(
    checkpoint: str,
    /,
    *,
    out: Path,
    classes: list[str] | None = None,
    short: int | None = None,
    long: int | None = None,
) -> None:
    """Turn a detector of torchvision, detectron2 or mmdetection into one of fpn, or one of fpn into torchvision's.

    Parameters
    ----------
    checkpoint
        A .pth or .pkl file of theirs, torchvision://NAME for torchvision's published weights, or a .safetensors of fpn.
    out
        The file to write: .safetensors for fpn, .pth for a state dict of torchvision's model.
    classes
        Names of the classes, without background, in the checkpoint's order, where it does not hold them.
    short
        Pixels of the shorter side of the images that it was trained on, where that is not their library's usual.
    long
        Most pixels of their longer side.
    """
    from fpn.weights.convert import convert_file

    sides = {name: side for name, side in (("short", short), ("long", long)) if side is not None}
    detector, source = convert_file(checkpoint, out, classes, **sides)
    spec = detector.spec
    print(f"from {source}: {spec.model}, {spec.backbone}, {counted(len(spec.classes), 'class', 'classes')}")
    print("images: shorter side {}, longer at most {}; --short and --long change that".format(*spec.sides))
    print(f"written to {out}")


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
