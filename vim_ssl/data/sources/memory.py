"""``memory:``: images in this process, such as those of a notebook.

    spec = register_data([(image, "cat"), (other, "dog")])            # "memory:5f0c…"
    spec = register_data({"train": (images, labels), "test": (test_images, test_labels)})
    open_data(spec)

The location is a hash of the content, so a spec names the same images in every process. Another
process must register them again to open them.
"""

import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import ConcatDataset, Dataset

from vim_ssl.data.classes import unite_classes
from vim_ssl.data.dataset import ImageData, RawImage
from vim_ssl.data.images import BadImage
from vim_ssl.data.items import Row, as_item, as_items, as_raw, hash_of, read_row
from vim_ssl.data.labels import IGNORE, checked, classes_of
from vim_ssl.data.registry import Splits, source
from vim_ssl.data.sources.folder import check_option
from vim_ssl.data.sources.hub import by_split, name_bands, open_tables
from vim_ssl.data.spec import DataSpec, pick_split
from vim_ssl.data.values import name_of, number_labels, number_of, text_of, whole_number_of
from vim_ssl.utils.names import did_you_mean

REREAD = 8  # items of a torch data set that are read twice, to detect random transforms

_registered: dict[str, Callable[[DataSpec], ImageData | Splits]] = {}  # location → opener


@source("memory", options=("image", "label", "caption", "group"))
def open_memory(spec: DataSpec) -> ImageData | Splits:
    """Open ``memory:HASH``, the result of `register_data`.

    ``label=none`` ignores labels. Tables of the datasets library take the options of ``hf:``.

    Raises: ValueError if these images are not registered in this process.
    """
    if spec.location not in _registered:
        raise ValueError(
            f"{spec} names images that were in the memory of another process. Give the same images "
            "again, as in pretrain(images, output=RUN, resume='auto') or linear_probe(RUN, "
            "images); a command needs files: --data FOLDER."
        )
    return _registered[spec.location](spec)


def register_data(data: Any) -> str:
    """Register images in memory and return the data spec that opens them.

    The images are kept, without a copy, until the process ends; do not modify them. Registering
    the same content again returns the same spec.

    Args:
        data: one of
            - a data spec, which is returned, or a `Path`;
            - images: a list of PIL images, arrays, tensors or paths of files; an array
              (n, h, w[, c]); a tensor (n[, c], h, w);
            - ``(images, labels)``: a label is a class number, a class name, a row with a 0 or 1
              for every class, or None if unknown;
            - a list of dicts, or a dict of lists, with the keys in `FIELDS`: ``caption`` is a text
              or a list of texts; ``mask`` is an array (h, w) or image of class numbers, 255 =
              unlabelled. A dict of lists may also have ``classes``, the names of the classes;
            - a map-style data set of torch: its items are images, (image, label), (image, mask),
              or dicts as above, its ``classes`` the names of the classes. All items are read once
              for the hash, and random transforms are refused;
            - a `Dataset` or `DatasetDict` of the datasets library, read as ``hf:`` reads it;
            - data of `open_data`;
            - a dict of splits: ``{"train": …, "test": …}``.
            Arrays and tensors with 1 or 3 channels whose values are whole numbers from 0 to 255,
            or floats from 0 to 1, are grey and colour images; others are bands, in their units.
    Raises: TypeError for another object or a stream; ValueError for content that does not fit.
    """
    if isinstance(data, str | Path):
        return str(data)
    opener: Callable[[DataSpec], ImageData | Splits]
    if isinstance(data, ImageData):
        opened = data
        digest, opener = hash_of(data.name, data.fingerprint), lambda spec: _renamed(opened, spec)
    elif (opened_splits := _opened_splits(data)) is not None:
        named = opened_splits
        digest = hash_of(
            *(f"{name} {part.name} {part.fingerprint}" for name, part in named.items())
        )
        opener = lambda spec: Splits(list(named), partial(_of_split, named))  # noqa: E731
    elif (tables := _tables_of(data)) is not None:
        fingerprints = [f"{name} {t._fingerprint} {t.features}" for name, t in tables.items()]
        digest, opener = hash_of(*fingerprints), lambda spec: open_tables(tables)
    else:
        splits = data if _is_splits(data) else {"": data}
        memory = Memory(splits)
        digest, opener = memory.digest, memory.open
    _registered[digest] = opener
    return f"memory:{digest}"


