"""What frozen features are worth: extraction, readouts, nearest neighbours, choice of a head."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from vim_ssl.evaluation.linear_heads import MANY, fit_logistic

SEARCH_TOL = 3e-4  # of a sweep over C, which starts warm
C_GRID = tuple(10.0**k for k in range(-3, 3))


def choose_readout(
    x: Tensor,
    y: Tensor,
    x_val: Tensor,
    y_val: Tensor,
    readouts: dict[str, slice],
    grid: Sequence[float] = C_GRID,
) -> tuple[str, float, float]:
    """Which columns of the features, and which C, do best on the validation part.

    Small problems are fitted side by side, one a core.
    Returns: (readout, C, score of `LinearHead`); the first of equals.
    """
    from threadpoolctl import threadpool_limits

    def search(columns: slice) -> tuple[float, float]:
        return choose_C(x[:, columns], y, x_val[:, columns], y_val, grid)

    small = x.numel() < MANY
    # The limit is set here too: fits side by side would undo one another's.
    workers = torch.get_num_threads() if small else 1
    with threadpool_limits(1 if small else None), ThreadPoolExecutor(workers) as pool:
        found = list(pool.map(search, readouts.values()))
    tried = [(score, name, C) for name, (C, score) in zip(readouts, found, strict=True)]
    score, name, C = max(tried, key=lambda one: one[0])
    return name, C, score


def choose_C(x, y, x_val, y_val, grid: Sequence[float] = C_GRID) -> tuple[float, float]:
    """The C that does best on the validation part (the smaller on a tie), and its score.

    ``grid`` ascends, and each fit starts where the one before ended; the search ends after two
    values in a row that did worse than the best, and fits less strictly than what is reported in
    the end.
    """
    best, best_C, worse, head = -1.0, grid[0], 0, None
    for C in grid:
        head = fit_logistic(x, y, C, SEARCH_TOL, head)
        score = head.score(x_val, y_val)
        worse = worse + 1 if score < best else 0
        if score > best:
            best, best_C = score, C
        if worse == 2:
            break
    return best_C, best
