"""Top-k hits with ties: equal scores count as in random order.

A query whose correct answer shares its score with others is right in part: the probability that a
correct one is among the first k. Equal scores for everything thus give chance, in whatever order
classes, captions and images are stored.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from vim_ssl.utils.numbers import require_finite

ROWS = 2**24  # scores compared at a time
COSINE_TIE = 1e-6  # cosines that differ by less are equal: matrix products round them differently


def hit_chances(
    scores: Tensor, right: Tensor, ks: Sequence[int], *, tolerance: float = 0.0
) -> Tensor:
    """Compute the probability that a correct key is among the k with the highest scores.

    Args:
        scores: (q, n); -inf for keys that are never the answer.
        right: bool (q, n), True = a correct key; a row may have several, or none.
        ks: numbers of keys, each 1 or more.
        tolerance: scores that differ by at most this are equal.
    Returns: (len(ks), q) float64.
    Raises: ValueError for scores that are NaN.
    """
    require_finite(scores.masked_fill(scores == -torch.inf, 0), "the scores")
    best = scores.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
    ahead = (scores > best + tolerance).sum(1)
    tied = ((scores - best).abs() <= tolerance) & (scores > -torch.inf)
    tied_right, tied_wrong = ((tied & keys).sum(1).double() for keys in (right, ~right))
    # The probability that the first 0, 1, 2 … of the tied keys are all wrong.
    misses = [torch.ones_like(tied_right)]
    for j in range(max(ks)):
        left = (tied_wrong - j).clamp(min=0)
        misses.append(misses[-1] * left / (tied_wrong + tied_right - j).clamp(min=1))
    table = torch.stack(misses, 1)
    has_match = tied_right > 0
    return torch.stack([
        (1 - table.gather(1, (k - ahead).clamp(0, max(ks))[:, None])[:, 0]) * has_match for k in ks
    ])  # fmt: skip


def top_k(scores: Tensor, labels: Tensor, ks: Sequence[int], *, tolerance: float = 0.0) -> Tensor:
    """`hit_chances` of single labels.

    Args:
        scores: (n, classes).
        labels: (n,) int64; a label beyond the classes of the scores is never hit.
    Returns: (len(ks), n) float64.
    Raises: ValueError for scores that are NaN, and for negative labels.
    """
    if labels.numel() and int(labels.min()) < 0:
        raise ValueError(f"the labels have {int(labels.min())}; expected class numbers from 0.")
    parts = []
    step = max(ROWS // max(scores.shape[1], 1), 1)
    for part, truth in zip(scores.split(step), labels.split(step), strict=True):
        right = truth[:, None] == torch.arange(part.shape[1], device=part.device)
        parts.append(hit_chances(part, right, ks, tolerance=tolerance))
    return torch.cat(parts, 1) if parts else torch.zeros(len(ks), 0, dtype=torch.float64)
