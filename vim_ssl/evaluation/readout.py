"""Readouts: the parts of an encoder's output to use as features, and their selection."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from vim_ssl.evaluation.linear_heads import MANY, fit_logistic
from vim_ssl.metrics.classification import require_labels
from vim_ssl.models.protocol import Encoder

READOUTS = ("token", "avg", "token+avg", "layers")  # tried by default
CHOICES = (*READOUTS, "max")
SEARCH_TOL = 3e-4  # tolerance in a sweep over C, where each fit starts from the last
C_GRID = tuple(10.0**k for k in range(-3, 3))


def all_readouts(encoder: Encoder, x: Tensor) -> Tensor:
    """Compute the features for all `CHOICES` of images (b, c, h, w), concatenated.

    The columns are: the class token (if any), the mean of the patch tokens after the last block,
    their means after a quarter, half and three quarters of the blocks, and the maximum of each
    feature over the patches after the last block. If layers of the head change the features (see
    `Encoder`), their output replaces the mean after the last block. See `readout_columns`.
    """
    if not (quarters := _quarters(encoder)):
        return encoder.forward_head(encoder.forward_features(x), pre_logits=True)
    final, taps = encoder.forward_intermediates(
        x, quarters, return_prefix_tokens=True, norm=True, output_fmt="NLC"
    )
    means = [patches.mean(1) for patches, _ in taps]
    token = [taps[-1][1].mean(1)] if taps[-1][1].shape[1] else []
    if encoder.features_by_head:
        means[-1] = encoder.forward_head(final, pre_logits=True)
    return torch.cat([*token, means[-1], *means[:-1], taps[-1][0].amax(1)], dim=1)


def _quarters(encoder: Encoder) -> list[int]:
    """Return the blocks at the ends of the quarters; none if the encoder gives no maps."""
    depth = len(encoder.feature_info)
    return [max(round(depth * q / 4) - 1, 0) for q in (1, 2, 3, 4)] if depth else []


def _widths(encoder: Encoder) -> list[int]:
    """Return the number of columns of every part of `all_readouts`; 0 for no class token."""
    if not (quarters := _quarters(encoder)):
        return [0, encoder.num_features]
    *inner, last = (int(encoder.feature_info[i]["num_chs"]) for i in quarters)
    features = encoder.num_features if encoder.features_by_head else last
    return [last if encoder.cls_names else 0, features, *inner, last]


def readout_columns(encoder: Encoder, readout: str) -> slice:
    """Return the columns of `all_readouts` that belong to one of `CHOICES`.

    Raises: ValueError for an unknown readout, or one that the encoder does not have.
    """
    if readout not in CHOICES:
        raise ValueError(f"readout {readout!r} is not one of {', '.join(CHOICES)}.")
    if readout.startswith("token") and not encoder.cls_names:
        raise ValueError(f"readout {readout!r} needs a class token; use 'avg' or 'layers'.")
    if readout in ("layers", "max") and not encoder.feature_info:
        raise ValueError(f"readout {readout!r} needs maps of the stages; use 'avg'.")
    first, last = {
        "token": (0, 1), "avg": (1, 2), "token+avg": (0, 2), "layers": (0, 5), "max": (5, 6),
    }[readout]  # fmt: skip
    widths = _widths(encoder)
    return slice(sum(widths[:first]), sum(widths[:last]))


def available_readouts(encoder: Encoder, names: Sequence[str]) -> dict[str, slice]:
    """Map readout names to their columns. All of `READOUTS` selects those that the encoder has."""
    if tuple(names) == READOUTS and not encoder.cls_names:
        names = [name for name in names if not name.startswith("token")]
    if not encoder.feature_info and len(names) > 1:
        names = [name for name in names if name != "layers"]
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
