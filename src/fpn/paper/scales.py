"""How large the experiments are: `small` for an afternoon's look on one GPU or two cores, `full` as in the paper.

A scale says what the pyramid of row c is made of and how each kind of cell is trained; all other rows differ from row c
in nothing but what their letter says.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from fpn.data import Split
from fpn.data.batching import seed_from
from fpn.errors import OptionError
from fpn.hardware import pick_device
from fpn.training.settings import default_batch

SCALES = ("small", "full")
SHORT = 800  # pixels
# At every input size: an anchor is as wide as 8 strides of its level. Smaller ones would leave so few places to each
# object that the coarse levels of row c have no chance against one fine level, whatever the objects' sizes.
ANCHORS = (32.0, 64.0, 128.0, 256.0, 512.0)
CANONICAL = 224.0  # pixels at 800, and in proportion at others, so that regions come from several levels as there

# Small: what two cores do in about a minute a cell.
SMALL_SHORT = 256
SMALL_IMAGES = (600, 200)  # most images to learn from, and to measure on
VIEWS = {"tiny": 3600, "any": 1600}  # images that pass in training, repeated ones counted, by backbone

# Full: 8 GPUs with 2 images each; iterations, of which the last quarter at a tenth of the learning rate.
IMAGES = 16
ITERATIONS = {"rpn": 40_000, "fast_rcnn": 80_000, "mask_proposals": 80_000}
RATES = {"rpn": 0.02, "fast_rcnn": 0.02, "mask_proposals": 0.03}


@dataclass(frozen=True)
class Scale:
    """What row c is built of and how it is trained.

    detector: options of `fpn.build` for all kinds of cell; own: those that only one kind of model has. training:
    options of `fpn.train` by model. images: how many of the training and validation images at most.
    """

    name: str
    detector: dict[str, Any]
    own: dict[str, dict[str, Any]]
    training: dict[str, dict[str, Any]]
    images: tuple[int, int] | None = None
    run: dict[str, Any] = field(default_factory=dict)  # options of `fpn.train` that change no result: device, workers

    @property
    def backbone(self) -> str:
        return self.detector["backbone"]


def small(
    backbone: str, weights: str, short: int | None, long: int | None, epochs: int | None, images: int, run: dict
) -> Scale:
    """A few hundred images of `short` pixels and a narrow pyramid; images: how many there are."""
    short = short or SMALL_SHORT
    detector = {**sized(backbone, weights, short, long), "width": 64}
    if backbone == "tiny":
        detector["width"] = 48
    views = VIEWS.get(backbone, VIEWS["any"])
    batch = 8 if backbone == "tiny" else 4
    lr = 0.04 if backbone == "tiny" else 0.01
    training = {
        "epochs": epochs or max(1, round(views / max(1, min(images, SMALL_IMAGES[0])))),
        "batch": batch,
        "lr": lr,
        "augment": "light",
    }
    limits = {"proposals_per_level": (1000, 1000), "proposals": (1000, 1000)}
    own = {
        "rpn": limits,
        "fast_rcnn": {"hidden": 256, "canonical": CANONICAL * short / SHORT, "box_examples": 128},
        "mask_proposals": {"hidden": 128},
    }
    return Scale("small", detector, own, dict.fromkeys(ITERATIONS, training), SMALL_IMAGES, run)


def full(
    backbone: str, weights: str, short: int | None, long: int | None, epochs: int | None, images: int, run: dict
) -> Scale:
    """The paper's settings and numbers of iterations, in whole epochs; images: how many there are to learn from.

    The batch of 16 images is divided among the devices and, where it does not fit, into steps whose gradients add up.
    """
    short = short or SHORT
    world = run.get("devices", 1) * run.get("nodes", 1)
    if IMAGES % world:
        raise OptionError(f"{world} devices: the paper's batch of {IMAGES} images does not divide among them")
    batch = min(default_batch(pick_device(run.get("device", "auto"))), IMAGES // world)
    while IMAGES // world % batch:
        batch -= 1
    steps = max(1, images // IMAGES)
    training = {
        model: {
            "epochs": epochs or max(1, round(iterations / steps)),
            "batch": batch,
            "accumulate": IMAGES // world // batch,
            "lr": RATES[model],
            "schedule": "paper",
            "warmup": 500,  # none in the paper; its own successors found that it saves runs from diverging
            "augment": "light",
            "ema": 0.0,
        }
        for model, iterations in ITERATIONS.items()
    }
    own = {
        "rpn": {"preset": "paper"},
        "fast_rcnn": {"preset": "paper", "canonical": CANONICAL * short / SHORT},
        "mask_proposals": {},
    }
    return Scale("full", sized(backbone, weights, short, long), own, training, None, run)


def sized(backbone: str, weights: str, short: int, long: int | None) -> dict[str, Any]:
    """A backbone and an input size, with the paper's anchors."""
    side = {} if long is None else {"long": long}
    return {"backbone": backbone, "weights": weights, "short": short, **side, "anchor_sizes": ANCHORS}


def of_demo(epochs: int | None, run: dict) -> Scale:
    """The demo's images and backbone."""
    from fpn.demo import IMAGES as DEMO_IMAGES
    from fpn.demo import SIDE

    return small("tiny", "none", SIDE, SIDE, epochs, DEMO_IMAGES, run)


def chosen(split: Split, most: int | None) -> Split:
    """At most so many images of a split, the same ones in every run."""
    if most is None or len(split) <= most:
        return split
    return split.select(np.sort(np.random.default_rng(seed_from(0)).permutation(len(split))[:most]), split.name)


def placed(device: str, devices: int | None, workers: int | None) -> dict[str, Any]:
    """Where it runs, as options of `fpn.train`; several devices are those of torchrun.

    Raises OptionError for several devices without it.
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if devices is not None and devices != here:
        raise OptionError(
            f"devices is {devices}, but {here} of them started: run "
            f"`torchrun --nproc-per-node {devices} -m fpn.cli paper ...`, which starts a process for each"
        )
    given: Mapping[str, Any] = {"device": device, "devices": here, "nodes": world // here, "workers": workers}
    return {name: value for name, value in given.items() if value is not None}


def on(run: Mapping[str, Any]) -> torch.device:
    """The device of this process."""
    device = pick_device(run.get("device", "auto"))
    local = int(os.environ.get("LOCAL_RANK", 0))
    return torch.device("cuda", local) if device.type == "cuda" and device.index is None else device
