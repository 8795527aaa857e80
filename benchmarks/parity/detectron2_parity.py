# The peer need not be installed where types are checked.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportCallIssue=false
"""detectron2's detectors and fpn's with the same weights on the same pixels: maps, proposals, detections, losses.

    python benchmarks/parity/detectron2_parity.py DETECTRON2 [--write] [--only NAME]

DETECTRON2 is a checkout of its repository (for its configs); the package must be importable, its compiled extension
need not be there. Each model gets seeded random weights, with random running statistics. Prints the largest difference
of each part, relative; above 1e-4 the exit status is 1. `--write` stores samples of detectron2's numbers in
tests/reference.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, ImageList, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
import foreign_reference as reference

from fpn.weights.detectron2 import from_detectron2

SMALL = {"MODEL.RESNETS.DEPTH": 18, "MODEL.RESNETS.RES2_OUT_CHANNELS": 64}
SLIM = {"MODEL.FPN.OUT_CHANNELS": 32, "MODEL.ROI_BOX_HEAD.FC_DIM": 48, "MODEL.ROI_MASK_HEAD.CONV_DIM": 32}
MODELS: dict[str, tuple[str, dict[str, Any], bool]] = {  # name: (configuration, changes, whether it is stored)
    "faster_rcnn_R_50": ("COCO-Detection/faster_rcnn_R_50_FPN_3x.yaml", SLIM, True),
    "retinanet_R_18": ("COCO-Detection/retinanet_R_50_FPN_3x.yaml", SMALL | SLIM, True),
    "mask_rcnn_R_18": ("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml", SMALL | SLIM, True),
    "cascade_mask_rcnn_R_18": ("Misc/cascade_mask_rcnn_R_50_FPN_3x.yaml", SMALL | SLIM, True),
    "faster_rcnn_R_101": ("COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml", {}, False),
    "faster_rcnn_X_101": ("COCO-Detection/faster_rcnn_X_101_32x8d_FPN_3x.yaml", {}, False),
    "retinanet_R_101": ("COCO-Detection/retinanet_R_101_FPN_3x.yaml", {}, False),
    "cascade_mask_rcnn_R_50": ("Misc/cascade_mask_rcnn_R_50_FPN_3x.yaml", {}, False),
}


def model_of(config: Path, changes: dict[str, Any]) -> Any:
    cfg = get_cfg()
    cfg.merge_from_file(str(config))
    always = {
        "MODEL.DEVICE": "cpu",
        "MODEL.WEIGHTS": "",
        "MODEL.ROI_HEADS.NUM_CLASSES": reference.CLASSES,
        "MODEL.RETINANET.NUM_CLASSES": reference.CLASSES,
        "MODEL.RPN.BATCH_SIZE_PER_IMAGE": reference.EVERY,
        "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": reference.EVERY,
    }
    cfg.merge_from_list([part for entry in (always | changes).items() for part in entry])
    return build_model(cfg)


def inputs() -> list[dict[str, Any]]:
    batch = reference.batch()
    assert batch.targets is not None and batch.targets.masks is not None
    found = []
    for i, (height, width) in enumerate(reference.SIZES):
        objects = Instances((height, width))
        objects.gt_boxes = Boxes(torch.tensor(reference.BOXES[i]))
        objects.gt_classes = torch.tensor(reference.LABELS[i])
        objects.gt_masks = BitMasks(batch.targets.masks[i, : len(objects), :height, :width].bool())
        found.append({"image": batch.images[i, :, :height, :width].flip(0), "instances": objects})
    return found


def numbers_of(model: Any) -> dict[str, np.ndarray]:
    """What detectron2 gives, as `reference.differences` wants it."""
    found: dict[str, np.ndarray] = {}
    model.eval()
    with torch.no_grad():
        images = model.preprocess_image(inputs())
        maps = model.backbone(images.tensor)
        found |= {name.upper(): reference.sampled(values) for name, values in maps.items()}
        if hasattr(model, "roi_heads"):
            proposals, _ = model.proposal_generator(images, maps)
            found |= {f"proposals_{i}": p.proposal_boxes.tensor[:60].numpy() for i, p in enumerate(proposals)}
            results = model.inference(inputs(), do_postprocess=False)
        else:
            features = [maps[name] for name in model.head_in_features]
            results = model.forward_inference(images, features, model.head(features))
            for result in results:
                result.pred_boxes.clip(result.image_size)
            results = [result[result.pred_boxes.nonempty(1e-2)] for result in results]
    for i, result in enumerate(results):
        found |= {f"boxes_{i}": result.pred_boxes.tensor.numpy(), f"scores_{i}": result.scores.numpy()}
        found[f"labels_{i}"] = result.pred_classes.numpy().astype(np.uint8)
        if result.has("pred_masks"):
            found[f"masks_{i}"] = result.pred_masks[:5, 0, ::5, ::5].numpy()
    return found | {f"loss_{name}": np.array(value) for name, value in losses_of(model, images, maps).items()}


def losses_of(model: Any, images: ImageList, maps: dict[str, Tensor]) -> dict[str, float]:
    """The losses of detectron2 by our names, divided as ours are.

    detectron2 divides the RPN's by the number of examples that it would like to have, RetinaNet's by a running average
    of the number of positives; we by their number.
    """
    model.train()
    objects = [entry["instances"] for entry in inputs()]
    with torch.no_grad(), EventStorage():
        losses = {name: float(value) for name, value in model(inputs()).items()}
        features = [maps[name] for name in getattr(model, "head_in_features", ())]
        if features:
            labels, _ = model.label_anchors(model.anchor_generator(features), objects)
            positive = sum(int(((some >= 0) & (some != model.num_classes)).sum()) for some in labels)
            factor = model.loss_normalizer / positive
            return {"class": losses["loss_cls"] * factor, "box": losses["loss_box_reg"] * factor}
        rpn = model.proposal_generator
        labels, _ = rpn.label_and_sample_anchors(rpn.anchor_generator([maps[n] for n in rpn.in_features]), objects)
        factor = rpn.batch_size_per_image * len(objects) / sum(int((some >= 0).sum()) for some in labels)
    ours = {"rpn_class": losses["loss_rpn_cls"] * factor, "rpn_box": losses["loss_rpn_loc"] * factor}
    names = {"loss_cls": "class", "loss_box_reg": "box", "loss_mask": "mask"}
    names |= {f"{term}_stage{n}": f"{name}_{n + 1}" for n in range(3) for term, name in list(names.items())[:2]}
    return ours | {name: losses[term] for term, name in names.items() if term in losses}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("detectron2", type=Path)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--only", choices=MODELS)
    arguments, worst = parser.parse_args(), 0.0
    for name, (config, changes, stored) in MODELS.items():
        if arguments.only not in (None, name) or arguments.write and not stored:
            continue
        model = model_of(arguments.detectron2 / "configs" / config, changes)
        pixel_std = float(128 / model.pixel_std.mean())
        shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
        state = reference.seeded_weights(shapes, pixel_std)
        model.load_state_dict(state)
        numbers = numbers_of(model)
        found = reference.differences(reference.prepared(from_detectron2(state)), numbers)
        print(f"{name}: {len(numbers['scores_0'])} and {len(numbers['scores_1'])} detections")
        print("  " + ", ".join(f"{part} {value:.1e}" for part, value in found.items()), flush=True)
        worst = max(worst, *found.values())
        if arguments.write:
            reference.save(reference.REFERENCE / f"detectron2_{name}.npz", numbers, state, pixel_std)
    print(f"largest difference: {worst:.1e}")
    return int(worst > 1e-4)


if __name__ == "__main__":
    raise SystemExit(main())
