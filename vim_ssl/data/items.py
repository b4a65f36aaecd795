"""Items of data in memory: convert the objects that users have, and read each item once."""

import os
from collections.abc import Mapping, Sized
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import IterableDataset

from vim_ssl.data.dataset import RawImage
from vim_ssl.data.images import clean_image
from vim_ssl.data.labels import IGNORE
from vim_ssl.data.pixels import label_numbers
from vim_ssl.data.sources.hub import check_bands_last
from vim_ssl.data.values import MISSING, name_of, text_of
from vim_ssl.utils.names import did_you_mean

FIELDS = ("image", "label", "caption", "mask", "group", "id")
ACCEPTED = (
    "expected a data spec, a path, a list of images, an array (n, h, w, c), a tensor (n, c, h, w), "
    f"(images, labels), a list of dicts or a dict of lists with {', '.join(FIELDS)}, a map-style "
    "Dataset of torch or of the datasets library, or a dict of splits"
)


def hash_of(*parts: bytes | str) -> str:
    """Return a hash (16 hex digits) of a sequence of parts."""
    digest = blake2b(digest_size=8)
    for part in parts:
        part = part.encode(errors="surrogateescape") if isinstance(part, str) else part
        digest.update(b"%d " % len(part) + part)
    return digest.hexdigest()


class Columns:
    """Items from a dict of lists."""

    def __init__(self, columns: Mapping[str, Any]):
        # A pandas column is indexed by its own labels, not by row.
        self.columns = {
            name: column.to_list() if hasattr(column, "to_list") else column
            for name, column in columns.items() if column is not None
        }  # fmt: skip
        _check_keys(self.columns)
        sizes = {name: len(column) for name, column in self.columns.items()}
        if len(set(sizes.values())) > 1:
            listed = ", ".join(f"{count} of {name}" for name, count in sizes.items())
            raise ValueError(f"the columns differ in length: {listed}.")

    def __len__(self) -> int:
        return len(self.columns["image"])

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {name: column[row] for name, column in self.columns.items()}


def as_items(data: Any) -> tuple[Any, list[str] | None]:
    """Return a sequence of items for `as_item`, and the class names if ``data`` has any."""
    if isinstance(data, Mapping):
        classes = data.get("classes")
        columns = {name: column for name, column in data.items() if name != "classes"}
        return Columns(columns), None if classes is None else [str(name) for name in classes]
    if isinstance(data, tuple) and len(data) == 2 and _are_labels(*data):
        return Columns({"image": _batch(data[0]), "label": data[1]}), None
    if isinstance(data, Image.Image):
        data = [data]
    if isinstance(data, IterableDataset):
        raise TypeError("a stream has no index; give a map-style data set, or a list of its items.")
    if isinstance(data, str) or not (isinstance(data, Sized) and hasattr(data, "__getitem__")):
        raise TypeError(f"data of type {type(data).__name__} cannot be read; {ACCEPTED}.")
    return _batch(data), _class_names(data)


def _are_labels(images: Any, labels: Any) -> bool:
    """True if the two objects of a pair are images and their labels, not two images."""
    if isinstance(images, Image.Image) or not isinstance(images, Sized):
        return False
    return labels is None or isinstance(labels, list | tuple) or np.ndim(labels) in (1, 2)


def _batch(images: Any) -> Any:
    """Return the images. Raises: ValueError for a single image, or none."""
    if isinstance(images, np.ndarray | torch.Tensor):
        channels = images.shape[0 if isinstance(images, torch.Tensor) else -1]
        if images.ndim not in (3, 4) or (images.ndim == 3 and channels <= 4):
            raise ValueError(
                f"got an array of shape {tuple(images.shape)}, expected (n, h, w, c), or a tensor "
                "(n, c, h, w); put a single image into a list."
            )
    if not len(images):
        raise ValueError("the data have no images.")
    return list(images) if isinstance(images, list) else images  # a list may grow later


def _class_names(data: Any) -> list[str] | None:
    """The ``classes`` of a torch data set, or of the one that it is a subset of."""
    while hasattr(data, "dataset"):
        data = data.dataset
    names = getattr(data, "classes", None)
    return [str(name) for name in names] if isinstance(names, list | tuple) and names else None


def as_item(value: Any) -> dict[str, Any]:
    """Convert an item, an image, (image, label), (image, mask) or a dict, to a dict of `FIELDS`."""
    if isinstance(value, Mapping):
        _check_keys(value)
        return dict(value)
    if isinstance(value, tuple | list) and len(value) == 2:
        image, target = value
        if isinstance(target, Mapping):
            raise TypeError(
                f"an item has a dict with {', '.join(map(str, target))} beside its image; for "
                "boxes, use coco:FOLDER."
            )
        is_mask = isinstance(target, Image.Image) or np.ndim(target) > 1
        return {"image": image, "mask" if is_mask else "label": target}
    if isinstance(value, tuple | list) and len(value) == 1:  # of a TensorDataset
        value = value[0]
    return {"image": value}


def _check_keys(names: Mapping[str, Any]) -> None:
    for name in names:
        if name not in FIELDS:
            raise ValueError(f"unknown key {name!r}. {did_you_mean(str(name), FIELDS)}")
    if "image" not in names:
        raise ValueError(f"the key 'image' is missing; the keys are {', '.join(names)}.")


