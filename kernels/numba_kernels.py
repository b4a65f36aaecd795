"""The CPU kernels, compiled by numba: scan, convolution and norm, forward and backward, and the
projection between convolution and scan.

All are in one file because numba's disk cache detects changes only in the file of the kernel.

A task of the scan and the convolution is one image and one block of `LANES` channels; it iterates
over the tokens of one direction after the other, so nothing is flipped and no two tasks write the
same memory. Channels are innermost everywhere, also in the state (n, LANES), so every inner loop
has a fixed length: it is written with vectors of 16 channels. A last block with fewer channels is
processed in padded rows. The mathematics of the scan is in `selective_scan/torch_backend.py`; in
this file A carries a factor log2(e), since 2^x is cheap.

Everything is float32. Tensors are addresses (``tensor.data_ptr()``) in bytes, 0 for an absent one:
passing a NumPy array costs a microsecond, and slicing one a reference count. So a kernel has one
signature of integers and floats and is compiled once; later processes load it from numba's disk
cache (beside this file, or in the user's cache folder if that is read-only; ``NUMBA_CACHE_DIR``
moves it). The parameters of two directions have an address each (``A_0``, ``A_1``), so they need
not be stacked; that of direction 1 is 0 if there is one direction.

numba from PyPI includes no vector library, so 2^x and the softplus are short polynomials in this
file. Flags that assume finite numbers are not set, so that infinities and NaN propagate.
"""

import contextlib
import logging
import operator

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils, event
from numba.core.caching import FunctionCache
from numba.core.dispatcher import Dispatcher
from numba.core.typing import signature
from numba.core.typing.templates import ConcreteTemplate, infer_global
from numba.extending import intrinsic, lower_builtin, models, register_model

log = logging.getLogger(__name__)
f32 = np.float32
ZERO, ONE = f32(0), f32(1)
LOG2E, LN2 = f32(1.4426950408889634), f32(0.6931471805599453)
LANES = 64  # channels of a block; a multiple of WIDTH
WIDTH = 16  # floats of a vector
FLOAT = 4  # bytes
VECTOR, ROW = WIDTH * FLOAT, LANES * FLOAT

CHUNK = 32  # tokens between saved states; one chunk's states and decays stay in the L2 cache

NORM_TOKENS = 32  # tokens of a task of the norm's backward pass

# No 'reassoc': it would fold the rounding trick (x + ROUND) - ROUND into x.
SAFE = ("contract", "nsz")
# Wrappers for calls from C and from Python, and rewrites of array expressions, would take a quarter
# of the time of a compilation.
OPTIONS = {
    "fastmath": set(SAFE), "error_model": "numpy", "no_cfunc_wrapper": True, "no_rewrites": True,
}  # fmt: skip


def jit(function, **options):
    """`numba.njit` for functions that kernels call."""
    return njit(**OPTIONS, no_cpython_wrapper=True, **options)(function)


def inlined(function):
    return jit(function, forceinline=True)


def kernel(function):
    """`numba.njit` for functions that Python calls: releases the GIL, compiled at the first call.

    The arguments are always integers, booleans and floats, so there is one compilation, which later
    processes load from disk.
    """
    compiled = njit(**OPTIONS, nogil=True)(function)
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


# --- vectors ---------------------------------------------------------------------------------
#
# A vector is 16 floats: two registers of AVX2, one of AVX-512, four of NEON. LLVM would vectorise
# loops over floats too, but one register after the other: the operations of an exponential depend
# on each other, and a processor looks ahead by only a few of them. A vector is one value, so LLVM
# computes its registers side by side.


class _Floats(types.Type):
    """The numba type of a vector."""


class _Flags(types.Type):
    """The numba type of a comparison of vectors."""


V, FLAGS, F = _Floats("floats"), _Flags("flags"), types.float32
IR_V, IR_INTS, IR_FLAGS = (
    ir.VectorType(kind, WIDTH) for kind in (ir.FloatType(), ir.IntType(32), ir.IntType(1))
)
register_model(_Floats)(lambda manager, kind: models.PrimitiveModel(manager, kind, IR_V))
register_model(_Flags)(lambda manager, kind: models.PrimitiveModel(manager, kind, IR_FLAGS))


def _vectors(builder, values, kinds):
    """Vectors as they are; a number becomes a vector of equal floats."""
    undefined, first = ir.Constant(IR_V, ir.Undefined), ir.Constant(ir.IntType(32), 0)
    return [
        value if kind == V else builder.shuffle_vector(
            builder.insert_element(undefined, value, first), undefined, ir.Constant(IR_INTS, None)
        )
        for value, kind in zip(values, kinds, strict=True)
    ]  # fmt: skip


def _define(symbol, result, instruction):
    """Define a binary operator for two vectors, or a vector and a number."""
    pairs = ((V, V), (V, F), (F, V))
    cases = [signature(result, *pair) for pair in pairs]
    infer_global(symbol)(type(symbol.__name__, (ConcreteTemplate,), {"cases": cases}))

    def codegen(context, builder, sig, args):
        return instruction(builder, *_vectors(builder, args, sig.args))

    for pair in pairs:
        lower_builtin(symbol, *pair)(codegen)


_define(operator.add, V, lambda builder, a, b: builder.fadd(a, b, flags=SAFE))
_define(operator.sub, V, lambda builder, a, b: builder.fsub(a, b, flags=SAFE))
_define(operator.mul, V, lambda builder, a, b: builder.fmul(a, b, flags=SAFE))
_define(operator.truediv, V, lambda builder, a, b: builder.fdiv(a, b, flags=SAFE))
_define(operator.lt, FLAGS, lambda builder, a, b: builder.fcmp_ordered("<", a, b))
_define(operator.gt, FLAGS, lambda builder, a, b: builder.fcmp_ordered(">", a, b))


def _call(builder, name, result, args, **options):
    """Call a function of LLVM's that takes vectors."""
    kind = ir.FunctionType(result, [arg.type for arg in args])
    function = cgutils.get_or_insert_function(builder.module, kind, f"{name}.v{WIDTH}f32")
    return builder.call(function, args, **options)


