"""Remote sensing: ``geotiff:``, ``eurosat:``, ``bigearthnet:``, with named bands, by rasterio."""

import glob
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vim_ssl.data.dataset import ImageData
from vim_ssl.data.images import BadImage, most_pixels
from vim_ssl.data.labels import IGNORE, checked, mask_folders, named_classes, paired
from vim_ssl.data.registry import Splits, source
from vim_ssl.data.sources.folder import OnDisk, by_split, read_layout
from vim_ssl.data.spec import DataSpec, near, pick_split

TIFFS = (".tif", ".tiff")
BLOCK = 128  # pixels; side of the blocks of what is written


@dataclass(frozen=True)
class Tile:
    """A window of rasters of one place: ``bands`` are (file below the root, number in it from 1),
    ``box`` is (left, top, width, height) in pixels, None for the whole; ``side`` resamples."""

    bands: tuple[tuple[str, int], ...]
    box: tuple[int, int, int, int] | None = None
    side: int | None = None


class RasterImages(OnDisk):
    """Tiles as arrays (h, w, bands) in the file's type. One with values that are no data is float32
    with NaN there, and what was uint8 from 0 to 1, as it is read everywhere."""

    def __init__(self, root: str, tiles: Sequence[Tile]):
        self.root, self.tiles = root, tiles

    def __len__(self) -> int:
        return len(self.tiles)

    def paths(self, row: int) -> list[str]:
        names = dict.fromkeys(name for name, _ in self.tiles[row].bands)
        return [os.path.join(self.root, name) for name in names]

    def __getitem__(self, row: int) -> np.ndarray:
        tile = self.tiles[row]
        by_file: dict[str, list[int]] = {}
        for name, number in tile.bands:
            by_file.setdefault(name, []).append(number)
        try:
            read = {name: self._read(name, numbers, tile) for name, numbers in by_file.items()}
        except Exception as error:  # a broken file makes readers raise nearly anything
            raise BadImage(tile.bands[0][0], f"{type(error).__name__}: {error}") from error
        bands = [read[name][by_file[name].index(number)] for name, number in tile.bands]
        stack: np.ma.MaskedArray = np.ma.stack(bands, axis=-1)
        if not np.ma.is_masked(stack):
            return stack.data
        values = stack.data.astype(np.float32) / (255 if stack.dtype == np.uint8 else 1)
        values[np.ma.getmaskarray(stack)] = np.nan
        return values

    def _read(self, name: str, numbers: list[int], tile: Tile) -> np.ma.MaskedArray:
        import_rasterio()
        from rasterio.enums import Resampling
        from rasterio.windows import Window

        with _opened(os.path.join(self.root, name)) as file:
            return file.read(
                numbers,
                window=Window(*tile.box) if tile.box else None,
                out_shape=(len(numbers), tile.side, tile.side) if tile.side else None,
                resampling=Resampling.bilinear,
                masked=True,
            )


class RasterMasks(OnDisk):
    """The masks of such tiles, each of one file."""

    def __init__(
        self, root: str, images: str, tiles: Sequence[Tile], mask_of: dict[str, str], classes: int
    ):
        self.root, self.images, self.tiles, self.mask_of = root, images, tiles, mask_of
        self.classes = classes

    def paths(self, row: int) -> list[str]:
        return [os.path.join(self.root, self._name(row))]

    def read(self, row: int, size: tuple[int, int]) -> np.ndarray:
        """As `vim_ssl.data.sources.masks.MaskFiles.read`."""
        import_rasterio()
        from rasterio.windows import Window

        name, box = self._name(row), self.tiles[row].box
        with _mask(os.path.join(self.root, name)) as file:
            values = _class_numbers(file, Window(*box) if box else None)
        return checked(values, size, name, self.classes).astype(np.uint8)

    def place(self, row: int) -> dict[str, Any]:
        """``raster`` (its path), ``name`` (below the root) and ``box``: see `write_labels`."""
        name = self.tiles[row].bands[0][0]
        path = os.path.join(self.images, name)
        return {"raster": path, "name": name, "box": self.tiles[row].box}

    def _name(self, row: int) -> str:
        return self.mask_of[self.tiles[row].bands[0][0]]


