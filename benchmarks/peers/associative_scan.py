"""A peer of the scan: the same recurrence by Triton's parallel `tl.associative_scan`, forward only.

A program combines tiles of tokens by states of one channel in log2(tokens) steps and carries the
last state from tile to tile, as Triton scans usually do. Inputs are channel-first; those of the
backward direction are flipped beforehand, which is not timed.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))  # for `providers`

import vim_ssl.utils.openmp  # noqa: F401 (before torch)

import torch
import triton
import triton.language as tl
from providers import Provider, Shape
from torch import Tensor

from vim_ssl.kernels.triton_math import LOG2E, sigmoid, softplus

TOKENS = 256  # of a tile; with 16 states, 32 values a thread and array


@triton.jit
def _combine(a1, x1, a2, x2):
    return a1 * a2, x1 * a2 + x2


@triton.jit
def _scan(u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, bias_ptr, y_ptr, batch, l, d,
          N: tl.constexpr, T: tl.constexpr):  # fmt: skip
    """One channel of one sequence. u, delta, y (2, b, d, l); A (2, d, n); B, C (2, b, l, n)."""
    channel, sequence = tl.program_id(0), tl.program_id(1)  # sequence: direction and batch
    parameters = sequence // batch * d + channel  # index of the channel in A, D and bias
    row = (sequence.to(tl.int64) * d + channel) * l
    n, steps = tl.arange(0, N), tl.arange(0, T)
    A = tl.load(A_ptr + parameters * N + n)[None, :] * LOG2E
    D, bias = tl.load(D_ptr + parameters), tl.load(bias_ptr + parameters)
    h = tl.zeros((N,), tl.float32)
    for start in range(0, l, T):
        t = start + steps
        inside = t < l
        u = tl.load(u_ptr + row + t, mask=inside, other=0.0).to(tl.float32)
        dt = softplus(tl.load(delta_ptr + row + t, mask=inside, other=0.0).to(tl.float32) + bias)
        dt = tl.where(inside, dt, 0.0)  # past the end the state stays as it is
        at = (sequence.to(tl.int64) * l + t[:, None]) * N + n[None, :]
        B = tl.load(B_ptr + at, mask=inside[:, None], other=0.0).to(tl.float32)
        C = tl.load(C_ptr + at, mask=inside[:, None], other=0.0).to(tl.float32)
        decay = tl.exp2(dt[:, None] * A)
        x = (dt * u)[:, None] * B
        x = tl.where(steps[:, None] == 0, x + decay * h[None, :], x)
        _, states = tl.associative_scan((decay, x), 0, _combine)
        y = tl.sum(states * C, axis=1) + D * u
        h = tl.sum(tl.where(steps[:, None] == T - 1, states, 0.0), axis=0)
        tl.store(y_ptr + row + t, y, mask=inside)


@triton.jit
def _gate(y_ptr, z_ptr, out_ptr, l, size, BLOCK: tl.constexpr):
    """(y_forward + y_backward, flipped back) silu(z); y (2, rows, l), z and out (rows, l)."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    back = i // l * l + (l - 1 - i % l)
    y = tl.load(y_ptr + i, mask=inside, other=0.0)
    y += tl.load(y_ptr + size + back, mask=inside, other=0.0)
    z = tl.load(z_ptr + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + i, y * z * sigmoid(z), mask=inside)


def prepare(m: dict[str, Tensor]) -> dict[str, Tensor]:
    """Channel-first u, delta and z; the second direction of every sequence flipped."""
    flipped = {k: torch.stack([m[k][0], m[k][1].flip(1)]) for k in ("u", "delta", "B", "C")}
    first = {k: flipped[k].mT.contiguous() for k in ("u", "delta")}
    return m | flipped | first | {"z": m["z"].mT.contiguous()}


def scan(u, delta, A, B, C, D, z, delta_bias) -> Tensor:
    """Tensors of `prepare` -> (b, d, l)."""
    _, b, d, l = u.shape
    y, out = torch.empty_like(u, dtype=torch.float32), torch.empty_like(z)
    A, B, C, D, delta_bias = (m.contiguous() for m in (A, B, C, D, delta_bias))
    _scan[(d, 2 * b)](
        u, delta, A, B, C, D, delta_bias, y, b, l, d, N=A.shape[-1], T=TOKENS, num_warps=4
    )
    _gate[(triton.cdiv(z.numel(), 1024),)](y, z, out, l, z.numel(), BLOCK=1024)
    return out


def _limits(shape: Shape, direction: str) -> str | None:
    if shape.n & (shape.n - 1):
        return "the number of states must be a power of two"
    return "it has no backward pass" if direction == "backward" else None


def providers() -> list[Provider]:
    return [Provider("tl.associative_scan", scan, prepare, lambda y: y.mT, _limits, capture=True)]