@intrinsic
def load(typingctx, address):
    """The vector at an address."""

    def codegen(context, builder, sig, args):
        return builder.load(builder.inttoptr(args[0], IR_V.as_pointer()), align=FLOAT)

    return V(address), codegen


@intrinsic
def number(typingctx, address):
    """The float at an address."""

    def codegen(context, builder, sig, args):
        return builder.load(builder.inttoptr(args[0], ir.FloatType().as_pointer()))

    return F(address), codegen


@intrinsic
def store(typingctx, address, value):
    """Write a vector or a float to an address."""

    def codegen(context, builder, sig, args):
        pointer = builder.inttoptr(args[0], args[1].type.as_pointer())
        builder.store(args[1], pointer, align=FLOAT)
        return context.get_dummy_value()

    return types.void(address, value), codegen


@intrinsic
def prefetch(typingctx, address):
    """Ask for the memory of a vector, perhaps in vain: the address may be invalid."""

    def codegen(context, builder, sig, args):
        byte, flag = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, flag, flag, flag])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
        read_keep_data = [ir.Constant(flag, value) for value in (0, 3, 1)]
        builder.call(function, [builder.inttoptr(args[0], byte), *read_keep_data])
        return context.get_dummy_value()

    return types.void(address), codegen


@intrinsic
def vector(typingctx, number):
    """A vector of equal floats."""

    def codegen(context, builder, sig, args):
        return _vectors(builder, args, sig.args)[0]

    return V(number), codegen


@intrinsic
def where(typingctx, flags, a, b):
    def codegen(context, builder, sig, args):
        return builder.select(args[0], *_vectors(builder, args[1:], sig.args[1:]))

    return V(flags, a, b), codegen


@intrinsic
def everywhere(typingctx, flags):
    """True if all flags are."""

    def codegen(context, builder, sig, args):
        bits = builder.bitcast(args[0], ir.IntType(WIDTH))
        return builder.icmp_unsigned("==", bits, ir.Constant(bits.type, 2**WIDTH - 1))

    return types.boolean(flags), codegen


@intrinsic
def total(typingctx, v):
    """The sum of a vector's floats."""

    def codegen(context, builder, sig, args):
        zero = ir.Constant(ir.FloatType(), 0.0)
        options = {"fastmath": (*SAFE, "reassoc")}
        return _call(builder, "llvm.vector.reduce.fadd", ir.FloatType(), [zero, *args], **options)

    return F(v), codegen


@intrinsic
def multiply_add(typingctx, a, b, c):
    """a b + c, rounded once if the processor can."""

    def codegen(context, builder, sig, args):
        return _call(builder, "llvm.fmuladd", IR_V, _vectors(builder, args, sig.args))

    return V(a, b, c), codegen


@intrinsic
def absolute(typingctx, v):
    def codegen(context, builder, sig, args):
        return _call(builder, "llvm.fabs", IR_V, args)

    return V(v), codegen


@intrinsic
def power(typingctx, rounded):
    """2^i, where the low bits of `rounded` are i plus the exponent's bias."""

    def codegen(context, builder, sig, args):
        bits = builder.bitcast(args[0], IR_INTS)
        return builder.bitcast(builder.shl(bits, ir.Constant(IR_INTS, [23] * WIDTH)), IR_V)

    return V(rounded), codegen


@intrinsic
def add_exponent(typingctx, v, rounded):
    """2^i v by an addition of integers, where the low bits of `rounded` are i."""

    def codegen(context, builder, sig, args):
        bits, low = (builder.bitcast(arg, IR_INTS) for arg in args)
        exponent = builder.shl(low, ir.Constant(IR_INTS, [23] * WIDTH))
        return builder.bitcast(builder.add(bits, exponent), IR_V)

    return V(v, rounded), codegen


# --- elementary functions --------------------------------------------------------------------

ROUND = f32(12582912)  # adding 1.5 * 2^23 rounds a number to an integer in the low bits
BIASED = f32(12582912 + 127)  # with the exponent's bias
LOWEST, HIGHEST = f32(-127), f32(128)  # where the exponent's bits make 0 and infinity
NEAR = f32(125)  # |x| below it needs no care
# Minimax on [-1/2, 1/2] with the first two terms exact: products of thousands of decays near 1 need
# 2^0 = 1 and an exact slope at 0.
E1, E2, E3, E4, E5 = LN2, f32(0.24022282), f32(0.0555056), f32(0.00966971), f32(0.00133003)
# log(1 + w) / w on [0, 1], minimax
P0, P1, P2, P3, P4, P5, P6, P7, P8 = (f32(p) for p in (
    0.9999999403953552, -0.4999949336051941, 0.3331909775733948, -0.2484298199415207,
    0.19106008112430573, -0.13663247227668762, 0.07822596281766891, -0.02950524352490902,
    0.005232694558799267,
))  # fmt: skip


@inlined
def _fraction_power(f):
    """2^f for f in [-1/2, 1/2]."""
    return ((((f * E5 + E4) * f + E3) * f + E2) * f + E1) * f + ONE


@inlined
def exp2_below(x):
    """2^x for x < HIGHEST, to 2e-7 relative and 0 below -126.5: the integer part becomes the
    exponent, a polynomial does the rest."""
    x = where(x < LOWEST, LOWEST, x)  # comparisons are written so that NaN propagates
    rounded = x + BIASED
    return _fraction_power(x - (rounded - BIASED)) * power(rounded)


@inlined
def exp2(x):
    return exp2_below(where(x > HIGHEST, HIGHEST, x))


@inlined
def near_exp2(a, b):
    """2^(a b) where |a b| < NEAR: without the limits, and the product is not rounded."""
    rounded = multiply_add(a, b, ROUND)
    return add_exponent(_fraction_power(multiply_add(a, b, ROUND - rounded)), rounded)


@inlined
def shrunk(v):
    """e^-|v|"""
    return exp2_below(absolute(v) * -LOG2E)


@inlined
def softplus_of(v, w):
    """log(1 + e^v), given w = e^-|v|, with full relative accuracy for very negative v. Above
    torch's threshold of 20, w is too small to change v."""
    p = ((((P8 * w + P7) * w + P6) * w + P5) * w + P4) * w + P3
    p = ((p * w + P2) * w + P1) * w + P0
    return where(v < ZERO, ZERO, v) + p * w


