"""JPEG files to batches in one process: fpn's loaders beside torchvision's.

    python benchmarks/loading.py                   # 640x480 to 800; then more boxes, then larger images
    python benchmarks/loading.py --sizes 640x480 --boxes 10 --repeats 15

The pictures are scenes made here, as JPEG of quality 95 without subsampling: 4 bits a pixel and the time to decode of
those in COCO. Ways from there to something to train on take turns:

- pixels: torchvision's CocoDetection and v2 transforms, with `v2.Resize` on uint8; to a list of float images.
- batch: torchvision's example as documented, where float images of any size go to the model, whose
  `GeneralizedRCNNTransform` resizes, normalises and pads them; here on the CPU, where data has to be loaded anyway.
- fpn: `fpn.data.loader` for training (flips) and for evaluation; to a padded batch of uint8.

What all must do, decoding and resizing alone, comes first. Prints a Markdown table: images a second, times as fast as
torchvision's two ways (median and quartiles of the turns), and how far pixels (grey levels, mean and largest) and boxes
of training are from those of the first.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import alternate, machine, ratios, shown, spread
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import datasets
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.transforms import v2

import fpn.data
from fpn.data import PRESETS, DetectionDataset, Split, loader, resize_transform, train_transform, training_transform
from fpn.data.images import read_image
from fpn.data.sizes import LONG, SHORT
from fpn.exporting.scenes import scene

DECODE, RESIZE = "Pillow's decoding alone", "and torch's resizing"  # what both sides do
PIXELS, BATCH, TRAINING, EVALUATION = "torchvision, pixels", "torchvision, batch", "fpn, training", "fpn, evaluation"
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # what torchvision's detectors subtract and divide by


def write(folder: Path, number: int, size: tuple[int, int], boxes: int) -> Split:
    """A split in COCO's format: so many scenes of this size, each with so many boxes."""
    (folder / "images").mkdir()
    (folder / "annotations").mkdir()
    chance, (height, width) = np.random.default_rng(0), size
    images, rows = [], []
    for image in range(1, number + 1):
        name = f"{image}.jpg"
        pixels = scene(size, seed=image).permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / "images" / name, quality=95, subsampling=0)
        images.append({"id": image, "file_name": name, "height": height, "width": width})
        for x, y, wide, high in boxes_of(boxes, size, chance).tolist():
            entry = {"id": len(rows) + 1, "image_id": image, "category_id": 1, "iscrowd": 0}
            rows.append({**entry, "bbox": [x, y, wide, high], "area": wide * high})
    content = {"images": images, "annotations": rows, "categories": [{"id": 1, "name": "thing"}]}
    for name in ("train", "val"):  # of a train alone a part would become the val
        (folder / "annotations" / f"instances_{name}.json").write_text(json.dumps(content))
    return fpn.data.load(folder)["train"]


def boxes_of(number: int, size: tuple[int, int], chance: np.random.Generator) -> np.ndarray:
    """(N, 4): x, y, width, height of random boxes inside an image of this size, in quarters of a pixel."""
    limit = 4 * np.array(size[::-1])
    low, high = np.sort(chance.integers(0, limit - 8, (2, number, 2)), axis=0)
    return np.concatenate([low, high - low + 8], axis=1) / 4


def torchvision_loader(split: Split, batch: int, flip: float, resize: bool) -> DataLoader:
    """As in torchvision's example of detection, with its transforms of colour and scale left out."""
    resizing = [v2.Resize(SHORT, max_size=LONG)] if resize else []
    steps = [v2.ToImage(), *resizing, v2.RandomHorizontalFlip(flip), v2.ToDtype(torch.float32, scale=True)]
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
        annotations = str(split.root / "annotations" / "instances_train.json")
        images = datasets.CocoDetection(split.root / "images", annotations, transforms=v2.Compose(steps))
    wrapped: Any = datasets.wrap_dataset_for_transforms_v2(images, target_keys=["boxes", "labels"])
    return DataLoader(wrapped, batch, collate_fn=lambda items: tuple(zip(*items, strict=True)))


