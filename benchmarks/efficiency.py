"""Time and memory by image size: Vim, and DeiT with fused and with plain attention.

    python benchmarks/efficiency.py                               # on one CPU thread, see --seconds
    python benchmarks/efficiency.py --device cuda --batch 8 --dtype bfloat16
    python benchmarks/efficiency.py --models vim_tiny deit_tiny --tasks features --pixels 224 384
    python benchmarks/efficiency.py --summary                     # table, exponents, claim and plot

A point is a model, an attention, a task (features of a batch, or a training step with AdamW) and a
size in pixels. Each is measured in a fresh process, the smallest first: a warm-up at 32 px and one
at full size, then the median of `--repeats` passes or as many as fit into two seconds; a pass of
ten seconds or more is neither warmed up nor repeated. On a CPU with one thread, seconds are the
process's CPU time, which other work on the machine hardly affects; otherwise wall-clock time.
Memory is the increase of the peak: on a CPU, of the resident set since the warm-up at 32 px; on a
GPU, of torch's allocations beyond weights and input. For a step it includes gradients and optimiser
state.

A point that takes longer than `--seconds` or more than `--memory` also gets a row, and larger sizes
of its kind are skipped. Rows are appended to results/efficiency.csv as they come; the same command
resumes. `--summary` reads them and measures nothing.
"""

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from process import peak_mib, proc_mib, reset_peak
from rows import ORIGIN, append_rows, markdown_table, origin, read_rows, results_parser

FILE = "efficiency.csv"
COLUMNS = (
    *ORIGIN, "device", "threads", "model", "attention", "task", "pixels", "tokens", "batch",
    "dtype", "state", "seconds", "passes", "images_per_s", "peak_mib", "rise_mib", "gflops",
)  # fmt: skip
MODELS = {
    "vim_tiny": "vim_tiny_patch16_224", "deit_tiny": "deit_tiny_patch16_224",
    "vim_small": "vim_small_patch16_224", "deit_small": "deit_small_patch16_224",
}  # fmt: skip
NAMES = {"vim_tiny": "Vim-Ti", "deit_tiny": "DeiT-Ti", "vim_small": "Vim-S", "deit_small": "DeiT-S"}
TASKS = ("features", "step")
PIXELS = (224, 384, 512, 640, 768, 1024, 1248, 1600, 2048, 4096)
FITTED = (640, 2048)  # pixels between which exponents are fitted
CLAIMED_PX, CLAIMED_SPEED, CLAIMED_MEMORY = 1248, 2.8, 86.8  # the paper's abstract; per cent less
DONE, TOO_LONG, TOO_LARGE = "measured", "too long", "too large"
SHORT, LONG = 2.0, 10.0  # seconds: minimum total of the passes; passes this long are not repeated


@dataclass(frozen=True)
class Point:
    """A measurement in one process."""

    device: str
    threads: int
    model: str
    attention: str  # "fused" or "plain"; "" for Vim
    task: str
    pixels: int
    batch: int
    dtype: str

    def __str__(self) -> str:
        kind = f", {self.attention} attention" if self.attention else ""
        return f"{NAMES[self.model]}{kind}, {self.task}, {self.pixels} px"


def points(args: argparse.Namespace) -> Iterator[Point]:
    """Yield all requested points by size, so that slow ones come last."""
    for pixels in sorted(args.pixels):
        for task in args.tasks:
            for model in args.models:
                kinds = ("",) if model.startswith("vim") else tuple(args.attention)
                for attention in kinds:
                    yield Point(args.device, args.threads, model, attention, task, pixels,
                                args.batch, args.dtype)  # fmt: skip


# --- one point, in a fresh process -----------------------------------------------------------


