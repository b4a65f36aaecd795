"""Time and memory by image size: Vim, and DeiT with fused and with plain attention.

    python benchmarks/efficiency.py                               # on one CPU thread, see --seconds
    python benchmarks/efficiency.py --device cuda --batch 8 --dtype bfloat16
    python benchmarks/efficiency.py --models vim_tiny deit_tiny --tasks features --pixels 224 384
    python benchmarks/efficiency.py --summary                     # table, exponents, claim and plot

A point is a model, an attention, a task (features of a batch, features with a dense head, or a
training step with AdamW) and a size in pixels. Each is measured in a fresh process, the smallest
first: a warm-up at 32 px and one at full size, then the median of `--repeats` passes or as many as
fit into two seconds; a pass of ten seconds or more is neither warmed up nor repeated. On a CPU with
one thread, seconds are the process's CPU time, which other work on the machine hardly affects;
otherwise wall-clock time. Memory is the increase of the peak: on a CPU, of the resident set since
the warm-up at 32 px; on a GPU, of torch's allocations beyond weights and input. For a step it
includes gradients and optimiser state.

A point that takes longer than `--seconds` or more than `--memory` also gets a row, and larger sizes
of its kind are skipped. Rows are appended to results/efficiency.csv as they come; the same command
resumes. `--summary` reads them and measures nothing.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from rows import ORIGIN, append_rows, markdown_table, origin, read_rows, results_parser

from vim_ssl.tasks.paper.efficiency import (
    DONE,
    FEATURES,
    MODELS,
    NAMES,
    STEP,
    TASKS,
    Point,
    free_gib,
    measured,
)

FILE = "efficiency.csv"
COLUMNS = (
    *ORIGIN, "device", "threads", "model", "attention", "task", "pixels", "tokens", "batch",
    "dtype", "state", "seconds", "passes", "images_per_s", "peak_mib", "rise_mib", "gflops",
)  # fmt: skip
PIXELS = (224, 384, 512, 640, 768, 1024, 1248, 1600, 2048, 4096)
FITTED = (640, 2048)  # pixels between which exponents are fitted
CLAIMED_PX, CLAIMED_SPEED, CLAIMED_MEMORY = 1248, 2.8, 86.8  # the paper's abstract; per cent less


def points(args: argparse.Namespace) -> Iterator[Point]:
    """Yield all requested points by size, so that slow ones come last."""
    for pixels in sorted(args.pixels):
        for task in args.tasks:
            for model in args.models:
                kinds = ("",) if model.startswith("vim") else tuple(args.attention)
                for attention in kinds:
                    yield Point(args.device, args.threads, model, attention, task, pixels,
                                args.batch, args.dtype)  # fmt: skip


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
            row = measured(point, seconds=args.seconds, repeats=args.repeats, memory_gb=args.memory)
            state = row["state"]
            append_rows(file, COLUMNS, [origin() | asdict(point) | row])
            cost = f"{row['seconds']:.3f} s, {row['rise_mib']:,.0f} MiB" if state == DONE else state
            print(f"{point}: {cost}", flush=True)
        if state != DONE:
            stopped[kind] = state


def key_of(row: dict[str, str]) -> tuple[str, ...]:
    return tuple(row[name] for name in Point.__dataclass_fields__)


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
        what = {FEATURES: "features", STEP: "a training step"}.get(task, "features, dense head")
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
    add("--tasks", nargs="+", choices=TASKS, default=(FEATURES, STEP), help="to measure")
    add("--pixels", nargs="+", type=int, default=PIXELS, help="sides, multiples of 16")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="device to measure on")
    add("--threads", type=int, default=1, help="threads of torch and the scan")
    add("--batch", type=int, default=1, help="images")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="autocast dtype")
    add("--repeats", type=int, default=3, help="minimum number of passes below ten seconds")
    add("--seconds", type=float, default=300.0, help="time limit per point, including warm-up")
    add("--memory", type=float, default=free_gib(), help="limit per CPU point, GiB; 0: none")
    add("--summary", action="store_true", help="print the summary, plot efficiency.svg")
    args = parser.parse_args()
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
