"""What each default of `fpn train` is worth: the same run again with one of them changed.

    python benchmarks/ablation.py DATA --out runs/ablation -- --backbone mobilenet_v2 --short 320 --epochs 10
    python benchmarks/ablation.py demo --out runs/ablation-demo

What stands after `--` goes to every run; "demo" stands for the data, the detector and the settings of `fpn demo`.
Prints a Markdown table with the AP on the val split of the best epoch, on the test split where there is one, and the
minutes each run took; the runs are kept in --out, and those found there are not repeated. The epochs are equal; see the
minutes for what that means in time.
"""

from __future__ import annotations

import argparse
import csv
import platform
import subprocess
import sys
import warnings
from datetime import date
from pathlib import Path
from typing import Any

import torch

import fpn
from fpn import demo
from fpn.data.generated import generate

# Options of training; scales are shares of the shorter side.
VARIANTS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "no moving average": {"ema": 0.0},
    "multi-scale": {"scales": (0.9, 1.0, 1.1)},
    "strong augmentation": {"augment": "strong"},
    "no augmentation": {"augment": "none"},
    "step schedule": {"schedule": "step"},
}


def options_of(variant: str, short: int) -> dict[str, Any]:
    options = VARIANTS[variant]
    return {**options, "scales": tuple(round(s * short) for s in options["scales"])} if "scales" in options else options


def train_demo(out: Path, variant: str) -> None:
    data = generate(out.parent / "data", demo.IMAGES, (demo.SIDE, demo.SIDE))
    found = fpn.data.load(data)
    torch.manual_seed(0)
    settings = {"epochs": demo.EPOCHS, "batch": demo.BATCH, "lr": demo.LEARNING_RATE, **options_of(variant, demo.SIDE)}
    fpn.train(demo.small_detector(found.classes), found, out=out, **settings)


def train(data: str, out: Path, variant: str, common: list[str]) -> None:
    short = int(common[common.index("--short") + 1]) if "--short" in common else 384
    flags = list(common)
    for name, value in options_of(variant, short).items():
        flags += [f"--{name}", *map(str, value if isinstance(value, tuple) else (value,))]
    subprocess.run([sys.executable, "-m", "fpn.cli", "train", data, "--out", str(out), *flags], check=True)


def run(variant: str, data: str, out: Path, common: list[str]) -> dict[str, float]:
    folder = out / variant.replace(" ", "-")
    if not (folder / "done").exists():
        if data == "demo":
            train_demo(folder, variant)
        else:
            train(data, folder, variant, common)
        (folder / "done").touch()
    rows = list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))
    row = {"val": max(float(row["AP"]) for row in rows), "minutes": sum(float(row["seconds"]) for row in rows) / 60}
    splits = fpn.data.load(out / "data" if data == "demo" else data)
    if "test" in splits:
        row["test"] = fpn.evaluate(fpn.load(folder / "best.safetensors"), splits["test"], progress=False)["AP"]
    return row


def main() -> None:
    arguments, common = sys.argv[1:], []
    if "--" in arguments:
        arguments, common = arguments[: arguments.index("--")], arguments[arguments.index("--") + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help='a data set with a val split, or "demo"')
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    given = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    rows = {variant: run(variant, given.data, given.out, common) for variant in given.variants}
    print(f"\n{date.today()}, {platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print("| | AP val | AP test | minutes |\n|---|---|---|---|")
    for variant, row in rows.items():
        test = f"{row['test']:.3f}" if "test" in row else ""
        print(f"| {variant} | {row['val']:.3f} | {test} | {row['minutes']:.1f} |")


if __name__ == "__main__":
    main()
