"""Elementary functions that the Triton kernels share, on float32 tiles.

Comparisons are written so that NaN propagates. ``tl.exp2`` and ``tl.rsqrt`` are one instruction of
the special-function unit each (2 ulp, denormals flushed to zero); ``tl.log2`` takes about twenty
instructions, and a division six.
"""

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def _inverse(x):
    """1 / x for x >= 1, to 3e-7, in two instructions."""
    root = tl.rsqrt(x)
    return root * root


@triton.jit
def sigmoid(x):
    return _inverse(1.0 + tl.exp2(-x * LOG2E))


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
    """softplus(v) = max(v, 0) + log(1 + e^-|v|), and its derivative, sigmoid(v).

    The sum is v where v exceeds torch's threshold of 20.
    """
    w = tl.exp2(-tl.abs(v) * LOG2E)
    # log(1 + w) / w on [0, 1], minimax in relative error (3e-8); 1 + w would round w's digits away.
    p = w * 0.005364826322887802 - 0.030065800263353322
    p = p * w + 0.07920454851233139
    p = p * w - 0.13753803433768602
    p = p * w + 0.1915365544915988
    p = p * w - 0.24857163795431295
    p = p * w + 0.33321322633409295
    p = p * w - 0.499996479641189
    p = p * w * w + w
    inverse = _inverse(1.0 + w)
    return tl.maximum(v, 0.0) + p, tl.where(v < 0.0, w * inverse, inverse)
