"""Raster files: what a header says of bands, units, missing values and position, and the values.

A raster's tags decide what its numbers mean: scale and offset are applied, a palette's colours
replace its numbers, an alpha band marks missing pixels.
"""

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vim_ssl.data.config import colour_of
from vim_ssl.data.images import most_pixels
from vim_ssl.data.spec import near
from vim_ssl.utils.optional import require

Box = tuple[int, int, int, int]  # left, top, width, height in pixels of a raster
COLOURS = ("R", "G", "B")
ALPHA = ("", "a", "alpha", "mask", "opacity")  # descriptions of a band that marks missing pixels
METRES_PER_DEGREE = 111_320
UTM = re.compile(r"EPSG:(326|327|258|269)\d\d$")
# Sentinel-2 products from this processing baseline on store reflectances with 1000 added.
BASELINE = re.compile(r"_N(\d{4})_")
OFFSET_BASELINE = 400


def import_rasterio() -> Any:
    """Return the module rasterio. Raises: ImportError with the package to install."""
    what = "Rasters (geotiff:, bigearthnet:, 13-band eurosat:)"
    return require("rasterio", "remote-sensing", what)


@contextmanager
def opened(path: str | Path) -> Iterator[Any]:
    """Open a raster; suppress the warning about missing georeferences."""
    rasterio = import_rasterio()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        warnings.simplefilter("ignore", rasterio.errors.NodataShadowWarning)
        with rasterio.open(Path(path)) as file:  # a str may be taken for a URL
            yield file


# ---------------------------------------------------------------- headers


@dataclass(frozen=True)
class Raster:
    """The header of a raster.

    Attributes:
        width, height: pixels.
        bands: names of the bands, without an alpha band; R, G and B for a palette.
        colours: "R", "G", "B" or "" per band, by its name or the file's colour interpretation.
        dtype: common dtype of the values, as `read_bands` returns them.
        has_no_data: whether values or pixels are marked as missing.
        alpha: number of the band that marks missing pixels with 0, from 1; None without one.
        units: unit of each band, as far as the file names it.
        pixel: side of a pixel in metres; None if unknown.
        crs: coordinate system, the same text for all UTM zones; "" if unknown.
    """

    width: int
    height: int
    bands: tuple[str, ...]
    colours: tuple[str, ...]
    dtype: np.dtype
    has_no_data: bool
    alpha: int | None
    units: tuple[str, ...]
    pixel: float | None
    crs: str

    @property
    def keys(self) -> tuple[str, ...]:
        """A key per band by which the bands of two files are matched: its colour, else its name."""
        return tuple(c or name.lower() for c, name in zip(self.colours, self.bands, strict=True))

    def fault(self, tile: int | None) -> str:
        """Describe why this raster cannot be an image, or is too large to read; "" if usable."""
        if self.dtype.kind == "c":
            return "has complex values, expected real ones"
        if not tile and self.width * self.height > most_pixels():
            return (
                f"has {self.width}x{self.height} pixels, the limit is {most_pixels():,}; cut it "
                "with tile=, or set VIM_SSL_MAX_PIXELS"
            )
        return ""


def read_header(file: Any, *, stored: bool = False) -> Raster:
    """Return the header of an open raster.

    Args:
        stored: see `read_bands`.
    """
    from rasterio.enums import MaskFlags

    alpha = None if stored else _alpha_band(file)
    numbers = [number for number in file.indexes if number != alpha]
    names = [file.descriptions[number - 1] or f"band{number}" for number in numbers]
    colours = [
        colour_of(file.descriptions[n - 1] or "")
        or {"red": "R", "green": "G", "blue": "B"}.get(file.colorinterp[n - 1].name, "")
        for n in numbers
    ]
    dtype = np.result_type(*(file.dtypes[number - 1] for number in numbers))
    palette = not stored and _palette(file) is not None
    if palette:
        names, colours, dtype = list(COLOURS), list(COLOURS), np.dtype(np.uint8)
    elif not stored and _is_scaled(file) and dtype.kind != "c":
        dtype = np.dtype(np.float32)
    if len(set(colours) - {""}) < len([colour for colour in colours if colour]):
        colours = [""] * len(names)  # two bands of a colour: names decide
    no_data = not all(MaskFlags.all_valid in flags for flags in file.mask_flag_enums)
    return Raster(
        file.width, file.height, tuple(names), tuple(colours), dtype, no_data or palette, alpha,
        tuple(file.units[number - 1] or "" for number in numbers), _pixel_side(file), _crs(file),
    )  # fmt: skip