def _renamed(data: ImageData, spec: DataSpec) -> ImageData:
    pick_split(spec.split, (), str(spec))
    copy = data.subset(range(len(data)))
    copy.name = str(spec)
    return copy


def _opened_splits(data: Any) -> dict[str, ImageData] | None:
    """Return data of `open_data` by split; None for any other object."""
    if _is_splits(data) and data and all(isinstance(part, ImageData) for part in data.values()):
        return dict(data)
    return None


def _of_split(named: Mapping[str, ImageData], spec: DataSpec) -> ImageData:
    split = pick_split(spec.split, list(named), str(spec))
    if split == "all":
        raise ValueError(f"{spec}: give one of the splits {', '.join(named)}.")
    copy = named[split].subset(range(len(named[split])))
    copy.name, copy.splits, copy.split = str(spec), list(named), split
    return copy


def _tables_of(data: Any) -> dict[str, Any] | None:
    """Return the tables of the datasets library by split; None for any other object."""
    if (datasets := sys.modules.get("datasets")) is None:  # then there is none
        return None
    if isinstance(data, datasets.IterableDataset | datasets.IterableDatasetDict):
        raise TypeError(
            "a stream of the datasets library has no index; give hf:NAME?streaming=true, or a part "
            "of it, list(stream.take(1000))."
        )
    parts = list(data.values()) if isinstance(data, dict) else [data]
    if not parts or not all(isinstance(part, datasets.Dataset) for part in parts):
        return None
    return by_split(data)


def _is_splits(data: Any) -> bool:
    return isinstance(data, Mapping) and "image" not in data


class ItemImages:
    """The images of a sequence of items, read when indexed.

    Args:
        files: see `Row`.
        as_bands: keep the values of arrays; False: convert them to 8 bits.
    """

    def __init__(self, items: Any, files: Sequence[str], as_bands: bool):
        self.items, self.files, self.as_bands = items, files, as_bands

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, row: int) -> RawImage:
        image = as_item(self.items[row])["image"]
        if image is None:
            raise BadImage(f"row {row}", "the item has no image")
        raw = as_raw(image)
        if isinstance(raw, Image.Image):
            raw.load()  # raises here for a damaged file
        if not isinstance(raw, np.ndarray):
            return raw
        if self.as_bands:
            return np.atleast_3d(raw)
        factor = 255 if raw.dtype.kind in "bf" else 1
        return (raw.astype(np.float32) * factor).round().astype(np.uint8)

    def paths(self, row: int) -> list[str]:
        return [self.files[row]] if self.files[row] else []


class ItemMasks:
    """Masks of items: uint8 (h, w), or None where an item has none."""

    def __init__(self, masks: Sequence[np.ndarray | None], classes: int):
        self.masks, self.classes = masks, classes

    def read(self, row: int, size: tuple[int, int]) -> np.ndarray:
        if (mask := self.masks[row]) is None:
            raise BadImage("mask", "the item has no mask")
        return checked(mask, size, "mask", self.classes)

    def classes_in(self, row: int) -> frozenset[int]:
        mask = self.masks[row]
        return frozenset() if mask is None else frozenset(np.unique(mask).tolist()) - {IGNORE}

    def sizes(self, row: int) -> int:
        return 0  # the hash of the content includes the masks


