"""Readouts: the parts of an encoder's output to use as features, and their selection."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from vim_ssl.evaluation.linear_heads import MANY, fit_logistic
from vim_ssl.metrics.classification import require_labels
from vim_ssl.models.encoder import VimEncoder

READOUTS = ("token", "avg", "token+avg", "layers")  # tried by default
CHOICES = (*READOUTS, "max")
SEARCH_TOL = 3e-4  # tolerance in a sweep over C, where each fit starts from the last
C_GRID = tuple(10.0**k for k in range(-3, 3))


def all_readouts(encoder: VimEncoder, x: Tensor) -> Tensor:
    """Compute the features for all `CHOICES` of images (b, c, h, w), concatenated.

    The columns are, embed_dim each: the class token (if any), the mean of the patch tokens after
    the last block, their means after a quarter, half and three quarters of the blocks, and the
    maximum of each feature over the patches after the last block. See `readout_columns`.
    """
    depth = len(encoder.feature_info)
    quarters = [max(round(depth * q / 4) - 1, 0) for q in (1, 2, 3, 4)]
    taps = encoder.forward_intermediates(
        x, quarters, return_prefix_tokens=True, norm=True, output_fmt="NLC", intermediates_only=True
    )
    means = [patches.mean(1) for patches, _ in taps]
    token = [taps[-1][1].mean(1)] if taps[-1][1].shape[1] else []
    return torch.cat([*token, means[-1], *means[:-1], taps[-1][0].amax(1)], dim=1)


def readout_columns(encoder: VimEncoder, readout: str) -> slice:
    """Return the columns of `all_readouts` that belong to one of `CHOICES`.

    Raises: ValueError for an unknown readout, or a class token that the encoder does not have.
    """
    if readout not in CHOICES:
        raise ValueError(f"readout {readout!r} is not one of {', '.join(CHOICES)}.")
    has_token = bool(encoder.cls_names)
    if readout.startswith("token") and not has_token:
        raise ValueError(f"readout {readout!r} needs a class token; use 'avg' or 'layers'.")
    first, last = {
        "token": (0, 1), "avg": (1, 2), "token+avg": (0, 2), "layers": (0, 5), "max": (5, 6),
    }[readout]  # fmt: skip
    shift = 0 if has_token else -1
    d = encoder.embed_dim
    return slice(max(first + shift, 0) * d, (last + shift) * d)


def available_readouts(encoder: VimEncoder, names: Sequence[str]) -> dict[str, slice]:
    """Map readout names to their columns. All of `READOUTS` selects those that the encoder has."""
    if tuple(names) == READOUTS and not encoder.cls_names:
        names = [name for name in names if not name.startswith("token")]
    return {name: readout_columns(encoder, name) for name in names}


def readouts_of(global_pool: str | None, readouts: Sequence[str]) -> tuple[str, ...]:
    """Return the readouts to try with an encoder that was requested with this ``global_pool``:
    this one, or ``readouts`` if none was.

    Raises: ValueError for a pooling that frozen features do not have, or if other readouts were
        chosen too.
    """
    if global_pool is None:
        return tuple(readouts)
    if global_pool not in CHOICES:
        raise ValueError(
            f"global_pool {global_pool!r} is not a readout of frozen features; expected one of "
            f"{', '.join(CHOICES)}. ('max-logits' needs a head that is trained on every patch.)"
        )
    if tuple(readouts) not in (READOUTS, (global_pool,)):
        raise ValueError(
            f"readouts {', '.join(readouts)} and global_pool {global_pool!r} were both requested; "
            "pass one of them."
        )
    return (global_pool,)


def choose_readout(
    x: Tensor,
    y: Tensor,
    x_val: Tensor,
    y_val: Tensor,
    readouts: dict[str, slice],
    grid: Sequence[float] = C_GRID,
) -> tuple[str, float, float]:
    """Choose the readout and the C with the best score on the validation split.

    Small problems are fitted in parallel, one per core.
    Returns: (readout, C, score of `LinearHead`); the first one in case of a tie.
    Raises: ValueError if no validation image has one of several labels.
    """
    from threadpoolctl import threadpool_limits

    require_labels(y_val, "the validation split")

    def search(columns: slice) -> tuple[float, float]:
        return choose_C(x[:, columns], y, x_val[:, columns], y_val, grid)

    small = x.numel() < MANY
    # Set the thread limit here too: parallel fits would restore one another's.
    workers = torch.get_num_threads() if small else 1
    with threadpool_limits(1 if small else None), ThreadPoolExecutor(workers) as pool:
        results = list(pool.map(search, readouts.values()))
    tried = [(score, name, C) for name, (C, score) in zip(readouts, results, strict=True)]
    score, name, C = max(tried, key=lambda one: one[0])
    return name, C, score


def choose_C(x, y, x_val, y_val, grid: Sequence[float] = C_GRID) -> tuple[float, float]:
    """Return the C with the best score on the validation split (the smaller on a tie), and its
    score.

    ``grid`` must be in ascending order; each fit starts from the previous one. The search stops
    after two consecutive values below the best. Its tolerance is looser than the final fit's.
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
