"""The selective scan in plain torch: one in-place step a token, any device, little memory.

Only the recurrence needs care, so only it has a hand-written backward. softplus, D and the gate are
ordinary torch operations around it, differentiated by autograd.

               a_t = exp(dt_t A)          x_t = dt_t u_t
    forward    h_t = a_t h_{t-1} + x_t B_t,   y_t = <h_t, C_t>
    backward   g_t = C_t dy_t + a_{t+1} g_{t+1}                       (g_t = dL/dh_t)
               dC_t = sum_d h_t dy_t      dB_t = sum_d g_t x_t        dx_t = <g_t, B_t>
               q_t = g_t a_t h_{t-1}      ddt_t = <q_t, A>            dA = sum_t dt_t q_t

The states are not kept: every `CHUNK` tokens one is saved, and the backward pass rebuilds the ones
between. All tensors carry a leading direction axis s (1 or 2), so both directions step together.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

OPERATORS = ("torch_scan_forward", "torch_scan_backward")  # for `flops.py`
CHUNK = 16  # tokens between saved states: memory / CHUNK, at the price of a second forward


def selective_scan(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, *,
    initial_state=None, return_last_state=False, reverse=False,
):  # fmt: skip
    if B.dim() == 4 or C.dim() == 4:  # groups of channels with their own B and C
        return scan_groups(
            selective_scan, u, delta, A, B, C, D, z, delta_bias, delta_softplus,
            initial_state, return_last_state, reverse,
        )  # fmt: skip
    y, last = _scan(
        u.mT[None], delta.mT[None], A[None], B.mT[None], C.mT[None],
        None if D is None else D[None], None if delta_bias is None else delta_bias[None],
        delta_softplus, None if initial_state is None else initial_state[None], (reverse,),
    )  # fmt: skip
    y = y[0].mT
    if z is not None:
        y = y * F.silu(z.to(y.dtype))
    y = y.to(u.dtype)
    return (y, last[0]) if return_last_state else y


def bi_selective_scan(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=True, *, scale=1.0
):
    y, _ = _scan(u, delta, A, B, C, D, delta_bias, delta_softplus, None, (False, True))
    out = y[0] + y[1]
    if scale != 1.0:
        out = out * scale
    if z is not None:
        out = out * F.silu(z.to(out.dtype))
    return out.to(u.dtype)


def _scan(u, delta, A, B, C, D, delta_bias, delta_softplus, h0, reverse):
    """u, delta (s, b, l, d); A (s, d, n); B, C (s, b, l, n); D, delta_bias (s, d); h0 (s, b, d, n).

    Returns y (s, b, l, d) and the last state (s, b, d, n), both at least float32.
    """
    dtype = torch.promote_types(u.dtype, torch.float32)
    u, dt, A, B, C = (t.to(dtype) for t in (u, delta, A, B, C))
    if delta_bias is not None:
        dt = dt + delta_bias.to(dtype)[:, None, None]
    if delta_softplus:
        dt = F.softplus(dt)
    if h0 is None:
        h0 = u.new_zeros(*u.shape[:2], *A.shape[1:])
    y, last, _ = scan_forward(dt, dt * u, A, B, C, h0.to(dtype), reverse)
    if D is not None:
        y = y + D.to(dtype)[:, None, None] * u
    return y, last


def scan_groups(
    scan, u, delta, A, B, C, D, z, bias, softplus, h0, return_last_state, reverse
):  # fmt: skip
    """Run `scan` on each group of channels by itself and join the results."""
    groups = (B if B.dim() == 4 else C).shape[1]
    size = u.shape[1] // groups
    parts = []
    for g in range(groups):
        c = slice(g * size, (g + 1) * size)
        parts.append(
            scan(
                u[:, c],
                delta[:, c],
                A[c],
                B[:, g] if B.dim() == 4 else B,
                C[:, g] if C.dim() == 4 else C,
                None if D is None else D[c],
                None if z is None else z[:, c],
                None if bias is None else bias[c],
                softplus,
                initial_state=None if h0 is None else h0[:, c],
                return_last_state=True,
                reverse=reverse,
            )
        )
    y, last = (torch.cat(p, dim=1) for p in zip(*parts, strict=True))
    return (y, last) if return_last_state else y


# Operators, so that torch.compile takes a loop over tokens for one call instead of unrolling it.
# Their products write to `out` or in place: those autocast leaves in float32, as the state must be.


@torch.library.custom_op("vim_ssl::torch_scan_forward", mutates_args=())
def scan_forward(
    dt: Tensor, x: Tensor, A: Tensor, B: Tensor, C: Tensor, h0: Tensor, reverse: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """dt, x (s, b, l, d), A (s, d, n), B, C (s, b, l, n), h0 (s, b, d, n) -> y (s, b, l, d), the
    last states, and the states before each chunk (chunks, s, b, d, n), flat."""
    dt_, x_, B_, C_ = (_scan_order(m, reverse) for m in (dt, x, B, C))  # (l, s, b, ...)
    y_, h = torch.empty_like(x_), h0.clone(memory_format=torch.contiguous_format)
    states = _new_states(h0, len(x_))
    chunks = states.view(-(-len(x_) // CHUNK), *h0.shape)
    for t in range(len(x_)):
        if t % CHUNK == 0:
            chunks[t // CHUNK] = h
        h.mul_(_decay(dt_[t], A)).addcmul_(x_[t][..., None], B_[t][:, :, None])
        torch.matmul(h, C_[t][..., None], out=y_[t][..., None])
    return _raster_order(y_, reverse), h, states


@scan_forward.register_fake
def _(dt, x, A, B, C, h0, reverse):
    return x.new_empty(x.shape), h0.new_empty(h0.shape), _new_states(h0, x.shape[2])


def _new_states(h0, l):
    # Flat: with a dynamic l torch.export must know whether a size is 1, and of the number of chunks
    # it could not.
    return h0.new_empty(-(-l // CHUNK) * h0.numel())


@torch.library.custom_op("vim_ssl::torch_scan_backward", mutates_args=())
def scan_backward(
    dy: Tensor, dlast: Tensor, dt: Tensor, x: Tensor, A: Tensor, B: Tensor, C: Tensor,
    states: Tensor, reverse: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of dt, x, A, B, C and h0."""
    dt_, x_, B_, C_, dy_ = (_scan_order(m, reverse) for m in (dt, x, B, C, dy))
    ddt_, dx_, dB_, dC_ = (torch.empty_like(m) for m in (dt_, x_, B_, C_))
    dA, g = A.new_zeros(A.shape), dlast.clone(memory_format=torch.contiguous_format)
    chunks = -(-len(x_) // CHUNK)
    states = states.view(chunks, *g.shape)
    for k in reversed(range(chunks)):
        chunk = range(k * CHUNK, min((k + 1) * CHUNK, len(x_)))
        h, decays, decayed, after = states[k], [], [], []
        for t in chunk:  # rebuild a_t, a_t h_{t-1} and h_t of this chunk
            decays.append(_decay(dt_[t], A))
            decayed.append(decays[-1] * h)
            h = torch.addcmul(decayed[-1], x_[t][..., None], B_[t][:, :, None])
            after.append(h)
        for t in reversed(chunk):
            g.addcmul_(dy_[t][..., None], C_[t][:, :, None])
            torch.matmul(dy_[t][:, :, None], after.pop(), out=dC_[t][:, :, None])
            torch.matmul(x_[t][:, :, None], g, out=dB_[t][:, :, None])
            torch.matmul(g, B_[t][..., None], out=dx_[t][..., None])
            q = decayed.pop().mul_(g)
            torch.sum(q * A[:, None], dim=-1, out=ddt_[t])
            dA += q.mul_(dt_[t][..., None]).sum(1)
            g.mul_(decays.pop())
    ddt, dx, dB, dC = (_raster_order(m, reverse) for m in (ddt_, dx_, dB_, dC_))
    return ddt, dx, dA, dB, dC, g


@scan_backward.register_fake
def _(dy, dlast, dt, x, A, B, C, states, reverse):
    return tuple(m.new_empty(m.shape) for m in (dt, x, A, B, C, dlast))


def _keep(ctx, inputs, output):
    *tensors, _, ctx.reverse = inputs
    ctx.save_for_backward(*tensors, output[2])


def _differentiate(ctx, dy, dlast, _):
    return (*scan_backward(dy, dlast, *ctx.saved_tensors, ctx.reverse), None)


def _refuse(ctx, *grads):
    raise RuntimeError(
        "The torch scan cannot be differentiated twice (double backward); "
        "use backend='reference' for second derivatives."
    )


scan_forward.register_autograd(_differentiate, setup_context=_keep)
scan_backward.register_autograd(_refuse)


def _decay(dt_t, A):
    return (dt_t[..., None] * A[:, None]).exp_()  # (s, b, d, n)


def _scan_order(m, reverse):
    """(s, b, l, k) -> (l, s, b, k), time first, each direction in the order it reads."""
    parts = [m[s].flip(1) if r else m[s] for s, r in enumerate(reverse)]
    return torch.stack([p.transpose(0, 1) for p in parts], dim=1)


def _raster_order(m, reverse):
    """(l, s, b, k) -> (s, b, l, k): undo `_scan_order`."""
    parts = [m[:, s].transpose(0, 1) for s in range(len(reverse))]
    return torch.stack([p.flip(1) if r else p for p, r in zip(parts, reverse, strict=True)])
