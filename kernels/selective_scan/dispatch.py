"""The two public scans: check the arguments, select a backend, call it."""

import os

import torch
from torch import Tensor

from vim_ssl.kernels.backends import select

MAX_D_STATE = 64


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    *,
    initial_state: Tensor | None = None,
    return_last_state: bool = False,
    reverse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Scan one direction: h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t, y_t = C_t h_t + D u_t.

    dt is ``delta + delta_bias``, or its softplus if ``delta_softplus``; the output is
    ``y * silu(z)``.

    Dims: b batch, l tokens, d channels (d_inner), n = d_state, g groups of channels.

    Args:
        u, delta, z: (b, d, l), floating point. The state is always at least float32.
        A: (d, n), negative.
        B, C: (b, n, l), or (b, g, n, l) where group i serves the i-th d/g channels.
        D, delta_bias: (d,).
        initial_state: (b, d, n), the state before the first token read; zeros by default.
        return_last_state: also return the state after the last token read, (b, d, n), float32
            (float64 for float64 inputs).
        reverse: read the tokens from last to first; the output keeps the order of the tokens.
        backend: "auto", "reference", "torch", "numba" (CPU) or "triton" (CUDA). A backend
            requested by name runs or raises. ``VIM_SSL_BACKEND`` overrides "auto".

    Returns: y (b, d, l) in u's dtype; (y, last state) if ``return_last_state``.
    Raises: ValueError for wrong shapes, dtypes, devices or an unknown backend, naming the argument.
    Reference: Mamba, arXiv:2312.00752, section 3; signature of state-spaces/mamba.
    """
    if u.dim() != 3:
        raise ValueError(f"u has shape {tuple(u.shape)}; expected (b, d, l).")
    b, d, l = u.shape
    n = _check_A(A, (d,))
    groups = {m.shape[1] for m in (B, C) if m.dim() == 4}
    for g in groups:
        if g == 0 or d % g:
            raise ValueError(f"B and C have {g} groups, which do not divide d = {d}.")
    _check_shape("delta", delta, (b, d, l))
    for name, m in (("B", B), ("C", C)):
        if m.dim() == 4:
            _check_shape(name, m, (b, m.shape[1], n, l), "(b, g, n, l)")
        else:
            _check_shape(name, m, (b, n, l), "(b, n, l)")
    if len(groups) > 1:
        raise ValueError(f"B has {B.shape[1]} groups, C has {C.shape[1]}; they must be equal.")
    _check_shape("D", D, (d,))
    _check_shape("z", z, (b, d, l))
    _check_shape("delta_bias", delta_bias, (d,))
    _check_shape("initial_state", initial_state, (b, d, n))
    _check_tensors(u=u, delta=delta, A=A, B=B, C=C, D=D, z=z, delta_bias=delta_bias,
                   initial_state=initial_state)  # fmt: skip
    given = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    return select("selective_scan", backend, *given).selective_scan(
        *given[:-1], delta_softplus,
        initial_state=initial_state, return_last_state=return_last_state, reverse=reverse,
    )  # fmt: skip


def bi_selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = True,
    *,
    scale: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """Scan both directions in one call: scale (y_forward + y_backward) silu(z), channel-last.

    Index 0 of the leading axis reads first to last, index 1 last to first; each has separate
    parameters, and neither input nor output is flipped. The gate is shared.

    Dims: b batch, l tokens, d channels (d_inner), n = d_state.

    Args:
        u, delta: (2, b, l, d).  A: (2, d, n), negative.  B, C: (2, b, l, n).
        D, delta_bias: (2, d).  z: (b, l, d), or None for an ungated sum.
        delta_softplus: softplus(delta + delta_bias), else delta + delta_bias.
        scale: 0.5 for models that average their directions.
        backend: as in `selective_scan`.

    Returns: (b, l, d) in u's dtype.
    Raises: ValueError for wrong shapes, dtypes, devices or an unknown backend, naming the argument.
    Reference: Vision Mamba, arXiv:2401.09417, Algorithm 1.
    """
    if u.dim() != 4 or u.shape[0] != 2:
        raise ValueError(f"u has shape {tuple(u.shape)}; expected (2, b, l, d), directions first.")
    _, b, l, d = u.shape
    n = _check_A(A, (2, d))
    _check_shape("delta", delta, (2, b, l, d))
    _check_shape("B", B, (2, b, l, n), "(2, b, l, n)")
    _check_shape("C", C, (2, b, l, n), "(2, b, l, n)")
    _check_shape("D", D, (2, d))
    _check_shape("z", z, (b, l, d))
    _check_shape("delta_bias", delta_bias, (2, d))
    _check_tensors(u=u, delta=delta, A=A, B=B, C=C, D=D, z=z, delta_bias=delta_bias)
    given = (u, delta, A, B, C, D, z, delta_bias)
    return select("selective_scan", backend, *given).bi_selective_scan(
        *given, delta_softplus, scale=scale
    )


def _check_A(A: Tensor, lead: tuple[int, ...]) -> int:
    if A.dim() != len(lead) + 1 or tuple(A.shape[:-1]) != lead:
        raise ValueError(f"A has shape {tuple(A.shape)}; expected {(*lead, 'n')} with n = d_state.")
    check_d_state("A", A)
    return A.shape[-1]


def check_d_state(name: str, A: Tensor) -> None:
    """Raise ValueError for more states than the kernels have, or none."""
    if not 1 <= A.shape[-1] <= MAX_D_STATE:
        raise ValueError(f"{name} has d_state {A.shape[-1]}; expected 1 to {MAX_D_STATE}.")


def _check_shape(name: str, m: Tensor | None, expected: tuple[int, ...], form: str = "") -> None:
    if m is not None and tuple(m.shape) != expected:
        form = f" = {form}" if form else ""
        raise ValueError(f"{name} has shape {tuple(m.shape)}; expected {expected}{form}.")


def _check_tensors(*, u: Tensor, A: Tensor, **others: Tensor | None) -> None:
    tensors: dict[str, Tensor | None] = {"u": u, "A": A, **others}
    for name, m in tensors.items():
        if m is None:
            continue
        if m.device != u.device:
            raise ValueError(f"{name} is on {m.device} but u is on {u.device}; move it there.")
        if not m.is_floating_point():
            raise ValueError(f"{name} has dtype {m.dtype}; expected a floating-point dtype.")
    # A compiled graph cannot branch on values.
    if os.environ.get("VIM_SSL_CHECK") == "1" and not torch.compiler.is_compiling():
        if not bool((A < 0).all()):
            raise ValueError("A has values that are not negative: the state would grow (A < 0).")
        for name, m in tensors.items():
            if m is not None and not bool(torch.isfinite(m).all()):
                raise ValueError(f"{name} contains values that are not finite.")
