"""The number of CPU cores that this process may use."""

import math
import os
from collections.abc import Iterator
from pathlib import Path


def cores(root: Path = Path("/")) -> int:
    """Return the number of cores by the affinity of this process and the quota of its container.

    A fraction of a core counts as one.

    Args:
        root: the file system with ``proc`` and ``sys``.
    """
    machine, limit = affinity(), quota(root)
    return machine if limit >= machine else max(math.ceil(limit), 1)


def affinity() -> int:
    """Return the number of cores that this process may run on, whatever its quota."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def quota(root: Path = Path("/")) -> float:
    """Return the time that the control groups of this process allow, in cores; inf without a limit.

    Reads ``cpu.max`` (cgroup v2, https://docs.kernel.org/admin-guide/cgroup-v2.html) and
    ``cpu.cfs_quota_us`` (v1, https://docs.kernel.org/scheduler/sched-bwc.html) of the group and of
    those above it.
    """
    return min((limit for folder in _groups(root) for limit in _limits(folder)), default=math.inf)


def _groups(root: Path) -> Iterator[Path]:
    """Yield the folders of this process's groups and of those above them.

    In a container the path may be the host's, of which only the upper folders exist. Beside v1, v2
    may lie in the folder ``unified``.
    """
    for line in _text(root / "proc/self/cgroup").split("\n"):
        _, controllers, path = line.split(":", 2) if line.count(":") > 1 else ("", "none", "")
        if controllers and "cpu" not in controllers.split(","):
            continue  # v2 has one line without controllers, v1 a line and a mount for each
        below = Path(path.lstrip("/"))
        for mount in {controllers, "cpu"} if controllers else ("", "unified"):
            yield from (root / "sys/fs/cgroup" / mount / p for p in (below, *below.parents))


def _limits(folder: Path) -> Iterator[float]:
    """Yield the quota of one group in cores, if it has one: v2's file, v1's two."""
    v1 = (_text(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
    for text in (_text(folder / "cpu.max"), " ".join(v1)):
        numbers = [float(word) for word in text.split() if word.isdecimal()]  # not "max", not -1
        if len(numbers) == 2 and all(numbers):
            yield numbers[0] / numbers[1]


def _text(path: Path) -> str:
    try:
        return os.fsdecode(path.read_bytes())  # names may be any bytes
    except (OSError, ValueError):
        return ""
