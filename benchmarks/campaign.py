"""Code shared by the studies: CPU time of a training, cost of a step per arm, parallel runs.

CPU time is that of one thread, including data loading. It approximates the time on an idle machine
and is not affected by other work on the machine.
"""

import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from rows import ORIGIN, append_rows, origin, read_rows

from vim_ssl.tasks.trial.costs import clock
from vim_ssl.training.loop import fit
from vim_ssl.training.run import Run

COST_COLUMNS = (*ORIGIN, "data", "arm", "seconds_a_step", "steps")


def fit_seconds(recipe: str, objective, samples, config, accelerator) -> float:
    """Train to the end in ``config.output``; return the CPU seconds of this process."""
    run = Run.open(recipe, config, accelerator)
    began = clock("cpu")
    fit(objective.train(), samples, config, run, accelerator)
    seconds = clock("cpu") - began
    run.close()
    return seconds


def costs(
    path: Path, data: str, arms: Iterable[str], train: Callable[[str, int], float], steps: int = 20
) -> dict[str, float]:
    """Return CPU seconds per step for every arm, measured once in turns, then read from a CSV file.

    Args:
        data: the name of the data in the rows.
        train: (arm, steps) -> CPU seconds of that many steps.
    """
    known = {row["arm"]: float(row["seconds_a_step"])
             for row in read_rows(path) if row["data"] == data}  # fmt: skip
    arms = list(arms)
    if not known.keys() >= set(arms):
        spent = in_turns({arm: partial(train, arm) for arm in arms}, 3, steps, warm_up=1)
        known = {arm: seconds / steps for arm, seconds in spent.items()}
        rows = [{"data": data, "arm": arm, "seconds_a_step": round(value, 4), "steps": steps}
                for arm, value in known.items()]  # fmt: skip
        append_rows(path, COST_COLUMNS, [origin() | row for row in rows])
    return known


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


def run_jobs(script: str, out: Path, jobs: Iterable[Sequence], at_once: int) -> int:
    """Run ``script --out OUT --one JOB…`` for every job, each in a process of one thread.

    Prints each job when it ends, with its errors if it failed; the others continue.
    Returns: the number of jobs that failed.
    """

    def one(job: Sequence) -> int:
        command = [sys.executable, script, "--out", str(out), "--one", *map(str, job)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        print(*job, f"failed:\n{done.stderr[-3000:]}" if done.returncode else "", flush=True)
        return done.returncode

    with ThreadPoolExecutor(at_once) as pool:
        return sum(map(bool, pool.map(one, jobs)))
