"""The memory of this process on a device: the most that it has used, and what can still be had."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import torch


def forget_peak(device: torch.device) -> bool:
    """From now on only what is used after this counts; False where the system does not tell what a process uses."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # there is none but on Linux
        return False
    return True


def peak(device: torch.device) -> int:
    """The most bytes this process has used since `forget_peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    return 1024 * kilobytes("/proc/self/status", "VmHWM")


def most(work: Callable[[], object], device: torch.device) -> float | None:
    """MiB that this process has used at once while it did some work, with all else that it holds; None if not told."""
    gc.collect()  # what came before is not to count, such as what exporting leaves behind
    told = forget_peak(device)
    work()
    return peak(device) / 2**20 if told else None


def free_memory(device: torch.device) -> int:
    """Bytes that can still be had: of the GPU, or of the machine and what the container leaves of it."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = 1024 * kilobytes("/proc/meminfo", "MemAvailable")
    limit, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    if limit.is_file() and used.is_file() and limit.read_text().strip() != "max":
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return free


def kilobytes(file: str, name: str) -> int:
    """A number from the tables that Linux keeps."""
    rows = dict(line.split(":", 1) for line in Path(file).read_text().splitlines() if ":" in line)
    return int(rows[name].split()[0])
