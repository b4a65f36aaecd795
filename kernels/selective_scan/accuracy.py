"""Measure the accuracy of every backend that runs on this machine, against the float64 loop.

    python -m vim_ssl.kernels.selective_scan.accuracy                    # or: make kernel-report
    python -m vim_ssl.kernels.selective_scan.accuracy --device cuda --markdown

Relative errors |result - exact| / |exact| of the output, the last state and every gradient, with
uninitialised memory filled with NaN. Every backend runs twice. Exit code 1 if a bound is violated:

    ordinary inputs, float32      1e-5 forward, 1e-4 gradients
    eleven decades of step sizes  2 x the plain float32 loop's error + 2e-5
    bfloat16, float16             2 x the plain path's error in that dtype + 1e-5
    always                        two runs bitwise equal; zeros give zeros; inf and NaN appear in
                                  the same outputs as in float64

With TRITON_INTERPRET=1 the Triton backend is measured on a CPU too, on the small cases.
"""

import argparse
import contextlib
import math
import platform
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vim_ssl.kernels.backends import BACKENDS as REGISTERED
from vim_ssl.kernels.backends import resolve
from vim_ssl.kernels.selective_scan import bi_selective_scan, selective_scan

Tensors = dict[str, Tensor]
BACKENDS = tuple(REGISTERED["selective_scan"])
GRADIENTS = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state")
QUANTITIES = ("y", "last", *(f"d_{name}" for name in GRADIENTS))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


# --- inputs ----------------------------------------------------------------------------------


def one_way_inputs(b: int, l: int, d: int, n: int, seed: int = 0, groups: int = 0) -> Tensors:
    """Random arguments of `selective_scan` in float64."""
    B = (b, groups, n, l) if groups else (b, n, l)
    return _random_inputs(seed, u=(b, d, l), A=(d, n), B=B, z=(b, d, l), h0=(b, d, n))


def two_way_inputs(b: int, l: int, d: int, n: int, seed: int = 0) -> Tensors:
    """Random arguments of `bi_selective_scan` in float64."""
    return _random_inputs(seed, u=(2, b, l, d), A=(2, d, n), B=(2, b, l, n), z=(b, l, d))


def _random_inputs(seed: int, *, u, A, B, z, h0=None) -> Tensors:
    """Random arguments, given the shapes of u, A, B, z and the initial state."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    m = {
        "u": normal(*u), "delta": normal(*u) - 1,
        "A": -torch.rand(*A, generator=g, dtype=torch.float64) * A[-1] - 0.1,
        "B": normal(*B), "C": normal(*B), "D": normal(*A[:-1]), "z": normal(*z),
        "delta_bias": normal(*A[:-1]),
    }  # fmt: skip
    return m if h0 is None else m | {"initial_state": normal(*h0)}


def typed(inputs: Tensors, dtype: torch.dtype) -> Tensors:
    """Cast to ``dtype``; A, D and delta_bias stay at least float32, as in models."""
    wide = torch.promote_types(dtype, torch.float32)
    return {k: v.to(wide if k in ("A", "D", "delta_bias") else dtype) for k, v in inputs.items()}


def decades(inputs: Tensors) -> Tensors:
    """The same inputs with step sizes from 1e-8 to 1e3 and decays from -1e-4 to -1e4."""
    g = torch.Generator().manual_seed(1)
    delta, A = (
        torch.rand(inputs[name].shape, generator=g, dtype=torch.float64) for name in ("delta", "A")
    )
    return inputs | {"delta": 10 ** (delta * 11 - 8), "A": -(10 ** (A * 8 - 4))}


# --- one measurement -------------------------------------------------------------------------


def run_scan(inputs: Tensors, backend: str, gradients: bool = True, **options) -> Tensors:
    """Outputs and the gradient of every input: ``y``, ``last``, ``d_<argument>``, on the CPU.

    The loss weights every element of the output, and of the last state if returned, differently.
    """
    call = bi_selective_scan if inputs["u"].dim() == 4 else selective_scan
    leaves = {name: m.detach().clone().requires_grad_(gradients) for name, m in inputs.items()}
    arguments: dict[str, Any] = leaves | options | {"backend": backend}
    out = call(**arguments)
    named = {"y": out[0], "last": out[1]} if isinstance(out, tuple) else {"y": out}
    if gradients:
        loss = torch.stack([(m.double() * loss_weights(m)).sum() for m in named.values()]).sum()
        grads = torch.autograd.grad(loss, list(leaves.values()))
        named |= {f"d_{name}": g for name, g in zip(leaves, grads, strict=True)}
    return {name: m.detach().cpu() for name, m in named.items()}


def loss_weights(m: Tensor) -> Tensor:
    """Fixed pseudo-random weights in m's shape, the same on every device."""
    g = torch.Generator().manual_seed(m.numel())
    return torch.randn(m.shape, generator=g, dtype=torch.float64).to(m.device)