def _alpha_band(file: Any) -> int | None:
    """The number of an alpha band. By default GDAL declares the fourth of four 8-bit bands as
    alpha: a band with a name of its own, or with other values than 0 and the maximum in a tenth of
    the pixels, is measured."""
    for number, (kind, text) in enumerate(zip(file.colorinterp, file.descriptions, strict=True), 1):
        if kind.name == "alpha" and (text or "").lower() in ALPHA and file.count > 1:
            size = min(file.height, 64), min(file.width, 64)
            values = file.read(number, out_shape=size)
            most = np.iinfo(values.dtype).max if values.dtype.kind in "iu" else 1
            if np.isin(values, (0, most)).mean() >= 0.9:
                return number
    return None


def _palette(file: Any) -> np.ndarray | None:
    """The colours (n, 4) of a raster of palette indices: red, green, blue, alpha, 0 to 255."""
    if file.count != 1 or file.colorinterp[0].name != "palette":
        return None
    try:
        colours = file.colormap(1)
    except ValueError:  # it declares a palette that it does not have
        return None
    table = np.zeros((max(colours) + 1, 4), np.uint8)
    for index, colour in colours.items():
        table[index] = colour
    return table


def _is_scaled(file: Any) -> bool:
    return any(scale != 1 for scale in file.scales) or any(file.offsets)


def _pixel_side(file: Any) -> float | None:
    at = file.transform
    side = float(np.hypot(at.b, at.e))
    if at.is_identity or not file.crs:
        return None
    if file.crs.is_projected:
        return side * file.crs.linear_units_factor[1]
    return side * METRES_PER_DEGREE


def _crs(file: Any) -> str:
    text = file.crs.to_string() if file.crs else ""
    return "UTM" if UTM.match(text) else text


# ---------------------------------------------------------------- values


def read_bands(
    path: str | Path,
    numbers: Sequence[int],
    *,
    box: Box | None = None,
    side: int | None = None,
    alpha: int | None = None,
    stored: bool = False,
) -> np.ma.MaskedArray:
    """Read bands (bands, h, w), masked where values are missing.

    A value is missing if it is the band's no-data value. In 8-bit and colour rasters, where this
    value also occurs in measured pixels, a pixel is missing only if all its bands have it. Pixels
    are also missing where the file's mask or alpha band says so.

    Args:
        numbers: bands from 1; of a palette, 1, 2 and 3 are red, green and blue.
        box: the part to read; None for all.
        side: resample it to this many pixels per side.
        alpha: the band that marks missing pixels with 0.
        stored: keep the numbers in the file: scale, offset and palette are not applied.
    """
    from rasterio.enums import Resampling
    from rasterio.windows import Window

    with opened(path) as file:
        palette = None if stored else _palette(file)
        everything = [n for n in file.indexes if n != alpha]
        together = _all_bands_count(file, everything)
        needed = everything if together or palette is not None else list(numbers)
        where = {"window": Window(*box) if box else None}
        shape = (side, side) if side else None
        nearest = palette is not None
        values = file.read(
            needed, **where, out_shape=(len(needed), *shape) if shape else None,
            resampling=Resampling.nearest if nearest else Resampling.bilinear,
        )  # fmt: skip
        missing = _is_no_data(file, needed, values)
        if together:
            missing = np.broadcast_to(missing.all(0), values.shape)
        marked = _marked(file, alpha, {**where, "out_shape": shape})
        if marked is not None:
            missing = missing | marked
        if palette is not None:
            colours = palette[np.minimum(values[0], len(palette) - 1)]  # (h, w, 4)
            missing = np.broadcast_to(missing | (colours[..., 3] == 0), (3, *missing.shape[1:]))
            values, needed = np.moveaxis(colours[..., :3], -1, 0), [1, 2, 3]
        rows = [needed.index(number) for number in numbers]
        values, missing = values[rows], missing[rows]
        if not stored and palette is None and _is_scaled(file):
            scale, offset = (
                np.array([column[number - 1] for number in numbers])[:, None, None]
                for column in (file.scales, file.offsets)
            )
            values = (values * scale + offset).astype(np.float32)
        return np.ma.MaskedArray(values, missing)