@contextmanager
def _mask(path: str | Path) -> Iterator[Any]:
    """An open mask. Raises: BadImage, also for what is read from it in vain."""
    try:
        with _opened(path) as file:
            yield file
    except BadImage:
        raise
    except Exception as error:  # a broken file makes readers raise nearly anything
        raise BadImage(os.path.basename(path), f"the mask cannot be read: {error}") from error


def _class_numbers(file: Any, window: Any = None) -> np.ndarray:
    """The first band of an open mask as uint32 (h, w), `IGNORE` where it has no data. Raises:
    BadImage."""
    found = file.read(1, window=window, masked=True)
    values = np.where(np.ma.getmaskarray(found), IGNORE, found.data)
    good = (values >= 0) & (values < 2**32) & (values == np.floor(values))  # NaN is not
    if not good.all():
        name = os.path.basename(file.name)
        raise BadImage(name, f"the mask holds {values[~good][0]:g}, which is no class number")
    return values.astype(np.uint32)


def _numbers(path: Path) -> np.ndarray:
    """Those that a mask holds, block by block: a whole scene may not fit into memory."""
    used: set[int] = set()
    with _mask(path) as file:
        for _, window in file.block_windows(1):
            used.update(np.unique(_class_numbers(file, window)).tolist())
    return np.array(sorted(used))


def _check_same_place(file: Any, path: Path) -> None:
    """Raises: BadImage for a mask of another size or place than the open raster."""
    with _opened(path) as mask:
        if (mask.width, mask.height) != (file.width, file.height):
            raise BadImage(
                path.name,
                f"the mask has {mask.width}×{mask.height} pixels, its raster "
                f"{file.width}×{file.height}",
            )
        at = file.transform
        pixel = max(map(abs, (at.a, at.b, at.d, at.e)))
        apart = np.abs(np.subtract(mask.transform, file.transform)).max()
        if mask.crs and file.crs and (mask.crs != file.crs or apart > 0.05 * pixel):
            raise BadImage(path.name, "the mask lies elsewhere than its raster")


def write_labels(
    path: Path, like: str, box: tuple[int, int, int, int] | None, labels: np.ndarray
) -> None:
    """Write class numbers, uint8 (h, w), as a GeoTIFF that lies where the raster ``like`` does.

    Args:
        box: of ``like`` that they are of (left, top, width, height), None for all. Boxes of one
            raster come into one file, one after another; what none has written is no data, 255.
    """
    rasterio = import_rasterio()
    from rasterio.windows import Window

    with _opened(like) as file:
        profile = {"width": file.width, "height": file.height, "crs": file.crs,
                   "transform": file.transform, "driver": "GTiff", "count": 1, "dtype": "uint8",
                   "nodata": IGNORE, "compress": "deflate", "BIGTIFF": "IF_SAFER",
                   # A box then writes few blocks anew; of strips it would be all that it crosses.
                   "tiled": True, "blockxsize": BLOCK, "blockysize": BLOCK}  # fmt: skip
    new = True
    if box and path.exists():
        with _opened(path) as written:
            new = (written.width, written.height) != (profile["width"], profile["height"])
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        with rasterio.open(path, "w", **profile) if new else rasterio.open(path, "r+") as file:
            file.write(labels, 1, window=Window(*box) if box else None)


