"""The COCO numbers of boxes on generated data of the size of COCO val: fpn beside pycocotools and faster-coco-eval.

    python benchmarks/coco_eval.py                                   # 5,000 images, 80 classes, about 36,000 objects
    python benchmarks/coco_eval.py --grow --sides faster-coco-eval fpn

Seeded: a few classes an image with a long tail, objects of all sizes, some crowds; jittered and false detections, up to
100 an image. The peers run as they document it, on dictionaries that are made beforehand and not timed; `fpn` is
`fpn.evaluation.metrics.score` on its arrays. The first of the sides is the one that the others are compared with.

Prints a Markdown table: seconds (median and quartiles of the turns), times as fast, the memory that a process of its
own takes at the most beyond its modules and data, and the largest difference in any of the 12 numbers. With --grow one
table each for more images (up to about 100,000 objects), more classes (1 to 1200) and more objects an image.
"""

from __future__ import annotations

import argparse
import io
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from harness import alternate, machine, ratios, shown

from fpn.data.dataset import Split
from fpn.evaluation.metrics import Results, ground_truth, score, to_coco

HEIGHT, WIDTH = 480, 640
CLASSES_AN_IMAGE = 4
FALSE = 50  # false detections an image
GROWTH = {"images": (1000, 5000, 13_700), "classes": (1, 80, 1200), "objects": (1.0, 7.3, 50.0)}


@dataclass(frozen=True)
class Size:
    images: int
    classes: int
    objects: float  # an image, on average


SMALL = Size(images=5, classes=2, objects=3.0)


def boxes_of(rng: np.random.Generator, count: int) -> np.ndarray:
    """(count, 4) boxes inside the image, with sides of about 8 to 350 pixels, short ones more often than long ones."""
    side = np.exp(rng.uniform(np.log(8), np.log(350), (count, 1)) + rng.normal(0, 0.3, (count, 2)))
    side = np.minimum(side, [WIDTH - 1, HEIGHT - 1])
    corner = rng.random((count, 2)) * ([WIDTH, HEIGHT] - side)
    return np.concatenate([corner, corner + side], axis=1)


def generate(size: Size) -> tuple[Split, Results]:
    rng = np.random.default_rng(0)
    counts = rng.geometric(1 / (size.objects + 1), size.images) - 1  # many images with few objects, few with many
    image_of, boxes = np.repeat(np.arange(size.images), counts), boxes_of(rng, counts.sum()).round(2)
    often = 1 / (np.arange(size.classes) + 2.0)
    palette = rng.choice(size.classes, (size.images, CLASSES_AN_IMAGE), p=often / often.sum())
    labels = palette[image_of, rng.integers(0, CLASSES_AN_IMAGE, len(boxes))]
    split = Split(
        name="val",
        classes=tuple(f"class {n}" for n in range(size.classes)),
        category_ids=np.arange(1, size.classes + 1),
        root=Path(),
        files=np.array([f"{n}.jpg" for n in range(size.images)]),
        image_ids=np.arange(1, size.images + 1),
        sizes=np.tile([HEIGHT, WIDTH], (size.images, 1)),
        offsets=np.concatenate([[0], np.cumsum(counts)]),
        boxes=boxes,
        labels=labels,
        ignore=rng.random(len(boxes)) < 0.012,
        areas=np.prod(boxes[:, 2:] - boxes[:, :2], axis=1) * rng.uniform(0.4, 1, len(boxes)),
    )
    return split, detections(rng, split, palette)


def detections(rng: np.random.Generator, split: Split, palette: np.ndarray) -> Results:
    """Two of each object, moved and at times called by another class, and false ones; the 100 best of an image."""
    near = np.repeat(np.arange(len(split.boxes)), 2)
    image_of = split.image_of[near]
    side = np.tile(split.boxes[near, 2:] - split.boxes[near, :2], 2)
    moved = split.boxes[near] + side * rng.normal(0, 1, side.shape) * rng.exponential(0.08, (len(side), 1))
    moved[:, 2:] = np.maximum(moved[:, 2:], moved[:, :2] + 1)
    confused = palette[image_of, rng.integers(0, CLASSES_AN_IMAGE, len(near))]
    labels = np.where(rng.random(len(near)) < 0.1, confused, split.labels[near])

    elsewhere = np.repeat(np.arange(len(split)), FALSE)
    wrong = palette[elsewhere, rng.integers(0, CLASSES_AN_IMAGE, len(elsewhere))]
    wrong = np.where(rng.random(len(wrong)) < 0.3, rng.integers(0, len(split.classes), len(wrong)), wrong)
    indices, labels = np.concatenate([image_of, elsewhere]), np.concatenate([labels, wrong])
    boxes = np.concatenate([moved, boxes_of(rng, len(elsewhere))]).astype(np.float32)
    scores = np.concatenate([rng.beta(2, 1.5, len(near)), rng.beta(1, 12, len(wrong))]).astype(np.float32)
    order = np.lexsort((-scores, indices))
    order = order[np.arange(len(order)) - np.searchsorted(indices[order], indices[order]) < 100]
    return Results(np.arange(len(split)), indices[order], boxes[order], scores[order], labels[order])


