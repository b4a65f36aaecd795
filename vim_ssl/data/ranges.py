"""Stored numbers that spoil images: values for "no data" that no tag declares, and numbers that use
only a small part of their type's range."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from vim_ssl.data.passed_over import some_of

FREQUENT = 0.01  # share of the pixels of a band from which a value may stand for no data
FAR = 10  # such a value is this many times the range of the others away from them
FAR_IF_USUAL = 0.1  # the same for the values that programs write for no data
USUAL = (
    -999, -9999, -99999, -32767, -32768, 65535, -(2**31), 2**31 - 1, 2**32 - 1, 1e20, -1e20, 1e30,
    -1e30, 1e36, 9.969209968386869e36, -1e38, 3.4028234663852886e38, -3.4028234663852886e38,
    -1.7976931348623157e308, 1.7976931348623157e308,
)  # fmt: skip
LEAST_USED = 32  # of the 256 levels of grey; less is an eighth of the type's range
LOOKED_AT = 16  # images that are read for a warning


def fills(values: np.ndarray) -> tuple[float, ...]:
    """Return the values of an array (h, w) or (h, w, bands) that probably stand for no data: the
    smallest or largest of a band, frequent, and far from all others. Few pixels are read.

    Values of 8 bits have none: black and white are usual there.
    """
    if values.dtype.itemsize < 2 or values.dtype.kind not in "iuf":
        return ()
    step = max(min(values.shape[:2]) // 256, 1)
    few = np.atleast_3d(values)[::step, ::step]
    return tuple(sorted({fill for band in np.moveaxis(few, -1, 0) for fill in _fills_of(band)}))


def _fills_of(band: np.ndarray) -> list[float]:
    known = band[np.isfinite(band)].astype(np.float64)
    if not known.size:
        return []
    ends = {float(known.min()), float(known.max())}
    ends = {end for end in ends if (known == end).mean() >= FREQUENT}
    rest = known[~np.isin(known, list(ends))]
    if not rest.size:  # one or two values: no data, unless black and white
        return [end for end in ends if _is_usual(end) and not 0 <= end < 2**32]
    low, high = rest.min(), rest.max()
    return [
        end for end in ends
        if (gap := max(low - end, end - high)) >= FAR_IF_USUAL * (high - low)
        and (_is_usual(end) or gap >= FAR * (high - low) > 0)
    ]  # fmt: skip


def _is_usual(value: float) -> bool:
    return any(np.isclose(value, usual, rtol=1e-6, atol=0) for usual in USUAL)


def undeclared(fills_of: Mapping[str, Sequence[float]]) -> str:
    """Describe `fills` of images, by their ids; "" without any."""
    names = [name for name, values in fills_of.items() if values]
    if not names:
        return ""
    values = sorted({value for name in names for value in fills_of[name]})
    texts = list(map(_text, values))
    return (
        f"{len(names):,} of {len(fills_of):,} images have many pixels of {some_of(texts)}, far "
        f"from all other values, such as no-data values that no tag declares: {some_of(names)}. "
        "They count as measured values. Declare them in rasters: gdal_edit.py -a_nodata "
        f"{texts[0]} FILE; in other files replace them by NaN"
    )


def _text(value: float) -> str:
    """The shortest text of a number of 64 or 32 bits."""
    if value.is_integer() and abs(value) < 2**53:
        return str(int(value))
    if abs(value) > float(np.finfo(np.float32).max):
        return str(value)
    short = np.float32(value)
    return str(short if float(short) == value else value)


def levels_of(image: Any) -> tuple[int, int] | None:
    """Return the lowest and highest level, 0 to 255, of an image whose file has integers of more
    than 8 bits; None for others."""
    if getattr(image, "info", {}).get("bits", 8) <= 8:
        return None
    values = np.asarray(image)
    return int(values.min()), int(values.max())


def narrow(levels: Iterable[tuple[int, int] | None]) -> str:
    """Describe that images use a small part of the range of their type, by their `levels_of`; ""
    unless they do."""
    deep = [pair for pair in levels if pair is not None]
    if not deep:
        return ""
    low, high = min(low for low, _ in deep), max(high for _, high in deep)
    if high - low >= LEAST_USED:
        return ""
    share = (high - low + 1) / 256
    return (
        f"the {len(deep):,} images with more than 8 bits use only about {share:.1%} of the range "
        f"of their type, as 12-bit values in 16-bit files do, and become {high - low + 1} levels "
        "of grey. Scale their values to the full range, or save them with 8 bits"
    )
