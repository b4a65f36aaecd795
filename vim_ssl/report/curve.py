"""The geometry of one curve; templates/macros.html draws it as inline SVG."""

import itertools
import json
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from vim_ssl.utils.names import number

MAX_POINTS = 240  # points per curve; each represents a range of steps
WIDTH, HEIGHT = 420, 200  # in SVG units, like the margins
LEFT, RIGHT, TOP, BOTTOM = 58, WIDTH - 10, 8, HEIGHT - 24
BEYOND = 1e30  # larger values are not plotted
Ticks = list[tuple[float, str]]  # coordinate, text


@dataclass
class Curve:
    """A curve for the template, in SVG coordinates.

    Attributes:
        points: JSON, (x, y, text) of every point; "" without a finite value.
        note: the last value, and remarks such as a logarithmic axis.
        lines, bands: coordinates of polylines and polygons, "x,y x,y …".
    """

    title: str
    points: str = ""
    note: str = ""
    x_ticks: Ticks = field(default_factory=list)
    y_ticks: Ticks = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    bands: list[str] = field(default_factory=list)
    dots: list[tuple[float, float]] = field(default_factory=list)


def draw_curve(
    title: str,
    steps: np.ndarray,
    epochs: np.ndarray,
    values: np.ndarray,
    *,
    unit: str = "",
    allow_log: bool = False,
    marked: bool = False,
) -> Curve:
    """Build a curve of at most MAX_POINTS points, with gaps where no value is finite.

    Args:
        steps, epochs, values: (n,) float64, n > 0, steps ascending; NaN in ``epochs`` if unknown.
        allow_log: use a logarithmic axis for positive values that span more than a factor of 50.
        marked: draw a dot on every point.
    """
    values = np.where(np.abs(values) < BEYOND, values, np.nan)
    lost = int(np.isnan(values).sum())
    if lost == len(values):
        return Curve(title)
    stretches = np.array_split(np.arange(len(values)), min(len(values), MAX_POINTS))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # NaN for a range without finite values
        mean, low, high = (
            np.array([f(values[p]) for p in stretches]) for f in (np.nanmean, np.nanmin, np.nanmax)
        )
    ends = np.array([p[-1] for p in stretches])
    finite = np.flatnonzero(np.isfinite(mean))
    # The axis covers the whole line; outliers of the shaded ranges may leave the plot.
    bottom = min(float(mean[finite].min()), float(np.percentile(low[finite], 5)))
    top = max(float(mean[finite].max()), float(np.percentile(high[finite], 95)))
    log = allow_log and float(low[finite].min()) > 0 and top > 50 * bottom
    x_of, x_ticks = _axis(float(steps[ends[0]]), float(steps[-1]), LEFT, RIGHT)
    y_of, y_ticks = _axis(bottom, top, BOTTOM, TOP, log)
    x, y = x_of(steps[ends]), y_of(mean)
    floor, roof = (np.clip(y_of(edge), TOP, BOTTOM) for edge in (low, high))

    texts = []
    for i in finite:
        words = [f"step {steps[ends[i]]:,.0f}", f"{number(mean[i])}{unit}"]
        if np.isfinite(epoch := epochs[ends[i]]):
            words.insert(1, f"epoch {number(epoch, 3)}")
        texts.append([round(float(x[i]), 1), round(float(y[i]), 1), " · ".join(words)])
    notes = [f"{number(mean[finite[-1]])}{unit}"]
    if lost:
        notes.append(f"{lost:,} of {len(values):,} logged values are not finite")
    if log:
        notes.append("logarithmic axis")
    curve = Curve(title, json.dumps(texts), " · ".join(notes), x_ticks, y_ticks)
    # A jump in the index is a gap without finite values.
    for _, group in itertools.groupby(enumerate(finite), lambda pair: pair[1] - pair[0]):
        ids = [i for _, i in group]
        curve.lines.append(_points(x[ids], y[ids]))
        if len(stretches) < len(values):
            back = ids[::-1]
            curve.bands.append(f"{_points(x[ids], roof[ids])} {_points(x[back], floor[back])}")
        if marked or len(ids) == 1:
            curve.dots += [(x[i], y[i]) for i in ids]
    return curve


def _points(x: np.ndarray, y: np.ndarray) -> str:
    return " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))


def _axis(
    low: float, high: float, start: float, end: float, log: bool = False
) -> tuple[Callable, Ticks]:
    """Return a function from values to SVG coordinates, and the ticks."""
    if log:
        exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        digits = (1, 2, 5) if len(exponents) < 4 else (1,)
        ticks = [d * 10.0**e for e in exponents for d in digits if low <= d * 10.0**e <= high]
        ticks = ticks[:: math.ceil(len(ticks) / 6)]
    else:
        if high - low <= 1e-9 * max(abs(low), abs(high)):  # a single value: centre it
            low, high = low - (abs(low) / 10 or 1), high + (abs(high) / 10 or 1)
        raw = (high - low) / 5
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= 0.999 * raw)
        first, last = math.ceil(low / step - 1e-6), math.floor(high / step + 1e-6)
        ticks = [i * step for i in range(first, last + 1)]
    scale = np.log10 if log else np.asarray

    def coordinate(value):
        return start + (end - start) * (scale(value) - scale(low)) / (scale(high) - scale(low))

    return coordinate, [(float(coordinate(tick)), _short(tick)) for tick in ticks]


def _short(tick: float) -> str:
    if 1e6 <= abs(tick) < 1e9:
        return f"{tick / 1e6:g}M"
    if 1e4 <= abs(tick) < 1e6:
        return f"{tick / 1e3:g}k"
    return number(tick, 6)
