"""The fused mixer on a GPU: the Triton kernels of the convolution and the scan.

The scan's states are as large as four to eight of its inputs in half precision, so they are not
saved: the backward pass runs the scan's forward pass again.
"""

import torch

from vim_ssl.kernels.causal_conv1d import triton_backend as conv
from vim_ssl.kernels.mixer.fused import Kernels, fused_mixer, project, scan_arguments, taps
from vim_ssl.kernels.selective_scan import triton_backend as scan

OPERATORS = ("triton_mixer_forward", "triton_mixer_backward")  # for `flops.py` of the scan


def _taps(weight):
    """A pair of (d, 1, k) -> (2, k, d), as the kernels read them."""
    return torch.stack(weight).squeeze(2).mT.contiguous()


def _forward(x, z, pairs, scale, save):
    u = _conv_forward(x, *taps(pairs))
    x_dbl = project(u, pairs.x_proj)
    _, tensors = scan_arguments(u, x_dbl, z, pairs)
    out, *_ = scan.scan_forward(*_stacked(*tensors), None, True, False, scale, False)
    return out, x_dbl, None


def _conv_forward(x, weight, bias):
    return conv.conv_forward(x, _taps(weight), torch.stack(bias), False)


def _conv_backward(du, x, weight, bias, dx):
    dx_new, sums = conv.conv_backward(du, x, _taps(weight), torch.stack(bias), False)
    dx.copy_(dx_new)
    return sums[:, :-1].mT.contiguous(), sums[:, -1].contiguous()


def _stacked(u, delta, A, B, C, D, z, bias):
    return u, delta, A, B, C, torch.stack(D), z, torch.stack(bias)


def _scan_forward(*arguments):
    *tensors, scale = arguments
    return scan.scan_forward(*_stacked(*tensors), None, True, False, scale, True)[2:]


def _scan_backward(dout, *arguments):
    *tensors, y_sum, states, scale, dz = arguments
    du, ddelta, dA, dB, dC, dD, dz_new, dbias, _ = scan.scan_backward(
        dout, None, *_stacked(*tensors), y_sum, states, True, False, scale
    )
    if dz is not None:
        dz.copy_(dz_new)
    return du, ddelta, dA, dB, dC, dD, dbias


KERNELS = Kernels(_forward, _conv_forward, _conv_backward, _scan_forward, _scan_backward, None)
bi_mixer = fused_mixer("triton_", KERNELS, (torch.float32, torch.bfloat16, torch.float16))
