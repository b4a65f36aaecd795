"""The scan's two CPU kernels: forward, and backward from states saved every `CHUNK` tokens.

A task is one image and one block of `LANES` channels; it walks the tokens of each direction in
turn, so nothing is flipped and no two tasks write the same place. The state is laid out (n, LANES),
channels innermost, which makes every inner loop a vector loop of fixed length. A last block with
fewer channels is worked on in padded rows.

The mathematics stands in `torch_backend.py`; here A carries a factor log2(e), since 2^x is what is
cheap. A direction's rows in memory are contiguous; only z has strides, because it is one half of a
projection's output.
"""

import numpy as np
from numba import carray
from vim_ssl.kernels.numba_common import (
    FLOAT_BYTES,
    LANES,
    LN2,
    LOG2E,
    ONE,
    ZERO,
    exp2,
    f32,
    floats_at,
    jit,
    kernel,
    log1p,
    sigmoid,
)

CHUNK = 16  # tokens between saved states; one chunk's states and decays stay in the L2 cache
THRESHOLD = f32(20)  # from here on softplus(v) is v, as in torch

# --- rows ------------------------------------------------------------------------------------


@jit()
def _row(address, offset):
    """LANES floats, `offset` floats after `address`."""
    return carray(floats_at(address + offset * FLOAT_BYTES), (LANES,))


@jit()
def _read(address, offset, width, pad):
    """The row itself, or a copy in `pad` when it is shorter than LANES."""
    row = _row(address, offset)
    if width == LANES:
        return row
    for e in range(width):
        pad[e] = row[e]
    return pad


@jit()
def _write(address, offset, width, pad):
    """Bring a short row from its pad to its place."""
    if width < LANES:
        row = _row(address, offset)
        for e in range(width):
            row[e] = pad[e]


@jit()
def _target(address, offset, width, pad):
    return _row(address, offset) if width == LANES else pad


@jit()
def _transposed(address, offset, width, n, factor):
    """(width, n) in memory -> (n, LANES), zeros in the lanes beyond and without an address."""
    m = np.zeros((n, LANES), np.float32)
    if address != 0:
        source = carray(floats_at(address + offset * FLOAT_BYTES), (width, n))
        for e in range(width):
            for k in range(n):
                m[k, e] = factor * source[e, k]
    return m


@jit()
def _store_transposed(m, address, offset, width, n):
    target = carray(floats_at(address + offset * FLOAT_BYTES), (width, n))
    for e in range(width):
        for k in range(n):
            target[e, k] = m[k, e]


@jit()
def _vector(address, offset, width):
    """A copy of `width` floats with zeros behind, or only zeros where there is no address."""
    m = np.zeros(LANES, np.float32)
    if address != 0:
        row = _row(address, offset)
        for e in range(width):
            m[e] = row[e]
    return m


@jit()
def _copy_state(source, target):
    for k in range(len(source)):
        for e in range(LANES):
            target[k, e] = source[k, e]


# --- forward ---------------------------------------------------------------------------------


@jit()
def _step_size(delta, bias, softplus, dt):
    if softplus:
        for e in range(LANES):
            v = delta[e] + bias[e]
            small = log1p(exp2((THRESHOLD if v > THRESHOLD else v) * LOG2E))
            dt[e] = v if v > THRESHOLD else small
    else:
        for e in range(LANES):
            dt[e] = delta[e] + bias[e]


@jit()
def _input(u, dt, D, x, y):
    for e in range(LANES):
        x[e] = dt[e] * u[e]
        y[e] = D[e] * u[e]


@jit()
def _advance(dt, x, B, C, A2, h, y):
    """h = a h + B x and y += C h, for one token."""
    for k in range(len(h)):
        b, c, hk, ak = B[k], C[k], h[k], A2[k]
        for e in range(LANES):
            v = exp2(dt[e] * ak[e]) * hk[e] + x[e] * b
            hk[e] = v
            y[e] += v * c


@jit()
def _add(y, other):
    for e in range(LANES):
        y[e] += other[e]


@jit()
def _copy(source, target):
    for e in range(LANES):
        target[e] = source[e]


@jit()
def _scaled(y, scale, out):
    for e in range(LANES):
        out[e] = scale * y[e]


@jit()
def _gated(y, z, scale, out):
    for e in range(LANES):
        out[e] = scale * y[e] * (z[e] * sigmoid(z[e]))


