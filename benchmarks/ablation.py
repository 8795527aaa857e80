"""What each default of `fpn train` is worth: the same run again with one of them changed.

    python benchmarks/ablation.py DATA --out runs/ablation -- --backbone mobilenet_v2 --short 320 --epochs 10

What stands after `--` goes to every run. Prints a Markdown table with the AP on the val split of the best epoch, on the
test split where there is one, and the minutes each run took; the runs are kept in --out, and those found there are not
repeated. The epochs are equal; see the minutes for what that means in time.
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

import torch

import fpn

VARIANTS = {
    "defaults": (),
    "no moving average": ("--ema", "0"),
    "multi-scale": ("--scales", "SHORT-10%", "SHORT", "SHORT+10%"),
    "strong augmentation": ("--augment", "strong"),
    "no augmentation": ("--augment", "none"),
    "step schedule": ("--schedule", "step"),
    "smooth L1 (paper preset)": ("--preset", "paper"),
}


def options_of(variant: str, common: list[str]) -> list[str]:
    short = int(common[common.index("--short") + 1]) if "--short" in common else 384
    sides = {"SHORT-10%": round(0.9 * short), "SHORT": short, "SHORT+10%": round(1.1 * short)}
    return [*common, *(str(sides.get(word, word)) for word in VARIANTS[variant])]


def run(variant: str, data: str, out: Path, common: list[str]) -> dict[str, float]:
    folder = out / variant.replace(" ", "-")
    if not (folder / "done").exists():
        resume = ["--resume"] if (folder / "resume.ckpt").exists() else options_of(variant, common)
        subprocess.run([sys.executable, "-m", "fpn.cli", "train", data, "--out", str(folder), *resume], check=True)
        (folder / "done").touch()
    rows = list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))
    row = {"val": max(float(row["AP"]) for row in rows), "minutes": sum(float(row["seconds"]) for row in rows) / 60}
    splits = fpn.data.load(data)
    if "test" in splits:
        row["test"] = fpn.evaluate(fpn.load(folder / "best.safetensors"), splits["test"], progress=False)["AP"]
    return row


def main() -> None:
    arguments, common = sys.argv[1:], []
    if "--" in arguments:
        arguments, common = arguments[: arguments.index("--")], arguments[arguments.index("--") + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="a data set with a val split")
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
