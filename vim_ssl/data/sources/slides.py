"""``slide:``: whole-slide images, and other images too large to read at once, as tiles with tissue.

tiffslide reads tiled TIFFs, with or without a pyramid, tile by tile; a plain image (PNG, JPEG) is
decoded completely and cut. Tissue is detected one row of tiles at a time, at a level of the pyramid
at which a tile has at least sixteen pixels. If no level is small enough, tiles are read and shrunk
in pieces, so that memory is bounded for a tile of any size.
"""

import math
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vim_ssl.data.dataset import ImageData
from vim_ssl.data.images import EXTENSIONS, BadImage, decode_image, most_pixels
from vim_ssl.data.passed_over import pass_over
from vim_ssl.data.registry import Splits, source
from vim_ssl.data.sources.folder import FileImages, OnDisk, folder_splits
from vim_ssl.data.sources.tables import read_table
from vim_ssl.data.spec import DataSpec
from vim_ssl.data.tables import TABLES
from vim_ssl.data.walk import find_files
from vim_ssl.utils.optional import require

TIFFS = (".tif", ".tiff", ".svs", ".ndpi", ".scn", ".bif")
SLIDE_EXTENSIONS = tuple(dict.fromkeys(TIFFS + EXTENSIONS))
COLOURED = 20  # minimum range of a tissue pixel's channels (of 255); glass is grey
COLOURS = ("MINISBLACK", "RGB", "YCBCR")  # tiffslide returns others, such as palettes, as grey
OVERVIEW = 16  # pixels across a tile, enough to detect tissue
TILE, TISSUE = 256, 0.1
PIECE = 2**26  # pixels read at once at most, 0.2 GB
# Larger factors mean that the file's pixel size is wrong.
ENLARGED, SHRUNK = 4, 1000
ALIKE = 1.1  # factor between two pixel sizes that count as equal
# Endings of the names of images that scanners and viewers write beside a slide.
BESIDE = re.compile(
    r"[-_. ](thumb(nail)?|label|macro|map|overview|preview|mask|slide_?(label|thumbnail))s?$", re.I
)


@dataclass(frozen=True)
class SlideTile:
    """A square of ``side`` pixels of the slide ``name`` at full resolution, from (left, top)."""

    name: str
    left: int
    top: int
    side: int

    def __str__(self) -> str:
        """Return the id, which `tile_origin` parses."""
        return f"{self.name}@{self.left},{self.top}"


def tile_origin(id: str) -> tuple[str, int, int]:
    """Parse a tile's id into slide, left and top (pixels at full resolution)."""
    name, _, corner = id.rpartition("@")
    left, top = corner.split(",")
    return name, int(left), int(top)


@dataclass(eq=False)
class SlideTiles(OnDisk):
    """Tiles as arrays (pixels, pixels, 3), uint8."""

    rows: Sequence[SlideTile]
    pixels: int

    def names(self, row: int) -> list[str]:
        return [self.rows[row].name]

    def part(self, row: int) -> str:
        tile = self.rows[row]
        return f"{tile.left},{tile.top} side {tile.side}"

    def __getitem__(self, row: int) -> np.ndarray:
        tile = self.rows[row]
        slide = open_image(os.path.join(self.root, tile.name))
        level = slide.level(tile.side / self.pixels)
        # Pixels read per output row.
        row_pixels = tile.side**2 / self.pixels / slide.downsamples[level] ** 2
        pieces = []
        for rows in _pieces(self.pixels, row_pixels):
            above, below = (y * tile.side / self.pixels for y in (rows.start, rows.stop))
            top, bottom = math.floor(above), math.ceil(below)
            values = slide.read(tile.left, tile.top + top, tile.side, bottom - top, level)
            size, (height, width) = (self.pixels, len(rows)), values.shape[:2]
            if (width, height) != size:
                scale = height / (bottom - top)
                box = (0, (above - top) * scale, width, min((below - top) * scale, height))
                image = Image.fromarray(values)
                values = np.asarray(image.resize(size, Image.Resampling.BOX, box))
            pieces.append(values)
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


