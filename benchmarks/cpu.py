"""Measure performance on a CPU: waiting threads, Vim-Ti beside DeiT-Ti, the scan, training, memory.

    python benchmarks/cpu.py                              # two cores without other work, an hour
    python benchmarks/cpu.py --only scan --sketch SCAN.so

    waiting    images/s of the demo's training on two threads, alone and beside one and two busy
               processes: threads that wait passively (the suite's setting), actively, and as
               OpenMP's default, a spin of milliseconds
    encoder    features of Vim-Ti and DeiT-Ti at 224 px in batches of 1 and 8
    crossover  the same at sizes up to 1248 px, and the size from which on Vim-Ti is faster
    scan       the compiled scan, the torch loop and, with --sketch, C++ (see cpu_scan.py)
    step       a training step of two presets through the trainer, and of Vim-Ti and DeiT-Ti
    memory     what autograd saves for a backward pass, and the peak of a training step
    frozen     time and memory of a step of classification and segmentation with Vim-Ti at 224 px,
               trained and frozen

All but `waiting` run on one thread. Every measurement has a fresh process. Compared calls alternate
in one process and are timed with the thread's CPU clock; short calls repeat within a turn. A value
is a median over the turns, each ratio the median of the ratios per turn. The runs of a part are
repeated in turns; each is a row, and so is the median. Memory is measured once.

Rows are appended to results/cpu.csv, or to --out, as they come. The same command resumes at the
same commit, unless files differ from it, on the same machine with the same versions. The end of the
output compares the medians with the targets.
"""

import hashlib
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from vim_ssl.utils.openmp import POLICIES

from cpu_frozen import TASKS, VARIANTS, frozen_memory, time_frozen
from cpu_models import crossing, saved_memory, step_memory, time_encoder, time_step
from cpu_scan import CONDITIONS as SCAN
from cpu_scan import time_scan
from cpu_training import images_per_second, step_seconds
from process import run_apart
from rows import ORIGIN, append_rows, origin, read_rows, results_parser
from turns import Values

FILE = "cpu.csv"
COLUMNS = (*ORIGIN, "what", "value", "unit", "conditions")
PARTS = ("waiting", "encoder", "crossover", "scan", "step", "memory", "frozen")
# What `vim_ssl` sets unless there is a variable, what a user may set, and what OpenMP would do:
# GNU's spins 300,000 times, LLVM's 200 ms.
WAITING: dict[str, dict[str, str]] = {
    "passive": {},
    "active": {"OMP_WAIT_POLICY": "active"},
    "default": {"GOMP_SPINCOUNT": "300000", "KMP_BLOCKTIME": "200"},
}
BESIDE = {0: "alone", 1: "beside 1 busy process", 2: "beside 2 busy processes"}
DEMO = "demo, batch 64, 2 threads"
SIZES = (512, 640, 720, 768, 800, 896, 1024, 1248)  # px
INFERENCE = "float32, inference, DeiT with fused attention, 1 thread"
TRAINING = "float32, AdamW, DeiT with fused attention, 1 thread"
MEMORY = "Vim-Ti, 224 px, float32, AdamW"
SAVED = "224 px, float32"
Key = tuple[str, str]  # what, conditions


@dataclass(frozen=True)
class Measurement:
    """What one process measures.

    Attributes:
        what: in the rows, the name of each value follows it.
        value: the name of one of its values; an earlier row of it counts as measured.
        function: of a module beside this one; returns the values.
        runs: how often it is repeated.
        settings: those of the command that may change a value, at the end of the conditions.
        variables: environment variables of its process, in place of `POLICIES`; None: as here.
        busy: other processes beside it, each of which keeps a core busy.
    """

    part: str
    what: str
    conditions: str
    value: str
    function: Callable[..., Values]
    arguments: tuple
    runs: int = 1
    settings: str = ""
    variables: dict[str, str] | None = None
    busy: int = 0

    def rows(self, run: int) -> list[dict]:
        """Measure, and return a row for every value."""
        with environment(self.variables), neighbours(self.busy):
            values = run_apart(self.function, *self.arguments)
        return [row(f"{self.what}, {name}", value, unit, self.conditions_of(run))
                for name, (value, unit) in values.items()]  # fmt: skip

    def conditions_of(self, run: int) -> str:
        count = f"run {run} of {self.runs}" if self.runs > 1 else ""
        return "; ".join(filter(None, (self.conditions, self.settings, count)))


