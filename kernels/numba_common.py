"""What the CPU kernels share: elementary functions, rows at an address, and a small thread pool.

The kernels get their tensors as addresses (``tensor.data_ptr()``): handing over a NumPy array costs
a microsecond each, and every slice of one a reference count. So a kernel has one signature of
integers and floats, is compiled once, and later processes load it from numba's cache on disk
(beside this file, or under the user's cache folder where that is read-only; ``NUMBA_CACHE_DIR``
moves it).

numba from PyPI brings no vector library, so exp2 and log1p are written out here as short
polynomials, which LLVM turns into vector code. Flags that assume finite numbers are left out: an
infinity or NaN that comes in must come out.
"""

import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

f32 = np.float32
ZERO, ONE, TWO = f32(0), f32(1), f32(2)
LOG2E, LN2 = f32(1.4426950408889634), f32(0.6931471805599453)
LANES = 64  # channels a kernel works on together; a multiple of every vector width
FLOAT_BYTES = 4

# No 'reassoc': it would fold the rounding trick (x + ROUND) - ROUND into x.
SAFE = {"contract", "nsz", "arcp"}


def jit(*, sums: bool = False, **options):
    """`numba.njit` for the parts of kernels.

    Args:
        sums: the function may reorder sums, which vectorising a reduction needs.
    """
    return njit(fastmath=SAFE | {"reassoc"} if sums else SAFE, error_model="numpy", **options)


def kernel(function):
    """`numba.njit` for what Python calls: runs without the GIL, compiled at its first call.

    The arguments are always integers, booleans and floats, so there is one compilation, which later
    processes load from the disk.
    """
    options = {"fastmath": SAFE, "error_model": "numpy", "nogil": True}
    try:
        return njit(**options, cache=True)(function)
    except RuntimeError:  # no writable folder to cache in: compile anew in every process
        return njit(**options)(function)


# --- elementary functions --------------------------------------------------------------------


@intrinsic
def _as_float(typingctx, bits):
    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), codegen


@intrinsic
def _as_bits(typingctx, number):
    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], ir.IntType(32))

    return types.int32(types.float32), codegen


ROUND = f32(12582912.0)  # 1.5 * 2^23: adding it rounds a small float to an integer in the low bits
BIAS, MANTISSA_BITS = np.int32(127), np.int32(23)
SQRT_HALF_BITS = np.int32(0x3F3504F3)
LOWEST, HIGHEST = f32(-127.0), f32(128.0)  # where 2^x becomes 0 and infinity


@jit(forceinline=True)
def exp2(x):
    """2^x to 2e-7 relative: the integer part shifts the exponent, a polynomial does the rest."""
    x = LOWEST if x < LOWEST else x  # written so that NaN passes
    x = HIGHEST if x > HIGHEST else x
    rounded = x + ROUND
    whole = _as_bits(rounded)
    f = x - (rounded - ROUND)  # in [-1/2, 1/2]
    p = f32(1.5403530e-4) * f + f32(1.3333558e-3)
    p = p * f + f32(9.6181291e-3)
    p = p * f + f32(5.5504109e-2)
    p = p * f + f32(2.4022651e-1)
    p = p * f + f32(6.9314718e-1)
    p = p * f + ONE
    return p * _as_float(np.int32((whole + BIAS) << MANTISSA_BITS))


@jit(forceinline=True)
def log1p(x):
    """log(1 + x) for x >= 0 with full relative accuracy near 0: what 1 + x rounds off is added."""
    v = ONE + x
    lost = x - (v - ONE)
    bits = _as_bits(v)
    k = (bits - SQRT_HALF_BITS) >> MANTISSA_BITS
    m = _as_float(np.int32(bits - (k << MANTISSA_BITS)))  # v / 2^k, in [sqrt(1/2), sqrt(2)]
    s = (m - ONE) / (m + ONE)
    s2 = s * s
    p = s2 * f32(1 / 9) + f32(1 / 7)  # 2 artanh(s) = log(m)
    p = p * s2 + f32(1 / 5)
    p = p * s2 + f32(1 / 3)
    p = p * s2 + ONE
    return TWO * s * p + f32(k) * LN2 + lost / v


@jit(forceinline=True)
def sigmoid(x):
    return ONE / (ONE + exp2(-x * LOG2E))


# --- rows ------------------------------------------------------------------------------------


@intrinsic
def floats_at(typingctx, address):
    """The address, an integer, as a pointer to float32 for `numba.carray`."""

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], ir.FloatType().as_pointer())

    return types.CPointer(types.float32)(types.int64), codegen


# --- threads ---------------------------------------------------------------------------------

_pool: ThreadPoolExecutor | None = None
_pool_size = 0
PIECES_PER_THREAD = 4  # so that a thread that was held up leaves its share to the others


def _forget_pool() -> None:
    """A forked child has the pool's object but none of its threads."""
    global _pool, _pool_size
    _pool, _pool_size = None, 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)


def run_tasks(kernel: Callable, args: tuple, tasks: int, work_per_task: float) -> None:
    """Call ``kernel(*args, first, end)`` over range(tasks), on up to `torch.get_num_threads()`.

    Every task writes places of its own, so the split never shows in the results.

    Args:
        kernel: compiled with ``nogil=True``.
        work_per_task: nanoseconds, roughly; little work stays on the calling thread.
    """
    global _pool, _pool_size
    threads = min(torch.get_num_threads(), tasks, max(1, int(tasks * work_per_task / 50_000)))
    if threads == 1:
        kernel(*args, 0, tasks)
        return
    pieces = min(tasks, PIECES_PER_THREAD * threads)
    bounds = [tasks * i // pieces for i in range(pieces + 1)]
    counter = itertools.count()

    def work() -> None:
        while (i := next(counter)) < pieces:
            kernel(*args, bounds[i], bounds[i + 1])

    if _pool is None or _pool_size < threads - 1:
        _pool_size = threads - 1
        _pool = ThreadPoolExecutor(_pool_size, thread_name_prefix="vim_ssl_scan")
    helpers = [_pool.submit(work) for _ in range(threads - 1)]
    work()
    for helper in helpers:
        helper.result()
