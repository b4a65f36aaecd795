"""Time and memory against pixels: Vim beside DeiT with fused and with plain attention.

    python benchmarks/efficiency.py                               # on one CPU thread, see --seconds
    python benchmarks/efficiency.py --device cuda --batch 8 --dtype bfloat16
    python benchmarks/efficiency.py --models vim_tiny deit_tiny --tasks features --pixels 224 384
    python benchmarks/efficiency.py --summary                     # table, exponents, claim and plot

A point is a model, an attention, a task (features of a batch, or a training step with AdamW) and a
size in pixels. Each is measured in a process of its own, the smallest first: a warm-up at 32 px and
one at full size, then `--repeats` passes or as many as go into two seconds, of which the median is
kept; a pass of ten seconds or more is its own warm-up and is not repeated. On a CPU seconds are the
process's own when it has one thread, so that other work on the machine disturbs little, and the
clock's with more. Memory is the rise of the peak: on a CPU of the resident set over what it was
after the warm-up at 32 px, on a GPU of what torch holds over weights and input. That of a step has
gradients and the optimiser's state in it.

A point that takes longer than `--seconds`, or more than `--memory`, is a row too, and larger sizes
of its kind are left out. Rows are appended to results/efficiency.csv as they come; the same command
again goes on where it was. `--summary` reads them and measures nothing.
"""

import argparse
import contextlib
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

from rows import ORIGIN, append_rows, origin, read_rows, results_parser

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
SHORT, LONG = 2.0, 10.0  # seconds of passes: in all at least; after which none is repeated


@dataclass(frozen=True)
class Point:
    """What is measured in one process."""

    device: str
    threads: int
    model: str
    attention: str  # "fused" or "plain"; "" where there is none
    task: str
    pixels: int
    batch: int
    dtype: str

    def __str__(self) -> str:
        kind = f", {self.attention} attention" if self.attention else ""
        return f"{NAMES[self.model]}{kind}, {self.task}, {self.pixels} px"


def points(args: argparse.Namespace) -> Iterator[Point]:
    """All that is asked for, by size, so that what takes long comes last."""
    for pixels in sorted(args.pixels):
        for task in args.tasks:
            for model in args.models:
                kinds = ("",) if model.startswith("vim") else tuple(args.attention)
                for attention in kinds:
                    yield Point(args.device, args.threads, model, attention, task, pixels,
                                args.batch, args.dtype)  # fmt: skip


# --- one point, in a process of its own ------------------------------------------------------


def measure(point: Point, repeats: int, memory_gb: float) -> dict[str, Any]:
    """Its figures. Raises: MemoryError when it does not fit."""
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
    run(small, torch.randn(1, 3, 32, 32, device=point.device))  # compiles, and loads libraries
    del small
    x = torch.randn(point.batch, 3, point.pixels, point.pixels, device=point.device)
    if memory_gb and not cuda:
        # Private memory alone; the libraries' address space is many times as large.
        limit = int(memory_gb * 2**30)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    reset_peak(cuda)
    before = peak_mib(cuda)
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
    peak = peak_mib(cuda)
    median = statistics.median(times)
    return {
        "seconds": round(median, 5), "passes": len(times),
        "images_per_s": round(point.batch / median, 4), "peak_mib": round(peak),
        "rise_mib": round(peak - before, 1), "gflops": gflops(name, point.pixels),
    }  # fmt: skip


def peak_mib(cuda: bool) -> float:
    """Since `reset_peak`, or where a system cannot reset it since the start: of this process, on a
    GPU of what torch holds there."""
    if cuda:
        import torch

        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    if line := next((line for line in lines if line.startswith("VmHWM")), ""):
        return int(line.split()[1]) / 2**10
    unit = 2**20 if sys.platform == "darwin" else 2**10  # of ru_maxrss: bytes there, else KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def reset_peak(cuda: bool) -> None:
    """Begin again from what is held now; imports alone leave a peak of hundreds of MiB."""
    if cuda:
        import torch

        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def free_gib() -> float:
    """Seven tenths of what programs could take now, so that none is ended for the lack of it; 0
    where the system does not tell."""
    info = Path("/proc/meminfo")
    lines = info.read_text().splitlines() if info.exists() else []
    free = next((int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), 0)
    return round(0.7 * free / 2**20, 1)


