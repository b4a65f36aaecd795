"""`eurosat:`: EuroSAT's official folders, RGB or 13 bands."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vim_ssl.data.dataset import ImageData
from vim_ssl.data.images import EXTENSIONS
from vim_ssl.data.rasters import choose_bands, import_rasterio
from vim_ssl.data.registry import Splits, source
from vim_ssl.data.sources.folder import FileImages, split_views
from vim_ssl.data.sources.geotiff import TIFFS, RasterImages, Tile
from vim_ssl.data.spec import DataSpec
from vim_ssl.data.tables import load_table
from vim_ssl.data.walk import walk_files
from vim_ssl.utils.files import read_text

# EuroSAT's files have band 8A (narrow near infrared) last.
EUROSAT_BANDS = (
    "B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B09", "B10", "B11", "B12", "B8A",
)  # fmt: skip
EUROSAT_CLASSES = (
    "AnnualCrop", "Forest", "HerbaceousVegetation", "Highway", "Industrial", "Pasture",
    "PermanentCrop", "Residential", "River", "SeaLake",
)  # fmt: skip
# Folders in which the archives store the class folders.
EUROSAT_FOLDERS = (
    "", "EuroSAT_RGB", "2750", "EuroSAT", "EuroSAT_MS", "EuroSATallBands",
    "ds/images/remote_sensing/otherDatasets/sentinel_2/tif",
)  # fmt: skip


@source("eurosat", extra="remote-sensing", options=("label", "bands"))
def open_eurosat(spec: DataSpec) -> Splits:
    """Open ``eurosat:root``: ten class folders of RGB images (.jpg) or of 13-band rasters (.tif,
    64 px, uint16). They are in root or in a folder of `EUROSAT_FOLDERS`.

    If root has both, ``bands=`` (all, or B04,B03,B02 …) selects the rasters. Split lists are read
    from root, the folder of the class folders, or its parent: ``eurosat-train.txt`` with -val and
    -test, or ``train.csv``, ``validation.csv`` and ``test.csv``; EuroSAT itself has none. The ids
    are ``class/file``.

    Raises: FileNotFoundError and ValueError that list everything missing.
    """
    root = Path(spec.location).expanduser()
    source = f"eurosat:{spec.location}"
    if not root.is_dir():
        raise FileNotFoundError(f"{source}: the folder does not exist.")
    folder, names = _class_files(root, TIFFS if spec.bands else EXTENSIONS, source)
    endings = {Path(name).suffix.lower() for name in names}
    if endings & set(TIFFS) and not endings <= set(TIFFS):
        raise ValueError(f"{source}: {folder} mixes images and rasters ({', '.join(endings)}).")

    images: Any = FileImages(str(folder), names)
    bands: Sequence[str] = ("R", "G", "B")
    dtype = "uint8"
    if endings <= set(TIFFS):
        import_rasterio()
        numbers = choose_bands(None if spec.bands == "all" else spec.bands, EUROSAT_BANDS, source)
        bands = [EUROSAT_BANDS[number - 1] for number in numbers]
        tiles = [Tile(tuple((name, number) for number in numbers)) for name in names]
        images, dtype = RasterImages(str(folder), tiles), "uint16"
    labelled = spec.label != "none"
    split_of = _listed_splits((root, folder, folder.parent))
    data = ImageData(
        images, names, name=str(spec),
        labels=[EUROSAT_CLASSES.index(name.split("/")[0]) for name in names] if labelled else None,
        classes=EUROSAT_CLASSES if labelled else None, bands=bands, dtype=dtype,
        splits=list(dict.fromkeys(split_of.values())),
    )  # fmt: skip
    return split_views(data, [split_of.get(Path(name).stem, "") for name in names])


def _class_files(root: Path, endings: Sequence[str], source: str) -> tuple[Path, list[str]]:
    """Return the folder that contains the class folders, and their files with these endings.

    Raises: FileNotFoundError without any file; ValueError for a class without one.
    """
    for folder in (root / name for name in EUROSAT_FOLDERS):
        names = [
            f"{kind}/{file}"
            for kind in EUROSAT_CLASSES
            if (folder / kind).is_dir()
            for file in walk_files(folder / kind, endings)[0]
        ]
        if names:
            break
    else:
        raise FileNotFoundError(
            f"{source} has no class folder ({', '.join(EUROSAT_CLASSES[:3])} …) with "
            f"{'.tif files' if endings == TIFFS else 'images'}, neither itself nor in "
            f"{', '.join(EUROSAT_FOLDERS[1:])}."
        )
    present = {name.split("/")[0] for name in names}
    if missing := [kind for kind in EUROSAT_CLASSES if kind not in present]:
        raise ValueError(f"{source}: {folder} has no images of {', '.join(missing)}.")
    return folder, names


def _listed_splits(folders: Sequence[Path]) -> dict[str, str]:
    """Map image names without endings to splits, from the first complete set of lists."""
    for folder in folders:
        for pattern, splits in (("eurosat-{}.txt", ("train", "val", "test")),
                                ("{}.csv", ("train", "validation", "test"))):  # fmt: skip
            files = {split: folder / pattern.format(split) for split in splits}
            if all(file.is_file() for file in files.values()):
                return {Path(name).stem: split for split, file in files.items()
                        for name in _listed(file)}  # fmt: skip
    return {}


def _listed(file: Path) -> list[str]:
    if file.suffix == ".csv":
        names: Sequence[str] = load_table(file, str(file)).required(("Filename",), "image")
    else:
        names = [line.strip() for line in read_text(file).splitlines()]
    return [name for name in names if name]
