"""How fast is every scan that runs here? The right ones, timed side by side in one process.

    python benchmarks/kernels/timing.py                   # this machine's device
    python benchmarks/kernels/timing.py --device cuda --quick --out FOLDER

Correctness first: a provider whose outputs or gradients are wrong gets no figures, and if it is one
of our own backends nothing is timed and the exit code is 1. Then forward and backward apart, calls
of all providers interleaved, inputs rotated: p20, median and p80 in milliseconds, and the peak
memory above the inputs. On a GPU each figure stands beside the floor that `ceilings.py`
measures. Rows are appended to kernels.csv in --out, in a checkout by default benchmarks/results/,
which git tracks. In a checkout the peers of benchmarks/peers/ take part.
"""

import argparse
import ctypes
import gc
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from vim_ssl.kernels.selective_scan import bi_selective_scan
from vim_ssl.kernels.selective_scan.accuracy import (
    BACKENDS,
    DTYPES,
    Tensors,
    processor,
    relative_error,
    runnable,
    two_way_inputs,
    typed,
)
from vim_ssl.utils.environment import CHECKOUT, commit
from vim_ssl.utils.files import append_rows

COLUMNS = (
    "provider", "direction", "dtype", "shape", "timing", "p20_ms", "p50_ms", "p80_ms", "peak_mb",
    "compile_s", "floor_ms", "x_floor", "device", "torch", "triton", "commit", "date",
)  # fmt: skip
CHUNK = 16  # tokens of the compiled loop
# Largest relative error of an output or a gradient, for a provider to be timed.
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}


@dataclass(frozen=True)
class Shape:
    """The scan inside one block: d = 384, 768, 1536 are those of Vim-Ti, -S and -B."""

    b: int
    l: int
    d: int
    n: int = 16

    def __str__(self) -> str:
        return f"b{self.b}-l{self.l}-d{self.d}-n{self.n}"


CHECKED = Shape(2, 63, 64)
# 224 and 512 px in batches, one image of 1248 px.
CUDA_SHAPES = [
    Shape(b, l, d) for d in (384, 768, 1536) for b, l in ((128, 197), (64, 1025), (1, 6085))
]
CPU_SHAPES = [Shape(1, 197, 384), Shape(8, 197, 384), Shape(1, 6085, 384)]


def _same(m):
    return m


def _always(shape: Shape, direction: str) -> str | None:
    return None


@dataclass
class Provider:
    """An implementation of `bi_selective_scan`.

    Attributes:
        scan: called with the tensors that ``prepare`` returns. If its output needs no gradient, it
            has no backward pass to time.
        prepare: brings the arguments of `bi_selective_scan` into the provider's own layout. Not
            timed, since a model would compute them in that layout.
        output: brings what ``scan`` returns into (b, l, d). Not timed.
        why_not: a reason not to measure this shape and direction, or None.
        compiles: the first call with a shape takes seconds, which are reported.
        capture: also time it replayed from a CUDA graph, free of the host's launches.
    """

    name: str
    scan: Callable[..., Tensor]
    prepare: Callable[[Tensors], Tensors] = _same
    output: Callable[[Tensor], Tensor] = _same
    why_not: Callable[[Shape, str], str | None] = _always
    compiles: bool = False
    capture: bool = False


# --- providers -------------------------------------------------------------------------------


def providers(device: str, compiled: bool = True) -> tuple[list[Provider], list[str]]:
    """Everything that runs on this kind of device, and a line for each that does not."""
    names, left_out = runnable(device)
    if device == "cuda":
        names = [name for name in names if name != "reference"]  # a slower torch loop
    limits = {"reference": _reference_limits, "torch": _launches if device == "cuda" else _always}
    found = [
        Provider(
            name,
            partial(bi_selective_scan, backend=name),
            capture=name == "triton",
            why_not=limits.get(name, _always),
        )
        for name in sorted(names, key=BACKENDS.index, reverse=True)
    ]
    torch._functorch.config.donated_buffer = False  # a backward pass is called many times here
    if compiled:
        loop = partial(chunked_loop, torch.compile(_chunk, dynamic=False))
        mode = "pointwise" if device == "cuda" else "generic"
        scan = torch.compile(partial(associative_scan, combine_mode=mode), dynamic=False)
        found += [
            Provider("compiled loop", loop, why_not=_forward_only, compiles=True),
            Provider("compiled associative_scan", scan, why_not=_small_only, compiles=True),
        ]
    folder = CHECKOUT / "benchmarks" / "peers"
    for path in sorted(folder.glob("*.py")) if device == "cuda" else ():
        try:
            found += _module(path).providers()
        except Exception as error:  # whatever building somebody else's kernel raises
            left_out.append(f"left out: {path.stem}. {type(error).__name__}: {str(error)[:300]}")
    return found, left_out


