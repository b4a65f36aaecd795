"""The selective scan on a CPU, compiled by numba: everything in one pass, in float32.

Two torch operators, `vim_ssl::scan_forward` and `vim_ssl::scan_backward`, wrap the kernels of
`kernels/numba_kernels.py`; `fused.py` describes their arguments, which are float32 here. Other
dtypes are cast by torch operations that autograd differentiates.

The first call in a new installation compiles the kernels, which takes about 20 seconds.
"""

import torch
from torch import Tensor

from vim_ssl.kernels import numba_kernels
from vim_ssl.kernels.autograd import channels_contiguous, contiguous, gradient_required, operator
from vim_ssl.kernels.numba_kernels import CHUNK, LANES
from vim_ssl.kernels.numba_threads import run_tasks
from vim_ssl.kernels.selective_scan import torch_backend
from vim_ssl.kernels.selective_scan.fused import public_scans, register_scan_gradient

OPERATORS = ("scan_forward", "scan_backward")  # for `flops.py`
NANOSECONDS = (0.25, 1.0)  # forward, backward; per token, channel and state


def _scan(u, delta, A, B, C, D, z, bias, h0, softplus, reverse, scale) -> tuple[Tensor, Tensor]:
    tensors = [None if m is None else m.float() for m in (u, delta, A, B, C, D, z, bias, h0)]
    save = gradient_required(tensors)
    out, last, _ = torch.ops.vim_ssl.scan_forward(*tensors, softplus, reverse, scale, save)
    return out, last


selective_scan, bi_selective_scan = public_scans(_scan, float64=torch_backend.scan)


# --- forward ---------------------------------------------------------------------------------


def _empty_results(u, A, save):
    s, b, l, d = u.shape
    n, blocks, chunks = A.shape[-1], -(-d // LANES), -(-l // CHUNK)
    return (
        u.new_empty(b, l, d),
        u.new_empty(s, b, d, n),
        u.new_empty(s * b * blocks * chunks * n * LANES if save else 0),
    )


@operator(
    "scan_forward",
    fake=lambda u, delta, A, *rest: _empty_results(u, A, save=rest[-1]),
    device_types="cpu",
)
def scan_forward(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    bias: Tensor | None, h0: Tensor | None, softplus: bool, reverse: bool, scale: float, save: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See `fused.py`; the kept result contains the states (s, b, blocks, chunks, n, LANES) before
    each chunk, flat; empty unless `save`."""
    s, b, l, d = u.shape
    u, delta, A, B, C, D, bias, h0 = map(contiguous, (u, delta, A, B, C, D, bias, h0))
    z = channels_contiguous(z)
    out, last, states = _empty_results(u, A, save)
    addresses = map(_address, (u, delta, A, B, C, D, z, bias, h0, out, last, states))
    blocks, n = -(-d // LANES), A.shape[-1]
    run_tasks(
        numba_kernels.scan_forward,
        (*addresses, s, b, l, d, n, *_strides(z), softplus, reverse, scale),
        tasks=b * blocks,
        work_per_task=s * l * LANES * n * NANOSECONDS[0],
        scratch_rows=numba_kernels.scan_forward_rows(n),
    )
    return out, last, states


# --- backward --------------------------------------------------------------------------------


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
    s, b, l, d = u.shape
    dout, dlast, u, delta, A, B, C, D, bias = map(
        contiguous, (dout, dlast, u, delta, A, B, C, D, bias)
    )
    z = channels_contiguous(z)
    blocks, n = -(-d // LANES), A.shape[-1]
    du, ddelta, dz = (
        torch.empty_like(u),
        torch.empty_like(u),
        u.new_empty(0 if z is None else z.shape),
    )
    dA, dD, dbias = u.new_empty(s, b, d, n), u.new_empty(s, b, d), u.new_empty(s, b, d)
    dB, dC = u.new_empty(s, b, l, blocks, n), u.new_empty(s, b, l, blocks, n)
    dh0 = u.new_empty(s, b, d, n)
    addresses = map(_address, (dout, dlast, u, delta, A, B, C, D, z, bias, states,
                               du, ddelta, dA, dB, dC, dD, dz, dbias, dh0))  # fmt: skip
    run_tasks(
        numba_kernels.scan_backward,
        (*addresses, s, b, l, d, n, *_strides(z), softplus, reverse, scale),
        tasks=b * blocks,
        work_per_task=s * l * LANES * n * NANOSECONDS[1],
        scratch_rows=numba_kernels.scan_backward_rows(n),
    )
    return du, ddelta, dA.sum(1), dB.sum(3), dC.sum(3), dD.sum(1), dz, dbias.sum(1), dh0


register_scan_gradient(scan_forward, scan_backward, "numba")


# --- tensors for the kernels -----------------------------------------------------------------


def _strides(z: Tensor | None) -> tuple[int, int]:
    return (0, 0) if z is None else (z.stride(0), z.stride(1))


def _address(m: Tensor | None) -> int:
    """Return the address for a kernel: 0 for None, as for an empty tensor."""
    return 0 if m is None else m.data_ptr()
