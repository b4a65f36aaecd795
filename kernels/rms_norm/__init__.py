"""Residual addition and RMSNorm, which every block begins with."""

import torch
from torch import Tensor


def add_rms_norm(
    hidden: Tensor, residual: Tensor | None, weight: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """residual + hidden in float32 (or wider), and its RMSNorm.

    Args:
        hidden: (b, l, d).  residual: same shape, or None at the first block.  weight: (d,).
    Returns: (normed in hidden's dtype, the new residual in float32 or wider).
    Reference: RMSNorm, arXiv:1910.07467.
    """
    residual_dtype = torch.promote_types(hidden.dtype, torch.float32)
    residual = hidden.to(residual_dtype) if residual is None else residual + hidden
    scale = torch.rsqrt(residual.square().mean(-1, keepdim=True) + eps)
    return (residual * scale * weight).to(hidden.dtype), residual