def _module(path: Path):
    spec = importlib.util.spec_from_file_location(f"peer_{path.stem}", path)
    assert spec is not None and spec.loader is not None  # noqa: PT018
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _reference_limits(shape: Shape, direction: str) -> str | None:
    if direction == "backward" and shape.l > 1000:
        return "autograd pads every token's gradient to the whole"
    return None


def _launches(shape: Shape, direction: str) -> str | None:
    if shape.d > 384:
        return "bound by its launches, and slow; the smallest width shows it"
    return None


def _forward_only(shape: Shape, direction: str) -> str | None:
    if direction == "backward":
        return "compiled for its forward pass only"
    return _launches(shape, direction)


def _small_only(shape: Shape, direction: str) -> str | None:
    if direction == "backward":
        return "its backward pass keeps every state and is not compiled everywhere"
    if shape.b * shape.l * shape.d > 10_000_000:
        return "it keeps every state in memory"
    return None


def _two_ways(u, delta, A, B, C, D, z, delta_bias):
    """float32 inputs in scan order: the second direction flipped; dt after softplus."""
    u, delta, B, C = (torch.stack([m[0], m[1].flip(1)]).float() for m in (u, delta, B, C))
    dt = F.softplus(delta + delta_bias[:, None, None])
    return u, dt, A, B, C, D[:, None, None], F.silu(z.float())


def chunked_loop(chunk, u, delta, A, B, C, D, z, delta_bias):
    """One step a token and nothing kept, in pieces that a compiler unrolls in seconds."""
    dtype = u.dtype
    u, dt, A, B, C, D, gate = _two_ways(u, delta, A, B, C, D, z, delta_bias)
    h, ys = u.new_zeros(*u.shape[:2], *A.shape[1:]), []
    for pieces in zip(*(m.split(CHUNK, dim=2) for m in (dt, dt * u, B, C)), strict=True):
        h, y = chunk(h, A, *pieces)
        ys.append(y)
    y = torch.cat(ys, dim=2) + D * u
    return ((y[0] + y[1].flip(1)) * gate).to(dtype)


def _chunk(h, A, dt, x, B, C):
    ys = []
    for t in range(dt.shape[2]):
        h = (dt[:, :, t, :, None] * A[:, None]).exp() * h + x[:, :, t, :, None] * B[:, :, t, None]
        ys.append((h * C[:, :, t, None]).sum(-1))
    return h, torch.stack(ys, dim=2)


def associative_scan(u, delta, A, B, C, D, z, delta_bias, combine_mode):
    """torch's own scan over pairs (decay, input), all states in memory."""
    from torch._higher_order_ops.associative_scan import associative_scan

    dtype = u.dtype
    u, dt, A, B, C, D, gate = _two_ways(u, delta, A, B, C, D, z, delta_bias)
    decay = (dt[..., None] * A[:, None, None]).exp()  # (2, b, l, d, n)
    fed = (dt * u)[..., None] * B[:, :, :, None]
    _, h = associative_scan(
        lambda one, two: (one[0] * two[0], one[1] * two[0] + two[1]), (decay, fed), dim=2,
        combine_mode=combine_mode,
    )  # fmt: skip
    y = (h * C[:, :, :, None]).sum(-1) + D * u
    return ((y[0] + y[1].flip(1)) * gate).to(dtype)


# --- correctness -----------------------------------------------------------------------------


