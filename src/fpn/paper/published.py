"""The numbers of Lin et al. 2017 (arXiv 1612.03144v2), Tables 1, 2, 3, 5 and 6: ResNet-50, COCO minival, in percent.

The keys are those that `fpn.evaluate` and `average_recall` give: Table 6 is measured with 1000 proposals.
"""

from __future__ import annotations

_PROPOSALS = ("AR100", "AR1000", "AR1000_small", "AR1000_medium", "AR1000_large")
_DETECTIONS = ("AP50", "AP", "AP_small", "AP_medium", "AP_large")


def _rows(names: tuple[str, ...], values: dict[str, tuple[float, ...]]) -> dict[str, dict[str, float]]:
    return {row: dict(zip(names, numbers, strict=True)) for row, numbers in values.items()}


PUBLISHED: dict[int, dict[str, dict[str, float]]] = {
    1: _rows(
        _PROPOSALS,
        {
            "a": (36.1, 48.3, 32.0, 58.7, 62.2),
            "b": (36.3, 44.9, 25.3, 55.5, 64.2),
            "c": (44.0, 56.3, 44.9, 63.4, 66.2),
            "d": (37.4, 49.5, 30.5, 59.9, 68.0),
            "e": (34.5, 46.1, 26.5, 57.4, 64.7),
            "f": (38.4, 51.3, 35.1, 59.7, 67.6),
        },
    ),
    2: _rows(
        _DETECTIONS,
        {
            "a": (54.7, 31.9, 15.7, 36.5, 45.5),
            "b": (52.9, 28.8, 11.9, 32.4, 43.4),
            "c": (56.9, 33.9, 17.8, 37.7, 45.8),
            "d": (44.9, 24.9, 10.9, 24.4, 38.5),
            "e": (54.0, 31.3, 13.3, 35.2, 45.3),
            "f": (56.3, 33.4, 17.3, 37.3, 45.6),
        },
    ),
    3: _rows(
        _DETECTIONS,
        {
            "a": (53.1, 31.6, 13.2, 35.6, 47.1),
            "b": (51.7, 28.0, 9.6, 31.9, 43.1),
            "c": (56.9, 33.9, 17.8, 37.7, 45.8),
        },
    ),
    5: _rows(("AP50", "AP"), {"separate": (56.9, 33.9), "shared": (57.2, 34.3)}),
    6: _rows(
        ("AR1000", "AR1000_small", "AR1000_medium", "AR1000_large"),
        {"5x5": (43.4, 32.5, 49.2, 53.7), "7x7": (43.5, 30.0, 49.6, 57.8), "both": (45.7, 31.9, 51.5, 60.8)},
    ),
}

# Anchors in an image whose shorter side has 800 pixels, Table 1.
ANCHORS = {"a": 47_000, "b": 12_000, "c": 200_000, "d": 200_000, "e": 200_000, "f": 750_000}
