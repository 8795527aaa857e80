"""The operators of `fpn.model` in terms of ONNX's own. Each function is traced once, while a detector is exported."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

import fpn.model.nms  # these two for the operators that they define
import fpn.model.roi  # noqa: F401

INT, FLOAT, BOOL, SHORT = 7, 1, 9, 6  # ONNX's numbers for int64, float32, bool and int32


def translations() -> dict[Callable, Callable]:
    """The operators and what stands for them, as torch.onnx.export takes it."""
    import torchvision.ops  # noqa: F401 - defines an operator as well

    return {
        torch.ops.fpn.nms.default: nms,
        torch.ops.fpn.roi_align.default: roi_align,
        torch.ops.torchvision.roi_pool.default: roi_pool,
    }


def opset() -> Any:
    """ONNX's operators as functions; they are made as they are asked for, so that no type checker knows them."""
    from onnxscript import opset18

    return opset18


def nms(boxes: Any, scores: Any, groups: Any, valid: Any, threshold: float) -> Any:
    """`fpn::nms` by NonMaxSuppression, which knows images, but would look at every box once for every group.

    Groups are moved apart instead, to the fields of a board: in a row, they would come to lie so far out that float32
    has no fractions of a pixel left.
    """
    op = opset()

    one, nothing = op.Constant(value_ints=[1]), op.Constant(value_float=0.0)
    boxes = op.Where(op.Unsqueeze(valid, [2]), boxes, nothing)  # what is not valid may be NaN
    extent = op.Sub(op.ReduceMax(boxes, keepdims=0), op.ReduceMin(boxes, keepdims=0))
    field = op.Add(extent, op.Constant(value_float=1.0))
    most = op.Cast(op.Add(op.ReduceMax(groups, keepdims=0), op.Constant(value_int=1)), to=FLOAT)
    side = op.Cast(op.Ceil(op.Sqrt(most)), to=INT)
    x = op.Mul(op.Cast(op.Mod(groups, side), to=FLOAT), field)
    y = op.Mul(op.Cast(op.Div(groups, side), to=FLOAT), field)
    x, y = op.Unsqueeze(x, [2]), op.Unsqueeze(y, [2])
    apart = op.Add(boxes, op.Concat(x, y, x, y, axis=2))
    # Scores are 0 or more, so that -1 is below the lowest that is looked at.
    rated = op.Unsqueeze(op.Where(valid, scores, op.Constant(value_float=-1.0)), [1])
    count = op.Shape(scores, start=1, end=2)
    lowest, overlap = op.Constant(value_floats=[-0.5]), op.Constant(value_floats=[threshold])
    found = op.NonMaxSuppression(apart, rated, count, overlap, lowest)
    place = op.Gather(found, op.Constant(value_ints=[0, 2]), axis=1)  # image and box, without the class between them
    none = op.Expand(op.Constant(value_ints=[0]), op.Shape(valid))
    return op.Cast(op.ScatterND(none, place, op.Expand(one, op.Shape(found, start=0, end=1))), to=BOOL)


def roi_align(
    maps: Sequence[Any], numbers: Sequence[int], boxes: Any, levels: Any, size: int, samples: int, half_pixel: bool
) -> Any:
    """`fpn::roi_align` by RoiAlign of the regions of each level, brought back into their order.

    The gather that `fpn.model.roi.align` consists of is not one operator in ONNX, and in several it would first hold
    all pixels that it sums: 16 times as much as the result.
    """
    op = opset()

    zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
    images = op.Unsqueeze(op.Range(zero, op.Squeeze(op.Shape(levels, start=0, end=1)), one), [1])
    images = op.Reshape(op.Expand(images, op.Shape(levels)), [-1])
    boxes, levels = op.Reshape(boxes, [-1, 4]), op.Reshape(levels, [-1])
    rows, pooled = [], []
    for number, features in zip(numbers, maps, strict=True):
        own = op.Reshape(op.NonZero(op.Equal(levels, op.Constant(value_int=number))), [-1])
        rows.append(own)
        pooled.append(
            op.RoiAlign(
                features,
                op.Gather(boxes, own),
                op.Gather(images, own),
                output_height=size,
                output_width=size,
                sampling_ratio=samples,
                spatial_scale=2.0**-number,
                coordinate_transformation_mode="half_pixel" if half_pixel else "output_half_pixel",
            )
        )
    rows = op.Concat(*rows, axis=0)
    count = op.Squeeze(op.Shape(rows))
    # The last row is for the regions of no level.
    nothing = op.Expand(op.Constant(value_float=0.0), [1, maps[0].shape[1], size, size])
    place = op.ScatterElements(op.Expand(count, op.Shape(levels)), rows, op.Range(zero, count, one), axis=0)
    return op.Gather(op.Concat(*pooled, nothing, axis=0), place, axis=0)


def roi_pool(features: Any, rois: Any, scale: float, height: int, width: int) -> tuple[Any, Any]:
    """`torchvision::roi_pool`; its second output, the places of the maxima, is for its gradient and nobody's here."""
    op = opset()

    pooled = op.MaxRoiPool(features, rois, pooled_shape=[height, width], spatial_scale=scale)
    return pooled, op.Cast(pooled, to=SHORT)