def inputs(shape: Shape, dtype: str, device: str, seed: int = 0) -> Tensors:
    """Arguments of `bi_selective_scan` as a trained model has them; z is a view, as there."""
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
    """What is wrong with a provider's output or gradients on a small shape, or None."""
    m = inputs(CHECKED, dtype, device)
    try:
        got = _results(m, provider.scan, provider)
    except Exception as error:
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"
    loop = partial(bi_selective_scan, backend="reference")
    exact = _results({k: v.double().cpu() for k, v in m.items()}, loop, None)
    for name, value in got.items():
        wrong = relative_error(value, exact[name])
        if not wrong <= TOLERANCE[dtype]:
            return f"{name} is wrong: relative error {wrong:.1e}, at most {TOLERANCE[dtype]:.0e}"
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
    """A call to be timed, and what is known of it."""

    provider: str
    timing: str  # "calls", or "graph": replayed, so that no launch is waited for
    call: Callable[[int], object]  # with the number of the input set
    peak_mb: float | None = None
    compile_s: float | None = None
    ms: list[float] = field(default_factory=list)


def prepare_calls(
    provider: Provider,
    direction: str,
    sets: Sequence[Tensors],
    device: str,
    say: Callable[[str], object],
) -> list[Timed]:
    """Run a provider once on every set, measure its memory, and make what is timed.

    The peak of a backward pass counts what the forward pass saved for it.
    """
    backward = direction == "backward"
    own = [
        {k: v.detach().requires_grad_(backward) for k, v in provider.prepare(m).items()}
        for m in sets
    ]
    with torch.set_grad_enabled(backward):
        started = time.perf_counter()
        first = provider.scan(**own[0])
        _wait(device)
        compile_s = round(time.perf_counter() - started, 1) if provider.compiles else None
        if backward and not first.requires_grad:
            return []
        weights = torch.randn_like(first)
        del first

        def once() -> None:
            y = provider.scan(**own[0])
            if backward:
                torch.autograd.grad(y, list(own[0].values()), weights)

        once()
        peak = _peak_mb(once, device)
        timed = [Timed(provider.name, "calls", _call(provider, own, weights), peak, compile_s)]
    if provider.capture and device == "cuda":
        try:
            timed.append(Timed(provider.name, "graph", _replay(provider, own, weights), peak))
        except Exception as error:  # the figure by calls stays
            say(f"left out: {provider.name} in a CUDA graph. {type(error).__name__}: {error}")
    return timed


def _call(provider: Provider, own: Sequence[Tensors], weights: Tensor) -> Callable[[int], object]:
    """What is timed, of the input set with a number: the forward pass, or where the inputs want
    gradients the backward pass alone, on a graph that is kept."""
    if not any(m.requires_grad for m in own[0].values()):
        return lambda i: provider.scan(**own[i])
    outs = [provider.scan(**m) for m in own]
    leaves = [list(m.values()) for m in own]
    return lambda i: torch.autograd.grad(outs[i], leaves[i], weights, retain_graph=True)


def _replay(provider: Provider, own: Sequence[Tensors], weights: Tensor) -> Callable[[int], object]:
    """The same calls out of CUDA graphs, one for each set."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # a backward pass runs on the stream of its forward pass
        call = _call(provider, own, weights)
        for i in range(len(own)):
            call(i)
    stream.synchronize()
    graphs = []
    for i in range(len(own)):
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1], stream=stream):
            call(i)
    return lambda i: graphs[i].replay()


def time_calls(timed: Sequence[Timed], sets: int, device: str, budget_s: float) -> None:
    """Fill ``ms``: rounds over all calls, the sets in turn, so that disturbances hit all alike."""
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


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _peak_mb(call: Callable[[], object], device: str) -> float | None:
    """Most memory that a call holds above what was there before, in MB (10^6 bytes).

    On a CPU it is the process's resident memory, which Linux alone tells; else None.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return round((torch.cuda.max_memory_allocated() - before) / 1e6, 1)
    try:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # else memory freed before would be used again, unseen
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    except (OSError, AttributeError):
        return None
    resident = _resident_mb("VmRSS")
    call()
    return round(_resident_mb("VmHWM") - resident, 1)


def _resident_mb(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(key))


# --- rows ------------------------------------------------------------------------------------


