"""The Triton kernel of the backward scan; `triton_backend.py` launches it.

A program is one warp and owns some channels of one image in one direction. It processes the tokens
from last to first in groups of `K`. For each group it recomputes the states from the last saved one
(one every `EVERY` tokens) up to the group, then through the group, where it keeps them in
registers, and then runs the adjoint recurrence backwards. dB and dC are sums over channels: every
program writes a partial sum, and torch adds these in a fixed order. There are no atomics, so
results are bitwise reproducible.

Lanes. The 32 lanes form `G` groups; group i holds the states i, i + G, i + 2 G and so on. A lane
works on `X` channels: one that it owns and X - 1 that lanes of other groups own. Whatever belongs
to a channel alone, loads, step size, gate, results, is computed by its owner and exchanged by
shuffles. With X = G every lane owns another channel; with X < G, G / X lanes own the same one. So
a lane holds X tuples of N / G states, as tiles (rows, 32) with the rows in registers, and sums over
rows and over the X channels take place inside a lane. What remains of the sums over channels is
exchanged in halves: each step adds two lanes and leaves half as many rows.

Arithmetic, legend and segments are those of `triton_kernels.py`.
"""

import triton
import triton.language as tl

from vim_ssl.kernels.selective_scan.triton_tiles import (
    LANES,
    across,
    first_row,
    height,
    high,
    low,
    numbers,
    tile_count,
)
from vim_ssl.kernels.triton_math import LN2, LOG2E, sigmoid, softplus_with_slope

MOST: tl.constexpr = tl.constexpr(64)  # rows of a tile


