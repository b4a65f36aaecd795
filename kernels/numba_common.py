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
from numba import carray, njit, types
from numba.core import cgutils
from numba.core.compiler import Compiler
from numba.extending import intrinsic

f32 = np.float32
ZERO, ONE, TWO = f32(0), f32(1), f32(2)
LOG2E, LN2 = f32(1.4426950408889634), f32(0.6931471805599453)
LANES = 64  # channels a kernel works on together; a multiple of every vector width
FLOAT = 4  # bytes
ROW = LANES * FLOAT

# No 'reassoc': it would fold the rounding trick (x + ROUND) - ROUND into x.
SAFE = {"contract", "nsz", "arcp"}


class _NoAlias(Compiler):
    """Tells LLVM that memory behind a function's pointers does not overlap (`noalias`)."""

    def __init__(self, *args):
        super().__init__(*args)
        self.state.flags.noalias = True


def jit(*, sums: bool = False, **options):
    """`numba.njit` for the parts of kernels. What is written through one of the function's pointers
    must not be reached through another.

    Args:
        sums: the function may reorder sums, which vectorising a reduction needs.
    """
    flags = SAFE | {"reassoc"} if sums else SAFE
    return njit(fastmath=flags, error_model="numpy", pipeline_class=_NoAlias, **options)


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


# 1.5 * 2^23 rounds what it is added to, to an integer that lies in the low bits; 127 more is the
# exponent's bias.
ROUND = f32(12582912.0 + 127.0)
MANTISSA_BITS = np.int32(23)
SQRT_HALF_BITS = np.int32(0x3F3504F3)
LOWEST, HIGHEST = f32(-126.5), f32(128.0)  # beyond them 2^x is 0 and infinity
E0, E1, E2, E3, E4, E5 = (
    f32(c)
    for c in (
        1.000000072,
        0.6931469671,
        0.2402211972,
        0.05550713274,
        0.009675541385,
        0.001327647205,
    )
)


@jit(forceinline=True)
def exp2(x):
    """2^x to 2e-7 relative: the integer part becomes the exponent, a polynomial does the rest."""
    clipped = HIGHEST if x > HIGHEST else x  # comparisons are written so that NaN passes
    rounded = clipped + ROUND
    power = _as_float(np.int32(_as_bits(rounded) << MANTISSA_BITS))
    f = clipped - (rounded - ROUND)  # in [-1/2, 1/2]
    p = E5 * f + E4
    p = p * f + E3
    p = p * f + E2
    p = p * f + E1
    p = p * f + E0
    return ZERO if x < LOWEST else p * power


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
def at(typingctx, addresses):
    """A tuple of addresses as pointers to float32, for a function made by `jit`."""
    pointers = types.UniTuple(types.CPointer(types.float32), len(addresses))

    def codegen(context, builder, signature, args):
        numbers = cgutils.unpack_tuple(builder, args[0], len(addresses))
        as_pointers = [builder.inttoptr(a, ir.FloatType().as_pointer()) for a in numbers]
        return context.make_tuple(builder, pointers, as_pointers)

    return pointers(addresses), codegen


@jit(forceinline=True)
def row(pointer):
    """The `LANES` floats there, as an array that owns nothing."""
    return carray(pointer, (LANES,))


@jit(forceinline=True)
def rows(pointer, n):
    """n rows: (n, LANES)."""
    return carray(pointer, (n, LANES))


@jit(forceinline=True)
def floats(pointer, n):
    return carray(pointer, (n,))


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


def run_tasks(
    kernel: Callable, args: tuple, tasks: int, *, work_per_task: float, scratch_rows: int
) -> None:
    """``kernel(*args, scratch, first, end)`` over range(tasks), on `torch.get_num_threads()`.

    Every task writes places of its own, so the split never shows in the results.

    Args:
        kernel: what `kernel` made.
        work_per_task: nanoseconds, roughly; little work stays on the calling thread.
        scratch_rows: rows of zeros for each thread to work in; it gets their address.
    """
    global _pool, _pool_size
    threads = min(torch.get_num_threads(), tasks, max(1, int(tasks * work_per_task / 50_000)))
    if threads == 1:
        scratch = torch.zeros(scratch_rows, LANES, dtype=torch.float32)
        kernel(*args, scratch.data_ptr(), 0, tasks)
        return
    pieces = min(tasks, PIECES_PER_THREAD * threads)
    bounds = [tasks * i // pieces for i in range(pieces + 1)]
    counter = itertools.count()

    def work() -> None:
        scratch = torch.zeros(scratch_rows, LANES, dtype=torch.float32)
        while (i := next(counter)) < pieces:
            kernel(*args, scratch.data_ptr(), bounds[i], bounds[i + 1])

    if _pool is None or _pool_size < threads - 1:
        _pool_size = threads - 1
        _pool = ThreadPoolExecutor(_pool_size, thread_name_prefix="vim_ssl_scan")
    helpers = [_pool.submit(work) for _ in range(threads - 1)]
    work()
    for helper in helpers:
        helper.result()
