"""Files -> Split arrays -> Sample -> Batch.

`load` reads a data set in COCO, Pascal VOC or YOLO format; `DetectionDataset`, `GroupedBatches` and `collate`
(or all at once, `loader`) turn one of its splits into batches.
"""

from fpn.data.augment import PRESETS, Augmentation, train_transform
from fpn.data.balance import print_balance
from fpn.data.batching import DetectionDataset, GroupedBatches, collate, loader
from fpn.data.convert import convert
from fpn.data.dataset import Data, Problem, Split
from fpn.data.defects import Defect, find_defects
from fpn.data.images import image_size, read_image
from fpn.data.info import describe, print_info
from fpn.data.load import load
from fpn.data.mixing import training_transform
from fpn.data.repair import Change, Repair, repair
from fpn.data.splits import split
from fpn.data.transforms import resize_transform, resized_size

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
]
