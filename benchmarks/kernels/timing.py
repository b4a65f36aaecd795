"""Time every scan that runs here, in one process, after a check of its results.

    python benchmarks/kernels/timing.py                   # this machine's device
    python benchmarks/kernels/timing.py --device cuda --quick --out FOLDER

A provider with wrong outputs or gradients is not timed; if it is one of our backends, nothing is
timed and the exit code is 1. Forward and backward passes are timed separately, with interleaved
calls of all providers and rotated inputs: p20, median and p80 in milliseconds, and the peak memory
above the inputs. On a GPU each time is compared with the lower bound from `ceilings.py`, and the
peers in benchmarks/peers/ are included. Rows are appended to results/kernels.csv, or to --out.
"""

import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `process` and `rows`

import vim_ssl.utils.openmp  # noqa: F401 (before torch)

import compiles
import torch
from process import peak_mib, proc_mib, reset_peak
from providers import Provider, Shape, providers
from rows import append_rows, results_parser
from torch import Tensor

from vim_ssl.kernels.selective_scan import bi_selective_scan
from vim_ssl.kernels.selective_scan.accuracy import (
    BACKENDS,
    DTYPES,
    Tensors,
    processor,
    relative_error,
    two_way_inputs,
    typed,
)
from vim_ssl.utils.environment import commit

COLUMNS = (
    "provider", "direction", "dtype", "shape", "timing", "p20_ms", "p50_ms", "p80_ms", "peak_mb",
    "compile_s", "floor_ms", "x_floor", "device", "torch", "triton", "commit", "date",
)  # fmt: skip
# Largest relative error of an output or a gradient, for a provider to be timed.
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}
CHECKED = Shape(2, 63, 64)
# 224 and 512 px in batches, one image of 1248 px.
CUDA_SHAPES = [
    Shape(b, l, d) for d in (384, 768, 1536) for b, l in ((128, 197), (64, 1025), (1, 6085))
]
CPU_SHAPES = [Shape(1, 197, 384), Shape(8, 197, 384), Shape(1, 6085, 384)]


# --- correctness -----------------------------------------------------------------------------


def inputs(shape: Shape, dtype: str, device: str, seed: int = 0) -> Tensors:
    """Arguments of `bi_selective_scan` as a trained model has them; z is a view, as in a model."""
    if shape == CHECKED:
        m = two_way_inputs(shape.b, shape.l, shape.d, shape.n, seed=seed)
        return {k: v.to(device) for k, v in typed(m, DTYPES[dtype]).items()}
    g = torch.Generator(device).manual_seed(seed)
    normal = partial(torch.randn, generator=g, device=device)
    b, l, d, n = shape.b, shape.l, shape.d, shape.n
    m = {
        "u": normal(2, b, l, d), "delta": normal(2, b, l, d), "B": normal(2, b, l, n),
        "C": normal(2, b, l, n), "D": normal(2, d), "z": normal(b, l, 2 * d),
        "A": -torch.arange(1, n + 1, device=device).repeat(2, d, 1).float(),
        "delta_bias": normal(2, d) - 4,
    }  # fmt: skip
    m = typed(m, DTYPES[dtype])
    return m | {"z": m["z"].chunk(2, dim=-1)[1]}


def check(provider: Provider, dtype: str, device: str) -> str | None:
    """Describe an error in a provider's output or gradients on a small shape; None if correct."""
    m = inputs(CHECKED, dtype, device)
    try:
        results = _results(m, provider.scan, provider)
    except Exception as failure:
        return first_line(failure)
    loop = partial(bi_selective_scan, backend="reference")
    exact = _results({k: v.double().cpu() for k, v in m.items()}, loop, None)
    for name, value in results.items():
        error = relative_error(value, exact[name])
        if not error <= TOLERANCE[dtype]:
            return f"{name} is wrong: relative error {error:.1e}, at most {TOLERANCE[dtype]:.0e}"
    return None


