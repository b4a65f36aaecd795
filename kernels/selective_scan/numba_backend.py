"""The selective scan on a CPU, compiled by numba: everything in one pass, in float32.

Two torch operators, `vim_ssl::scan_forward` and `vim_ssl::scan_backward`, wrap the kernels of
`kernels/numba_kernels.py`; `fused.py` describes their arguments, which are float32 here. Other
dtypes are cast by torch operations that autograd differentiates.

The first call in a new installation compiles the kernels, which takes about 20 seconds.
"""

import torch
from torch import Tensor

from vim_ssl.kernels import numba_kernels
from vim_ssl.kernels.autograd import (
    Parameter,
    address,
    addresses,
    channels_contiguous,
    contiguous,
    gradient_required,
    operator,
)
from vim_ssl.kernels.numba_kernels import CHUNK, LANES
from vim_ssl.kernels.numba_threads import run_tasks
from vim_ssl.kernels.selective_scan import torch_backend
from vim_ssl.kernels.selective_scan.fused import public_scans, register_scan_gradient

OPERATORS = ("scan_forward", "scan_backward")  # for `flops.py`
NANOSECONDS = (0.25, 1.0)  # forward, backward; per token, channel and state


def _scan(u, delta, A, B, C, D, z, bias, h0, softplus, reverse, scale) -> tuple[Tensor, Tensor]:
    tensors = [None if m is None else m.float() for m in (u, delta, A, B, C, D, z, bias, h0)]
    save = gradient_required(tensors)
    out, last, _ = scan_forward(*tensors, softplus, reverse, scale, save)
    return out, last


selective_scan, bi_selective_scan = public_scans(_scan, float64=torch_backend.scan)


# --- forward ---------------------------------------------------------------------------------