def gflops(name: str, pixels: int) -> float:
    """Of one image's features, counted on tensors without values; plain attention, of which torch
    counts all products, since fused attention computes the same."""
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
    here = origin()["hardware"]  # other machines' rows lie there too
    known = {key_of(row): row["state"] for row in read_rows(file) if row["hardware"] == here}
    stopped: dict[tuple, str] = {}  # a kind of point -> why its larger sizes are left out
    for point in points(args):
        kind = tuple(v for k, v in asdict(point).items() if k != "pixels")
        state = known.get(tuple(map(str, asdict(point).values())))
        if state is None and kind in stopped:
            print(f"{point}: left out, smaller ones were {stopped[kind]}", flush=True)
            continue
        if state is None:
            row = measured(point, args)
            state = row["state"]
            append_rows(file, COLUMNS, [origin() | asdict(point) | row])
            figures = (
                f"{row['seconds']:.3f} s, {row['rise_mib']:,.0f} MiB" if state == DONE else state
            )
            print(f"{point}: {figures}", flush=True)
        if state != DONE:
            stopped[kind] = state


def key_of(row: dict[str, str]) -> tuple[str, ...]:
    return tuple(row[name] for name in Point.__dataclass_fields__)


def measured(point: Point, args: argparse.Namespace) -> dict[str, Any]:
    """Its row, by a process of its own.

    Raises: RuntimeError with that process's words when it fails for another reason than time or
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
    # A process that the system ended for its memory says nothing.
    if done.returncode == -9 or (done.returncode and "MemoryError" in done.stderr):
        return tokens | {"state": TOO_LARGE}
    if done.returncode:
        raise RuntimeError(f"{point} failed:\n{done.stderr[-3000:]}")
    return tokens | {"state": DONE} | json.loads(done.stdout.splitlines()[-1])


# --- what the rows say -----------------------------------------------------------------------

Series = dict[int, dict[str, float]]  # pixels -> figures


def series(rows: list[dict[str, str]]) -> dict[tuple[str, ...], dict[tuple[str, str], Series]]:
    """Conditions (hardware, device, threads, batch, dtype, task) -> (model, attention) -> sizes; of
    several rows for the same the last."""
    found: dict[tuple[str, ...], dict[tuple[str, str], Series]] = {}
    for row in rows:
        if row["state"] == DONE:
            where = tuple(
                row[k] for k in ("hardware", "device", "threads", "batch", "dtype", "task")
            )
            sizes = found.setdefault(where, {}).setdefault((row["model"], row["attention"]), {})
            sizes[int(row["pixels"])] = {
                k: float(row[k]) for k in ("tokens", "seconds", "rise_mib", "gflops")
            }
    return found


def exponent(sizes: Series, figure: str) -> float | None:
    """Slope of log(figure) over log(tokens) between the sizes of `FITTED`, by least squares; None
    without three points."""
    chosen = [s for px, s in sorted(sizes.items()) if FITTED[0] <= px <= FITTED[1]]
    if len(chosen) < 3 or min(s[figure] for s in chosen) <= 0:
        return None
    x, y = ([math.log(s[key]) for s in chosen] for key in ("tokens", figure))
    return statistics.linear_regression(x, y).slope


def crossover(ours: Series, theirs: Series, figure: str) -> float | None:
    """Pixels from which on ours takes less, between measured sizes by a straight line through the
    logarithms; 0 if it takes less everywhere, None if not at the largest."""
    both = sorted(ours.keys() & theirs.keys())
    gaps = [math.log(ours[px][figure] / theirs[px][figure]) for px in both]
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
    """Tables in Markdown: figures, exponents, crossovers and the paper's claim."""
    parts = []
    for where, models in series(rows).items():
        hardware, device, threads, batch, dtype, task = where
        what = "features" if task == "features" else "a training step"
        place = hardware if device == "cuda" else f"{hardware}, {threads} thread(s)"
        parts.append(f"### {what.capitalize()}: {place}, batch {batch}, {dtype}\n")
        sizes = sorted({px for model in models.values() for px in model})
        head = ["model", *(f"{px} px" for px in sizes), "exponent: time", "memory"]
        lines = [head, ["---"] * len(head)]
        for name, found in models.items():
            cells = [
                f"{found[px]['seconds']:.2f} s, {found[px]['rise_mib']:,.0f} MiB"
                if px in found else "-"
                for px in sizes
            ]  # fmt: skip
            slopes = [exponent(found, figure) for figure in ("seconds", "rise_mib")]
            lines.append([label(name), *cells, *("-" if s is None else f"{s:.2f}" for s in slopes)])
        parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n")
        parts += [f"- {line}" for line in findings(models, task)]
        parts.append("")
    return "\n".join(parts)


