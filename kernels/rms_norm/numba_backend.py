"""Residual addition and RMSNorm on a CPU, compiled by numba: one pass forward, one backward.

Two float32 operators, `vim_ssl::rms_norm_forward` and `vim_ssl::rms_norm_backward`, around the
kernels of `kernels/numba_kernels.py`. Besides its results, the forward pass saves only 1 / rms of
every token.
"""

from torch import Tensor

from vim_ssl.kernels import numba_kernels
from vim_ssl.kernels.autograd import address, contiguous, operator, register_gradient
from vim_ssl.kernels.numba_kernels import NORM_TOKENS
from vim_ssl.kernels.numba_threads import run_tasks

NANOSECONDS = (0.3, 0.5)  # forward, backward; per value


def add_rms_norm(
    hidden: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    wide = None if residual is None else residual.float()
    normed, result, _ = rms_norm_forward(hidden.float(), wide, weight.float(), eps)
    return normed.to(hidden.dtype), result


def _empty_results(hidden, *_):
    return (
        hidden.new_empty(hidden.shape),
        hidden.new_empty(hidden.shape),
        hidden.new_empty(hidden.shape[:-1]),
    )


@operator("rms_norm_forward", fake=_empty_results, device_types="cpu")
def rms_norm_forward(
    hidden: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return normed, hidden + residual, and each token's 1 / rms (…). hidden and residual are
    (…, d), weight is (d,)."""
    hidden, residual, weight = map(contiguous, (hidden, residual, weight))
    results = _empty_results(hidden)
    d = len(weight)
    run_tasks(
        numba_kernels.norm_forward,
        (*map(address, (hidden, residual, weight, *results)), d, eps),
        tasks=results[2].numel(),
        work_per_task=d * NANOSECONDS[0],
        scratch_rows=0,
    )
    return results


@operator(
    "rms_norm_backward",
    fake=lambda dnormed, dresult, result, scales, weight: (
        result.new_empty(result.shape), weight.new_empty(weight.shape)
    ),
    device_types="cpu",
)  # fmt: skip
def rms_norm_backward(
    dnormed: Tensor, dresult: Tensor | None, result: Tensor, scales: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradient of hidden, which is also that of residual, and of weight."""
    dnormed, dresult, weight = map(contiguous, (dnormed, dresult, weight))
    tokens, d = scales.numel(), len(weight)
    groups = -(-tokens // NORM_TOKENS)
    dinput, dweight = result.new_empty(result.shape), weight.new_empty(groups, d)
    tensors = (dnormed, dresult, result, scales, weight, dinput, dweight)
    run_tasks(
        numba_kernels.norm_backward,
        (*map(address, tensors), tokens, d),
        tasks=groups,
        work_per_task=NORM_TOKENS * d * NANOSECONDS[1],
        scratch_rows=0,
    )
    return dinput, dweight.sum(0)


def _differentiate(ctx, dnormed, dresult, _):
    weight, result, scales = ctx.saved_tensors
    if dnormed is None:  # only the residual was used
        return dresult, dresult, None
    dinput, dweight = rms_norm_backward(dnormed, dresult, result, scales, weight)
    return dinput, dinput, dweight


register_gradient(
    rms_norm_forward, rms_norm_backward, "numba RMSNorm",
    saved=slice(2, 3), kept=1, gradients=_differentiate,
)  # fmt: skip
