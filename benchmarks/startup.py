"""How long until something happens: commands and imports in fresh processes, beside `import torch, torchvision`.

    python benchmarks/startup.py

As for a user, Python's bytecode is kept from one process to the next, in a folder of its own here. Prints a Markdown
table: medians with quartiles of seconds and of CPU seconds (all cores, user and system), which are steadier where other
programs run, and how many of these are more than the import of torch and torchvision takes.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

from harness import alternate, machine, shown, spread

import fpn
from fpn.data.generated import generate

PEER = "import torch, torchvision"
FPN = f"{PEER}; import fpn; fpn.load, fpn.predict, fpn.build"
FIRST = "import sys, fpn; fpn.predict(fpn.load(sys.argv[1]), sys.argv[2], device='cpu')"


def run(command: list[str], environment: dict[str, str], spent: list[float]) -> None:
    """One command to its end; its CPU seconds go to `spent`."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def commands(folder: Path) -> dict[str, list[str]]:
    """What is measured, on a few generated images and a small detector in `folder`."""
    data = generate(folder / "data", images=8, size=(96, 128), seed=1)
    classes = fpn.data.load(data).classes
    detector = fpn.build("faster_rcnn", backbone="tiny", width=16, short=96, classes=classes, weights="none")
    checkpoint = str(fpn.weights.save(detector, folder / "tiny.safetensors"))
    picture = str(next((data / "images" / "val").iterdir()))
    python, verb = [sys.executable, "-c"], [sys.executable, "-m", "fpn.cli"]
    return {
        PEER: [*python, PEER],
        FPN: [*python, FPN],
        "fpn --help": [*verb, "--help"],
        "fpn train --help": [*verb, "train", "--help"],
        "fpn data info": [*verb, "data", "info", str(data)],
        "fpn.load and the first prediction": [*python, FIRST, checkpoint, picture],
        "fpn predict": [*verb, "predict", checkpoint, picture, "--device", "cpu", "--out", str(folder / "found")],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--no-bytecode", action="store_true", help="as with PYTHONDONTWRITEBYTECODE where none is there"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(folder / "bytecode")}
        environment |= {"PYTHONDONTWRITEBYTECODE": "1" if options.no_bytecode else ""}
        todo = commands(folder)
        spent: dict[str, list[float]] = {name: [] for name in todo}
        sides = {name: partial(run, command, environment, spent[name]) for name, command in todo.items()}
        seconds = alternate(sides, options.repeats)
    print(f"{machine()}\n\n| | s (quartiles) | CPU s (quartiles) | more CPU s than the peer |\n|---|---|---|---|")
    cpu = {name: values[-options.repeats :] for name, values in spent.items()}
    for name in sides:
        more = [own - peer for own, peer in zip(cpu[name], cpu[PEER], strict=True)]
        columns = [shown(values) for values in (seconds[name], cpu[name])]
        print(f"| `{name}` | {' | '.join(columns)} | {spread(more)[0]:+.2f} |")


if __name__ == "__main__":
    main()
