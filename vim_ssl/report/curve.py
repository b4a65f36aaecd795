"""The geometry of a plot of curves; templates/macros.html draws it as inline SVG."""

import itertools
import json
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from vim_ssl.metrics.bootstrap import wilson_interval
from vim_ssl.utils.names import number

MAX_POINTS = 120  # points per curve; each represents a range of steps
FEW = 40  # curves of at most this many points have a dot on each
WIDTH, HEIGHT = 420, 224  # in SVG units, like the margins
LEFT, RIGHT, TOP, BOTTOM = 66, WIDTH - 10, 22, HEIGHT - 42
BEYOND = 1e30  # larger values are not plotted
Ticks = list[tuple[float, str]]  # coordinate, text
Points = list[tuple[float, float, str]]  # coordinates, text


@dataclass
class Series:
    """Logged values of one run, the input of `draw_curves`.

    Args:
        steps, epochs, values: (n,) float64, steps ascending; NaN in ``epochs`` if unknown.
        label: name in the legend; "" if there is only one.
        colour: index of the colour.
        images: if the values are percentages of so many images, their 95 % interval is shaded;
            0: not shaded.
    """

    steps: np.ndarray
    epochs: np.ndarray
    values: np.ndarray
    label: str = ""
    colour: int = 0
    images: int = 0


@dataclass
class Line:
    """A curve in SVG coordinates: polylines and polygons are "x,y x,y …"."""

    label: str
    colour: int
    lines: list[str] = field(default_factory=list)
    bands: list[str] = field(default_factory=list)
    dots: list[tuple[float, float]] = field(default_factory=list)


@dataclass
class Plot:
    """Curves on common axes, for the template.

    Attributes:
        unit: of the values, at the y-axis; "" for none.
        along: what the x-axis counts.
        points: JSON, (x, y, text) of every point; "" without a finite value.
        note: the last value of a single curve, and remarks such as a logarithmic axis.
    """

    title: str
    unit: str = ""
    along: str = "step"
    points: str = ""
    note: str = ""
    x_ticks: Ticks = field(default_factory=list)
    y_ticks: Ticks = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)


@dataclass
class _Reduced:
    """A series of at most MAX_POINTS points: mean, low and high of the values of each range."""

    series: Series
    values: np.ndarray
    steps: np.ndarray
    epochs: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray

    @property
    def finite(self) -> np.ndarray:
        return np.flatnonzero(np.isfinite(self.mean))


def draw_curves(
    title: str, series: Sequence[Series], *, unit: str = "", allow_log: bool = False,
    along: str = "step",
) -> Plot:  # fmt: skip
    """Build a plot of curves of at most MAX_POINTS points, with gaps where no value is finite.

    Args:
        allow_log: use a logarithmic axis for positive values that span more than a factor of 50.
        along: what the x-axis, ``steps``, counts.
    """
    reduced = [_reduce(one) for one in series if len(one.values)]
    drawn = [one for one in reduced if len(one.finite)]
    plot = Plot(title, unit, along)
    if not drawn:
        return plot
    # The axis covers all lines; outliers of the shaded ranges may leave the plot.
    bottom = min(
        min(float(np.nanmin(one.mean)), float(np.percentile(one.low[one.finite], 5)))
        for one in drawn
    )
    top = max(
        max(float(np.nanmax(one.mean)), float(np.percentile(one.high[one.finite], 95)))
        for one in drawn
    )
    log = allow_log and min(float(np.nanmin(one.low)) for one in drawn) > 0 and top > 50 * bottom
    first, last = min(one.steps[0] for one in drawn), max(one.steps[-1] for one in drawn)
    x_of, plot.x_ticks = _axis(float(first), float(last), LEFT, RIGHT)
    y_of, plot.y_ticks = _axis(bottom, top, BOTTOM, TOP, log)
    points: Points = []
    for one in drawn:
        line, texts = _line(one, x_of, y_of, plot)
        plot.lines.append(line)
        points += texts
    plot.points = json.dumps(points)
    plot.note = " · ".join(_notes(drawn, unit, log))
    return plot


def _reduce(series: Series) -> _Reduced:
    values = np.where(np.abs(series.values) < BEYOND, series.values, np.nan)
    ranges = np.array_split(np.arange(len(values)), min(len(values), MAX_POINTS))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # NaN for a range without finite values
        mean, low, high = (
            np.array([f(values[r]) for r in ranges]) for f in (np.nanmean, np.nanmin, np.nanmax)
        )
    if series.images:
        known = np.isfinite(mean)
        intervals = [wilson_interval(value, series.images) for value in mean[known]]
        low[known], high[known] = np.array(intervals).reshape(-1, 2).T
    ends = np.array([r[-1] for r in ranges])
    return _Reduced(series, values, series.steps[ends], series.epochs[ends], mean, low, high)


def _line(one: _Reduced, x_of: Callable, y_of: Callable, plot: Plot) -> tuple[Line, Points]:
    """Return a curve, and its points with their texts."""
    x, y = x_of(one.steps), y_of(one.mean)
    floor, roof = (np.clip(y_of(edge), TOP, BOTTOM) for edge in (one.low, one.high))
    line = Line(one.series.label, one.series.colour)
    # A jump in the index is a gap without finite values.
    for _, group in itertools.groupby(enumerate(one.finite), lambda pair: pair[1] - pair[0]):
        ids = [i for _, i in group]
        line.lines.append(_path(x[ids], y[ids]))
        if len(one.mean) < len(one.values) or one.series.images:
            back = ids[::-1]
            line.bands.append(f"{_path(x[ids], roof[ids])} {_path(x[back], floor[back])}")
        if len(one.finite) <= FEW or len(ids) == 1:
            line.dots += [(x[i], y[i]) for i in ids]
    texts: Points = []
    for i in one.finite:
        words = [f"{plot.along} {one.steps[i]:,.0f}", f"{number(one.mean[i])}{plot.unit}"]
        if np.isfinite(epoch := one.epochs[i]):
            words.insert(1, f"epoch {number(epoch, 3)}")
        if one.series.label:
            words.insert(0, one.series.label)
        texts.append((round(float(x[i]), 1), round(float(y[i]), 1), " · ".join(words)))
    return line, texts


def _notes(drawn: list[_Reduced], unit: str, log: bool) -> list[str]:
    notes = []
    if len(drawn) == 1:
        (one,) = drawn
        notes.append(f"{number(one.mean[one.finite[-1]])}{unit}")
        if (each := round(len(one.values) / len(one.mean))) > 1:
            notes.append(f"means of {each:,} logged values")
        if one.series.images:
            notes.append("shaded: 95 % interval")
    lost = sum(int(np.isnan(one.values).sum()) for one in drawn)
    if lost:
        total = sum(len(one.values) for one in drawn)
        notes.append(f"{lost:,} of {total:,} logged values are not finite")
    return [*notes, "logarithmic axis"] if log else notes


def _path(x: np.ndarray, y: np.ndarray) -> str:
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
