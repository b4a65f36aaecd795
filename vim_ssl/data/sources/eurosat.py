"""`eurosat:`: EuroSAT's official folders, RGB or 13 bands."""

import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vim_ssl.data.dataset import ImageData
from vim_ssl.data.images import EXTENSIONS
from vim_ssl.data.registry import source
from vim_ssl.data.sources.folder import FileImages
from vim_ssl.data.sources.geotiff import (
    TIFFS,
    RasterImages,
    Tile,
    choose_bands,
    import_rasterio,
    take_split,
)
from vim_ssl.data.spec import DataSpec

# EuroSAT's files have the narrow infrared band last.
EUROSAT_BANDS = (
    "B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B09", "B10", "B11", "B12", "B8A",
)  # fmt: skip
EUROSAT_CLASSES = (
    "AnnualCrop", "Forest", "HerbaceousVegetation", "Highway", "Industrial", "Pasture",
    "PermanentCrop", "Residential", "River", "SeaLake",
)  # fmt: skip
# Where the archives put the class folders.
EUROSAT_FOLDERS = (
    "", "EuroSAT_RGB", "2750", "EuroSAT", "EuroSAT_MS", "EuroSATallBands",
    "ds/images/remote_sensing/otherDatasets/sentinel_2/tif",
)  # fmt: skip


@source("eurosat", extra="remote-sensing", options=("label", "bands"))
def open_eurosat(spec: DataSpec) -> ImageData:
    """Open ``eurosat:root``: the ten class folders, in root or where the archives put them, of the
    RGB images (.jpg) or of the 13-band rasters (.tif, 64 px, uint16).

    Where root has both, ``bands=`` (all, or B04,B03,B02 …) takes the rasters. Lists of a split are
    used where they lie in root or beside the folders: ``eurosat-train.txt`` with -val and -test,
    or ``train.csv``, ``validation.csv`` and ``test.csv``; EuroSAT itself has none. The ids are
    ``class/file``.

    Raises: FileNotFoundError and ValueError with all that is missing.
    """
    root = Path(spec.location).expanduser()
    source = f"eurosat:{spec.location}"
    if not root.is_dir():
        raise FileNotFoundError(f"{source}: there is no such folder.")
    names: list[str] = []
    for place in EUROSAT_FOLDERS:
        folder = root / place
        names = [
            f"{kind}/{file}"
            for kind in EUROSAT_CLASSES
            if (folder / kind).is_dir()
            for file in sorted(os.listdir(folder / kind))
            if file.lower().endswith(TIFFS if spec.bands else EXTENSIONS)
        ]
        if names:
            break
    if not names:
        raise FileNotFoundError(
            f"{source} has no class folder ({', '.join(EUROSAT_CLASSES[:3])} …) with "
            f"{'.tif files' if spec.bands else 'images'}, neither itself nor in "
            f"{', '.join(EUROSAT_FOLDERS[1:])}."
        )
    present = {name.split("/")[0] for name in names}
    if missing := [kind for kind in EUROSAT_CLASSES if kind not in present]:
        raise ValueError(f"{source}: {folder} has no images of {', '.join(missing)}.")
    endings = {Path(name).suffix.lower() for name in names}
    rasters = endings <= set(TIFFS)
    if not rasters and endings & set(TIFFS):
        raise ValueError(f"{source}: {folder} mixes images and rasters ({', '.join(endings)}).")

    images: Any = FileImages(str(folder), names)
    bands: Sequence[str] = ("R", "G", "B")
    if rasters:
        import_rasterio()
        numbers = choose_bands(None if spec.bands == "all" else spec.bands, EUROSAT_BANDS, source)
        bands = [EUROSAT_BANDS[number - 1] for number in numbers]
        tiles = [Tile(tuple((name, number) for number in numbers)) for name in names]
        images = RasterImages(str(folder), tiles)
    labelled = spec.label != "none"
    part_of = _eurosat_splits((root, folder, folder.parent))
    data = ImageData(
        images, names, name=str(spec),
        labels=[EUROSAT_CLASSES.index(name.split("/")[0]) for name in names] if labelled else None,
        classes=EUROSAT_CLASSES if labelled else None, bands=bands,
        splits=list(dict.fromkeys(part_of.values())),
    )  # fmt: skip
    return take_split(data, spec, [part_of.get(Path(name).stem, "") for name in names])


def _eurosat_splits(folders: Sequence[Path]) -> dict[str, str]:
    """An image's name without its ending → its split, by the first complete lists found."""
    for folder in folders:
        for pattern, parts in (("eurosat-{}.txt", ("train", "val", "test")),
                               ("{}.csv", ("train", "validation", "test"))):  # fmt: skip
            files = {part: folder / pattern.format(part) for part in parts}
            if not all(file.is_file() for file in files.values()):
                continue
            part_of: dict[str, str] = {}
            for part, file in files.items():
                with open(file, encoding="utf-8", newline="") as lines:
                    if file.suffix == ".txt":
                        listed = [line.strip() for line in lines]
                    else:
                        listed = [row["Filename"] for row in csv.DictReader(lines)]
                part_of |= {Path(name).stem: part for name in listed if name}
            return part_of
    return {}
