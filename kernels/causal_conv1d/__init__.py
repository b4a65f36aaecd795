"""The short depthwise convolution before the scan, causal in the direction of each scan."""

from torch import Tensor

from vim_ssl.kernels.backends import select


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor, reverse: bool = False, *, backend: str = "auto"
) -> Tensor:
    """silu(conv(x)) where token t sees tokens t-k+1 … t, or t … t+k-1 with ``reverse``.

    Args:
        x: (b, l, d), channel-last.
        weight: (d, k); the last tap multiplies the token itself.  bias: (d,).
        backend: "auto", "torch", "numba" (CPU) or "triton" (CUDA); see `kernels/backends.py`.
    Returns: (b, l, d) in x's dtype.
    Raises: ValueError for shapes that do not fit, a weight without taps, and integers.
    Reference: Mamba, arXiv:2312.00752, figure 3. Vim flips the sequence for the second direction.
    """
    return _conv_silu(x, weight[None], bias[None], reverse, backend)[0]


def bi_causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor, *, backend: str = "auto") -> Tensor:
    """Both directions of `causal_conv1d`: x (b, l, d), weight (2, d, k), bias (2, d).

    Returns: (2, b, l, d), index 0 looking back, index 1 looking ahead.
    """
    return _conv_silu(x, weight, bias, False, backend)


def _conv_silu(x: Tensor, weight: Tensor, bias: Tensor, reverse: bool, backend: str) -> Tensor:
    d = x.shape[-1]
    for name, m in (("x", x), ("weight", weight), ("bias", bias)):
        if not m.is_floating_point():
            raise ValueError(f"{name} has dtype {m.dtype}; expected a floating-point dtype.")
    if x.dim() != 3 or weight.dim() != 3 or weight.shape[1] != d or bias.shape != weight.shape[:2]:
        raise ValueError(
            f"x has shape {tuple(x.shape)}, weight {tuple(weight.shape)} and bias "
            f"{tuple(bias.shape)}; expected (b, l, d), (directions, d, k) and (directions, d)."
        )
    if weight.shape[0] not in (1, 2) or weight.shape[2] < 1:  # the kernels do not check
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}; expected 1 or 2 directions and 1 tap or more."
        )
    module = select("causal_conv1d", backend, x, weight, bias)
    return module.conv_silu(x, weight, bias, reverse)
