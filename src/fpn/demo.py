"""`fpn demo`: the whole way on generated images, from making them to a report, in minutes on a laptop."""

from __future__ import annotations

import platform
import time
from pathlib import Path

import torch

from fpn.build import build
from fpn.data import Split, load, read_image
from fpn.data.generated import generate
from fpn.evaluation.evaluate import detect_split
from fpn.evaluation.metrics import score
from fpn.evaluation.report import ReportSample, write_report
from fpn.hardware import cores
from fpn.inference.finder import finder
from fpn.model.detector import Detector
from fpn.training.resume import STATE
from fpn.training.train import train
from fpn.writing import write_json

IMAGES, SIDE = 600, 320  # for training, and a sixth as many for measuring; pixels
EPOCHS, BATCH, LEARNING_RATE = 14, 8, 0.04
SHOWN = 10


def run_demo(out: Path) -> None:
    """Generate, train, evaluate, predict, report; everything lands in `out`, and an earlier demo there is replaced."""
    started = time.monotonic()
    print("1/4  making images")
    data = load(generate(out / "data", IMAGES, (SIDE, SIDE)))
    (out / STATE).unlink(missing_ok=True)
    torch.manual_seed(0)
    detector = small_detector(data.classes)
    print(f"2/4  training from scratch on {len(data['train'])} images")
    run = train(detector, data, out=out, epochs=EPOCHS, batch=BATCH, lr=LEARNING_RATE)
    print(f"3/4  evaluating on {len(data['val'])} unseen images")
    results = detect_split(detector, data["val"])
    metrics = score(data["val"], results)
    print(metrics.table())
    print("4/4  writing the report")
    weights = sum(parameter.numel() for parameter in detector.parameters())
    minutes = (time.monotonic() - started) / 60
    write_json(out / "metrics.json", {**metrics.as_dict(), "minutes": round(minutes, 2)}, indent=2)
    report = write_report(
        out,
        title="fpn demo: a detector trained from scratch on generated images",
        metrics=metrics,
        per_class=metrics.per_class,
        history=run.history,
        samples=[sample_of(detector, data["val"], i) for i in range(min(SHOWN, len(data["val"])))],
        facts={
            "Images": f"{len(data['train'])} to learn from, {len(data['val'])} unseen, {SIDE} x {SIDE} pixels",
            "Detector": f"Faster R-CNN with FPN, {weights / 1e6:.1f} million weights",
            "Training": f"{EPOCHS} epochs from random weights, precision {run.settings.precision}",
            "Time": f"{minutes:.1f} minutes in all on {cores()} cores ({platform.machine()})",
        },
        notes=metrics.notes,
    )
    print(f"\nAP {metrics['AP']:.3f}, AP50 {metrics['AP50']:.3f} after {minutes:.1f} minutes. Look at {report}")


def small_detector(classes: tuple[str, ...]) -> Detector:
    """Small enough to learn from scratch on two cores; sizes fit images of 320 rather than the paper's 800 pixels."""
    return build(
        backbone="tiny",
        weights="none",
        classes=classes,
        short=SIDE,
        long=SIDE,
        width=48,
        hidden=256,
        anchor_sizes=(12, 24, 48, 96, 192),
        canonical=96.0,
        proposals_per_level=(500, 300),
        proposals=(500, 300),
        box_examples=128,
    )


def sample_of(detector: Detector, split: Split, index: int) -> ReportSample:
    """An image with its truth and what the detector finds in it."""
    image, rows = read_image(split.path(index)), split.rows(index)
    boxes, labels = torch.from_numpy(split.boxes[rows]).float(), torch.from_numpy(split.labels[rows])
    find = finder(detector, next(detector.parameters()).device)
    return ReportSample(image, boxes, labels, find([image])[0])
