"""Memory of this process and of its devices, in bytes: peaks, and what is free.

The peak is what torch allocated on a GPU, or the process's resident memory on a CPU.
"""

from __future__ import annotations

import resource
from pathlib import Path

import psutil
import torch

FAKE_GPU_MEMORY = 64 * 2**30


def peak_memory(device: torch.device) -> int:
    """The most that was in use at once, since the start of the process or the last `reset_peak_memory`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reset_peak_memory(device: torch.device) -> int | None:
    """Count the peak anew from now on. Returns the bytes in use now, None if this system cannot reset the peak."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except OSError:
        return None
    return peak_memory(device)


def free_device_memory(device: torch.device) -> int:
    """Bytes that new tensors can take on a GPU: free ones, and those that torch holds for them.

    A GPU that this machine does not have, that of fake tensors, has FAKE_GPU_MEMORY of them.
    """
    if not torch.cuda.is_available():
        return FAKE_GPU_MEMORY
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def free_memory() -> int:
    """Bytes of main memory that new data can take on this machine, within the limit of the process's control group."""
    available: int = psutil.virtual_memory().available
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = (int((group / name).read_text(encoding="utf-8")) for name in ("memory.max", "memory.current"))
        cache = next(
            int(line.split()[1])
            for line in (group / "memory.stat").read_text(encoding="utf-8").splitlines()
            if line.startswith("file ")
        )
    except (OSError, ValueError, StopIteration):  # no control group, or no limit
        return available
    return min(available, limit - used + cache)


def as_text(count: float) -> str:
    """A number of bytes for a message."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
