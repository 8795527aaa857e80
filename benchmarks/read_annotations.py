"""Seconds and memory to read the annotations of 100,000 generated images, beside plain json.loads and pycocotools.

    python benchmarks/read_annotations.py                            # COCO: about 780,000 boxes, 100 MB of JSON
    python benchmarks/read_annotations.py --outlines                 # the same with outlines, as COCO's own: 430 MB
    python benchmarks/read_annotations.py --format voc --images 20000
    python benchmarks/read_annotations.py --format yolo --images 20000

Writes the data set into a temporary folder (COCO and VOC with empty image files, YOLO with tiny images, whose sizes
have to be read) and reads it with each reader in a process of its own: wall and processor seconds, peak memory of the
process with all that it imports, and the ratio of the processor seconds to those of json.loads.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

CLASSES = 80
HEIGHT, WIDTH = 480, 640


def generate(images: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Offsets (I + 1,) into the boxes, boxes (M, 4) as x, y, width, height with two decimals, and labels (M,)."""
    rng = np.random.default_rng(0)
    counts = rng.geometric(1 / 8.8, images) - 1  # many images with few objects, few with many
    offsets = np.concatenate([[0], np.cumsum(counts)])
    corner = rng.random((offsets[-1], 2)) * [WIDTH - 100, HEIGHT - 100]
    size = 1 + 99 * rng.random((offsets[-1], 2)) ** 2
    return offsets, np.concatenate([corner, size], 1).round(2), rng.integers(0, CLASSES, offsets[-1])


def write_coco(folder: Path, images: int, outlines: bool) -> Path:
    offsets, boxes, labels = generate(images)
    (folder / "annotations").mkdir()
    (folder / "images").mkdir()
    file = folder / "annotations" / "instances_val.json"
    with file.open("w") as stream:
        entries = []
        for index in range(images):
            name = f"{index:012}.jpg"
            (folder / "images" / name).touch()
            entries.append({"license": 4, "file_name": name, "height": HEIGHT, "width": WIDTH, "id": index * 5 + 9})
        stream.write(f'{{"info": {{}}, "licenses": [], "images": {json.dumps(entries)}, "annotations": [')
        row = 0
        for index, (start, stop) in enumerate(pairwise(offsets.tolist())):
            for (x, y, width, height), label in zip(
                boxes[start:stop].tolist(), labels[start:stop].tolist(), strict=True
            ):
                polygon = outline(x, y, width, height) if outlines else []
                entry = {"segmentation": [polygon] if outlines else [], "area": round(width * height, 4), "iscrowd": 0}
                entry |= {"image_id": index * 5 + 9, "bbox": [x, y, width, height], "category_id": label + 1}
                stream.write(", " * (row > 0) + json.dumps({**entry, "id": row + 1}))
                row += 1
        categories = [{"supercategory": "thing", "id": number + 1, "name": f"c{number}"} for number in range(CLASSES)]
        stream.write(f'], "categories": {json.dumps(categories)}}}')
    return file


def outline(x: float, y: float, width: float, height: float, points: int = 27) -> list[float]:
    """An ellipse; 27 points are the mean of COCO's outlines."""
    angle = np.linspace(0, 2 * np.pi, points, endpoint=False)
    ring = np.stack([x + width * (1 + np.cos(angle)) / 2, y + height * (1 + np.sin(angle)) / 2], 1)
    return ring.round(2).ravel().tolist()


def write_voc(folder: Path, images: int) -> None:
    offsets, boxes, labels = generate(images)
    edges = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1).round().astype(int) + [0, 0, 1, 1]
    (folder / "Annotations").mkdir()
    (folder / "JPEGImages").mkdir()
    size = f"<size>\n<width>{WIDTH}</width>\n<height>{HEIGHT}</height>\n<depth>3</depth>\n</size>"
    for index, (start, stop) in enumerate(pairwise(offsets.tolist())):
        objects = "".join(
            f"<object>\n<name>c{label}</name>\n<pose>Unspecified</pose>\n<truncated>0</truncated>\n"
            f"<difficult>0</difficult>\n<bndbox>\n<xmin>{x1}</xmin>\n<ymin>{y1}</ymin>\n<xmax>{x2}</xmax>\n"
            f"<ymax>{y2}</ymax>\n</bndbox>\n</object>\n"
            for (x1, y1, x2, y2), label in zip(edges[start:stop].tolist(), labels[start:stop].tolist(), strict=True)
        )
        text = f"<annotation>\n<filename>{index:012}.jpg</filename>\n{size}\n{objects}</annotation>\n"
        (folder / "Annotations" / f"{index:012}.xml").write_text(text)
        (folder / "JPEGImages" / f"{index:012}.jpg").touch()


