"""Residual addition and RMSNorm, the first step of every block."""

from torch import Tensor

from vim_ssl.kernels.backends import select


def add_rms_norm(
    hidden: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float = 1e-5,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Compute residual + hidden in float32 (or wider), and its RMSNorm.

    Args:
        hidden: (b, l, d).  residual: same shape, or None in the first block.  weight: (d,).
        backend: "auto", "torch", "numba" (CPU) or "triton" (CUDA); see `kernels/backends.py`.
    Returns: (normed in hidden's dtype, the new residual in float32 or wider).
    Raises: ValueError for shapes that do not fit.
    Reference: RMSNorm, arXiv:1910.07467.
    """
    if residual is not None and residual.shape != hidden.shape:
        raise ValueError(
            f"residual has shape {tuple(residual.shape)}; expected hidden's, {tuple(hidden.shape)}."
        )
    if weight.shape != hidden.shape[-1:]:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; expected ({hidden.shape[-1]},).")
    module = select("rms_norm", backend, hidden, residual, weight)
    return module.add_rms_norm(hidden, residual, weight, eps)