def _results(m: Tensors, scan: Callable[..., Tensor], provider: Provider | None) -> Tensors:
    leaves = {name: v.clone().requires_grad_() for name, v in m.items()}
    forward_only = provider and provider.why_not(CHECKED, "backward")
    with torch.set_grad_enabled(not forward_only):
        y = provider.output(scan(**provider.prepare(leaves))) if provider else scan(**leaves)
    if not y.requires_grad:
        return {"y": y.detach().cpu()}
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.device)
    grads = torch.autograd.grad((y * weights).sum(), list(leaves.values()))
    named = zip(leaves, grads, strict=True)
    return {"y": y.detach().cpu()} | {f"d_{name}": g.cpu() for name, g in named}


# --- timing ----------------------------------------------------------------------------------


@dataclass
class Timed:
    """A call to be timed, and its measurements.

    Attributes:
        timing: "calls", or "graph": replayed, without waiting for launches.
        call: called with the index of the input set.
        compile_s: seconds of the first call, if it compiled anything.
        capture: returns the same call as a graph.
    """

    provider: str
    timing: str
    call: Callable[[int], object]
    peak_mb: float | None = None
    compile_s: float | None = None
    capture: "Callable[[], Timed] | None" = None
    ms: list[float] = field(default_factory=list)


def prepare_calls(
    provider: Provider, direction: str, sets: Sequence[Tensors], device: str
) -> Timed | None:
    """Run a provider once on the first set, measure its memory, and return the call to time; None
    if it has no backward pass.

    The peak of a backward pass includes the tensors that the forward pass saved for it.
    """
    backward = direction == "backward"
    layouts = [
        {k: v.detach().requires_grad_(backward) for k, v in provider.prepare(m).items()}
        for m in sets
    ]
    with torch.set_grad_enabled(backward), _compilations() as compiled:
        started = time.perf_counter()
        first = provider.scan(**layouts[0])
        if backward and not first.requires_grad:
            return None
        weights = torch.randn_like(first)
        del first

        def once() -> None:
            y = provider.scan(**layouts[0])
            if backward:
                torch.autograd.grad(y, list(layouts[0].values()), weights)

        once()
        wait(device)
        seconds = round(time.perf_counter() - started, 1)
        timed = Timed(
            provider.name, "calls", _call(provider, layouts, weights), _peak_mb(once, device),
            compile_s=seconds if provider.compiles or compiled else None,
        )  # fmt: skip
    if provider.capture and device == "cuda":
        timed.capture = lambda: Timed(
            provider.name, "graph", _replay(provider, layouts, weights), timed.peak_mb
        )
    return timed


@contextmanager
def _compilations() -> Iterator[list[compiles.Compilation]]:
    """The variants of Triton kernels that are compiled inside, not read from a cache."""
    compiled: list[compiles.Compilation] = []
    with compiles.heard(lambda one: None if one.cached else compiled.append(one)):
        yield compiled


def _call(
    provider: Provider, layouts: Sequence[Tensors], weights: Tensor
) -> Callable[[int], object]:
    """Return the call to time, a function of the input set's index.

    It is the forward pass, or where the inputs require gradients the backward pass alone, on a
    retained graph.
    """
    if not any(m.requires_grad for m in layouts[0].values()):
        return lambda i: provider.scan(**layouts[i])
    outs = [provider.scan(**m) for m in layouts]
    leaves = [list(m.values()) for m in layouts]
    return lambda i: torch.autograd.grad(outs[i], leaves[i], weights, retain_graph=True)


