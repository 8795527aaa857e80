"""What the machine has: which device to use, at what precision, with how many loading processes."""

from __future__ import annotations

import os
import platform
from pathlib import Path

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


def is_main_process() -> bool:
    """False in all but one of the processes of a run on several devices or machines: only one talks and writes."""
    names = ("RANK", "SLURM_PROCID", "LOCAL_RANK")  # of torchrun, of Slurm, of Lightning's own processes
    return next((os.environ[name] == "0" for name in names if name in os.environ), True)


def check_devices(device: torch.device, devices: int) -> None:
    """Raises OptionError where fewer devices are there than asked for."""
    if device.type == "cuda" and device.index is not None and devices > 1:
        raise OptionError(f"device {device} is one device, but devices is {devices}; use --device cuda for several")
    have = torch.cuda.device_count()
    if device.type == "cuda" and devices > have:
        raise OptionError(f"devices is {devices}, but this machine has {have} CUDA GPUs")


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
    return min(4, cores()) if wanted is None else wanted


def cores() -> int:
    """CPU cores this process may use, which containers and clusters make fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor_name() -> str:
    """As the system calls it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()
