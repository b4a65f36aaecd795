"""The time of a training: the clock, and the cost of a step of several trainings in turns."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

TURNS = 2
STEPS = 12  # optimiser steps of a run that is measured
FIRST = 3  # updates at its start that do not count: memory is taken, files are read


@dataclass(frozen=True)
class Cost:
    """Seconds of a training of n steps: ``fixed`` + n * ``step``."""

    step: float
    fixed: float


def clock(device: str) -> float:
    """Seconds of this process: on a CPU the processor time of all its threads, which other work on
    the machine does not affect; on a GPU wall time, once the GPU is idle."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def measure(
    trainings: Mapping[str, Callable[[int], float]], now: Callable[[], float], turns: int = TURNS
) -> dict[str, Cost]:
    """Measure the `Cost` of each training, in turns: the median time between two updates of the
    optimiser, which opening, compiling and testing do not affect.

    Args:
        trainings: name -> function from the number of steps to its seconds, at least two.
        now: the clock.
    Raises: RuntimeError for a training whose optimiser does not belong to torch.
    """
    gaps: dict[str, list[float]] = {name: [] for name in trainings}
    totals: dict[str, list[float]] = {name: [] for name in trainings}
    for _ in range(turns):
        for name, train in trainings.items():
            with moments_of_updates(now) as moments:
                totals[name].append(train(STEPS))
            last = moments[-STEPS:]
            last = last[FIRST - 1 :] if len(last) > FIRST else last
            gaps[name] += [after - before for before, after in pairwise(last)]
            if not gaps[name]:
                raise RuntimeError(f"{name}: no step of an optimiser was seen.")
    costs = {}
    for name in trainings:
        step = max(statistics.median(gaps[name]), 1e-6)
        costs[name] = Cost(step, max(min(totals[name]) - STEPS * step, 0.0))
    return costs


@contextmanager
def moments_of_updates(now: Callable[[], float]) -> Iterator[list[float]]:
    """Collect the times at which optimisers of torch have updated their parameters."""
    moments: list[float] = []
    handle = register_optimizer_step_post_hook(lambda *_: moments.append(now()))
    try:
        yield moments
    finally:
        handle.remove()
