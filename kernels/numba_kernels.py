"""The CPU kernels, compiled by numba: the scan and the convolution, forward and backward.

All are in one file because numba's disk cache detects changes only in the file of the kernel.

A task is one image and one block of `LANES` channels; it iterates over the tokens of one direction
after the other, so nothing is flipped and no two tasks write the same memory. Channels are
innermost everywhere, also in the state (n, LANES), so every inner loop is a vector loop of fixed
length. A last block with fewer channels is processed in padded rows. The mathematics of the scan is
in `selective_scan/torch_backend.py`; in this file A carries a factor log2(e), since 2^x is cheap.

Everything is float32. Kernels take tensors as addresses (``tensor.data_ptr()``), 0 for an absent
one: passing a NumPy array costs a microsecond, and slicing one a reference count. So a kernel has
one signature of integers and floats and is compiled once; later processes load it from numba's disk
cache (beside this file, or in the user's cache folder if that is read-only; ``NUMBA_CACHE_DIR``
moves it). The parameters of two directions have an address each (``A_0``, ``A_1``), so they need
not be stacked; that of direction 1 is 0 if there is one direction.

numba from PyPI includes no vector library, so exp2 and log1p are short polynomials in this file,
which LLVM vectorises. Flags that assume finite numbers are not set, so that infinities and NaN
propagate.
"""

import contextlib
import logging

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils, event
from numba.core.caching import FunctionCache
from numba.core.compiler import Compiler
from numba.core.dispatcher import Dispatcher
from numba.extending import intrinsic

log = logging.getLogger(__name__)
f32 = np.float32
ZERO, ONE, TWO = f32(0), f32(1), f32(2)
LOG2E, LN2 = f32(1.4426950408889634), f32(0.6931471805599453)
LANES = 64  # channels of a block; a multiple of every vector width
FLOAT = 4  # bytes
ROW = LANES * FLOAT

CHUNK = 32  # tokens between saved states; one chunk's states and decays stay in the L2 cache
THRESHOLD = f32(20)  # above it softplus(v) is v, as in torch

# No 'reassoc': it would fold the rounding trick (x + ROUND) - ROUND into x.
SAFE = {"contract", "nsz", "arcp"}


class _NoAlias(Compiler):
    """Tell LLVM that memory behind a function's pointers does not overlap (`noalias`)."""

    def __init__(self, *args):
        super().__init__(*args)
        self.state.flags.noalias = True


def jit(*, sums: bool = False, **options):
    """`numba.njit` for functions that kernels call. Memory written through one of a function's
    pointers must not be accessed through another.

    Args:
        sums: allow reordering of sums, which a vectorised reduction needs.
    """
    flags = SAFE | {"reassoc"} if sums else SAFE
    return njit(fastmath=flags, error_model="numpy", pipeline_class=_NoAlias, **options)


def kernel(function):
    """`numba.njit` for functions that Python calls: releases the GIL, compiled at the first call.

    The arguments are always integers, booleans and floats, so there is one compilation, which later
    processes load from disk.
    """
    options = {"fastmath": SAFE, "error_model": "numpy", "nogil": True}
    compiled = njit(**options)(function)
    # RuntimeError: no writable folder for the cache, so every process compiles.
    with contextlib.suppress(RuntimeError):
        compiled._cache = _Cache(FunctionCache(function))
    return compiled


class _Cache:
    """numba's disk cache of one kernel. A failure to read or write it is logged, never raised: the
    kernel is compiled again."""

    def __init__(self, files: FunctionCache):
        self._files = files

    def __getattr__(self, name: str):
        return getattr(self._files, name)

    def load_overload(self, signature, target):
        try:
            return self._files.load_overload(signature, target)
        except Exception as error:  # a truncated file gives an error of nearly any type
            log.warning("numba's cache in %s is damaged (%s)", self.cache_path, error)
            with contextlib.suppress(Exception):
                self._files.flush()
            return None

    def save_overload(self, signature, data):
        try:
            self._files.save_overload(signature, data)
        except Exception as error:  # a full disk, for one
            log.warning(
                "numba's cache in %s cannot be written (%s), so every process compiles the CPU "
                "kernels; set NUMBA_CACHE_DIR to a folder with space", self.cache_path, error,
            )  # fmt: skip


