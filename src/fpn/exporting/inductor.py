"""Detectors as .pt2 files: compiled by torch's AOTInductor for this kind of processor, run by torch.

Such a file is a program. Opening one runs what its maker put into it, as with any program; reading what it says of
itself does not.
"""

from __future__ import annotations

import json
import logging
import lzma
import platform
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import UInt8
from torch import Tensor, nn
from torch.fx.experimental import _config as tracing

from fpn.data.sizes import resized_size
from fpn.errors import CheckpointError, OptionError
from fpn.exported import about_in
from fpn.exporting.whole import MULTIPLE, Whole, exportable, outputs_of, reason
from fpn.inference.finder import detect_original
from fpn.model.detector import Detector
from fpn.structures import Batch
from fpn.writing import replacing

KEY = "fpn"  # of what is said about a detector; both are files in the archive, which is a zip
ABOUT, RUNS = f"extra/{KEY}.json", f"extra/{KEY}_runs.json"
LONGEST = 2**24  # bytes of them that are read
AGAIN = "export the detector again, on the machine that is to run it"
DAMAGED = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, NotImplementedError, EOFError)  # of an archive
CAPABILITIES = ("DEFAULT", "AVX2", "AVX512")  # of processors as torch calls them; each can what those before it can


class Framed(nn.Module):
    """`fpn.exporting.whole.Whole` with the size that images are brought to given, as that of an input of any content.

    From images, uint8 (B, 3, H, W), and a frame, uint8 (h, w). A size that the program itself computes from numbers in
    tensors is one of which torch's compiler knows too little: it lays out convolutions wrongly (torch 2.15).
    """

    def __init__(self, detector: Detector):
        super().__init__()
        self.detector = Whole(detector).detector

    def forward(self, images: UInt8[Tensor, "B 3 H W"], frame: UInt8[Tensor, "h w"]) -> dict[str, Tensor]:
        (height, width), square = frame.shape, self.detector.spec.square_side
        below, right = (-side % MULTIPLE if square is None else square - side for side in (height, width))
        pixels = F.interpolate(images, size=(height, width), mode="bilinear", antialias=True)
        pixels = F.pad(pixels, (0, right, 0, below))
        one = torch.ones_like(images[:, 0, 0, 0], dtype=torch.int64)
        sizes = torch.stack([one * height, one * width], dim=1)
        originals = torch.stack([one * images.shape[2], one * images.shape[3]], dim=1)
        found = detect_original(self.detector, Batch(pixels, sizes, originals, one))
        return outputs_of(found)


def write(detector: Detector, path: str | Path, precision: str = "fp32", calibration: Sequence[Tensor] = ()) -> None:
    """Compile the whole detector, see `Framed`, for any number of images of any size; this takes minutes.

    The file runs where torch does, and where `fpn` is imported, on processors like this one. Raises OptionError for
    what cannot work.
    """
    path = Path(path)
    if path.suffix.lower() != ".pt2":
        raise OptionError(f"{path}: the name of a file of torch must end in .pt2")
    if precision != "fp32" or len(calibration):
        raise OptionError(f"precision {precision}: files of torch have fp32; export to openvino for bf16 or int8")
    runs = {"sides": detector.spec.sides, "square": detector.spec.square_side, "processor": processor()}
    program = program_of(detector)
    with replacing(path) as unfinished:
        made = unfinished.with_suffix(".pt2")  # torch goes by the ending
        try:
            with quiet(), torch.no_grad():
                torch._inductor.aoti_compile_and_package(program, package_path=str(made))
            put(made, unfinished, {RUNS: json.dumps(runs)})
        except (RuntimeError, OSError) as error:
            raise OptionError(
                f"{path}: torch could not compile the detector ({reason(error)}); is there a C++ compiler, such as g++?"
            ) from error
        finally:
            made.unlink(missing_ok=True)


def program_of(detector: Detector) -> torch.export.ExportedProgram:
    images, frame = torch.zeros((3, 3, 97, 163), dtype=torch.uint8), torch.zeros((90, 150), dtype=torch.uint8)
    free = torch.export.Dim.DYNAMIC
    shapes = {"images": {0: free, 2: free, 3: free}, "frame": {0: free, 1: free}}
    # Else a side of 1 would be something else than a side of more.
    oblivious = tracing.patch(backed_size_oblivious=True)  # pyright: ignore[reportAttributeAccessIssue]
    with torch.no_grad(), oblivious, exportable(detector):
        return torch.export.export(Framed(detector.eval()), (images, frame), dynamic_shapes=shapes, strict=False)


