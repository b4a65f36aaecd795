"""The selective scan on a CPU, compiled by numba: everything in one pass, in float32.

Two torch operators, `vim_ssl::scan_forward` and `vim_ssl::scan_backward`, wrap the kernels of
`kernels/numba_kernels.py`. They are float32 and channel-last with a leading direction axis; this
file brings other layouts and dtypes to that and back, by torch operations that autograd knows.
float64 inputs go to the torch backend, which computes in float64.

Imported only when chosen; the first call in a new installation compiles for a few seconds.
"""

from typing import Any

import torch
from torch import Tensor

from vim_ssl.kernels import numba_kernels
from vim_ssl.kernels.numba_kernels import CHUNK, LANES
from vim_ssl.kernels.numba_threads import run_tasks
from vim_ssl.kernels.selective_scan import torch_backend

NANOSECONDS = (0.25, 1.0)  # forward, backward, for one token, channel and state


def selective_scan(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, *,
    initial_state=None, return_last_state=False, reverse=False,
):  # fmt: skip
    if u.dtype == torch.float64:
        return torch_backend.selective_scan(
            u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state=initial_state,
            return_last_state=return_last_state, reverse=reverse,
        )  # fmt: skip
    if B.dim() == 4 or C.dim() == 4:
        return torch_backend.scan_groups(
            selective_scan, u, delta, A, B, C, D, z, delta_bias, delta_softplus,
            initial_state, return_last_state, reverse,
        )  # fmt: skip
    y, last = _scan(
        u.mT[None], delta.mT[None], A[None], B.mT[None], C.mT[None], _lead(D),
        None if z is None else z.mT, _lead(delta_bias), _lead(initial_state),
        delta_softplus, reverse, 1.0,
    )  # fmt: skip
    y = y.mT.to(u.dtype)
    return (y, last[0]) if return_last_state else y


def bi_selective_scan(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=True, *, scale=1.0
):
    if u.dtype == torch.float64:
        return torch_backend.bi_selective_scan(
            u, delta, A, B, C, D, z, delta_bias, delta_softplus, scale=scale
        )
    y, _ = _scan(u, delta, A, B, C, D, z, delta_bias, None, delta_softplus, False, scale)
    return y.to(u.dtype)


def _lead(m: Tensor | None) -> Tensor | None:
    return None if m is None else m[None]


def _scan(u, delta, A, B, C, D, z, bias, h0, softplus, reverse, scale) -> tuple[Tensor, Tensor]:
    tensors = [None if m is None else m.float() for m in (u, delta, A, B, C, D, z, bias, h0)]
    wanted = torch.is_grad_enabled() and any(m is not None and m.requires_grad for m in tensors)
    out, last, *_ = torch.ops.vim_ssl.scan_forward(*tensors, softplus, reverse, scale, wanted)
    return out, last


# --- forward ---------------------------------------------------------------------------------


@torch.library.custom_op("vim_ssl::scan_forward", mutates_args=(), device_types="cpu")
def scan_forward(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    bias: Tensor | None, h0: Tensor | None, softplus: bool, reverse: bool, scale: float, save: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """u, delta (s, b, l, d), A (s, d, n), B, C (s, b, l, n), D, bias (s, d), z (b, l, d), h0
    (s, b, d, n), float32 -> scale sum_s(y_s) silu(z), last states (s, b, d, n), and the states at
    the chunks' starts for the backward pass, empty unless `save`.
    """
    s, b, l, d = u.shape
    u, delta, A, B, C, D, bias, h0 = map(_contiguous, (u, delta, A, B, C, D, bias, h0))
    z = _rows(z)
    out, last, states = _outputs(u, A, save)
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


@scan_forward.register_fake
def _(u, delta, A, B, C, D, z, bias, h0, softplus, reverse, scale, save):
    return _outputs(u, A, save)


def _outputs(u, A, save):
    s, b, l, d = u.shape
    n, blocks, chunks = A.shape[-1], -(-d // LANES), -(-l // CHUNK)
    return (
        u.new_empty(b, l, d),
        u.new_empty(s, b, d, n),
        u.new_empty((s, b, blocks, chunks, n, LANES) if save else 0),
    )


# --- backward --------------------------------------------------------------------------------


@torch.library.custom_op("vim_ssl::scan_backward", mutates_args=(), device_types="cpu")
def scan_backward(
    dout: Tensor, dlast: Tensor | None, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor,
    D: Tensor | None, z: Tensor | None, bias: Tensor | None, states: Tensor, softplus: bool,
    reverse: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of u, delta, A, B, C, D, z (empty without z), bias and h0."""
    s, b, l, d = u.shape
    dout, dlast, u, delta, A, B, C, D, bias = map(
        _contiguous, (dout, dlast, u, delta, A, B, C, D, bias)
    )
    z = _rows(z)
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


@scan_backward.register_fake
def _(dout, dlast, u, delta, A, B, C, D, z, bias, states, softplus, reverse, scale):
    s, b, _, d = u.shape
    n, new = A.shape[-1], u.new_empty
    dz = new(0 if z is None else z.shape)
    return (new(u.shape), new(u.shape), new(A.shape), new(B.shape), new(C.shape),
            new(s, d), dz, new(s, d), new(s, b, d, n))  # fmt: skip


def _keep(ctx, inputs, output):
    *tensors, h0, ctx.softplus, ctx.reverse, ctx.scale, saved = inputs
    if not saved:
        raise RuntimeError("scan_forward was called without save=True; it keeps no gradients.")
    ctx.save_for_backward(*tensors, output[2])
    ctx.present = [m is not None for m in (*tensors, h0)]
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dout, dlast, *_):
    tensors = ctx.saved_tensors
    if dout is None:
        dout = tensors[0].new_zeros(tensors[0].shape[1:])
    grads = torch.ops.vim_ssl.scan_backward(
        dout, dlast, *tensors, ctx.softplus, ctx.reverse, ctx.scale
    )
    kept = (g if here else None for g, here in zip(grads, ctx.present, strict=True))
    return (*kept, None, None, None, None)


def _refuse(ctx, *grads):
    raise RuntimeError(
        "The numba scan cannot be differentiated twice (double backward); "
        "use backend='reference' for second derivatives."
    )


scan_forward.register_autograd(_differentiate, setup_context=_keep)
scan_backward.register_autograd(_refuse)


# --- tensors for the kernels -----------------------------------------------------------------


def _contiguous(m: Any) -> Any:
    return None if m is None else m.contiguous()


def _rows(z: Tensor | None) -> Tensor | None:
    """z as it comes if its channels lie together, as in one half of a projection's output."""
    return z if z is None or z.stride(-1) == 1 else z.contiguous()


def _strides(z: Tensor | None) -> tuple[int, int]:
    return (0, 0) if z is None else (z.stride(0), z.stride(1))


def _address(m: Tensor | None) -> int:
    """0 tells the kernel that there is no such tensor; that of an empty one is 0 as well."""
    return 0 if m is None else m.data_ptr()
