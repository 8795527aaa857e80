"""How OpenVINO writes the operators of an exported detector that its PyTorch frontend does not know.

Each takes the node of the program and gives what stands for it, out of OpenVINO's own operators.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np


def extensions() -> list[Any]:
    """For `openvino.convert_model`."""
    from openvino.frontend.pytorch import ConversionExtension

    return [
        ConversionExtension("fpn.nms.default", nms),
        ConversionExtension("fpn.roi_align.default", roi_align),
        ConversionExtension("aten._upsample_bilinear2d_aa.default", resize),
    ]


def operators() -> Any:
    return import_module("openvino.opset13")


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def resize(node: Any) -> list[Any]:
    """Antialiased bilinear interpolation of bytes, as PyTorch does it after Pillow: rows first, bytes in between."""
    op = operators()

    pixels, size = op.convert(node.get_input(0), "f32"), node.get_input(1)
    for axis in (3, 2):
        length = op.gather(size, ints(axis - 2), np.int64(0))
        found = op.interpolate(pixels, length, "bilinear_pillow", "sizes", axes=ints(axis))
        pixels = op.clamp(op.round(found, "half_away_from_zero"), 0.0, 255.0)
    return [op.convert(pixels, "u8").output(0)]


def nms(node: Any) -> list[Any]:
    """`fpn::nms` (boxes, scores, groups, valid, threshold): one NMS an image, its groups moved apart.

    They go to the fields of a board, as in `fpn.exporting.onnx_operators.nms`.
    """
    op = operators()

    boxes, scores, groups, valid = (node.get_input(place) for place in range(4))
    every = ints(0, 1, 2)
    boxes = op.select(op.unsqueeze(valid, np.int64(2)), boxes, np.float32(0))  # what is not valid may be NaN
    field = op.add(op.subtract(op.reduce_max(boxes, every), op.reduce_min(boxes, every)), np.float32(1))
    kinds = op.convert(op.add(op.reduce_max(groups, ints(0, 1)), np.int64(1)), "f32")
    side = op.ceiling(op.sqrt(kinds))
    numbers = op.convert(groups, "f32")
    row = op.floor(op.divide(numbers, side))
    x = op.multiply(op.subtract(numbers, op.multiply(row, side)), field)
    x, y = (op.unsqueeze(along, np.int64(2)) for along in (x, op.multiply(row, field)))
    moved = op.add(boxes, op.concat([x, y, x, y], 2))
    rated = op.unsqueeze(op.select(valid, scores, np.float32(-1)), np.int64(1))
    shape = op.shape_of(scores)
    rows = op.gather(shape, np.int64(1), np.int64(0))
    iou, lowest = np.float32(node.get_values_from_const_input(4)), np.float32(-0.5)
    found = op.non_max_suppression(moved, rated, rows, iou, lowest, box_encoding="corner", output_type="i64")
    # Rows of (image, 0, box); after as many as there are, the rest is filled up.
    kept = op.slice(found.output(0), ints(0), found.output(2), ints(1))
    place = op.gather(kept, ints(0, 2), np.int64(1))
    none, one = op.broadcast(np.int32(0), shape), op.broadcast(np.int32(1), found.output(2))
    return [op.convert(op.scatter_nd_update(none, place, one), "boolean").output(0)]


def roi_align(node: Any) -> list[Any]:
    """`fpn::roi_align` (maps, their levels, boxes, levels, size, samples, half_pixel): the regions of each level by
    RoIAlign, then each to its place; 0 where a region is of no level.
    """
    op = operators()

    maps = node.get_input(0).get_node().input_values()
    numbers, size, samples, half_pixel = (node.get_values_from_const_input(place) for place in (1, 4, 5, 6))
    boxes, levels = node.get_input(2), op.reshape(node.get_input(3), ints(-1), False)
    regions = op.reshape(boxes, ints(-1, 4), False)
    an_image = op.gather(op.shape_of(boxes), np.int64(1), np.int64(0))
    rows, pooled = [], []
    for level, features in zip(numbers, maps, strict=True):
        own = op.squeeze(op.non_zero(op.equal(levels, np.int64(level))), np.int64(0))
        pooled.append(
            op.roi_align(
                features,
                op.gather(regions, own, np.int64(0)),
                op.convert(op.divide(own, an_image), "i32"),
                size,
                size,
                samples,
                2.0**-level,
                "avg",
                "half_pixel_for_nn" if half_pixel else "asymmetric",
            )
        )
        rows.append(own)
    cells = op.shape_of(pooled[0])
    shape = op.concat([op.shape_of(levels), op.slice(cells, ints(1), ints(4), ints(1))], 0)
    none = op.broadcast(np.float32(0), shape)
    return [op.scatter_update(none, op.concat(rows, 0), op.concat(pooled, 0), np.int64(0)).output(0)]