@inlined
def sigmoid_of(v, w):
    """1 / (1 + e^-v), given w = e^-|v|."""
    return where(v < ZERO, w, ONE) / (ONE + w)


@inlined
def silu(v):
    return v * sigmoid_of(v, shrunk(v))


@inlined
def silu_slope(v):
    s = sigmoid_of(v, shrunk(v))
    return s * (ONE + v * (ONE - s))


# --- rows ------------------------------------------------------------------------------------
#
# A row is LANES floats. Vectors of a row are at its address + e, e in range(0, ROW, VECTOR).


@jit
def _read(source, width, pad):
    """The address of a full row: the source, or a copy in `pad` if it is shorter than LANES, with
    zeros beyond, where results of other tokens may have left NaN."""
    if width == LANES:
        return source
    _clear(1, pad)
    for e in range(0, width * FLOAT, FLOAT):
        store(pad + e, number(source + e))
    return pad


@jit
def _write(source, width, target):
    """Copy a row to the target, unless it was written there directly."""
    if source != target:
        for e in range(0, width * FLOAT, FLOAT):
            store(target + e, number(source + e))


@jit
def _clear(n, target):
    """Zeros in n rows."""
    for e in range(0, n * ROW, VECTOR):
        store(target + e, vector(ZERO))


@jit
def _prefetch(source):
    """Ask for a row. Rows of a tensor lie apart, which the processor does not foresee."""
    for e in range(0, ROW, VECTOR):
        prefetch(source + e)


@jit
def _copy(source, target):
    for e in range(0, ROW, VECTOR):
        store(target + e, load(source + e))


@jit
def _load(source, width, target):
    """Copy a row of `width` floats, or none without a source; zeros in the rest."""
    _clear(1, target)
    if source:
        _write(source, width, target)


@jit
def _load_columns(source, width, n, factor, target, step):
    """(width, n) -> n rows, each `step` bytes after the other, channels innermost; zeros beyond
    `width` and without a source."""
    for k in range(n):
        if width < LANES or source == 0:
            _clear(1, target + k * step)
    if source:
        for e in range(width):
            for k in range(n):
                here = source + (e * n + k) * FLOAT
                store(target + k * step + e * FLOAT, factor * number(here))


@jit
def _store_columns(source, step, width, n, target):
    """n rows, each `step` bytes after the other -> (width, n)."""
    for e in range(width):
        for k in range(n):
            here = source + k * step + e * FLOAT
            store(target + (e * n + k) * FLOAT, number(here))


# --- scan ------------------------------------------------------------------------------------
#
# Rows that a loop uses together have one address, since a processor has few registers for
# addresses. These are their offsets in bytes:

# of a block of channels
SKIP, BIAS, PEAK, SKIP_SUM, BIAS_SUM, CHANNEL_ROWS = (i * ROW for i in range(6))
# of a token: the step size, its slope, x = dt u, the gradient of y
DT, SLOPE, X, DY, TOKEN_ROWS = (i * ROW for i in range(5))
# of one of n states, forward: A log2(e) and h; backward: A log2(e), the adjoint, A's gradient
A2, H, FORWARD_ROWS = (i * ROW for i in range(3))
A2, G, A_SUM, BACKWARD_ROWS = (i * ROW for i in range(4))
# of one of n states at a token: a_t and h_t
DECAY, AFTER, SAVED_ROWS = (i * ROW for i in range(3))
# of the sums over n: <g, B> and <q, A2>
GB, QA, SUM_ROWS = (i * ROW for i in range(3))


@jit
def _load_channels(A, logarithm, D, bias, width, n, of_n, step, channels):
    """Parameters of a block of channels; with `logarithm`, A is the logarithm of -A. PEAK is
    max |A2| over n, NaN if one is not finite."""
    _load_columns(A, width, n, LOG2E, of_n + A2, step)
    _load(D, width, channels + SKIP)
    _load(bias, width, channels + BIAS)
    _clear(3, channels + PEAK)  # and the sums
    for k in range(n):
        for e in range(0, ROW, VECTOR):
            here = of_n + k * step + A2 + e
            if logarithm:
                store(here, exp2(load(here)) * -LOG2E)
            a, peak = absolute(load(here)), load(channels + PEAK + e)
            store(channels + PEAK + e, where(peak < a, a, peak) + a * ZERO)


# --- scan: forward ---------------------------------------------------------------------------


@jit
def _step_size(softplus, u, delta, channels, token, y):
    """dt = softplus(delta + bias), x = dt u, y = D u. Returns whether `near_exp2` can compute the
    token's decays, 2^(dt A2)."""
    near = True
    for e in range(0, ROW, VECTOR):
        dt, u_e = load(delta + e) + load(channels + BIAS + e), load(u + e)
        if softplus:
            dt = softplus_of(dt, shrunk(dt))
        store(token + DT + e, dt)
        store(token + X + e, dt * u_e)
        store(y + e, load(channels + SKIP + e) * u_e)
        near &= everywhere(absolute(dt) * load(channels + PEAK + e) < NEAR)
    return near


@jit
def _combine(r, factors, of_r, target):
    """The sum of r rows, each times one of the numbers at `factors`; it stays in registers."""
    v_0 = v_1 = v_2 = v_3 = vector(ZERO)
    for j in range(r):
        factor, row = number(factors + j * FLOAT), of_r + j * ROW
        v_0 = v_0 + factor * load(row)
        v_1 = v_1 + factor * load(row + VECTOR)
        v_2 = v_2 + factor * load(row + 2 * VECTOR)
        v_3 = v_3 + factor * load(row + 3 * VECTOR)
    store(target, v_0)
    store(target + VECTOR, v_1)
    store(target + 2 * VECTOR, v_2)
    store(target + 3 * VECTOR, v_3)


@inlined
def _advance(decay, h, x, b, c, y):
    """The next h = decay h + x B, and y += C h."""
    h = decay * h + x * b
    store(y, load(y) + h * c)
    return h