@kernel
def forward(
    u, delta, A, B, C, D, z, bias, h0, out, y_sum, last, states,
    directions, batch, length, d, n, z_b, z_l, softplus, backwards_first, scale, first, end,
):  # fmt: skip
    """Tasks [first, end) of batch * blocks.

    Addresses of float32; 0 where an optional one is missing:
        u, delta (s, b, l, d), A (s, d, n), B, C (s, b, l, n), D, bias (s, d), h0 (s, b, d, n),
        z (b, l, d) with strides z_b, z_l, 1.
        out (b, l, d): scale * sum over directions * silu(z).
        y_sum: the same shape, the sum itself, which dz needs; 0 when no gradient is wanted.
        last (s, b, d, n).  states (s, b, blocks, chunks, n, LANES): h before each chunk.
    Direction 0 reads last to first if `backwards_first`, direction 1 always does.
    """
    scale = f32(scale)
    blocks, chunks = (d + LANES - 1) // LANES, (length + CHUNK - 1) // CHUNK
    partial = y_sum if y_sum != 0 else out  # holds direction 0 until direction 1 is added
    dt, x, y = np.empty(LANES, np.float32), np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    pads = np.zeros((4, LANES), np.float32)
    for task in range(first, end):
        b, block = task // blocks, task % blocks
        e0 = block * LANES
        width = min(LANES, d - e0)
        for s in range(directions):
            sb = s * batch + b
            A2 = _transposed(A, (s * d + e0) * n, width, n, LOG2E)
            D_row, bias_row = _vector(D, s * d + e0, width), _vector(bias, s * d + e0, width)
            h = _transposed(h0, (sb * d + e0) * n, width, n, ONE)
            reverse = backwards_first or s == 1
            for i in range(length):
                if states != 0 and i % CHUNK == 0:
                    place = ((sb * blocks + block) * chunks + i // CHUNK) * n * LANES
                    _copy_state(h, carray(floats_at(states + place * FLOAT_BYTES), (n, LANES)))
                t = length - 1 - i if reverse else i
                token = sb * length + t
                _step_size(_read(delta, token * d + e0, width, pads[1]), bias_row, softplus, dt)
                _input(_read(u, token * d + e0, width, pads[0]), dt, D_row, x, y)
                B_row = carray(floats_at(B + token * n * FLOAT_BYTES), (n,))
                C_row = carray(floats_at(C + token * n * FLOAT_BYTES), (n,))
                _advance(dt, x, B_row, C_row, A2, h, y)

                place = (b * length + t) * d + e0
                if s > 0:
                    _add(y, _read(partial, place, width, pads[3]))
                if y_sum != 0 or s < directions - 1:
                    _copy(y, _target(partial, place, width, pads[3]))
                    _write(partial, place, width, pads[3])
                if s == directions - 1:
                    row = _target(out, place, width, pads[3])
                    if z != 0:
                        _gated(y, _read(z, b * z_b + t * z_l + e0, width, pads[2]), scale, row)
                    else:
                        _scaled(y, scale, row)
                    _write(out, place, width, pads[3])
            if last != 0:
                _store_transposed(h, last, (sb * d + e0) * n, width, n)


# --- backward --------------------------------------------------------------------------------


@jit()
def _step_size_and_slope(delta, bias, softplus, dt, slope):
    """dt and d dt / d delta, which is the sigmoid where dt is a softplus."""
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


@jit()
def _product(u, dt, x):
    for e in range(LANES):
        x[e] = dt[e] * u[e]


@jit()
def _rebuild(dt, x, B, A2, h, decay, decayed):
    """One token of the recurrence again, keeping a_t and a_t h_{t-1}."""
    for k in range(len(h)):
        b, hk, ak, decay_k, decayed_k = B[k], h[k], A2[k], decay[k], decayed[k]
        for e in range(LANES):
            a = exp2(dt[e] * ak[e])
            v = a * hk[e]
            decay_k[e] = a
            decayed_k[e] = v
            hk[e] = v + x[e] * b


@jit()
def _gate_gradient(dout, z, scale, dy):
    for e in range(LANES):
        dy[e] = dout[e] * scale * (z[e] * sigmoid(z[e]))


@jit()
def _z_gradient(dout, z, y_sum, scale, dz):
    for e in range(LANES):
        s = sigmoid(z[e])
        dz[e] = dout[e] * scale * y_sum[e] * (s * (ONE + z[e] * (ONE - s)))


@jit(sums=True)
def _retreat(dt, x, dy, B, C, A2, decay, decayed, g, dA, gB, qA, dB, dC):
    """One token of the adjoint: g becomes a_t g_t; dB, dC over the channels, gB, qA over n."""
    for e in range(LANES):
        gB[e] = ZERO
        qA[e] = ZERO
    for k in range(len(g)):
        b, c, gk, ak, dA_k, decay_k, decayed_k = (
            B[k],
            C[k],
            g[k],
            A2[k],
            dA[k],
            decay[k],
            decayed[k],
        )
        sum_b, sum_c = ZERO, ZERO
        for e in range(LANES):
            before = decayed_k[e]
            full = gk[e] + dy[e] * c
            sum_c += dy[e] * (before + x[e] * b)
            sum_b += full * x[e]
            gB[e] += full * b
            q = full * before
            qA[e] += q * ak[e]
            dA_k[e] += q * dt[e]
            gk[e] = full * decay_k[e]
        dB[k], dC[k] = sum_b, sum_c


@jit()
def _token_gradients(u, dt, slope, dy, D, gB, qA, du, ddelta, dD, dbias):
    for e in range(LANES):
        du[e] = dy[e] * D[e] + gB[e] * dt[e]
        r = (gB[e] * u[e] + qA[e] * LN2) * slope[e]
        ddelta[e] = r
        dbias[e] += r
        dD[e] += dy[e] * u[e]


@kernel
def backward(
    dout, dlast, u, delta, A, B, C, D, z, bias, y_sum, states,
    du, ddelta, dA, dB, dC, dD, dz, dbias, dh0,
    directions, batch, length, d, n, z_b, z_l, softplus, backwards_first, scale, first, end,
):  # fmt: skip
    """Tasks [first, end) of batch * blocks; the arguments of `forward`, and

    dout (b, l, d), dlast (s, b, d, n) or 0; written are du, ddelta, dz, dh0 as their namesakes, and
    what each task contributes to the sums: dA (s, b, d, n), dD, dbias (s, b, d) to be added over b,
    dB, dC (s, b, l, blocks, n) over the blocks.
    """
    scale = f32(scale)
    blocks, chunks = (d + LANES - 1) // LANES, (length + CHUNK - 1) // CHUNK
    kept = min(CHUNK, length)
    decay = np.empty((kept, n, LANES), np.float32)
    decayed = np.empty((kept, n, LANES), np.float32)
    dt = np.empty((kept, LANES), np.float32)
    x = np.empty((kept, LANES), np.float32)
    slope = np.empty((kept, LANES), np.float32)
    dy, gB, qA = (
        np.empty(LANES, np.float32),
        np.empty(LANES, np.float32),
        np.empty(LANES, np.float32),
    )
    pads = np.zeros((6, LANES), np.float32)
    h = np.empty((n, LANES), np.float32)
    for task in range(first, end):
        b, block = task // blocks, task % blocks
        e0 = block * LANES
        width = min(LANES, d - e0)
        for s in range(directions):
            sb = s * batch + b
            A2 = _transposed(A, (s * d + e0) * n, width, n, LOG2E)
            D_row, bias_row = _vector(D, s * d + e0, width), _vector(bias, s * d + e0, width)
            g = _transposed(dlast, (sb * d + e0) * n, width, n, ONE)
            A_sum = np.zeros((n, LANES), np.float32)
            D_sum, bias_sum = np.zeros(LANES, np.float32), np.zeros(LANES, np.float32)
            reverse = backwards_first or s == 1
            for chunk in range(chunks - 1, -1, -1):
                start, stop = chunk * CHUNK, min((chunk + 1) * CHUNK, length)
                place = ((sb * blocks + block) * chunks + chunk) * n * LANES
                _copy_state(carray(floats_at(states + place * FLOAT_BYTES), (n, LANES)), h)
                for i in range(start, stop):
                    t = length - 1 - i if reverse else i
                    token, j = sb * length + t, i - start
                    _step_size_and_slope(_read(delta, token * d + e0, width, pads[0]), bias_row,
                                         softplus, dt[j], slope[j])  # fmt: skip
                    _product(_read(u, token * d + e0, width, pads[1]), dt[j], x[j])
                    B_row = carray(floats_at(B + token * n * FLOAT_BYTES), (n,))
                    _rebuild(dt[j], x[j], B_row, A2, h, decay[j], decayed[j])
                for i in range(stop - 1, start - 1, -1):
                    t = length - 1 - i if reverse else i
                    token, j = sb * length + t, i - start
                    place = (b * length + t) * d + e0
                    dout_row = _read(dout, place, width, pads[0])
                    if z != 0:
                        z_row = _read(z, b * z_b + t * z_l + e0, width, pads[1])
                        _gate_gradient(dout_row, z_row, scale, dy)
                        if s == 0 and dz != 0:
                            y_row = _read(y_sum, place, width, pads[2])
                            _z_gradient(dout_row, z_row, y_row, scale,
                                        _target(dz, place, width, pads[3]))  # fmt: skip
                            _write(dz, place, width, pads[3])
                    else:
                        _scaled(dout_row, scale, dy)
                    B_row = carray(floats_at(B + token * n * FLOAT_BYTES), (n,))
                    C_row = carray(floats_at(C + token * n * FLOAT_BYTES), (n,))
                    part = (token * blocks + block) * n * FLOAT_BYTES
                    dB_row = carray(floats_at(dB + part), (n,))
                    dC_row = carray(floats_at(dC + part), (n,))
                    _retreat(dt[j], x[j], dy, B_row, C_row, A2, decay[j], decayed[j],
                             g, A_sum, gB, qA, dB_row, dC_row)  # fmt: skip
                    place = token * d + e0
                    _token_gradients(
                        _read(u, place, width, pads[1]), dt[j], slope[j], dy, D_row, gB, qA,
                        _target(du, place, width, pads[4]),
                        _target(ddelta, place, width, pads[5]), D_sum, bias_sum,
                    )  # fmt: skip
                    _write(du, place, width, pads[4])
                    _write(ddelta, place, width, pads[5])
            _store_transposed(A_sum, dA, (sb * d + e0) * n, width, n)
            if dh0 != 0:
                _store_transposed(g, dh0, (sb * d + e0) * n, width, n)
            for e in range(width):
                _row(dD, sb * d + e0)[e] = D_sum[e]
                _row(dbias, sb * d + e0)[e] = bias_sum[e]
