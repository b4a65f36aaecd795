"""The selective scan in plain torch: one in-place step per token, any device, little memory.

Only the recurrence has a hand-written backward pass. softplus, D and the gate are ordinary torch
operations around it, differentiated by autograd.

               a_t = exp(dt_t A)          x_t = dt_t u_t
    forward    h_t = a_t h_{t-1} + x_t B_t,   y_t = <h_t, C_t>
    backward   g_t = C_t dy_t + a_{t+1} g_{t+1}                       (g_t = dL/dh_t)
               dC_t = sum_d h_t dy_t      dB_t = sum_d g_t x_t        dx_t = <g_t, B_t>
               q_t = g_t a_t h_{t-1}      ddt_t = <q_t, A>            dA = sum_t dt_t q_t

One state in `CHUNK` tokens is saved, and the backward pass recomputes the others. All tensors have
a leading direction axis s (1 or 2), so both directions step together.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vim_ssl.kernels.autograd import operator, register_gradient
from vim_ssl.kernels.selective_scan.fused import public_scans

OPERATORS = ("torch_scan_forward", "torch_scan_backward")  # for `flops.py`
CHUNK = 16  # tokens between saved states: 1 / CHUNK of the memory for a second forward pass


def scan(u, delta, A, B, C, D, z, bias, h0, softplus, reverse, scale):
    """See `fused.py`; the results are at least float32."""
    dtype = torch.promote_types(u.dtype, torch.float32)
    u, dt, A, B, C = (t.to(dtype) for t in (u, delta, A, B, C))
    if bias is not None:
        dt = dt + bias.to(dtype)[:, None, None]
    if softplus:
        dt = F.softplus(dt)
    if h0 is None:
        h0 = u.new_zeros(*u.shape[:2], *A.shape[1:])
    y, last, _ = scan_forward(dt, dt * u, A, B, C, h0.to(dtype), (reverse, True)[: len(u)])
    if D is not None:
        y = y + D.to(dtype)[:, None, None] * u
    out = y[0] if len(y) == 1 else y[0] + y[1]
    if scale != 1.0:
        out = out * scale
    if z is not None:
        out = out * F.silu(z.to(dtype))
    return out, last


selective_scan, bi_selective_scan = public_scans(scan)


# As an operator, a loop over tokens is one node for torch.compile, which would otherwise unroll it.
# Products write to `out` or in place, because autocast does not cast those: the state must stay
# float32.


def _new_states(h0, l):
    # Flat: with a dynamic l, torch.export must know whether a size is 1, and it cannot know that of
    # the number of chunks.
    return h0.new_empty(-(-l // CHUNK) * h0.numel())


def _empty_results(dt, x, A, B, C, h0, reverse):
    return x.new_empty(x.shape), h0.new_empty(h0.shape), _new_states(h0, x.shape[2])


@operator("torch_scan_forward", fake=_empty_results)
def scan_forward(
    dt: Tensor, x: Tensor, A: Tensor, B: Tensor, C: Tensor, h0: Tensor, reverse: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y (s, b, l, d), the last states, and the states before each chunk (chunks, s, b, d,
    n), flat, for dt, x (s, b, l, d), A (s, d, n), B, C (s, b, l, n), h0 (s, b, d, n)."""
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


def _empty_gradients(dy, dlast, dt, x, A, B, C, states, reverse):
    return tuple(m.new_empty(m.shape) for m in (dt, x, A, B, C, dlast))


@operator("torch_scan_backward", fake=_empty_gradients)
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
        for t in chunk:  # recompute a_t, a_t h_{t-1} and h_t of this chunk
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


register_gradient(scan_forward, scan_backward, "torch scan", saved=slice(5), kept=2)


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
