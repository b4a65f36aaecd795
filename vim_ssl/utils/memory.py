"""The memory of a process, and its peak."""

import sys
from pathlib import Path


def reset_peak(device: str = "cpu") -> bool:
    """Restart the peak at the current memory use; True if the system can do so."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_mib(device: str = "cpu") -> float:
    """Return the peak memory since `reset_peak`, or since the start if it cannot be reset.

    On a CPU this is the resident set of the process, on a GPU torch's allocations.
    """
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() / 2**20
    return proc_mib("self/status", "VmHWM") or rusage_peak_mib()


def rusage_peak_mib(children: bool = False) -> float:
    """Peak resident set of this process, or of the largest child that has ended."""
    import resource  # not on Windows

    usage = resource.getrusage(resource.RUSAGE_CHILDREN if children else resource.RUSAGE_SELF)
    return usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)  # bytes there, else KiB


def proc_mib(file: str, key: str) -> float:
    """Return a value of a file in /proc in MiB; 0 if the system has no such file."""
    path = Path("/proc") / file
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(line.split()[1]) / 2**10 for line in lines if line.startswith(key)), 0.0)
