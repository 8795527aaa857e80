"""fpn and torchvision trained one after the other on the same data, from the same weights, and scored alike.

    python benchmarks/bccd.py DATA --weights mobilenet_v2-b0353104.pth --out runs/bccd

Both start from the same ImageNet weights of MobileNetV2 and get a 128-channel pyramid, a 320-pixel input, batches of 4
images, 10 epochs of SGD at 0.02 with warm-up, cosine decay and horizontal flips; all else is what each library does by
itself. fpn is run through its command, once for each of --models, torchvision's Faster R-CNN through
`bccd_torchvision.py`. fpn keeps the epoch that is best on the val split; the numbers are those of the test split, which
neither has seen. A Markdown table is printed; the parts are in --out. About 45 minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import subprocess
import sys
from datetime import date
from pathlib import Path

import torch
import torchvision

NUMBERS = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
HERE = Path(__file__).resolve().parent


def run_fpn(model: str, data: str, weights: str, out: Path) -> dict[str, float]:
    fpn = (sys.executable, "-m", "fpn.cli")
    sides = ("--model", model, "--backbone", "mobilenet_v2", "--weights", weights, "--freeze", "0", "--short", "320")
    steps = ("--width", "128", "--epochs", "10", "--batch", "4", "--lr", "0.02")
    subprocess.run([*fpn, "train", data, *sides, *steps, "--out", str(out)], check=True)
    checkpoint = str(out / "best.safetensors")
    subprocess.run([*fpn, "eval", checkpoint, data, "--split", "test", "--out", str(out / "test")], check=True)
    metrics = json.loads((out / "test" / "metrics.json").read_text())
    rows = csv.DictReader((out / "metrics.csv").read_text().splitlines())
    return {**{name: metrics[name] for name in NUMBERS}, "seconds": sum(float(row["seconds"]) for row in rows)}


def run_torchvision(data: str, weights: str, out: Path) -> dict[str, float]:
    file = out / "torchvision.json"
    script = str(HERE / "bccd_torchvision.py")
    subprocess.run([sys.executable, script, data, "--weights", weights, "--out", str(file)], check=True)
    metrics = json.loads(file.read_text())
    return {**{name: metrics[name] for name in NUMBERS}, "seconds": metrics["training_seconds"]}


def table(rows: dict[str, dict[str, float]]) -> str:
    lines = ["| | " + " | ".join(NUMBERS) + " | minutes of training |", "|---" * (len(NUMBERS) + 2) + "|"]
    for name, row in rows.items():
        numbers = " | ".join(f"{row[n]:.3f}" for n in NUMBERS)
        lines.append(f"| {name} | {numbers} | {row['seconds'] / 60:.1f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="the BCCD data set, with splits train, val and test")
    parser.add_argument("--weights", required=True, help="file of torchvision's ImageNet weights of MobileNetV2")
    parser.add_argument("--models", nargs="+", default=["faster_rcnn", "cascade_rcnn"], help="of fpn")
    parser.add_argument("--out", type=Path, default=Path("runs/bccd"))
    given = parser.parse_args()
    ours = {f"fpn, {m}": run_fpn(m, given.data, given.weights, given.out / m) for m in given.models}
    theirs = run_torchvision(given.data, given.weights, given.out)
    print(f"\n{date.today()}, {platform.machine()}, {torch.get_num_threads()} threads, ", end="")
    print(f"torch {torch.__version__}, torchvision {torchvision.__version__}\n")
    print(table({**ours, "torchvision, Faster R-CNN": theirs}))


if __name__ == "__main__":
    main()