@jit
def _step(n, near, token, B, C, of_n, y):
    """One token of the recurrence."""
    for k in range(n):
        b, c, i = number(B + k * FLOAT), number(C + k * FLOAT), of_n + k * FORWARD_ROWS
        if near:
            for e in range(0, ROW, VECTOR):
                decay = near_exp2(load(token + DT + e), load(i + A2 + e))
                h = _advance(decay, load(i + H + e), load(token + X + e), b, c, y + e)
                store(i + H + e, h)
        else:
            for e in range(0, ROW, VECTOR):
                decay = exp2(load(token + DT + e) * load(i + A2 + e))
                h = _advance(decay, load(i + H + e), load(token + X + e), b, c, y + e)
                store(i + H + e, h)


@jit
def _gate(scale, y, other, z, out):
    """scale (y + other) silu(z); other and z may be absent."""
    for e in range(0, ROW, VECTOR):
        v = load(y + e)
        if other:
            v = v + load(other + e)
        v = v * scale
        if z:
            v = v * silu(load(z + e))
        store(out + e, v)


def scan_forward_rows(n: int, r: int) -> int:
    """Rows of scratch memory that `scan_forward` needs."""
    return (CHANNEL_ROWS + TOKEN_ROWS + n * FORWARD_ROWS) // ROW + 4 + r


