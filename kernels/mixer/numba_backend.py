"""The fused mixer on a CPU: the numba kernels of the convolution and the scan, in float32."""

import torch

from vim_ssl.kernels.causal_conv1d import numba_backend as conv
from vim_ssl.kernels.mixer.fused import Kernels, fused_mixer
from vim_ssl.kernels.numba_kernels import CHUNK, LANES
from vim_ssl.kernels.selective_scan import numba_backend as scan

OPERATORS = ("mixer_forward", "mixer_backward")  # for `flops.py` of the scan


def _conv_forward(x, weight, bias):
    return conv.forward(x, weight, bias, False)


def _conv_backward(du, x, weight, bias, dx):
    return conv.backward(du, x, weight, bias, False, dx=dx)[1:]


def _scan_forward(*arguments):
    *tensors, scale, save = arguments
    out, _, states = scan.forward(*tensors, None, True, False, scale, save)
    return out, states


def _scan_backward(dout, *arguments):
    *tensors, scale, dz = arguments
    du, ddelta, dA, dB, dC, dD, _, dbias, _ = scan.backward(
        dout, None, *tensors, True, False, scale, dz=dz
    )
    return du, ddelta, dA, dB, dC, dD, dbias


def _states(xz, A_log):
    (b, l, _), (d, n) = xz.shape, A_log.shape
    return 2 * b * -(-d // LANES) * -(-l // CHUNK) * n * LANES


KERNELS = Kernels(_conv_forward, _conv_backward, _scan_forward, _scan_backward, _states)
bi_mixer = fused_mixer("", KERNELS, (torch.float32,))