class _CompileNotice(event.Listener):
    """Log once that kernels of this file are being compiled, which takes seconds.

    ``running`` counts compilations in progress: LLVM may crash if one is left by an exception.
    """

    logged, running = False, 0

    def on_start(self, event):  # not called for a kernel loaded from disk
        self.running += 1
        compiled = event.data["dispatcher"]
        ours = isinstance(compiled, Dispatcher) and compiled.py_func.__module__ == __name__
        if ours and not self.logged:
            self.logged = True
            often = (
                "once; later runs load them" if isinstance(compiled._cache, _Cache) else
                "in every process, since numba's cache has no folder that can be written: set "
                "NUMBA_CACHE_DIR to one"
            )  # fmt: skip
            log.warning("compiling the CPU kernels: some 20 seconds, %s", often)

    def on_end(self, event):
        self.running -= 1


NOTICE = _CompileNotice()
event.register("numba:compile", NOTICE)


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


# Adding 1.5 * 2^23 rounds a number to an integer in the low bits; 127 is the exponent's bias.
ROUND = f32(12582912.0 + 127.0)
MANTISSA_BITS = np.int32(23)
SQRT_HALF_BITS = np.int32(0x3F3504F3)
LOWEST, HIGHEST = f32(-126.5), f32(128.0)  # beyond them 2^x is 0 and infinity
# Minimax on [-1/2, 1/2] with the first two terms exact: products of thousands of decays near 1 need
# 2^0 = 1 and an exact slope at 0.
E1, E2, E3, E4, E5 = LN2, f32(0.24022282), f32(0.0555056), f32(0.00966971), f32(0.00133003)


@jit(forceinline=True)
def exp2(x):
    """2^x to 2e-7 relative: the integer part becomes the exponent, a polynomial does the rest."""
    clipped = HIGHEST if x > HIGHEST else x  # comparisons are written so that NaN propagates
    rounded = clipped + ROUND
    power = _as_float(np.int32(_as_bits(rounded) << MANTISSA_BITS))
    f = clipped - (rounded - ROUND)  # in [-1/2, 1/2]
    p = E5 * f + E4
    p = p * f + E3
    p = p * f + E2
    p = p * f + E1
    p = p * f + ONE
    return ZERO if x < LOWEST else p * power


@jit(forceinline=True)
def log1p(x):
    """log(1 + x) for x >= 0 with full relative accuracy near 0: it adds what 1 + x rounds off."""
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
    """`LANES` floats at the pointer, as an array that does not own them."""
    return carray(pointer, (LANES,))


@jit(forceinline=True)
def rows(pointer, n):
    """n rows: (n, LANES)."""
    return carray(pointer, (n, LANES))


@jit(forceinline=True)
def floats(pointer, n):
    return carray(pointer, (n,))


# --- scan: rows ------------------------------------------------------------------------------


@jit()
def _read(source, width, pad):
    """The address of a full row: the source, or a copy in `pad` if it is shorter than LANES."""
    if width == LANES:
        return source
    a, b = at((source, pad))
    short, full = floats(a, width), row(b)
    for e in range(width):
        full[e] = short[e]
    return pad


@jit()
def _write(source, width, target):
    """Copy a row to the target, unless it was written there directly."""
    if source != target:
        a, b = at((source, target))
        full, short = row(a), floats(b, width)
        for e in range(width):
            short[e] = full[e]


@jit()
def _load(source, width, target):
    """Copy a row of `width` floats, or none without a source; zeros in the rest."""
    a, b = at((source, target))
    full = row(b)
    for e in range(LANES):
        full[e] = ZERO
    if source:
        short = floats(a, width)
        for e in range(width):
            full[e] = short[e]


@jit()
def _load_state(source, width, n, factor, target):
    """(width, n) -> n rows, channels innermost; zeros beyond `width` and without a source."""
    a, b = at((source, target))
    full = floats(b, n * LANES)
    for i in range(n * LANES):
        full[i] = ZERO
    if source:
        m = floats(a, width * n)
        for e in range(width):
            for k in range(n):
                full[k * LANES + e] = factor * m[e * n + k]


