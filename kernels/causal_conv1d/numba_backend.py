"""The short convolution on a CPU, compiled by numba; both directions share one pass over x.

Two float32 operators, `vim_ssl::conv_forward` and `vim_ssl::conv_backward`, around the kernels of
`kernels/numba_kernels.py`.
"""

from torch import Tensor

from vim_ssl.kernels import numba_kernels
from vim_ssl.kernels.autograd import (
    Parameter,
    address,
    addresses,
    channels_contiguous,
    contiguous,
    operator,
    register_gradient,
)
from vim_ssl.kernels.numba_kernels import LANES
from vim_ssl.kernels.numba_threads import run_tasks

NANOSECONDS = (0.5, 1.5)  # forward, backward; per token, channel and direction


def conv_silu(x: Tensor, weight: Tensor, bias: Tensor, reverse: bool = False) -> Tensor:
    """x (b, l, d), weight (s, d, k), bias (s, d) -> (s, b, l, d) in x's dtype.

    Direction 0 looks back, or ahead with `reverse`; direction 1 looks ahead.
    """
    out = conv_forward(x.float(), weight.float(), bias.float(), reverse)
    return out.to(x.dtype)


def forward(x: Tensor, weight: Parameter, bias: Parameter, reverse: bool) -> Tensor:
    """`conv_silu` without the operator: no gradients, no autocast, float32 only.

    weight (s, d, k) and bias (s, d) may be tuples of a tensor for each direction, (d, k) or
    (d, 1, k) and (d,). x is read where it lies if its last axis is contiguous.
    """
    s = len(weight)
    x, weight, bias = channels_contiguous(x), contiguous(weight), contiguous(bias)
    (b, l, d), k = x.shape, weight[0].shape[-1]
    out = x.new_empty(s, b, l, d)
    run_tasks(
        numba_kernels.conv_forward,
        (address(x), *addresses(weight), *addresses(bias), address(out),
         s, b, l, d, k, *x.stride()[:2], reverse),
        tasks=b * -(-d // LANES),
        work_per_task=s * l * LANES * NANOSECONDS[0],
        scratch_rows=numba_kernels.conv_forward_rows(l, d, k),
    )  # fmt: skip
    return out


def backward(
    dout: Tensor, x: Tensor, weight: Parameter, bias: Parameter, reverse: bool,
    *, dx: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, weight (s, d, k) and bias (s, d), without the operator; see `forward`.

    Args:
        dx: a tensor in x's shape for x's gradient, perhaps a part of a wider one; its last axis is
            contiguous. It is one of the results.
    """
    dout, weight, bias = map(contiguous, (dout, weight, bias))
    x = channels_contiguous(x)
    (b, l, d), k, s = x.shape, weight[0].shape[-1], len(dout)
    dx = x.new_empty(b, l, d) if dx is None else dx
    dweight, dbias = x.new_empty(s, b, d, k), x.new_empty(s, b, d)
    run_tasks(
        numba_kernels.conv_backward,
        (address(dout), address(x), *addresses(weight), *addresses(bias), address(dx),
         address(dweight), address(dbias), s, b, l, d, k, *x.stride()[:2], *dx.stride()[:2],
         reverse),
        tasks=b * -(-d // LANES),
        work_per_task=s * l * LANES * NANOSECONDS[1],
        scratch_rows=numba_kernels.conv_backward_rows(l, d, k),
    )  # fmt: skip
    return dx, dweight.sum(1), dbias.sum(1)


@operator(
    "conv_forward", fake=lambda x, w, *_: x.new_empty(w.shape[0], *x.shape), device_types="cpu"
)
def conv_forward(x: Tensor, weight: Tensor, bias: Tensor, reverse: bool) -> Tensor:
    """float32 `conv_silu`."""
    return forward(x, weight, bias, reverse)


@operator(
    "conv_backward",
    fake=lambda dout, *tensors: tuple(m.new_empty(m.shape) for m in tensors[:3]),
    device_types="cpu",
)
def conv_backward(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias."""
    return backward(dout, x, weight, bias, reverse)


register_gradient(conv_forward, conv_backward, "numba convolution")