def write_yolo(folder: Path, images: int) -> None:
    from PIL import Image

    offsets, boxes, labels = generate(images)
    boxes[:, :2] += boxes[:, 2:] / 2
    boxes /= [WIDTH, HEIGHT, WIDTH, HEIGHT]
    for name in ("images/train", "images/val", "labels/train", "labels/val"):
        (folder / name).mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(folder / "tiny.jpg")
    pixels = (folder / "tiny.jpg").read_bytes()
    for index, (start, stop) in enumerate(pairwise(offsets.tolist())):
        split = "train" if index % 10 else "val"
        lines = [
            f"{label} {x:.6f} {y:.6f} {width:.6f} {height:.6f}\n"
            for (x, y, width, height), label in zip(
                boxes[start:stop].tolist(), labels[start:stop].tolist(), strict=True
            )
        ]
        (folder / "labels" / split / f"{index:012}.txt").write_text("".join(lines))
        (folder / "images" / split / f"{index:012}.jpg").write_bytes(pixels)
    names = ", ".join(f"c{number}" for number in range(CLASSES))
    (folder / "data.yaml").write_text(f"names: [{names}]\ntrain: images/train\nval: images/val\n")


def _parse_json(path: Path) -> Any:
    return json.loads(path.read_bytes())


def measure(reader: str, path: Path) -> None:
    """Reads in this process and prints wall seconds, processor seconds and the peak memory in MiB."""
    read: Any
    if reader == "fpn":
        from fpn.data import load as read
    elif reader == "pycocotools":
        from pycocotools.coco import COCO as read
    else:
        read = _parse_json
    wall, processor = time.perf_counter(), time.process_time()
    result = read(path)
    times = [time.perf_counter() - wall, time.process_time() - processor]
    if reader == "fpn":
        boxes = sum(len(split.boxes) for split in result.values())
        print(f"{sum(map(len, result.values()))} images, {boxes} boxes, {len(result.problems)} problems")
    print(*times, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10))


def run(reader: str, path: Path) -> list[float]:
    command = [sys.executable, __file__, "--measure", reader, str(path)]
    *facts, numbers = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    if reader == "fpn":
        print(f"fpn read {facts[-1]}")
    return [float(number) for number in numbers.split()]


def compare(form: str, images: int, outlines: bool) -> None:
    folder = Path(tempfile.mkdtemp())
    try:
        file = None
        if form == "coco":
            file = write_coco(folder, images, outlines)
            print(f"{images:,} images, {file.stat().st_size / 1e6:.0f} MB of JSON")
        else:
            (write_voc if form == "voc" else write_yolo)(folder, images)
        results = {}
        if file is not None:
            results = {name: run(name, file) for name in ("json", "pycocotools") if find_spec(name)}
        results["fpn"] = run("fpn", folder)
    finally:
        shutil.rmtree(folder)
    print(f"{'reader':12} {'seconds':>8} {'processor':>10} {'peak MiB':>9} {'to json':>8}")
    for name, (wall, processor, memory) in results.items():
        ratio = f"{processor / results['json'][1]:8.2f}" if "json" in results else ""
        print(f"{name:12} {wall:8.2f} {processor:10.2f} {memory:9.0f} {ratio}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", choices=("coco", "voc", "yolo"), default="coco")
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--outlines", action="store_true", help="COCO with an outline for each object")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.measure[0], Path(options.measure[1]))
    else:
        compare(options.format, options.images, options.outlines)