@triton.jit
def _channel(first, lane, x: tl.constexpr, G: tl.constexpr, X: tl.constexpr):
    """The x-th channel of each lane; the 0th is its own."""
    return first + (lane ^ (x * (LANES // G))) % (LANES // G * X)


@triton.jit
def _load_state(
    pointer, d, first, lane, zero,
    N: tl.constexpr, ROWS: tl.constexpr, G: tl.constexpr, X: tl.constexpr,
):  # fmt: skip
    """Tiles of a matrix (n, d), tile by tile, X channels each; zeros beyond n and d."""
    tiles = ()
    state = lane // (LANES // G)
    for i in tl.static_range(tile_count(ROWS, MOST)):
        n = numbers(ROWS, MOST, i) * G
        for x in tl.static_range(X):
            channel = _channel(first, lane, x, G, X)
            at = pointer + across(state * d + channel, zero).to(tl.int64) + n * d
            mask = (n + state[None, :] < N) & (channel < d)[None, :]
            tiles = tiles + (tl.load(at, mask=mask, other=0.0),)
    return tiles


@triton.jit
def _load_block(
    pointer, first, lane, zero,
    N: tl.constexpr, ROWS: tl.constexpr, G: tl.constexpr, X: tl.constexpr,
):  # fmt: skip
    """As `_load_state`, from a block (n, 32): the distances are constants, so that no address is
    computed, and nothing is masked."""
    tiles = ()
    state = lane // (LANES // G)
    for i in tl.static_range(tile_count(ROWS, MOST)):
        n = numbers(ROWS, MOST, i) * G
        for x in tl.static_range(X):
            channel = _channel(first, lane, x, G, X)
            at = pointer + across(state * LANES + channel, zero).to(tl.int64) + n * LANES
            if ROWS * G == N:
                tiles = tiles + (tl.load(at),)
            else:
                tiles = tiles + (tl.load(at, mask=n + state[None, :] < N, other=0.0),)
    return tiles


@triton.jit
def _store_block(
    pointer, tiles, first, lane, zero,
    N: tl.constexpr, ROWS: tl.constexpr, G: tl.constexpr, X: tl.constexpr,
):  # fmt: skip
    state = lane // (LANES // G)
    for i in tl.static_range(tile_count(ROWS, MOST)):
        n = numbers(ROWS, MOST, i) * G
        for x in tl.static_range(X):
            channel = _channel(first, lane, x, G, X)
            at = pointer + across(state * LANES + channel, zero).to(tl.int64) + n * LANES
            tl.store(at, tiles[i * X + x], mask=n + state[None, :] < N)


# --- exchanges between lanes -----------------------------------------------------------------


@triton.jit
def _from(m, lane, MASK: tl.constexpr):
    """m (32,) of the lanes whose number differs in the bits of MASK."""
    return tl.gather(m, lane ^ MASK, 0)


@triton.jit
def _to_all(local, lane, G: tl.constexpr, X: tl.constexpr):
    """A value of each channel, from its owner to the lanes that work on it."""
    values = (local,)
    for x in tl.static_range(1, X):
        values = values + (_from(local, lane, x * (LANES // G)),)
    return values


@triton.jit
def _to_owner(sums, lane, G: tl.constexpr, X: tl.constexpr):
    """The sum over the lanes that work on a channel, to its owners."""
    if X == 4:
        sums = (
            sums[0] + _from(sums[2], lane, 2 * LANES // G),
            sums[1] + _from(sums[3], lane, 2 * LANES // G),
        )
    total = sums[0]
    if X >= 2:
        total = total + _from(sums[1], lane, LANES // G)
    for bit in tl.static_range(4, -1, -1):
        if (1 << bit) >= LANES // G * X:
            total = total + _from(total, lane, 1 << bit)
    return total


@triton.jit
def _total(m, X: tl.constexpr):
    total = m[0]
    for x in tl.static_range(1, X):
        total += m[x]
    return total


@triton.jit
def _halve(a, b, lane, MASK: tl.constexpr):
    """Tiles (rows, 32): a + a' in half of the lanes, b + b' in the others; a' and b' are those of
    the other half."""
    bit = tl.broadcast_to(((lane & MASK) != 0)[None, :], a.shape)
    other = tl.broadcast_to((lane ^ MASK)[None, :], a.shape)
    return tl.where(bit, b, a) + tl.gather(tl.where(bit, a, b), other, 1)


@triton.jit
def _store_sums(
    pointer, to_C, for_B, for_C, exists, lane, zero,
    i: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """Sum dB and dC (rows, 32) over the lanes of each group and write them."""
    EACH: tl.constexpr = LANES // G // 2  # lanes that keep dB, and as many that keep dC
    m = _halve(for_B, for_C, lane, EACH)
    for bit in tl.static_range(3, -1, -1):
        if (1 << bit) < EACH:
            if m.shape[0] > 1:
                upper, lower = m.reshape(2, m.shape[0] // 2, LANES).permute(1, 2, 0).split()
                m = _halve(upper, lower, lane, 1 << bit)
            else:
                other = tl.broadcast_to((lane ^ (1 << bit))[None, :], m.shape)
                m = m + tl.gather(m, other, 1)
    LEFT: tl.constexpr = m.shape[0]
    SAME: tl.constexpr = EACH * LEFT // height(ROWS, MOST, i)  # lanes with the same sum
    row = first_row(ROWS, MOST, i) + lane % EACH // SAME * LEFT
    state = lane // (LANES // G) + row * G
    n = tl.arange(0, LEFT)[:, None] * G
    at = pointer + across(lane // EACH % 2 * to_C + state, zero) + n
    mask = (n + state[None, :] < N) & (lane % SAME == 0)[None, :] & exists
    tl.store(at, m, mask=mask)


# --- the kernel ------------------------------------------------------------------------------


@triton.jit
def _row(m, k):
    """Row k of (tokens, 32); since rows are registers, the sum of one number costs nothing."""
    tokens = tl.arange(0, m.shape[0])[:, None]
    return tl.sum(tl.where(tokens == k, m, -0.0), 0)


@triton.jit
def _load(pointer, mask, other):
    return tl.load(pointer, mask=mask, other=other).to(tl.float32)


@triton.jit
def _step_size(v, exists, SOFTPLUS: tl.constexpr):
    """dt and its derivative w.r.t. delta; both are 0 outside the sequence, where v is -inf: the
    step has no effect."""
    if SOFTPLUS:
        dt, slope = softplus_with_slope(v)
    else:
        dt, slope = tl.where(exists, v, 0.0), tl.where(exists, 0.0 * v + 1.0, 0.0)
    return dt, slope


@triton.jit
def _step(h, A2, dt, x, bc_at, ROWS: tl.constexpr, G: tl.constexpr, X: tl.constexpr):
    """One token: 2^(dt A2) h + dt u B, x = dt u."""
    stepped = ()
    for i in tl.static_range(tile_count(ROWS, MOST)):
        B = low(tl.load(bc_at + numbers(ROWS, MOST, i) * G))
        for c in tl.static_range(X):
            new = tl.exp2(dt[c][None, :] * A2[i * X + c]) * h[i * X + c] + x[c][None, :] * B
            stepped = stepped + (new,)
    return stepped


@triton.jit(do_not_specialize=["batch", "length", "segment", "zero"])
def backward_kernel(
    dout_ptr, u_ptr, delta_ptr, A_ptr, bc_ptr, D_ptr, z_ptr, bias_ptr, sum_ptr, states_ptr,
    carry_ptr, du_ptr, ddelta_ptr, dA_ptr, dbc_ptr, dD_ptr, dz_ptr, dbias_ptr, dstart_ptr,
    batch, length, d, segment, scale, zero, reverse,
    z_b, z_l,
    N: tl.constexpr, G: tl.constexpr, X: tl.constexpr, K: tl.constexpr, EVERY: tl.constexpr,
    SOFTPLUS: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_CARRY: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """Grid (batch * blocks of 32 X / G channels, segments, s), one warp.

    Tensors, beside those of `forward_kernel`:
        dout (b, l, d), u and delta (s, b, l, d), contiguous.  A (s, n, d).
        bc: pairs (s, b, K - 1 + l + K - 1, ROWS G), zero around the tokens and beyond n, see
            `pack_kernel`; ROWS = n / G, rounded up.
        carry (s, b, segments, n, d): the adjoint state that enters each segment at its end; zero
            without.
        du, ddelta (s, b, l, d), dz (b, l, d).  Parts of sums: dA (s, b, segments, blocks of 32
        channels, n, 32), dD, dbias (s, b, segments, d), dbc (2, s, b, l, programs, n), first dB and
        then dC.  dstart, as dA: the adjoint state that leaves each segment; the gradient of the
        initial state is the first's.
    zero: 0 as a run-time value, so that the compiler cannot merge two exponentials; see `across`.
    OFFSET: dtype of offsets within one image and direction.
    """
    ROWS: tl.constexpr = (N + G - 1) // G
    TILES: tl.constexpr = tile_count(ROWS, MOST) * X
    CHANNELS: tl.constexpr = LANES // G * X
    blocks = tl.cdiv(d, CHANNELS)
    block, b = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    part, parts = tl.program_id(1), tl.num_programs(1)
    s, s64 = tl.program_id(2), tl.program_id(2).to(tl.int64)
    row = s64 * batch + b
    lane = tl.arange(0, LANES)
    first = block * CHANNELS
    channel = first + lane % CHANNELS
    valid = (channel < d)[None, :]
    owner = valid & (lane < CHANNELS)[None, :]  # one of those that own a channel

    first_token = part * segment
    count = tl.minimum(segment, length - first_token)
    ahead = s + reverse == 0
    step = tl.where(ahead, 1, -1)
    start = tl.where(ahead, first_token, first_token + count - 1)
    groups, checkpoints = tl.cdiv(count, K), tl.cdiv(count, EVERY)
    # Offsets begin at the first token after the last saved state, or at that of the last group;
    # tokens of this group that do not exist are masked.
    saved = (start + step * (checkpoints - 1) * EVERY).to(OFFSET)
    token = (start + step * (groups - 1) * K).to(OFFSET)
    column = across(channel, zero)
    z_ptr += b * z_b
    single, double = b * length * d, row * length * d
    z_at, at = token * z_l + column, token * d + column
    state = across(lane // (LANES // G), zero).to(tl.int64)
    bc_at = bc_ptr + (row * (length + 2 * (K - 1)) + K - 1 + saved) * (ROWS * G) + state
    to_z, to_next = step * z_l, step * d
    to_bc, to_dbc = step * (ROWS * G), step * blocks * N
    dbc_at = dbc_ptr + ((row * length + token + step * (K - 1)) * blocks + block) * N
    to_C = tl.num_programs(2).to(tl.int64) * batch * length * blocks * N
    to_saved = tl.cdiv(d, LANES) * (N * LANES)
    number = row * tl.cdiv(length, EVERY) + part * (segment // EVERY) + checkpoints - 1
    states_at = states_ptr + number * to_saved + first // LANES * (N * LANES)

    A2, g, dA = (), (), ()
    A = _load_state(A_ptr + s * N * d, d, first, lane, zero, N, ROWS, G, X)
    for i in tl.static_range(TILES):
        # Outside the sequence dt is 0, and 0 times -inf would be NaN; a NaN in the input is kept.
        A2 = A2 + (tl.where(A[i] * LOG2E < -3e38, -3e38, A[i] * LOG2E),)
        dA = dA + (tl.zeros(A[i].shape, tl.float32),)
    g = dA
    if HAS_CARRY:
        carry_at = carry_ptr + (row * parts + part) * N * d
        g = _load_state(carry_at, d, first, lane, zero, N, ROWS, G, X)
    bias, D = tl.zeros((1, LANES), tl.float32), tl.zeros((1, LANES), tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + s * d + column, mask=valid, other=0.0)
    if HAS_D:
        D = tl.load(D_ptr + s * d + column, mask=valid, other=0.0)
    dD, dbias = tl.zeros((LANES,), tl.float32), tl.zeros((LANES,), tl.float32)
    nought = zero.to(tl.float32)
    absent = -float("inf") if SOFTPLUS else 0.0
    tokens = tl.arange(0, K)[:, None]

    existing = count - (groups - 1) * K  # tokens of the group that exist
    before = (groups - 1) * K % EVERY  # tokens between the saved state and the group
    for _ in tl.range(0, groups):
        h = _load_block(states_at, first % LANES, lane, zero, N, ROWS, G, X)
        if EVERY > K:
            early = double + at - before * to_next
            for _i in tl.range(0, before):  # up to the group
                u, v = _load(u_ptr + early, valid, 0.0), _load(delta_ptr + early, valid, absent)
                dt, _slope = _step_size(v + bias, valid, SOFTPLUS)
                dts = _to_all(_row(dt, 0), lane, G, X)
                xs = _to_all(_row(dt * u, 0), lane, G, X)
                h = _step(h, A2, dts, xs, bc_at, ROWS, G, X)
                early += to_next
                bc_at += to_bc
        here = valid & (tokens < existing)
        rows = at + tokens * to_next
        u = _load(u_ptr + double + rows, here, 0.0)
        v = _load(delta_ptr + double + rows, here, absent)
        dt, slope = _step_size(v + bias, here, SOFTPLUS)
        x = dt * u
        states, xs = h, ()
        for k in tl.static_range(K):  # through the group
            dt_k, x_k = _to_all(_row(dt, k), lane, G, X), _to_all(_row(x, k), lane, G, X)
            h = _step(h, A2, dt_k, x_k, bc_at, ROWS, G, X)
            states, xs = states + h, xs + x_k
            bc_at += to_bc
        dy = _load(dout_ptr + single + rows, here, 0.0) * scale
        written = here
        if X < G:
            written = owner & (tokens < existing)
        if HAS_Z:
            z = _load(z_ptr + (z_at + tokens * to_z), here, 0.0)
            gate = sigmoid(z)
            if s == 0:
                y = tl.load(sum_ptr + single + rows, mask=here)
                dz = dy * y * (gate * (1.0 + z * (1.0 - gate)))
                tl.store(dz_ptr + single + rows, dz.to(dz_ptr.dtype.element_ty), mask=written)
            dy = dy * (z * gate)
        sums_B, sums_A = tl.zeros((K, LANES), tl.float32), tl.zeros((K, LANES), tl.float32)
        for k in tl.static_range(K - 1, -1, -1):  # and backwards
            bc_at -= to_bc
            # As if dt were another: keeping its copies and the decays would take more registers.
            dt_k = _to_all(_row(dt, k) + nought, lane, G, X)
            dy_k = _to_all(_row(dy, k), lane, G, X)
            along_B, along_A, passed, dAs = (), (), (), ()
            for i in tl.static_range(tile_count(ROWS, MOST)):
                pair = tl.load(bc_at + numbers(ROWS, MOST, i) * G)
                B, C = low(pair), high(pair)
                for_B, for_C, summed_B, summed_A = (), (), (), ()
                for c in tl.static_range(X):
                    earlier = states[k * TILES + i * X + c]
                    now = states[(k + 1) * TILES + i * X + c]
                    dt_c, dy_c = dt_k[c][None, :], dy_k[c][None, :]
                    full = g[i * X + c] + dy_c * C
                    for_B = for_B + (full * xs[k * X + c][None, :],)
                    for_C = for_C + (now * dy_c,)
                    new = full * tl.exp2(dt_c * A2[i * X + c])
                    q = new * earlier
                    sum_B, sum_A = tl.sum(full * B, 0), tl.sum(q * A2[i * X + c], 0)
                    if i > 0:
                        sum_B, sum_A = along_B[c] + sum_B, along_A[c] + sum_A
                    summed_B, summed_A = summed_B + (sum_B,), summed_A + (sum_A,)
                    passed, dAs = passed + (new,), dAs + (dA[i * X + c] + q * dt_c,)
                along_B, along_A = summed_B, summed_A
                _store_sums(
                    dbc_at, to_C, _total(for_B, X), _total(for_C, X), k < existing, lane, zero,
                    i, N, ROWS, G,
                )  # fmt: skip
            g, dA = passed, dAs
            sums_B = tl.where(tokens == k, _to_owner(along_B, lane, G, X)[None, :], sums_B)
            sums_A = tl.where(tokens == k, _to_owner(along_A, lane, G, X)[None, :], sums_A)
            dbc_at -= to_dbc
        du = dy * D + sums_B * dt
        ddelta = (sums_B * u + sums_A * LN2) * slope
        dD += tl.sum(dy * u, 0)
        dbias += tl.sum(ddelta, 0)
        tl.store(du_ptr + double + rows, du.to(du_ptr.dtype.element_ty), mask=written)
        ddelta = ddelta.to(ddelta_ptr.dtype.element_ty)
        tl.store(ddelta_ptr + double + rows, ddelta, mask=written)
        # Back to the group before this one, and its saved state.
        back = tl.where(before == 0, EVERY, 0)
        bc_at -= (back + before) * to_bc
        states_at -= back // EVERY * to_saved
        at -= K * to_next
        z_at -= K * to_z
        before = back + before - K
        existing = K
    at = (row * parts + part) * to_saved + first // LANES * (N * LANES)
    _store_block(dA_ptr + at, dA, first % LANES, lane, zero, N, ROWS, G, X)
    _store_block(dstart_ptr + at, g, first % LANES, lane, zero, N, ROWS, G, X)
    at = (row * parts + part) * d + channel
    tl.store(dD_ptr + at, dD, mask=(channel < d) & (lane < CHANNELS))
    tl.store(dbias_ptr + at, dbias, mask=(channel < d) & (lane < CHANNELS))