@dataclass
class Table:
    """Values of one command by what, and conditions without settings and run: run -> value."""

    values: dict[Key, dict[int, float]] = field(default_factory=dict)
    units: dict[Key, str] = field(default_factory=dict)
    settings: dict[Key, list[str]] = field(default_factory=dict)

    def add(self, one: dict) -> None:
        conditions, *more = one["conditions"].split("; ")
        run = int(more.pop().split()[1]) if more and more[-1].startswith("run ") else 1
        key = (one["what"], conditions)
        self.values.setdefault(key, {})[run] = float(one["value"])
        self.units[key], self.settings[key] = one["unit"], more

    def median(self, key: Key) -> float:
        """Return the median of the runs; nan if there are none."""
        return statistics.median(self.values.get(key, {0: math.nan}).values())

    def ratio(self, a: Key, b: Key) -> float:
        """Return the median over the runs that both have of a / b; nan if there are none."""
        first, second = self.values.get(a, {}), self.values.get(b, {})
        ratios = [first[run] / second[run] for run in first.keys() & second.keys()]
        return statistics.median(ratios or [math.nan])

    def conditions_of(self, key: Key) -> str:
        """Return the conditions of the median of this key."""
        runs = len(self.values.get(key, {}))
        count = [f"median of {runs} runs"] if runs > 1 else []
        return "; ".join([key[1], *self.settings.get(key, []), *count])


