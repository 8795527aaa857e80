"""Tensors out of files, ours or others', without ever running code from them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from fpn.errors import CheckpointError
from fpn.weights.pickles import UNREADABLE, read_pickle, read_torch, reason_of, there


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a `.safetensors`, `.pkl` or torch file (`.pth`, `.pt`), on the CPU.

    Raises CheckpointError for a file that cannot be read or holds none.
    """
    return state_in(read_content(path), path)


def read_content(path: str | Path) -> Any:
    """All that a weights file holds, whatever its form: a state dict, or one among other things."""
    path = there(path)
    if path.suffix == ".pkl":
        return read_pickle(path)
    if path.suffix != ".safetensors":
        return read_torch(path)
    try:
        return load_file(path)
    except UNREADABLE as error:
        raise CheckpointError(f"{path}: not a readable weights file ({reason_of(error)})") from error


def state_in(content: Any, where: str | Path) -> dict[str, Tensor]:
    """The state dict in what a file or a user gave, taken out of what training scripts wrap it in.

    Raises CheckpointError, which begins with `where`, unless it maps names to tensors with data of their own.
    """
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()
    ):
        raise CheckpointError(f"{where}: holds no state dict (a mapping from names to tensors)")
    hollow = next((name for name, value in content.items() if not has_data(value)), None)
    if hollow is not None:
        raise CheckpointError(f"{where}: its tensor {hollow[:200]} has fewer numbers than its shape says, or none")
    return dict(content)


def has_data(value: Tensor) -> bool:
    """Whether a tensor is a plain one with a number in memory for each element.

    A small file could otherwise claim a layer with outputs for a billion classes.
    """
    if value.layout != torch.strided or value.is_nested or value.is_quantized or value.is_meta:
        return False
    return 0 < value.numel() * value.element_size() <= value.untyped_storage().nbytes()
