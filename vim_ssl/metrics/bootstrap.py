"""A metric with its 95 % interval.

A `Metric` is a function of image weights: in a bootstrap resample, some images have weight 2 or
more and others 0. The difference of two metrics is again a metric.
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
        weighted: maps weights (n,), float64, not all 0, to the value.
        share: True if the metric is a proportion of the images, such as accuracy.
    """

    weighted: Callable[[np.ndarray], float]
    n: int
    share: bool = False

    @property
    def value(self) -> float:
        return self.weighted(np.ones(self.n))

    def __sub__(self, other: "Metric") -> "Metric":
        """The difference between two metrics on the same images."""
        return Metric(lambda weights: self.weighted(weights) - other.weighted(weights), self.n)

    def interval(
        self, groups: Sequence[Hashable] | None = None, *, seed: int = 0
    ) -> tuple[float, float]:
        """Compute the 95 % interval: bootstrap percentiles, or Wilson's interval for a proportion
        of independent images, which is also correct at 0 and 100 %.

        Args:
            groups: one per image; groups are resampled as a whole. Without groups, or if all images
                are in the same group, every image is resampled independently.
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
        """`interval` as a list; None with fewer than five groups, or if the value is NaN."""
        if len(set(groups)) < MIN_GROUPS or math.isnan(self.value):
            return None
        return list(self.interval(groups, seed=seed))


def wilson_interval(percent: float, n: int) -> tuple[float, float]:
    """95 % interval of a proportion measured on n samples, in per cent (Wilson 1927)."""
    z, p = 1.96, percent / 100
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return round(max(100 * (centre - half), 0.0), 2), round(100 * (centre + half), 2)
