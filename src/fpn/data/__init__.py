"""Files -> Split arrays -> Sample -> Batch.

`load` reads a data set in COCO, Pascal VOC or YOLO format; `DetectionDataset`, `GroupedBatches` and `collate`
(or all at once, `loader`) turn one of its splits into batches.
"""

from fpn.data.batching import DetectionDataset, GroupedBatches, collate, loader
from fpn.data.dataset import Data, Problem, Split
from fpn.data.images import image_size, read_image
from fpn.data.info import describe, print_info
from fpn.data.load import load
from fpn.data.transforms import resize_transform, resized_size, train_transform

__all__ = [
    "Data",
    "DetectionDataset",
    "GroupedBatches",
    "Problem",
    "Split",
    "collate",
    "describe",
    "image_size",
    "load",
    "loader",
    "print_info",
    "read_image",
    "resize_transform",
    "resized_size",
    "train_transform",
]
