"""The detections of one image as plain values: what predictions.json and the answers of `fpn serve` are made of."""

from __future__ import annotations

from typing import Any

from fpn.predict import segmentations
from fpn.structures import Detections


def row_of(found: Detections, size: tuple[int, int]) -> dict[str, Any]:
    """The detections of one image of this (height, width), ready for JSON.

    {"height", "width", "detections": [{"class", "score", "box", "level"}, ...]}: box is x1, y1, x2, y2 in pixels of the
    image as it is displayed, level the k of P_k. Where the detector gives masks, each detection also has its
    segmentation as COCO's run lengths.
    """
    columns = (found.names, found.scores.tolist(), found.boxes.tolist(), found.levels.tolist())
    detections: list[dict[str, Any]] = [
        {"class": name, "score": round(score, 5), "box": [round(side, 2) for side in box], "level": level}
        for name, score, box, level in zip(*columns, strict=True)
    ]
    for detection, mask in zip(detections, segmentations(found, size) or [], strict=False):
        detection["segmentation"] = mask
    return {"height": size[0], "width": size[1], "detections": detections}
