"""``geotiff:``: rasters with named bands, and their masks, read with rasterio. EuroSAT and
BigEarthNet use this module too."""

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from vim_ssl.data.config import colour_of
from vim_ssl.data.dataset import ImageData
from vim_ssl.data.images import BadImage
from vim_ssl.data.labels import IGNORE, checked, classes_in, named_classes
from vim_ssl.data.passed_over import pass_over
from vim_ssl.data.rasters import (
    COLOURS,
    Box,
    Raster,
    describe_mixture,
    import_rasterio,
    match_bands,
    opened,
    read_bands,
    read_header,
)
from vim_ssl.data.registry import Splits, source
from vim_ssl.data.sources.folder import (
    OnDisk,
    check_option,
    match_masks,
    read_layout,
    split_folders,
)
from vim_ssl.data.spec import DataSpec
from vim_ssl.utils.tiling import starts

TIFFS = (".tif", ".tiff")
BLOCK = 128  # pixels; side of the blocks in written files


@dataclass(frozen=True)
class Tile:
    """A window of rasters that cover the same area.

    Attributes:
        bands: (file relative to the root, band number in it from 1) per band.
        box: (left, top, width, height) in pixels; None for the whole raster.
        core: the part of the box that no other tile is responsible for; None for all of it.
        side: resample the window to this many pixels per side.
        alpha: number of the band that marks missing pixels with 0.
        stored: see `vim_ssl.data.rasters.read_bands`.
    """

    bands: tuple[tuple[str, int], ...]
    box: Box | None = None
    core: Box | None = None
    side: int | None = None
    alpha: int | None = None
    stored: bool = False


@dataclass(eq=False)
class RasterImages(OnDisk):
    """Tiles as arrays (h, w, bands) in the file's dtype. A tile with no-data values is float32,
    with NaN for these; its uint8 values are scaled to 0..1."""

    rows: Sequence[Tile]
    contents: ClassVar[str] = "raster"

    def names(self, row: int) -> list[str]:
        return list(dict.fromkeys(name for name, _ in self.rows[row].bands))

    def part(self, row: int) -> str:
        return str(self.rows[row].box)

    def __getitem__(self, row: int) -> np.ndarray:
        tile = self.rows[row]
        by_file: dict[str, list[int]] = {}
        for name, number in tile.bands:
            by_file.setdefault(name, []).append(number)
        try:
            read = {name: self._read(name, numbers, tile) for name, numbers in by_file.items()}
        except Exception as error:  # readers raise errors of nearly any type
            raise BadImage(tile.bands[0][0], f"{type(error).__name__}: {error}") from error
        bands = [read[name][by_file[name].index(number)] for name, number in tile.bands]
        stack: np.ma.MaskedArray = np.ma.stack(bands, axis=-1)
        if not np.ma.is_masked(stack):
            return stack.data
        values = stack.data.astype(np.float32) / (255 if stack.dtype == np.uint8 else 1)
        values[np.ma.getmaskarray(stack)] = np.nan
        return values

    def location(self, row: int) -> dict[str, Any]:
        """Return ``raster`` (the path), ``name`` (relative to the root), ``box`` and ``core``; see
        `write_labels`. Empty for tiles that are resampled."""
        tile = self.rows[row]
        if tile.side:
            return {}
        name = tile.bands[0][0]
        path = os.path.join(self.root, name)
        return {"raster": path, "name": name, "box": tile.box, "core": tile.core or tile.box}

    def _read(self, name: str, numbers: list[int], tile: Tile) -> np.ma.MaskedArray:
        return read_bands(
            os.path.join(self.root, name), numbers, box=tile.box, side=tile.side, alpha=tile.alpha,
            stored=tile.stored,
        )  # fmt: skip


