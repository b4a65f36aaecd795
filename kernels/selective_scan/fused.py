"""Code shared by the torch, numba and Triton backends: public layouts around one scan, and its
gradient.

A backend has a function on channel-last tensors with a leading direction axis (s = 1 or 2):

    scan(u, delta, A, B, C, D, z, bias, h0, softplus, reverse, scale) -> out, last

    u, delta (s, b, l, d), A (s, d, n), B, C (s, b, l, n), D, bias (s, d), z (b, l, d), h0
    (s, b, d, n); out (b, l, d) = scale sum_s(y_s) silu(z), last states (s, b, d, n)

Direction 0 reads first to last, or last to first with ``reverse``; direction 1 last to first.

In the fused backends, numba and Triton, this function calls the first of two torch operators:

    forward(u, delta, A, B, C, D, z, bias, h0, softplus, reverse, scale, save)
        -> out, last, *kept
    backward(dout, dlast, u, delta, A, B, C, D, z, bias, *kept, softplus, reverse, scale)
        -> gradients of u, delta, A, B, C, D, z (empty without z), bias, h0

kept are results that the backward pass needs, empty unless ``save``; without it, the backward pass
computes them. States are flat, for
torch.export: see `torch_backend.py`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vim_ssl.kernels.autograd import register_gradient

Scan = Callable[..., tuple[Tensor, Tensor]]


def public_scans(scan: Scan, float64: Scan | None = None) -> tuple[Callable, Callable]:
    """Return `selective_scan` and `bi_selective_scan`, implemented with ``scan``; ``float64``
    replaces it for float64 inputs."""

    def scan_for(u: Tensor) -> Scan:
        return float64 if float64 is not None and u.dtype == torch.float64 else scan

    def selective_scan(
        u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, *,
        initial_state=None, return_last_state=False, reverse=False,
    ):  # fmt: skip
        def one_group(u, delta, A, B, C, D, z, bias, h0):
            y, last = scan_for(u)(
                u.mT[None], delta.mT[None], A[None], B.mT[None], C.mT[None], _lead(D),
                None if z is None else z.mT, _lead(bias), _lead(h0), delta_softplus, reverse, 1.0,
            )  # fmt: skip
            return y.mT.to(u.dtype), last[0]

        tensors = (u, delta, A, B, C, D, z, delta_bias, initial_state)
        if B.dim() == 4 or C.dim() == 4:
            parts = [one_group(*group) for group in _groups(*tensors)]
            y, last = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
        else:
            y, last = one_group(*tensors)
        return (y, last) if return_last_state else y

    def bi_selective_scan(
        u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=True, *, scale=1.0
    ):
        y, _ = scan_for(u)(u, delta, A, B, C, D, z, delta_bias, None, delta_softplus, False, scale)
        return y.to(u.dtype)

    return selective_scan, bi_selective_scan


def _lead(m: Tensor | None) -> Tensor | None:
    return None if m is None else m[None]


def _groups(u, delta, A, B, C, D, z, bias, h0):
    """Split the arguments into groups of channels; each group has its own B, C or both."""
    count = (B if B.dim() == 4 else C).shape[1]

    def split(m, dim):
        return [None] * count if m is None else m.tensor_split(count, dim)

    B, C = (m.unbind(1) if m.dim() == 4 else [m] * count for m in (B, C))
    return zip(
        split(u, 1), split(delta, 1), split(A, 0), B, C, split(D, 0), split(z, 1), split(bias, 0),
        split(h0, 1), strict=True,
    )  # fmt: skip


def register_scan_gradient(forward: Any, backward: Any, name: str) -> None:
    """`register_gradient` for the pair of operators of a fused backend."""

    def gradients(ctx, dout, dlast, *_):
        tensors, (*options, save) = ctx.saved_tensors, ctx.options
        inputs, kept = tensors[:9], tensors[9:]
        if not save:  # a program that was exported without gradients
            _, _, *kept = forward(*inputs, *options, True)
        if dout is None:
            dout = inputs[0].new_zeros(inputs[0].shape[1:])
        return backward(dout, dlast, *inputs[:8], *kept, *options)

    register_gradient(
        forward, backward, f"{name} scan", saved=slice(9), kept=2, gradients=gradients
    )
