"""How good predictions are, and how sure that is: accuracy, average precision, intervals.

A `Metric` takes the weights of the images, so that every interval is a matter of weighing some
of them twice and others not at all (the bootstrap), and a difference of two figures is a figure.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

RESAMPLES = 1000


@dataclass(frozen=True)
class Metric:
    """A figure of merit over ``n`` images, in per cent.

    Args:
        weighted: (n,) weights, float64, not all 0 -> the figure.
        share: whether it is the share of the images for which something holds.
    """

    weighted: Callable[[np.ndarray], float]
    n: int
    share: bool = False

    @property
    def value(self) -> float:
        return self.weighted(np.ones(self.n))

    def __sub__(self, other: "Metric") -> "Metric":
        """How much better than another on the same images."""
        return Metric(lambda weights: self.weighted(weights) - other.weighted(weights), self.n)

    def interval(
        self, groups: Sequence[Hashable] | None = None, *, seed: int = 0, resamples: int = RESAMPLES
    ) -> tuple[float, float]:
        """95 % interval: the bootstrap's percentiles; of a share of independent images Wilson's,
        which knows of 0 and 100 % too.

        Args:
            groups: one an image; groups are drawn as a whole. By default every image is one, and
                also if all are of one group: what another group would give, none can say.
        """
        if groups is not None and len(set(groups)) in (1, self.n):
            groups = None
        if self.share and groups is None:
            return wilson_interval(self.value, self.n)
        units = np.arange(self.n)
        if groups is not None:
            units = np.unique(np.asarray(groups, dtype=str), return_inverse=True)[1]
        count = int(units.max()) + 1
        draw = np.random.default_rng(seed)
        found = []
        for _ in range(resamples):
            times = np.bincount(draw.integers(count, size=count), minlength=count)
            found.append(self.weighted(times[units].astype(float)))
        low, high = np.nanpercentile(found, [2.5, 97.5])
        return round(float(low), 2), round(float(high), 2)


def share_right(predicted, truth) -> Metric:
    """Accuracy: both (n,)."""
    right = 100.0 * (np.asarray(predicted) == np.asarray(truth))
    return Metric(lambda weights: float(weights @ right / weights.sum()), len(right), True)


def judge(answer, truth) -> dict[str, Metric]:
    """What classification is judged by: ``main``, the accuracy of labels (n,); or of the scores of
    every class (n, classes) the macro mAP, with ``micro`` beside it."""
    if np.ndim(truth) == 1:
        return {"main": share_right(answer, truth)}
    found = mean_average_precision(answer, truth)
    return {"main": found["macro"], "micro": found["micro"]}


def mean_average_precision(scores, truth) -> dict[str, Metric]:
    """mAP of several labels an image: ``macro``, the mean over the classes that have an image,
    and ``micro``, of all (image, class) pairs in one ranking.

    Args:
        scores, truth: (n, classes); higher is surer; 0 or 1.
    """
    scores, truth = np.asarray(scores), np.asarray(truth)
    n, classes = truth.shape
    each = [_average_precision(scores[:, c], truth[:, c]) for c in range(classes)]
    pairs = _average_precision(scores.reshape(-1), truth.reshape(-1))

    def macro(weights: np.ndarray) -> float:
        values = np.array([at(weights) for at in each])
        there = values[~np.isnan(values)]
        return 100.0 * float(there.mean()) if len(there) else float("nan")

    def micro(weights: np.ndarray) -> float:
        return 100.0 * pairs(np.repeat(weights, classes))

    return {"macro": Metric(macro, n), "micro": Metric(micro, n)}


def _average_precision(scores: np.ndarray, truth: np.ndarray) -> Callable[[np.ndarray], float]:
    """The area under precision over recall in steps, as scikit-learn has it: (n,) weights -> it,
    nan without a positive. Sorted once for all weights; equal scores are one step."""
    order = np.argsort(-scores, kind="stable")
    ends = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))
    positive = truth[order] > 0

    def at(weights: np.ndarray) -> float:
        weights = weights[order]
        hits, seen = np.cumsum(weights * positive)[ends], np.cumsum(weights)[ends]
        if hits[-1] == 0:
            return float("nan")
        gained = np.diff(hits, prepend=0.0)
        return float((gained * hits / np.maximum(seen, 1e-12)).sum() / hits[-1])

    return at


def accuracy(predicted, truth) -> float:
    """Share of right answers, in per cent."""
    return 100.0 * float((torch.as_tensor(predicted) == torch.as_tensor(truth)).float().mean())


def wilson_interval(percent: float, n: int) -> tuple[float, float]:
    """95 % interval of a share measured on n samples, in per cent (Wilson 1927)."""
    z, p = 1.96, percent / 100
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return round(max(100 * (centre - half), 0.0), 2), round(100 * (centre + half), 2)
