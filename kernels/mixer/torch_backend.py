"""The mixer as a sequence of operations: any device and dtype, any backend of the scan."""

import torch
from torch import Tensor

from vim_ssl.kernels.causal_conv1d import bi_causal_conv1d
from vim_ssl.kernels.selective_scan import bi_selective_scan


def bi_mixer(xz, forward, backward, gated: bool, scale: float, backend: str) -> Tensor:
    conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A_log, D = map(
        torch.stack, zip(forward, backward, strict=True)
    )
    n, r = A_log.shape[-1], dt_proj.shape[-1]
    x, z = xz.chunk(2, dim=-1)
    u = bi_causal_conv1d(x, conv_weight.squeeze(2), conv_bias)  # (2, b, l, d)
    tokens = u.flatten(1, 2)  # batched matmul, because einsum would add copies
    dt, B, C = (tokens @ x_proj.mT).split([r, n, n], dim=-1)
    delta, B, C = (m.unflatten(1, u.shape[1:3]) for m in (dt @ dt_proj.mT, B, C))
    return bi_selective_scan(
        u, delta, -wide(A_log).exp(), B, C, wide(D), z if gated else None, wide(dt_bias),
        scale=scale, backend=backend,
    )  # fmt: skip


def wide(parameter: Tensor) -> Tensor:
    """Cast to float32 at least: in half precision the dynamics of the scan would drift."""
    return parameter if parameter.dtype in (torch.float32, torch.float64) else parameter.float()