class _Plain:
    """A slide that is decoded completely."""

    mpp: float | None = None
    mpp_y: float | None = None
    downsamples: Sequence[float] = (1.0,)

    def __init__(self, path: str):
        self.values = np.asarray(decode_image(path, mode="RGB"))
        self.height, self.width = self.values.shape[:2]

    def level(self, downsample: float) -> int:
        return 0

    def read(self, left: int, top: int, width: int, height: int, level: int) -> np.ndarray:
        return self.values[top : top + height, left : left + width]


class _Tiled:
    """A TIFF that tiffslide reads."""

    def __init__(self, path: str):
        tiffslide = import_tiffslide()
        try:
            self.slide = tiffslide.TiffSlide(path)
            self.width, self.height = self.slide.dimensions
            sizes = [self.slide.properties.get(f"tiffslide.mpp-{axis}") for axis in "xy"]
            self.mpp, self.mpp_y = map(_micrometres, sizes)
            self.downsamples = self.slide.level_downsamples
            series = self.slide.properties.get("tiffslide.series-index", 0)
            page = self.slide.ts_tifffile.series[series].levels[0].pages[0]
            colours, piece = page.photometric.name, math.prod(page.chunks[:2])
        except Exception as error:  # readers raise errors of nearly any type
            raise BadImage(path, f"tiffslide cannot read this TIFF: {error}") from error
        if colours not in COLOURS:
            raise BadImage(path, f"its colour space is {colours}; expected {', '.join(COLOURS)}")
        if piece > most_pixels():  # each tile decodes whole pieces
            raise BadImage(
                path,
                f"it is stored in segments of {piece:,} pixels, the limit is {most_pixels():,}; "
                "save it as tiled, or set VIM_SSL_MAX_PIXELS",
            )
        self.path = path

    def level(self, downsample: float) -> int:
        """Return the coarsest level whose downsampling does not exceed ``downsample``."""
        return self.slide.get_best_level_for_downsample(downsample + 1e-3)

    def read(self, left: int, top: int, width: int, height: int, level: int) -> np.ndarray:
        """Read (h, w, 3) uint8 at this level; position and size are at full resolution."""
        down = self.downsamples[level]
        size = (max(round(width / down), 1), max(round(height / down), 1))
        try:
            values = self.slide.read_region((left, top), level, size, as_array=True)
        except Exception as error:
            raise BadImage(self.path, f"{type(error).__name__}: {error}") from error
        if values.dtype != np.uint8:
            raise BadImage(self.path, f"its pixels are {values.dtype}; expected uint8")
        return values[..., :3] if values.shape[2] >= 3 else np.repeat(values[..., :1], 3, axis=2)


def _micrometres(value: Any) -> float | None:
    """Return a declared pixel size; None for one that is missing or none."""
    try:
        size = float(str(value).replace(",", "."))
    except ValueError:
        return None
    return size if 0 < size < math.inf else None


def open_image(path: str) -> Any:
    """Open a slide to read windows of it; each process keeps the last few open.

    Raises: BadImage for an unreadable file; ImportError without tiffslide.
    """
    try:
        changed = os.stat(path).st_mtime_ns
    except OSError as error:
        raise BadImage(path, f"{type(error).__name__}: {error}") from error
    return _open(path, changed, os.getpid())


@lru_cache(maxsize=2)
def _open(path: str, changed: int, process: int) -> _Plain | _Tiled:
    return _Tiled(path) if path.lower().endswith(TIFFS) else _Plain(path)


def _pieces(rows: int, pixels: float) -> Iterator[range]:
    """Split rows of ``pixels`` each into ranges of at most `PIECE` pixels, at least one row."""
    count = min(max(int(PIECE / pixels), 1), rows)
    return (range(first, min(first + count, rows)) for first in range(0, rows, count))