@dataclass(eq=False)
class RasterMasks(OnDisk):
    """The masks of tiles, one file per raster.

    Attributes:
        mask_of: name of a raster → name of its mask.
        classes: number of classes.
    """

    rows: Sequence[Tile]
    mask_of: dict[str, str]
    classes: int

    def names(self, row: int) -> list[str]:
        return [self.mask_of[self.rows[row].bands[0][0]]]

    def classes_in(self, row: int) -> frozenset[int]:
        return classes_in(_numbers, self.paths(row)[0], self.classes)

    def read(self, row: int, size: tuple[int, int]) -> np.ndarray:
        """See `vim_ssl.data.sources.masks.MaskFiles.read`."""
        import_rasterio()
        from rasterio.windows import Window

        (name,), box = self.names(row), self.rows[row].box
        with _mask(os.path.join(self.root, name)) as file:
            values = _class_numbers(file, Window(*box) if box else None)
        return checked(values, size, name, self.classes).astype(np.uint8)


@contextmanager
def _mask(path: str | Path) -> Iterator[Any]:
    """Open a mask. Raises: BadImage, also for errors in the ``with`` block."""
    try:
        with opened(path) as file:
            yield file
    except BadImage:
        raise
    except Exception as error:  # readers raise errors of nearly any type
        raise BadImage(os.path.basename(path), f"the mask cannot be read: {error}") from error


def _class_numbers(file: Any, window: Any = None) -> np.ndarray:
    """Read the first band of a mask as uint32 (h, w); no-data pixels become `IGNORE`.

    Raises: BadImage.
    """
    name = os.path.basename(file.name)
    if {"red", "green", "blue"} <= {kind.name for kind in file.colorinterp}:
        raise BadImage(name, "the mask is a colour image; expected class numbers in one band")
    if file.compression and file.compression.name == "jpeg":
        raise BadImage(name, "JPEG compression changes class numbers; save it with deflate")
    band = file.read(1, window=window, masked=True)
    values = np.where(np.ma.getmaskarray(band), IGNORE, band.data)
    good = (values >= 0) & (values < 2**32) & (values == np.floor(values))  # NaN is not
    if not good.all():
        raise BadImage(name, f"the mask contains {values[~good][0]:g}, which is not a class number")
    return values.astype(np.uint32)