def as_raw(image: Any) -> RawImage:
    """Convert an image to one that `ImageData` reads; a tensor's channels become the last axis.

    Raises: TypeError and ValueError for objects that are not images.
    """
    if isinstance(image, str | Path | bytes | Image.Image):
        return image
    if isinstance(image, torch.Tensor):
        values = image.detach().cpu().numpy()
        if values.ndim == 3:
            if values.shape[0] == values.shape[1] != values.shape[2]:
                raise ValueError(
                    f"a tensor has the shape {values.shape}, expected (c, h, w); if the channels "
                    "come last, move them to the front, as tensor.movedim(-1, 0) does."
                )
            values = np.moveaxis(values, 0, -1)
    elif isinstance(image, np.ndarray):
        values = image
        check_bands_last(values.shape, "the data")
    else:
        raise TypeError(f"an image has the type {type(image).__name__}; {ACCEPTED}.")
    if values.ndim not in (2, 3) or 0 in values.shape or values.dtype.kind not in "biuf":
        raise ValueError(
            f"an array of shape {values.shape} and dtype {values.dtype} is not an image; expected "
            "numbers (h, w) or (h, w, bands)."
        )
    return values


def as_label(label: Any) -> int | str | tuple[int, ...] | None:
    """Convert a label to a class number, a class name, or a row of 0 and 1; None if unknown."""
    if isinstance(label, np.ndarray | torch.Tensor | np.generic):
        label = label.tolist()
    if isinstance(label, list | tuple):
        if len(label) > 1 and any(value not in (0, 1) and not value < 0 for value in label):
            raise ValueError(f"the label {list(label)!r} is not a row of 0 and 1.")
        label = tuple(map(int, label)) if len(label) > 1 else label[0]  # MedMNIST has rows of one
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    if label is None or isinstance(label, str):
        return label
    if not isinstance(label, int | tuple):
        if text_of(label) in MISSING:  # NaN, and pandas' NA and NaT
            return None
        raise ValueError(
            f"the label {label!r} is not a class number, a class name, or a row of 0 and 1."
        )
    unknown = min(label) < 0 if isinstance(label, tuple) else label < 0
    return None if unknown else label if isinstance(label, tuple) else int(label)


@dataclass
class Row:
    """What is known of an item after reading it once; only the mask is kept as an array.

    Attributes:
        pixels: hash of the image; "" if it cannot be read.
        file: path of an image that is a file, else "".
        array: shape and dtype of an image that is an array, else None.
        is_plain: the image is not an array of bands; see `register_data`.
    """

    pixels: str = ""
    file: str = ""
    array: tuple[tuple[int, ...], np.dtype] | None = None
    is_plain: bool = True
    label: Any = None
    caption: Any = None
    mask: np.ndarray | None = None
    group: str | None = None
    id: str | None = None
    error: str = ""

    def hash(self) -> str:
        """Return a hash of the item."""
        mask = b"" if self.mask is None else repr(self.mask.shape).encode() + self.mask.tobytes()
        return hash_of(self.pixels, repr((self.label, self.caption, self.group, self.id)), mask)


def read_row(items: Any, row: int) -> Row:
    """Read an item. Raises: the errors of `register_data`; not those of the data set."""
    try:
        value = items[row]
    except Exception as error:  # a data set may raise anything for a broken file
        return Row(error=f"item {row}: {type(error).__name__}: {error}")
    item = as_item(value)
    mask, group, id = item.get("mask"), item.get("group"), item.get("id")
    result = Row(
        label=as_label(item.get("label")), caption=item.get("caption"),
        mask=None if mask is None else as_mask(mask),
        group=name_of(group), id=None if id is None else str(id),
    )  # fmt: skip
    if (image := item["image"]) is None:
        result.error = f"item {row}: it has no image"
        return result
    raw = as_raw(image)
    if isinstance(raw, str | Path):
        result.file = str(raw)
        size = os.path.getsize(raw) if os.path.exists(raw) else 0
        result.pixels = hash_of(f"{raw} {size}")
    elif isinstance(raw, bytes):
        result.pixels = hash_of(raw)
    elif isinstance(raw, np.ndarray):
        result.array, result.is_plain = (raw.shape, raw.dtype), _is_plain(raw)
        result.pixels = _hash_values(raw)
    else:
        try:
            result.pixels = _hash_values(np.asarray(clean_image(raw)))
        except Exception as error:  # a damaged file that is decoded only now
            result.error = f"item {row}: {type(error).__name__}: {error}"
    return result


def _hash_values(values: np.ndarray) -> str:
    return hash_of(f"{values.shape} {values.dtype}", values.tobytes())


def as_mask(mask: Any) -> np.ndarray:
    """Convert an image, array or tensor (h, w) or (1, h, w) of class numbers to uint8 (h, w)."""
    values = label_numbers(mask) if isinstance(mask, Image.Image) else np.asarray(mask)
    values = values[0] if values.ndim == 3 and len(values) == 1 else values
    if values.ndim != 2 or values.dtype.kind not in "bui" or not values.size:
        raise ValueError(
            f"a mask has the shape {values.shape} and dtype {values.dtype}; expected class numbers "
            "(h, w), as whole numbers."
        )
    if values.min() < 0 or values.max() > IGNORE:
        raise ValueError(
            f"a mask has values from {values.min()} to {values.max()}; expected classes from 0, "
            f"and {IGNORE} for unlabelled pixels."
        )
    return values.astype(np.uint8)


def _is_plain(values: np.ndarray) -> bool:
    """True if the values fit 8 bits, with 1 or 3 channels; see `register_data`."""
    if (*values.shape, 1)[2] not in (1, 3):
        return False
    if values.dtype == np.uint8:
        return True
    low, high = values.min(), values.max()  # NaN for floats with missing values
    return bool(low >= 0 and high <= (1 if values.dtype.kind in "bf" else 255))