def by_pycocotools(truth: dict, found: list[dict]) -> np.ndarray:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with redirect_stdout(io.StringIO()):
        objects: Any = COCO()
        objects.dataset = truth
        objects.createIndex()
        evaluation = COCOeval(objects, objects.loadRes(found), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return np.array(evaluation.stats)


def by_faster_coco_eval(truth: dict, found: list[dict]) -> np.ndarray:
    from faster_coco_eval import COCO, COCOeval_faster

    objects = COCO(truth)
    evaluation = COCOeval_faster(objects, objects.loadRes(found), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return np.array(evaluation.stats)


def by_fpn(split: Split, results: Results) -> np.ndarray:
    return np.array(list(score(split, results).values()))


PEERS = {"pycocotools": by_pycocotools, "faster-coco-eval": by_faster_coco_eval}
SIDES = (*PEERS, "fpn")


def runs(names: list[str], split: Split, results: Results) -> dict[str, Callable[[], np.ndarray]]:
    dictionaries = (ground_truth(split), to_coco(split, results)) if names != ["fpn"] else ()
    return {
        name: partial(PEERS[name], *dictionaries) if name in PEERS else partial(by_fpn, split, results)
        for name in names
    }


def memory(name: str, size: Size) -> float:
    """MB that one side takes in a process of its own."""
    command = [sys.executable, __file__, "--memory", name, "--images", str(size.images)]
    command += ["--classes", str(size.classes), "--objects", str(size.objects)]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def measured(name: str, size: Size) -> float:
    """MB, the most that a side takes beyond what the process had with all modules and data; NaN if not on Linux."""
    runs([name], *generate(SMALL))[name]()
    run = runs([name], *generate(size))[name]
    if not Path("/proc/self/clear_refs").exists():
        return float("nan")
    Path("/proc/self/clear_refs").write_text("5")  # forget the highest so far
    before = kilobytes("VmRSS")
    run()
    return (kilobytes("VmHWM") - before) / 1024


def kilobytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def rows(size: Size, names: list[str], repeats: int, label: str) -> list[str]:
    """Rows of the table, one for each side."""
    for run in runs(names, *generate(SMALL)).values():
        run()  # with all that is done once only, such as imports
    sides = runs(names, *generate(size))
    numbers: dict[str, np.ndarray] = {}
    timed = {name: partial(lambda n: numbers.update({n: sides[n]()}), name) for name in names}
    seconds = alternate(timed, repeats, warmup=0)
    times, table = ratios(seconds, names[0]), []
    for name in names:
        took = shown(seconds[name])
        ratio = shown(times[name], 1)
        apart = np.abs(numbers[name] - numbers[names[0]]).max()
        where = f"{label} | " if label else ""
        table.append(f"| {where}{name} | {took} | {ratio} | {memory(name, size):.0f} | {apart:.0e} |")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--objects", type=float, default=7.3, help="an image")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--grow", action="store_true", help="tables over images, classes and objects an image")
    parser.add_argument("--memory", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    size = Size(options.images, options.classes, options.objects)
    if options.memory:
        print(measured(options.memory, size))
        return
    print(machine())
    columns, ruler = "s (quartiles) | times as fast (quartiles) | MB | apart |", "---|" * 5
    if not options.grow:
        split, results = generate(size)
        print(f"{len(split)} images, {size.classes} classes, {len(split.boxes)} objects, {len(results.scores)} found\n")
        print(f"| | {columns}\n|{ruler}")
        print("\n".join(rows(size, options.sides, options.repeats, "")))
        return
    for name, values in GROWTH.items():
        print(f"\n| {name} | objects, found | | {columns}\n|---|---|{ruler}")
        for value in values:
            # More classes and objects on fewer images, for the peers need minutes there.
            grown = Size(**{"images": 1000, "classes": size.classes, "objects": size.objects, name: value})
            split, results = generate(grown)
            label = f"{value} | {len(split.boxes)}, {len(results.scores)}"
            print("\n".join(rows(grown, options.sides, options.repeats, label)), flush=True)


if __name__ == "__main__":
    main()
