"""Several processes that share work out and bring what they found together on the first.

A launcher (`accelerate launch`, `torchrun`) tells each process its place by environment variables.
Only what lies on the CPU is sent, so gloo carries it, whatever device computes.
"""

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

PATIENCE = timedelta(days=1)  # the others wait while the first one fits


@dataclass(frozen=True)
class Processes:
    """This process, number ``rank`` of ``world``."""

    rank: int = 0
    world: int = 1

    @property
    def main(self) -> bool:
        return self.rank == 0

    def gather(self, part: Any) -> list[Any]:
        """Every process's part by rank on the main one, nothing on the others."""
        if self.world == 1:
            return [part]
        parts: list[Any] | None = [None] * self.world if self.main else None
        dist.gather_object(part, parts)
        return parts or []

    def agree(self, value: Any) -> Any:
        """The main process's value, on all; nobody goes on before it has come this far."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]


def join_processes() -> Processes:
    """Meet the other processes that the launcher started; alone without a launcher."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        return Processes()
    # Launchers leave each process one thread.
    torch.set_num_threads(max(cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), 1))
    if not dist.is_initialized():
        dist.init_process_group("gloo", timeout=PATIENCE)
    return Processes(dist.get_rank(), world)


def pick_device(asked: str = "") -> str:
    """The device asked for, else this process's GPU, else the CPU."""
    gpu = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    return asked or gpu


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
