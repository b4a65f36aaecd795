"""Processes that divide work and gather the results on the main one.

A launcher (`accelerate launch`, `torchrun`) sets each process's rank with environment variables.
Results are gathered on the CPU with gloo, on any device. accelerate's `gather_object` is not used,
because it copies all results to all ranks: for the features of a whole data set, this needs their
memory once per rank.
"""

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from vim_ssl.utils import openmp
from vim_ssl.utils.cores import cores as cores

PATIENCE = timedelta(days=1)  # the other ranks wait while the main one fits a probe


@dataclass(frozen=True)
class Processes:
    """The ``rank`` of this process among ``world`` processes."""

    rank: int = 0
    world: int = 1

    @property
    def main(self) -> bool:
        return self.rank == 0

    def gather(self, part: Any) -> list[Any]:
        """Gather the parts of all ranks, in rank order, on the main process; [] on the others."""
        if self.world == 1:
            return [part]
        parts: list[Any] | None = [None] * self.world if self.main else None
        dist.gather_object(part, parts)
        return parts or []

    def broadcast(self, value: Any) -> Any:
        """Return the main process's value on all ranks; the other ranks wait for it."""
        values = [value]
        if self.world > 1:
            dist.broadcast_object_list(values)
        return values[0]


def join_processes() -> Processes:
    """Join the processes that the launcher started; without a launcher, only this process."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        return Processes()
    # Launchers set one thread per process.
    torch.set_num_threads(max(cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), 1))
    if not dist.is_initialized():
        dist.init_process_group("gloo", timeout=PATIENCE)
    return Processes(dist.get_rank(), world)


def pick_device(device: str = "") -> str:
    """Return the requested device, else this process's GPU, else the CPU."""
    default = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    device = device or default
    if device == "cpu":
        openmp.remark_on_spinning()
    return device