def measure(
    device: str,
    *,
    shapes: Sequence[Shape],
    dtypes: Sequence[str],
    budget_s: float = 2.0,
    ceilings=None,
    compiled: bool = True,
    say: Callable[[str], object] = print,
    until: float = float("inf"),
) -> Iterator[dict]:
    """Check, then time; a row comes as soon as it is known.

    Args:
        budget_s: seconds of timing for one shape, dtype and direction.
        ceilings: a `ceilings.Ceilings`, for the floors.
        compiled: whether what torch.compile makes takes part; it takes its time.
        until: a `time.monotonic()` after which nothing new is begun.
    Raises: RuntimeError if one of our own backends is wrong; nothing is timed then.
    """
    found, left_out = providers(device, compiled)
    for line in left_out:
        say(line)
    right: dict[str, list[Provider]] = {}
    for dtype in dtypes:
        right[dtype] = []
        for provider in found:
            if problem := check(provider, dtype, device):
                if provider.name in BACKENDS:
                    raise RuntimeError(f"{provider.name}, {dtype}: {problem}. Nothing is timed.")
                say(f"left out: {provider.name}, {dtype}. {problem}")
            else:
                right[dtype].append(provider)
    common = origin(device)
    cases = [(d, s, way) for d in dtypes for s in shapes for way in ("forward", "backward")]
    for dtype, shape, direction in cases:
        if time.monotonic() > until:
            say(f"cut off before {shape}, {dtype}, {direction}: the time is up")
            return
        # More than a cache holds, so that no input is found in it.
        sets = [inputs(shape, dtype, device, seed) for seed in range(3 if device == "cuda" else 2)]
        floor = ceilings and ceilings.floor_ms(direction, **vars(shape))
        # On a GPU one provider after the other: all at once would not fit into its memory.
        groups = [[p] for p in right[dtype]] if device == "cuda" else [right[dtype]]
        for group in groups:
            timed = _calls(group, shape, dtype, direction, device, sets, say)
            time_calls(timed, len(sets), device, budget_s)
            for one in timed:
                yield _row(one, shape, dtype, direction, floor) | common
            del timed
            if device == "cuda":
                torch.cuda.empty_cache()


def _calls(group, shape, dtype, direction, device, sets, say) -> list[Timed]:
    """What can be timed; a provider that cannot, or fails, is left out with words."""
    timed = []
    torch._dynamo.reset()  # torch.compile gives a function up after eight shapes
    for provider in group:
        reason = provider.why_not(shape, direction)
        if reason is None:
            try:
                timed += prepare_calls(provider, direction, sets, device, say)
            except Exception as error:
                reason = f"{type(error).__name__}: {str(error)[:300]}"
        if reason is not None:
            say(f"left out: {provider.name}, {shape}, {dtype}, {direction}. {reason}")
    return timed


def _row(one: Timed, shape: Shape, dtype: str, direction: str, floor: float | None) -> dict:
    p20, p50, p80 = statistics.quantiles(one.ms, n=10, method="inclusive")[1:8:3]
    row = {
        "provider": one.provider, "direction": direction, "dtype": dtype, "shape": str(shape),
        "timing": one.timing, "p20_ms": _digits(p20), "p50_ms": _digits(p50),
        "p80_ms": _digits(p80), "peak_mb": one.peak_mb, "compile_s": one.compile_s,
    }  # fmt: skip
    return row | ({"floor_ms": _digits(floor), "x_floor": _digits(p50 / floor)} if floor else {})


def _digits(value: float) -> float:
    return float(f"{value:.4g}")


def origin(device: str) -> dict[str, str]:
    """What a row's figures depend on."""
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
    """The GPU's, or None where Triton is missing."""
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
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument(
        "--device", default=default, choices=("cpu", "cuda"), help="what runs the scan"
    )
    parser.add_argument("--quick", action="store_true", help="the first shape, a short look")
    results = CHECKOUT / "benchmarks" / "results"
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", default=results if results.is_dir() else None,
        help="rows are appended to kernels.csv there; git tracks a checkout's default",
    )  # fmt: skip
    args = parser.parse_args(argv)
    shapes = CUDA_SHAPES if args.device == "cuda" else CPU_SHAPES
    rows = measure(
        args.device,
        shapes=shapes[:1] if args.quick else shapes,
        dtypes=["bf16", "fp32"] if args.device == "cuda" else ["fp32"],
        budget_s=0.5 if args.quick else 2.0 if args.device == "cuda" else 10.0,
        ceilings=measure_ceilings() if args.device == "cuda" else None,
    )

    def shown() -> Iterator[dict]:
        for row in rows:
            print(format_row(row), flush=True)
            yield row

    try:
        if args.out is None:
            for _ in shown():
                pass
        else:
            append_rows(args.out / "kernels.csv", COLUMNS, shown())
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