@source("geotiff", extra="remote-sensing", options=("label", "bands", "tile"))
def open_geotiff(spec: DataSpec) -> Splits:
    """Open ``geotiff:PATTERN``: a file, a folder (at any depth) or a glob, of rasters that have
    the same bands.

    ``bands=B04,B03,B02`` chooses bands by the files' own names or by number, from 1. ``tile=256``
    cuts every raster into squares of so many pixels, without overlap; what is left at the right
    and lower border is left out. Without it a raster of more pixels than VIM_SSL_MAX_PIXELS is
    left out and named in ``faults``. Values that the file marks as no data are NaN. The group is
    the file. The ids are the paths, with the tile's row and column. ``label=folder`` takes the
    outermost folder as the class; folders named train, val and test, and no others, are splits.

    Where the folder holds ``images/`` and ``masks/`` (or ``labels/``) with rasters of the same
    names, each image has a mask, of the first band's class numbers; 255, and what the file marks
    as no data, is none. ``classes.txt`` names them as for ``masks:``; ``label=none`` leaves them
    out. A raster whose mask has another size or place is left out and named in ``faults``.

    Raises: ImportError without rasterio; FileNotFoundError; ValueError for a band or tile that
        the files do not have, and for files of other bands or another unit than the first.
    """
    source = f"geotiff:{spec.location}"
    import_rasterio()
    if spec.label not in (None, "none", "folder"):
        raise ValueError(f"{source}: label={spec.label} is nothing it has; it takes label=folder.")
    folders = mask_folders(spec.location) if spec.label != "folder" else None
    root, names = _find(str(folders[0]) if folders else spec.location)
    mask_of: dict[str, str] = {}
    if folders and spec.label is None:
        mask_names = _find(str(folders[1]))[1]
        mask_of = dict(zip(names, paired(names, mask_names, *folders), strict=True))
    splits = [split for split in by_split(names) if split]
    return Splits(splits, lambda spec: _rasters_of(spec, root, names, folders, mask_of))


def _rasters_of(
    spec: DataSpec,
    root: Path,
    names: list[str],
    folders: tuple[Path, Path] | None,
    mask_of: dict[str, str],
) -> ImageData:
    """The rasters of a split, with the masks that `open_geotiff` has paired with them."""
    source = f"geotiff:{spec.location}"
    rasterio = import_rasterio()
    from rasterio.enums import MaskFlags

    found = read_layout(names, spec.split, spec.label or "none", str(root))
    class_of = dict(zip(found.names, found.labels or (), strict=False))
    numbers: list[int] = []
    own: list[str] = []
    first_kind: np.dtype = np.dtype(np.uint8)
    tiles: list[Tile] = []
    ids: list[str] = []
    groups: list[str] = []
    faults: list[str] = []
    whole = True  # no raster marks values as no data
    for name in found.names:
        try:
            with _opened(root / name) as file:
                names_here = [text or f"band{i}" for i, text in enumerate(file.descriptions, 1)]
                width, height = file.width, file.height
                kind = np.result_type(*file.dtypes)
                whole &= all(MaskFlags.all_valid in flags for flags in file.mask_flag_enums)
                if folders and mask_of:
                    _check_same_place(file, folders[1] / mask_of[name])
        except (rasterio.errors.RasterioError, BadImage) as error:
            faults.append(f"{name} cannot be read ({error})")
            continue
        if kind.kind == "c":
            faults.append(f"{name} has complex values, which are no image")
            continue
        if not spec.tile and width * height > most_pixels():  # it would be read whole
            faults.append(
                f"{name} has {width}x{height} pixels, the limit is {most_pixels():,}; cut it by "
                "tile=, or set VIM_SSL_MAX_PIXELS"
            )
            continue
        if not own:
            own, numbers = names_here, choose_bands(spec.bands, names_here, source)
            first_kind = kind
        elif np.uint8 in (kind, first_kind) and kind != first_kind:
            raise ValueError(
                f"{source}: {name} is {kind}, others are {first_kind}; uint8 is read as 0 to 1, "
                "all else in its own unit. Name files of one kind by the pattern."
            )
        elif names_here != own:
            raise ValueError(
                f"{source}: {name} has the bands {', '.join(names_here)}, others have "
                f"{', '.join(own)}; name files of one kind by the pattern."
            )
        bands = tuple((name, number) for number in numbers)
        if spec.tile and spec.tile > min(width, height):
            faults.append(f"{name} ({width}x{height}) is smaller than a tile")
        for suffix, box in _boxes(width, height, spec.tile):
            tiles.append(Tile(bands, box))
            ids.append(name + suffix)
            groups.append(name)
    if not tiles:
        raise ValueError(f"{source}: of {len(found.names)} files none gives an image: {faults[0]}.")
    classes, masks = found.classes, None
    if folders and mask_of:
        used = [mask_of[name] for name in dict.fromkeys(groups)]
        top = Path(spec.location).expanduser()
        classes = named_classes(top, folders[1], used, _numbers)
        masks = RasterMasks(str(folders[1]), str(root), tiles, mask_of, len(classes))
    return ImageData(
        RasterImages(str(root), tiles), ids, name=str(spec), masks=masks,
        labels=[class_of[name] for name in groups] if class_of else None, classes=classes,
        groups=groups, bands=[own[number - 1] for number in numbers], splits=found.splits,
        split=found.split, faults=faults,
        # A tile of 8-bit grey or colour is an array only if values of it are no data.
        dtype=first_kind if whole or first_kind != np.uint8 or len(numbers) not in (1, 3) else None,
    )  # fmt: skip


