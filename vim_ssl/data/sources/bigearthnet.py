"""``bigearthnet:``: BigEarthNet in its published layouts, versions 1 and 2."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from vim_ssl.data.dataset import ImageData
from vim_ssl.data.rasters import choose_bands, import_rasterio
from vim_ssl.data.registry import Splits, source
from vim_ssl.data.sources.folder import split_views
from vim_ssl.data.sources.geotiff import RasterImages, Tile
from vim_ssl.data.spec import SPLIT_NAMES, DataSpec
from vim_ssl.data.walk import walk

BIGEARTHNET_BANDS = (
    "B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B11", "B12",
)  # fmt: skip
BIGEARTHNET_SIDE = 120  # pixels, 10 m each
# The 19 classes, each with the classes it includes of version 1's 43; the others are dropped.
BIGEARTHNET_CLASSES: dict[str, tuple[str, ...]] = {
    "Urban fabric": ("Continuous urban fabric", "Discontinuous urban fabric"),
    "Industrial or commercial units": ("Industrial or commercial units",),
    "Arable land": ("Non-irrigated arable land", "Permanently irrigated land", "Rice fields"),
    "Permanent crops": (
        "Vineyards", "Fruit trees and berry plantations", "Olive groves",
        "Annual crops associated with permanent crops",
    ),
    "Pastures": ("Pastures",),
    "Complex cultivation patterns": ("Complex cultivation patterns",),
    "Land principally occupied by agriculture, with significant areas of natural vegetation": (
        "Land principally occupied by agriculture, with significant areas of natural vegetation",
    ),
    "Agro-forestry areas": ("Agro-forestry areas",),
    "Broad-leaved forest": ("Broad-leaved forest",),
    "Coniferous forest": ("Coniferous forest",),
    "Mixed forest": ("Mixed forest",),
    "Natural grassland and sparsely vegetated areas": (
        "Natural grassland", "Sparsely vegetated areas",
    ),
    "Moors, heathland and sclerophyllous vegetation": (
        "Moors and heathland", "Sclerophyllous vegetation",
    ),
    "Transitional woodland, shrub": ("Transitional woodland/shrub",),
    "Beaches, dunes, sands": ("Beaches, dunes, sands",),
    "Inland wetlands": ("Inland marshes", "Peatbogs"),
    "Coastal wetlands": ("Salt marshes", "Salines"),
    "Inland waters": ("Water courses", "Water bodies"),
    "Marine waters": ("Coastal lagoons", "Estuaries", "Sea and ocean"),
}  # fmt: skip


@source("bigearthnet", extra="remote-sensing", options=("label", "bands"))
def open_bigearthnet(spec: DataSpec) -> Splits:
    """Open ``bigearthnet:root``: Sentinel-2 patches of 120 px (10 m), with labels as rows of 0 and
    1 over 19 classes.

    - Version 2: ``metadata.parquet`` with patch_id, labels and split, beside a folder
      ``BigEarthNet-S2`` with one folder per patch (or with tile folders that contain these).
    - Version 1: one folder per patch with ``…_labels_metadata.json``; its 43 classes become the 19.
      It has no splits; the group is the Sentinel-2 tile.

    ``bands=B04,B03,B02`` selects some of the 12 bands; those of 20 and 60 m are resampled to 10 m.
    The ids are the names of the patches.

    Raises: ImportError without rasterio; FileNotFoundError; ValueError for an unknown class.
    """
    import_rasterio()
    root = Path(spec.location).expanduser()
    source = f"bigearthnet:{spec.location}"
    if not root.is_dir():
        raise FileNotFoundError(f"{source}: the folder does not exist.")
    numbers = choose_bands(spec.bands, BIGEARTHNET_BANDS, source)
    bands = [BIGEARTHNET_BANDS[number - 1] for number in numbers]
    table = root / "metadata.parquet"
    known, split_of = _metadata(table, source) if table.is_file() else ({}, {})
    folders = _patches(root / "BigEarthNet-S2" if (root / "BigEarthNet-S2").is_dir() else root)
    if not table.is_file():
        for name, folder in folders.items():
            file = folder / f"{name}_labels_metadata.json"
            if file.is_file():
                known[name] = json.loads(file.read_text(encoding="utf-8"))["labels"]
    names = [name for name in sorted(folders) if name in known]
    if not names:
        raise FileNotFoundError(
            f"{source}: {len(folders)} patch folders and {len(known)} labelled patches have no "
            "patch in common; expected metadata.parquet and BigEarthNet-S2/, or patch folders that "
            "each contain a …_labels_metadata.json."
        )
    faults = []
    if absent := len(known) - len(names):
        faults.append(f"{absent:,} of {len(known):,} labelled patches have no folder")
    tiles = []
    for name in names:
        below = folders[name].relative_to(root).as_posix()
        files = tuple((f"{below}/{name}_{band}.tif", 1) for band in bands)
        tiles.append(Tile(files, side=BIGEARTHNET_SIDE))
    labelled = spec.label != "none"
    splits = [split for split in SPLIT_NAMES if split in split_of.values()]
    data = ImageData(
        RasterImages(str(root), tiles), names, name=str(spec),
        labels=[_row(known[name], f"{source}: {name}") for name in names] if labelled else None,
        classes=list(BIGEARTHNET_CLASSES) if labelled else None, bands=bands, dtype="uint16",
        groups=None if splits else [re.sub(r"_\d+_\d+$", "", name) for name in names],
        splits=splits, faults=faults,
    )  # fmt: skip
    return split_views(data, [split_of.get(name, "") for name in names])


def _metadata(table: Path, source: str) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Return the labels and the split of every patch of version 2."""
    from pyarrow import parquet

    needed = ["patch_id", "labels", "split"]
    columns = parquet.read_schema(table).names
    if missing := [name for name in needed if name not in columns]:
        raise ValueError(
            f"{source}: {table.name} has no column {', '.join(missing)}; it has "
            f"{', '.join(columns)}."
        )
    rows = parquet.read_table(table, columns=needed).to_pydict()
    return (
        dict(zip(rows["patch_id"], rows["labels"], strict=True)),
        dict(zip(rows["patch_id"], rows["split"], strict=True)),
    )


def _patches(top: Path) -> dict[str, Path]:
    """Map the patches to their folders, which are in ``top`` or in its tile folders."""
    patches = {}
    for prefix, below, files in walk(top):
        folder = top / prefix
        if any(file.startswith(folder.name) and file.endswith(".tif") for file in files):
            patches[folder.name] = folder
            below.clear()
    return patches


def _row(labels: Sequence[str], where: str) -> list[int]:
    """Convert class names of either version to a row of 0 and 1 over the 19 classes."""
    row = [0] * len(BIGEARTHNET_CLASSES)
    for label in labels:
        if label in _NUMBER_OF:
            row[_NUMBER_OF[label]] = 1
        elif label not in _LEFT_OUT:
            raise ValueError(f"{where}: {label!r} is not a class of BigEarthNet.")
    return row


_NUMBER_OF = {
    name: number
    for number, (new, old) in enumerate(BIGEARTHNET_CLASSES.items())
    for name in (new, *old)
}


_LEFT_OUT = frozenset({
    "Road and rail networks and associated land", "Port areas", "Airports",
    "Mineral extraction sites", "Dump sites", "Construction sites", "Green urban areas",
    "Sport and leisure facilities", "Bare rock", "Burnt areas", "Intertidal flats",
})  # fmt: skip