def measure(point: Point, repeats: int, memory_gb: float) -> dict[str, Any]:
    """Measure a point in this process. Raises: MemoryError when it does not fit."""
    import timm
    import torch
    from timm.layers import set_fused_attn

    import vim_ssl  # noqa: F401 (registers its models)

    torch.set_num_threads(point.threads)
    if point.attention == "plain":
        set_fused_attn(False)
    cuda = point.device == "cuda"
    torch.manual_seed(0)
    training = point.task == "step"
    name = MODELS[point.model]
    args = {"num_classes": 1000 if training else 0, "img_size": point.pixels}
    model = timm.create_model(name, **args).to(point.device).train(training)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    dtype = getattr(torch, point.dtype)

    def run(net: Any, x: Any) -> None:
        with (
            torch.inference_mode(not training),
            torch.autocast(point.device, dtype, enabled=dtype != torch.float32),
        ):
            out = net(x)
        if training:
            out.float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    small = timm.create_model(name, **args | {"img_size": 32}).to(point.device).train(training)
    run(small, torch.randn(1, 3, 32, 32, device=point.device))  # compiles and loads libraries
    del small
    x = torch.randn(point.batch, 3, point.pixels, point.pixels, device=point.device)
    if memory_gb and not cuda:
        # Limit private memory only: the libraries' address space is many times larger.
        limit = int(memory_gb * 2**30)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    reset_peak(point.device)
    before = peak_mib(point.device)
    clock = time.process_time if not cuda and point.threads == 1 else time.perf_counter

    def timed() -> float:
        started = clock()
        run(model, x)
        if cuda:
            torch.cuda.synchronize()
        return clock() - started

    try:
        times = [timed()]
        if times[0] < LONG:
            times = [timed()]
        while sum(times) < (LONG if len(times) < repeats else SHORT):
            times.append(timed())
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
            raise MemoryError(str(error)) from error
        raise
    peak = peak_mib(point.device)
    median = statistics.median(times)
    return {
        "seconds": round(median, 5), "passes": len(times),
        "images_per_s": round(point.batch / median, 4), "peak_mib": round(peak),
        "rise_mib": round(peak - before, 1), "gflops": gflops(name, point.pixels),
    }  # fmt: skip


def free_gib() -> float:
    """Return 70 % of the available memory, so that no process is killed; 0 if unknown."""
    return round(0.7 * proc_mib("meminfo", "MemAvailable") / 2**10, 1)


def gflops(name: str, pixels: int) -> float:
    """Return the GFLOP for one image's features, counted on meta tensors with plain attention.

    Fused attention computes the same products, but torch does not count them all.
    """
    import timm
    import torch
    from timm.layers import set_fused_attn

    from vim_ssl.kernels.selective_scan.flops import flop_counter

    set_fused_attn(False)
    with torch.device("meta"), torch.no_grad():
        model = timm.create_model(name, num_classes=0, img_size=pixels)
        with flop_counter("meta", display=False) as counter:
            model(torch.empty(1, 3, pixels, pixels))
    return round(counter.get_total_flops() / 1e9, 2)


# --- all points ------------------------------------------------------------------------------


def measure_all(args: argparse.Namespace) -> None:
    file = args.out / FILE
    here = origin()["hardware"]  # the file also has rows from other machines
    known = {key_of(row): row["state"] for row in read_rows(file) if row["hardware"] == here}
    stopped: dict[tuple, str] = {}  # kind of point -> why larger sizes are skipped
    for point in points(args):
        kind = tuple(v for k, v in asdict(point).items() if k != "pixels")
        state = known.get(tuple(map(str, asdict(point).values())))
        if state is None and kind in stopped:
            print(f"{point}: skipped, smaller ones were {stopped[kind]}", flush=True)
            continue
        if state is None:
            row = measured(point, args)
            state = row["state"]
            append_rows(file, COLUMNS, [origin() | asdict(point) | row])
            cost = f"{row['seconds']:.3f} s, {row['rise_mib']:,.0f} MiB" if state == DONE else state
            print(f"{point}: {cost}", flush=True)
        if state != DONE:
            stopped[kind] = state


def key_of(row: dict[str, str]) -> tuple[str, ...]:
    return tuple(row[name] for name in Point.__dataclass_fields__)


