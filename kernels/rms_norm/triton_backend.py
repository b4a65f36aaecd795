"""Residual addition and RMSNorm on a GPU: one pass forward, one pass backward, in Triton.

Two operators, `vim_ssl::triton_rms_norm_forward` and `vim_ssl::triton_rms_norm_backward`, take
float32, bfloat16 and float16 and compute in float32.

A row (the d values of one token) is one tile, or one row of a tile if rows are short. Memory
traffic per value, where e is the bytes of hidden's dtype: forward 2 e + 8 (hidden and residual
in, normed and the new residual out), backward 2 e + 12 (the gradients of both outputs and the new
residual in, the gradients of both inputs out). The weight's gradient needs no atomics: a
program processes every programs-th block of rows and writes a partial sum, and torch adds these, so
results are bitwise reproducible.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vim_ssl.kernels.autograd import contiguous, operator, register_gradient

TILE = 1024  # minimum number of values per tile: as many short rows as fit
VALUES_PER_WARP = 256  # 8 per lane, 16 bytes in half precision
WARPS = 32 * 132  # backward warps that run concurrently on the 132 multiprocessors of an H100


def add_rms_norm(
    hidden: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    normed, total, _ = rms_norm_forward(hidden, residual, weight, eps)
    return normed, total


# --- kernels -----------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["rows"])  # another size does not recompile
def rms_norm_forward_kernel(
    hidden, residual, weight, normed, total, rstd, rows, d, eps,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of ROWS rows). residual may be None."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    at = row[:, None].to(tl.int64) * d + column[None]
    inside = (row < rows)[:, None] & (column < d)[None]
    x = tl.load(hidden + at, mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        x += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=1) / d + eps)
    w = tl.load(weight + column, mask=column < d, other=0.0).to(tl.float32)
    tl.store(normed + at, x * scale[:, None] * w[None], mask=inside)
    tl.store(total + at, x, mask=inside)
    tl.store(rstd + row, scale, mask=row < rows)


@triton.jit(do_not_specialize=["rows"])
def rms_norm_backward_kernel(
    dnormed, dtotal, total, rstd, weight, dhidden, dresidual, sums, rows, d,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Grid: (programs); each processes every programs-th block of ROWS rows.

    dtotal and dresidual may be None.  sums: (programs, d), the gradient of the weight.
    """
    column = tl.arange(0, COLUMNS)
    w = tl.load(weight + column, mask=column < d, other=0.0).to(tl.float32)
    dweight = tl.zeros((ROWS, COLUMNS), tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = block * ROWS + tl.arange(0, ROWS)
        at = row[:, None].to(tl.int64) * d + column[None]
        inside = (row < rows)[:, None] & (column < d)[None]
        scale = tl.load(rstd + row, mask=row < rows, other=0.0)[:, None]
        unit = tl.load(total + at, mask=inside, other=0.0) * scale
        dy = tl.load(dnormed + at, mask=inside, other=0.0).to(tl.float32)
        dweight += dy * unit
        dy *= w[None]
        mean = tl.sum(dy * unit, axis=1) / d
        dx = (dy - unit * mean[:, None]) * scale
        if dtotal is not None:
            dx += tl.load(dtotal + at, mask=inside, other=0.0)
        tl.store(dhidden + at, dx, mask=inside)
        if dresidual is not None:
            tl.store(dresidual + at, dx, mask=inside)
    start = sums + tl.program_id(0).to(tl.int64) * d
    tl.store(start + column, tl.sum(dweight, axis=0), mask=column < d)


# --- operators ---------------------------------------------------------------------------------


def _empty_results(hidden, *_):
    return (
        hidden.new_empty(hidden.shape),
        hidden.new_empty(hidden.shape, dtype=torch.float32),
        hidden.new_empty(hidden.shape[:-1], dtype=torch.float32),
    )


@operator("triton_rms_norm_forward", fake=_empty_results)
def rms_norm_forward(
    hidden: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return normed in hidden's dtype, and in float32 the new residual and, for the backward pass,
    each row's 1 / rms (…). hidden and residual are (…, d), weight is (d,)."""
    hidden, residual, weight = map(contiguous, (hidden, residual, weight))
    normed, total, rstd = _empty_results(hidden)
    rows, d = rstd.numel(), weight.numel()
    tile = _tile(d)
    with torch.cuda.device_of(hidden):
        rms_norm_forward_kernel[(triton.cdiv(rows, tile["ROWS"]),)](
            hidden, residual, weight, normed, total, rstd, rows, d, eps, **tile
        )
    return normed, total, rstd


def _empty_gradients(dnormed, dtotal, total, rstd, weight, twice):
    return (
        dnormed.new_empty(dnormed.shape),
        dnormed.new_empty(dnormed.shape if twice else 0, dtype=torch.float32),
        weight.new_empty(weight.shape, dtype=torch.float32),
    )


@operator("triton_rms_norm_backward", fake=_empty_gradients)
def rms_norm_backward(
    dnormed: Tensor, dtotal: Tensor | None, total: Tensor, rstd: Tensor, weight: Tensor, twice: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradient of hidden + residual in dnormed's dtype, the same in float32 (empty
    unless `twice`), and the gradient of the weight in float32."""
    dnormed, dtotal, weight = map(contiguous, (dnormed, dtotal, weight))
    dhidden, dresidual, _ = _empty_gradients(dnormed, dtotal, total, rstd, weight, twice)
    rows, d = rstd.numel(), weight.numel()
    tile = _tile(d)
    programs = min(triton.cdiv(rows, tile["ROWS"]), WARPS // tile["num_warps"])
    sums = total.new_empty(programs, d)
    with torch.cuda.device_of(dnormed):
        rms_norm_backward_kernel[(programs,)](
            dnormed, dtotal, total, rstd, weight, dhidden, dresidual if twice else None, sums,
            rows, d, **tile,
        )  # fmt: skip
    return dhidden, dresidual, sums.sum(0)


def _differentiate(ctx, dnormed, dtotal, _):
    weight, total, rstd = ctx.saved_tensors
    if dnormed is None:  # only the residual was used
        return dtotal, dtotal, None
    hidden_dtype, residual_dtype, _ = ctx.dtypes
    twice = residual_dtype is not None and hidden_dtype != torch.float32
    dhidden, dresidual, dweight = rms_norm_backward(dnormed, dtotal, total, rstd, weight, twice)
    return dhidden, dresidual if twice else dhidden, dweight


register_gradient(
    rms_norm_forward, rms_norm_backward, "Triton RMSNorm",
    saved=slice(2, 3), kept=1, gradients=_differentiate,
)  # fmt: skip


def _tile(d: int) -> dict[str, int]:
    """Rows and columns of a tile and the warps that share it, for rows of d values."""
    columns = triton.next_power_of_2(max(1, d))
    rows = max(1, TILE // columns)
    warps = min(16, max(1, rows * columns // VALUES_PER_WARP))
    return {"ROWS": rows, "COLUMNS": columns, "num_warps": warps}
