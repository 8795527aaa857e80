"""Small objects with and without tiles: one detector on a data set, as it is and after going on with either.

    python benchmarks/tiles.py bccd bccd.safetensors --tile 320 --overlap 0.25 --images 48 --out runs/tiles
    python benchmarks/tiles.py bccd bccd.safetensors --tile 480 --sheet 4 3

The detector is measured on whole images at its own input size, in tiles, and on whole images at their full size, which
is what tiles compete with where that fits. Then it goes on learning from `--images` of the train split, once from
whole images and once from their tiles, with the same number of steps, and is measured again; 0 leaves that out.
--sheet lays that many images of the test split across and down into one large one, as a scanned slide has it.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

import fpn
from fpn.data.tiles import tiles_of
from fpn.evaluation.evaluate import detect_split, score_for
from fpn.inference.finder import finder
from fpn.model.detector import Detector
from fpn.weights import load_detector

BATCH, RATE = 4, 0.002  # of going on: a tenth of what training from ImageNet starts with


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("data")
    parser.add_argument("detector", type=Path)
    parser.add_argument("--split", default="test")
    parser.add_argument("--tile", type=int, default=320)
    parser.add_argument("--overlap", type=float, default=0.25)
    parser.add_argument("--images", type=int, default=0)
    parser.add_argument("--sheet", type=int, nargs=2, default=(1, 1), metavar=("ACROSS", "DOWN"))
    parser.add_argument("--out", type=Path, default=Path("runs/tiles"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        compare(args, Path(folder))


def compare(args: argparse.Namespace, folder: Path) -> None:
    data = fpn.data.load(args.data)
    train, test = data["train"], data[args.split]
    test = test if math.prod(args.sheet) == 1 else sheets(test, args.sheet[0], args.sheet[1], folder)
    height, width = test.sizes.max(axis=0).tolist()
    print("| learnt from | looked at | AP | AP50 | AP small | AP medium | AP large | images a second |")
    print("|---|---|---|---|---|---|---|---|")
    detector = load_detector(args.detector)
    measure("as it was", "whole images", detector, test)
    measure("as it was", f"tiles of {args.tile}", with_tiles(detector, args), test)
    full = load_detector(args.detector)
    full.spec = replace(full.spec, short=min(height, width), long=max(height, width))
    measure("as it was", "whole images, full size", full, test)
    if not args.images:
        return
    part = train.select(np.random.default_rng(0).permutation(len(train))[: args.images], "train")
    steps = math.ceil(len(tiles_of(part, args.tile, args.overlap)) / BATCH)
    epochs = round(steps / math.ceil(len(part) / BATCH))
    options = {"batch": BATCH, "lr": RATE, "augment": "light", "quiet": True}
    whole, tiles = load_detector(args.detector), with_tiles(load_detector(args.detector), args)
    fpn.train(whole, {"train": part}, out=args.out / "whole", epochs=epochs, **options)
    measure(f"and {epochs * math.ceil(len(part) / BATCH)} steps of whole images", "whole images", whole, test)
    fpn.train(tiles, {"train": part}, out=args.out / "tiles", epochs=1, **options)
    measure(f"and {steps} steps of tiles", f"tiles of {args.tile}", tiles, test)


def sheets(split: fpn.data.Split, across: int, down: int, folder: Path) -> fpn.data.Split:
    """The images of a split, `across` x `down` of them in one; what does not fill a sheet is left out."""
    height, width = split.sizes.max(axis=0).tolist()
    number, images, boxes = across * down, [], []
    for first in range(0, len(split) - number + 1, number):
        sheet, name = np.zeros((height * down, width * across, 3), np.uint8), f"{first}.png"
        for place in range(number):
            pixels, rows = (
                fpn.data.read_image(split.path(first + place)).permute(1, 2, 0).numpy(),
                split.rows(first + place),
            )
            top, left = place // across * height, place % across * width
            sheet[top : top + pixels.shape[0], left : left + pixels.shape[1]] = pixels
            for (x1, y1, x2, y2), label in zip(split.boxes[rows].tolist(), split.labels[rows].tolist(), strict=True):
                box = [x1 + left, y1 + top, x2 - x1, y2 - y1]
                boxes.append({"id": len(boxes) + 1, "image_id": first, "category_id": label + 1, "bbox": box,
                              "area": box[2] * box[3], "iscrowd": 0})  # fmt: skip
        Image.fromarray(sheet).save(folder / name)
        images.append({"id": first, "file_name": name, "height": sheet.shape[0], "width": sheet.shape[1]})
    names = [{"id": number, "name": name} for number, name in enumerate(split.classes, 1)]
    file = folder / "sheets.json"
    file.write_text(json.dumps({"images": images, "annotations": boxes, "categories": names}))
    data = fpn.data.load(file)
    return max(data.values(), key=len)


def with_tiles(detector: Detector, args: argparse.Namespace) -> Detector:
    detector.spec = replace(detector.spec, tile=args.tile, overlap=args.overlap)
    return detector


def measure(learnt: str, looked: str, detector: Detector, test: fpn.data.Split) -> None:
    began = time.perf_counter()
    results = detect_split(detector, test, batch=1, workers=0, progress=False, find=finder(detector))
    rate = len(test) / (time.perf_counter() - began)
    m = score_for(detector, test, results)
    columns = (f"{m[name]:.3f}" for name in ("AP", "AP50", "AP_small", "AP_medium", "AP_large"))
    print(f"| {learnt} | {looked} | {' | '.join(columns)} | {rate:.1f} |", flush=True)


if __name__ == "__main__":
    main()
