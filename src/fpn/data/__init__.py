"""Files -> Split arrays -> Sample -> Batch.

`load` reads a data set in COCO, Pascal VOC or YOLO format; `DetectionDataset`, `GroupedBatches` and `collate`
(or all at once, `loader`) turn one of its splits into batches.
"""

from typing import TYPE_CHECKING

from fpn.lazy import lazy

if TYPE_CHECKING:
    from fpn.data.augment import PRESETS, Augmentation, train_transform
    from fpn.data.balance import print_balance
    from fpn.data.batching import DetectionDataset, GroupedBatches, collate, loader
    from fpn.data.convert import convert
    from fpn.data.dataset import Data, Problem, Split, class_agnostic
    from fpn.data.defects import Defect, find_defects
    from fpn.data.images import image_size, read_image
    from fpn.data.info import describe, print_info
    from fpn.data.load import load
    from fpn.data.mixing import training_transform
    from fpn.data.regions import with_regions, write_regions
    from fpn.data.repair import Change, Repair, repair
    from fpn.data.sizes import resized_size
    from fpn.data.splits import split
    from fpn.data.transforms import resize_transform

__all__ = [
    "PRESETS",
    "Augmentation",
    "Change",
    "Data",
    "Defect",
    "DetectionDataset",
    "GroupedBatches",
    "Problem",
    "Repair",
    "Split",
    "class_agnostic",
    "collate",
    "convert",
    "describe",
    "find_defects",
    "image_size",
    "load",
    "loader",
    "print_balance",
    "print_info",
    "read_image",
    "repair",
    "resize_transform",
    "resized_size",
    "split",
    "train_transform",
    "training_transform",
    "with_regions",
    "write_regions",
]

lazy(
    __name__,
    {
        **dict.fromkeys(("PRESETS", "Augmentation", "train_transform"), "fpn.data.augment"),
        "print_balance": "fpn.data.balance",
        **dict.fromkeys(("DetectionDataset", "GroupedBatches", "collate", "loader"), "fpn.data.batching"),
        "convert": "fpn.data.convert",
        **dict.fromkeys(("Data", "Problem", "Split", "class_agnostic"), "fpn.data.dataset"),
        **dict.fromkeys(("Defect", "find_defects"), "fpn.data.defects"),
        **dict.fromkeys(("image_size", "read_image"), "fpn.data.images"),
        **dict.fromkeys(("describe", "print_info"), "fpn.data.info"),
        "load": "fpn.data.load",
        "training_transform": "fpn.data.mixing",
        **dict.fromkeys(("with_regions", "write_regions"), "fpn.data.regions"),
        **dict.fromkeys(("Change", "Repair", "repair"), "fpn.data.repair"),
        "resized_size": "fpn.data.sizes",
        "split": "fpn.data.splits",
        "resize_transform": "fpn.data.transforms",
    },
)