def _lost_classes(root: Path, names: Sequence[str], classes: Sequence[str]) -> list[str]:
    """Report masks whose no-data value is a class number, from at most 16 of them."""
    lost: dict[float, str] = {}
    for name in names[:: max(len(names) // 16, 1)]:
        with suppress(Exception), opened(root / name) as file:  # reported where it is read
            if file.nodata is not None and 0 <= file.nodata < len(classes):
                lost.setdefault(file.nodata, name)
    return [
        f"{name} declares {value:g} as no data, so class {classes[int(value)]!r} is read as "
        "unlabelled; if these pixels are labelled, remove the tag (gdal_edit.py -unsetnodata)"
        for value, name in lost.items()
    ]


def _numbers(path: Path) -> np.ndarray:
    """Return the class numbers in a mask, without no-data. Reads it in blocks, because it may
    exceed the memory."""
    used: set[int] = set()
    with _mask(path) as file:
        for _, window in file.block_windows(1):
            numbers = _class_numbers(file, window)
            used.update(np.unique(numbers[file.read_masks(1, window=window) > 0]).tolist())
    return np.array(sorted(used))


def check_same_grid(file: Any, path: Path) -> None:
    """Raise BadImage for a mask whose size or position differs from the open raster's."""
    with opened(path) as mask:
        if (mask.width, mask.height) != (file.width, file.height):
            raise BadImage(
                path.name,
                f"the mask has {mask.width}×{mask.height} pixels, its raster "
                f"{file.width}×{file.height}",
            )
        if not _same_position(file, mask):
            raise BadImage(
                path.name, "the mask lies elsewhere: it and its raster have different positions"
            )


def _same_position(one: Any, other: Any) -> bool:
    """True if two rasters of the same size have the same position, as far as both have one: the
    corners are less than a tenth of a pixel apart."""
    if one.crs and other.crs and one.crs != other.crs:
        return False
    points, others = ([(p.row, p.col, p.x, p.y) for p in x.gcps[0]] for x in (one, other))
    if points and others and sorted(points) != sorted(others):
        return False
    if one.transform.is_identity or other.transform.is_identity:
        return True
    at = one.transform
    pixel = min(np.hypot(at.a, at.d), np.hypot(at.b, at.e))
    apart = np.subtract(one.transform[:6], other.transform[:6]).reshape(2, 3)
    corners = [(x, y, 1) for x in (0, one.width) for y in (0, one.height)]
    return bool(np.abs(apart @ np.transpose(corners)).max() < 0.1 * pixel)


def write_labels(
    path: Path, like: str, box: Box | None, labels: np.ndarray, classes: Sequence[str] = ()
) -> None:
    """Write class numbers, uint8 (h, w), as a GeoTIFF with the position and size of ``like``.

    Args:
        like: path of a raster.
        box: the part to write (left, top, width, height); None for all. Successive calls write
            boxes of the same raster to the same file; the rest is no-data, 255.
        classes: see `open_labels`.
    """
    with open_labels(path, like, new=box is None, classes=classes) as write:
        write(box, labels)


@contextmanager
def open_labels(
    path: Path, like: str, *, new: bool = True, classes: Sequence[str] = ()
) -> Iterator[Callable[[Box | None, np.ndarray], None]]:
    """Open a file of class numbers as `write_labels` does; yield the function that writes a box.

    The position is that of ``like`` in every form it has: transform, ground control points,
    rational polynomials, geolocation arrays, and whether it is that of a pixel's area or centre.

    Args:
        new: replace an existing file; otherwise continue it, if its size is that of ``like``.
        classes: names of the classes, stored as a colour table and tags of the band.
    """
    rasterio = import_rasterio()
    from rasterio.windows import Window

    with opened(like) as file:
        profile = {"width": file.width, "height": file.height, "driver": "GTiff", "count": 1,
                   "dtype": "uint8", "nodata": IGNORE, "compress": "deflate",
                   "BIGTIFF": "IF_SAFER",
                   # Tiled, since writing a box rewrites every block or strip that it crosses.
                   "tiled": True, "blockxsize": BLOCK, "blockysize": BLOCK}  # fmt: skip
        points, rpcs = file.gcps, file.rpcs
        if not points[0]:
            profile |= {"crs": file.crs, "transform": file.transform}
        of_pixel = {key: file.tags()[key] for key in ("AREA_OR_POINT",) if key in file.tags()}
        arrays = file.tags(ns="GEOLOCATION")
    new = new or not path.exists()
    if not new:
        with opened(path) as written:
            new = (written.width, written.height) != (profile["width"], profile["height"])
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        with rasterio.open(path, "w", **profile) if new else rasterio.open(path, "r+") as file:
            if new:
                file.update_tags(**of_pixel)
                if points[0]:
                    file.gcps = points
                if rpcs:
                    file.rpcs = rpcs
                if arrays:
                    file.update_tags(ns="GEOLOCATION", **arrays)
                if classes:
                    from vim_ssl.utils.drawing import class_colours  # it imports torchvision

                    colours = enumerate(class_colours(len(classes))[:-1].tolist())
                    table = {i: (*rgb, 255) for i, rgb in colours}
                    file.write_colormap(1, table | {IGNORE: (0, 0, 0, 0)})
                    file.update_tags(1, **{f"CLASS_{i}": name for i, name in enumerate(classes)})

            def write(box: Box | None, labels: np.ndarray) -> None:
                file.write(labels, 1, window=Window(*box) if box else None)

            yield write


def raster_grid(path: str) -> tuple[int, int, float | None]:
    """Return the width and height of a raster, and the area of a pixel in square metres; None if
    its coordinates are not lengths."""
    with opened(path) as file:
        at, area = file.transform, None
        if file.crs and file.crs.is_projected:
            area = abs(at.a * at.e - at.b * at.d) * file.crs.linear_units_factor[1] ** 2
        return file.width, file.height, area


def core_of(values: np.ndarray, location: Mapping[str, Any]) -> np.ndarray:
    """Return the part of a tile's values (h, w, ...) in its core; see `RasterImages.location`."""
    if location["core"] == location["box"]:
        return values
    (left, top, *_), (x, y, width, height) = location["box"], location["core"]
    return values[y - top : y - top + height, x - left : x - left + width]


@source("geotiff", extra="remote-sensing", options=("label", "bands", "values", "tile", "overlap"))
def open_geotiff(spec: DataSpec) -> Splits:
    """Open ``geotiff:PATTERN``: a file, a folder (at any depth) or a glob of rasters with the same
    bands.

    ``bands=B04,B03,B02`` selects bands by name or by number, from 1; files may have them in another
    order. Scale and offset of the files' tags are applied, palettes become colours, and an alpha
    band marks missing pixels; ``values=stored`` keeps the numbers and bands in the files.

    ``tile=256`` cuts every raster into square tiles of 256 pixels, without overlap; the remainder
    at the right and lower border is dropped. With ``overlap=32``, neighbours overlap by 32 pixels
    and cover the whole raster, as prediction needs: the last tiles end at its border, and a raster
    smaller than a tile is one tile. Without ``tile=``, a raster with more pixels than
    VIM_SSL_MAX_PIXELS is skipped. Of a file with several pages, the first is read; the others are
    counted in ``passed_over``. Missing values become NaN; see `read_bands`. The group is the
    file. The ids are the paths, with the tile's row and column. ``label=folder`` makes the
    outermost folder the class. Folders are splits if all are named train, val or test.

    If the folder contains ``images/`` and ``masks/`` (or ``labels/``) with rasters of the same
    names, each image has a mask: the class numbers in the first band; 255 and no-data mean
    unlabelled. ``classes.txt`` names the classes as for ``masks:``; ``label=none`` ignores the
    masks. A raster whose mask has another size or position is skipped. ``faults`` names the skipped
    files, and in what the rasters of all splits differ: unit, resolution, coordinate system.

    Raises: ImportError without rasterio; FileNotFoundError; ValueError for a band or tile that
        the files do not have, and for files whose bands or unit differ from the first file's.
    """
    source = f"geotiff:{spec.location}"
    import_rasterio()
    check_option(spec, "label", ("folder", "none"))
    check_option(spec, "values", ("stored",))
    if spec.overlap and spec.overlap >= (spec.tile or 0):
        raise ValueError(
            f"{source}: overlap={spec.overlap} needs tile= with a larger number, such as "
            f"tile={8 * spec.overlap}; got tile={spec.tile}."
        )
    root, names, masks_root, mask_of = match_masks(spec, "raster", TIFFS)
    stored = spec.values == "stored"
    rasters, faults = _read_headers(root, names, masks_root, mask_of, spec.tile, stored)
    numbers, bands = match_bands(rasters, spec.bands, source) if rasters else ({}, [])
    faults += [*describe_mixture(rasters), *_unlike_images(rasters, bands, spec.bands)]
    classes: list[str] | None = None
    if masks_root and rasters:
        used = [mask_of[name] for name in rasters]
        top = Path(spec.location).expanduser()
        classes, wrong = named_classes(top, masks_root, used, _numbers)
        faults += [*wrong, *_lost_classes(masks_root, used, classes)]

    def choose(spec: DataSpec) -> ImageData:
        layout = read_layout(names, spec.split, spec.label or "none", str(root))
        chosen = {name: rasters[name] for name in layout.names if name in rasters}
        tiles: list[Tile] = []
        ids: list[str] = []
        groups: list[str] = []
        small: list[str] = []
        for name, raster in chosen.items():
            boxes = _boxes(raster.width, raster.height, spec.tile, spec.overlap)
            if not boxes:
                small.append(f"{name} ({raster.width}x{raster.height}) is smaller than a tile")
            of_raster = tuple((name, number) for number in numbers[name])
            tiles += [
                Tile(of_raster, box, core, alpha=raster.alpha, stored=stored)
                for _, box, core in boxes
            ]
            ids += [name + suffix for suffix, *_ in boxes]
            groups += [name] * len(boxes)
        if not tiles:
            fault = [*small, *faults][0]
            raise ValueError(
                f"{source}: none of {len(layout.names)} files has a usable image: {fault}."
            )
        masks = None
        if classes is not None and masks_root:
            masks = RasterMasks(str(masks_root), tiles, mask_of, len(classes))
        label_of = layout.label_of
        return ImageData(
            RasterImages(str(root), tiles), ids, name=str(spec), masks=masks,
            dtype=_common_dtype(list(chosen.values()), len(bands)),
            labels=[label_of[name] for name in groups] if label_of else None,
            classes=layout.classes if classes is None else classes, groups=groups, bands=bands,
            splits=layout.splits, split=layout.split, faults=[*faults, *small],
        )  # fmt: skip

    return Splits(split_folders(names), choose)


def _read_headers(
    root: Path,
    names: Sequence[str],
    masks_root: Path | None,
    mask_of: Mapping[str, str],
    tile: int | None,
    stored: bool,
) -> tuple[dict[str, Raster], list[str]]:
    """Read the headers of all splits, so that these are compared too. Return those of the usable
    rasters, and the faults of the others."""
    rasters: dict[str, Raster] = {}
    faults: list[str] = []
    for name in names:
        try:
            with opened(root / name) as file:
                if masks_root:
                    check_same_grid(file, masks_root / mask_of[name])
                raster = read_header(file, stored=stored)
                pages = len(file.subdatasets)  # of one page, none is listed
        except Exception as error:  # readers raise errors of nearly any type
            kind = "" if isinstance(error, BadImage) else f"{type(error).__name__}: "
            faults.append(f"{name} cannot be read ({kind}{error})")
            continue
        if fault := raster.fault(tile):
            faults.append(f"{name} {fault}")
            continue
        rasters[name] = raster
        pass_over("further pages of rasters", pages - 1 if pages else 0, [name])
    return rasters, faults


def _unlike_images(
    rasters: Mapping[str, Raster], bands: Sequence[str], requested: str | None
) -> list[str]:
    """Describe colours that ``bands=`` puts into another order than that of 8-bit images."""
    colours = [colour_of(band) for band in bands]
    first = next(iter(rasters.values()), None)
    if not requested or not first or first.dtype != np.uint8 or sorted(colours) != sorted(COLOURS):
        return []
    if colours == list(COLOURS):
        return []
    return [
        f"bands={requested} gives {', '.join(bands)}, but 8-bit images with three bands are taken "
        "for red, green and blue in this order"
    ]


def _common_dtype(rasters: list[Raster], bands: int) -> np.dtype | None:
    """Return the dtype of all images; None if it is unknown before reading them.

    8-bit grey and colour tiles become images, but arrays if they have no-data values.
    """
    dtype = rasters[0].dtype
    plain = dtype == np.uint8 and bands in (1, 3)
    return None if plain and any(raster.has_no_data for raster in rasters) else dtype


def _boxes(
    width: int, height: int, tile: int | None, overlap: int | None
) -> list[tuple[str, Box | None, Box | None]]:
    """Return (id suffix, box, core) of every tile."""
    if tile is None:
        return [("", None, None)]
    return [
        (f"/{row:03d}-{column:03d}", _box(across[0], down[0]), _box(across[1], down[1]))
        for row, down in enumerate(_spans(height, tile, overlap))
        for column, across in enumerate(_spans(width, tile, overlap))
    ]


def _spans(side: int, tile: int, overlap: int | None) -> list[tuple[range, range]]:
    """Return (pixels, core) of every tile along one side. Cores do not overlap: each ends in the
    middle of the overlap with the next tile."""
    if not overlap:
        return [(range(i, i + tile),) * 2 for i in range(0, side - tile + 1, tile)]
    spans = [range(i, min(i + tile, side)) for i in starts(side, tile, tile - overlap)]
    cuts = [0, *((a.stop + b.start) // 2 for a, b in pairwise(spans)), side]
    return [(span, range(*ends)) for span, ends in zip(spans, pairwise(cuts), strict=True)]


def _box(across: range, down: range) -> Box:
    return across.start, down.start, len(across), len(down)