def sides_of(split: Split, batch: int) -> dict[str, Callable[[], None]]:
    """Each way through all images of the split, one batch after the other."""
    pixels, whole = (torchvision_loader(split, batch, 0.5, resize) for resize in (True, False))
    paths = [split.path(index) for index in range(len(split))]
    transform, mixing = training_transform(PRESETS["light"], (SHORT,), LONG, epochs=1)
    return {
        DECODE: lambda: exhaust(map(read_image, paths)),
        RESIZE: lambda: exhaust(v2.functional.resize(read_image(path), [SHORT], max_size=LONG) for path in paths),
        PIXELS: lambda: exhaust(pixels),
        BATCH: lambda: exhaust(by_model(whole)),
        TRAINING: partial(exhaust, loader(split, transform, batch, training=True, mixing=mixing)),
        EVALUATION: partial(exhaust, loader(split, resize_transform(), batch, training=False)),
    }


def exhaust(batches: Iterable[Any]) -> None:
    for _ in batches:
        pass


def by_model(batches: Iterable[Any]) -> Iterator[Any]:
    """What torchvision's detectors make of images before their first layer."""
    transform = GeneralizedRCNNTransform(SHORT, LONG, MEAN, STD)
    for images, targets in batches:
        yield transform(images, targets if all("boxes" in target for target in targets) else None)


def apart(split: Split) -> str:
    """How far fpn's images and boxes are from torchvision's, straight and flipped, in words for a table."""
    means, most, corner = [], 0.0, 0.0
    for flip in (0.0, 1.0):
        ours: Any = DetectionDataset(split, train_transform(flip=flip), training=True)
        theirs: Any = torchvision_loader(split, 1, flip, resize=True).dataset
        for index in range(len(split)):
            sample, (image, target) = ours[index], theirs[index]
            levels = (sample.image - 255 * image.as_subclass(Tensor)).abs()
            means, most = [*means, float(levels.mean())], max(most, float(levels.max()))
            if len(sample.boxes):
                corner = max(corner, float((sample.boxes - target["boxes"].as_subclass(Tensor)).abs().max()))
    return f"{np.mean(means):.3f}, at most {most:.0f}; {corner:.5f} px"


def size_of(text: str) -> tuple[int, int]:
    width, height = map(int, text.split("x"))
    return height, width


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["640x480", "1920x1080", "4000x3000"], help="width x height")
    parser.add_argument("--boxes", type=int, nargs="+", default=[10, 0, 100, 1000, 5000], help="an image")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, torch.get_num_threads()])
    parser.add_argument("--images", type=int, default=8, help="of the first size; fewer of larger ones, 2 at least")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    first, *larger = map(size_of, options.sizes)
    cases = [(first, boxes) for boxes in options.boxes] + [(size, options.boxes[0]) for size in larger]
    print(f"{machine()}\n")
    print("| images, boxes each | threads | | images/s | times as fast as pixels | as batch | distance |")
    print("|---|---|---|---|---|---|---|")
    for size, boxes in cases:
        number = max(2, options.images * first[0] * first[1] // (size[0] * size[1]))
        with tempfile.TemporaryDirectory() as folder:
            split = write(Path(folder), number, size, boxes)
            distance = apart(split)
            for threads in dict.fromkeys(options.threads):
                torch.set_num_threads(threads)
                seconds = alternate(sides_of(split, options.batch), options.repeats)
                over = [ratios(seconds, peer) for peer in (PIXELS, BATCH)]
                for name, took in seconds.items():
                    rate = number / spread(took)[0]
                    times = " | ".join(shown(each[name]) for each in over)
                    far = distance if name == TRAINING else ""
                    print(f"| {size[1]} x {size[0]}, {boxes} | {threads} | {name} | {rate:.0f} | {times} | {far} |")


if __name__ == "__main__":
    main()
