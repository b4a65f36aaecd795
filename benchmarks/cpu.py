"""Measure performance on a CPU: the compiled scan, Vim-Ti and DeiT-Ti, memory of a training step.

    python benchmarks/cpu.py                              # a quarter of an hour on one core
    python benchmarks/cpu.py --only scan --sketch SCAN.so

Everything runs on one thread. Compared calls alternate in one process and are timed with the
thread's CPU clock; short calls repeat within a turn. Each value is a median, each ratio the median
of the ratios per turn. Memory is the increase of the peak resident set during a step, in a fresh
process after a step on a tiny image. Rows are appended to results/cpu.csv, or to --out.

``--sketch`` adds a scan in C++: a shared library with ``scan_fwd`` and ``scan_bwd``, whose
arguments are those in `sketched`. Compile it with g++ -O3 -march=native -fopenmp -ffast-math
-fno-associative-math -shared -fPIC: associative mathematics would remove the rounding from its
exponential. Its results are checked before it is timed.
"""

import ctypes
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

os.environ["OMP_NUM_THREADS"] = "1"

import vim_ssl.utils.openmp  # noqa: F401 (before torch)

import torch
from process import peak_mib, run_apart
from rows import ORIGIN, append_rows, origin, results_parser
from torch import Tensor

from vim_ssl.kernels.selective_scan import selective_scan

COLUMNS = (*ORIGIN, "what", "value", "unit", "conditions")
SCAN = (1, 197, 384, 16)  # b, l, d, n: one direction of Vim-Ti at 224 px
VIM, DEIT = "vim_tiny_patch16_224", "deit_tiny_patch16_224"
TURN_SECONDS = 0.02  # duration of a turn for one kind of call, or one call if it takes longer
Row = dict[str, str | float]