@jit()
def _store_state(source, width, n, target):
    """n rows -> (width, n)."""
    a, b = at((source, target))
    full, m = floats(a, n * LANES), floats(b, width * n)
    for e in range(width):
        for k in range(n):
            m[e * n + k] = full[k * LANES + e]


@jit()
def _copy(source, n, target):
    """n whole rows."""
    a, b = at((source, target))
    a, b = floats(a, n * LANES), floats(b, n * LANES)
    for i in range(n * LANES):
        b[i] = a[i]


# --- scan: forward ---------------------------------------------------------------------------


@jit()
def _step_size(softplus, u, delta, D, bias, dt, x, y):
    """dt = softplus(delta + bias), x = dt u, y = D u."""
    u, delta, D, bias, dt, x, y = row(u), row(delta), row(D), row(bias), row(dt), row(x), row(y)
    if softplus:
        for e in range(LANES):
            v = delta[e] + bias[e]
            small = log1p(exp2((THRESHOLD if v > THRESHOLD else v) * LOG2E))
            dt[e] = v if v > THRESHOLD else small
    else:
        for e in range(LANES):
            dt[e] = delta[e] + bias[e]
    for e in range(LANES):
        x[e] = dt[e] * u[e]
        y[e] = D[e] * u[e]


@jit()
def _step(n, dt, x, B, C, A2, h, y):
    """h = a h + x B and y += C h, for one token."""
    dt, x, y = row(dt), row(x), row(y)
    B, C, A2, h = floats(B, n), floats(C, n), rows(A2, n), rows(h, n)
    for k in range(n):
        b, c, A_k, h_k = B[k], C[k], A2[k], h[k]
        for e in range(LANES):
            v = exp2(dt[e] * A_k[e]) * h_k[e] + x[e] * b
            h_k[e] = v
            y[e] += v * c


@jit()
def _add(y, other):
    y, other = row(y), row(other)
    for e in range(LANES):
        y[e] += other[e]


@jit()
def _scale(scale, y, out):
    y, out = row(y), row(out)
    for e in range(LANES):
        out[e] = scale * y[e]


@jit()
def _gate(scale, y, z, out):
    y, z, out = row(y), row(z), row(out)
    for e in range(LANES):
        out[e] = scale * y[e] * (z[e] * sigmoid(z[e]))


def scan_forward_rows(n: int) -> int:
    """Rows of scratch memory that `scan_forward` needs."""
    return 9 + 2 * n


