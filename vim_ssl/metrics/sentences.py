"""The plain sentence below a result: how it compares with its baselines."""

from collections.abc import Sequence
from dataclasses import dataclass

Interval = Sequence[float] | None


@dataclass(frozen=True)
class Gain:
    """The difference of a metric to that of ``over``, in points, and its 95 % interval (None:
    there are too few groups for one)."""

    over: str
    points: float
    interval: Interval = None


def result_sentence(name: str, value: float, gains: Sequence[Gain], unit: str = " %") -> str:
    """Say how a result compares with others on the same images.

    >>> result_sentence("Linear probe", 76.2, [Gain("raw pixels", 3.1, (1.0, 5.2))])
    'Linear probe 76.2 %: 3.1 points above raw pixels (95 % interval 1.0 to 5.2).'
    """
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
    size = f"{abs(gain.points):.1f} points"
    if gain.interval is None:
        way = "above" if gain.points >= 0 else "below"
        return f"{size} {way} {gain.over} (too few groups for an interval)"
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
