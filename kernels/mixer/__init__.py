"""The mixer of a Vim block between its two outer projections: convolution, x_proj, dt_proj, scan
and gate, in both directions.

`torch_backend.py` is the readable form. The fused backends compute the same as one operator, which
saves little for the backward pass: see `fused.py`.
"""

from typing import NamedTuple

from torch import Tensor

from vim_ssl.kernels.backends import BACKENDS, resolve, select
from vim_ssl.kernels.selective_scan.dispatch import check_d_state


class Direction(NamedTuple):
    """The parameters of one direction: d channels (d_inner), n states, k taps, r = dt_rank."""

    conv_weight: Tensor  # (d, 1, k)
    conv_bias: Tensor  # (d,)
    x_proj: Tensor  # (r + 2 n, d)
    dt_proj: Tensor  # (d, r)
    dt_bias: Tensor  # (d,)
    A_log: Tensor  # (d, n); A = -exp(A_log)
    D: Tensor  # (d,)


def bi_mixer(
    xz: Tensor,
    forward: Direction,
    backward: Direction,
    *,
    gated: bool = True,
    scale: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """Mix tokens in both directions.

    Dims: b batch, l tokens, d channels (d_inner).

    Args:
        xz: (b, l, 2 d), the output of ``in_proj``: x, then the gate z.
        forward, backward: parameters of the direction that reads first to last, and last to first.
        gated: multiply by silu(z); otherwise z is ignored.
        scale: 0.5 for models that average their directions.
        backend: of the scan, as in `selective_scan`; a backend without a fused mixer runs its scan
            between operations of torch.

    Returns: (b, l, d) in xz's dtype.
    Raises: ValueError for an unknown backend, and for shapes that do not fit.
    Reference: Vision Mamba, arXiv:2401.09417, Algorithm 1, lines 4 to 16.
    """
    if xz.dim() != 3 or xz.shape[-1] != 2 * len(forward.D):
        raise ValueError(
            f"xz has shape {tuple(xz.shape)}; expected (b, l, 2 d) with d = {len(forward.D)}."
        )
    _check(forward, backward)
    name = resolve("selective_scan", backend, xz.device.type)
    module = select(
        "mixer", backend if name in BACKENDS["mixer"] else "torch", xz, *forward, *backward
    )
    return module.bi_mixer(xz, forward, backward, gated, scale, backend)


def _check(forward: Direction, backward: Direction) -> None:
    """The kernels do not check what they read."""
    check_d_state("A_log", forward.A_log)
    (d, n), r, k = forward.A_log.shape, forward.dt_proj.shape[-1], forward.conv_weight.shape[-1]
    expected = ((d, 1, k), (d,), (r + 2 * n, d), (d, r), (d,), (d, n), (d,))
    for title, one in (("forward", forward), ("backward", backward)):
        for name, m, shape in zip(Direction._fields, one, expected, strict=True):
            if m.shape != shape:
                raise ValueError(
                    f"{title}.{name} has shape {tuple(m.shape)}; expected {shape} (d = {d}, "
                    f"n = {n}, r = {r}, k = {k})."
                )