@kernel
def scan_forward(
    u, delta, proj_0, proj_1, A_0, A_1, B, C, D_0, D_1, z, bias_0, bias_1, h0, out, last, states,
    directions, batch, length, d, n, r, delta_s, delta_b, delta_l, bc_s, bc_b, bc_l, z_b, z_l,
    logarithm, softplus, reversed_first, scale, scratch, first, end,
):  # fmt: skip
    """Tasks [first, end) of batch * blocks.

    Tensors:
        u (s, b, l, d), h0 (s, b, d, n); for each direction A (d, n), D, bias (d,).
        delta (s, b, l, d) with strides delta_s, delta_b, delta_l, 1; or, if r > 0, (s, b, l, r),
        which proj (d, r) of its direction projects to d channels.
        With `logarithm`, A is the logarithm of -A.
        B, C (s, b, l, n) with strides bc_s, bc_b, bc_l, 1; z (b, l, d) with strides z_b, z_l, 1.
        out (b, l, d): scale * sum over directions * silu(z).
        last (s, b, d, n).  states (s, b, blocks, chunks, n, LANES): h before each chunk.
    Direction 0 reads last to first if `reversed_first`, direction 1 always does.
    """
    scale = f32(scale)
    blocks, chunks = (d + LANES - 1) // LANES, (length + CHUNK - 1) // CHUNK
    y_row, pads, channels = scratch, scratch + ROW, scratch + 4 * ROW
    token = channels + CHANNEL_ROWS
    of_n = token + TOKEN_ROWS
    of_r = of_n + n * FORWARD_ROWS
    for task in range(first, end):
        b, block = task // blocks, task % blocks
        e0 = block * LANES
        width = min(LANES, d - e0)
        for s in range(directions):
            proj, A, D, bias = (proj_1, A_1, D_1, bias_1) if s == 1 else (proj_0, A_0, D_0, bias_0)
            sb, final = s * batch + b, s == directions - 1
            state = (sb * d + e0) * n * FLOAT
            _load_channels(A + e0 * n * FLOAT, logarithm, D + e0 * FLOAT if D else 0,
                           bias + e0 * FLOAT if bias else 0, width, n, of_n, FORWARD_ROWS,
                           channels)  # fmt: skip
            _load_columns(h0 + state if h0 else 0, width, n, ONE, of_n + H, FORWARD_ROWS)
            _load_columns(proj + e0 * r * FLOAT, width, r, ONE, of_r, ROW)
            for i in range(length):
                if states and i % CHUNK == 0:
                    target = states + ((sb * blocks + block) * chunks + i // CHUNK) * n * ROW
                    for k in range(n):
                        _copy(of_n + k * FORWARD_ROWS + H, target + k * ROW)
                t = length - 1 - i if s == 1 or reversed_first else i
                here = out + ((b * length + t) * d + e0) * FLOAT
                # out holds direction 0 until direction 1 is added
                y = here if width == LANES and not final else y_row
                offset = ((sb * length + t) * d + e0) * FLOAT
                u_row = _read(u + offset, width, pads)
                ahead = -1 if s == 1 or reversed_first else 1
                _prefetch(u + offset + ahead * d * FLOAT)
                step = delta + (s * delta_s + b * delta_b + t * delta_l) * FLOAT
                if r:
                    delta_row = pads + ROW
                    _combine(r, step, of_r, delta_row)
                else:
                    delta_row = _read(step + e0 * FLOAT, width, pads + ROW)
                    _prefetch(step + (ahead * delta_l + e0) * FLOAT)
                near = _step_size(softplus, u_row, delta_row, channels, token, y)
                if final:
                    _prefetch(here + ahead * d * FLOAT)
                    if z:
                        _prefetch(z + (b * z_b + (t + ahead) * z_l + e0) * FLOAT)
                bc = (s * bc_s + b * bc_b + t * bc_l) * FLOAT
                _step(n, near, token, B + bc, C + bc, of_n, y)
                if final:
                    z_here = z + (b * z_b + t * z_l + e0) * FLOAT
                    z_row = _read(z_here, width, pads) if z else 0
                    other = _read(here, width, pads + ROW) if s > 0 else 0
                    y = here if width == LANES else pads + 2 * ROW
                    _gate(scale, y_row, other, z_row, y)
                _write(y, width, here)
            if last:
                _store_columns(of_n + H, FORWARD_ROWS, width, n, last + state)


# --- scan: backward --------------------------------------------------------------------------


@jit
def _prepare(softplus, scale, u, delta, dout, z, channels, token, y):
    """`_step_size`, the slope of dt by delta, and the gradient of y, scale dout silu(z)."""
    near = True
    for e in range(0, ROW, VECTOR):
        dt, u_e = load(delta + e) + load(channels + BIAS + e), load(u + e)
        slope, dy = vector(ONE), load(dout + e) * scale
        if softplus:
            w = shrunk(dt)
            slope = sigmoid_of(dt, w)
            dt = softplus_of(dt, w)
        if z:
            dy = dy * silu(load(z + e))
        store(token + DT + e, dt)
        store(token + SLOPE + e, slope)
        store(token + X + e, dt * u_e)
        store(token + DY + e, dy)
        store(y + e, load(channels + SKIP + e) * u_e)
        near &= everywhere(absolute(dt) * load(channels + PEAK + e) < NEAR)
    return near


@jit
def _step_saving(n, near, token, B, C, of_n, saved, y):
    """`_step` from the states of the token before, at `saved` - n SAVED_ROWS, to those of this one,
    saving the decays too."""
    for k in range(n):
        b, c, i = number(B + k * FLOAT), number(C + k * FLOAT), of_n + k * BACKWARD_ROWS
        now = saved + k * SAVED_ROWS
        before = now - n * SAVED_ROWS
        if near:
            for e in range(0, ROW, VECTOR):
                decay = near_exp2(load(token + DT + e), load(i + A2 + e))
                h = _advance(decay, load(before + AFTER + e), load(token + X + e), b, c, y + e)
                store(now + DECAY + e, decay)
                store(now + AFTER + e, h)
        else:
            for e in range(0, ROW, VECTOR):
                decay = exp2(load(token + DT + e) * load(i + A2 + e))
                h = _advance(decay, load(before + AFTER + e), load(token + X + e), b, c, y + e)
                store(now + DECAY + e, decay)
                store(now + AFTER + e, h)


@jit
def _z_gradient(scale, dout, z, y, other, dz):
    """scale dout (y + other) silu'(z); other may be absent."""
    for e in range(0, ROW, VECTOR):
        v = load(y + e)
        if other:
            v = v + load(other + e)
        store(dz + e, load(dout + e) * scale * v * silu_slope(load(z + e)))


@jit
def _adjoint_step(n, token, B, C, of_n, saved, sums, dB, dC):
    """One token of the adjoint: G becomes a_t g_t; dB, dC over the channels, GB, QA over n."""
    _clear(2, sums)
    for k in range(n):
        b, c, i = number(B + k * FLOAT), number(C + k * FLOAT), of_n + k * BACKWARD_ROWS
        now = saved + k * SAVED_ROWS
        before = now - n * SAVED_ROWS
        sum_b, sum_c = vector(ZERO), vector(ZERO)
        for e in range(0, ROW, VECTOR):
            dy, decay = load(token + DY + e), load(now + DECAY + e)
            g = load(i + G + e) + dy * c
            q = g * (decay * load(before + AFTER + e))
            sum_c = sum_c + dy * load(now + AFTER + e)
            sum_b = sum_b + g * load(token + X + e)
            store(i + G + e, g * decay)
            store(i + A_SUM + e, load(i + A_SUM + e) + q * load(token + DT + e))
            store(sums + GB + e, load(sums + GB + e) + g * b)
            store(sums + QA + e, load(sums + QA + e) + q * load(i + A2 + e))
        store(dB + k * FLOAT, total(sum_b))
        store(dC + k * FLOAT, total(sum_c))


@jit
def _finish(u, channels, token, sums, du, ddelta):
    """The gradients of u and delta, and one token's part of those of D and bias."""
    for e in range(0, ROW, VECTOR):
        u_e, dy, gB = load(u + e), load(token + DY + e), load(sums + GB + e)
        gradient = (gB * u_e + load(sums + QA + e) * LN2) * load(token + SLOPE + e)
        store(du + e, dy * load(channels + SKIP + e) + gB * load(token + DT + e))
        store(ddelta + e, gradient)
        store(channels + BIAS_SUM + e, load(channels + BIAS_SUM + e) + gradient)
        store(channels + SKIP_SUM + e, load(channels + SKIP_SUM + e) + dy * u_e)


def scan_backward_rows(n: int) -> int:
    """Rows of scratch memory that `scan_backward` needs."""
    of_chunk = CHUNK * TOKEN_ROWS + (CHUNK + 1) * n * SAVED_ROWS
    return (CHANNEL_ROWS + SUM_ROWS + n * BACKWARD_ROWS + of_chunk) // ROW + 6


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

    Chunk by chunk, last to first: the recurrence is recomputed from the saved state, which also
    gives dz, then the adjoint runs back.
    """
    scale = f32(scale)
    blocks, chunks = (d + LANES - 1) // LANES, (length + CHUNK - 1) // CHUNK
    y, pads, channels = scratch, scratch + ROW, scratch + 6 * ROW
    sums = channels + CHANNEL_ROWS
    of_n = sums + SUM_ROWS
    tokens = of_n + n * BACKWARD_ROWS
    start_state = tokens + CHUNK * TOKEN_ROWS
    saveds = start_state + n * SAVED_ROWS
    for task in range(first, end):
        b, block = task // blocks, task % blocks
        e0 = block * LANES
        width = min(LANES, d - e0)
        for s in range(directions):
            A, D, bias = (A_1, D_1, bias_1) if s == 1 else (A_0, D_0, bias_0)
            sb = s * batch + b
            state = (sb * d + e0) * n * FLOAT
            _load_channels(A + e0 * n * FLOAT, False, D + e0 * FLOAT if D else 0,
                           bias + e0 * FLOAT if bias else 0, width, n, of_n, BACKWARD_ROWS,
                           channels)  # fmt: skip
            _load_columns(dlast + state if dlast else 0, width, n, ONE, of_n + G, BACKWARD_ROWS)
            _load_columns(0, width, n, ONE, of_n + A_SUM, BACKWARD_ROWS)
            for chunk in range(chunks - 1, -1, -1):
                start, stop = chunk * CHUNK, min((chunk + 1) * CHUNK, length)
                source = states + ((sb * blocks + block) * chunks + chunk) * n * ROW
                for k in range(n):
                    _copy(source + k * ROW, start_state + k * SAVED_ROWS + AFTER)
                for i in range(start, stop):
                    token = tokens + (i - start) * TOKEN_ROWS
                    t = length - 1 - i if s == 1 or reversed_first else i
                    offset = ((sb * length + t) * d + e0) * FLOAT
                    u_row = _read(u + offset, width, pads)
                    delta_row = _read(delta + offset, width, pads + ROW)
                    dout_here = dout + ((b * length + t) * d + e0) * FLOAT
                    dout_row = _read(dout_here, width, pads + 2 * ROW)
                    z_here = z + (b * z_b + t * z_l + e0) * FLOAT
                    z_row = _read(z_here, width, pads + 3 * ROW) if z else 0
                    near = _prepare(
                        softplus, scale, u_row, delta_row, dout_row, z_row, channels, token, y
                    )
                    ahead = -1 if s == 1 or reversed_first else 1
                    _prefetch(u + offset + ahead * d * FLOAT)
                    _prefetch(delta + offset + ahead * d * FLOAT)
                    _prefetch(dout_here + ahead * d * FLOAT)
                    if z:
                        _prefetch(z + (b * z_b + (t + ahead) * z_l + e0) * FLOAT)
                        _prefetch(dz + (b * dz_b + (t + ahead) * dz_l + e0) * FLOAT)
                    bc = (s * bc_s + b * bc_b + t * bc_l) * FLOAT
                    saved = saveds + (i - start) * n * SAVED_ROWS
                    _step_saving(n, near, token, B + bc, C + bc, of_n, saved, y)
                    if z:
                        here = dz + (b * dz_b + t * dz_l + e0) * FLOAT
                        if s < directions - 1:  # dz holds direction 0's y until direction 1's
                            _write(y, width, here)
                        else:
                            other = _read(here, width, pads) if s > 0 else 0
                            target = here if width == LANES else pads + 4 * ROW
                            _z_gradient(scale, dout_row, z_row, y, other, target)
                            _write(target, width, here)
                for i in range(stop - 1, start - 1, -1):
                    token = tokens + (i - start) * TOKEN_ROWS
                    t = length - 1 - i if s == 1 or reversed_first else i
                    bc = (s * bc_s + b * bc_b + t * bc_l) * FLOAT
                    saved = saveds + (i - start) * n * SAVED_ROWS
                    part = ((sb * length + t) * blocks + block) * n * FLOAT
                    offset = ((sb * length + t) * d + e0) * FLOAT
                    _prefetch(u + offset)
                    _prefetch(du + offset)
                    _prefetch(ddelta + offset)
                    _adjoint_step(n, token, B + bc, C + bc, of_n, saved, sums, dB + part, dC + part)
                    u_row = _read(u + offset, width, pads)
                    du_row = du + offset if width == LANES else pads + ROW
                    ddelta_row = ddelta + offset if width == LANES else pads + 2 * ROW
                    _finish(u_row, channels, token, sums, du_row, ddelta_row)
                    _write(du_row, width, du + offset)
                    _write(ddelta_row, width, ddelta + offset)
            _store_columns(of_n + A_SUM, BACKWARD_ROWS, width, n, dA + state)
            if dh0:
                _store_columns(of_n + G, BACKWARD_ROWS, width, n, dh0 + state)
            _write(channels + SKIP_SUM, width, dD + (sb * d + e0) * FLOAT)
            _write(channels + BIAS_SUM, width, dbias + (sb * d + e0) * FLOAT)


# --- convolution -----------------------------------------------------------------------------
#
# Row `lag` of a direction's taps is the weight of the token `lag` steps back (or ahead). Taps are
# taken in groups of four, the last of them padded with zeros; a token beyond the ends is a row of
# zeros. x is read where it lies, except for a block of fewer than LANES channels, which is copied
# to rows.


@jit
def _load_taps(source, width, k, groups, target):
    """(width, k) -> 4 * groups rows; zeros beyond."""
    _clear(4 * groups, target)
    for e in range(width):
        for j in range(k):
            here = target + (k - 1 - j) * ROW + e * FLOAT
            store(here, number(source + (e * k + j) * FLOAT))


@jit
def _store_taps(source, width, k, target):
    """Rows -> (width, k)."""
    for e in range(width):
        for j in range(k):
            here = source + (k - 1 - j) * ROW + e * FLOAT
            store(target + (e * k + j) * FLOAT, number(here))


@jit
def _rows_of(source, stride, length, width, target):
    """The address and the stride, in bytes, of the tokens as full rows."""
    if width == LANES:
        return source, stride * FLOAT
    for t in range(length):
        _load(source + t * stride * FLOAT, width, target + t * ROW)
    return target, ROW


@inlined
def _token(tokens, stride, t, length, zeros):
    return tokens + t * stride if 0 <= t < length else zeros


@inlined
def _four_tokens(tokens, stride, t, step, length, zeros):
    """The addresses of tokens t, t + step, t + 2 step, t + 3 step."""
    return (
        _token(tokens, stride, t, length, zeros),
        _token(tokens, stride, t + step, length, zeros),
        _token(tokens, stride, t + 2 * step, length, zeros),
        _token(tokens, stride, t + 3 * step, length, zeros),
    )


@jit
def _convolve(final, start, x, taps, target):
    """start + the sum of four taps, and its silu if `final`."""
    x_0, x_1, x_2, x_3 = x
    for e in range(0, ROW, VECTOR):
        y = load(start + e) + load(taps + e) * load(x_0 + e)
        y = y + load(taps + ROW + e) * load(x_1 + e)
        y = y + load(taps + 2 * ROW + e) * load(x_2 + e)
        y = y + load(taps + 3 * ROW + e) * load(x_3 + e)
        if final:
            y = silu(y)
        store(target + e, y)


@jit
def _silu_gradient(y, dout, dy, dbias):
    """dy = dout silu'(y), also added to dbias."""
    for e in range(0, ROW, VECTOR):
        gradient = load(dout + e) * silu_slope(load(y + e))
        store(dy + e, gradient)
        store(dbias + e, load(dbias + e) + gradient)


@jit
def _correlate(dy, x, dtaps):
    """dtaps += dy x, for four taps."""
    x_0, x_1, x_2, x_3 = x
    for e in range(0, ROW, VECTOR):
        dy_e = load(dy + e)
        store(dtaps + e, load(dtaps + e) + dy_e * load(x_0 + e))
        store(dtaps + ROW + e, load(dtaps + ROW + e) + dy_e * load(x_1 + e))
        store(dtaps + 2 * ROW + e, load(dtaps + 2 * ROW + e) + dy_e * load(x_2 + e))
        store(dtaps + 3 * ROW + e, load(dtaps + 3 * ROW + e) + dy_e * load(x_3 + e))


def conv_forward_rows(length: int, d: int, k: int) -> int:
    """Rows of scratch memory that `conv_forward` needs."""
    return 3 + 2 * (1 + k + 3) + (length if d % LANES else 0)


@kernel
def conv_forward(
    x, weight_0, weight_1, bias_0, bias_1, out, directions, batch, length, d, k, x_b, x_l, reverse,
    scratch, first, end,
):  # fmt: skip
    """Tasks [first, end) of batch * blocks: x (b, l, d) with strides x_b, x_l, 1; for each
    direction weight (d, k) and bias (d,); out (s, b, l, d)."""
    blocks, groups = (d + LANES - 1) // LANES, (k + 3) // 4
    zeros, y, pad, biases = scratch, scratch + ROW, scratch + 2 * ROW, scratch + 3 * ROW
    all_taps = biases + 2 * ROW
    xs = all_taps + 8 * groups * ROW
    for task in range(first, end):
        b, e0 = task // blocks, task % blocks * LANES
        width = min(LANES, d - e0)
        tokens, stride = _rows_of(x + (b * x_b + e0) * FLOAT, x_l, length, width, xs)
        for s in range(directions):
            weight, bias = (weight_1, bias_1) if s == 1 else (weight_0, bias_0)
            _load_taps(weight + e0 * k * FLOAT, width, k, groups, all_taps + s * 4 * groups * ROW)
            _load(bias + e0 * FLOAT, width, biases + s * ROW)
        for t in range(length):
            _prefetch(tokens + (t + k + 1) * stride)
            for s in range(directions):
                step = 1 if s == 1 or reverse else -1
                here = out + (((s * batch + b) * length + t) * d + e0) * FLOAT
                target = here if width == LANES else pad
                for group in range(groups):
                    final, lag = group == groups - 1, 4 * group
                    x_4 = _four_tokens(tokens, stride, t + lag * step, step, length, zeros)
                    taps = all_taps + (s * groups + group) * 4 * ROW
                    start = y if group else biases + s * ROW
                    _convolve(final, start, x_4, taps, target if final else y)
                _write(target, width, here)


def conv_backward_rows(length: int, d: int, k: int) -> int:
    """Rows of scratch memory that `conv_backward` needs."""
    return 6 + 2 * (k + 3) + length * (2 if d % LANES else 1)


@kernel
def conv_backward(
    dout, x, weight_0, weight_1, bias_0, bias_1, dx, dweight, dbias,
    directions, batch, length, d, k, x_b, x_l, dx_b, dx_l, reverse, scratch, first, end,
):  # fmt: skip
    """Outputs are dx (b, l, d) with strides dx_b, dx_l, 1 and each task's contribution to sums over
    b: dweight (s, b, d, k), dbias (s, b, d)."""
    blocks, groups = (d + LANES - 1) // LANES, (k + 3) // 4
    zeros, y, pads = scratch, scratch + ROW, scratch + 2 * ROW
    bias_row, dbias_row, taps = scratch + 4 * ROW, scratch + 5 * ROW, scratch + 6 * ROW
    dtaps = taps + 4 * groups * ROW
    dys = dtaps + 4 * groups * ROW
    xs = dys + length * ROW
    for task in range(first, end):
        b, e0 = task // blocks, task % blocks * LANES
        width = min(LANES, d - e0)
        tokens, stride = _rows_of(x + (b * x_b + e0) * FLOAT, x_l, length, width, xs)
        for s in range(directions):
            weight, bias = (weight_1, bias_1) if s == 1 else (weight_0, bias_0)
            step, sb = 1 if s == 1 or reverse else -1, s * batch + b
            _load_taps(weight + e0 * k * FLOAT, width, k, groups, taps)
            _load(bias + e0 * FLOAT, width, bias_row)
            _clear(4 * groups, dtaps)
            _clear(1, dbias_row)
            for t in range(length):
                here = dout + ((sb * length + t) * d + e0) * FLOAT
                _prefetch(tokens + (t + k + 1) * stride)
                _prefetch(here + 2 * d * FLOAT)
                for group in range(groups):
                    lag, start = 4 * group, y if group else bias_row
                    x_4 = _four_tokens(tokens, stride, t + lag * step, step, length, zeros)
                    _convolve(False, start, x_4, taps + lag * ROW, y)
                _silu_gradient(y, _read(here, width, pads), dys + t * ROW, dbias_row)
                for group in range(groups):
                    lag = 4 * group
                    x_4 = _four_tokens(tokens, stride, t + lag * step, step, length, zeros)
                    _correlate(dys + t * ROW, x_4, dtaps + lag * ROW)
            for t in range(length):
                here = dx + (b * dx_b + t * dx_l + e0) * FLOAT
                target = here if width == LANES else pads
                start = _read(here, width, pads + ROW) if s > 0 else zeros
                for group in range(groups):
                    lag = 4 * group
                    dy_4 = _four_tokens(dys, ROW, t - lag * step, -step, length, zeros)
                    _convolve(False, start, dy_4, taps + lag * ROW, target)
                    start = target
                _write(target, width, here)
            part = sb * d + e0
            _store_taps(dtaps, width, k, dweight + part * k * FLOAT)
            _write(dbias_row, width, dbias + part * FLOAT)


# --- projection ------------------------------------------------------------------------------
#
# A library multiplies matrices faster than this only if all sides are long; here one is 36 to 80.

PROJECTED = 6  # tokens at a time: their sums, a vector each, fill the registers of AVX2
PROJECT_TOKENS = 8 * PROJECTED  # of a task


@jit
def _pack_columns(weight, d, o, target):
    """(o, d) -> (groups, d, WIDTH), groups of WIDTH outputs; those beyond o are not written."""
    for k in range(o):
        column = target + k // WIDTH * d * VECTOR + k % WIDTH * FLOAT
        for c in range(d):
            store(column + c * VECTOR, number(weight + (k * d + c) * FLOAT))


@jit
def _project(d, x_0, x_1, x_2, x_3, x_4, x_5, weight, target):
    """Six tokens (d,) times (d, WIDTH) -> (6, WIDTH)."""
    y_0 = y_1 = y_2 = y_3 = y_4 = y_5 = vector(ZERO)
    for c in range(d):
        w, e = load(weight + c * VECTOR), c * FLOAT
        y_0 = y_0 + number(x_0 + e) * w
        y_1 = y_1 + number(x_1 + e) * w
        y_2 = y_2 + number(x_2 + e) * w
        y_3 = y_3 + number(x_3 + e) * w
        y_4 = y_4 + number(x_4 + e) * w
        y_5 = y_5 + number(x_5 + e) * w
    store(target, y_0)
    store(target + VECTOR, y_1)
    store(target + 2 * VECTOR, y_2)
    store(target + 3 * VECTOR, y_3)
    store(target + 4 * VECTOR, y_4)
    store(target + 5 * VECTOR, y_5)


def project_rows(d: int, o: int) -> int:
    """Rows of scratch memory that `project` needs."""
    return 2 + -(-(-(-o // WIDTH) * d * WIDTH) // LANES)


@kernel
def project(x, weight_0, weight_1, out, tokens, d, o, scratch, first, end):
    """Tasks [first, end) of 2 * tiles of PROJECT_TOKENS tokens: x (s, tokens, d) times the weight
    (o, d) of its direction -> out (s, tokens, o)."""
    tiles = (tokens + PROJECT_TOKENS - 1) // PROJECT_TOKENS
    sums, weight, packed = scratch, scratch + 2 * ROW, -1
    for task in range(first, end):
        s, begin = task // tiles, task % tiles * PROJECT_TOKENS
        last = min(begin + PROJECT_TOKENS, tokens) - 1
        if s != packed:
            _pack_columns(weight_1 if s == 1 else weight_0, d, o, weight)
            packed = s
        source = x + s * tokens * d * FLOAT
        for k in range(0, o, WIDTH):
            width = min(WIDTH, o - k) * FLOAT
            for t in range(begin, last + 1, PROJECTED):
                # the last token again in place of those beyond
                _project(d, source + t * d * FLOAT,
                         source + min(t + 1, last) * d * FLOAT,
                         source + min(t + 2, last) * d * FLOAT,
                         source + min(t + 3, last) * d * FLOAT,
                         source + min(t + 4, last) * d * FLOAT,
                         source + min(t + 5, last) * d * FLOAT,
                         weight + k * d * FLOAT, sums)  # fmt: skip
                for i in range(min(PROJECTED, last + 1 - t)):
                    here = out + ((s * tokens + t + i) * o + k) * FLOAT
                    if width == VECTOR:
                        store(here, load(sums + i * VECTOR))
                    else:
                        for e in range(0, width, FLOAT):
                            store(here + e, number(sums + i * VECTOR + e))


# --- norm ------------------------------------------------------------------------------------


@jit
def _norm_row(d, hidden, residual, weight, normed, result, eps):
    """One token: result = hidden + residual, normed = result * weight / rms. Returns 1 / rms."""
    whole, size = d // WIDTH * VECTOR, d * FLOAT
    sums, rest = vector(ZERO), ZERO
    for e in range(0, whole, VECTOR):
        v = load(hidden + e)
        if residual:
            v = v + load(residual + e)
        store(result + e, v)
        sums = sums + v * v
    for e in range(whole, size, FLOAT):
        v = number(hidden + e)
        if residual:
            v += number(residual + e)
        store(result + e, v)
        rest += v * v
    scale = ONE / np.sqrt((total(sums) + rest) / f32(d) + eps)
    for e in range(0, whole, VECTOR):
        store(normed + e, load(result + e) * scale * load(weight + e))
    for e in range(whole, size, FLOAT):
        store(normed + e, number(result + e) * scale * number(weight + e))
    return scale


@kernel
def norm_forward(hidden, residual, weight, normed, result, scales, d, eps, scratch, first, end):
    """Tasks [first, end) of the tokens: hidden, residual, normed and result (tokens, d), weight
    (d,), scales (tokens,), 1 / rms."""
    eps = f32(eps)
    for token in range(first, end):
        e = token * d * FLOAT
        other = residual + e if residual else 0
        scale = _norm_row(d, hidden + e, other, weight, normed + e, result + e, eps)
        store(scales + token * FLOAT, scale)


@jit
def _norm_row_gradient(d, dnormed, dresult, result, scale, weight, dinput, dweight):
    """One token; its part of the weight's gradient is added to dweight."""
    whole, size = d // WIDTH * VECTOR, d * FLOAT
    sums, rest = vector(ZERO), ZERO
    for e in range(0, whole, VECTOR):
        sums = sums + load(dnormed + e) * load(weight + e) * load(result + e)
    for e in range(whole, size, FLOAT):
        rest += number(dnormed + e) * number(weight + e) * number(result + e)
    mean = (total(sums) + rest) * scale / f32(d)
    for e in range(0, whole, VECTOR):
        unit, gradient = load(result + e) * scale, load(dnormed + e)
        store(dweight + e, load(dweight + e) + gradient * unit)
        v = (gradient * load(weight + e) - unit * mean) * scale
        if dresult:
            v = v + load(dresult + e)
        store(dinput + e, v)
    for e in range(whole, size, FLOAT):
        unit, gradient = number(result + e) * scale, number(dnormed + e)
        store(dweight + e, number(dweight + e) + gradient * unit)
        v = (gradient * number(weight + e) - unit * mean) * scale
        if dresult:
            v += number(dresult + e)
        store(dinput + e, v)


@kernel
def norm_backward(
    dnormed, dresult, result, scales, weight, dinput, dweight, tokens, d, scratch, first, end
):
    """Tasks [first, end) of the groups of NORM_TOKENS tokens; dweight (groups, d)."""
    for group in range(first, end):
        part = dweight + group * d * FLOAT
        for e in range(0, d * FLOAT, FLOAT):
            store(part + e, ZERO)
        for token in range(group * NORM_TOKENS, min((group + 1) * NORM_TOKENS, tokens)):
            e = token * d * FLOAT
            other = dresult + e if dresult else 0
            scale = number(scales + token * FLOAT)
            _norm_row_gradient(d, dnormed + e, other, result + e, scale, weight, dinput + e, part)