def _all_bands_count(file: Any, numbers: Sequence[int]) -> bool:
    """True if a pixel is missing only where all of these bands have their no-data value."""
    if len(numbers) < 2 or all(value is None for value in file.nodatavals):
        return False
    colours = {kind.name for kind in file.colorinterp}
    return set(file.dtypes) == {"uint8"} or {"red", "green", "blue"} <= colours


def _is_no_data(file: Any, numbers: Sequence[int], values: np.ndarray) -> np.ndarray:
    missing = np.zeros(values.shape, bool)
    for band, row, number in zip(values, missing, numbers, strict=True):
        value = file.nodatavals[number - 1]
        if value is None:
            continue
        if np.isnan(value):
            row[...] = np.isnan(band)
        elif band.dtype.kind == "f":
            row[...] = band == band.dtype.type(value)
        else:
            row[...] = band == value
    return missing


def _marked(file: Any, alpha: int | None, options: Mapping[str, Any]) -> np.ndarray | None:
    """Return where the file's mask or alpha band marks pixels as missing, or None without both."""
    from rasterio.enums import MaskFlags

    if alpha is not None:
        return file.read(alpha, **options) == 0
    flags = file.mask_flag_enums[0]
    if MaskFlags.per_dataset in flags and MaskFlags.alpha not in flags:
        return file.read_masks(1, **options) == 0
    return None


# ---------------------------------------------------------------- several rasters


def choose_bands(
    requested: str | None, names: Sequence[str], source: str, colours: Sequence[str] = ()
) -> list[int]:
    """Return the numbers, from 1, of the bands requested by name or number; all by default.

    Args:
        requested: names or numbers, separated by commas; colours may be written as R, red or B04.
        names: names of the bands.
        colours: "R", "G", "B" or "" per band.
    Raises: ValueError for a band that does not exist, for a name of several bands, and for a band
        that is requested twice, unless it is the only one.
    """
    if not requested:
        return list(range(1, len(names) + 1))
    numbers = []
    lower = [name.lower() for name in names]
    for band in (part.strip() for part in requested.split(",")):
        if lower.count(band.lower()) > 1:
            raise ValueError(f"{source} has several bands {band!r}; give the number of one.")
        if band.lower() in lower:
            numbers.append(lower.index(band.lower()) + 1)
        elif band.isdigit() and 1 <= int(band) <= len(names):
            numbers.append(int(band))
        elif colour_of(band) and colour_of(band) in colours:
            numbers.append(list(colours).index(colour_of(band)) + 1)
        else:
            raise ValueError(
                f"{source} has no band {band!r}.{near(band, names)} It has {', '.join(names)}."
            )
    if len(numbers) > len(set(numbers)) > 1:
        twice = next(names[n - 1] for n in numbers if numbers.count(n) > 1)
        raise ValueError(f"{source}: bands={requested} has the band {twice} twice; give it once.")
    return numbers


