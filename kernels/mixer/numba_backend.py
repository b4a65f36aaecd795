"""The fused mixer on a CPU: the numba kernels of the convolution, x_proj and the scan, in float32.

In the forward pass the scan projects dt itself, so delta is never in memory.
"""

import torch
from torch import Tensor

from vim_ssl.kernels import numba_kernels
from vim_ssl.kernels.autograd import address, addresses, contiguous
from vim_ssl.kernels.causal_conv1d import numba_backend as conv
from vim_ssl.kernels.mixer.fused import Kernels, Pair, fused_mixer
from vim_ssl.kernels.mixer.torch_backend import wide
from vim_ssl.kernels.numba_kernels import CHUNK, LANES, PROJECT_TOKENS
from vim_ssl.kernels.numba_threads import run_tasks
from vim_ssl.kernels.selective_scan import numba_backend as scan

OPERATORS = ("mixer_forward", "mixer_backward")  # for `flops.py` of the scan
NANOSECONDS = 0.03  # per product of the projection
# Numbers of u in a piece of a batch, in inference, for each thread: 1 MiB stays in its caches, and
# memory that is freed and taken again so often is not returned to the system, which would clear it.
PIECE = 2**18


def _conv_forward(x, weight, bias):
    return conv.forward(x, weight, bias, False)


def _conv_backward(du, x, weight, bias, dx):
    return conv.backward(du, x, weight, bias, False, dx=dx)[1:]


def _forward(x, z, pairs, scale, save):
    """Without `save`, a batch is computed in pieces."""
    (b, l, d), (_, n) = x.shape, pairs.A_log[0].shape
    r = pairs.dt_proj[0].shape[-1]
    conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A_log, D = (
        tuple(map(wide, pair)) for pair in pairs
    )
    out = x.new_empty(b, l, d)
    states = x.new_empty(_states(x, A_log[0])) if save else None
    size = b if save else max(1, PIECE * torch.get_num_threads() // (2 * l * d))  # images
    for start in range(0, b, size):
        part = slice(start, start + size)
        u = conv.forward(x[part], conv_weight, conv_bias, False)
        x_dbl = _project(u, x_proj)
        dt, B, C = x_dbl.split([r, n, n], dim=-1)
        scan.write_forward(
            out[part], None, states, u, dt, A_log, B, C, D, None if z is None else z[part],
            dt_bias, None, True, False, scale, dt_proj=dt_proj, logarithm=True,
        )  # fmt: skip
    return out, x_dbl, states


def _project(u: Tensor, weight: Pair) -> Tensor:
    """(2, b, l, d) times each direction's weight (o, d) -> (2, b, l, o)."""
    (s, b, l, d), o = u.shape, len(weight[0])
    rows = contiguous(weight)
    out = u.new_empty(s, b, l, o)
    run_tasks(
        numba_kernels.project,
        (address(u), *addresses(rows), address(out), b * l, d, o),
        tasks=s * -(-b * l // PROJECT_TOKENS),
        work_per_task=PROJECT_TOKENS * d * o * NANOSECONDS,
        scratch_rows=numba_kernels.project_rows(d, o),
    )
    return out


def _scan_backward(dout, *arguments):
    *tensors, scale, dz = arguments
    du, ddelta, dA, dB, dC, dD, _, dbias, _ = scan.backward(
        dout, None, *tensors, True, False, scale, dz=dz
    )
    return du, ddelta, dA, dB, dC, dD, dbias


def _states(xz, A_log):
    (b, l, _), (d, n) = xz.shape, A_log.shape
    return 2 * b * -(-d // LANES) * -(-l // CHUNK) * n * LANES


KERNELS = Kernels(_forward, _conv_forward, _conv_backward, None, _scan_backward, _states)
bi_mixer = fused_mixer("", KERNELS, (torch.float32,))
