"""Bands of rasters: statistics, and the matching arguments of an encoder."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image

from vim_ssl.data.config import Configured, colour_of, data_config_of
from vim_ssl.data.dataset import ImageData
from vim_ssl.data.images import BadImage
from vim_ssl.data.open import warn_once
from vim_ssl.data.ranges import fills, undeclared
from vim_ssl.data.transforms.image import as_tensor

FAR = 100  # standard deviations from the mean that no measured value has
UNLIKE = 100  # values of one unit do not differ by this factor from those an encoder has seen
ORDERS = 1000  # images of one data set do not differ by this factor
SEEN = 3  # images that are read to see the unit


def band_statistics(data: ImageData, sample: int = 1000) -> dict[str, Any]:
    """Compute the mean and standard deviation of every band over all finite values.

    Args:
        data: images with the same number of bands; for training, the training split.
        sample: number of images to read, spread evenly.
    Returns: ``bands``, ``mean`` and ``std`` for an encoder's ``data_config``, which is stored with
        the encoder.
    Raises: ValueError if no image can be read, or their numbers of bands differ.
    """
    few = min(sample, len(data))
    sizes: dict[str, float] = {}
    probable: dict[str, tuple[float, ...]] = {}
    count = total = squares = torch.zeros(())
    for i in range(few):
        try:
            image = data[i * len(data) // few]["image"]
        except BadImage:
            continue
        values = np.asarray(image)
        x = as_tensor(values.reshape(*values.shape[:2], -1)).flatten(1).double()
        if count.ndim and len(count) != len(x):
            raise ValueError(
                f"{data.name} has images with {len(count)} and with {len(x)} bands; expected the "
                "same number in all."
            )
        sizes[data.ids[i * len(data) // few]] = float(mean_size(np.atleast_3d(values)).max())
        probable[data.ids[i * len(data) // few]] = fills(values)
        known = x.isfinite()
        x = x.where(known, 0)
        count, total, squares = count + known.sum(1), total + x.sum(1), squares + x.square().sum(1)
    if not count.ndim or (count == 0).any():
        raise ValueError(f"{data.name}: at least one band has no values in the {few} images read.")
    if others := in_other_unit(sizes):
        warn_once(
            f"{data.name}: the values of {len(others):,} of {len(sizes):,} images, for example "
            f"{others[0]}, are over {ORDERS:,} times larger or smaller than most: another unit?"
        )
    if fault := undeclared(probable):
        warn_once(f"{data.name}: {fault}.")
    mean = total / count
    std = (squares / count - mean.square()).clamp(min=0).sqrt()
    names = data.bands or {1: ("L",), 3: ("R", "G", "B")}.get(len(mean))
    return {
        "bands": tuple(names or (f"band{i}" for i in range(len(mean)))),
        "mean": tuple(mean.tolist()),
        "std": tuple(std.clamp(min=1e-6).tolist()),
    }


def band_arguments(data: Any) -> dict[str, Any]:
    """Return the arguments of `load_encoder` for the bands of these images: ``in_chans``, and a
    ``data_config`` with band names and statistics; {} for grey or colour images."""
    if not _has_arrays(data):
        return {}
    return {"in_chans": len(data.bands), "data_config": band_statistics(data)}


def check_bands(encoder: Configured, data: Any) -> None:
    """Check that images of bands have the encoder's bands, in its order and unit.

    Reads up to `SEEN` images unless they have 8 bits. Images in grey or colour fit any encoder with
    as many channels.

    Raises: ValueError for the encoder's bands in another order or another unit, and for other bands
        whose values are not scaled to 0..1.
    """
    config, bands = data_config_of(encoder), getattr(data, "bands", None)
    if bands is None or not _has_arrays(data):
        return
    known = tuple(config.get("bands", ()))
    local, keys = ([colour_of(name) or name.lower() for name in names] for names in (bands, known))
    if sorted(local) == sorted(keys) and local != keys:
        order = ",".join(bands[local.index(key)] for key in keys)
        raise ValueError(
            f"{data.name} has the bands {', '.join(bands)}, the encoder has {', '.join(known)}, "
            f"in another order; open rasters with ?bands={order}."
        )
    if data.dtype == np.uint8:
        return
    few = min(len(data), SEEN)
    read = (_array(data, i * len(data) // few) for i in range(few))
    images = (values for values in read if values is not None)
    if local == keys:
        sizes = [mean_size(values) for values in images]
        if sizes and all(_is_other_unit(config, size) for size in sizes):
            raise ValueError(_unit_message(data.name, config, sizes[0]))
        return
    first = next(iter(images), None)  # the dtype does not determine whether values are scaled
    if first is not None and first.dtype != np.uint8 and np.nanmax(first) > 1:
        raise ValueError(
            f"{data.name} has the bands {', '.join(bands)}, the encoder has {', '.join(known)}, "
            f"and the values ({first.dtype}, up to {np.nanmax(first):g}) are not scaled to 0..1; "
            "load and train an encoder with data_config=vim_ssl.data.band_statistics(data)."
        )


def check_unit(config: Mapping[str, Any], measured: Mapping[str, Any], name: str) -> None:
    """Raise ValueError if ``mean`` and ``std`` of data called ``name`` are in another unit than
    those of an encoder's ``data_config``."""
    size = np.abs(measured["mean"]) + np.array(measured["std"])
    if _is_other_unit(config, size):
        raise ValueError(_unit_message(name, config, size))