def tissue(path: str, side: int) -> np.ndarray:
    """Return the fraction of coloured pixels of every whole tile, (rows, columns) float32.

    Args:
        side: side of a tile, in pixels at full resolution.
    Raises: BadImage.
    """
    slide = open_image(path)
    rows, columns = slide.height // side, slide.width // side
    shares = np.zeros((rows, columns), np.float32)
    if not columns:
        return shares
    level = slide.level(side / OVERVIEW)
    width = columns * side
    for row in range(rows):
        for piece in _pieces(side, width / slide.downsamples[level] ** 2):
            strip = slide.read(0, row * side + piece.start, width, len(piece), level)
            coloured = strip.max(2) - strip.min(2) > COLOURED
            edges = np.arange(columns) * coloured.shape[1] // columns
            widths = np.diff(np.append(edges, coloured.shape[1]))
            means = np.add.reduceat(coloured.mean(0), edges) / widths
            shares[row] += means * (len(piece) / side)
    return shares


@lru_cache(maxsize=4096)  # data is opened once per split
def _positions(
    path: str, changed: int, pixels: int, mpp: float | None, shrink: float, least: float | None
) -> Any:
    """Return the side of a tile at full resolution, (left, top) of each kept tile, and the declared
    pixel size in micrometres."""
    slide = open_image(path)
    side = max(round(pixels * shrink), 1)
    if mpp is not None:
        _check_pixel_size(path, slide, mpp)
        side = max(round(pixels * mpp / slide.mpp), 1)
    if least is None:
        kept = np.ones((slide.height // side, slide.width // side), bool)
    else:
        kept = tissue(path, side) >= least
    return side, [(int(x) * side, int(y) * side) for y, x in np.argwhere(kept)], slide.mpp


def _check_pixel_size(path: str, slide: _Plain | _Tiled, mpp: float) -> None:
    """Raise BadImage unless the declared pixel size can be meant."""
    if slide.mpp is None:
        raise BadImage(path, "it does not declare its pixel size; remove mpp=")
    declared = f"its header declares pixels of {slide.mpp:g}"
    if slide.mpp_y and not 1 / ALIKE < slide.mpp / slide.mpp_y < ALIKE:
        raise BadImage(
            path, f"{declared} x {slide.mpp_y:g} micrometres, which are not square; remove mpp="
        )
    for factor, most, verb in (
        (slide.mpp / mpp, ENLARGED, "enlarged"), (mpp / slide.mpp, SHRUNK, "shrunk"),
    ):  # fmt: skip
        if factor > most:
            raise BadImage(
                path,
                f"{declared} micrometres; at mpp={mpp:g} they would be {verb} {factor:.0f} times; "
                "remove mpp=",
            )


@source(
    "slide", extra="slides", options=("tile", "mpp", "shrink", "tissue", "image", "label", "group")
)
def open_slide(spec: DataSpec) -> Splits:
    """Open ``slide:FILES``: a slide, a folder of slides at any depth, or a table of paths, as tiles
    without overlap.

    ``tile=256`` is the side of a tile in pixels: by default at full resolution; with ``mpp=0.5`` at
    0.5 micrometres per pixel; with ``shrink=16``, for files that do not declare their pixel size,
    at a sixteenth of the resolution. With it, a slide of 30,000 pixels is one tile of 1,872, which
    an encoder with that ``img_size`` reads in one scan. The remainder at the right and lower border
    is dropped. A tile is kept if at least a tenth of its pixels is coloured, or the fraction given
    as ``tissue=0.3``; ``tissue=none`` keeps all. The ids are ``path@left,top`` (`tile_origin`); the
    group is the slide, or a table's column ``group=``. Class folders and splits are those of
    `open_folder`, a table's columns those of ``csv:``; a tile has the label of its slide.

    Raises: ImportError without tiffslide, unless there are only plain images; FileNotFoundError;
        ValueError for invalid options, and if no slide has a tile.
    """
    if spec.mpp is not None and spec.shrink is not None:
        raise ValueError(f"{spec}: mpp= and shrink= both set the resolution; give only one.")
    pixels, least = spec.tile or TILE, _least(spec)
    root, listed = _slides(spec)

    def choose(spec: DataSpec) -> ImageData:
        slides = listed.open(spec)
        tiles: list[SlideTile] = []
        slide_of: list[int] = []
        faults: list[str] = []
        sizes: dict[str, float] = {}
        for number, name in enumerate(slides.ids):
            path = os.path.join(root, name)
            try:
                changed = os.stat(path).st_mtime_ns if os.path.exists(path) else 0
                side, corners, mpp = _positions(
                    path, changed, pixels, spec.mpp, spec.shrink or 1, least
                )
            except BadImage as bad:
                faults.append(f"{name} cannot be read ({bad.reason})")
                continue
            if mpp:
                sizes[name] = mpp
            if not corners:
                faults.append(f"{name} has no tile of {side} pixels with tissue")
            tiles += [SlideTile(name, left, top, side) for left, top in corners]
            slide_of += [number] * len(corners)
        if spec.mpp is None:
            faults += _several_sizes(sizes)
        if not tiles:
            raise ValueError(f"{spec}: none of {len(slides)} slides has a tile: {faults[0]}.")
        return ImageData(
            SlideTiles(root, tiles, pixels), map(str, tiles), name=str(spec),
            labels=None if slides.labels is None else [slides.labels[i] for i in slide_of],
            classes=slides.classes, groups=[(slides.groups or slides.ids)[i] for i in slide_of],
            splits=slides.splits, split=slides.split, faults=faults,
        )  # fmt: skip

    return Splits(listed.names, choose)


def _slides(spec: DataSpec) -> tuple[str, Splits]:
    """Return the root that names are relative to, and the slides with labels and splits."""
    given = spec.location
    path = Path(given).expanduser()
    if path.suffix.lower() in TABLES:
        spec.takes("tile", "mpp", "shrink", "tissue", "image", "label", "group")
        return str(path.parent), read_table(spec, ImageData, FileImages)
    spec.takes("tile", "mpp", "shrink", "tissue", "label")
    if path.is_file():
        root, names = path.parent, [path.name]
    else:
        root, names = path, _without_thumbnails(find_files(path, given, "slide", SLIDE_EXTENSIONS))
    return str(root), folder_splits(root, names)


def _without_thumbnails(names: list[str]) -> list[str]:
    """Pass over images that belong to a slide beside them: its thumbnail, label or overview by
    their names, and a plain image of its name."""
    stems = {os.path.splitext(name)[0] for name in names}
    tiled = {os.path.splitext(name)[0] for name in names if name.lower().endswith(TIFFS)}
    kept: list[str] = []
    others: list[str] = []
    for name in names:
        stem = os.path.splitext(name)[0]
        base = BESIDE.sub("", stem)
        copy = stem in tiled and not name.lower().endswith(TIFFS)
        (others if copy or (base != stem and base in stems) else kept).append(name)
    pass_over("thumbnails, labels and other images of a slide beside them", len(others), others)
    return kept


def _several_sizes(sizes: dict[str, float]) -> list[str]:
    """Describe slides whose pixels have several sizes, in micrometres."""
    if not sizes or max(sizes.values()) < ALIKE * min(sizes.values()):
        return []
    fine, coarse = (choose(sizes, key=sizes.__getitem__) for choose in (min, max))
    return [
        f"the slides have pixels of {sizes[fine]:g} ({fine}) to {sizes[coarse]:g} micrometres "
        f"({coarse}), so that tiles differ in scale; mpp={sizes[coarse]:.2g} reads them alike"
    ]


def _least(spec: DataSpec) -> float | None:
    if spec.tissue == "none":
        return None
    try:
        least = float(spec.tissue or TISSUE)
    except ValueError:
        least = -1.0
    if not 0 <= least <= 1:
        raise ValueError(f"{spec}: tissue={spec.tissue} must be a fraction within 0..1, or none.")
    return least


def import_tiffslide() -> Any:
    """Return the module tiffslide. Raises: ImportError with the package to install."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return require("tiffslide", "slides", "Slides (slide:)")
