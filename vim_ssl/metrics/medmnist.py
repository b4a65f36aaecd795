"""AUC and accuracy as MedMNIST defines them, for its four tasks.

The values equal those of the official Evaluator (medmnist 3.0), so they are comparable with
published ones.
"""

import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np

from vim_ssl.data.sources.medmnist import BINARY, MULTI_CLASS, MULTI_LABEL, ORDINAL
from vim_ssl.metrics.bootstrap import Metric
from vim_ssl.utils.numbers import require_finite

TASKS = (BINARY, MULTI_CLASS, MULTI_LABEL, ORDINAL)


def medmnist_auc(truth: np.ndarray, scores: np.ndarray, task: str) -> float:
    """Area under the ROC curve, 0 to 1.

    Multi-class and ordinal: the mean over the columns of ``scores``, one-vs-rest. Multi-label: the
    mean over the labels. Binary: the AUC of the last column.

    Args:
        truth: (n,) or (n, 1) classes; multi-label: (n, labels) of 0 and 1.
        scores: (n, classes); binary: also (n,).
        task: one of `TASKS`.
    Returns: the area; NaN if a class has no samples, or all samples.
    Raises: ValueError for an unknown task, shapes that do not fit, no sample, and scores that are
        not finite.
    """
    from sklearn.metrics import roc_auc_score

    truth, scores = _checked(truth, scores, task)
    if task == BINARY:
        return float(roc_auc_score(truth, scores))
    if task != MULTI_LABEL:
        truth = truth[:, None] == np.arange(scores.shape[1])
    return float(np.mean([roc_auc_score(*pair) for pair in zip(truth.T, scores.T, strict=True)]))


def medmnist_accuracy(truth: np.ndarray, scores: np.ndarray, task: str) -> float:
    """Proportion of correct predictions, 0 to 1; in a multi-label task over all labels and samples.

    The prediction is the class with the highest score; in binary and multi-label tasks it is score
    > 0.5, so scores must be probabilities there. For the arguments see `medmnist_auc`.
    """
    truth, scores = _checked(truth, scores, task)
    if task in (BINARY, MULTI_LABEL):
        return float(np.mean(truth == (scores > 0.5)))
    return float(np.mean(truth == scores.argmax(1)))


def medmnist_metrics(
    truth: np.ndarray, scores: np.ndarray, task: str, groups: Sequence[Hashable] | None = None
) -> dict[str, Any]:
    """``auc`` (None if undefined) and ``acc``, 0 to 1, rounded to 0.0001, with their 95 % intervals
    ``auc_ci`` and ``acc_ci``; see `Metric.entries`.

    Args:
        truth, scores, task: see `medmnist_auc` and `medmnist_accuracy`.
        groups: the volume of each plane; scores are averaged over the planes of a volume.
    Raises: the errors of `medmnist_auc`.
    """
    if groups is not None:
        _, first, volume = np.unique(np.asarray(groups), return_index=True, return_inverse=True)
        sums = np.zeros((len(first), *scores.shape[1:]))
        np.add.at(sums, volume, scores)
        counts = np.bincount(volume)
        truth, scores = truth[first], sums / counts.reshape(-1, *[1] * (scores.ndim - 1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn warns about classes without samples
        area = medmnist_auc(truth, scores, task)
    right = medmnist_accuracy(truth, scores, task)
    metrics = _metrics(*_checked(truth, scores, task), task)
    values = {"auc": None if np.isnan(area) else round(area, 4), "acc": round(right, 4)}
    return _as_fractions(metrics) | values


def _metrics(truth: np.ndarray, scores: np.ndarray, task: str) -> dict[str, Metric]:
    """``auc`` and ``acc`` in per cent over weighted samples, from the output of `_checked`."""
    n = len(truth)
    if task in (BINARY, MULTI_LABEL):
        right = truth == (scores > 0.5)
    else:
        right = truth == scores.argmax(1)
        truth = truth[:, None] == np.arange(scores.shape[1])
    areas = [
        _area(*pair) for pair in zip(scores.reshape(n, -1).T, truth.reshape(n, -1).T, strict=True)
    ]
    each = right.reshape(n, -1).mean(1)
    return {
        "auc": Metric(lambda weights: 100 * float(np.mean([area(weights) for area in areas])), n),
        "acc": Metric(lambda w: 100 * float(w @ each / w.sum()), n, share=True),
    }


def _area(scores: np.ndarray, positive: np.ndarray) -> Callable[[np.ndarray], float]:
    """Return a function from weights (n,) to the area under the ROC curve, 0 to 1; NaN if a class
    has no weight. Sorts only once; of two equal scores each is the higher one half of the time."""
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.append(True, np.diff(scores[order]) != 0))
    positive = positive[order] > 0

    def area(weights: np.ndarray) -> float:
        weights = weights[order]
        ours, theirs = (np.add.reduceat(weights * part, starts) for part in (positive, ~positive))
        pairs = ours.sum() * theirs.sum()
        below = np.cumsum(theirs) - theirs / 2
        return float(ours @ below / pairs) if pairs else float("nan")

    return area


def _as_fractions(metrics: dict[str, Metric]) -> dict[str, Any]:
    """The entries of metrics in per cent as 0 to 1."""
    made: dict[str, Any] = {}
    for name, metric in metrics.items():
        entries = metric.entries(name)
        if (bounds := entries[f"{name}_ci"]) is not None:
            entries[f"{name}_ci"] = tuple(round(bound / 100, 4) for bound in bounds)
        made |= entries
    return made


def _checked(truth: np.ndarray, scores: np.ndarray, task: str) -> tuple[np.ndarray, np.ndarray]:
    """Check and reshape: truth (n,), multi-label (n, labels); scores (n, classes), binary (n,)."""
    if task not in TASKS:
        raise ValueError(f"The task {task!r} is not one of {', '.join(map(repr, TASKS))}.")
    truth, scores = np.asarray(truth), np.asarray(scores)
    shapes = f"truth {truth.shape} and scores {scores.shape}"
    if task != MULTI_LABEL and truth.ndim == 2 and truth.shape[1] == 1:
        truth = truth[:, 0]
    if task == BINARY and scores.ndim == 2:
        scores = scores[:, -1]
    dims = {BINARY: (1, 1), MULTI_LABEL: (2, 2)}.get(task, (1, 2))
    fits = (truth.ndim, scores.ndim) == dims and len(truth) == len(scores)
    if not fits or (task == MULTI_LABEL and truth.shape != scores.shape):
        raise ValueError(f"{shapes} do not fit the task {task!r}; expected one row per sample.")
    if not len(truth):
        raise ValueError("there are no samples; expected one or more.")
    require_finite(scores, "the scores")
    return truth, scores
