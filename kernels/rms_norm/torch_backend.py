"""Residual addition and RMSNorm in plain torch: any device, any dtype."""

import torch
from torch import Tensor


def add_rms_norm(
    hidden: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    residual_dtype = torch.promote_types(hidden.dtype, torch.float32)
    wide = hidden.to(residual_dtype)
    residual = wide if residual is None else residual.to(residual_dtype) + wide
    scale = torch.rsqrt(residual.square().mean(-1, keepdim=True) + eps)
    return (residual * scale * weight).to(hidden.dtype), residual