@kernel
def scan_forward(
    u, delta, A_0, A_1, B, C, D_0, D_1, z, bias_0, bias_1, h0, out, last, states,
    directions, batch, length, d, n, bc_s, bc_b, bc_l, z_b, z_l, softplus, reversed_first, scale,
    scratch, first, end,
):  # fmt: skip
    """Tasks [first, end) of batch * blocks.

    Tensors:
        u, delta (s, b, l, d), h0 (s, b, d, n); for each direction A (d, n), D, bias (d,).
        B, C (s, b, l, n) with strides bc_s, bc_b, bc_l, 1; z (b, l, d) with strides z_b, z_l, 1.
        out (b, l, d): scale * sum over directions * silu(z).
        last (s, b, d, n).  states (s, b, blocks, chunks, n, LANES): h before each chunk.
    Direction 0 reads last to first if `reversed_first`, direction 1 always does.
    """
    scale = f32(scale)
    blocks, chunks = (d + LANES - 1) // LANES, (length + CHUNK - 1) // CHUNK
    dt, x, y, D_row, bias_row = (scratch, scratch + ROW, scratch + 2 * ROW,
                                 scratch + 3 * ROW, scratch + 4 * ROW)  # fmt: skip
    pads = scratch + 5 * ROW
    A2, h = scratch + 9 * ROW, scratch + (9 + n) * ROW
    for task in range(first, end):
        b, block = task // blocks, task % blocks
        e0 = block * LANES
        width = min(LANES, d - e0)
        for s in range(directions):
            A, D, bias = (A_1, D_1, bias_1) if s == 1 else (A_0, D_0, bias_0)
            sb, final = s * batch + b, s == directions - 1
            _load_state(A + e0 * n * FLOAT, width, n, LOG2E, A2)
            _load_state(h0 + (sb * d + e0) * n * FLOAT if h0 else 0, width, n, ONE, h)
            _load(D + e0 * FLOAT if D else 0, width, D_row)
            _load(bias + e0 * FLOAT if bias else 0, width, bias_row)
            for i in range(length):
                if states and i % CHUNK == 0:
                    checkpoint = ((sb * blocks + block) * chunks + i // CHUNK) * n
                    _copy(h, n, states + checkpoint * ROW)
                t = length - 1 - i if s == 1 or reversed_first else i
                token = sb * length + t
                offset = (token * d + e0) * FLOAT
                u_row = _read(u + offset, width, pads)
                delta_row = _read(delta + offset, width, pads + ROW)
                _step_size(softplus, *at((u_row, delta_row, D_row, bias_row, dt, x, y)))
                bc = (s * bc_s + b * bc_b + t * bc_l) * FLOAT
                _step(n, *at((dt, x, B + bc, C + bc, A2, h, y)))

                offset = ((b * length + t) * d + e0) * FLOAT
                if s > 0:
                    _add(*at((y, _read(out + offset, width, pads))))
                if not final:  # out holds direction 0 until direction 1 is added
                    _write(y, width, out + offset)
                else:
                    target = out + offset if width == LANES else pads + 2 * ROW
                    if z:
                        z_here = z + (b * z_b + t * z_l + e0) * FLOAT
                        _gate(scale, *at((y, _read(z_here, width, pads), target)))
                    else:
                        _scale(scale, *at((y, target)))
                    _write(target, width, out + offset)
            if last:
                _store_state(h, width, n, last + (sb * d + e0) * n * FLOAT)


# --- scan: backward --------------------------------------------------------------------------


@jit()
def _skip(D, u, y):
    """The skip connection: y = D u."""
    D, u, y = row(D), row(u), row(y)
    for e in range(LANES):
        y[e] = D[e] * u[e]


@jit()
def _step_size_with_slope(softplus, u, delta, bias, dt, slope, x):
    """dt, its derivative by delta (a sigmoid where dt is a softplus), and x = dt u."""
    u, delta, bias, dt, slope, x = row(u), row(delta), row(bias), row(dt), row(slope), row(x)
    if softplus:
        for e in range(LANES):
            v = delta[e] + bias[e]
            grown = exp2((THRESHOLD if v > THRESHOLD else v) * LOG2E)
            small, flat = log1p(grown), grown / (ONE + grown)
            dt[e] = v if v > THRESHOLD else small
            slope[e] = ONE if v > THRESHOLD else flat
    else:
        for e in range(LANES):
            dt[e] = delta[e] + bias[e]
            slope[e] = ONE
    for e in range(LANES):
        x[e] = dt[e] * u[e]


@jit()
def _recompute(n, dt, x, B, A2, h, decay, decayed):
    """Recompute one token of the recurrence, keeping a_t and a_t h_{t-1}."""
    dt, x, B, A2 = row(dt), row(x), floats(B, n), rows(A2, n)
    h, decay, decayed = rows(h, n), rows(decay, n), rows(decayed, n)
    for k in range(n):
        b, A_k, h_k, decay_k, decayed_k = B[k], A2[k], h[k], decay[k], decayed[k]
        for e in range(LANES):
            a = exp2(dt[e] * A_k[e])
            v = a * h_k[e]
            decay_k[e] = a
            decayed_k[e] = v
            h_k[e] = v + x[e] * b


@jit()
def _gate_gradient(scale, dout, z, dy):
    dout, z, dy = row(dout), row(z), row(dy)
    for e in range(LANES):
        dy[e] = dout[e] * scale * (z[e] * sigmoid(z[e]))


@jit()
def _z_gradient(scale, dout, z, y, dz):
    dout, z, y, dz = row(dout), row(z), row(y), row(dz)
    for e in range(LANES):
        s = sigmoid(z[e])
        dz[e] = dout[e] * scale * y[e] * (s * (ONE + z[e] * (ONE - s)))


@jit(sums=True)
def _adjoint_step(n, dt, x, dy, B, C, A2, decay, decayed, g, A_sum, y, gB, qA, dB, dC):
    """One token of the adjoint: g becomes a_t g_t; dB, dC over the channels, gB, qA over n.

    C h is added to y too, which dz needs: recomputing it is cheaper than saving it.
    """
    dt, x, dy, y, gB, qA = row(dt), row(x), row(dy), row(y), row(gB), row(qA)
    B, C, dB, dC = floats(B, n), floats(C, n), floats(dB, n), floats(dC, n)
    A2, decay, decayed = rows(A2, n), rows(decay, n), rows(decayed, n)
    g, A_sum = rows(g, n), rows(A_sum, n)
    for e in range(LANES):
        gB[e] = ZERO
        qA[e] = ZERO
    for k in range(n):
        b, c, g_k, A_k, sum_k = B[k], C[k], g[k], A2[k], A_sum[k]
        decay_k, decayed_k = decay[k], decayed[k]
        sum_b, sum_c = ZERO, ZERO
        for e in range(LANES):
            before = decayed_k[e]
            h = before + x[e] * b
            full = g_k[e] + dy[e] * c
            y[e] += h * c
            sum_c += dy[e] * h
            sum_b += full * x[e]
            gB[e] += full * b
            q = full * before
            qA[e] += q * A_k[e]
            sum_k[e] += q * dt[e]
            g_k[e] = full * decay_k[e]
        dB[k], dC[k] = sum_b, sum_c


@jit()
def _finish(u, dt, slope, dy, D, gB, qA, du, ddelta, D_sum, bias_sum):
    u, dt, slope, dy, D, gB, qA = (
        row(u), row(dt), row(slope), row(dy), row(D), row(gB), row(qA)
    )  # fmt: skip
    du, ddelta, D_sum, bias_sum = row(du), row(ddelta), row(D_sum), row(bias_sum)
    for e in range(LANES):
        du[e] = dy[e] * D[e] + gB[e] * dt[e]
        r = (gB[e] * u[e] + qA[e] * LN2) * slope[e]
        ddelta[e] = r
        bias_sum[e] += r
        D_sum[e] += dy[e] * u[e]


def scan_backward_rows(n: int) -> int:
    """Rows of scratch memory that `scan_backward` needs."""
    return 14 + 4 * n + CHUNK * (3 + 2 * n)


@kernel
def scan_backward(
    dout, dlast, u, delta, A_0, A_1, B, C, D_0, D_1, z, bias_0, bias_1, states,
    du, ddelta, dA, dB, dC, dD, dz, dbias, dh0,
    directions, batch, length, d, n, bc_s, bc_b, bc_l, z_b, z_l, dz_b, dz_l,
    softplus, reversed_first, scale, scratch, first, end,
):  # fmt: skip
    """Tasks [first, end) of batch * blocks; the arguments of `scan_forward`, and

    dout (b, l, d), dlast (s, b, d, n). Outputs are du, ddelta, dh0 in the shapes of u, delta and
    h0, dz (b, l, d) with strides dz_b, dz_l, 1, and the contributions of each task to sums: dA
    (s, b, d, n), dD, dbias (s, b, d), to be summed over b, and dB, dC (s, b, l, blocks, n), over
    the blocks.
    """
    scale = f32(scale)
    blocks, chunks = (d + LANES - 1) // LANES, (length + CHUNK - 1) // CHUNK
    dy, gB, qA, y = scratch, scratch + ROW, scratch + 2 * ROW, scratch + 13 * ROW
    D_row, bias_row, D_sum, bias_sum = (scratch + 3 * ROW, scratch + 4 * ROW,
                                        scratch + 5 * ROW, scratch + 6 * ROW)  # fmt: skip
    pads = scratch + 7 * ROW
    A2 = scratch + 14 * ROW
    h, g, A_sum = A2 + n * ROW, A2 + 2 * n * ROW, A2 + 3 * n * ROW
    dts = A2 + 4 * n * ROW
    xs, slopes = dts + CHUNK * ROW, dts + 2 * CHUNK * ROW
    decays = dts + 3 * CHUNK * ROW
    decayeds = decays + CHUNK * n * ROW
    for task in range(first, end):
        b, block = task // blocks, task % blocks
        e0 = block * LANES
        width = min(LANES, d - e0)
        for s in range(directions):
            A, D, bias = (A_1, D_1, bias_1) if s == 1 else (A_0, D_0, bias_0)
            sb = s * batch + b
            state = (sb * d + e0) * n * FLOAT
            _load_state(A + e0 * n * FLOAT, width, n, LOG2E, A2)
            _load_state(dlast + state if dlast else 0, width, n, ONE, g)
            _load_state(0, width, n, ONE, A_sum)
            _load(D + e0 * FLOAT if D else 0, width, D_row)
            _load(bias + e0 * FLOAT if bias else 0, width, bias_row)
            _load(0, width, D_sum)
            _load(0, width, bias_sum)
            for chunk in range(chunks - 1, -1, -1):
                start, stop = chunk * CHUNK, min((chunk + 1) * CHUNK, length)
                _copy(states + ((sb * blocks + block) * chunks + chunk) * n * ROW, n, h)
                for i in range(start, stop):
                    j = (i - start) * ROW
                    t = length - 1 - i if s == 1 or reversed_first else i
                    bc = (s * bc_s + b * bc_b + t * bc_l) * FLOAT
                    offset = ((sb * length + t) * d + e0) * FLOAT
                    u_row = _read(u + offset, width, pads)
                    delta_row = _read(delta + offset, width, pads + ROW)
                    dt, slope, x = dts + j, slopes + j, xs + j
                    decay, decayed = decays + j * n, decayeds + j * n
                    _step_size_with_slope(softplus, *at((u_row, delta_row, bias_row, dt, slope, x)))
                    _recompute(n, *at((dt, x, B + bc, A2, h, decay, decayed)))
                for i in range(stop - 1, start - 1, -1):
                    j = (i - start) * ROW
                    t = length - 1 - i if s == 1 or reversed_first else i
                    offset = ((b * length + t) * d + e0) * FLOAT
                    dout_row = _read(dout + offset, width, pads)
                    if z:
                        z_here = z + (b * z_b + t * z_l + e0) * FLOAT
                        z_row = _read(z_here, width, pads + ROW)
                        _gate_gradient(scale, *at((dout_row, z_row, dy)))
                    else:
                        z_row = 0
                        _scale(scale, *at((dout_row, dy)))
                    token = sb * length + t
                    u_row = _read(u + (token * d + e0) * FLOAT, width, pads + 2 * ROW)
                    _skip(*at((D_row, u_row, y)))
                    bc = (s * bc_s + b * bc_b + t * bc_l) * FLOAT
                    part = (token * blocks + block) * n * FLOAT
                    dt, slope, x = dts + j, slopes + j, xs + j
                    decay, decayed = decays + j * n, decayeds + j * n
                    _adjoint_step(n, *at((dt, x, dy, B + bc, C + bc, A2, decay, decayed, g, A_sum,
                                    y, gB, qA, dB + part, dC + part)))  # fmt: skip
                    if z:
                        dz_here = dz + (b * dz_b + t * dz_l + e0) * FLOAT
                        if s > 0:  # dz holds direction 0's y until direction 1's is added
                            _add(*at((y, _read(dz_here, width, pads + 3 * ROW))))
                        if s == directions - 1:
                            target = dz_here if width == LANES else pads + 3 * ROW
                            _z_gradient(scale, *at((dout_row, z_row, y, target)))
                            _write(target, width, dz_here)
                        else:
                            _write(y, width, dz_here)
                    offset = (token * d + e0) * FLOAT
                    du_row = du + offset if width == LANES else pads + 4 * ROW
                    ddelta_row = ddelta + offset if width == LANES else pads + 5 * ROW
                    _finish(*at((u_row, dt, slope, dy, D_row, gB, qA, du_row, ddelta_row,
                                D_sum, bias_sum)))  # fmt: skip
                    _write(du_row, width, du + offset)
                    _write(ddelta_row, width, ddelta + offset)
            _store_state(A_sum, width, n, dA + state)
            if dh0:
                _store_state(g, width, n, dh0 + state)
            _write(D_sum, width, dD + (sb * d + e0) * FLOAT)
            _write(bias_sum, width, dbias + (sb * d + e0) * FLOAT)


# --- convolution -----------------------------------------------------------------------------
#
# A task's tokens are first copied into rows of scratch with k - 1 rows of zeros at either end, so
# that no tap needs a boundary check. Row i of x's copy is token i - (k - 1); tap j of
# token t is then row t + j looking back, and row t + 2 (k - 1) - j looking ahead.


@jit()
def _gather(length, stride, width, source, target):
    """Tokens of a strided (length, d) matrix -> the first `width` lanes of rows."""
    full = rows(target, length)
    short = floats(source, (length - 1) * stride + width)
    for t in range(length):
        for e in range(width):
            full[t, e] = short[t * stride + e]


@jit()
def _gather_taps(d, k, width, source, target):
    """(width, k) -> k rows; lanes beyond are zero."""
    full, short = rows(target, k), floats(source, width * k)
    for j in range(k):
        for e in range(LANES):
            full[j, e] = short[e * k + j] if e < width else ZERO


@jit()
def _convolve(length, k, ahead, x, w, bias, y):
    """y_t = bias + the taps, for every token."""
    x, w, bias, y = rows(x, length + 2 * (k - 1)), rows(w, k), row(bias), rows(y, length)
    for t in range(length):
        y_t, w_0, x_0 = y[t], w[0], x[t + (2 * (k - 1) if ahead else 0)]
        for e in range(LANES):  # LLVM turns a loop that only copies the bias into scalar moves
            y_t[e] = bias[e] + w_0[e] * x_0[e]
        for j in range(1, k):
            w_j, x_j = w[j], x[t + (2 * (k - 1) - j if ahead else j)]
            for e in range(LANES):
                y_t[e] += w_j[e] * x_j[e]


@jit()
def _silu_out(length, d, width, y, out):
    y, out = rows(y, length), floats(out, (length - 1) * d + width)
    for t in range(length):
        y_t = y[t]
        for e in range(LANES):
            y_t[e] = y_t[e] * sigmoid(y_t[e])
        for e in range(width):
            out[t * d + e] = y_t[e]


@jit()
def _silu_gradient(length, y, dout):
    """Replace the pre-activation y by its gradient."""
    y, dout = rows(y, length), rows(dout, length)
    for t in range(length):
        y_t, dout_t = y[t], dout[t]
        for e in range(LANES):
            s = sigmoid(y_t[e])
            y_t[e] = dout_t[e] * (s * (ONE + y_t[e] * (ONE - s)))


@jit()
def _correlate(length, k, ahead, x, dy, dw, dbias):
    """dw_j = sum_t dy_t x_(tap j of t), dbias = sum_t dy_t; both start from zeros."""
    x, dy, dw, dbias = rows(x, length + 2 * (k - 1)), rows(dy, length), rows(dw, k), row(dbias)
    for t in range(length):
        dy_t = dy[t]
        for e in range(LANES):
            dbias[e] += dy_t[e]
        for j in range(k):
            dw_j, x_j = dw[j], x[t + (2 * (k - 1) - j if ahead else j)]
            for e in range(LANES):
                dw_j[e] += dy_t[e] * x_j[e]


@jit()
def _convolve_transposed(length, k, ahead, dy, w, dx):
    """dx_t += sum_j w_j dy of the token whose tap j is t; dy has k - 1 zero rows at either end."""
    dy, w, dx = rows(dy, length + 2 * (k - 1)), rows(w, k), rows(dx, length)
    for t in range(length):
        dx_t = dx[t]
        for j in range(k):
            w_j, dy_j = w[j], dy[t + (j if ahead else 2 * (k - 1) - j)]
            for e in range(LANES):
                dx_t[e] += w_j[e] * dy_j[e]


@jit()
def _clear(n, target):
    m = floats(target, n * LANES)
    for i in range(n * LANES):
        m[i] = ZERO


@jit()
def _scatter(length, d, width, source, target):
    """Rows -> the first `width` columns of a (length, d) matrix."""
    full, short = rows(source, length), floats(target, (length - 1) * d + width)
    for t in range(length):
        for e in range(width):
            short[t * d + e] = full[t, e]


@jit()
def _scatter_taps(k, width, source, target):
    full, short = rows(source, k), floats(target, width * k)
    for e in range(width):
        for j in range(k):
            short[e * k + j] = full[j, e]


@kernel
def conv_forward(
    x, weight_0, weight_1, bias_0, bias_1, out, directions, batch, length, d, k, x_b, x_l, reverse,
    scratch, first, end,
):  # fmt: skip
    """Tasks [first, end) of batch * blocks: x (b, l, d) with strides x_b, x_l, 1; for each
    direction weight (d, k) and bias (d,); out (s, b, l, d)."""
    blocks = (d + LANES - 1) // LANES
    xs, taps = scratch, scratch + (length + 2 * (k - 1)) * ROW
    bias_row, ys = taps + k * ROW, taps + (k + 1) * ROW
    for task in range(first, end):
        b, e0 = task // blocks, task % blocks * LANES
        width = min(LANES, d - e0)
        source = x + (b * x_b + e0) * FLOAT
        _gather(length, x_l, width, *at((source, xs + (k - 1) * ROW)))
        for s in range(directions):
            weight, bias = (weight_1, bias_1) if s == 1 else (weight_0, bias_0)
            _gather_taps(d, k, width, *at((weight + e0 * k * FLOAT, taps)))
            _gather_taps(d, 1, width, *at((bias + e0 * FLOAT, bias_row)))
            _convolve(length, k, s == 1 or reverse, *at((xs, taps, bias_row, ys)))
            target = out + ((s * batch + b) * length * d + e0) * FLOAT
            _silu_out(length, d, width, *at((ys, target)))


@kernel
def conv_backward(
    dout, x, weight_0, weight_1, bias_0, bias_1, dx, dweight, dbias,
    directions, batch, length, d, k, x_b, x_l, dx_b, dx_l, reverse, scratch, first, end,
):  # fmt: skip
    """Outputs are dx (b, l, d) with strides dx_b, dx_l, 1 and each task's contribution to sums over
    b: dweight (s, b, d, k), dbias (s, b, d)."""
    blocks = (d + LANES - 1) // LANES
    padded = length + 2 * (k - 1)
    xs, dys = scratch, scratch + padded * ROW
    douts, dxs = dys + padded * ROW, dys + (padded + length) * ROW
    taps = dxs + length * ROW
    bias_row, dtaps, dbias_row = taps + k * ROW, taps + (k + 1) * ROW, taps + (2 * k + 1) * ROW
    inner = dys + (k - 1) * ROW
    for task in range(first, end):
        b, e0 = task // blocks, task % blocks * LANES
        width = min(LANES, d - e0)
        source = x + (b * x_b + e0) * FLOAT
        _gather(length, x_l, width, *at((source, xs + (k - 1) * ROW)))
        _clear(length, *at((dxs,)))
        for s in range(directions):
            ahead = s == 1 or reverse
            sb = s * batch + b
            weight, bias = (weight_1, bias_1) if s == 1 else (weight_0, bias_0)
            _gather_taps(d, k, width, *at((weight + e0 * k * FLOAT, taps)))
            _gather_taps(d, 1, width, *at((bias + e0 * FLOAT, bias_row)))
            _gather(length, d, width, *at((dout + (sb * length * d + e0) * FLOAT, douts)))
            _convolve(length, k, ahead, *at((xs, taps, bias_row, inner)))
            _silu_gradient(length, *at((inner, douts)))
            _clear(k, *at((dtaps,)))
            _clear(1, *at((dbias_row,)))
            _correlate(length, k, ahead, *at((xs, inner, dtaps, dbias_row)))
            _convolve_transposed(length, k, ahead, *at((dys, taps, dxs)))
            part = sb * d + e0
            _scatter_taps(k, width, *at((dtaps, dweight + part * k * FLOAT)))
            _scatter_taps(1, width, *at((dbias_row, dbias + part * FLOAT)))
        _scatter(length, dx_l, width, *at((dxs, dx + (b * dx_b + e0) * FLOAT)))
