"""The short convolution on a GPU, in Triton; both directions share one pass over x.

Two operators, `vim_ssl::triton_conv_forward` and `vim_ssl::triton_conv_backward`, take x, the
outputs and their gradients in float32, bfloat16 or float16 and compute in float32.

A program is one warp and works on a block of channels. It loads each row of x once, keeps it in
registers as a one-dimensional tile, and unrolls the loops over tokens and taps; a tuple of tiles
holds the rows. Forward processes a block of neighbouring tokens; backward iterates over the tokens
and carries the last rows and gradients along. Directions share the rows and the code: one that
looks ahead has its taps reversed and its tokens k - 1 rows earlier.

Memory traffic per token and channel, both directions, where e is the bytes of an element:
forward 3 e (x in, two outputs), backward 4 e (x and two gradients in, dx out). Rows outside a
program's block come from the cache. No atomics: each backward program writes one row of partial
sums for the parameters and torch adds the rows, so results are bitwise reproducible.
"""

# Triton concatenates tuples but does not unpack them, and their lengths may change.
# mypy: disable-error-code="assignment"

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from vim_ssl.kernels.autograd import channels_contiguous, contiguous, operator, register_gradient
from vim_ssl.kernels.triton_math import sigmoid, silu_gradient

FORWARD_TOKENS = 16  # per program
FORWARD_CHANNELS = 128  # per program, which is one warp: 4 per lane
BACKWARD_TOKENS = 6  # per iteration; with 8, registers spill
BACKWARD_CHANNELS = 64  # 2 per lane: backward keeps more in registers
SHORTEST_SPAN = 32  # tokens; at either end of a span k - 1 gradients are recomputed
WARPS = 12 * 132  # backward warps that run concurrently on the 132 multiprocessors of an H100


def conv_silu(x: Tensor, weight: Tensor, bias: Tensor, reverse: bool = False) -> Tensor:
    """x (b, l, d), weight (s, d, k), bias (s, d) -> (s, b, l, d) in x's dtype.

    Direction 0 looks back, or ahead with `reverse`; direction 1 looks ahead.
    """
    # Channel-last like the rest, so that neighbouring lanes load neighbouring numbers.
    return conv_forward(x, weight.mT.contiguous(), bias, reverse)


# --- kernels -----------------------------------------------------------------------------------


@triton.jit
def load_rows(start, t0, stride, l, inside, COUNT: tl.constexpr):
    """Tokens t0 … t0 + COUNT - 1 in float32, zero outside the image and where not `inside`."""
    step = tl.cast(stride, tl.int64)
    start += t0 * step
    rows = ()
    for i in tl.static_range(COUNT):
        mask = inside & (t0 + i >= 0) & (t0 + i < l)
        rows = rows + (tl.load(start + i * step, mask=mask, other=0.0).to(tl.float32),)
    return rows


@triton.jit
def load_taps(weight, channel, inside, d, S: tl.constexpr, K: tl.constexpr, AHEAD: tl.constexpr):
    """Direction S's taps in float32, in the order of the tokens that they multiply."""
    taps = ()
    for j in tl.static_range(K):
        row = S * K + (K - 1 - j if AHEAD else j)
        tap = tl.load(weight + row * d + channel, mask=inside, other=0.0)
        taps = taps + (tap.to(tl.float32),)
    return taps


