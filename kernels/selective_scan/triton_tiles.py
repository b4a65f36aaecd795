"""Tiles of states, which the Triton kernels of both passes share.

A thread holds its states as a tuple of tiles (rows, threads) whose rows are in registers. The
number of rows is a power of two: with at most 4, 13 states are tiles of 4, 4, 4 and 1.

Triton derives the layout of a tile from the addresses that it is loaded from. `across` makes it put
the columns on threads and the rows in registers; with any other layout, every operation between
tiles would go through shared memory. A test of `benchmarks/sm90.py`'s counts would notice.
"""

import triton
import triton.language as tl

LANES: tl.constexpr = tl.constexpr(32)


@triton.constexpr_function
def tile_count(rows, most):
    """Number of tiles of at most ``most`` rows, a power of two."""
    return rows // most + (rows % most).bit_count()


@triton.constexpr_function
def height(rows, most, i):
    """Rows of the i-th tile."""
    for _ in range(i):
        rows -= min(most, 1 << (rows.bit_length() - 1))
    return min(most, 1 << (rows.bit_length() - 1))


@triton.constexpr_function
def first_row(rows, most, i):
    """Rows before the i-th tile."""
    left = rows
    for _ in range(i):
        left -= min(most, 1 << (left.bit_length() - 1))
    return rows - left


@triton.jit
def numbers(ROWS: tl.constexpr, MOST: tl.constexpr, i: tl.constexpr):
    """Numbers of the rows of the i-th tile, (rows, 1)."""
    return (tl.arange(0, height(ROWS, MOST, i)) + first_row(ROWS, MOST, i))[:, None]


@triton.jit
def across(m, zero):
    """m, a number of each thread in an address, as (1, threads); ``zero`` is a run-time 0.

    Triton must not know its alignment, else it would load vectors along threads; nor that threads
    may share an address, else it would distribute rows.
    """
    return tl.max_contiguous(m ^ zero, [m.shape[0]])[None, :]


@triton.jit
def low(pair):
    return pair.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def high(pair):
    return (pair >> 32).to(tl.int32).to(tl.float32, bitcast=True)
