"""The verb `fpn paper`: a thin skin over `fpn.paper.run.run_paper`."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Literal


def paper(
    path: str,
    /,
    *,
    table: int = 1,
    scale: Literal["small", "full"] = "small",
    seeds: int = 3,
    backbone: str | None = None,
    weights: str | None = None,
    short: int | None = None,
    epochs: int | None = None,
    rows: list[str] | None = None,
    out: Path = Path("runs/paper"),
    device: str = "auto",
    devices: int | None = None,
    workers: int | None = None,
) -> None:
    """Run a table of the FPN paper again on your data: what each part of the pyramid is worth there.

    Each row and seed is trained and measured by itself and kept, so the same command goes on where it was stopped, and
    tables in one folder share what they have in common. On 8 GPUs: torchrun --nproc-per-node 8 -m fpn.cli paper ...

    Parameters
    ----------
    path
        A folder in COCO, Pascal VOC or YOLO format, a COCO JSON file, or demo for generated images.
    table
        1: proposals of six kinds of pyramid. 2: Fast R-CNN on the same proposals. 3: Faster R-CNN. 5: shared features.
        6: mask proposals, for data with outlines.
    scale
        small: a few hundred images, under half an hour for Table 1 with 3 seeds on one GPU or two cores. full: the
        paper's schedule, made for 8 GPUs.
    seeds
        Repetitions; it takes 2 or more to tell chance from effect.
    backbone
        When left out mobilenet_v2 for small, tiny for small with --weights none, and resnet50 for full.
    weights
        The backbone's: imagenet (when left out), none, or a file with its state dict.
    short
        Pixels of the shorter side of the resized images; 256 for small and 800 for full when left out.
    epochs
        Passes over the images, in place of what the scale has.
    rows
        Only these rows of the table, such as c d.
    out
        Folder for paper.html, paper.md, the plots and the cells.
    device
        auto, cpu, cuda, cuda:N or mps.
    devices
        Number of devices on this machine, as torchrun has them.
    workers
        Processes that load images; one a core up to 4 when left out.
    """
    from fpn.hardware import is_main_process
    from fpn.paper.run import run_paper

    given = {"table": table, "scale": scale, "seeds": seeds, "backbone": backbone, "weights": weights, "short": short,
             "epochs": epochs, "rows": rows, "out": out, "device": device, "devices": devices,
             "workers": workers}  # fmt: skip
    command = again(path, given)
    try:
        page = run_paper(path, **{**given, "command": command})
    except KeyboardInterrupt:
        if not is_main_process() or not out.is_dir():
            raise
        sys.exit(f"\nfpn: interrupted. {out / 'paper.html'} has what is done. To go on from here: {command}")
    if is_main_process():
        print(f"\nLook at {page}")


def again(path: str, given: dict) -> str:
    """The command with these options, those at their usual value left out.

    >>> again("cells", {"table": 1, "seeds": 2, "weights": None, "rows": ["c", "d"]})
    'fpn paper cells --table 1 --seeds 2 --rows c d'
    """
    usual = {"scale": "small", "device": "auto"}
    here = os.environ.get("LOCAL_WORLD_SIZE", "1")
    words = ["fpn"] if here == "1" else ["torchrun", "--nproc-per-node", here, "-m", "fpn.cli"]
    words += ["paper", path]
    for name, value in given.items():
        if value is not None and value != usual.get(name):
            words += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return shlex.join(words)
