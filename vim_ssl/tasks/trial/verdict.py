"""The verdict of a trial: one sentence, decided by three intervals.

In each of three families the arm with the best validation score is chosen: ``pretrained`` on the
images of the trial, ``other`` (fresh or other weights), and raw pixels. The three differences of
these arms on the test images have intervals that hold together with 95 % (Bonferroni: 98.3 % each).
The variance over seeds is pooled over all arms. The rules are tried in this order:

1. pretrained above other and above pixels                    pretrain
2. neither of them above pixels by more than the margin       raw pixels are as good
3. other above pixels, and pretrained above other by at most the margin   fine-tune other weights
4. otherwise, and with one seed                               no difference can be established
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vim_ssl.metrics.bootstrap import Groups, Metric

LEVEL, COMPARISONS = 0.95, 3
EACH = 1 - (1 - LEVEL) / COMPARISONS  # level of one interval, so that all hold together
PRETRAIN, OTHERS, PIXELS_DO, UNDECIDED = "pretrain", "other weights", "raw pixels", "undecided"


@dataclass(frozen=True)
class Spread:
    """Variance of a result over seeds, in points²; its degrees of freedom are 0 with one seed."""

    variance: float
    freedom: int

    @classmethod
    def pooled(cls, values: Iterable[Sequence[float]]) -> "Spread":
        """The variance within arms, of the values of every seed of each arm that has seeds."""
        several = [np.asarray(of_arm, float) for of_arm in values if len(of_arm) > 1]
        freedom = sum(len(of_arm) - 1 for of_arm in several)
        squares = sum(float(((of_arm - of_arm.mean()) ** 2).sum()) for of_arm in several)
        return cls(squares / freedom if freedom else math.nan, freedom)


@dataclass(frozen=True)
class Difference:
    """A difference of two arms in points, with its interval.

    Attributes:
        points: of the means over seeds.
        of_images, of_seeds: standard errors over test images and over seeds.
        freedom: degrees of freedom of ``of_seeds``; None if no seed would change the arms.
    """

    points: float
    of_images: float
    of_seeds: float
    freedom: int | None

    def interval(self, level: float) -> tuple[float, float] | None:
        """The interval of this level: half of it is the root of the sum of the squares of the two
        halves, the normal one over images and Student's over seeds. None with a single seed, and
        for fewer than five test images or groups."""
        from scipy import stats

        if self.freedom == 0 or not math.isfinite(self.points + self.of_images):
            return None
        tail = (1 + level) / 2
        half = stats.norm.ppf(tail) * self.of_images
        if self.freedom:
            half = math.hypot(half, stats.t.ppf(tail, self.freedom) * self.of_seeds)
        return self.points - half, self.points + half

    def record(self) -> dict[str, Any]:
        bounds = self.interval(EACH)
        of_seeds = None if self.freedom == 0 else round(self.of_seeds, 3)
        return {
            "points": round(self.points, 2),
            "ci": None if bounds is None else [round(bound, 2) for bound in bounds],
            "se_images": round(self.of_images, 3) if math.isfinite(self.of_images) else None,
            "se_seeds": of_seeds, "freedom": self.freedom,
        }  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """``kind`` is one of the constants of this module; ``sentence`` is for the reader."""

    kind: str
    sentence: str


def mean_of(metrics: Sequence[Metric]) -> Metric:
    """The mean of metrics on the same images, as a metric."""
    if len(metrics) == 1:
        return metrics[0]
    return Metric(
        lambda weights: float(np.mean([metric.weighted(weights) for metric in metrics])),
        metrics[0].n, share=all(metric.share for metric in metrics),
    )  # fmt: skip


def difference(
    ours: Sequence[Metric], theirs: Sequence[Metric], spread: Spread,
    have_seeds: tuple[bool, bool] = (True, True), groups: Groups = None, *, seed: int = 0,
) -> Difference:  # fmt: skip
    """Compare two arms on the same test images.

    The variance over seeds of an arm is that of the trial, or its value if that is larger: a few
    seeds of one arm may agree by chance.

    Args:
        ours, theirs: one metric per seed.
        spread: over the seeds of all arms of the trial.
        have_seeds: whether another seed would change each arm.
        groups, seed: see `Metric.estimate`.
    """
    gap = mean_of(ours) - mean_of(theirs)
    variance = 0.0
    for metrics, has_seeds in zip((ours, theirs), have_seeds, strict=True):
        if has_seeds:
            of_arm = Spread.pooled([[metric.value for metric in metrics]]).variance
            variance += max(spread.variance, np.nan_to_num(of_arm)) / len(metrics)
    freedom = spread.freedom if any(have_seeds) else None
    error = gap.standard_error(groups, seed=seed)
    return Difference(gap.value, error, math.sqrt(variance) if freedom else 0.0, freedom)


def decide(
    names: tuple[str, str, str], differences: tuple[Difference, Difference, Difference],
    margin: float, minutes: float,
) -> Verdict:  # fmt: skip
    """Apply the rule of this module.

    Args:
        names: the chosen arms: pretrained, other, pixels.
        differences: pretrained - other, pretrained - pixels, other - pixels.
        margin: points that would not be worth a training.
        minutes: of the trial, for the advice.
    """
    pretrained, other, pixels = names
    bounds = [one.interval(EACH) for one in differences]
    if not all(math.isfinite(one.of_images) for one in differences):
        return Verdict(UNDECIDED, (
            "No difference can be established with this many images: fewer than five test images "
            "or groups have no interval; try more labelled images."
        ))  # fmt: skip
    if None in bounds:
        return Verdict(UNDECIDED, (
            "No difference can be established with one seed: the spread over seeds is unknown; try "
            f"--minutes {2 * minutes:g}, or fewer --objectives."
        ))  # fmt: skip
    over_other, over_pixels, other_over_pixels = (bound or (0.0, 0.0) for bound in bounds)
    if over_other[0] > 0 and over_pixels[0] > 0:
        return Verdict(PRETRAIN, (
            f"Pretrain with {pretrained}: {_points(differences[0], over_other)} above {other}, "
            f"{_points(differences[1], over_pixels)} above {pixels}."
        ))  # fmt: skip
    if over_pixels[1] <= margin and other_over_pixels[1] <= margin:
        return Verdict(PIXELS_DO, (
            f"Do not pretrain; {pixels} are as good: {pretrained} is "
            f"{_points(differences[1], over_pixels)} above them, {other} "
            f"{_points(differences[2], other_over_pixels)}."
        ))  # fmt: skip
    if other_over_pixels[0] > 0 and over_other[1] <= margin:
        return Verdict(OTHERS, (
            f"Do not pretrain; use {other}: {_points(differences[2], other_over_pixels)} above "
            f"{pixels}, and {pretrained} is {_points(differences[0], over_other)} above it."
        ))  # fmt: skip
    return Verdict(UNDECIDED, _undecided(names, differences, bounds, margin, minutes))


def _points(one: Difference, bounds: tuple[float, float]) -> str:
    return f"{one.points:.1f} points [{bounds[0]:.1f}, {bounds[1]:.1f}]"


def _undecided(names, differences, bounds, margin: float, minutes: float) -> str:
    """Name the differences that are open, and what would narrow the widest."""
    pairs = ((0, 1), (0, 2), (1, 2))
    open_ones = [i for i, (low, high) in enumerate(bounds) if low <= 0 and high > margin]
    widest = max(open_ones or range(3), key=lambda i: bounds[i][1] - bounds[i][0])
    one, (first, second) = differences[widest], pairs[widest]
    if one.of_images >= one.of_seeds:
        advice = "more labelled test images"
    else:
        advice = f"--minutes {2 * minutes:g}, or more --seeds"
    return (
        f"No difference can be established with this many images and minutes: {names[first]} is "
        f"{_points(one, bounds[widest])} above {names[second]}; try {advice}."
    )
