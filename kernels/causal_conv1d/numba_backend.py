"""The short convolution on a CPU, compiled by numba; both directions share one pass over x.

Two float32 operators, `vim_ssl::conv_forward` and `vim_ssl::conv_backward`, around the kernels of
`kernels/numba_kernels.py`.
"""

import torch
from torch import Tensor

from vim_ssl.kernels import numba_kernels
from vim_ssl.kernels.autograd import channels_contiguous, contiguous, operator, register_gradient
from vim_ssl.kernels.numba_kernels import LANES
from vim_ssl.kernels.numba_threads import run_tasks

NANOSECONDS = (0.5, 1.5)  # forward, backward; per token, channel and direction


def conv_silu(x: Tensor, weight: Tensor, bias: Tensor, reverse: bool = False) -> Tensor:
    """x (b, l, d), weight (s, d, k), bias (s, d) -> (s, b, l, d) in x's dtype.

    Direction 0 looks back, or ahead with `reverse`; direction 1 looks ahead.
    """
    out = torch.ops.vim_ssl.conv_forward(x.float(), weight.float(), bias.float(), reverse)
    return out.to(x.dtype)


@operator(
    "conv_forward", fake=lambda x, w, *_: x.new_empty(w.shape[0], *x.shape), device_types="cpu"
)
def conv_forward(x: Tensor, weight: Tensor, bias: Tensor, reverse: bool) -> Tensor:
    """float32 `conv_silu`."""
    x, weight, bias = channels_contiguous(x), contiguous(weight), contiguous(bias)
    (b, l, d), (s, _, k) = x.shape, weight.shape
    out = x.new_empty(s, b, l, d)
    addresses = (m.data_ptr() for m in (x, weight, bias, out))
    run_tasks(
        numba_kernels.conv_forward,
        (*addresses, s, b, l, d, k, *x.stride()[:2], reverse),
        tasks=b * -(-d // LANES),
        work_per_task=s * l * LANES * NANOSECONDS[0],
        scratch_rows=2 * l + 3 * k,
    )
    return out


@operator(
    "conv_backward",
    fake=lambda dout, *tensors: tuple(m.new_empty(m.shape) for m in tensors[:3]),
    device_types="cpu",
)
def conv_backward(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias."""
    dout, weight, bias = map(contiguous, (dout, weight, bias))
    x = channels_contiguous(x)
    (b, l, d), (s, _, k) = x.shape, weight.shape
    dx, dweight, dbias = x.new_empty(b, l, d), x.new_empty(s, b, d, k), x.new_empty(s, b, d)
    addresses = (m.data_ptr() for m in (dout, x, weight, bias, dx, dweight, dbias))
    run_tasks(
        numba_kernels.conv_backward,
        (*addresses, s, b, l, d, k, *x.stride()[:2], reverse),
        tasks=b * -(-d // LANES),
        work_per_task=s * l * LANES * NANOSECONDS[1],
        scratch_rows=4 * l + 6 * k,
    )
    return dx, dweight.sum(1), dbias.sum(1)


register_gradient(conv_forward, conv_backward, "numba convolution")
