"""`fpn.export`: a detector -> one file that runs without it, compared with it before it is there."""

from __future__ import annotations

import copy
import hashlib
import os
import platform
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from fpn.backends.names import check_whole
from fpn.data import Split, class_agnostic
from fpn.errors import CheckpointError, FpnError, OptionError
from fpn.evaluation.evaluate import check_classes
from fpn.exported import FORMAT, SUFFIXES, Exported, backend, load_exported
from fpn.exporting.certificate import certify
from fpn.exporting.whole import check_exportable
from fpn.model.detector import Detector
from fpn.predict import Picture, as_pixels
from fpn.weights.checkpoint import load_detector, read

PRECISIONS = {"onnx": ("fp32",), "openvino": ("fp32", "bf16", "int8"), "torch": ("fp32",)}
PACKAGES = {
    "onnx": ("torch", "torchvision", "onnx", "onnxscript", "onnxruntime"),
    "openvino": ("torch", "torchvision", "openvino"),
    "torch": ("torch", "torchvision"),
}
LICENCE = "Apache-2.0"  # of fpn itself, parts of which are in the file
NOT_STATED = "not stated; the terms of the images learnt from and of the weights begun from apply"


class Pictures(Sequence[Tensor]):
    """The pixels of pictures, each file read when it is asked for. Raises OptionError for what is none."""

    def __init__(self, pictures: Sequence[Picture], of: str):
        if not isinstance(pictures, Sequence) or isinstance(pictures, str):
            raise OptionError(f"{of} must be a list of pictures, not {type(pictures).__name__}")
        for picture in pictures if isinstance(pictures, list | tuple) else ():  # others may read files
            if not isinstance(picture, str | Path | Image.Image | np.ndarray | Tensor):
                raise OptionError(f"{of}: {type(picture).__name__} is no picture; give files or uint8 pixels")
            if isinstance(picture, np.ndarray | Tensor):
                as_pixels(picture)
        self.pictures = pictures

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return Pictures(self.pictures[place], "pictures")
        return as_pixels(self.pictures[place])


def export(
    detector: Detector | str | Path,
    out: str | Path,
    to: str | None = None,
    precision: str = "fp32",
    *,
    calibrate: Sequence[Picture] = (),
    images: Sequence[Picture] = (),
    data: Split | None = None,
    licence: str | None = None,
    progress: bool = True,
) -> Exported:
    """Write a detector, or the one in a checkpoint, as one file: from pixels of images as they are to boxes in these.

    out: its ending tells the kind as `to` does: .onnx, .xml (openvino, with a .bin beside it) or .pt2 (torch).
    precision: fp32, or of openvino also bf16 and int8.
    calibrate: for int8, pictures like those that will be met, as `fpn.predict` takes them. images, data: pictures, and
    labelled ones, to compare on besides those that fpn makes itself. licence: that of the weights, in words.

    The file is opened and compared with the detector before it takes its place; what came of that is in its `about`
    under "certificate", with class names, thresholds, versions and licences. Raises OptionError for what cannot work,
    and CheckpointError, leaving nothing, where the file differs from the detector by more than its precision explains.
    """
    out = Path(out)
    kind = kind_of(out, to)
    calibrate, images = Pictures(calibrate, "calibrate"), Pictures(images, "images")
    check_precision(kind, precision, calibrate)
    check_place(out, kind)
    before, source = given(detector)
    check_data(before, data)
    module = backend(kind)
    about = {"format": FORMAT, "kind": kind, "precision": precision, **described(before, source, licence)}
    about["versions"] = versions_of(PACKAGES[kind] + (("nncf",) if precision == "int8" else ()))
    calibrating = {"calibration": calibrate} if len(calibrate) else {}
    with beside(out) as folder:
        tell(f"writing {out.name} ({kind}, {precision}); this can take minutes", progress)
        unfinished = folder / out.name
        module.write(before, unfinished, precision, **calibrating)
        module.write_about(unfinished, about)
        certificate = certify(before, load_exported(unfinished), precision, images, data, progress)
        tell(certificate.table(), progress)
        if certificate.faults:
            raise CheckpointError(
                f"{out}: not written, the exported detector is not the original: {'; '.join(certificate.faults)}"
            )
        module.write_about(unfinished, {**about, "certificate": certificate.as_dict()})
        done = load_exported(unfinished)
    return replace(done, path=out)


def kind_of(out: Path, to: str | None) -> str:
    """The kind of file that a name stands for. Raises OptionError where it fits none, or not the one that is wanted."""
    kinds = {suffix: kind for kind, suffix in SUFFIXES.items()}
    if to is not None and to not in SUFFIXES:
        raise OptionError(f"to {to!r}: there are {', '.join(SUFFIXES)}")
    kind = kinds.get(out.suffix.lower())
    if kind is None or to not in (None, kind):
        wanted = SUFFIXES[to] if to else f"{', '.join(kinds)}"
        raise OptionError(f"{out}: the name of the file to write must end in {wanted}" + (f" for {to}" if to else ""))
    return kind


