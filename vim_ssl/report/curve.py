"""One curve of a run's page, as inline SVG."""

import itertools
import json
import math
import warnings
from collections.abc import Callable
from html import escape

import numpy as np

from vim_ssl.utils.names import number

MAX_POINTS = 240  # of a curve; each stands for a stretch of steps
WIDTH, HEIGHT = 420, 200  # in SVG units, as are the margins
LEFT, RIGHT, TOP, BOTTOM = 58, WIDTH - 10, 8, HEIGHT - 24
BEYOND = 1e30  # no axis is of use past it


def draw_curve(
    title: str,
    steps: np.ndarray,
    epochs: np.ndarray,
    values: np.ndarray,
    *,
    unit: str = "",
    allow_log: bool = False,
    marked: bool = False,
) -> str:
    """A figure with a line of at most MAX_POINTS points, and gaps where nothing was finite.

    Args:
        steps, epochs, values: (n,) float64, steps ascending; NaN in ``epochs`` where unknown.
        allow_log: use a logarithmic axis for positive values that differ by more than 50 times.
        marked: a dot on every point.
    Returns: HTML, "" for n = 0. Its script finds the points' texts in ``data-points``.
    """
    if not len(steps):
        return ""
    caption = f"<figcaption>{escape(title)}</figcaption>"
    values = np.where(np.abs(values) < BEYOND, values, np.nan)
    lost = int(np.isnan(values).sum())
    if lost == len(values):
        return f"<figure>{caption}<p class=note>No finite value yet.</p></figure>"
    parts = np.array_split(np.arange(len(values)), min(len(values), MAX_POINTS))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # nothing finite in a stretch: NaN
        mean, low, high = (
            np.array([f(values[p]) for p in parts]) for f in (np.nanmean, np.nanmin, np.nanmax)
        )
    ends = np.array([p[-1] for p in parts])
    seen = np.flatnonzero(np.isfinite(mean))
    # The whole line fits; of the ranges, rare outliers may leave the image.
    bottom = min(float(mean[seen].min()), float(np.percentile(low[seen], 5)))
    top = max(float(mean[seen].max()), float(np.percentile(high[seen], 95)))
    log = allow_log and float(low[seen].min()) > 0 and top > 50 * bottom
    x_of, x_ticks = _axis(float(steps[ends[0]]), float(steps[-1]), LEFT, RIGHT)
    y_of, y_ticks = _axis(bottom, top, BOTTOM, TOP, log)
    x, y = x_of(steps[ends]), y_of(mean)
    floor, roof = (np.clip(y_of(edge), TOP, BOTTOM) for edge in (low, high))

    lines = band = dots = ""
    # A jump in the index is a stretch without a finite value.
    for _, group in itertools.groupby(enumerate(seen), lambda pair: pair[1] - pair[0]):
        ids = [i for _, i in group]
        lines += f'<polyline points="{_points(x[ids], y[ids])}" />'
        if len(parts) < len(values):
            back = ids[::-1]
            edges = f"{_points(x[ids], roof[ids])} {_points(x[back], floor[back])}"
            band += f'<polygon points="{edges}" />'
        if marked or len(ids) == 1:
            dots += "".join(f'<circle cx="{x[i]:.1f}" cy="{y[i]:.1f}" r="3" />' for i in ids)
    axes = f'<line x1="{LEFT}" x2="{RIGHT}" y1="{BOTTOM}" y2="{BOTTOM}" />'
    for at, text in y_ticks:
        axes += f'<line x1="{LEFT}" x2="{RIGHT}" y1="{at:.1f}" y2="{at:.1f}" />'
        axes += f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{text}</text>'
    for at, text in x_ticks:
        anchor = "end" if at > RIGHT - 20 else "middle"
        axes += f'<text x="{at:.1f}" y="{HEIGHT - 6}" text-anchor="{anchor}">{text}</text>'

    texts = []
    for i in seen:
        epoch = epochs[ends[i]]
        words = [f"step {steps[ends[i]]:,.0f}", f"{number(mean[i])}{unit}"]
        if np.isfinite(epoch):
            words.insert(1, f"epoch {number(epoch, 3)}")
        texts.append([round(float(x[i]), 1), round(float(y[i]), 1), " · ".join(words)])
    notes = [f"{number(mean[seen[-1]])}{unit}"]
    if lost:
        notes.append(f"{lost:,} of {len(values):,} lines read not finite")
    if log:
        notes.append("logarithmic axis")
    rest = escape(" · ".join(notes))
    return (
        f'<figure>{caption}<output data-rest="{rest}">{rest}</output>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)} over steps"'
        f' data-points="{escape(json.dumps(texts))}"><g class="axes">{axes}</g>'
        f'<g class="band">{band}</g><g class="line">{lines}{dots}</g>'
        '<circle class="cursor" r="4" hidden /></svg></figure>'
    )


def _points(x: np.ndarray, y: np.ndarray) -> str:
    return " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))


def _axis(
    low: float, high: float, start: float, end: float, log: bool = False
) -> tuple[Callable, list[tuple[float, str]]]:
    """Value -> SVG coordinate, and the ticks (coordinate, text)."""
    if log:
        exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        digits = (1, 2, 5) if len(exponents) < 4 else (1,)
        ticks = [d * 10.0**e for e in exponents for d in digits if low <= d * 10.0**e <= high]
        ticks = ticks[:: math.ceil(len(ticks) / 6)]
    else:
        if high - low <= 1e-9 * max(abs(low), abs(high)):  # one value: put it in the middle
            low, high = low - (abs(low) / 10 or 1), high + (abs(high) / 10 or 1)
        raw = (high - low) / 5
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= 0.999 * raw)
        first, last = math.ceil(low / step - 1e-6), math.floor(high / step + 1e-6)
        ticks = [i * step for i in range(first, last + 1)]
    scale = np.log10 if log else np.asarray

    def place(value):
        return start + (end - start) * (scale(value) - scale(low)) / (scale(high) - scale(low))

    return place, [(float(place(tick)), _short(tick)) for tick in ticks]


def _short(tick: float) -> str:
    if 1e6 <= abs(tick) < 1e9:
        return f"{tick / 1e6:g}M"
    if 1e4 <= abs(tick) < 1e6:
        return f"{tick / 1e3:g}k"
    return number(tick, 6)
