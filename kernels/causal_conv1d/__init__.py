"""The short depthwise convolution before the scan, in each direction's own causal sense."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vim_ssl.kernels.selective_scan.dispatch import choose_backend


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor, reverse: bool = False) -> Tensor:
    """silu(conv(x)) where token t sees tokens t-k+1 … t, or t … t+k-1 with ``reverse``.

    Args:
        x: (b, l, d), channel-last.
        weight: (d, k); the last tap meets the token itself.  bias: (d,).
    Returns: (b, l, d) in x's dtype.
    Reference: Mamba, arXiv:2312.00752, figure 3; Vim runs the second one on the flipped sequence.
    """
    if _compiled(x.device.type, x.dtype):
        return _numba.conv_silu(x, weight[None], bias[None], reverse)[0]
    return _plain(x, weight, bias, reverse)


def bi_causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Both directions of `causal_conv1d`: x (b, l, d), weight (2, d, k), bias (2, d).

    Returns: (2, b, l, d), index 0 looking back, index 1 looking ahead.
    """
    if _compiled(x.device.type, x.dtype):
        return _numba.conv_silu(x, weight, bias)
    return torch.stack([_plain(x, weight[s], bias[s], reverse=s == 1) for s in (0, 1)])


def _plain(x: Tensor, weight: Tensor, bias: Tensor, reverse: bool) -> Tensor:
    """By torch's convolution: any device, any dtype."""
    k = weight.shape[-1]
    if reverse:
        weight = weight.flip(-1)
    y = F.conv1d(F.pad(x.mT, (0, k - 1) if reverse else (k - 1, 0)), weight[:, None], bias,
                 groups=x.shape[-1])  # fmt: skip
    return F.silu(y.mT)


@torch.compiler.assume_constant_result  # torch.compile cannot trace an import; it asks once
def _compiled(device: str, dtype: torch.dtype) -> bool:
    """Whether the numba kernel runs: where the scan's does, except for float64."""
    global _numba
    if dtype == torch.float64 or choose_backend("auto", device) != "numba":
        return False
    if _numba is None:
        from vim_ssl.kernels.causal_conv1d import numba_backend

        _numba = numba_backend
    return True


_numba: Any = None  # the module, imported at its first use
