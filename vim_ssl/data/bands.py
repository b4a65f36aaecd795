"""Bands of rasters: statistics, and the matching arguments of an encoder."""

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from vim_ssl.data.config import data_config_of
from vim_ssl.data.dataset import ImageData
from vim_ssl.data.images import BadImage
from vim_ssl.data.transforms.image import as_tensor

FAR = 100  # standard deviations from the mean that no measured value has


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
        known = x.isfinite()
        x = x.where(known, 0)
        count, total, squares = count + known.sum(1), total + x.sum(1), squares + x.square().sum(1)
    if not count.ndim or (count == 0).any():
        raise ValueError(f"{data.name}: at least one band has no values in the {few} images read.")
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


def check_bands(encoder: nn.Module, data: Any) -> None:
    """Raise ValueError if the encoder's mean and std do not fit the bands: their names differ, and
    their values are not scaled to 0..1. 8-bit values fit any encoder with as many channels.
    """
    known, bands = tuple(data_config_of(encoder).get("bands", ())), getattr(data, "bands", None)
    if bands is None or tuple(bands) == known or data.dtype == np.uint8 or not _has_arrays(data):
        return
    first = _first(data)  # the dtype does not determine whether values are scaled
    if isinstance(first, np.ndarray) and first.dtype != np.uint8 and np.nanmax(first) > 1:
        raise ValueError(
            f"{data.name} has the bands {', '.join(bands)}, the encoder has {', '.join(known)}, "
            f"and the values ({first.dtype}, up to {np.nanmax(first):g}) are not scaled to 0..1; "
            "load and train an encoder with data_config=vim_ssl.data.band_statistics(data)."
        )


def check_scale(encoder: nn.Module, values: np.ndarray) -> None:
    """Check that an array (h, w, bands) from a user is in the units of an encoder for values within
    0..1: floats of 0 to 255, for example, are not.

    Raises: ValueError for a value above 2 that is more than `FAR` deviations from the mean.
    """
    if values.dtype == np.uint8 or (config := getattr(encoder, "data_config", None)) is None:
        return  # timm's encoders have none
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


def _first(data: ImageData) -> Image.Image | np.ndarray | None:
    """The first image that can be read."""
    for i in range(len(data)):
        try:
            return data[i]["image"]
        except BadImage:
            continue
    return None