@triton.jit
def load_bias(bias, channel, inside, d, S: tl.constexpr):
    return tl.load(bias + S * d + channel, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def convolve(rows, taps, shift, I: tl.constexpr):
    """Return the pre-activation of the token whose window starts at rows[I]."""
    y = shift
    for j in tl.static_range(len(taps)):
        y += taps[j] * rows[I + j]
    return y


@triton.jit(do_not_specialize=["b", "l"])  # another size does not recompile
def conv_forward_kernel(
    x, weight, bias, out, b, l, d, stride_b, stride_l,
    DIRECTIONS: tl.constexpr, K: tl.constexpr, REVERSE: tl.constexpr,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of channels · blocks of tokens · b), channels fastest."""
    channel_blocks, token_blocks = tl.cdiv(d, CHANNELS), tl.cdiv(l, TOKENS)
    block = tl.program_id(0) // channel_blocks
    channel = tl.program_id(0) % channel_blocks * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < d
    image, t0 = (block // token_blocks).to(tl.int64), block % token_blocks * TOKENS
    rows = load_rows(
        x + image * stride_b + channel, t0 - (K - 1), stride_l, l, inside, TOKENS + 2 * (K - 1)
    )
    for s in tl.static_range(DIRECTIONS):
        taps = load_taps(weight, channel, inside, d, s, K, REVERSE or s == 1)
        shift = load_bias(bias, channel, inside, d, s)
        start = out + ((s * b + image) * l + t0) * d + channel
        for i in tl.static_range(TOKENS):
            y = convolve(rows, taps, shift, i + (K - 1 if REVERSE or s == 1 else 0))
            tl.store(start + i * d, y * sigmoid(y), mask=inside & (t0 + i < l))


@triton.jit(do_not_specialize=["b", "l", "spans", "span"])
def conv_backward_kernel(
    dout, x, weight, bias, dx, sums, b, l, d, stride_b, stride_l, spans, span,
    DIRECTIONS: tl.constexpr, K: tl.constexpr, REVERSE: tl.constexpr,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of channels, programs).

    An image's tokens are cut into `spans` of `span` tokens, a multiple of TOKENS. A program
    processes every programs-th span and writes sums (programs, directions, k + 1, d): the gradients
    of the taps and, last, of the bias.
    """
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < d
    taps, shifts, totals = (), (), ()
    for s in tl.static_range(DIRECTIONS):
        taps = taps + (load_taps(weight, channel, inside, d, s, K, REVERSE or s == 1),)
        shifts = shifts + (load_bias(bias, channel, inside, d, s),)
        totals = totals + (zeros(K + 1, CHANNELS),)

    for index in range(tl.program_id(1), b * spans, tl.num_programs(1)):
        image, first = (index // spans).to(tl.int64), index % spans * span
        x_start = x + image * stride_b + channel
        rows = load_rows(x_start, first - (K - 1), stride_l, l, inside, 2 * (K - 1))
        ds = ()  # of each direction, the last k - 1 gradients of pre-activations
        for s in tl.static_range(DIRECTIONS):
            ds = ds + (
                pre_activation_gradients(
                    rows, taps[s], shifts[s], dout + (s * b + image) * l * d + channel,
                    first - (K - 1 if REVERSE or s == 1 else 0), l, d, inside, 0, K - 1,
                ),
            )  # fmt: skip
        for t0 in range(first, tl.minimum(first + span, l), TOKENS):
            rows = rows + load_rows(x_start, t0 + K - 1, stride_l, l, inside, TOKENS)
            dx_rows = zeros(TOKENS, CHANNELS)
            next_ds, next_totals = (), ()
            for s in tl.static_range(DIRECTIONS):
                # The newest row completes what token t0 sees ahead, or token t0 + k - 1 behind.
                all_ds = ds[s] + pre_activation_gradients(
                    rows, taps[s], shifts[s], dout + (s * b + image) * l * d + channel,
                    t0 + (0 if REVERSE or s == 1 else K - 1), l, d, inside, K - 1, TOKENS,
                )  # fmt: skip
                dx_rows = add_input_gradients(dx_rows, taps[s], all_ds)
                next_totals = next_totals + (
                    add_parameter_gradients(
                        totals[s], all_ds, rows, K - 1 if REVERSE or s == 1 else 0, TOKENS
                    ),
                )
                next_ds = next_ds + (last(all_ds, K - 1),)
            dx_start = dx + (image * l + t0) * d + channel
            for i in tl.static_range(TOKENS):
                tl.store(dx_start + i * d, dx_rows[i], mask=inside & (t0 + i < l))
            rows, ds, totals = last(rows, 2 * (K - 1)), next_ds, next_totals

    start = sums + tl.program_id(1).to(tl.int64) * (DIRECTIONS * (K + 1) * d) + channel
    for s in tl.static_range(DIRECTIONS):
        for j in tl.static_range(K + 1):
            # Taps that look ahead were reversed when they were loaded.
            row = s * (K + 1) + (K - 1 - j if (REVERSE or s == 1) and j < K else j)
            tl.store(start + row * d, totals[s][j], mask=inside)


@triton.jit
def zeros(COUNT: tl.constexpr, CHANNELS: tl.constexpr):
    rows = ()
    for _ in tl.static_range(COUNT):
        rows = rows + (tl.zeros((CHANNELS,), tl.float32),)
    return rows


@triton.jit
def last(rows, COUNT: tl.constexpr):
    tail = ()
    for i in tl.static_range(COUNT):
        tail = tail + (rows[len(rows) - COUNT + i],)
    return tail


@triton.jit
def pre_activation_gradients(
    rows, taps, shift, dout, t0, l, d, inside, I: tl.constexpr, COUNT: tl.constexpr
):
    """Return the gradients w.r.t. the pre-activations of tokens t0 to t0 + COUNT - 1. The window of
    token t0 starts at rows[I]."""
    dout_rows = load_rows(dout, t0, d, l, inside, COUNT)
    ds = ()
    for i in tl.static_range(COUNT):
        dy = dout_rows[i] * silu_gradient(convolve(rows, taps, shift, I + i))
        # Outside the image dout is zero, but the slope may be NaN.
        ds = ds + (tl.where((t0 + i >= 0) & (t0 + i < l), dy, 0.0),)
    return ds


@triton.jit
def add_input_gradients(dx_rows, taps, ds):
    """Add to each row of dx_rows the gradients of the k tokens whose windows contain it. Row i uses
    ds[i] to ds[i + k - 1]."""
    new = ()
    for i in tl.static_range(len(dx_rows)):
        row = dx_rows[i]
        for j in tl.static_range(len(taps)):
            row += taps[j] * ds[i + len(taps) - 1 - j]
        new = new + (row,)
    return new


@triton.jit
def add_parameter_gradients(totals, ds, rows, I: tl.constexpr, COUNT: tl.constexpr):
    """Add to totals (k taps, then the bias) the contributions of COUNT tokens, starting at
    ds[I]."""
    new = ()
    for j in tl.static_range(len(totals)):
        total = totals[j]
        for i in tl.static_range(COUNT):
            total += ds[I + i] if j == len(totals) - 1 else ds[I + i] * rows[I + i + j]
        new = new + (total,)
    return new


# --- operators ---------------------------------------------------------------------------------


@operator("triton_conv_forward", fake=lambda x, w, *_: x.new_empty(w.shape[0], *x.shape))
def conv_forward(x: Tensor, weight: Tensor, bias: Tensor, reverse: bool) -> Tensor:
    """`conv_silu` with the weight as (directions, k, d); returns (directions, b, l, d)."""
    x, weight, bias = channels_contiguous(x), contiguous(weight), contiguous(bias)
    (b, l, d), (s, k, _) = x.shape, weight.shape
    out = x.new_empty(s, b, l, d)
    grid = (triton.cdiv(d, FORWARD_CHANNELS) * b * triton.cdiv(l, FORWARD_TOKENS),)
    with torch.cuda.device_of(x):
        conv_forward_kernel[grid](
            x, weight, bias, out, b, l, d, *x.stride()[:2],
            DIRECTIONS=s, K=k, REVERSE=reverse, TOKENS=FORWARD_TOKENS, CHANNELS=FORWARD_CHANNELS,
            num_warps=1,
        )  # fmt: skip
    return out


def _empty_gradients(dout, x, weight, bias, reverse):
    s, k, d = weight.shape
    return x.new_empty(x.shape), x.new_empty(s, k + 1, d, dtype=torch.float32)


@operator("triton_conv_backward", fake=_empty_gradients)
def conv_backward(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor, reverse: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x, and of weight and bias together: (s, k + 1, d), float32, with the
    bias as the last tap."""
    dout, weight, bias = map(contiguous, (dout, weight, bias))
    x = channels_contiguous(x)
    (b, l, d), (s, k, _) = x.shape, weight.shape
    channel_blocks = max(1, triton.cdiv(d, BACKWARD_CHANNELS))
    spans, span, programs = _shares(b, l, k, max(1, WARPS // channel_blocks))
    dx = x.new_empty(b, l, d)
    sums = x.new_empty(programs, s, k + 1, d, dtype=torch.float32)
    with torch.cuda.device_of(x):
        conv_backward_kernel[(channel_blocks, programs)](
            dout, x, weight, bias, dx, sums, b, l, d, *x.stride()[:2], spans, span,
            DIRECTIONS=s, K=k, REVERSE=reverse, TOKENS=BACKWARD_TOKENS, CHANNELS=BACKWARD_CHANNELS,
            num_warps=1,
        )  # fmt: skip
    return dx, sums.sum(0)


def _gradients(ctx, dout):
    dx, sums = conv_backward(dout, *ctx.saved_tensors, *ctx.options)
    return dx, sums[:, :-1], sums[:, -1]


register_gradient(conv_forward, conv_backward, "Triton convolution", gradients=_gradients)


@cache
def _shares(b: int, l: int, k: int, most: int) -> tuple[int, int, int]:
    """Partition the backward pass: return (spans per image, tokens per span, programs).

    It minimises the tokens of the slowest program, with at most `most` programs.
    """

    def tokens(spans: int) -> int:
        return triton.cdiv(triton.cdiv(l, spans), BACKWARD_TOKENS) * BACKWARD_TOKENS

    def time(spans: int) -> int:
        return triton.cdiv(b * spans, most) * (tokens(spans) + 2 * (k - 1))

    spans = min(range(1, max(1, l // SHORTEST_SPAN) + 1), key=time)
    return spans, tokens(spans), min(b * spans, most)
