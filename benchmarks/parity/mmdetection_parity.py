# The peer need not be installed where types are checked.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportCallIssue=false
"""mmdetection's detectors and fpn's with the same weights on the same pixels: maps, proposals, detections, losses.

    python benchmarks/parity/mmdetection_parity.py CONFIGS [--write] [--only NAME]

CONFIGS is mmdetection's folder of configurations (mmdet/.mim/configs of the installed package). Needs mmdet 3 and mmcv;
mmcv-lite will do, torchvision's operators then stand in for mmcv's compiled ones. Each model gets seeded random
weights, with random running statistics. Prints the largest difference of each part, relative; above 1e-4 the exit
status is 1. `--write` stores samples of mmdetection's numbers in tests/reference.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import mmcv
import numpy as np
import torch
import torchvision
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
import foreign_reference as reference

from fpn.weights.mmdetection import from_mmdetection

DEPTH_18 = {"model.backbone.depth": 18, "model.neck.in_channels": [64, 128, 256, 512]}
SLIM = {"model.neck.out_channels": 32}
SLIM_RPN = SLIM | {"model.rpn_head.in_channels": 32, "model.rpn_head.feat_channels": 32}
SLIM_BOX = SLIM_RPN | {
    "model.roi_head.bbox_roi_extractor.out_channels": 32,
    "model.roi_head.bbox_head.in_channels": 32,
    "model.roi_head.bbox_head.fc_out_channels": 48,
}
SLIM_MASK = SLIM_BOX | {
    "model.roi_head.mask_roi_extractor.out_channels": 32,
    "model.roi_head.mask_head.in_channels": 32,
    "model.roi_head.mask_head.conv_out_channels": 32,
}
SLIM_DENSE = SLIM | {"model.bbox_head.in_channels": 32, "model.bbox_head.feat_channels": 32}
MODELS: dict[str, tuple[str, dict[str, Any], bool]] = {  # name: (configuration, changes, whether it is stored)
    "faster_rcnn_r50": ("faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py", SLIM_BOX, True),
    "faster_rcnn_r50_caffe": ("faster_rcnn/faster-rcnn_r50-caffe_fpn_1x_coco.py", SLIM_BOX, False),
    "mask_rcnn_r18": ("mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py", DEPTH_18 | SLIM_MASK, True),
    "cascade_rcnn_r18": ("cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py", DEPTH_18 | SLIM_RPN, True),
    "retinanet_r18": ("retinanet/retinanet_r50_fpn_1x_coco.py", DEPTH_18 | SLIM_DENSE, True),
    "atss_r18": ("atss/atss_r50_fpn_1x_coco.py", DEPTH_18 | SLIM_DENSE, True),
    "faster_rcnn_x101": ("faster_rcnn/faster-rcnn_x101-32x8d_fpn_ms-3x_coco.py", {}, False),
    "retinanet_r101": ("retinanet/retinanet_r101_fpn_1x_coco.py", {}, False),
    "cascade_rcnn_r50": ("cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py", {}, False),
}


def stand_in_for_operators() -> None:
    """Let torchvision's operators be mmcv's where these are not compiled; others that models import cannot be made."""

    class Missing(nn.Module):
        def __init__(self, *_: Any, **__: Any):
            raise NotImplementedError("mmcv's compiled operators are needed for this")

    class Operators(ModuleType):
        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return type(name, (Missing,), {})

    class RoIAlign(nn.Module):
        def __init__(self, output_size: int, spatial_scale: float, sampling_ratio: int = 0, aligned: bool = True):
            super().__init__()
            self.output_size, self.spatial_scale = (output_size, output_size), spatial_scale
            self.options = (output_size, spatial_scale, sampling_ratio, aligned)

        def forward(self, x: Tensor, rois: Tensor) -> Tensor:
            return torchvision.ops.roi_align(x, rois, *self.options)

    def roi_align(x, rois, size, scale=1.0, samples=0, mode="avg", aligned=True):
        return torchvision.ops.roi_align(x, rois, size, scale, samples, aligned)

    def batched_nms(boxes, scores, groups, config, class_agnostic=False):
        keep = torchvision.ops.batched_nms(boxes, scores, groups * (not class_agnostic), config["iou_threshold"])
        return torch.cat([boxes[keep], scores[keep, None]], 1), keep

    mmcv.__version__ = "2.1.0"  # the last that mmdet 3.3 accepts
    names = ("nms", "roi_align", "carafe", "merge_cells", "modulated_deform_conv", "multi_scale_deform_attn")
    for name in ("mmcv.ops", *(f"mmcv.ops.{name}" for name in names)):
        module = Operators(name)
        module.__path__ = []
        module.batched_nms, module.roi_align, module.RoIAlign = batched_nms, roi_align, RoIAlign
        sys.modules[name] = module


if importlib.util.find_spec("mmcv._ext") is None:
    stand_in_for_operators()

from mmdet.registry import MODELS as REGISTRY  # noqa: E402
from mmdet.structures import DetDataSample  # noqa: E402
from mmdet.structures.mask import BitmapMasks  # noqa: E402
from mmdet.utils import register_all_modules  # noqa: E402
from mmengine.config import Config  # noqa: E402
from mmengine.structures import InstanceData  # noqa: E402


def configuration(file: Path, changes: dict[str, Any]) -> Config:
    config = Config.fromfile(str(file))
    heads = config.model.get("roi_head", config.model).bbox_head
    for head in heads if isinstance(heads, list) else [heads]:
        head.num_classes = reference.CLASSES
        if isinstance(heads, list) and "model.neck.out_channels" in changes:
            head.in_channels, head.fc_out_channels = 32, 48
            config.model.roi_head.bbox_roi_extractor.out_channels = 32
    if "mask_head" in config.model.get("roi_head", {}):
        config.model.roi_head.mask_head.num_classes = reference.CLASSES
    config.merge_from_dict(changes)
    config.model.backbone.init_cfg = None
    if config.model.type == "ATSS":
        config.model.test_cfg.nms_pre = reference.CANDIDATES
    train = config.model.get("train_cfg") or {}
    if "rpn" in train:  # every example, so that no luck is involved
        train.rpn.sampler.num = reference.EVERY
        train.rpn.allowed_border = -1  # Cascade R-CNN leaves anchors that reach out of the image out of its loss
        for stage in train.rcnn if isinstance(train.rcnn, list) else [train.rcnn]:
            stage.sampler.num, stage.sampler.pos_fraction = reference.EVERY, 0.5
    return config


def inputs() -> dict[str, Any]:
    batch = reference.batch()
    assert batch.targets is not None and batch.targets.masks is not None
    images, samples = [], []
    for i, (height, width) in enumerate(reference.SIZES):
        shape = {"img_shape": (height, width), "ori_shape": (height, width), "scale_factor": (1.0, 1.0)}
        sample = DetDataSample(metainfo={"img_id": i, **shape})
        masks = batch.targets.masks[i, : len(reference.BOXES[i]), :height, :width].numpy()
        sample.gt_instances = InstanceData(
            bboxes=torch.tensor(reference.BOXES[i]),
            labels=torch.tensor(reference.LABELS[i]),
            masks=BitmapMasks(masks, height, width),
        )
        images.append(batch.images[i, :, :height, :width].flip(0))  # blue first, as mmcv reads files
        samples.append(sample)
    return {"inputs": images, "data_samples": samples}


def numbers_of(model: Any) -> dict[str, np.ndarray]:
    """What mmdetection gives, as `reference.differences` wants it."""
    model.eval()
    found: dict[str, np.ndarray] = {}
    with torch.no_grad():
        data = model.data_preprocessor(inputs(), False)
        maps = model.extract_feat(data["inputs"])
        lowest = 2 if hasattr(model, "rpn_head") else 3
        found |= {f"P{level}": reference.sampled(values) for level, values in enumerate(maps, lowest)}
        if hasattr(model, "rpn_head"):
            proposals = model.rpn_head.predict(maps, data["data_samples"], rescale=False)
            found |= {f"proposals_{i}": p.bboxes[:60].numpy() for i, p in enumerate(proposals)}
            head = model.roi_head
            results = head.predict_bbox(
                maps, [s.metainfo for s in data["data_samples"]], proposals, head.test_cfg, rescale=False
            )
        else:
            results = model.bbox_head.predict(maps, data["data_samples"], rescale=False)
        for i, result in enumerate(results):
            kept = result.scores > 0.05  # ATSS also gives those that the centerness puts below
            found |= {f"boxes_{i}": result.bboxes[kept].numpy(), f"scores_{i}": result.scores[kept].numpy()}
            found[f"labels_{i}"] = result.labels[kept].numpy().astype(np.uint8)
            if getattr(getattr(model, "roi_head", None), "with_mask", False):
                rois = torch.cat([torch.full((5, 1), float(i)), result.bboxes[:5]], 1)
                masks = model.roi_head._mask_forward(maps, rois)["mask_preds"].sigmoid()
                found[f"masks_{i}"] = masks[torch.arange(5), result.labels[:5], ::5, ::5].numpy()
        model.train()
        losses = model.loss(data["inputs"], data["data_samples"])
    return found | {f"loss_{name}": np.array(value) for name, value in renamed(losses).items()}


def renamed(losses: dict[str, Any]) -> dict[str, float]:
    """mmdetection's losses by our names, without the weights that it has put on them."""
    total = {name: float(sum(value) if isinstance(value, list) else value) for name, value in losses.items()}
    names = {"loss_rpn_cls": "rpn_class", "loss_rpn_bbox": "rpn_box", "loss_mask": "mask"}
    names |= {"loss_cls": "class", "loss_bbox": "box", "loss_centerness": "centerness"}
    found = {ours: total[theirs] for theirs, ours in names.items() if theirs in total}
    # The examples of a cascade's later stages differ: mmdetection leaves out the ground truth that stood among those
    # of the stage before.
    for theirs, ours in (("s0.loss_cls", "class_1"), ("s0.loss_bbox", "box_1")):
        if theirs in total:
            found[ours] = total[theirs]
    if "centerness" in found:
        found["box"] /= 2.0  # ATSS
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", type=Path)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--only", choices=MODELS)
    arguments, worst = parser.parse_args(), 0.0
    register_all_modules()
    for name, (file, changes, stored) in MODELS.items():
        if arguments.only not in (None, name) or arguments.write and not stored:
            continue
        config = configuration(arguments.configs / file, changes)
        model = REGISTRY.build(config.model)
        pixel_std = float(70 / np.mean(config.model.data_preprocessor.std))
        shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
        state = reference.seeded_weights(shapes, pixel_std)
        model.load_state_dict(state)
        numbers = numbers_of(model)
        detector = from_mmdetection({"state_dict": state, "meta": {"cfg": config.pretty_text}})
        found = reference.differences(reference.prepared(detector), numbers)
        print(f"{name}: {len(numbers['scores_0'])} and {len(numbers['scores_1'])} detections")
        print("  " + ", ".join(f"{part} {value:.1e}" for part, value in found.items()), flush=True)
        worst = max(worst, *found.values())
        if arguments.write:
            reference.save(reference.REFERENCE / f"mmdetection_{name}.npz", numbers, state, pixel_std)
    print(f"largest difference: {worst:.1e}")
    return int(worst > 1e-4)


if __name__ == "__main__":
    raise SystemExit(main())