def relative_error(got: Tensor, exact: Tensor) -> float:
    """Norm of the difference over norm of the exact tensor, both in float64."""
    got, exact = got.detach().double(), exact.detach().double()
    return float((got - exact).norm() / exact.norm().clamp(min=1e-30))


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill the tensors of `torch.empty` with NaN, which reveals elements that no kernel writes."""
    before = torch.are_deterministic_algorithms_enabled()
    mode = torch.is_deterministic_algorithms_warn_only_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # cuBLAS warns about determinism with several streams
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before, warn_only=mode)


# --- cases and results ------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """Inputs and options of one measurement.

    Attributes:
        two_way: `bi_selective_scan`, else `selective_scan` with an initial and a last state.
        wide: step sizes over eleven decades, instead of those of a model.
        dtype: dtype of the inputs; a key of `DTYPES`.
    """

    two_way: bool
    b: int
    l: int
    d: int
    n: int
    wide: bool = False
    dtype: str = "fp32"
    reverse: bool = False

    def __str__(self) -> str:
        ways = "both ways" if self.two_way else "reverse" if self.reverse else "one way"
        return f"{ways}, b{self.b} l{self.l} d{self.d} n{self.n}" + ", decades" * self.wide

    @property
    def small(self) -> bool:
        """True if Triton's interpreter takes seconds, not minutes."""
        return self.b * self.l * self.d <= 500

    @property
    def long(self) -> bool:
        """True if the gradient of the reference loop would take minutes, because autograd pads each
        token's gradient to the whole sequence. The torch backend in float64, tested against
        the loop, then serves as the reference, and only the backends faster than it are measured.
        """
        return self.l > 5000

    @property
    def options(self) -> dict:
        one_way = {"return_last_state": True, "reverse": self.reverse}
        return {"delta_softplus": not self.wide, **({} if self.two_way else one_way)}

    def inputs(self) -> Tensors:
        make = two_way_inputs if self.two_way else one_way_inputs
        m = make(self.b, self.l, self.d, self.n)
        if self.wide:  # a step size must not be negative
            m = decades(m)
            del m["delta_bias"]
        return typed(m, DTYPES[self.dtype])


CASES = (
    *(Case(two_way, b, l, d, n) for two_way in (False, True)
      for b, l, d, n in ((2, 1, 5, 16), (1, 63, 7, 5), (2, 197, 40, 16), (1, 1024, 12, 16))),
    Case(False, 1, 197, 20, 16, reverse=True),
    Case(True, 1, 6085, 24, 16),
    *(Case(True, 1, l, 6, 4, wide=True) for l in (1, 50, 4000, 70_000)),
    *(Case(True, b, l, d, n, dtype=dtype) for dtype in ("bf16", "fp16")
      for b, l, d, n in ((1, 63, 7, 8), (2, 197, 40, 16))),
)  # fmt: skip


@cache
def exact(case: Case) -> Tensors:
    """Results of the float64 loop."""
    return _loop(case, {name: v.double() for name, v in case.inputs().items()})


