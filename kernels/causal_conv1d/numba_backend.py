"""The short convolution on a CPU: both directions from one reading of x, compiled by numba.

Two float32 operators, `vim_ssl::conv_forward` and `vim_ssl::conv_backward`, around the kernels of
`kernels/numba_kernels.py`. Imported only when chosen.
"""

import torch
from torch import Tensor

from vim_ssl.kernels import numba_kernels
from vim_ssl.kernels.numba_kernels import LANES
from vim_ssl.kernels.numba_threads import run_tasks

NANOSECONDS = (0.5, 1.5)  # forward, backward, for one token and channel of one direction


def conv_silu(x: Tensor, weight: Tensor, bias: Tensor, reverse: bool = False) -> Tensor:
    """x (b, l, d), weight (s, d, k), bias (s, d) -> (s, b, l, d) in x's dtype.

    Direction 0 looks back, or ahead with `reverse`; direction 1 looks ahead.
    """
    out = torch.ops.vim_ssl.conv_forward(x.float(), weight.float(), bias.float(), reverse)
    return out.to(x.dtype)


@torch.library.custom_op("vim_ssl::conv_forward", mutates_args=(), device_types="cpu")
def conv_forward(x: Tensor, weight: Tensor, bias: Tensor, reverse: bool) -> Tensor:
    """float32 `conv_silu`."""
    x, weight, bias = _rows_of(x), weight.contiguous(), bias.contiguous()
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


@conv_forward.register_fake
def _(x, weight, bias, reverse):
    return x.new_empty(weight.shape[0], *x.shape)


@torch.library.custom_op("vim_ssl::conv_backward", mutates_args=(), device_types="cpu")
def conv_backward(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias."""
    dout, x, weight, bias = dout.contiguous(), _rows_of(x), weight.contiguous(), bias.contiguous()
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


@conv_backward.register_fake
def _(dout, x, weight, bias, reverse):
    return x.new_empty(x.shape), weight.new_empty(weight.shape), bias.new_empty(bias.shape)


def _keep(ctx, inputs, output):
    *tensors, ctx.reverse = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, dout):
    return (*torch.ops.vim_ssl.conv_backward(dout, *ctx.saved_tensors, ctx.reverse), None)


def _refuse(ctx, *grads):
    raise RuntimeError(
        "The numba convolution cannot be differentiated twice (double backward); "
        "set VIM_SSL_BACKEND=reference for second derivatives."
    )


conv_forward.register_autograd(_differentiate, setup_context=_keep)
conv_backward.register_autograd(_refuse)


def _rows_of(x: Tensor) -> Tensor:
    """x as it comes if its channels lie together, as in one half of a projection's output."""
    return x if x.stride(-1) == 1 else x.contiguous()
