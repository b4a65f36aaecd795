"""Open new images for a trained model: any data spec, a path without one, or an image in memory."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vim_ssl.data.dataset import ImageData
from vim_ssl.data.images import EXTENSIONS, array_image
from vim_ssl.data.loading.streamed import ImageStream
from vim_ssl.data.open import finished, open_data
from vim_ssl.data.sources.folder import FileImages
from vim_ssl.data.sources.geotiff import TIFFS
from vim_ssl.data.sources.video import VIDEO_EXTENSIONS
from vim_ssl.data.sources.webdataset import TARS
from vim_ssl.data.spec import DataSpec, parse_spec, sets_of
from vim_ssl.data.tables import TABLES
from vim_ssl.data.walk import walk_files

# Endings of files → the scheme that reads them.
SCHEMES: dict[str | tuple[str, ...], str] = {
    TABLES: "csv", ".parquet": "parquet", TARS: "wds", (".nii", ".nii.gz"): "nifti",
    ".dcm": "dicom", VIDEO_EXTENSIONS: "video", (".svs", ".ndpi"): "slide",
}  # fmt: skip
TILE = 2048  # side in pixels of the tiles of large rasters
# Options that determine how files become images, by the schemes that have them. A model needs the
# values that it was trained with.
READING = {
    "video": ("frames", "fps", "clips"), "slide": ("tile", "mpp", "shrink", "tissue"),
    "geotiff": ("bands", "values"), "nifti": ("axis", "window", "channel"), "dicom": ("window",),
}  # fmt: skip


def open_new(
    spec: str | Path, trained_on: str = "", *, tiles: bool = False, overlap: int = 0
) -> ImageData | ImageStream:
    """Open all images that a spec names, without masks and boxes; labels are not needed.

    Differences from `open_data`: all splits are opened unless the spec names one, a single file is
    accepted, and a model's training data determine what the spec leaves open. A path without a
    scheme is read by their scheme if they are videos or slides, or volumes, DICOM or rasters and
    the path has no other images; options such as ``bands``, ``window`` and ``frames`` default to
    theirs.

    Args:
        trained_on: the spec of the model's training data, if known.
        tiles: also cut rasters into tiles of the size that the model was trained on.
        overlap: cut rasters into tiles that cover them and overlap by this many pixels, so that
            their size is not limited; 0: whole rasters. A spec's ``tile`` and ``overlap`` win.
    Raises: see `open_data`.
    """
    if isinstance(spec, str) and len(sets_of(spec)) > 1:
        return open_data(spec, split="all")
    parsed = parse_spec(spec)
    trained = sets_of(trained_on)[0][1] if trained_on else DataSpec("folder", "")
    path = Path(parsed.location).expanduser()
    if parsed.scheme == "folder":
        parsed = replace(parsed, scheme=_scheme(path, trained.scheme))
    if parsed.scheme == trained.scheme:
        options = READING.get(parsed.scheme, ())
        options += ("tile",) if tiles and parsed.scheme == "geotiff" else ()
        missing = [name for name in options if getattr(parsed, name) is None]
        parsed = replace(parsed, **{name: getattr(trained, name) for name in missing})
    if parsed.scheme == "geotiff" and overlap and not parsed.overlap:
        tile = parsed.tile or max(TILE, 4 * overlap)
        parsed = replace(parsed, tile=tile, overlap=max(min(overlap, tile // 2), 1))
    if parsed.scheme == "folder" and path.is_file():
        files = FileImages(str(path.parent), [path.name])
        return finished(ImageData(files, [path.name], name=str(parsed)), parsed)
    data = open_data(str(parsed), split=parsed.split or "all", streams=True)
    return data.images_only() if isinstance(data, ImageData) else data


def read_input(x: Any, trained_on: str = "") -> Any:
    """Return an image as an item of `ImageData` has it.

    Args:
        x: a PIL image; an array (h, w) or (h, w, bands); or the path of one image, in any format
            that `open_new` reads.
        trained_on: see `open_new`.
    Raises: BadImage for a broken file or array; FileNotFoundError; ValueError for a path that has
        several images; TypeError for anything else.
    """
    if isinstance(x, Image.Image):
        return x
    if isinstance(x, np.ndarray):
        return array_image(x)
    if not isinstance(x, str | Path):
        raise TypeError(
            f"expected a PIL image, an array (h, w) or (h, w, bands), or a path, got "
            f"{type(x).__name__}; a tensor is converted with x.permute(1, 2, 0).numpy()."
        )
    if not Path(x).expanduser().exists():
        raise FileNotFoundError(f"There is no file {str(x)!r} (in {Path.cwd()}).")
    data = open_new(x, trained_on)
    if data.is_stream or len(data) != 1:
        raise ValueError(
            f"{x} contains {len(data):,} images; give a list of images, or predict them all with "
            f"vim-ssl predict --data {x}."
        )
    return data[0]["image"]


def _scheme(path: Path, trained: str) -> str:
    """Return the scheme for a path without one; ``trained`` is that of the training data."""
    if trained in ("video", "slide"):
        return trained
    if path.is_file():
        for endings, scheme in SCHEMES.items():
            if path.name.lower().endswith(endings):
                return scheme
    if trained in READING and path.exists() and not _has_plain_images(path):
        return trained
    return "folder"


def _has_plain_images(path: Path) -> bool:
    plain = tuple(ending for ending in EXTENSIONS if ending not in TIFFS)
    return bool(walk_files(path, plain)[0]) if path.is_dir() else path.name.lower().endswith(plain)