class Memory:
    """Images in memory, by split.

    Args:
        splits: name → data, or "" → data without splits.
    Attributes:
        digest: hash of the content.
    Raises: the errors of `register_data`.
    """

    def __init__(self, splits: Mapping[str, Any]):
        self.items: dict[str, Any] = {}
        self.rows: dict[str, list[Row]] = {}
        named: dict[str, list[str]] = {}
        for split, data in splits.items():
            items, classes = as_items(data)
            rows = [read_row(items, row) for row in range(len(items))]
            if all(row.error for row in rows):
                raise ValueError(f"none of the {len(rows)} items can be read; {rows[0].error}")
            if isinstance(data, Dataset):
                _check_repeatable(items, rows)
            self.items[split], self.rows[split] = items, rows
            if classes is not None:
                named[split] = classes
        self.classes = _unite(named, self.rows)
        self.digest = hash_of(
            repr(self.classes),
            *(f"{split} {row.hash()}" for split, rows in self.rows.items() for row in rows),
        )
        # Numbered by split, so that no id is in two of them.
        self.ids = {
            name: [row.id or (f"{name}/{i}" if name else str(i)) for i, row in enumerate(rows)]
            for name, rows in self.rows.items()
        }
        (id, times), *_ = Counter(chain(*self.ids.values())).most_common(1)
        if times > 1:
            raise ValueError(f"{times} items have the id {id!r}; ids must differ.")
        rows = list(chain(*self.rows.values()))
        self.array = next((row.array for row in rows if not row.is_plain), None)
        if self.array and any(row.pixels and not row.array for row in rows):
            raise ValueError("some images are arrays of bands, others are not; use one kind.")
        kinds = {(row.array[0][-1], row.array[1]) for row in rows if row.array}
        if self.array and len(kinds) > 1:
            listed = " and ".join(sorted(f"{dtype} with {bands} bands" for bands, dtype in kinds))
            raise ValueError(
                f"the images are arrays of {listed}, whose values have other units; use one dtype "
                "and the same bands."
            )
        masks = {
            f"item {id}": frozenset(np.unique(row.mask).tolist())
            for id, row in zip(chain(*self.ids.values()), rows, strict=True) if row.mask is not None
        }  # fmt: skip
        if masks and any(row.label is not None for row in rows):
            raise ValueError("items have labels and masks; leave one of them out.")
        self.mask_classes, self.faults = None, list[str]()
        if masks:
            self.mask_classes, self.faults = classes_of(masks, self.classes, "the masks")

    def open(self, spec: DataSpec) -> ImageData | Splits:
        """Open a spec; see `open_memory`."""
        spec.takes("label")
        check_option(spec, "label", ("none",))
        splits = [split for split in self.items if split]
        return Splits(splits, self._choose) if splits else self._choose(spec)

    def _choose(self, spec: DataSpec) -> ImageData:
        splits = [split for split in self.items if split]
        split = pick_split(spec.split, splits, f"memory:{self.digest}")
        chosen = list(self.items) if split == "all" else [split]
        rows = [row for name in chosen for row in self.rows[name]]
        ids = [id for name in chosen for id in self.ids[name]]
        labels, classes = None, self.mask_classes
        faults: list[str] = []
        if spec.label is None and classes is None:
            every = [row.label for row in chain(*self.rows.values())]
            labels, classes, faults = _number([row.label for row in rows], every, self.classes)
        groups, captions = [row.group for row in rows], [row.caption for row in rows]
        masks = ItemMasks([row.mask for row in rows], len(self.mask_classes or ()))
        shape, dtype = self.array or (None, None)
        return ImageData(
            ItemImages(
                ConcatDataset([self.items[name] for name in chosen]), [row.file for row in rows],
                as_bands=shape is not None,
            ),
            ids, name=str(spec), labels=labels, classes=classes,
            groups=[g or id for g, id in zip(groups, ids, strict=True)] if any(groups) else None,
            captions=captions if any(captions) else None,
            masks=masks if self.mask_classes else None,
            bands=name_bands(shape, str(dtype)) if shape else None, dtype=dtype,
            splits=splits, split=split, faults=[*self.faults, *faults],
            source_fingerprint=hash_of(*(row.hash() for row in rows)),
        )  # fmt: skip


