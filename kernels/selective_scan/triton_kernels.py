"""The Triton kernels of the scan; `triton_backend.py` launches them.

Forward. A program owns `32 C` channels of one image and walks its tokens in both directions at
once: one warp per direction, `C` channels per lane, so tiles are (32 S,) with one element per
thread, and the state of a lane is a tuple of `C N` tiles: registers. The two warps meet in the
middle of the sequence. Before it each writes its sums to memory; after it each loads the other's
sum at every token, adds, gates, and writes the output. So nothing is flipped, the gate is computed
once, and the warps synchronise once. B and C are packed as pairs of float32: one 8-byte load per
state, at the same address for all lanes.

Backward. A program owns 32 channels of one image in one direction; tiles are (N, 32), one warp. It
processes the tokens from last to first in groups of `K`. For each group it recomputes the states
from the last saved one (one every `EVERY` tokens) up to the group, then through the group, where it
keeps them in registers, and then runs the adjoint recurrence backwards. dB and dC are sums over
channels: every program writes a partial sum, and torch adds these in a fixed order. There are no
atomics, so results are bitwise reproducible.

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

from vim_ssl.kernels.triton_math import (
    LN2,
    LOG2E,
    sigmoid,
    silu_gradient,
    softplus,
    softplus_with_slope,
)

LANES: tl.constexpr = tl.constexpr(32)


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
def _load_state(pointer, d, channel, C: tl.constexpr, N: tl.constexpr):
    """N C tiles, state by state, of a (n, d) matrix that begins at ``pointer - channel``."""
    tiles = ()
    for n in tl.static_range(N):
        tiles = tiles + _load(pointer + n * d, channel, d, C, channel >= 0)
    return tiles


@triton.jit
def _store_state(pointer, h, d, channel, C: tl.constexpr, N: tl.constexpr):
    for n in tl.static_range(N):
        for c in tl.static_range(C):
            mask = channel + c * LANES < d
            tl.store(pointer + n * d + c * LANES, h[n * C + c], mask=mask)


@triton.jit
def _load_A2(A_ptr, s, d, channel, C: tl.constexpr, N: tl.constexpr):
    """A log2(e) in the order of `_load_state`; A is (s, d, n)."""
    tiles = ()
    for n in tl.static_range(N):
        for c in tl.static_range(C):
            at = A_ptr + (s * d + channel + c * LANES) * N + n
            m = tl.load(at, mask=channel + c * LANES < d, other=0.0)
            tiles = tiles + (m * LOG2E,)
    return tiles


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
def _low(pair):
    return pair.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _high(pair):
    return (pair >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _advance(h, A2, u, v, D, bias, bc, C: tl.constexpr, N: tl.constexpr, SOFTPLUS: tl.constexpr):
    """One token: h = 2^(dt A2) h + dt u B and y = D u + <h, C>; u, v, D, bias, y are C tiles."""
    dt, x, y, stepped = (), (), (), ()
    for c in tl.static_range(C):
        step = v[c] + bias[c]
        if SOFTPLUS:
            step = softplus(step)
        dt, x, y = dt + (step,), x + (step * u[c],), y + (D[c] * u[c],)
    for n in tl.static_range(N):
        pair = tl.load(bc + n)
        sums = ()
        for c in tl.static_range(C):
            new = tl.exp2(dt[c] * A2[n * C + c]) * h[n * C + c] + x[c] * _low(pair)
            stepped, sums = stepped + (new,), sums + (y[c] + new * _high(pair),)
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
    B_s, B_b, B_l, C_s, C_b, C_l, N: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """B, C (s, b, l, n) with any strides but the last -> float32 pairs (s, b, l, n, 2)."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < count
    n, token = i % N, i // N
    l, image = token % length, token // length
    s, b = image // batch, image % batch
    for_B = tl.load(B_ptr + s * B_s + b * B_b + l * B_l + n, mask=mask)
    for_C = tl.load(C_ptr + s * C_s + b * C_b + l * C_l + n, mask=mask)
    tl.store(bc_ptr + 2 * i, for_B.to(tl.float32), mask=mask)
    tl.store(bc_ptr + 2 * i + 1, for_C.to(tl.float32), mask=mask)