@cache
def plain(case: Case) -> Tensors:
    """Results of the plain path: the loop in the case's dtype, float32 inside."""
    return _loop(case, case.inputs())


def _loop(case: Case, m: Tensors) -> Tensors:
    if not case.long:
        return run_scan(m, "reference", **case.options)
    loop = run_scan(m, "reference", gradients=False, **case.options)
    return run_scan(m, "torch", **case.options) | loop


@dataclass
class Row:
    """One line of the report: errors by quantity, and violated bounds."""

    case: str
    dtype: str
    backend: str
    errors: dict[str, float] = field(default_factory=dict)
    note: str = ""
    broken: dict[str, str] = field(default_factory=dict)  # quantity or "note" -> expectation


def limits(case: Case, quantities: Sequence[str]) -> dict[str, float]:
    if case.dtype == "fp32" and not case.wide:
        return {name: 1e-4 if name.startswith("d_") else 1e-5 for name in quantities}
    margin = 2e-5 if case.wide else 1e-5
    return {
        name: 2 * relative_error(plain(case)[name], exact(case)[name]) + margin
        for name in quantities
    }


def measure(case: Case, backend: str, device: str) -> Row:
    """Errors of one backend on one case; an exception of the backend is recorded."""
    row = Row(str(case), case.dtype, backend)
    m = {name: v.to(device) for name, v in case.inputs().items()}
    try:
        with poisoned_memory():
            got, repeated = (run_scan(m, backend, **case.options) for _ in "12")
    except Exception as error:
        message = str(error).splitlines() or [""]
        return Row(row.case, row.dtype, backend, note=f"{type(error).__name__}: {message[0]}",
                   broken={"note": "a result"})  # fmt: skip
    for name, limit in limits(case, list(got)).items():
        row.errors[name] = relative_error(got[name], exact(case)[name])
        if not row.errors[name] <= limit:  # NaN violates too
            row.broken[name] = f"at most {limit:.1e}"
    if case.dtype != "fp32" and backend != "reference":
        ratios = (
            error / max(relative_error(plain(case)[name], exact(case)[name]), 1e-30)
            for name, error in row.errors.items()
        )
        row.note = f"at most {max(ratios):.2f} x plain"
    if any(not torch.equal(got[name], repeated[name]) for name in got):
        row.broken["note"] = "two runs equal bit for bit"
        row.note = "two runs differ"
    return row


def measure_zeros(backend: str, device: str) -> Row:
    m = typed(two_way_inputs(1, 20, 3, 4), torch.float32)
    with poisoned_memory():
        got = run_scan({k: torch.zeros_like(v, device=device) for k, v in m.items()}, backend)
    fine = not got["y"].any() and all(bool(v.isfinite().all()) for v in got.values())
    return Row("all inputs zero", "fp32", backend, note="zeros" if fine else "not zeros",
               broken={} if fine else {"note": "zeros, and finite gradients"})  # fmt: skip


