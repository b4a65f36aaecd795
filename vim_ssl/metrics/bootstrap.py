"""A metric with its 95 % interval.

A `Metric` is a function of the images' weights: a bootstrap resample weighs some images twice and
others not at all. A difference of two metrics is again a metric.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 1000
MIN_GROUPS = 5


@dataclass(frozen=True)
class Metric:
    """A metric over ``n`` images, in per cent.

    Args:
        weighted: (n,) weights, float64, not all 0 -> the value.
        share: True for the share of images for which something holds.
    """

    weighted: Callable[[np.ndarray], float]
    n: int
    share: bool = False

    @property
    def value(self) -> float:
        return self.weighted(np.ones(self.n))

    def __sub__(self, other: "Metric") -> "Metric":
        """The difference to another metric on the same images."""
        return Metric(lambda weights: self.weighted(weights) - other.weighted(weights), self.n)

    def interval(
        self, groups: Sequence[Hashable] | None = None, *, seed: int = 0
    ) -> tuple[float, float]:
        """95 % interval: the percentiles of the bootstrap; Wilson's for a share of independent
        images, which is right at 0 and 100 % too.

        Args:
            groups: one an image; groups are drawn as a whole. By default every image is a group,
                also if all belong to one: a single group says nothing about others.
        """
        if groups is not None and len(set(groups)) in (1, self.n):
            groups = None
        if self.share and groups is None:
            return wilson_interval(self.value, self.n)
        units = np.arange(self.n)
        if groups is not None:
            units = np.unique(np.asarray(groups, dtype=str), return_inverse=True)[1]
        count = int(units.max()) + 1
        rng = np.random.default_rng(seed)
        values = []
        for _ in range(RESAMPLES):
            times = np.bincount(rng.integers(count, size=count), minlength=count)
            values.append(self.weighted(times[units].astype(float)))
        low, high = np.nanpercentile(values, [2.5, 97.5])
        return round(float(low), 2), round(float(high), 2)

    def group_interval(self, groups: Sequence[str], seed: int) -> list[float] | None:
        """`interval` as a list; None with fewer than five groups, or if the value is nan."""
        if len(set(groups)) < MIN_GROUPS or math.isnan(self.value):
            return None
        return list(self.interval(groups, seed=seed))


def wilson_interval(percent: float, n: int) -> tuple[float, float]:
    """95 % interval of a share measured on n samples, in per cent (Wilson 1927)."""
    z, p = 1.96, percent / 100
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return round(max(100 * (centre - half), 0.0), 2), round(100 * (centre + half), 2)