def _check_repeatable(items: Any, rows: Sequence[Row]) -> None:
    """Raise ValueError if images differ when they are read again."""
    for i, row in enumerate(rows[:REREAD]):
        if row.pixels and read_row(items, i).pixels != row.pixels:
            raise ValueError(
                f"item {i} is another image when it is read again; remove random transforms from "
                "the data set: images are augmented in training, by the run's own settings."
            )


def _unite(named: Mapping[str, list[str]], rows: Mapping[str, list[Row]]) -> list[str] | None:
    """Return the classes that the splits name; number labels and masks of all splits by them."""
    classes, numbers, _ = unite_classes(list(named.values()))
    for split, local in zip(named, numbers, strict=True):
        if local == list(range(len(classes))):
            continue
        table = np.arange(IGNORE + 1, dtype=np.uint8)
        table[: len(local)] = local
        for row in rows[split]:
            if isinstance(row.label, int) and row.label < len(local):
                row.label = local[row.label]
            elif isinstance(row.label, tuple) and len(row.label) == len(local):
                of = dict(zip(local, row.label, strict=True))
                row.label = tuple(of.get(i, 0) for i in range(len(classes)))
            if row.mask is not None:
                row.mask = table[row.mask]
    return classes or None


def _number(
    labels: Sequence[Any], every: Sequence[Any], classes: list[str] | None
) -> tuple[list[Any] | None, list[str] | None, list[str]]:
    """Return labels for `ImageData`, the class names, and remarks; None for unknown labels.

    Args:
        every: labels of all splits.
        classes: names of the classes; by default the sorted labels of all splits.
    Raises: ValueError for labels of several kinds, or that are not among the classes.
    """
    known = [label for label in every if label is not None and _is_known(label, classes)]
    kinds = {type(label).__name__: label for label in known}
    if set(kinds) == {"int", "str"} and all(number_of(str(label)) is not None for label in known):
        kinds = {"int": known[0]}
        labels, every, known = map(_as_numbers, (labels, every, known))
    if len(kinds) > 1:
        raise ValueError(
            f"labels have several kinds, such as {' and '.join(map(repr, kinds.values()))}."
        )
    if "tuple" in kinds:
        widths = sorted({len(label) for label in known} | ({len(classes)} if classes else set()))
        if len(widths) > 1:
            raise ValueError(f"rows of labels and classes differ in number: {widths}.")
        return [[-1] * widths[0] if row is None else list(row) for row in labels], classes, []
    if classes is None or not known:
        return number_labels(labels, every)
    number = {name: i for i, name in enumerate(classes if "str" in kinds else range(len(classes)))}
    for label in known:
        if _in_classes(label, number) < 0:
            raise ValueError(f"the label {label!r} is not among the {len(classes)} classes. "
                             f"{did_you_mean(str(label), map(str, number))}")  # fmt: skip
    return [_in_classes(label, number) for label in labels], classes, []


def _is_known(label: Any, classes: Sequence[str] | None) -> bool:
    """Whether a label is not missing; a declared class may be called "None"."""
    return not isinstance(label, str) or label in (classes or ()) or name_of(label) is not None


def _in_classes(label: Any, number: Mapping[Any, int]) -> int:
    """Return the number of a label, which may have spaces round it; -1 if it is missing."""
    return number.get(label, number.get(text_of(label), -1))


def _as_numbers(labels: Sequence[Any]) -> list[Any]:
    """Convert labels that are written as numbers, such as "1", to whole numbers."""

    def convert(label: Any) -> Any:
        number = whole_number_of(label) if isinstance(label, str) else None
        return label if number is None else number

    return [convert(label) for label in labels]