def import_rasterio() -> Any:
    """The library. Raises: ImportError that says what to install."""
    try:
        import rasterio
        import rasterio.errors
    except ImportError as error:
        raise ImportError(
            "Rasters (geotiff:, bigearthnet:, 13-band eurosat:) need rasterio: "
            "pip install 'vim-ssl[remote-sensing]'"
        ) from error
    return rasterio


@contextmanager
def _opened(path: str | Path) -> Iterator[Any]:
    """An open raster; one that says of no place where it lies will do."""
    rasterio = import_rasterio()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        warnings.simplefilter("ignore", rasterio.errors.NodataShadowWarning)
        with rasterio.open(path) as file:
            yield file


def _find(location: str) -> tuple[Path, list[str]]:
    """A folder, and the sorted names of the rasters below it."""
    path = Path(location).expanduser()
    if path.is_dir():
        root, found = path, [p for p in path.rglob("*") if p.name.lower().endswith(TIFFS)]
    elif path.is_file():
        root, found = path.parent, [path]
    else:
        found = [Path(name) for name in glob.glob(str(path), recursive=True)]
        root = Path(os.path.commonpath([p.parent for p in found])) if found else path
    names = sorted(p.relative_to(root).as_posix() for p in found if p.is_file())
    if not names:
        raise FileNotFoundError(
            f"geotiff:{location} names no file; give a file, a glob, or a folder of .tif files."
        )
    return root, names


def choose_bands(wanted: str | None, names: Sequence[str], source: str) -> list[int]:
    """The numbers, from 1, of the bands asked for by name or number; all by default."""
    if not wanted:
        return list(range(1, len(names) + 1))
    numbers = []
    lower = [name.lower() for name in names]
    for band in (part.strip() for part in wanted.split(",")):
        if band.lower() in lower:
            numbers.append(lower.index(band.lower()) + 1)
        elif band.isdigit() and 1 <= int(band) <= len(names):
            numbers.append(int(band))
        else:
            raise ValueError(
                f"{source} has no band {band!r}.{near(band, names)} It has {', '.join(names)}."
            )
    return numbers


def _boxes(
    width: int, height: int, tile: int | None
) -> list[tuple[str, tuple[int, int, int, int] | None]]:
    """What is added to a file's id for each of its tiles, and where it lies."""
    if tile is None:
        return [("", None)]
    return [
        (f"/{row:03d}-{column:03d}", (column * tile, row * tile, tile, tile))
        for row in range(height // tile)
        for column in range(width // tile)
    ]


def take_split(data: ImageData, spec: DataSpec, parts: Sequence[str]) -> ImageData:
    split = pick_split(spec.split, data.splits, f"{spec.scheme}:{spec.location}")
    if split != "all":
        data = data.subset(i for i, part in enumerate(parts) if part == split)
    data.split = split
    return data
