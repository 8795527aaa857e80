"""The size to which images are brought before a detector sees them."""

from __future__ import annotations

SHORT, LONG = 800, 1333  # Sec. 5.1 of the FPN paper has 800; 1333 has been the field's limit since Detectron


def resized_size(size: tuple[int, int], short: int, long: int) -> tuple[int, int]:
    """Height and width after resizing, rounded as by torchvision's `Resize(short, max_size=long)`, at least 1."""
    smaller, larger = min(size), max(size)
    new_smaller, new_larger = short, int(short * larger / smaller)
    if new_larger > long:
        new_smaller, new_larger = max(1, int(long * new_smaller / new_larger)), long
    return (new_larger, new_smaller) if size[0] > size[1] else (new_smaller, new_larger)
