"""What the fused backends share: public layouts around one scan, and its gradient.

A fused backend is a pair of torch operators on channel-last tensors with a leading direction axis
(s = 1 or 2):

    forward(u, delta, A, B, C, D, z, bias, h0, softplus, reverse, scale, save)
        -> out, last, *kept
    backward(dout, dlast, u, delta, A, B, C, D, z, bias, *kept, softplus, reverse, scale)
        -> gradients of u, delta, A, B, C, D, z (empty without z), bias, h0

    u, delta (s, b, l, d), A (s, d, n), B, C (s, b, l, n), D, bias (s, d), z (b, l, d), h0
    (s, b, d, n); out (b, l, d) = scale sum_s(y_s) silu(z), last states (s, b, d, n), and what the
    backward pass wants kept, empty unless ``save``. States are flat, for torch.export: see
    `torch_backend.py`.

Direction 0 reads first to last, or last to first with ``reverse``; direction 1 last to first.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vim_ssl.kernels.selective_scan import torch_backend

Scan = Callable[..., tuple[Tensor, Tensor]]


def public_scans(scan: Scan) -> tuple[Callable, Callable]:
    """`selective_scan` and `bi_selective_scan` made of ``scan(u, ..., h0, softplus, reverse,
    scale) -> (out, last)``; float64 inputs go to the torch backend, which computes in float64."""

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
        y, last = scan(
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
        y, _ = scan(u, delta, A, B, C, D, z, delta_bias, None, delta_softplus, False, scale)
        return y.to(u.dtype)

    return selective_scan, bi_selective_scan


def _lead(m: Tensor | None) -> Tensor | None:
    return None if m is None else m[None]


def gradient_wanted(tensors) -> bool:
    return torch.is_grad_enabled() and any(m is not None and m.requires_grad for m in tensors)


def register_gradient(forward: Any, backward: Any, name: str) -> None:
    """Make `backward` the derivative of `forward`, both custom operators, and let nobody
    differentiate it again."""

    def keep(ctx, inputs, output):
        *tensors, h0, ctx.softplus, ctx.reverse, ctx.scale, saved = inputs
        if not saved:
            raise RuntimeError(f"The {name} scan was called with save=False: it has no gradient.")
        ctx.save_for_backward(*tensors, *output[2:])
        ctx.present = [m is not None for m in (*tensors, h0)]
        ctx.set_materialize_grads(False)

    def differentiate(ctx, dout, dlast, *_):
        tensors = ctx.saved_tensors
        if dout is None:
            dout = tensors[0].new_zeros(tensors[0].shape[1:])
        grads = backward(dout, dlast, *tensors, ctx.softplus, ctx.reverse, ctx.scale)
        kept = (g if here else None for g, here in zip(grads, ctx.present, strict=True))
        return (*kept, None, None, None, None)

    def refuse(ctx, *grads):
        raise RuntimeError(
            f"The {name} scan cannot be differentiated twice (double backward); "
            "use backend='reference' for second derivatives."
        )

    forward.register_autograd(differentiate, setup_context=keep)
    backward.register_autograd(refuse)


def channels_together(m: Any) -> Any:
    """m as it comes if its last axis has stride 1, as in one half of a projection's output."""
    return m if m is None or m.stride(-1) == 1 else m.contiguous()


def contiguous(m: Any) -> Any:
    return None if m is None else m.contiguous()