def findings(models: dict[tuple[str, str], Series], task: str) -> Iterator[str]:
    """Sentences: exponents against what is wanted, crossovers, the claim."""
    for name, ours in models.items():
        if not name[0].startswith("vim"):
            continue
        for figure, word in (("seconds", "time"), ("rise_mib", "memory")):
            slope = exponent(ours, figure)
            if slope is not None:
                verdict = "met" if slope <= 1.1 else "not met"
                yield (
                    f"{label(name)}: {word} grows by tokens^{slope:.2f}; 1.1 at most wanted: "
                    f"{verdict}."
                )
        for other, theirs in models.items():
            if other[0] != name[0].replace("vim", "deit"):
                continue
            pair = f"{label(name)} against {label(other)}"
            for figure, word in (("seconds", "faster"), ("rise_mib", "smaller")):
                both = ours.keys() & theirs.keys()
                if both and all(s[px][figure] > 0 for s in (ours, theirs) for px in both):
                    px = crossover(ours, theirs, figure)
                    text = "nowhere measured" if px is None else "everywhere" if not px else (
                        f"from {px:.0f} px on"
                    )  # fmt: skip
                    yield f"{pair}: {word} {text}."
            if task == "features" and CLAIMED_PX in ours.keys() & theirs.keys():
                mine, other_figures = ours[CLAIMED_PX], theirs[CLAIMED_PX]
                speed = other_figures["seconds"] / mine["seconds"]
                less = 100 * (1 - mine["rise_mib"] / max(other_figures["rise_mib"], 1e-9))
                yield (
                    f"{pair} at {CLAIMED_PX} px: {speed:.2f} times as fast (claimed "
                    f"{CLAIMED_SPEED}: {'met' if speed >= CLAIMED_SPEED else 'not met'}), "
                    f"{less:.1f} % less memory (claimed {CLAIMED_MEMORY}: "
                    f"{'met' if less >= CLAIMED_MEMORY else 'not met'})."
                )


def label(name: tuple[str, str]) -> str:
    model, attention = name
    return NAMES[model] + (f", {attention} attention" if attention else "")


def plot(rows: list[dict[str, str]], path: Path) -> None:
    """Seconds and memory over pixels, a line a model, a column a task and set of conditions."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    found = series(rows)
    figure, axes = plt.subplots(2, len(found), figsize=(5.2 * len(found), 7), squeeze=False)
    for column, (where, models) in enumerate(found.items()):
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
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main() -> int:
    parser = results_parser(__doc__, FILE)
    add = parser.add_argument
    add("--models", nargs="+", choices=MODELS, default=tuple(MODELS), help="to measure")
    add("--attention", nargs="+", choices=("fused", "plain"), default=("fused", "plain"),
        help="of DeiT")  # fmt: skip
    add("--tasks", nargs="+", choices=TASKS, default=TASKS, help="to measure")
    add("--pixels", nargs="+", type=int, default=PIXELS, help="sides, multiples of 16")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="to measure on")
    add("--threads", type=int, default=1, help="of torch and the scan")
    add("--batch", type=int, default=1, help="images")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of autocast")
    add("--repeats", type=int, default=3, help="passes at least, of less than ten seconds")
    add("--seconds", type=float, default=300.0, help="a point may take, all in all")
    add("--memory", type=float, default=free_gib(), help="GiB a CPU point may take; 0: any")
    add("--summary", action="store_true", help="print what the rows say, draw efficiency.svg")
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
