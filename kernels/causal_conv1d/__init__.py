"""The short depthwise convolution before the scan, in each direction's own causal sense."""

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor, reverse: bool = False) -> Tensor:
    """silu(conv(x)) where token t sees tokens t-k+1 … t, or t … t+k-1 with ``reverse``.

    Args:
        x: (b, l, d), channel-last.
        weight: (d, k); the last tap meets the token itself.  bias: (d,).
    Returns: (b, l, d) in x's dtype.
    Reference: Mamba, arXiv:2312.00752, figure 3; Vim runs the second one on the flipped sequence.
    """
    k = weight.shape[-1]
    if reverse:
        weight = weight.flip(-1)
    y = F.conv1d(F.pad(x.mT, (0, k - 1) if reverse else (k - 1, 0)), weight[:, None], bias,
                 groups=x.shape[-1])  # fmt: skip
    return F.silu(y.mT)


def bi_causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Both directions of `causal_conv1d`: x (b, l, d), weight (2, d, k), bias (2, d).

    Returns: (2, b, l, d), index 0 looking back, index 1 looking ahead.
    """
    return torch.stack([causal_conv1d(x, weight[s], bias[s], reverse=s == 1) for s in (0, 1)])
