"""The most memory that this process has had at once."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path

import torch

CLEAR, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
MIB = 2**20


def forget_peak() -> None:
    """From now on only the memory used after this counts, on a GPU and on Linux; elsewhere all of it."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):
        CLEAR.write_text("5")


def peak(device: str = "cpu") -> float:
    """MiB: of the GPU where the device is one, as PyTorch has allocated it, else of the process."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / MIB
    if STATUS.is_file():
        lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines() if ":" in line)
        return int(lines["VmHWM"].split()[0]) / 1024
    import resource  # which Windows does not have

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (MIB if sys.platform == "darwin" else 1024)