def forward(
    u: Tensor, delta: Tensor, A: Parameter, B: Tensor, C: Tensor, D: Parameter | None,
    z: Tensor | None, bias: Parameter | None, h0: Tensor | None, softplus: bool, reverse: bool,
    scale: float, save: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`scan_forward` without the operator: see `write_forward`."""
    out, last, states = _empty_results(u, B.shape[-1], save)
    write_forward(out, last, states, u, delta, A, B, C, D, z, bias, h0, softplus, reverse, scale)
    return out, last, states


def write_forward(
    out: Tensor, last: Tensor | None, states: Tensor | None,
    u: Tensor, delta: Tensor, A: Parameter, B: Tensor, C: Tensor, D: Parameter | None,
    z: Tensor | None, bias: Parameter | None, h0: Tensor | None, softplus: bool, reverse: bool,
    scale: float, *, dt_proj: Parameter | None = None, logarithm: bool = False,
) -> None:  # fmt: skip
    """Run the kernel without the operator: no gradients, no autocast, float32 only.

    A (s, d, n) and D, bias (s, d) may be tuples of a tensor for each direction. delta, B, C and z
    may be parts of wider tensors: they are read where they lie if their last axis is contiguous
    (and B and C have the same strides).

    Args:
        out, last, states: contiguous results of `scan_forward`, written here; None or empty to
            leave one out.
        dt_proj: weights (s, d, r) that project delta (s, b, l, r) to d channels.
        logarithm: A is the logarithm of -A.
    """
    s, b, l, d = u.shape
    u, dt_proj, A, D, bias, h0 = map(contiguous, (u, dt_proj, A, D, bias, h0))
    delta, z = map(channels_contiguous, (delta, z))
    B, C = _same_strides(B, C)
    n, blocks, r = B.shape[-1], -(-d // LANES), 0 if dt_proj is None else delta.shape[-1]
    run_tasks(
        numba_kernels.scan_forward,
        (address(u), address(delta), *addresses(dt_proj), *_parameters(A, B, C, D, z, bias),
         *map(address, (h0, out, last, states)), s, b, l, d, n, r, *delta.stride()[:3],
         *B.stride()[:3], *_strides(z), logarithm, softplus, reverse, scale),
        tasks=b * blocks,
        work_per_task=s * l * LANES * n * NANOSECONDS[0],
        scratch_rows=numba_kernels.scan_forward_rows(n, r),
    )  # fmt: skip


def _empty_results(u, n, save):
    s, b, l, d = u.shape
    blocks, chunks = -(-d // LANES), -(-l // CHUNK)
    return (
        u.new_empty(b, l, d),
        u.new_empty(s, b, d, n),
        u.new_empty(s * b * blocks * chunks * n * LANES if save else 0),
    )


@operator(
    "scan_forward",
    fake=lambda u, delta, A, *rest: _empty_results(u, A.shape[-1], save=rest[-1]),
    device_types="cpu",
)
def scan_forward(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    bias: Tensor | None, h0: Tensor | None, softplus: bool, reverse: bool, scale: float, save: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See `fused.py`; the kept result contains the states (s, b, blocks, chunks, n, LANES) before
    each chunk, flat; empty unless `save`."""
    return forward(u, delta, A, B, C, D, z, bias, h0, softplus, reverse, scale, save)


# --- backward --------------------------------------------------------------------------------


def backward(
    dout: Tensor, dlast: Tensor | None, u: Tensor, delta: Tensor, A: Parameter, B: Tensor,
    C: Tensor, D: Parameter | None, z: Tensor | None, bias: Parameter | None, states: Tensor,
    softplus: bool, reverse: bool, scale: float, *, dz: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Run the kernel without the operator; arguments as in `forward`.

    Args:
        dz: a tensor in z's shape for z's gradient, perhaps a part of a wider one; its last axis is
            contiguous. It is one of the results.
    Returns: what `scan_backward` returns; gradients of parameters are stacked.
    """
    s, b, l, d = u.shape
    dout, dlast, u, delta, A, D, bias = map(contiguous, (dout, dlast, u, delta, A, D, bias))
    z = channels_contiguous(z)
    B, C = _same_strides(B, C)
    n, blocks = B.shape[-1], -(-d // LANES)
    if dz is None:
        dz = u.new_empty(0 if z is None else z.shape)
    du, ddelta = torch.empty_like(u), torch.empty_like(u)
    dA, dD, dbias = u.new_empty(s, b, d, n), u.new_empty(s, b, d), u.new_empty(s, b, d)
    dB, dC = u.new_empty(s, b, l, blocks, n), u.new_empty(s, b, l, blocks, n)
    dh0 = u.new_empty(s, b, d, n)
    strides = (*B.stride()[:3], *_strides(z), *_strides(None if z is None else dz))
    run_tasks(
        numba_kernels.scan_backward,
        (*map(address, (dout, dlast, u, delta)), *_parameters(A, B, C, D, z, bias),
         *map(address, (states, du, ddelta, dA, dB, dC, dD, dz, dbias, dh0)),
         s, b, l, d, n, *strides, softplus, reverse, scale),
        tasks=b * blocks,
        work_per_task=s * l * LANES * n * NANOSECONDS[1],
        scratch_rows=numba_kernels.scan_backward_rows(n),
    )  # fmt: skip
    return du, ddelta, dA.sum(1), dB.sum(3), dC.sum(3), dD.sum(1), dz, dbias.sum(1), dh0


def _empty_gradients(dout, dlast, u, delta, A, B, C, D, z, bias, states, softplus, reverse, scale):
    s, b, _, d = u.shape
    n, new = A.shape[-1], u.new_empty
    dz = new(0 if z is None else z.shape)
    return (new(u.shape), new(u.shape), new(A.shape), new(B.shape), new(C.shape),
            new(s, d), dz, new(s, d), new(s, b, d, n))  # fmt: skip


@operator("scan_backward", fake=_empty_gradients, device_types="cpu")
def scan_backward(
    dout: Tensor, dlast: Tensor | None, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor,
    D: Tensor | None, z: Tensor | None, bias: Tensor | None, states: Tensor, softplus: bool,
    reverse: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of u, delta, A, B, C, D, z (empty without z), bias and h0."""
    du, ddelta, dA, dB, dC, dD, dz, dbias, dh0 = backward(
        dout, dlast, u, delta, A, B, C, D, z, bias, states, softplus, reverse, scale
    )
    return du, ddelta, dA, dB, dC, dD, dz, dbias, dh0


register_scan_gradient(scan_forward, scan_backward, "numba")


# --- tensors for the kernels -----------------------------------------------------------------


def _parameters(A, B, C, D, z, bias) -> tuple[int, ...]:
    """The addresses of what is between delta and the states in the kernels' arguments."""
    return (*addresses(A), address(B), address(C), *addresses(D), address(z), *addresses(bias))


def _strides(m: Tensor | None) -> tuple[int, int]:
    return (0, 0) if m is None else (m.stride(0), m.stride(1))


def _same_strides(B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """B and C (s, b, l, n) with the same strides and contiguous states."""
    if B.stride(-1) == 1 and B.stride() == C.stride():
        return B, C
    return B.contiguous(), C.contiguous()
