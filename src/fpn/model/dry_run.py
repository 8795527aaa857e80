"""Whether a network gives what a detector needs of a backbone, found out on small blank images."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fpn.errors import OptionError

# Multiples of 32, as batches are padded to. Two, to find networks made for one size of image; of 3 x 5 and 4 x 6 places
# at stride 32, to find those that round other than they should.
SIZES = ((96, 160), (128, 192))


def dry_run(backbone: nn.Module, name: str) -> dict[int, int]:
    """The channels of each level that a backbone gives; nothing in it is changed.

    Raises OptionError where it does not give {level: map (B, channels, H / 2**level, W / 2**level)} for images
    (B, 3, H, W) of every size, or gives other channels than its attribute `channels` says, if it has one.
    """
    modes = {module: module.training for module in backbone.modules()}
    like = next(backbone.parameters(), torch.empty(0))
    backbone.eval()
    try:
        found, again = (channels_at(backbone, like.new_zeros(1, 3, *size), name) for size in SIZES)
    finally:
        for module, training in modes.items():
            module.training = training
    if again != found:
        raise OptionError(f"the backbone {name} gives channels {found} for one size of image and {again} for another")
    declared = getattr(backbone, "channels", found)
    if not isinstance(declared, Mapping) or dict(declared) != found:
        raise OptionError(f"the backbone {name} gives channels {found}, but its attribute `channels` is {declared}")
    return found


def channels_at(backbone: nn.Module, images: Tensor, name: str) -> dict[int, int]:
    """The channels by level that a backbone gives for these images, in ascending order of the levels."""
    sides = height, width = images.shape[-2], images.shape[-1]
    try:
        with torch.no_grad():
            levels = backbone(images)
    except Exception as error:  # whatever a network of somebody else's can raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise OptionError(
            f"the backbone {name} fails on an image of {height} x {width} pixels ({reason}); "
            "a detector needs one that takes every size that is a multiple of 32"
        ) from error
    if not isinstance(levels, Mapping) or not levels:
        raise OptionError(
            f"the backbone {name} gives a {type(levels).__name__}; it must be {{level: map}}, {{2: C2 ..}}"
        )
    for level, x in levels.items():
        if isinstance(level, bool) or not isinstance(level, int) or level < 1:
            raise OptionError(f"the backbone {name} has a level {level!r}; levels are numbers, of stride 2**level")
        if not isinstance(x, Tensor) or x.ndim != 4:
            shape = list(x.shape) if isinstance(x, Tensor) else f"a {type(x).__name__}"
            raise OptionError(f"level {level} of the backbone {name} is {shape}; it must be a map (B, channels, H, W)")
        # Above level 5 an image's side may end between two places, and either is right.
        if not all(side // 2**level <= n <= -(-side // 2**level) for side, n in zip(sides, x.shape[-2:], strict=True)):
            raise OptionError(
                f"level {level} of the backbone {name} is {list(x.shape)} for an image of {height} x {width} pixels; "
                f"its stride must be 2**{level}, which makes {height // 2**level} x {width // 2**level} places"
            )
    return {level: levels[level].shape[1] for level in sorted(levels)}
