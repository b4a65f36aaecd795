"""The selective scan as a plain loop: simple, differentiable by autograd, exact in float64.

Every other backend is tested against this file. Both functions have the same arguments as the
functions in `dispatch.py`, which documents and checks shapes and dtypes.
"""

import torch
import torch.nn.functional as F


def selective_scan(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, *,
    initial_state=None, return_last_state=False, reverse=False,
):  # fmt: skip
    """h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t;   y_t = C_t h_t + D u_t;   out = y silu(z).

    With ``reverse``, tokens are processed from last to first.
    """
    dtype = torch.promote_types(u.dtype, torch.float32)  # at least float32 inside
    x, dt, a = u.to(dtype), delta.to(dtype), A.to(dtype)  # (b, d, l) (b, d, l) (d, n)
    b, c = (_per_channel(m.to(dtype), u.shape[1]) for m in (B, C))  # (b, d or 1, n, l)
    if delta_bias is not None:
        dt = dt + delta_bias.to(dtype)[:, None]
    if delta_softplus:
        dt = F.softplus(dt)
    h = x.new_zeros(u.shape[0], *A.shape) if initial_state is None else initial_state.to(dtype)
    ys = [None] * u.shape[2]
    for t in reversed(range(u.shape[2])) if reverse else range(u.shape[2]):
        decay = torch.exp(dt[:, :, t, None] * a)  # (b, d, n)
        h = decay * h + (dt[:, :, t] * x[:, :, t])[..., None] * b[..., t]
        ys[t] = (h * c[..., t]).sum(-1)
    y = torch.stack(ys, dim=-1) if ys else torch.empty_like(x)  # (b, d, l)
    if D is not None:
        y = y + D.to(dtype)[:, None] * x
    if z is not None:
        y = y * F.silu(z.to(dtype))
    y = y.to(u.dtype)
    return (y, h) if return_last_state else y


def bi_selective_scan(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=True, *, scale=1.0
):
    """scale (y_forward + y_backward) silu(z); each direction has its own parameters."""
    dtype = torch.promote_types(u.dtype, torch.float32)
    y = 0
    for k, reverse in enumerate((False, True)):
        y = y + selective_scan(
            u[k].to(dtype).mT, delta[k].mT, A[k], B[k].mT, C[k].mT,
            None if D is None else D[k], None, None if delta_bias is None else delta_bias[k],
            delta_softplus, reverse=reverse,
        ).mT  # fmt: skip
    y = scale * y
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(u.dtype)


def _per_channel(m, d):
    """(b, n, l) -> (b, 1, n, l);  (b, g, n, l) -> (b, d, n, l), group i serving d/g channels."""
    return m[:, None] if m.dim() == 3 else m.repeat_interleave(d // m.shape[1], dim=1)