def match_bands(
    rasters: Mapping[str, Raster], requested: str | None, source: str
) -> tuple[dict[str, list[int]], list[str]]:
    """Return the band numbers of each raster, in the same order for all, and the bands' names.

    The first raster determines the order, unless three 8-bit bands are red, green and blue: these
    are read in this order, as images are.

    Raises: ValueError for rasters whose bands or unit differ from the first raster's.
    """
    first = next(iter(rasters.values()))
    chosen = choose_bands(requested, first.bands, source, first.colours)
    if not requested and first.dtype == np.uint8 and sorted(first.colours) == sorted(COLOURS):
        chosen = [first.colours.index(colour) + 1 for colour in COLOURS]
    numbers = {}
    for name, raster in rasters.items():
        if np.uint8 in (raster.dtype, first.dtype) and raster.dtype != first.dtype:
            raise ValueError(
                f"{source}: {name} is {raster.dtype}, others are {first.dtype}. uint8 is scaled to "
                "[0, 1], other dtypes are not. Use a file pattern that matches rasters of a single "
                "dtype."
            )
        if sorted(raster.keys) != sorted(first.keys):
            raise ValueError(
                f"{source}: {name} has the bands {', '.join(raster.bands)}, others have "
                f"{', '.join(first.bands)}. Use a file pattern that matches rasters with the same "
                "bands."
            )
        same = raster.keys == first.keys
        if not same and len(set(first.keys)) < len(first.keys):
            raise ValueError(f"{source}: {name} has other bands of the same name than the others.")
        local = [n if same else raster.keys.index(first.keys[n - 1]) + 1 for n in chosen]
        # An alpha band between the others has a number too.
        numbers[name] = [n + (raster.alpha is not None and n >= raster.alpha) for n in local]
    return numbers, [first.bands[number - 1] for number in chosen]


def describe_mixture(rasters: Mapping[str, Raster]) -> list[str]:
    """Describe in which respects rasters differ so that equal values may mean different things."""
    faults = []
    for what, value_of, remedy in (
        ("types of values", lambda raster: _number_kind(raster.dtype),
         "check that all have the same unit"),
        ("units", lambda raster: ", ".join(filter(None, raster.units)), "convert them to one unit"),
        ("coordinate systems", lambda raster: raster.crs,
         "reproject them if their pixels differ in size"),
    ):  # fmt: skip
        examples: dict[str, str] = {}
        for name, raster in rasters.items():
            examples.setdefault(value_of(raster), name)
        if len(examples) > 1:
            listed = ", ".join(f"{value or 'none'} ({name})" for value, name in
                               list(examples.items())[:3])  # fmt: skip
            faults.append(f"the rasters have different {what}: {listed}; {remedy}")
    sides = {name: raster.pixel for name, raster in rasters.items() if raster.pixel}
    if sides and max(sides.values()) > 1.25 * min(sides.values()):
        small, large = min(sides, key=sides.__getitem__), max(sides, key=sides.__getitem__)
        faults.append(
            f"the rasters have different resolutions: {sides[small]:.3g} m a pixel ({small}) to "
            f"{sides[large]:.3g} m ({large}); resample them if objects must have the same size"
        )
    return [*faults, *mixed_baselines(rasters)]


def mixed_baselines(names: Sequence[str] | Mapping[str, Any]) -> list[str]:
    """Describe files of Sentinel-2 products whose names say that their reflectances differ by an
    offset of 1000."""
    examples: dict[bool, str] = {}
    for name in names:
        if (match := BASELINE.search(name)) and match[1] != "9999":
            examples.setdefault(int(match[1]) >= OFFSET_BASELINE, name)
    if len(examples) < 2:
        return []
    return [
        "Sentinel-2 products of both kinds: from processing baseline 04.00 on (_N0400_), 1000 is "
        f"added to reflectances ({examples[True]}, not {examples[False]}); subtract it first"
    ]


def _number_kind(dtype: np.dtype) -> str:
    return "float" if dtype.kind == "f" else "integer"
