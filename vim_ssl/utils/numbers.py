"""Numbers that are not finite: NaN and infinity.

argmax, topk and sort give an answer for NaN, too, so values are checked before they are ranked.
"""

from typing import Any

REMEDY = "run vim-ssl verify on the model"


class NotFinite(ValueError):
    """Values that are NaN or infinite."""


def require_finite(values: Any, what: str, remedy: str = "") -> None:
    """Check that all values are finite.

    Args:
        values: a tensor or array of any shape, or anything that `numpy.asarray` accepts.
        what: what the values are, in the plural, for the message: "the logits".
        remedy: what to do, as a sentence without its full stop.
    Raises: NotFinite, a ValueError, with the number of such values and the first row with one.
    """
    import torch

    values = torch.as_tensor(values)
    if not (values.is_floating_point() or values.is_complex()) or not values.numel():
        return
    # One pass without a mask of the same size: a sum is finite only if all values are. The sum of
    # finite values may overflow; then the values themselves decide. (Some devices lack float64.)
    if values.is_floating_point() and values.detach().sum(dtype=torch.float32).isfinite():
        return
    wrong = ~values.detach().isfinite()
    if not (count := int(wrong.sum())):
        return
    row = int(wrong.reshape(len(wrong), -1).any(1).nonzero()[0]) if wrong.ndim else 0
    raise NotFinite(
        f"{what}: {count:,} of {wrong.numel():,} values are not finite (NaN or infinity), the "
        f"first in row {row}; {remedy or 'check the weights and the data'}."
    )


def finite_rows(values: Any) -> Any:
    """Return bool (n,): whether all values of a row of a tensor (n, ...) are finite."""
    return values.isfinite().flatten(1).all(1)