def mean_size(values: np.ndarray) -> np.ndarray:
    """Return the mean absolute value of every band of an array (h, w, bands), as `as_tensor` scales
    it, from at most about 256 x 256 pixels; NaN for a band without a finite value."""
    step = max(min(values.shape[:2]) // 256, 1)
    few = np.abs(values[::step, ::step].astype(np.float64)) / (
        255 if values.dtype == np.uint8 else 1
    )
    known = np.isfinite(few)
    count = known.sum((0, 1))
    return np.where(count, np.where(known, few, 0).sum((0, 1)) / np.maximum(count, 1), np.nan)


def in_other_unit(sizes: Mapping[str, float]) -> list[str]:
    """Return the images whose values are over `ORDERS` times larger or smaller than the median.

    Args:
        sizes: the largest `mean_size` of each image, by its id.
    """
    known = {id: size for id, size in sizes.items() if size > 0}  # NaN is not
    if not known:
        return []
    median = float(np.median(list(known.values())))
    return [id for id, size in known.items() if not 1 / ORDERS < size / median < ORDERS]


def _is_other_unit(config: Mapping[str, Any], size: np.ndarray) -> bool:
    """True if mean absolute values differ from those of a data_config by a factor of more than
    `UNLIKE`, in all bands in the same direction."""
    known = np.abs(config["mean"]) + np.array(config["std"])
    if len(known) != len(size) or not np.nanmax(size, initial=0) > 0:
        return False
    ratio = size / known
    return bool(np.nanmin(ratio) > UNLIKE or np.nanmax(ratio) < 1 / UNLIKE)


def _unit_message(name: str, config: Mapping[str, Any], size: np.ndarray) -> str:
    known = np.abs(config["mean"]) + np.array(config["std"])
    return (
        f"{name} has values of about {np.nanmedian(size):.3g}, but the encoder was trained on "
        f"values of about {np.median(known):.3g}: another unit. Convert them; for rasters, "
        "?values=stored reads the numbers without the scale and offset of their tags."
    )


def check_scale(encoder: Any, values: np.ndarray) -> None:
    """Check that an array (h, w, bands) from a user is in the units of an encoder for values within
    0..1: floats of 0 to 255, for example, are not.

    Raises: ValueError for a value above 2 that is more than `FAR` deviations from the mean.
    """
    if values.dtype == np.uint8 or (config := getattr(encoder, "data_config", None)) is None:
        return  # an encoder of another package
    high = float(np.max(values, initial=0, where=np.isfinite(values)))
    mean, std = (max(map(abs, config[key])) for key in ("mean", "std"))
    if mean <= 1 and high > max(2, mean + FAR * std):
        raise ValueError(
            f"the array has values up to {high:g} ({values.dtype}), but the encoder was trained on "
            "values of about 0 to 1; give 0 to 255 as uint8, or divide by the maximum."
        )


def _has_arrays(data: Any) -> bool:
    """True if images are arrays of bands, not 8-bit grey or colour images. Reads the first image
    only if the source does not declare the dtype."""
    if getattr(data, "bands", None) is None:
        return False
    if data.dtype is None:
        return isinstance(_first(data), np.ndarray)
    return data.dtype != np.uint8 or len(data.bands) not in (1, 3)


def _array(data: ImageData, index: int) -> np.ndarray | None:
    """An image of bands; None if it cannot be read."""
    try:
        image = data[index]["image"]
    except BadImage:
        return None
    return image if isinstance(image, np.ndarray) else None


def _first(data: ImageData) -> Image.Image | np.ndarray | None:
    """The first image that can be read."""
    for i in range(len(data)):
        try:
            return data[i]["image"]
        except BadImage:
            continue
    return None
