"""What the machine has: which device to use, at what precision, with how many loading processes."""

from __future__ import annotations

import os

import torch

from fpn.errors import OptionError


def pick_device(wanted: str | torch.device = "auto") -> torch.device:
    """ "auto" is the first GPU where there is one, else the CPU. Raises OptionError for a device that is not there."""
    if str(wanted) == "auto":
        return torch.device(
            "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        )
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise OptionError(f"device {wanted!r}: it must be auto, cpu, cuda, cuda:N or mps") from error
    count = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    if (device.index or 0) >= count.get(device.type, 0):
        have = f"{count['cuda']} CUDA GPUs" if count["cuda"] else "no GPU that PyTorch can use"
        raise OptionError(f"device {wanted}: this machine has {have}; leave --device out to use what is there")
    return device


def pick_precision(wanted: str, device: torch.device) -> str:
    """ "auto" is bf16 mixed precision where the device computes it faster than float32, else 32."""
    if wanted not in ("auto", "32", "bf16"):
        raise OptionError(f"precision {wanted!r}: it must be auto, 32 or bf16")
    if wanted != "auto":
        return wanted
    fast = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else cpu_has_bf16()
    return "bf16" if fast and device.type != "mps" else "32"


def cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bfloat16 in hardware (AVX512-BF16 or AMX)."""
    return any(getattr(torch.cpu, f"_is_{kind}_supported", lambda: False)() for kind in ("avx512_bf16", "amx_tile"))


def pick_workers(wanted: int | None) -> int:
    """Loading processes: as given, or one a core up to 4 when left out."""
    if wanted is not None and wanted < 0:
        raise OptionError(f"workers is {wanted}: it must be 0 or more")
    return min(4, os.cpu_count() or 1) if wanted is None else wanted
