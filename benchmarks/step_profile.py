"""Where the CPU time of a training step goes, by part of the code and by operator.

    python benchmarks/step_profile.py                         # two presets of mim_pretrain
    python benchmarks/step_profile.py --presets simmim_minute --dry-run

Takes the steps of the trainer on one thread and on batches drawn before, and times each operator
with the thread's CPU clock, which other work on the machine hardly affects. An operator of the
backward pass counts for the part whose forward pass recorded its node. The step without these
timers is a median, in turns with those timed; parts and operators are means per step. Rows are
appended to results/step_profile.csv.
"""

import bisect
import functools
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import vim_ssl.utils.openmp  # noqa: F401 (before torch)

import torch
from rows import ORIGIN, append_rows, markdown_table, origin, results_parser
from torch.utils._python_dispatch import TorchDispatchMode

from vim_ssl.data import open_data
from vim_ssl.models import block, encoder
from vim_ssl.recipes import mim_pretrain
from vim_ssl.training import accelerator, loop, schedule

COLUMNS = (*ORIGIN, "preset", "kind", "name", "calls", "ms", "percent")
PRESETS = ("demo", "cpu_mae")
IMAGES = "sample:photos + 39 * sample:photos"  # for a preset without data
SMALLEST = 0.002  # share of the step below which operators are summed as "others"
LEAF = 2**64 - 1  # the sequence number of a node that adds up the gradient of a parameter


class Profile(TorchDispatchMode):
    """Counts calls and CPU seconds of every (part, operator) while it is active.

    `part` marks the code of a part; parts nest, and an operator counts for the innermost one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[tuple[str, str]] = Counter()
        self.seconds: Counter[tuple[str, str]] = Counter()
        self.parts = ["loop"]
        # The numbers of autograd's nodes at which another part begins, and these parts.
        self.starts, self.names = [0], ["loop"]

    def _begin(self) -> None:
        self.starts.append(torch.autograd._get_sequence_nr())
        self.names.append(self.parts[-1])

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self.parts.append(name)
        self._begin()
        yield
        self.parts.pop()
        self._begin()

    def _current(self) -> str:
        node = torch._C._current_autograd_node()
        if node is None:
            return self.parts[-1]
        if (number := node._sequence_nr()) == LEAF:
            return "add gradients"
        return f"{self.names[bisect.bisect_right(self.starts, number) - 1]}, backward"

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        key = self._current(), str(func).removesuffix(".default")
        began = time.thread_time()
        out = func(*args, **(kwargs or {}))
        self.seconds[key] += time.thread_time() - began
        self.calls[key] += 1
        return out


def mark(profile: Profile, owner: Any, name: str, part: str) -> None:
    """Make a function of a class or module a part of the profile."""
    function = getattr(owner, name)

    @functools.wraps(function)
    def marked(*args, **kwargs):
        with profile.part(part):
            return function(*args, **kwargs)

    setattr(owner, name, marked)


def trainer(preset: str, count: int) -> tuple[Callable[[int], None], list[Any], float]:
    """Return the step on the i-th batch, the objects whose functions are parts (optimiser,
    objective), and the CPU seconds to draw one batch."""
    config = mim_pretrain.PRESETS[preset]()
    config = replace(config, data=config.data or IMAGES, threads=1, workers=0, trackers=("none",))
    prepared = accelerator.make_accelerator(config)
    data = open_data(config.data)
    torch.manual_seed(0)
    model = mim_pretrain.build_model(config, data)
    objective = mim_pretrain.build_objective(config, model)
    _, samples = mim_pretrain.build_data(config, model, data)
    plan, progress = schedule.Schedule(samples, config, prepared), schedule.Progress()
    optimizer, rates = loop.prepare_optimizer(objective, config, plan, prepared)
    objective, optimizer = prepared.prepare(objective, optimizer)
    steps = plan.steps(progress)
    next(steps)  # the first reads files
    began = time.thread_time()
    batches = [next(steps) for _ in range(count)]
    seconds = (time.thread_time() - began) / count

    def step(i: int) -> None:
        rates.step_update(progress.step)
        averages = loop.forward_backward(
            prepared, objective, objective, batches[i % count], config, progress
        )
        loop.optimise(prepared, objective, objective, optimizer, averages["loss"], config)
        progress.step += 1

    return step, [prepared, optimizer, objective], seconds


def measure(preset: str, steps: int) -> list[dict[str, Any]]:
    step, (prepared, optimizer, objective), drawing = trainer(preset, 4)
    profile = Profile()
    parts = [
        (type(objective), "forward", "loss"), (type(objective), "predict", "predict"),
        (encoder.VimEncoder, "embed", "embed"), (encoder.VimEncoder, "_run", "tokens"),
        (block.VimMixer, "forward", "mixer"), (block.RMSNorm, "forward", "norm"),
        (prepared, "clip_grad_norm_", "clip"), (optimizer, "step", "optimiser"),
        (type(objective), "after_step", "after step"),
    ]  # fmt: skip
    for owner, name, part in parts:
        if hasattr(owner, name):
            mark(profile, owner, name, part)
    times = []
    for i in range(steps + 2):
        began = time.thread_time()
        step(i)
        times.append(time.thread_time() - began)
        if i < 2:  # these compile and allocate
            continue
        with profile:  # in turn, as the speed of a busy machine changes
            step(i)
    total = statistics.median(times[2:])

    def rows(kind: str, index: int) -> list[dict[str, Any]]:
        calls: Counter[str] = Counter()
        seconds: Counter[str] = Counter()
        for key, value in profile.seconds.items():
            small = kind == "operator" and value < SMALLEST * total * steps
            name = "others" if small else key[index]
            seconds[name] += value / steps
            calls[name] += profile.calls[key] / steps
        return [row(kind, name, calls[name], value) for name, value in seconds.most_common()]

    def row(kind: str, name: str, calls: float, seconds: float) -> dict[str, Any]:
        return {
            "preset": preset, "kind": kind, "name": name, "calls": round(calls, 1),
            "ms": round(1e3 * seconds, 2), "percent": round(100 * seconds / total, 1),
        }  # fmt: skip

    calls = sum(profile.calls.values()) / steps
    return [
        row("step", "step", calls, total), row("step", "draw a batch, not in the step", 1, drawing),
        *rows("part", 0), *rows("operator", 1),
    ]  # fmt: skip


def main() -> int:
    parser = results_parser(__doc__, "step_profile.csv")
    add = parser.add_argument
    add("--presets", nargs="+", default=PRESETS, help="of mim_pretrain")
    add("--steps", type=int, default=10, help="steps to time, and as many to profile")
    add("--dry-run", action="store_true", help="print the table, append no rows")
    args = parser.parse_args()
    for preset in args.presets:
        rows = measure(preset, args.steps)
        print(markdown_table(COLUMNS[4:], [[str(v) for v in row.values()] for row in rows]))
        if not args.dry_run:
            append_rows(args.out / "step_profile.csv", COLUMNS, [origin() | row for row in rows])
    return 0


if __name__ == "__main__":
    sys.exit(main())