def _replay(
    provider: Provider, layouts: Sequence[Tensors], weights: Tensor
) -> Callable[[int], object]:
    """Return the same call replayed from CUDA graphs, one for each set."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # a backward pass runs on the stream of its forward pass
        call = _call(provider, layouts, weights)
        for i in range(len(layouts)):
            call(i)
    stream.synchronize()
    graphs = []
    for i in range(len(layouts)):
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1], stream=stream):
            call(i)
    return lambda i: graphs[i].replay()


def time_calls(timed: Sequence[Timed], sets: int, device: str, budget_s: float) -> None:
    """Fill ``ms`` in rounds over all calls, so that disturbances affect all of them alike."""
    started = time.perf_counter()
    if device == "cuda":
        for one in timed:
            one.ms = _time_on_gpu(one.call, sets, budget_s / len(timed))
        return
    rounds = 0
    while rounds < 5 or (time.perf_counter() - started < budget_s and rounds < 200):
        for one in timed:
            before = time.perf_counter()
            one.call(rounds % sets)
            one.ms.append(1e3 * (time.perf_counter() - before))
        rounds += 1


def _time_on_gpu(call: Callable[[int], object], sets: int, budget_s: float) -> list[float]:
    def batch(repeats: int) -> list[float]:
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
        marks[0].record()
        for i, mark in enumerate(marks[1:]):
            call(i % sets)
            mark.record()
        torch.cuda.synchronize()
        return [a.elapsed_time(b) for a, b in pairwise(marks)]

    warm = batch(2 * sets)
    repeats = int(1e3 * budget_s / max(statistics.median(warm), 1e-3))
    return batch(min(max(repeats, 5), 200))


def percentiles(ms: list[float]) -> list[float]:
    """The 20th, 50th and 80th percentile."""
    return statistics.quantiles(ms, n=10, method="inclusive")[1:8:3]


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _peak_mb(call: Callable[[], object], device: str) -> float | None:
    """Peak memory of a call above what was in use before, in MB (10^6 bytes).

    On a CPU that of the resident set; None where the system is not Linux with glibc.
    """
    if device == "cpu":
        try:
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)  # else freed memory would be used again, uncounted
        except (OSError, AttributeError):
            return None
    if not reset_peak(device):
        return None
    before = (
        torch.cuda.memory_allocated() / 2**20
        if device == "cuda"
        else proc_mib("self/status", "VmRSS")
    )
    call()
    wait(device)
    return round((peak_mib(device) - before) * 2**20 / 1e6, 1)


# --- rows ------------------------------------------------------------------------------------


def measure(
    device: str,
    *,
    shapes: Sequence[Shape],
    dtypes: Sequence[str],
    budget_s: float = 2.0,
    ceilings=None,
    groups: Collection[str] | None = None,
    say: Callable[[str], object] = print,
    until: float = float("inf"),
) -> Iterator[dict]:
    """Check, then time; yield each row as soon as it is measured.

    A case that fails is reported and left out.

    Args:
        budget_s: seconds of timing for one shape, dtype and direction.
        ceilings: a `ceilings.Ceilings`, for the lower bounds.
        groups: see `providers`; None for all. Those by torch.compile take minutes.
        until: a `time.monotonic()` after which no new case begins.
    Raises: RuntimeError if one of our own backends is wrong, before anything is timed; at the end,
        if one of them failed.
    """
    available, skipped = providers(device, groups)
    for line in skipped:
        say(line)
    correct: dict[str, list[Provider]] = {dtype: [] for dtype in dtypes}
    for dtype in dtypes:
        for provider in available:
            if problem := check(provider, dtype, device):
                if provider.name in BACKENDS:
                    raise RuntimeError(f"{provider.name}, {dtype}: {problem}. Nothing is timed.")
                say(f"skipped: {provider.name}, {dtype}. {problem}")
            else:
                correct[dtype].append(provider)
    common, failures = origin(device), []
    cases = [(d, s, way) for d in dtypes for s in shapes for way in ("forward", "backward")]
    for dtype, shape, direction in cases:
        if time.monotonic() > until:
            say(f"cut off before {shape}, {dtype}, {direction}: the time is up")
            break
        floor = ceilings and ceilings.floor_ms(direction, **vars(shape))
        # On a GPU one provider after the other: all at once would not fit into its memory.
        groups_of_one = [[p] for p in correct[dtype]]
        for group in groups_of_one if device == "cuda" else [correct[dtype]]:
            try:
                for one in _timed(group, shape, dtype, direction, device, budget_s, say):
                    yield _row(one, shape, dtype, direction, floor) | common
            except Exception as error:
                names = ", ".join(provider.name for provider in group)
                ours = [p.name for p in group if p.name in BACKENDS]
                word = "BROKEN" if ours else "FAILED"
                say(f"{word}: {names}, {shape}, {dtype}, {direction}. {first_line(error)}")
                failures += ours
            if device == "cuda":
                torch.cuda.empty_cache()
    if failures:
        raise RuntimeError(f"{len(failures)} cases failed: {', '.join(sorted(set(failures)))}.")


def _timed(group, shape, dtype, direction, device, budget_s, say) -> Iterator[Timed]:
    """Time the calls of these providers in turns, then each captured in a graph."""
    # More than a cache holds, so that no input stays in it.
    sets = [inputs(shape, dtype, device, seed) for seed in range(3 if device == "cuda" else 2)]
    torch._dynamo.reset()  # torch.compile gives up on a function after eight shapes
    timed = []
    for provider in group:
        reason = provider.why_not(shape, direction)
        if reason is None:
            try:
                one = prepare_calls(provider, direction, sets, device)
                timed += [one] if one else []
            except Exception as error:
                if provider.name in BACKENDS and len(group) == 1:
                    raise
                reason = first_line(error)
        if reason is not None:
            say(f"skipped: {provider.name}, {shape}, {dtype}, {direction}. {reason}")
    time_calls(timed, len(sets), device, budget_s)
    yield from timed
    for one in timed:
        if one.capture is None:
            continue
        try:
            graph = one.capture()
            time_calls([graph], len(sets), device, budget_s)
            yield graph
        except Exception as error:  # the time of its calls stays
            say(f"skipped: {one.provider} in a CUDA graph. {first_line(error)}")


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"


def _row(one: Timed, shape: Shape, dtype: str, direction: str, floor: float | None) -> dict:
    p20, p50, p80 = percentiles(one.ms)
    row = {
        "provider": one.provider, "direction": direction, "dtype": dtype, "shape": str(shape),
        "timing": one.timing, "p20_ms": _digits(p20), "p50_ms": _digits(p50),
        "p80_ms": _digits(p80), "peak_mb": one.peak_mb, "compile_s": one.compile_s,
    }  # fmt: skip
    return row | ({"floor_ms": _digits(floor), "x_floor": _digits(p50 / floor)} if floor else {})


def _digits(value: float) -> float:
    return float(f"{value:.4g}")


def origin(device: str) -> dict[str, str]:
    """Device, versions, commit and date of a row."""
    threads = torch.get_num_threads()
    name = torch.cuda.get_device_name() if device == "cuda" else f"{processor()}, {threads} threads"
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = ""
    return {"device": name, "torch": torch.__version__, "triton": triton, "commit": commit(),
            "date": time.strftime("%Y-%m-%d")}  # fmt: skip


def format_row(row: dict) -> str:
    text = (
        f"{row['provider']:26}{row['direction']:9}{row['dtype']:5}{row['shape']:21}"
        f"{row['timing']:6}{row['p50_ms']:>9.4g} ms  ({row['p20_ms']:.4g} to {row['p80_ms']:.4g})"
    )
    text += f"  {row['peak_mb']} MB" if row["peak_mb"] is not None else ""
    text += f"  {row['x_floor']} x floor" if "x_floor" in row else ""
    return text + (f"  first call {row['compile_s']} s" if row["compile_s"] else "")


def measure_ceilings(say: Callable[[str], object] = print):
    """Measure the GPU's ceilings; None where Triton is missing."""
    try:
        import ceilings
    except ImportError as error:
        say(f"no floors: {error}")
        return None
    rates = ceilings.measure()
    say(
        f"ceilings: {rates.exp2 / 1e12:.2f}e12 exp2/s, {rates.fma / 1e12:.1f}e12 FMA/s, "
        f"{rates.copied / 1e12:.2f} TB/s copied, {rates.sm_clock_mhz} MHz"
    )
    return rates


def main(argv: Sequence[str] | None = None) -> int:
    parser = results_parser(__doc__, "kernels.csv")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument(
        "--device", default=default, choices=("cpu", "cuda"), help="device that runs the scan"
    )
    parser.add_argument("--quick", action="store_true", help="time the first shape only, briefly")
    args = parser.parse_args(argv)
    shapes = CUDA_SHAPES if args.device == "cuda" else CPU_SHAPES
    rows = measure(
        args.device,
        shapes=shapes[:1] if args.quick else shapes,
        dtypes=["bf16", "fp32"] if args.device == "cuda" else ["fp32"],
        budget_s=0.5 if args.quick else 2.0 if args.device == "cuda" else 10.0,
        ceilings=measure_ceilings() if args.device == "cuda" else None,
    )
    try:
        for row in rows:
            print(format_row(row), flush=True)
            append_rows(args.out / "kernels.csv", COLUMNS, [row])
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
