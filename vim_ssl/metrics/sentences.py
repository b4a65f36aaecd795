"""Results as text: a metric with its interval, and how it compares with its baselines."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vim_ssl.metrics.bootstrap import Groups, Metric

Interval = Sequence[float] | None


@dataclass(frozen=True)
class Gain:
    """The difference of a metric to that of ``over``, in points, and its 95 % interval; None for
    the ``reason``."""

    over: str
    points: float
    interval: Interval = None
    reason: str = "too few groups"

    @classmethod
    def of(cls, over: str, difference: Metric, groups: Groups, *, seed: int = 0) -> "Gain":
        """The gain of a difference; for the arguments see `Metric.estimate`."""
        return cls(over, difference.value, *difference.estimate(groups, seed=seed))


def metric_text(row: Mapping[str, Any], key: str, *, width: int = 0) -> str:
    """Format the entries of `Metric.entries`: "93.1 % [91.4, 94.5]", "100.0 % [none: fewer than 5
    groups]", or "undefined".

    Args:
        width: minimum width of the value, which is right-aligned.
    """
    if row.get(key) is None:
        return "undefined"
    return f"{row[key]:{width}.1f} % {interval_text(row, key)}"


def interval_text(row: Mapping[str, Any], key: str, *, reason: bool = True) -> str:
    """Format the interval of `Metric.entries`: "[91.4, 94.5]" or "[none: fewer than 5 groups]"."""
    if (bounds := row.get(f"{key}_ci")) is not None:
        return f"[{bounds[0]:.1f}, {bounds[1]:.1f}]"
    why = row.get(f"{key}_ci_none", "")
    return f"[none: {why}]" if reason and why else "[none]"


def result_sentence(name: str, value: float | None, gains: Sequence[Gain], unit: str = " %") -> str:
    """Say how a result compares with others on the same images. None or NaN: it is undefined.

    >>> result_sentence("Linear probe", 76.2, [Gain("raw pixels", 3.1, (1.0, 5.2))])
    'Linear probe 76.2 %: 3.1 points above raw pixels (95 % interval 1.0 to 5.2).'
    """
    if value is None or math.isnan(value):
        return f"{name} is undefined on these images."
    text = f"{name} {value:.1f}{unit}"
    if not gains:
        return f"{text}; no baseline was evaluated."
    sentence = f"{text}: {', '.join(map(_compared, gains))}."
    # "points" and "95 % interval" stand once, where they are first needed.
    for words in (" points", "95 % interval "):
        before, first, after = sentence.partition(words)
        sentence = before + first + after.replace(words, "")
    return sentence


def _compared(gain: Gain) -> str:
    if math.isnan(gain.points):
        return f"undefined difference from {gain.over}"
    size = f"{abs(gain.points):.1f} points"
    if gain.interval is None:
        if abs(gain.points) < 0.05:
            return f"no difference from {gain.over} (no interval: {gain.reason})"
        way = "above" if gain.points >= 0 else "below"
        return f"{size} {way} {gain.over} (no interval: {gain.reason})"
    low, high = gain.interval
    if low <= 0 <= high:
        interval = f"95 % interval {_signed(low)} to {_signed(high)}"
        return f"no measurable difference from {gain.over} ({interval})"
    way = "above"
    if high < 0:
        way, low, high = "below", -high, -low
    return f"{size} {way} {gain.over} (95 % interval {low:.1f} to {high:.1f})"


def _signed(value: float) -> str:
    return f"{value:.1f}".replace("-", "−") if abs(value) >= 0.05 else "0.0"
