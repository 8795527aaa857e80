"""The other side of the comparison: torchvision's Faster R-CNN with FPN, trained as its users would train it.

torchvision has the model but no trainer, so this is the loop that a user of it has to write, after the recipe of its
reference scripts: SGD with momentum, linear warm-up in the first epoch, horizontal flips; here with a cosine decay. The
backbone is torchvision's MobileNetV2 from a file of ImageNet weights, all of it trained but for its batch norms, which
are frozen as torchvision does for its own pretrained detectors. Data set, input size, epochs, batches and the scorer
(`fpn.evaluation.metrics`) are the same as for fpn, and so are the layers that the pyramid starts from.

    python benchmarks/bccd_torchvision.py DATA --weights mobilenet_v2-b0353104.pth --out runs/torchvision.json

DATA is any data set that fpn reads; the numbers of BCCD in docs/results.md come from the defaults, which take about 18
minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops import FrozenBatchNorm2d
from torchvision.transforms.v2.functional import horizontal_flip_image
from tqdm import tqdm

from fpn.data import load, read_image
from fpn.data.dataset import Split
from fpn.errors import FpnError
from fpn.evaluation.metrics import Metrics, Results, score

# The last blocks of MobileNetV2's features with strides 4, 8, 16 and 32, and their channels.
LAYERS = {"3": "0", "6": "1", "13": "2", "17": "3"}
CHANNELS = [24, 32, 96, 320]


class Images(Dataset):
    """Images as torchvision's detectors take them: floats from 0 to 1, labels from 1 as 0 is the background."""

    def __init__(self, split: Split, flip: bool):
        self.split, self.flip = split, flip

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        image = read_image(self.split.path(index)).float() / 255
        rows, wanted = self.split.rows(index), ~self.split.ignore[self.split.rows(index)]
        boxes = torch.from_numpy(self.split.boxes[rows][wanted]).float()
        labels = torch.from_numpy(self.split.labels[rows][wanted]) + 1
        if self.flip and torch.rand(()) < 0.5:
            image = horizontal_flip_image(image)
            boxes = torch.stack(
                [image.shape[2] - boxes[:, 2], boxes[:, 1], image.shape[2] - boxes[:, 0], boxes[:, 3]], 1
            )
        return image, {"boxes": boxes, "labels": labels}


def build(classes: int, weights: Path, channels: int, size: int) -> FasterRCNN:
    body = torchvision.models.mobilenet_v2(weights=None, norm_layer=FrozenBatchNorm2d)
    body.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    backbone = BackboneWithFPN(body.features, LAYERS, CHANNELS, channels)
    return FasterRCNN(backbone, classes + 1, min_size=size, max_size=round(size * 1333 / 800))


def train(model: FasterRCNN, split: Split, options: argparse.Namespace) -> float:
    """Trains and returns the seconds it took."""
    loader = DataLoader(
        Images(split, flip=True),
        options.batch,
        shuffle=True,
        num_workers=options.workers,
        collate_fn=lambda samples: tuple(zip(*samples, strict=True)),
        generator=torch.Generator().manual_seed(options.seed),
    )
    steps = options.iterations or options.epochs * len(loader)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, options.lr, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate_at(min(len(loader) - 1, 1000), steps))

    model.train().to(options.device)
    start, step = time.perf_counter(), 0
    with tqdm(total=steps, desc="training", unit="batch") as bar:
        while step < steps:
            for images, targets in loader:
                images = [image.to(options.device) for image in images]
                targets = [{name: value.to(options.device) for name, value in target.items()} for target in targets]
                loss = sum(model(images, targets).values(), torch.zeros((), device=options.device))
                if not math.isfinite(loss.item()):
                    raise FpnError(f"the loss is {loss.item()} at iteration {step}; a lower --lr may help")
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                step += 1
                bar.update()
                bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
                if step == steps:
                    break
    return time.perf_counter() - start


def rate_at(warmup: int, steps: int) -> Callable[[int], float]:
    """Factor of the rate at each step: from 1/1000 up in a line over `warmup` steps, then down to 0 by a cosine."""

    def factor(step: int) -> float:
        if step < warmup:
            return 0.001 + 0.999 * step / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))

    return factor


@torch.inference_mode()
def evaluate(model: nn.Module, split: Split, device: str) -> Metrics:
    model.eval().to(device)
    found = []
    for index in tqdm(range(len(split)), desc="evaluating", unit="image"):
        (detections,) = model([(read_image(split.path(index)).float() / 255).to(device)])
        boxes, scores, labels = (detections[name].cpu().numpy() for name in ("boxes", "scores", "labels"))
        found.append((np.full(len(scores), index), boxes.astype(np.float64), scores, labels - 1))
    indices, boxes, scores, labels = (np.concatenate(column) for column in zip(*found, strict=True))
    return score(split, Results(np.arange(len(split)), indices, boxes, scores, labels))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Trains torchvision's Faster R-CNN with FPN and scores it.")
    parser.add_argument("data", type=Path, help="a data set in COCO, Pascal VOC or YOLO format")
    parser.add_argument(
        "--weights", type=Path, required=True, help="file of torchvision's ImageNet weights of MobileNetV2"
    )
    parser.add_argument("--train-split", default="train")
    parser.add_argument("--test-split", default="test")
    parser.add_argument("--channels", type=int, default=128, help="channels of the pyramid")
    parser.add_argument("--size", type=int, default=320, help="shorter side of the input in pixels")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--iterations", type=int, help="stop after so many batches instead of --epochs")
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--workers", type=int, default=0, help="processes that load images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="JSON file for the result; printed in any case")
    return parser.parse_args()


def main() -> None:
    options = parse()
    torch.manual_seed(options.seed)
    data = load(options.data)
    train_split, test_split = data[options.train_split], data[options.test_split]
    model = build(len(data.classes), options.weights, options.channels, options.size)
    seconds = train(model, train_split, options)
    metrics = evaluate(model, test_split, options.device)
    print(metrics.table())
    versions = {"torch": torch.__version__, "torchvision": torchvision.__version__, "threads": torch.get_num_threads()}
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    result = {**metrics.as_dict(), "training_seconds": round(seconds, 1), "settings": settings, **versions}
    text = json.dumps(result, indent=2)
    print(text)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    try:
        main()
    except (FpnError, OSError) as error:
        sys.exit(f"error: {error}")