def in_turns(calls: dict[str, Callable[[], object]], turns: int) -> dict[str, list[float]]:
    """Return CPU seconds per call, for each call and turn."""
    repeats = {name: max(int(TURN_SECONDS / _seconds(call, 2)), 1) for name, call in calls.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(turns):
        for name, call in calls.items():
            seconds[name].append(_seconds(call, repeats[name]))
    return seconds


def _seconds(call: Callable[[], object], repeats: int) -> float:
    """CPU seconds, the mean of `repeats` calls after one that warms the caches."""
    call()
    started = time.thread_time()
    for _ in range(repeats):
        call()
    return (time.thread_time() - started) / repeats


def row(what: str, value: float, unit: str, conditions: str) -> Row:
    return {"what": what, "value": value, "unit": unit, "conditions": conditions}


def rows_of(
    part: str, seconds: dict[str, list[float]], ratios: list[tuple[str, str]], conditions: str
) -> list[Row]:
    """Return one row per time, and one per (slower, faster) ratio."""
    rows = [row(f"{part}, {name}", round(1e3 * statistics.median(s), 3), "ms", conditions)
            for name, s in seconds.items()]  # fmt: skip
    for a, b in ratios:
        if a in seconds and b in seconds:
            ratio = statistics.median(x / y for x, y in zip(seconds[a], seconds[b], strict=True))
            rows.append(row(f"{part}, {a} / {b}", round(ratio, 2), "times", conditions))
    return rows


# --- the scan --------------------------------------------------------------------------------


def scan_inputs() -> dict[str, Tensor]:
    """Channel-last tensors with the dynamics of a Vim at initialisation."""
    b, l, d, n = SCAN
    g = torch.Generator().manual_seed(0)
    m = {name: torch.randn(b, l, d, generator=g) for name in ("u", "delta", "z")}
    m["delta"] *= 0.5
    m |= {name: torch.randn(b, l, n, generator=g) for name in ("B", "C")}
    m["A"] = -torch.arange(1.0, n + 1).repeat(d, 1)
    dt = 10 ** (torch.rand(d, generator=g) * 2 - 3)  # 0.001 to 0.1
    m |= {"D": torch.ones(d), "delta_bias": dt + torch.log(-torch.expm1(-dt))}
    return m


def channels_first(m: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: v.mT if v.dim() == 3 else v for name, v in m.items()}


def time_scan(sketch: str | None, turns: int) -> list[Row]:
    from vim_ssl.kernels.selective_scan import numba_backend  # noqa: F401 (registers the operator)

    m = scan_inputs()
    first = channels_first(m)
    leaves = {name: v.clone().requires_grad_() for name, v in m.items()}
    dy = torch.randn_like(m["u"]).mT

    def forward(backend: str) -> Tensor:
        with torch.no_grad():
            return selective_scan(**first, delta_softplus=True, backend=backend)

    def backward_of(backend: str) -> Callable[[], object]:
        y = selective_scan(**channels_first(leaves), delta_softplus=True, backend=backend)
        return lambda: torch.autograd.grad(y, list(leaves.values()), dy, retain_graph=True)

    forwards: dict[str, Callable[[], object]] = {
        name: partial(forward, name) for name in ("numba", "torch")
    }
    lead = [m[name][None] for name in ("u", "delta", "A", "B", "C", "D")]
    operator = partial(
        torch.ops.vim_ssl.scan_forward, *lead, m["z"], m["delta_bias"][None], None,
        True, False, 1.0, False,
    )  # fmt: skip
    forwards["numba's operator"] = torch.no_grad()(operator)  # without checks and transposes
    backwards = {name: backward_of(name) for name in ("numba", "torch")}
    if sketch:
        forwards["C++"], backwards["C++"] = sketched(sketch, m, forward("torch").mT)
    ratios = [("torch", "numba"), ("numba", "C++"), ("numba's operator", "C++")]
    conditions = "b {}, l {}, d {}, n {}, one direction, float32, 1 thread".format(*SCAN)
    return [
        *rows_of("scan forward", in_turns(forwards, turns), ratios, conditions),
        *rows_of("scan backward", in_turns(backwards, turns), ratios, conditions),
    ]


def sketched(path: str, m: dict[str, Tensor], expected: Tensor) -> tuple[Callable, Callable]:
    """Load the forward and backward pass of a scan in C++; see the docstring of this file.

    Raises: ValueError if its output is not ``expected``.
    """
    library = ctypes.CDLL(os.path.abspath(path))
    (b, l, d, n), chunk, lanes = SCAN, 16, 64
    sizes = [ctypes.c_int64(k) for k in (b, l, d)]
    blocks, chunks = -(-d // lanes), -(-l // chunk)
    inputs = [m[name] for name in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")]
    states = torch.empty(b, chunks, blocks, n, lanes)
    dy = torch.randn(b, l, d)

    def addresses(*tensors: Tensor | None) -> list[ctypes.c_void_p]:
        return [ctypes.c_void_p(0 if t is None else t.data_ptr()) for t in tensors]

    def forward(keep: Tensor | None = None) -> Tensor:
        y = torch.empty(b, l, d)
        library.scan_fwd(*addresses(*inputs, y, keep), chunk, *sizes, 0, 1)
        return y

    def backward() -> list[Tensor]:
        grads = [torch.empty(b, l, d) for _ in range(3)]
        grads += [torch.empty(b, l, blocks, n) for _ in range(2)]
        grads += [torch.empty(b, d, n), torch.empty(b, d), torch.empty(b, d)]
        library.scan_bwd(*addresses(*inputs, dy, states), chunk, *addresses(*grads), *sizes, 0, 1)
        du, ddelta, dz, dB, dC, dA, dD, dbias = grads
        return [du, ddelta, dz, dB.sum(2), dC.sum(2), dA.sum(0), dD.sum(0), dbias.sum(0)]

    error = (forward(states) - expected).abs().max().item()
    if not error < 1e-4:
        raise ValueError(f"{path} is off by {error:g}: its exponential was optimised away.")
    return forward, backward


# --- the whole encoder -----------------------------------------------------------------------


@torch.inference_mode()
def time_encoder(size: int, turns: int) -> list[Row]:
    import timm

    from vim_ssl import load_encoder

    vim = load_encoder(VIM).eval()
    deit = timm.create_model(DEIT, num_classes=0, img_size=size).eval()
    x = torch.randn(1, 3, size, size)
    seconds = in_turns({"Vim-Ti": lambda: vim(x), "DeiT-Ti": lambda: deit(x)}, turns)
    conditions = "batch 1, float32, inference, DeiT with fused attention, 1 thread"
    return rows_of(f"encoder {size} px", seconds, [("Vim-Ti", "DeiT-Ti")], conditions)


# --- memory of a training step ---------------------------------------------------------------


def step_memory(backend: str, batch: int, recompute: bool) -> float:
    """Return the increase in MiB of the peak resident set by a training step at 224 px.

    ``recompute``: use gradient checkpointing.
    """
    from vim_ssl import load_encoder

    os.environ["VIM_SSL_BACKEND"] = backend
    encoder = load_encoder(VIM).train()
    encoder.set_grad_checkpointing(recompute)
    optimizer = torch.optim.AdamW(encoder.parameters())

    def step(b: int, size: int) -> None:
        encoder(torch.randn(b, 3, size, size)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    step(1, 32)  # compiles, and allocates the optimiser's state
    before = peak_mib()
    step(batch, 224)
    return peak_mib() - before


def measure_memory(variants: list[str], batch: int) -> list[Row]:
    """Compare the variants with the last one.

    A variant is a backend, or "numba, recomputing" with gradient checkpointing.
    """
    part, conditions = f"memory of a step, batch {batch}", "Vim-Ti, 224 px, float32, AdamW"
    mib: dict[str, float] = {}
    for variant in variants:
        backend, _, recompute = variant.partition(", ")
        mib[variant] = run_apart(step_memory, backend, batch, bool(recompute))
    rows = [row(f"{part}, {name}", round(v), "MiB", conditions) for name, v in mib.items()]
    *others, last = variants
    for name in others:
        ratio = round(mib[name] / mib[last], 3)
        rows.append(row(f"{part}, {name} / {last}", ratio, "times", conditions))
    return rows


PARTS = ("scan", "encoder", "memory")


def main() -> int:
    parser = results_parser(__doc__, "cpu.csv")
    add = parser.add_argument
    add("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to run")
    add("--sketch", help="shared library of a scan in C++ to compare with")
    add("--turns", type=int, default=30, help="turns per comparison")
    add("--dry-run", action="store_true", help="print the table, append no rows")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[Row] = []
    if "scan" in args.only:
        rows += time_scan(args.sketch, args.turns)
    if "encoder" in args.only:
        rows += time_encoder(224, args.turns)
        rows += time_encoder(1248, max(args.turns // 10, 3))
    if "memory" in args.only:
        rows += measure_memory(["numba", "numba, recomputing", "torch"], batch=8)
        rows += measure_memory(["numba", "reference"], batch=1)  # the plain loop keeps every state
    for one in rows:
        print(f"{one['what']:45} {one['value']:10} {one['unit']:6} {one['conditions']}")
    if args.dry_run:
        return 0
    append_rows(args.out / "cpu.csv", COLUMNS, [origin() | one for one in rows])
    return 0


if __name__ == "__main__":
    sys.exit(main())
