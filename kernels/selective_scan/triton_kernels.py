"""The Triton kernels of the forward scan; `triton_backend.py` launches them.

Forward. A program owns `32 C` channels of one image and walks its tokens in both directions at
once: one warp per direction, `C` channels per lane, so tiles are (32 S,) with one element per
thread, and the state of a lane is a tuple of `C N` tiles: registers. The two warps meet in the
middle of the sequence. Before it each writes its sums to memory; after it each loads the other's
sum at every token, adds, gates, and writes the output. So nothing is flipped, the gate is computed
once, and the warps synchronise once. B and C are packed as pairs of float32: one 8-byte load per
state, at the same address for all lanes.

Segments. With few images the tokens are cut into segments that run in parallel. `carry_kernel`
computes each segment's end state from a zero start, e, and the sum of its step sizes; `join_kernel`
combines the segments in order, h_end = exp(A sum dt) h_start + e; the main kernels then start from
the true states. The adjoint is carried the same way in the opposite order.

Legend: s direction, b image, l token, d channel, n state; `A2` carries a factor log2(e), since 2^x
is what the special-function unit computes. All arithmetic is float32, whatever the dtypes of inputs
and outputs. Offsets that depend on the image or direction are int64. Kernels are not specialised to
the number of images or tokens: another number does not recompile them.
"""

import triton
import triton.language as tl

from vim_ssl.kernels.selective_scan.triton_tiles import (
    LANES,
    across,
    high,
    low,
    numbers,
    tile_count,
)
from vim_ssl.kernels.triton_math import LOG2E, sigmoid, softplus


@triton.constexpr_function
def most_rows(N):
    """Rows of a tile of states at most. Tiles of one row need no instruction to add their rows, but
    with 64 states they take half a minute to compile."""
    return 1 if N <= 16 else 8


# --- parts -----------------------------------------------------------------------------------


@triton.jit
def _load(pointer, channel, d, C: tl.constexpr, valid):
    """C tiles of 32 neighbouring channels each, as float32; zeros beyond d or where not valid."""
    tiles = ()
    for c in tl.static_range(C):
        mask = (channel + c * LANES < d) & valid
        tiles = tiles + (tl.load(pointer + c * LANES, mask=mask, other=0.0).to(tl.float32),)
    return tiles


@triton.jit
def _store(pointer, tiles, channel, d, C: tl.constexpr, valid):
    for c in tl.static_range(C):
        value = tiles[c].to(pointer.dtype.element_ty)
        tl.store(pointer + c * LANES, value, mask=(channel + c * LANES < d) & valid)


@triton.jit
def _zero_state(channel, C: tl.constexpr, N: tl.constexpr):
    tiles = ()
    for i in tl.static_range(tile_count(N, most_rows(N))):
        n = numbers(N, most_rows(N), i)
        for _ in tl.static_range(C):
            tiles = tiles + (tl.zeros((n.shape[0], channel.shape[0]), tl.float32),)
    return tiles


@triton.jit
def _load_state(pointer, to_n, at, to_c, channel, d, zero, C: tl.constexpr, N: tl.constexpr):
    """Tiles of states, C for each tile of rows, from ``pointer + n to_n + at + c to_c``, where
    ``at`` is a number of each thread; zeros beyond d."""
    tiles = ()
    for i in tl.static_range(tile_count(N, most_rows(N))):
        n = numbers(N, most_rows(N), i)
        for c in tl.static_range(C):
            mask = (channel + c * LANES < d)[None, :] & (n >= 0)
            from_ = pointer + across(at + c * to_c, zero) + n * to_n
            tiles = tiles + (tl.load(from_, mask=mask, other=0.0),)
    return tiles


@triton.jit
def _load_A2(A_ptr, s, channel, d, zero, C: tl.constexpr, N: tl.constexpr):
    """A log2(e); A is (s, d, n)."""
    A = _load_state(A_ptr, 1, (s * d + channel) * N, LANES * N, channel, d, zero, C, N)
    scaled = ()
    for i in tl.static_range(tile_count(N, most_rows(N)) * C):
        scaled = scaled + (A[i] * LOG2E,)
    return scaled