@triton.jit(do_not_specialize=["batch", "length", "segment"])
def forward_kernel(
    u_ptr, delta_ptr, A_ptr, bc_ptr, D_ptr, z_ptr, bias_ptr, start_ptr,
    out_ptr, sum_ptr, last_ptr, states_ptr,
    batch, length, d, segment, scale, reverse,
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
        last (s, b, d, n).  states (s, b, checkpoints, n, d): h before every EVERY-th token of a
            segment, in scan order.
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
    bc_at = bc_ptr + ((s64 * batch + b) * length + token) * N
    z_at = z_ptr + b * z_b + token * z_l + channel
    position = (b * length + token) * d + channel
    A2 = _load_A2(A_ptr, s, d, channel, C, N)
    D = _vector(D_ptr, s, d, channel, C, HAS_D)
    bias = _vector(bias_ptr, s, d, channel, C, HAS_BIAS)
    row = s64 * batch + b
    if HAS_START:
        h = _load_state(start_ptr + (row * parts + part) * N * d + channel, d, channel, C, N)
    else:
        h = ()
        for _ in tl.static_range(N * C):
            h = h + (tl.zeros(channel.shape, tl.float32),)
    checkpoints = tl.cdiv(length, EVERY)
    states_at = states_ptr + (row * checkpoints + part * (segment // EVERY)) * N * d + channel

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
                _store_state(states_at, h, d, channel, C, N)
                states_at += N * d
        h, y = _advance(h, A2, u, v, D, bias, bc_at, C, N, SOFTPLUS)
        # Direction 0 keeps its sum of the middle token in registers.
        stored = (0 * s + 2 * i + 1 != count) | (s == 1)
        _store(sum_ptr + position, y, channel, d, C, stored)
        u, v = u_next, v_next
        bc_at += step * N
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
                _store_state(states_at, h, d, channel, C, N)
                states_at += N * d
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
        bc_at += step * N
        z_at += step * z_l
        position += step * d
    ends = tl.where(ahead, parts - 1, 0) == part
    for n in tl.static_range(N):
        for c in tl.static_range(C):
            at = last_ptr + (row * d + channel + c * LANES) * N + n
            tl.store(at, h[n * C + c], mask=(channel + c * LANES < d) & ends)


# --- segments --------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["batch", "length", "segment"])
def carry_kernel(
    w_ptr, delta_ptr, A_ptr, V_ptr, z_ptr, bias_ptr, ends_ptr, sums_ptr,
    batch, length, d, segment, scale, reverse,
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
    V_at = V_ptr + s64 * V_s + b * V_b + token * V_l
    z_at = z_ptr + b * z_b + token * z_l + channel
    A2 = _load_A2(A_ptr, s, d, channel, C, N)
    bias = _vector(bias_ptr, s, d, channel, C, HAS_BIAS)
    h, total = (), ()
    for _ in tl.static_range(N * C):
        h = h + (tl.zeros(channel.shape, tl.float32),)
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
        for n in tl.static_range(N):
            V = tl.load(V_at + n).to(tl.float32)
            for c in tl.static_range(C):
                decay = tl.exp2(dt[c] * A2[n * C + c])
                if ADJOINT:
                    new = decay * (h[n * C + c] + x[c] * V)
                else:
                    new = decay * h[n * C + c] + x[c] * V
                stepped = stepped + (new,)
        h, total = stepped, summed
        w_at += step * w_l
        delta_at += step * delta_l
        V_at += step * V_l
        z_at += step * z_l
    row = (s64 * batch + b) * parts + part
    _store_state(ends_ptr + row * N * d + channel, h, d, channel, C, N)
    _store(sums_ptr + row * d + channel, total, channel, d, C, channel >= 0)


@triton.jit(do_not_specialize=["batch", "parts"])
def join_kernel(
    ends_ptr, sums_ptr, A_ptr, start_ptr, batch, d, parts, reverse,
    N: tl.constexpr, HAS_START: tl.constexpr, ADJOINT: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of 32 channels, batch, s): replace each segment's end state by the state
    that the segment starts from; ``start`` (s, b, n, d) is that of the first one."""
    b, s = tl.program_id(1).to(tl.int64), tl.program_id(2)
    row = s.to(tl.int64) * batch + b
    channel = tl.program_id(0) * LANES + tl.arange(0, LANES)
    mask = channel < d
    if HAS_START:
        h = _load_state(start_ptr + row * N * d + channel, d, channel, 1, N)
    else:
        h = ()
        for _ in tl.static_range(N):
            h = h + (tl.zeros(channel.shape, tl.float32),)
    A2 = _load_A2(A_ptr, s, d, channel, 1, N)
    backwards = s + reverse != 0
    if ADJOINT:
        backwards = s + reverse == 0
    for i in tl.range(0, parts):
        part = row * parts + tl.where(backwards, parts - 1 - i, i)
        at = ends_ptr + part * N * d + channel
        total = tl.load(sums_ptr + part * d + channel, mask=mask, other=0.0)
        ends = _load_state(at, d, channel, 1, N)
        _store_state(at, h, d, channel, 1, N)
        joined = ()
        for n in tl.static_range(N):
            joined = joined + (tl.exp2(total * A2[n]) * h[n] + ends[n],)
        h = joined


# --- backward --------------------------------------------------------------------------------


@triton.jit
def _step_size(v, exists, SOFTPLUS: tl.constexpr):
    """dt and its derivative w.r.t. delta; both are 0 outside the sequence: the step has no
    effect."""
    if SOFTPLUS:
        dt, slope = softplus_with_slope(v)
    else:
        dt, slope = v, 0.0 * v + 1.0
    return tl.where(exists, dt, 0.0), tl.where(exists, slope, 0.0)


@triton.jit
def _load_n(pointer, state_mask, WHOLE: tl.constexpr):
    """B or C of a token, as float32; a mask would prevent vector loads of 4."""
    if WHOLE:
        return tl.load(pointer).to(tl.float32)
    else:
        return tl.load(pointer, mask=state_mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["batch", "length", "segment"])
def backward_kernel(
    dout_ptr, u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, sum_ptr, states_ptr,
    carry_ptr, du_ptr, ddelta_ptr, dA_ptr, dB_ptr, dC_ptr, dD_ptr, dz_ptr, dbias_ptr, dstart_ptr,
    batch, length, d, segment, scale, zero, reverse,
    u_s, u_b, u_l, delta_s, delta_b, delta_l, B_s, B_b, B_l, C_s, C_b, C_l, z_b, z_l,
    N: tl.constexpr, TILE: tl.constexpr, K: tl.constexpr, EVERY: tl.constexpr,
    SOFTPLUS: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_CARRY: tl.constexpr,
):  # fmt: skip
    """Grid (batch * blocks of 32 channels, segments, s), one warp; tiles (TILE, 32), TILE >= N.

    Tensors, beside those of `forward_kernel`:
        dout (b, l, d).  A (s, n, d).  B, C (s, b, l, n).  carry (s, b, segments, n, d): the adjoint
            state that enters each segment at its end; zero without.
        du, ddelta (s, b, l, d), dz (b, l, d).  Parts of sums: dA (s, b, segments, n, d), dD, dbias
        (s, b, segments, d), dB, dC (s, b, l, blocks, n).  dstart (s, b, segments, n, d): the
        adjoint state that leaves each segment; the gradient of the initial state is the first's.
    zero: 0.0 as a run-time value, so that the compiler cannot merge two exponentials.
    """
    blocks = tl.cdiv(d, LANES)
    block, b = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    part, parts = tl.program_id(1), tl.num_programs(1)
    s, s64 = tl.program_id(2), tl.program_id(2).to(tl.int64)
    channel = block * LANES + tl.arange(0, LANES)
    state = tl.arange(0, TILE)
    channel_mask, state_mask = channel < d, state < N
    tile = state[:, None] * d + channel[None, :]  # of a (n, d) matrix
    tile_mask = state_mask[:, None] & channel_mask[None, :]

    first_token = part * segment
    count = tl.minimum(segment, length - first_token)
    ahead = s + reverse == 0
    step = tl.where(ahead, 1, -1)
    checkpoints = tl.cdiv(count, EVERY)
    # The last group of K tokens in scan order; pointers start at its first token and move back.
    existing = count - (checkpoints * EVERY - K)  # its tokens that exist: 1 to K, or fewer than 1
    start = tl.where(ahead, first_token, first_token + count - 1)
    token = (start + step * (checkpoints * EVERY - K)).to(tl.int64)
    row = s64 * batch + b
    u_at = u_ptr + s64 * u_s + b * u_b + token * u_l + channel
    delta_at = delta_ptr + s64 * delta_s + b * delta_b + token * delta_l + channel
    B_at = B_ptr + s64 * B_s + b * B_b + token * B_l + state
    C_at = C_ptr + s64 * C_s + b * C_b + token * C_l + state
    z_at = z_ptr + b * z_b + token * z_l + channel
    single = (b * length + token) * d + channel
    dout_at, sum_at, dz_at = dout_ptr + single, sum_ptr + single, dz_ptr + single
    double = (row * length + token) * d + channel
    du_at, ddelta_at = du_ptr + double, ddelta_ptr + double
    sums = ((row * length + token) * blocks + block) * N + state
    dB_at, dC_at = dB_ptr + sums, dC_ptr + sums
    to_u, to_delta, to_B, to_C, to_z = (
        step * u_l,
        step * delta_l,
        step * B_l,
        step * C_l,
        step * z_l,
    )
    to_next, to_sums = step * d, step * blocks * N
    before_first = row * tl.cdiv(length, EVERY) + part * (segment // EVERY)
    states_at = states_ptr + (before_first + checkpoints - 1) * N * d + tile

    A2 = tl.load(A_ptr + s * N * d + tile, mask=tile_mask, other=0.0) * LOG2E
    # Outside the sequence dt is 0, and 0 times -inf would be NaN; a NaN in the input is kept.
    A2 = tl.where(A2 < -3e38, -3e38, A2)
    bias = tl.zeros((LANES,), tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + s * d + channel, mask=channel_mask, other=0.0)
    D = tl.zeros((LANES,), tl.float32)
    if HAS_D:
        D = tl.load(D_ptr + s * d + channel, mask=channel_mask, other=0.0)
    g = tl.zeros((TILE, LANES), tl.float32)
    if HAS_CARRY:
        g = tl.load(carry_ptr + (row * parts + part) * N * d + tile, mask=tile_mask, other=0.0)
    dA = tl.zeros((TILE, LANES), tl.float32)
    dD = tl.zeros((LANES,), tl.float32)
    dbias = tl.zeros((LANES,), tl.float32)

    for j in tl.range(0, checkpoints * (EVERY // K)):
        group = EVERY // K - 1 - j % (EVERY // K)  # between two checkpoints
        h = tl.load(states_at, mask=tile_mask, other=0.0)
        for i in tl.range(-group * K, 0):  # from the checkpoint to the group
            exists, i = i < existing, tl.minimum(i, existing - 1)
            u = tl.load(u_at + i * to_u, mask=channel_mask, other=0.0).to(tl.float32)
            v = tl.load(delta_at + i * to_delta, mask=channel_mask, other=0.0).to(tl.float32)
            B = _load_n(B_at + i * to_B, state_mask, N == TILE)
            dt, _ = _step_size(v + bias, exists, SOFTPLUS)
            h = tl.exp2(dt[None, :] * A2) * h + (dt * u)[None, :] * B[:, None]
        befores, us, dts, slopes, Bs = (), (), (), (), ()
        for k in tl.static_range(K):  # through the group
            exists, i = k < existing, tl.minimum(k, existing - 1)
            u = tl.load(u_at + i * to_u, mask=channel_mask, other=0.0).to(tl.float32)
            v = tl.load(delta_at + i * to_delta, mask=channel_mask, other=0.0).to(tl.float32)
            B = _load_n(B_at + i * to_B, state_mask, N == TILE)
            dt, slope = _step_size(v + bias, exists, SOFTPLUS)
            before = tl.exp2(dt[None, :] * A2) * h  # a_t h_(t-1)
            h = before + (dt * u)[None, :] * B[:, None]
            befores, us, dts = befores + (before,), us + (u,), dts + (dt,)
            slopes, Bs = slopes + (slope,), Bs + (B,)
        for k in tl.static_range(K - 1, -1, -1):  # and backwards
            exists, i = k < existing, tl.minimum(k, existing - 1)
            before, u, dt, B = befores[k], us[k], dts[k], Bs[k]
            C = _load_n(C_at + i * to_C, state_mask, N == TILE)
            dy = tl.load(dout_at + i * to_next, mask=channel_mask, other=0.0).to(tl.float32) * scale
            if HAS_Z:
                z = tl.load(z_at + i * to_z, mask=channel_mask, other=0.0).to(tl.float32)
                if s == 0:
                    y = tl.load(sum_at + i * to_next, mask=channel_mask, other=0.0).to(tl.float32)
                    dz = (dy * y * silu_gradient(z)).to(dz_ptr.dtype.element_ty)
                    tl.store(dz_at + k * to_next, dz, mask=channel_mask & exists)
                dy = dy * (z * sigmoid(z))
            dy = tl.where(exists, dy, 0.0)
            x = dt * u
            now = before + x[None, :] * B[:, None]
            full = g + dy[None, :] * C[:, None]
            tl.store(dC_at + k * to_sums, tl.sum(now * dy[None, :], 1), mask=state_mask & exists)
            tl.store(dB_at + k * to_sums, tl.sum(full * x[None, :], 1), mask=state_mask & exists)
            along_B = tl.sum(full * B[:, None], 0)
            q = full * before
            along_A = tl.sum(q * A2, 0)
            dA += q * dt[None, :]
            # Recompute the decay: keeping it from above would take 16 K more registers.
            g = full * tl.exp2((dt + zero)[None, :] * A2)
            du = dy * D + along_B * dt
            ddelta = (along_B * u + along_A * LN2) * slopes[k]
            dD += dy * u
            dbias += ddelta
            du, ddelta = du.to(du_ptr.dtype.element_ty), ddelta.to(ddelta_ptr.dtype.element_ty)
            tl.store(du_at + k * to_next, du, mask=channel_mask & exists)
            tl.store(ddelta_at + k * to_next, ddelta, mask=channel_mask & exists)
        existing += K
        if group == 0:
            states_at -= N * d
        u_at -= K * to_u
        delta_at -= K * to_delta
        B_at -= K * to_B
        C_at -= K * to_C
        z_at -= K * to_z
        dout_at -= K * to_next
        sum_at -= K * to_next
        dz_at -= K * to_next
        du_at -= K * to_next
        ddelta_at -= K * to_next
        dB_at -= K * to_sums
        dC_at -= K * to_sums
    at = (row * parts + part) * N * d + tile
    tl.store(dA_ptr + at, dA, mask=tile_mask)
    tl.store(dstart_ptr + at, g, mask=tile_mask)
    at = (row * parts + part) * d + channel
    tl.store(dD_ptr + at, dD, mask=channel_mask)
    tl.store(dbias_ptr + at, dbias, mask=channel_mask)
