"""Elementary functions that the Triton kernels share, on float32 tiles.

Comparisons are written so that NaN propagates. ``tl.exp2`` is one instruction of the
special-function unit (2 ulp, denormals flushed to zero); ``tl.log2`` too, with an absolute error of
1e-7 near 1, where `softplus` uses a polynomial instead.
"""

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
THRESHOLD: tl.constexpr = tl.constexpr(20.0)  # above it softplus(v) is v, as in torch


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(-x * LOG2E))


@triton.jit
def silu_gradient(x):
    """d silu(x) / dx."""
    s = sigmoid(x)
    return s * (1.0 + x * (1.0 - s))


@triton.jit
def softplus(v):
    """log(1 + e^v) to a few 1e-7 relative, also where it is close to e^v."""
    return softplus_with_slope(v)[0]


@triton.jit
def softplus_with_slope(v):
    """softplus(v) and its derivative, sigmoid(v)."""
    w = tl.exp2(tl.where(v > THRESHOLD, THRESHOLD, v) * LOG2E)
    # log(1 + w) / w on [0, 1/2], minimax in relative error; 1 + w would round w's digits away.
    p = w * 0.03934227675199509 - 0.11477913707494736
    p = p * w + 0.18517714738845825
    p = p * w - 0.24771980941295624
    p = p * w + 0.33316683769226074
    p = p * w - 0.4999958872795105
    p = p * w * w + w
    dt = tl.where(w < 0.5, p, tl.log2(1.0 + w) * LN2)
    return tl.where(v > THRESHOLD, v, dt), tl.where(v > THRESHOLD, 1.0, w / (1.0 + w))