@contextmanager
def environment(variables: dict[str, str] | None) -> Iterator[None]:
    """Start processes with ``variables`` in place of `POLICIES`; None changes nothing."""
    before = dict(os.environ)
    if variables is not None:
        for name in POLICIES:
            os.environ.pop(name, None)
        os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def neighbours(count: int) -> Iterator[None]:
    """Run ``count`` processes that each keep a core busy."""
    endless = "import os; parent = os.getppid()\nwhile os.getppid() == parent: pass"
    command = [sys.executable, "-c", endless]
    processes = [subprocess.Popen(command) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


# --- what is measured ------------------------------------------------------------------------


def plan(runs: int, turns: int, seconds: float, sketch: str) -> list[Measurement]:
    """Return all measurements; those of a part are repeated in turns."""
    few = max(turns // 10, 3)
    long, many, fewer = f"{seconds:g} s", f"{turns} turns", f"{few} turns"
    scans = f"{many}, C++ {fingerprint(sketch)}" if sketch else many
    return [
        *(Measurement("waiting", f"waiting, {policy}, {BESIDE[busy]}", DEMO, "speed",
                      images_per_second, ("demo", 2, seconds), runs, long,
                      variables | {"OMP_NUM_THREADS": "2"}, busy)
          for busy in BESIDE for policy, variables in WAITING.items()),
        *(Measurement("encoder", "encoder 224 px", f"batch {batch}, {INFERENCE}", "Vim-Ti",
                      time_encoder, (224, batch, turns if batch == 1 else few), runs,
                      many if batch == 1 else fewer)
          for batch in (1, 8)),
        *(Measurement("crossover", f"encoder {size} px", f"batch 1, {INFERENCE}", "Vim-Ti",
                      time_encoder, (size, 1, few), min(runs, 3), fewer) for size in SIZES),
        *(Measurement("scan", f"scan {direction}", SCAN, "C++" if sketch else "numba",
                      time_scan, (direction, sketch, turns), runs, scans)
          for direction in ("forward", "backward")),
        *(Measurement("step", f"training, {preset}", "batch 64, 1 thread, with data loading",
                      "step", step_seconds, (preset, seconds), runs, long)
          for preset in ("demo", "cpu_mae")),
        Measurement("step", "training step 224 px", f"batch 8, {TRAINING}", "Vim-Ti",
                    time_step, (224, 8, few), runs, fewer),
        *(Measurement("memory", "saved for a backward pass, batch 8", SAVED, variant,
                      saved_memory, (variant, 8))
          for variant in ("numba", "numba, recomputing", "torch", "DeiT-Ti")),
        *(Measurement("memory", f"memory of a step, batch {batch}", MEMORY, variant,
                      step_memory, (variant, batch))
          for batch, variant in ((8, "numba"), (8, "numba, recomputing"), (8, "torch"),
                                 (1, "numba"), (1, "reference"))),  # which keeps every state
        *(Measurement("frozen", f"step of {task}", f"{MEMORY}, batch 8, 1 thread", "trained",
                      time_frozen, (task, 8, few), runs, fewer) for task in TASKS),
        *(Measurement("frozen", f"memory of a step of {task}", f"{MEMORY}, batch 8", variant,
                      frozen_memory, (task, variant, 8))
          for task in TASKS for variant in VARIANTS[:2]),
    ]  # fmt: skip


def fingerprint(path: str) -> str:
    """Return eight digits that name the content of a file."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:8]


def ratios() -> Iterator[tuple[str, Key, Key]]:
    """Yield what compares the values of two processes, and the two."""

    def speed(policy: str, busy: int) -> Key:
        return f"waiting, {policy}, {BESIDE[busy]}, speed", DEMO

    yield "waiting, passive / default, alone", speed("passive", 0), speed("default", 0)
    for busy in (1, 2):
        for policy in WAITING:
            what = f"waiting, {policy}, {BESIDE[busy]} / alone"
            yield what, speed(policy, busy), speed(policy, 0)
    for part, conditions, a, b in (
        ("saved for a backward pass, batch 8", SAVED, "numba", "DeiT-Ti"),
        ("saved for a backward pass, batch 8", SAVED, "numba, recomputing", "DeiT-Ti"),
        ("saved for a backward pass, batch 8", SAVED, "numba", "torch"),
        ("memory of a step, batch 8", MEMORY, "numba", "torch"),
        ("memory of a step, batch 8", MEMORY, "numba, recomputing", "torch"),
        ("memory of a step, batch 1", MEMORY, "numba", "reference"),
    ):
        yield f"{part}, {a} / {b}", (f"{part}, {a}", conditions), (f"{part}, {b}", conditions)


def derived(table: Table) -> list[dict]:
    """Return the rows of the medians, of the ratios, and of the crossover."""
    rows = [row(key[0], table.median(key), table.units[key], table.conditions_of(key))
            for key, runs in table.values.items() if len(runs) > 1]  # fmt: skip
    rows += [row(what, table.ratio(a, b), "times", table.conditions_of(a))
             for what, a, b in ratios()]  # fmt: skip
    keys = {size: (f"encoder {size} px, Vim-Ti / DeiT-Ti", f"batch 1, {INFERENCE}")
            for size in SIZES}  # fmt: skip
    pixels = crossing({size: table.median(key) for size, key in keys.items()})
    rows.append(row("crossover with DeiT-Ti", pixels, "px", table.conditions_of(keys[SIZES[0]])))
    measured = [one for one in rows if not math.isnan(one["value"])]
    return [one | {"value": round(one["value"], 3)} for one in measured]


# What -> the largest value, or the smallest if it is to be above. Batches of 8 have the same aim.
AT_MOST, AT_LEAST = "at most", "at least"
TARGETS = {
    "waiting, passive / default, alone": (AT_LEAST, 1.0),
    "waiting, passive, beside 1 busy process / alone": (AT_LEAST, 0.45),
    "waiting, passive, beside 2 busy processes / alone": (AT_LEAST, 0.30),
    "encoder 224 px, Vim-Ti / DeiT-Ti": (AT_MOST, 1.85),
    "crossover with DeiT-Ti": (AT_MOST, 800),
    "scan forward, numba's operator / C++": (AT_MOST, 1.15),
    "saved for a backward pass, batch 8, numba / DeiT-Ti": (AT_MOST, 1.4),
    "saved for a backward pass, batch 8, numba / torch": (AT_MOST, 1 / 3),
}


def verdict(what: str, value: float) -> str:
    """Return the target and whether the value meets it; "" without a target."""
    if what not in TARGETS:
        return ""
    kind, limit = TARGETS[what]
    met = value <= limit if kind == AT_MOST else value >= limit
    return f"{kind} {limit:.3g}: {'met' if met else 'missed'}"


# --- measuring -------------------------------------------------------------------------------


def in_order(measurements: Sequence[Measurement]) -> Iterator[tuple[int, Measurement]]:
    """Yield (run, measurement): part by part, the first run of all before the second of any."""
    for part in PARTS:
        ours = [one for one in measurements if one.part == part]
        for run in range(1, 1 + max((one.runs for one in ours), default=0)):
            yield from ((run, one) for one in ours if run <= one.runs)


def measure_all(
    measurements: Sequence[Measurement], known: list[dict], keep: Callable[[list[dict]], None]
) -> Table:
    """Measure what has no row yet.

    Args:
        known: rows of earlier measurements; those of other settings are not used.
        keep: called with the rows of each measurement.
    """
    table = Table()
    for run, one in in_order(measurements):
        rows = [row for row in known if row["conditions"] == one.conditions_of(run)
                and row["what"].startswith(f"{one.what}, ")]  # fmt: skip
        if all(row["what"] != f"{one.what}, {one.value}" for row in rows):
            rows = one.rows(run)
            for each in rows:
                print_row(each)
            keep(rows)
        for each in rows:
            table.add(each)
    return table


def resumable(rows: list[dict], here: dict[str, str]) -> list[dict]:
    """Return the rows of the same code, machine and versions as ``here``."""
    if here["commit"] == "unknown" or here["commit"].endswith("-dirty"):
        return []  # the code may have changed since
    same = ("commit", "hardware", "versions")
    return [one for one in rows if all(one[name] == here[name] for name in same)]


def row(what: str, value: float, unit: str, conditions: str) -> dict:
    return {"what": what, "value": value, "unit": unit, "conditions": conditions}


def print_row(one: dict) -> None:
    text = verdict(one["what"], one["value"])
    print(f"{one['what']:58} {one['value']:>10} {one['unit']:8} {one['conditions']}  {text}",
          flush=True)  # fmt: skip


def main() -> int:
    parser = results_parser(__doc__, FILE)
    add = parser.add_argument
    add("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to run")
    add("--sketch", default="", help="shared library of a scan in C++ to compare with")
    add("--runs", type=int, default=5, help="processes per measurement, except of memory")
    add("--turns", type=int, default=30, help="turns per comparison; a tenth for long calls")
    add("--seconds", type=float, default=8.0, help="duration of a training")
    add("--dry-run", action="store_true", help="print the values, append no rows")
    args = parser.parse_args()
    path: Path = args.out / FILE
    here = origin()
    known = [] if args.dry_run else resumable(read_rows(path), here)

    def keep(rows: list[dict]) -> None:
        if not args.dry_run:
            append_rows(path, COLUMNS, [here | one for one in rows])

    measurements = plan(args.runs, args.turns, args.seconds, args.sketch)
    os.environ["OMP_NUM_THREADS"] = "1"
    if hasattr(os, "getloadavg"):  # not on Windows; above 0.5 the machine is not quiet
        load = row("load before", round(os.getloadavg()[0], 2), "tasks", " ".join(args.only))
        print_row(load)
        keep([load])
    table = measure_all([one for one in measurements if one.part in args.only], known, keep)
    print()
    latest = {(one["what"], one["conditions"]): one["value"] for one in known}
    for one in derived(table):
        print_row(one)
        if latest.get((one["what"], one["conditions"])) != str(one["value"]):
            keep([one])
    return 0


if __name__ == "__main__":
    sys.exit(main())
