"""Bands of rasters: their statistics, and an encoder's arguments for them."""

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from vim_ssl.data.config import data_config_of
from vim_ssl.data.dataset import ImageData
from vim_ssl.data.images import BadImage
from vim_ssl.data.transforms.image import as_tensor


def band_statistics(data: ImageData, sample: int = 1000) -> dict[str, Any]:
    """Mean and standard deviation of every band, over all finite values.

    Args:
        data: images of one number of bands; for training, the training split.
        sample: number of images, spread evenly.
    Returns: ``bands``, ``mean`` and ``std`` for an encoder's ``data_config``, which is stored with
        the encoder.
    Raises: ValueError when no image can be read, or their bands differ.
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
            raise ValueError(f"{data.name} has images of {len(count)} and of {len(x)} bands.")
        known = x.isfinite()
        x = x.where(known, 0)
        count, total, squares = count + known.sum(1), total + x.sum(1), squares + x.square().sum(1)
    if not count.ndim or (count == 0).any():
        raise ValueError(f"{data.name}: of {few} images none has values in every band.")
    mean = total / count
    std = (squares / count - mean.square()).clamp(min=0).sqrt()
    names = data.bands or {1: ("L",), 3: ("R", "G", "B")}.get(len(mean))
    return {
        "bands": tuple(names or (f"band{i}" for i in range(len(mean)))),
        "mean": tuple(mean.tolist()),
        "std": tuple(std.clamp(min=1e-6).tolist()),
    }


def band_arguments(data: Any) -> dict[str, Any]:
    """The arguments of an encoder for the bands of these images, for `load_encoder`: ``in_chans``
    and a ``data_config`` with their names and statistics; none for images in grey or colour."""
    if not _has_arrays(data):
        return {}
    return {"in_chans": len(data.bands), "data_config": band_statistics(data)}


def check_bands(encoder: nn.Module, data: Any) -> None:
    """Raise ValueError for bands that the encoder's mean and std do not fit: bands of other names,
    with values that are not scaled to 0..1. Values of 8 bits fit any encoder of as many channels.
    """
    known, bands = tuple(data_config_of(encoder).get("bands", ())), getattr(data, "bands", None)
    if bands is None or tuple(bands) == known or data.dtype == np.uint8 or not _has_arrays(data):
        return
    first = _first(data)  # a type does not say whether values are scaled
    if isinstance(first, np.ndarray) and first.dtype != np.uint8 and np.nanmax(first) > 1:
        raise ValueError(
            f"{data.name} has the bands {', '.join(bands)}, the encoder {', '.join(known)}, and "
            f"the values ({first.dtype}, up to {np.nanmax(first):g}) are not scaled to 0..1; load "
            "and train an encoder with data_config=vim_ssl.data.band_statistics(data)."
        )


def _has_arrays(data: Any) -> bool:
    """Whether images are arrays of bands, not 8-bit images in grey or colour. The first image is
    read only where the source does not declare their type."""
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