def measure_non_finite(backend: str, device: str) -> Row:
    """Put inf, -inf and NaN into each argument, and compare which outputs are not finite."""
    same, mismatches = 0, []
    for name in [name for name in GRADIENTS if name != "initial_state"]:
        for value in (math.inf, -math.inf, math.nan):
            m = typed(two_way_inputs(2, 20, 5, 4), torch.float32)
            m[name].view(-1)[m[name].numel() // 3] = value
            wide = {k: v.double() for k, v in m.items()}
            expected = run_scan(wide, "reference", gradients=False)["y"].isfinite()
            with poisoned_memory():
                m = {k: v.to(device) for k, v in m.items()}
                got = run_scan(m, backend, gradients=False)["y"].isfinite()
            same += (equal := torch.equal(got, expected))
            mismatches += [] if equal else [f"{value} in {name}"]
    total = same + len(mismatches)
    row = Row("inf, -inf, NaN in each argument", "fp32", backend, note=f"{same} of {total} equal")
    if mismatches:
        row.broken["note"] = "the float64 loop's mask also for " + ", ".join(mismatches)
    return row


# --- the report ------------------------------------------------------------------------------


def runnable(device: str) -> tuple[list[str], list[str]]:
    """Backends that run on this device type, and a line of text for each of the others."""
    names, left_out = [], []
    for name in BACKENDS:
        try:
            resolve("selective_scan", name, device)
            names.append(name)
        except (ValueError, ImportError) as error:
            left_out.append(f"skipped: {name}. {error}")
    return names, left_out


def rows(device: str, backends: Sequence[str], cases: Sequence[Case] = CASES) -> Iterator[Row]:
    """Measure, and yield each row at once."""

    def fit(case: Case, backend: str) -> bool:
        if backend == "triton" and device == "cpu":  # interpreted
            return case.small
        if backend == "reference" and device == "cuda":  # the same loop as on the CPU, slower
            return False
        return not (case.long and backend in ("reference", "torch"))

    for case in cases:
        for backend in backends:
            if fit(case, backend):
                yield measure(case, backend, device)
    for check in (measure_zeros, measure_non_finite):
        for backend in backends:
            if backend != "reference":
                yield check(backend, device)


def format_row(row: Row, markdown: bool = False) -> str:
    """Format errors as columns; ! marks an error above its bound."""
    cells = []
    for name in QUANTITIES:
        text = f"{row.errors[name]:.0e}" if name in row.errors else ""
        cells.append(text + "!" * (name in row.broken))
    return _line([row.case, row.dtype, row.backend, *cells, row.note], markdown)


def header(markdown: bool = False) -> str:
    short = {"d_delta": "d_dt", "d_delta_bias": "d_bias", "d_initial_state": "d_h0"}
    columns = ["case", "dtype", "backend", *(short.get(q, q) for q in QUANTITIES), "note"]
    line = _line(columns, markdown)
    return f"{line}\n|{'---|' * len(columns)}" if markdown else line


def _line(columns: Sequence[str], markdown: bool) -> str:
    if markdown:
        return f"| {' | '.join(columns)} |"
    case, dtype, backend, *cells, note = columns
    return f"{case:35}{dtype:6}{backend:9}{''.join(f'{c:>7}' for c in cells)}  {note}".rstrip()


def machine(device: str) -> str:
    """The processor and the versions of torch and Python."""
    name = torch.cuda.get_device_name() if device == "cuda" else processor()
    return f"{name}, torch {torch.__version__}, Python {platform.python_version()}"


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def report(
    device: str,
    *,
    markdown: bool = False,
    cases: Sequence[Case] = CASES,
    say: Callable[[str], object] = print,
) -> list[Row]:
    """Measure and print everything; returns all rows."""
    backends, left_out = runnable(device)
    say(f"The scan against the float64 loop, relative errors, on {device}: {machine(device)}\n")
    say(header(markdown))
    done = []
    for row in rows(device, backends, cases):
        done.append(row)
        say(format_row(row, markdown))
    say("")
    for line in left_out:
        say(line)
    broken = [row for row in done if row.broken]
    for row in broken:
        for name, expected in row.broken.items():
            what = row.note if name == "note" else f"{name} {row.errors[name]:.1e}"
            say(f"BROKEN {row.backend}, {row.case}, {row.dtype}: {what}; expected {expected}")
    say(f"{len(done) - len(broken)} of {len(done)} rows within their bounds")
    return done


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument(
        "--device", default=default, choices=("cpu", "cuda"), help="device that runs the scan"
    )
    parser.add_argument("--markdown", action="store_true", help="print a table for README.md")
    parser.add_argument("--quick", action="store_true", help="only the small cases")
    args = parser.parse_args(argv)
    cases = [case for case in CASES if case.small or not args.quick]
    done = report(args.device, markdown=args.markdown, cases=cases,
                  say=lambda line: print(line, flush=True))  # fmt: skip
    return int(any(row.broken for row in done))


if __name__ == "__main__":
    sys.exit(main())