@triton.jit
def _store_state(
    pointer, h, to_n, at, to_c, mask, channel, d, zero, C: tl.constexpr, N: tl.constexpr
):
    for i in tl.static_range(tile_count(N, most_rows(N))):
        n = numbers(N, most_rows(N), i)
        for c in tl.static_range(C):
            valid = (mask & (channel + c * LANES < d))[None, :] & (n >= 0)
            tl.store(pointer + across(at + c * to_c, zero) + n * to_n, h[i * C + c], mask=valid)


@triton.jit
def _save_state(pointer, h, d, channel, C: tl.constexpr, N: tl.constexpr):
    """Write blocks (n, 32), one after the other: the distances are constants, so that no address is
    computed. Channels of a block beyond d are written too; the backward pass multiplies them by 0.
    """
    for i in tl.static_range(tile_count(N, most_rows(N))):
        n = numbers(N, most_rows(N), i)
        for c in tl.static_range(C):
            at = pointer + (c * N + n) * LANES
            if c == 0:
                tl.store(at, h[i * C])
            else:  # the last block may be missing
                exists = ((channel // LANES + c) * LANES < d)[None, :] & (n >= 0)
                tl.store(at, h[i * C + c], mask=exists)


@triton.jit
def _vector(pointer, s, d, channel, C: tl.constexpr, GIVEN: tl.constexpr):
    """C tiles of an (s, d) parameter, or zeros without one."""
    if GIVEN:
        tiles = _load(pointer + s * d + channel, channel, d, C, channel >= 0)
    else:
        tiles = ()
        for _ in tl.static_range(C):
            tiles = tiles + (tl.zeros(channel.shape, tl.float32),)
    return tiles


@triton.jit
def _advance(h, A2, u, v, D, bias, bc, C: tl.constexpr, N: tl.constexpr, SOFTPLUS: tl.constexpr):
    """One token: h = 2^(dt A2) h + dt u B and y = D u + <h, C>; u, v, D, bias, y are C tiles."""
    dt, x, y, stepped = (), (), (), ()
    for c in tl.static_range(C):
        step = v[c] + bias[c]
        if SOFTPLUS:
            step = softplus(step)
        dt, x, y = dt + (step,), x + (step * u[c],), y + (D[c] * u[c],)
    for i in tl.static_range(tile_count(N, most_rows(N))):
        pair = tl.load(bc + numbers(N, most_rows(N), i))
        sums = ()
        for c in tl.static_range(C):
            decay = tl.exp2(dt[c][None, :] * A2[i * C + c])
            new = decay * h[i * C + c] + x[c][None, :] * low(pair)
            stepped, sums = stepped + (new,), sums + (y[c] + tl.sum(new * high(pair), 0),)
        y = sums
    return stepped, y


@triton.jit
def _finish(y, out, z, channel, d, scale, C: tl.constexpr, GATED: tl.constexpr, valid):
    """out = scale y silu(z)."""
    if GATED:
        gates = _load(z, channel, d, C, valid)
    gated = ()
    for c in tl.static_range(C):
        value = scale * y[c]
        if GATED:
            value = value * (gates[c] * sigmoid(gates[c]))
        gated = gated + (value,)
    _store(out, gated, channel, d, C, valid)


# --- forward ---------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["batch", "length", "count"])
def pack_kernel(
    B_ptr, C_ptr, bc_ptr, batch, length, count,
    B_s, B_b, B_l, C_s, C_b, C_l,
    N: tl.constexpr, PADDED: tl.constexpr, MARGIN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """B, C (s, b, l, N) with any strides but the last -> float32 pairs (s, b, MARGIN + l + MARGIN,
    PADDED, 2), 0 where there is no token or no state."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    n, row = i % PADDED, i // PADDED
    l, image = row % (length + 2 * MARGIN) - MARGIN, row // (length + 2 * MARGIN)
    s, b = image // batch, image % batch
    mask = (i < count) & (n < N) & (l >= 0) & (l < length)
    for_B = tl.load(B_ptr + s * B_s + b * B_b + l * B_l + n, mask=mask, other=0.0)
    for_C = tl.load(C_ptr + s * C_s + b * C_b + l * C_l + n, mask=mask, other=0.0)
    tl.store(bc_ptr + 2 * i, for_B.to(tl.float32), mask=i < count)
    tl.store(bc_ptr + 2 * i + 1, for_C.to(tl.float32), mask=i < count)


@triton.jit(do_not_specialize=["batch", "length", "segment", "zero"])
def forward_kernel(
    u_ptr, delta_ptr, A_ptr, bc_ptr, D_ptr, z_ptr, bias_ptr, start_ptr,
    out_ptr, sum_ptr, last_ptr, states_ptr,
    batch, length, d, segment, scale, zero, reverse,
    u_s, u_b, u_l, delta_s, delta_b, delta_l, z_b, z_l,
    S: tl.constexpr, N: tl.constexpr, C: tl.constexpr, EVERY: tl.constexpr,
    SOFTPLUS: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_START: tl.constexpr, SAVE: tl.constexpr, KEEP_SUM: tl.constexpr,
):  # fmt: skip
    """Grid (batch * blocks, segments), S warps.

    Tensors:
        u, delta (s, b, l, d) and z (b, l, d), channels together, else any strides.
        A (s, d, n), D, bias (s, d), float32.  bc: (s, b, l, n) pairs, see `pack_kernel`.
        start (s, b, segments, n, d): the states that the segments begin from; zero without.
        out (b, l, d) = scale * sum_s(y_s) silu(z).
        sum: out's shape, float32, where the directions meet: `out` itself if that is float32, or
            with KEEP_SUM a tensor that holds sum_s(y_s) afterwards, for the gradient of z.
        last (s, b, d, n).  states (s, b, checkpoints, blocks of 32 channels, n, 32): h before every
            EVERY-th token of a segment, in scan order.
    """
    blocks = tl.cdiv(d, LANES * C)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    part, parts = tl.program_id(1), tl.num_programs(1)
    thread = tl.arange(0, S * LANES)
    s = thread // LANES
    s64 = s.to(tl.int64)
    channel = (tl.program_id(0) % blocks) * (LANES * C) + thread % LANES
    first_token = part * segment
    count = tl.minimum(segment, length - first_token)
    ahead = s + reverse == 0  # which rows read first to last
    step = tl.where(ahead, 1, -1)
    token = tl.where(ahead, first_token, first_token + count - 1).to(tl.int64)

    u_at = u_ptr + s64 * u_s + b * u_b + token * u_l + channel
    delta_at = delta_ptr + s64 * delta_s + b * delta_b + token * delta_l + channel
    bc_at = bc_ptr + across(((s64 * batch + b) * length + token) * N, zero)
    z_at = z_ptr + b * z_b + token * z_l + channel
    position = (b * length + token) * d + channel
    A2 = _load_A2(A_ptr, s, channel, d, zero, C, N)
    D = _vector(D_ptr, s, d, channel, C, HAS_D)
    bias = _vector(bias_ptr, s, d, channel, C, HAS_BIAS)
    row = s64 * batch + b
    if HAS_START:
        at = (row * parts + part) * N * d + channel
        h = _load_state(start_ptr, d, at, LANES, channel, d, zero, C, N)
    else:
        h = _zero_state(channel, C, N)
    checkpoints = tl.cdiv(length, EVERY)
    to_next_states = tl.cdiv(d, LANES) * (N * LANES)
    at = (row * checkpoints + part * (segment // EVERY)) * to_next_states
    at += channel // LANES * (N * LANES) + channel % LANES
    states_at = states_ptr + across(at, zero)

    u = _load(u_at, channel, d, C, channel >= 0)
    v = _load(delta_at, channel, d, C, channel >= 0)
    y = u
    half = 0
    if S == 2:
        half = (count + 1) // 2
    for i in tl.range(0, half):  # store the sums for the other direction
        u_at += step * u_l
        delta_at += step * delta_l
        more = 0 * channel + i + 1 < count
        u_next = _load(u_at, channel, d, C, more)  # prefetch
        v_next = _load(delta_at, channel, d, C, more)
        if SAVE:
            if i % EVERY == 0:
                _save_state(states_at, h, d, channel, C, N)
                states_at += to_next_states
        h, y = _advance(h, A2, u, v, D, bias, bc_at, C, N, SOFTPLUS)
        # Direction 0 keeps its sum of the middle token in registers.
        stored = (0 * s + 2 * i + 1 != count) | (s == 1)
        _store(sum_ptr + position, y, channel, d, C, stored)
        u, v = u_next, v_next
        bc_at += (step * N)[None, :]
        z_at += step * z_l
        position += step * d
    if S == 2:
        tl.debug_barrier()
        if count % 2 == 1:
            z_mid, at = z_at - step * z_l, position - step * d
            others = _load(sum_ptr + at, channel, d, C, s == 0)
            total = ()
            for c in tl.static_range(C):
                total = total + (y[c] + others[c],)
            if KEEP_SUM:
                _store(sum_ptr + at, total, channel, d, C, s == 0)
            _finish(total, out_ptr + at, z_mid, channel, d, scale, C, HAS_Z, s == 0)
    for i in tl.range(half, count):  # add the sums of the other direction
        u_at += step * u_l
        delta_at += step * delta_l
        more = 0 * channel + i + 1 < count
        u_next = _load(u_at, channel, d, C, more)
        v_next = _load(delta_at, channel, d, C, more)
        if S == 2:
            others = _load(sum_ptr + position, channel, d, C, channel >= 0)
        if SAVE:
            if i % EVERY == 0:
                _save_state(states_at, h, d, channel, C, N)
                states_at += to_next_states
        h, y = _advance(h, A2, u, v, D, bias, bc_at, C, N, SOFTPLUS)
        if S == 2:
            total = ()
            for c in tl.static_range(C):
                total = total + (y[c] + others[c],)
            y = total
        if KEEP_SUM:
            _store(sum_ptr + position, y, channel, d, C, channel >= 0)
        _finish(y, out_ptr + position, z_at, channel, d, scale, C, HAS_Z, channel >= 0)
        u, v = u_next, v_next
        bc_at += (step * N)[None, :]
        z_at += step * z_l
        position += step * d
    ends = tl.where(ahead, parts - 1, 0) == part
    at = (row * d + channel) * N
    _store_state(last_ptr, h, 1, at, LANES * N, ends, channel, d, zero, C, N)


# --- segments --------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["batch", "length", "segment", "zero"])
def carry_kernel(
    w_ptr, delta_ptr, A_ptr, V_ptr, z_ptr, bias_ptr, ends_ptr, sums_ptr,
    batch, length, d, segment, scale, zero, reverse,
    w_s, w_b, w_l, delta_s, delta_b, delta_l, V_s, V_b, V_l, z_b, z_l,
    S: tl.constexpr, N: tl.constexpr, C: tl.constexpr,
    SOFTPLUS: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, ADJOINT: tl.constexpr,
):  # fmt: skip
    """Each segment's contribution to the carried state. Grid and tiles as in `forward_kernel`.

    Forward, w = u and V = B: h = a h + dt u B from zero, in scan order.
    Adjoint, w = dout, the gradient of the output, and V = C: g = a (g + dy C) from zero, against
    scan order, where dy = scale dout silu(z).
    Written are ends (s, b, segments, n, d), h or g, and sums (s, b, segments, d), sum of dt.
    """
    blocks = tl.cdiv(d, LANES * C)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    part, parts = tl.program_id(1), tl.num_programs(1)
    thread = tl.arange(0, S * LANES)
    s = thread // LANES
    s64 = s.to(tl.int64)
    channel = (tl.program_id(0) % blocks) * (LANES * C) + thread % LANES
    first_token = part * segment
    count = tl.minimum(segment, length - first_token)
    ahead = s + reverse == 0
    if ADJOINT:
        ahead = s + reverse != 0
    step = tl.where(ahead, 1, -1)
    token = tl.where(ahead, first_token, first_token + count - 1).to(tl.int64)
    w_at = w_ptr + s64 * w_s + b * w_b + token * w_l + channel
    delta_at = delta_ptr + s64 * delta_s + b * delta_b + token * delta_l + channel
    V_at = V_ptr + across(s64 * V_s + b * V_b + token * V_l, zero)
    z_at = z_ptr + b * z_b + token * z_l + channel
    A2 = _load_A2(A_ptr, s, channel, d, zero, C, N)
    bias = _vector(bias_ptr, s, d, channel, C, HAS_BIAS)
    h, total = _zero_state(channel, C, N), ()
    for _ in tl.static_range(C):
        total = total + (tl.zeros(channel.shape, tl.float32),)
    for _ in tl.range(0, count):
        w = _load(w_at, channel, d, C, channel >= 0)
        v = _load(delta_at, channel, d, C, channel >= 0)
        if ADJOINT and HAS_Z:
            z = _load(z_at, channel, d, C, channel >= 0)
        dt, x, summed, stepped = (), (), (), ()
        for c in tl.static_range(C):
            width = v[c] + bias[c]
            if SOFTPLUS:
                width = softplus(width)
            value = w[c] * width
            if ADJOINT:
                value = scale * w[c]
                if HAS_Z:
                    value = value * (z[c] * sigmoid(z[c]))
            dt, x, summed = dt + (width,), x + (value,), summed + (total[c] + width,)
        for i in tl.static_range(tile_count(N, most_rows(N))):
            V = tl.load(V_at + numbers(N, most_rows(N), i)).to(tl.float32)
            for c in tl.static_range(C):
                decay = tl.exp2(dt[c][None, :] * A2[i * C + c])
                if ADJOINT:
                    new = decay * (h[i * C + c] + x[c][None, :] * V)
                else:
                    new = decay * h[i * C + c] + x[c][None, :] * V
                stepped = stepped + (new,)
        h, total = stepped, summed
        w_at += step * w_l
        delta_at += step * delta_l
        V_at += (step * V_l)[None, :]
        z_at += step * z_l
    row = (s64 * batch + b) * parts + part
    at = row * N * d + channel
    _store_state(ends_ptr, h, d, at, LANES, channel >= 0, channel, d, zero, C, N)
    _store(sums_ptr + row * d + channel, total, channel, d, C, channel >= 0)


@triton.jit(do_not_specialize=["batch", "parts", "zero"])
def join_kernel(
    ends_ptr, sums_ptr, A_ptr, start_ptr, batch, d, parts, zero, reverse,
    N: tl.constexpr, HAS_START: tl.constexpr, ADJOINT: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of 32 channels, batch, s): replace each segment's end state by the state
    that the segment starts from; ``start`` (s, b, n, d) is that of the first one."""
    b, s = tl.program_id(1).to(tl.int64), tl.program_id(2)
    row = s.to(tl.int64) * batch + b
    channel = tl.program_id(0) * LANES + tl.arange(0, LANES)
    mask = channel < d
    if HAS_START:
        at = row * N * d + channel
        h = _load_state(start_ptr, d, at, LANES, channel, d, zero, 1, N)
    else:
        h = _zero_state(channel, 1, N)
    A2 = _load_A2(A_ptr, s, channel, d, zero, 1, N)
    backwards = s + reverse != 0
    if ADJOINT:
        backwards = s + reverse == 0
    for i in tl.range(0, parts):
        part = row * parts + tl.where(backwards, parts - 1 - i, i)
        at = part * N * d + channel
        total = tl.load(sums_ptr + part * d + channel, mask=mask, other=0.0)
        ends = _load_state(ends_ptr, d, at, LANES, channel, d, zero, 1, N)
        _store_state(ends_ptr, h, d, at, LANES, mask, channel, d, zero, 1, N)
        joined = ()
        for n in tl.static_range(tile_count(N, most_rows(N))):
            joined = joined + (tl.exp2(total[None, :] * A2[n]) * h[n] + ends[n],)
        h = joined
