"""The scan on one CPU thread: numba, the torch loop, and a sketch in C++ (`cpu.py --only scan`).

The sketch is a shared library with ``scan_fwd`` and ``scan_bwd``, whose arguments are those in
`sketched`. Compile it with g++ -O3 -march=native -fopenmp -ffast-math -fno-associative-math -shared
-fPIC: associative mathematics would remove the rounding from its exponential. Its results are
checked before it is timed.
"""

import ctypes
import os
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from turns import Values, in_turns, medians

from vim_ssl.kernels.selective_scan import selective_scan

SCAN = (1, 197, 384, 16)  # b, l, d, n: one direction of Vim-Ti at 224 px
CONDITIONS = "b {}, l {}, d {}, n {}, one direction, float32, 1 thread".format(*SCAN)
RATIOS = [("torch", "numba"), ("numba", "C++"), ("numba's operator", "C++")]


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


def time_scan(direction: str, sketch: str, turns: int) -> Values:
    """Time the "forward" or the "backward" pass; with C++ if ``sketch`` is its library's path."""
    from vim_ssl.kernels.selective_scan import numba_backend  # noqa: F401 (registers the operator)

    torch.set_num_threads(1)
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

    calls: dict[str, Callable[[], object]] = {
        name: partial(forward, name) if direction == "forward" else backward_of(name)
        for name in ("numba", "torch")
    }
    if direction == "forward":
        lead = [m[name][None] for name in ("u", "delta", "A", "B", "C", "D")]
        operator = partial(
            torch.ops.vim_ssl.scan_forward, *lead, m["z"], m["delta_bias"][None], None,
            True, False, 1.0, False,
        )  # fmt: skip
        calls["numba's operator"] = torch.no_grad()(operator)  # without checks and transposes
    if sketch:
        both = sketched(sketch, m, forward("torch").mT)
        calls["C++"] = both[direction == "backward"]
    return medians(in_turns(calls, turns), RATIOS)


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