def open_(path: str | Path, threads: int | None = None) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """The file as a function: images, uint8 (B, 3, H, W), to what `fpn.exporting.whole.Whole` gives of them.

    This runs the program in the file. threads: of the CPU, for all of torch. Raises CheckpointError for a file that
    torch cannot run here.
    """
    import fpn.model.nms
    import fpn.model.roi  # noqa: F401 - the operators that the program calls

    path = Path(path)
    try:
        runs = json.loads(entry(path, RUNS))
        short, long, needs = int(runs["sides"][0]), int(runs["sides"][1]), str(runs["processor"])
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}: what it says of itself is damaged ({error}); {AGAIN}") from error
    if not runs_on(needs, processor()):
        raise CheckpointError(f"{path}: compiled for a processor with {needs}, this one has {processor()}; {AGAIN}")
    if threads:
        torch.set_num_threads(threads)
    try:
        with quiet():
            program = torch._inductor.aoti_load_package(str(path))
    except Exception as error:
        raise CheckpointError(
            f"{path}: cannot be run by torch {torch.__version__} ({reason(error)}); {AGAIN}"
        ) from error

    def run(images: np.ndarray) -> dict[str, np.ndarray]:
        frame = torch.zeros(resized_size((images.shape[2], images.shape[3]), short, long), dtype=torch.uint8)
        with torch.inference_mode():
            found = program(torch.from_numpy(np.ascontiguousarray(images)), frame)
        return {name: value.numpy() for name, value in found.items()}

    return run


def read_about(path: str | Path) -> dict[str, Any]:
    """What was written about the detector; nothing of the program is run. Raises CheckpointError for a file without."""
    return about_in(entry(Path(path), ABOUT), path, AGAIN)


def write_about(path: str | Path, about: Mapping[str, Any]) -> None:
    """Put this, JSON values, in the place of what was written about the detector."""
    with replacing(path) as unfinished:
        put(Path(path), unfinished, {ABOUT: json.dumps(about)})


def entry(path: Path, name: str) -> bytes:
    """A file of ours in the archive, below its only folder."""
    try:
        with zipfile.ZipFile(path) as archive:
            found = [info for info in archive.infolist() if info.filename.partition("/")[2] == name]
            if len(found) != 1:
                raise CheckpointError(
                    f"{path}: a file of torch that was not written by fpn; it lacks class names and sizes"
                )
            if found[0].file_size > LONGEST:
                raise ValueError(f"{name} has {found[0].file_size} bytes")
            with archive.open(found[0]) as file:
                return file.read(LONGEST)
    except (OSError, ValueError, RuntimeError, *DAMAGED) as error:
        raise CheckpointError(f"{path}: not a .pt2 file ({error}); {AGAIN}") from error


def put(source: Path, target: Path, files: Mapping[str, str]) -> None:
    """Copy an archive, with these files, below its only folder, in the place of those of the same names."""
    try:
        with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
            folder = old.namelist()[0].partition("/")[0]
            for info in old.infolist():
                if info.filename.partition("/")[2] not in files:
                    with (
                        old.open(info) as file,
                        new.open(zipfile.ZipInfo(info.filename), "w", force_zip64=True) as copy,
                    ):
                        while part := file.read(2**20):
                            copy.write(part)
            for name, content in files.items():
                new.writestr(zipfile.ZipInfo(f"{folder}/{name}"), content)
    except (LookupError, *DAMAGED) as error:
        raise CheckpointError(f"{source}: not a .pt2 file ({error}); {AGAIN}") from error


def processor() -> str:
    """System, kind of processor and what of its instructions compiled code makes use of."""
    return f"{platform.system()} {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def runs_on(needs: str, here: str) -> bool:
    """Whether what was compiled for one processor, as `processor` tells it, runs on another."""
    *kind, least = needs.split(" ")
    *own, most = here.split(" ")
    if least in CAPABILITIES and most in CAPABILITIES:
        return kind == own and CAPABILITIES.index(least) <= CAPABILITIES.index(most)
    return needs == here


@contextmanager
def quiet() -> Iterator[None]:
    """Without what the compiler has to say about its own steps, or about a GPU that is not there."""
    logger = logging.getLogger("torch")
    before = logger.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