def check_precision(kind: str, precision: str, calibrate: Sequence[Tensor]) -> None:
    if precision not in PRECISIONS[kind]:
        having = [other for other, known in PRECISIONS.items() if precision in known]
        remedy = f"{precision} is for {', '.join(having)}" if having else f"there are {', '.join(PRECISIONS[kind])}"
        raise OptionError(f"precision {precision!r}: {kind} files have {', '.join(PRECISIONS[kind])}; {remedy}")
    if (precision == "int8") != bool(len(calibrate)):
        raise OptionError(
            "int8 needs images like those that will be met, to fit its steps to: add --calibrate"
            if precision == "int8"
            else f"--calibrate is for precision int8; {precision} needs none"
        )


def check_place(out: Path, kind: str) -> None:
    """Raises OptionError where writing would take the place of what is no earlier file of this name."""
    if out.is_dir():
        raise OptionError(f"{out}: is a folder; give another name with --out")
    weights = out.with_suffix(".bin")
    if kind == "openvino" and weights.exists() and not out.exists():
        raise OptionError(
            f"{weights}: is there already, of something else than {out.name}; give another name with --out"
        )


def check_data(detector: Detector, data: Split | None) -> None:
    """Raises OptionError for what a detector cannot be measured on."""
    if data is not None and not isinstance(data, Split):
        raise OptionError(f"data must be one split, such as fpn.data.load(path)['val'], not {type(data).__name__}")
    if data is not None:
        check_classes(detector, class_agnostic(data) if detector.proposes else data)


def given(detector: Detector | str | Path) -> tuple[Detector, dict[str, Any]]:
    """A copy of the detector on the CPU, in float32, and where it comes from. Raises OptionError where it cannot be."""
    source: dict[str, Any] = {}
    if isinstance(detector, Exported):
        raise OptionError(f"{detector.path} is exported already: take the checkpoint that it was made from")
    if isinstance(detector, str | Path):
        name = str(detector)
        detector = load_detector(detector)
        source = {"file": Path(name).name}
        if not name.startswith("torchvision:"):
            source["about"] = read(Path(name))[0].get("about", {})
    if not isinstance(detector, Detector):
        raise OptionError(f"a detector or the file of one is needed, not {type(detector).__name__}")
    check_whole(detector)
    check_exportable(detector)
    alone = copy.deepcopy(detector).cpu().float().eval()
    return alone, {**source, "sha256": digest_of(alone)}


def digest_of(detector: Detector) -> str:
    """The SHA-256 of the names and values of all weights."""
    state = hashlib.sha256()
    for name, value in sorted(detector.state_dict().items()):
        state.update(name.encode())
        state.update(value.detach().contiguous().view(-1).numpy().tobytes())
    return state.hexdigest()


def versions_of(packages: Sequence[str]) -> dict[str, str]:
    from fpn import __version__

    versions = {"fpn": __version__, "python": platform.python_version()}
    for package in packages:
        with suppress(PackageNotFoundError):  # the module that writes the file says what it lacks
            versions[package] = version(package)
    return versions


def described(detector: Detector, source: Mapping[str, Any], licence: str | None) -> dict[str, Any]:
    """What is written into a file about its detector, for programs and people."""
    spec = detector.spec
    limits = {name: value for name, value in spec.settings.items() if "nms" in name or "score" in name}
    return {
        "classes": list(spec.classes),
        "score": float(detector.score),
        "max_detections": int(detector.max_detections),
        "has_masks": detector.has_masks,
        "proposes": detector.proposes,
        "thresholds": limits,
        "spec": spec.as_dict(),
        "source": dict(source),
        "licence": {"code": LICENCE, "weights": licence or NOT_STATED},
    }


@contextmanager
def beside(out: Path) -> Iterator[Path]:
    """A folder to write `out` and what belongs to it into, which take their places once all is well; else it goes."""
    folder = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    made = [parent for parent in out.parents if not parent.exists()]
    try:
        folder.mkdir(parents=True)
        yield folder
        for file in sorted(folder.iterdir(), key=lambda file: file.name == out.name):  # what it is opened by comes last
            os.replace(file, out.with_name(file.name))
    except OSError as error:
        raise FpnError(f"{out}: cannot be written ({error}); what was there before is untouched") from error
    except FpnError as error:  # of the file as it is named until it is done
        raise type(error)(str(error).replace(f"{folder}{os.sep}", str(out).removesuffix(out.name))) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for parent in made:
            with suppress(OSError):  # it holds something
                parent.rmdir()


def tell(words: str, progress: bool) -> None:
    if progress:
        print(words, file=sys.stderr)
