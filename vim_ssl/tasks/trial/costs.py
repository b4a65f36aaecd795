"""The time of a training: the clock, and the cost of a step of several trainings in turns."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

TURNS = 2
FEW, MANY = 2, 20  # steps of the two runs whose difference is the cost of a step


@dataclass(frozen=True)
class Cost:
    """Seconds of a training of n steps: ``fixed`` + n * ``step``."""

    step: float
    fixed: float

    def seconds(self, steps: float) -> float:
        return self.fixed + steps * self.step


def clock(device: str) -> float:
    """Seconds of this process: on a CPU the processor time of all its threads, which other work on
    the machine does not affect; on a GPU wall time, once the GPU is idle."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def in_turns(
    trainings: Mapping[str, Callable[[int], float]], turns: int, steps: int, warm_up: int = 0
) -> dict[str, float]:
    """Return the median seconds of ``steps`` steps of each training, alternating, so that a change
    of the machine's speed affects all of them.

    Args:
        trainings: name -> function from the number of steps to its seconds.
        turns: number of turns that count.
        warm_up: number of turns before them, which compile.
    """
    seconds: dict[str, list[float]] = {name: [] for name in trainings}
    for turn in range(-warm_up, turns):
        for name, train in trainings.items():
            spent = train(steps)
            if turn >= 0:
                seconds[name].append(spent)
    return {name: statistics.median(values) for name, values in seconds.items()}


def measure(trainings: Mapping[str, Callable[[int], float]], budget: float) -> dict[str, Cost]:
    """Measure the `Cost` of each training from runs of two lengths. Everything is compiled.

    Args:
        budget: seconds of the trial; the longer runs take about 3 % of it, up to `MANY` steps each.
    """
    short = in_turns(trainings, TURNS, FEW)
    slowest = sum(short.values()) / FEW  # of one step of each, from above
    more = min(max(round(0.03 * budget / max(slowest, 1e-9) / TURNS), FEW), MANY)
    long = in_turns(trainings, TURNS, FEW + more)
    costs = {}
    for name in trainings:
        step = max((long[name] - short[name]) / more, 1e-6)
        costs[name] = Cost(step, max(short[name] - FEW * step, 0.0))
    return costs