def measured(point: Point, args: argparse.Namespace) -> dict[str, Any]:
    """Measure a point in a fresh process; return its row.

    Raises: RuntimeError with the process's output if it fails for a reason other than time or
        memory.
    """
    command = [
        sys.executable, __file__, "--point", json.dumps(asdict(point)),
        "--repeats", str(args.repeats), "--memory", str(args.memory),
    ]  # fmt: skip
    tokens = {"tokens": (point.pixels // 16) ** 2 + 1}
    environment = os.environ | {"OMP_NUM_THREADS": str(point.threads)}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=args.seconds, env=environment
        )
    except subprocess.TimeoutExpired:
        return tokens | {"state": TOO_LONG}
    # A process killed by the system for its memory prints nothing.
    if done.returncode == -9 or (done.returncode and "MemoryError" in done.stderr):
        return tokens | {"state": TOO_LARGE}
    if done.returncode:
        raise RuntimeError(f"{point} failed:\n{done.stderr[-3000:]}")
    return tokens | {"state": DONE} | json.loads(done.stdout.splitlines()[-1])


# --- summary of the rows ----------------------------------------------------------------------

Series = dict[int, dict[str, float]]  # pixels -> metrics


def series(rows: list[dict[str, str]]) -> dict[tuple[str, ...], dict[tuple[str, str], Series]]:
    """Conditions (hardware, device, threads, batch, dtype, task) -> (model, attention) -> sizes.

    If a point has several rows, the last one is used.
    """
    grouped: dict[tuple[str, ...], dict[tuple[str, str], Series]] = {}
    for row in rows:
        if row["state"] == DONE:
            where = tuple(
                row[k] for k in ("hardware", "device", "threads", "batch", "dtype", "task")
            )
            sizes = grouped.setdefault(where, {}).setdefault((row["model"], row["attention"]), {})
            sizes[int(row["pixels"])] = {
                k: float(row[k]) for k in ("tokens", "seconds", "rise_mib", "gflops")
            }
    return grouped


def exponent(sizes: Series, metric: str) -> float | None:
    """Least-squares slope of log(metric) over log(tokens) between the sizes of `FITTED`.

    None with fewer than three points.
    """
    chosen = [s for px, s in sorted(sizes.items()) if FITTED[0] <= px <= FITTED[1]]
    if len(chosen) < 3 or min(s[metric] for s in chosen) <= 0:
        return None
    x, y = ([math.log(s[key]) for s in chosen] for key in ("tokens", metric))
    return statistics.linear_regression(x, y).slope


def crossover(ours: Series, theirs: Series, metric: str) -> float | None:
    """Return the size in pixels from which ours takes less, interpolated between measured sizes on
    a log scale.

    0 if it takes less at every size, None if it does not at the largest.
    """
    both = sorted(ours.keys() & theirs.keys())
    gaps = [math.log(ours[px][metric] / theirs[px][metric]) for px in both]
    if not both or gaps[-1] >= 0:
        return None
    worse = [i for i, gap in enumerate(gaps) if gap >= 0]
    if not worse:
        return 0
    i = worse[-1]
    share = gaps[i] / (gaps[i] - gaps[i + 1])
    low, high = math.log(both[i]), math.log(both[i + 1])
    return math.exp(low + share * (high - low))


def summary(rows: list[dict[str, str]]) -> str:
    """Format measurements, exponents, crossovers and the paper's claim as Markdown."""
    text = []
    for where, models in series(rows).items():
        hardware, device, threads, batch, dtype, task = where
        what = "features" if task == "features" else "a training step"
        where = hardware if device == "cuda" else f"{hardware}, {threads} thread(s)"
        text.append(f"### {what.capitalize()}: {where}, batch {batch}, {dtype}\n")
        sizes = sorted({px for model in models.values() for px in model})
        head = ["model", *(f"{px} px" for px in sizes), "exponent: time", "memory"]
        lines = []
        for name, measured_at in models.items():
            cells = [
                f"{measured_at[px]['seconds']:.2f} s, {measured_at[px]['rise_mib']:,.0f} MiB"
                if px in measured_at else "-"
                for px in sizes
            ]  # fmt: skip
            slopes = [exponent(measured_at, metric) for metric in ("seconds", "rise_mib")]
            lines.append([label(name), *cells, *("-" if s is None else f"{s:.2f}" for s in slopes)])
        text.append(markdown_table(head, lines) + "\n")
        text += [f"- {line}" for line in findings(models, task)]
        text.append("")
    return "\n".join(text)


def findings(models: dict[tuple[str, str], Series], task: str) -> Iterator[str]:
    """Yield sentences about exponents, crossovers and the claim."""
    for name, ours in models.items():
        if not name[0].startswith("vim"):
            continue
        for metric, word in (("seconds", "time"), ("rise_mib", "memory")):
            slope = exponent(ours, metric)
            if slope is not None:
                yield (
                    f"{label(name)}: {word} grows as tokens^{slope:.2f} (target at most 1.1: "
                    f"{_met(slope <= 1.1)})."
                )
        for other, theirs in models.items():
            if other[0] != name[0].replace("vim", "deit"):
                continue
            pair = f"{label(name)} against {label(other)}"
            for metric, word in (("seconds", "faster"), ("rise_mib", "smaller")):
                both = ours.keys() & theirs.keys()
                if both and all(s[px][metric] > 0 for s in (ours, theirs) for px in both):
                    px = crossover(ours, theirs, metric)
                    where = (
                        "everywhere"
                        if px == 0
                        else f"from {px:.0f} px on"
                        if px
                        else "at no measured size"
                    )
                    yield f"{pair}: {word} {where}."
            if task == "features" and CLAIMED_PX in ours.keys() & theirs.keys():
                mine, reference = ours[CLAIMED_PX], theirs[CLAIMED_PX]
                speed = reference["seconds"] / mine["seconds"]
                less = 100 * (1 - mine["rise_mib"] / max(reference["rise_mib"], 1e-9))
                yield (
                    f"{pair} at {CLAIMED_PX} px: {speed:.2f} times as fast (claimed "
                    f"{CLAIMED_SPEED}: {_met(speed >= CLAIMED_SPEED)}), {less:.1f} % less memory "
                    f"(claimed {CLAIMED_MEMORY}: {_met(less >= CLAIMED_MEMORY)})."
                )


def _met(holds: bool) -> str:
    return "met" if holds else "not met"


def label(name: tuple[str, str]) -> str:
    model, attention = name
    return NAMES[model] + (f", {attention} attention" if attention else "")


def plot(rows: list[dict[str, str]], path: Path) -> None:
    """Plot seconds and memory over pixels: a line per model, a column per task and conditions."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plots = series(rows)
    canvas, axes = plt.subplots(2, len(plots), figsize=(5.2 * len(plots), 7), squeeze=False)
    for column, (where, models) in enumerate(plots.items()):
        for line, (key, unit) in enumerate((("seconds", "s"), ("rise_mib", "MiB"))):
            axis = axes[line][column]
            for (model, attention), sizes in models.items():
                px = sorted(size for size in sizes if sizes[size][key] > 0)
                style = {"": "-", "fused": "--", "plain": ":"}[attention]
                axis.plot(px, [sizes[p][key] for p in px], style, marker=".",
                          color="C0" if model.endswith("tiny") else "C1",
                          label=label((model, attention)))  # fmt: skip
            axis.set(xscale="log", yscale="log", xlabel="pixels a side", ylabel=unit)
            axis.set_title(f"{where[5]}, {where[1]}, batch {where[3]}, {where[4]}", fontsize=9)
            axis.set_xticks(PIXELS, PIXELS, fontsize=7, rotation=45)
            axis.minorticks_off()
    axes[0][0].legend(fontsize=8)
    canvas.tight_layout()
    canvas.savefig(path, metadata={"Date": None})
    plt.close(canvas)


def main() -> int:
    parser = results_parser(__doc__, FILE)
    add = parser.add_argument
    add("--models", nargs="+", choices=MODELS, default=tuple(MODELS), help="to measure")
    add("--attention", nargs="+", choices=("fused", "plain"), default=("fused", "plain"),
        help="of DeiT")  # fmt: skip
    add("--tasks", nargs="+", choices=TASKS, default=TASKS, help="to measure")
    add("--pixels", nargs="+", type=int, default=PIXELS, help="sides, multiples of 16")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="device to measure on")
    add("--threads", type=int, default=1, help="threads of torch and the scan")
    add("--batch", type=int, default=1, help="images")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="autocast dtype")
    add("--repeats", type=int, default=3, help="minimum number of passes below ten seconds")
    add("--seconds", type=float, default=300.0, help="time limit per point, including warm-up")
    add("--memory", type=float, default=free_gib(), help="limit per CPU point, GiB; 0: none")
    add("--summary", action="store_true", help="print the summary, plot efficiency.svg")
    add("--point", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.point:
        point = Point(**json.loads(args.point))
        print(json.dumps(measure(point, args.repeats, args.memory)))
        return 0
    if args.summary:
        rows = read_rows(args.out / FILE)
        if not any(row["state"] == DONE for row in rows):
            print(f"There are no rows in {args.out / FILE} yet.")
            return 1
        print(summary(rows))
        plot(rows, args.out / "efficiency.svg")
        return 0
    measure_all(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
