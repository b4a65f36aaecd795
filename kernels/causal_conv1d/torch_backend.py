"""The short convolution with `torch.nn.functional.conv1d`: any device, any dtype."""

import torch
import torch.nn.functional as F
from torch import Tensor


def conv_silu(x: Tensor, weight: Tensor, bias: Tensor, reverse: bool = False) -> Tensor:
    """x (b, l, d), weight (s, d, k), bias (s, d) -> (s, b, l, d) in x's dtype.

    Direction 0 looks back, or ahead with `reverse`; direction 1 looks ahead.
    """
    weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    if x.numel() == 0:  # conv1d refuses it; this is empty too, with gradients of zero
        return x * weight[:, None, None, :, 0] + bias[:, None, None]
    looks_ahead = (reverse, True)
    pairs = zip(weight, bias, looks_ahead[: len(weight)], strict=True)
    return torch.stack([_one_direction(x, w, b, ahead) for w, b, ahead in pairs]).to(x.dtype)


def _one_direction(x: Tensor, weight: Tensor, bias: Tensor, ahead: bool) -> Tensor:
    k = weight.shape[-1]
    if ahead:
        weight = weight.flip(-1)
    y = F.conv1d(F.pad(x.mT, (0, k - 1) if ahead else (k - 1, 0)), weight[:, None], bias,
                 groups=x.shape[-1])  # fmt: skip
    return F.silu(y.mT)
