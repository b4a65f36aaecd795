"""A metric with its 95 % interval.

A `Metric` is a function of image weights: in a bootstrap resample, some images have weight 2 or
more and others 0. The difference of two metrics is again a metric.

An interval is never a point: where all resamples have the same value (every image right), it is
that of a proportion, or there is none, with the reason.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

RESAMPLES = 1000
MIN_GROUPS = 5  # independent images or groups that a bootstrap needs
CONSTANT = "the resamples have the same value"

Bounds = tuple[float, float]
Groups = Sequence[Hashable] | None


@dataclass(frozen=True)
class Metric:
    """A metric over ``n`` images, in per cent.

    Args:
        weighted: maps weights (n,), float64, not all 0, to the value; NaN if it is undefined.
        share: True if the metric is a proportion of the images, such as accuracy.
        paired: True for the difference of two such proportions of the same images.
    """

    weighted: Callable[[np.ndarray], float]
    n: int
    share: bool = False
    paired: bool = False

    @property
    def value(self) -> float:
        return self.weighted(np.ones(self.n)) if self.n else math.nan

    def __sub__(self, other: "Metric") -> "Metric":
        """The difference between two metrics on the same images."""
        return Metric(
            lambda weights: self.weighted(weights) - other.weighted(weights), self.n,
            paired=self.share and other.share,
        )  # fmt: skip

    def interval(self, groups: Groups = None, *, seed: int = 0) -> Bounds | None:
        """The 95 % interval, or None; see `estimate`."""
        return self.estimate(groups, seed=seed)[0]

    def estimate(self, groups: Groups = None, *, seed: int = 0) -> tuple[Bounds | None, str]:
        """Compute the 95 % interval: Wilson's for a proportion of independent images, which is also
        correct at 0 and 100 %; otherwise the percentiles of a bootstrap.

        If the resamples have the same value, the interval of a proportion is Wilson's for the
        number of groups, and that of a paired difference the score interval without discordant
        pairs (Tango 1998).

        Args:
            groups: one per image; groups are resampled as a whole. An image whose group is None or
                "" is a group of its own.
        Returns: the bounds, rounded to 0.01 and never equal, and ""; or None and the reason: fewer
            than five images or groups, no defined value, or another metric that does not vary.
        """
        value = self.value
        if not math.isfinite(value):
            return None, "the value is undefined"
        units = _units(groups, self.n)
        count = int(units.max()) + 1
        if self.share and count == self.n:
            return wilson_interval(value, self.n), ""
        if count < MIN_GROUPS:
            what = "images" if count == self.n else "groups"
            return None, f"fewer than {MIN_GROUPS} {what}"
        values = self._resampled(units, count, seed)
        if not len(values):
            return None, "the value is undefined in every resample"
        low, high = np.percentile(values, [2.5, 97.5])
        if high - low > 1e-9 * max(abs(value), 1):
            return _rounded(low, high), ""
        if self.share:
            return wilson_interval(value, count), ""
        if self.paired:
            return paired_interval(value, count), ""
        return None, CONSTANT

    def standard_error(self, groups: Groups = None, *, seed: int = 0) -> float:
        """The standard error over images, in points: of the bootstrap; if the resamples have the
        same value, that of the normal interval of the same width as that of `estimate`. NaN if
        there is no interval.

        Args:
            groups, seed: see `estimate`.
        """
        units = _units(groups, self.n)
        count = int(units.max()) + 1
        if not math.isfinite(self.value) or count < MIN_GROUPS:
            return math.nan
        values = self._resampled(units, count, seed)
        if len(values) > 1 and (error := float(values.std(ddof=1))) > 1e-9:
            return error
        bounds, _ = self.estimate(groups, seed=seed)
        return math.nan if bounds is None else (bounds[1] - bounds[0]) / (2 * 1.96)

    def _resampled(self, units: np.ndarray, count: int, seed: int) -> np.ndarray:
        """The defined values of all resamples of the units (n,), numbered from 0 to count - 1."""
        rng = np.random.default_rng(seed)
        values = []
        for _ in range(RESAMPLES):
            times = np.bincount(rng.integers(count, size=count), minlength=count)
            values.append(self.weighted(times[units].astype(float)))
        made = np.asarray(values)
        return made[np.isfinite(made)]

    def entries(
        self, key: str, groups: Groups = None, *, seed: int = 0, digits: int = 2
    ) -> dict[str, Any]:
        """Return the entries of metrics.json: ``KEY``, the rounded value, None if undefined; its
        interval ``KEY_ci``; and if that is None, the reason ``KEY_ci_none``."""
        bounds, reason = self.estimate(groups, seed=seed)
        value = self.value
        known = round(value, digits) if math.isfinite(value) else None
        row: dict[str, Any] = {key: known, f"{key}_ci": bounds}
        return row | ({f"{key}_ci_none": reason} if reason else {})


def _units(groups: Groups, n: int) -> np.ndarray:
    """Number the independent units: (n,) int64, the unit of each image."""
    if groups is None:
        return np.arange(n)
    if len(groups) != n:
        raise ValueError(f"{len(groups)} groups for {n} images; expected one per image.")
    # The sorted names of the groups determine the draws; lone images come after them.
    names = [None if group in (None, "") else str(group) for group in groups]
    known = {name: i for i, name in enumerate(sorted({name for name in names if name is not None}))}
    if len(known) == n:
        return np.arange(n)
    alone = iter(range(len(known), len(known) + n))
    return np.array([next(alone) if name is None else known[name] for name in names])


def _rounded(low: float, high: float) -> Bounds:
    """Round to 0.01; outwards if the bounds would be equal."""
    near = round(float(low), 2), round(float(high), 2)
    if near[0] < near[1]:
        return near
    return math.floor(100 * low) / 100, math.ceil(100 * high) / 100


def wilson_interval(percent: float, n: int) -> Bounds:
    """95 % interval of a proportion measured on n samples, in per cent (Wilson 1927)."""
    z, p = 1.96, percent / 100
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (max(p * (1 - p), 0.0) / n + z * z / (4 * n * n)) ** 0.5
    return _rounded(max(100 * (centre - half), 0.0), min(100 * (centre + half), 100.0))


def paired_interval(points: float, n: int) -> Bounds:
    """95 % interval of the difference of two proportions on n pairs that all differ by ``points``
    per cent: the score interval (Tango 1998) for 0 and ±100, linear between them."""
    z = 1.96
    half = 100 * z * z / (n + z * z) * (1 + abs(points) / 100)
    return _rounded(max(points - half, -100.0), min(points + half, 100.0))
