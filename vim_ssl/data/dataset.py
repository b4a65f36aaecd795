"""Images by index, with labels, groups, masks, boxes and captions."""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from hashlib import blake2b
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, TypeAlias

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from vim_ssl.data.images import BadImage, array_image, clean_image, decode_image
from vim_ssl.data.labels import IGNORE
from vim_ssl.data.loading.indexed import SeededSamples
from vim_ssl.data.passed_over import PassedOver
from vim_ssl.data.split import as_key
from vim_ssl.data.values import name_of

RawImage: TypeAlias = str | Path | bytes | np.ndarray | Image.Image


class Captions(Protocol):
    """Captions by row, one or several texts each: a list, or a lazy reader."""

    def __getitem__(self, row: int, /) -> Any: ...


class Images(Protocol):
    """Undecoded images by row: picklable; each is read when indexed.

    Optional: ``whole_files``, whether each row is a file of its own; methods ``paths(row)`` and
    ``sizes(row)``, see `vim_ssl.data.sources.folder.OnDisk`; ``part(row)``, the place of an image
    in its files, if it is not all of them: a text that is the same wherever the files lie;
    ``contents``, how these files are read to compare them, see `vim_ssl.data.contents.READERS`;
    ``location(row)``, an item's ``meta``. Of a plane: ``volume``, ``plane``, ``planes`` and
    ``spacing`` (see `vim_ssl.metrics.volumes`); if the volume is a file also ``file`` and ``axis``.
    Of a raster: its file, ``raster``, its ``name``, the ``box`` in it (left, top, width, height in
    pixels; None for the whole raster), and ``core``, the part of the box that no other one covers.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> RawImage:
        """An undecoded image: its path, its bytes, values (h, w) or (h, w, bands), or a PIL image
        of any mode."""
        ...


class Masks(Protocol):
    """Masks by row.

    Optional method: ``classes_in(row)``, the frozenset of the class indices in the mask, or in the
    file that it is part of, found without decoding the image.
    """

    def read(self, row: int, size: tuple[int, int], /) -> np.ndarray:
        """The mask, uint8 (h, w), of an image of ``size`` (width, height)."""
        ...

    def sizes(self, row: int, /) -> int | str:
        """File size in bytes, or another value that changes with the mask."""
        ...


class Objects(Protocol):
    """Boxes and masks by row."""

    outlines: bool  # whether objects have masks
    images: list[dict[str, Any]]  # as in a COCO file: id, file_name, width, height
    categories: list[dict[str, Any]]  # id and name per class

    def read(self, row: int, size: tuple[int, int], /) -> dict[str, np.ndarray]:
        """``boxes``, ``box_labels``, and with outlines ``masks``; see `ImageData`."""
        ...

    def annotations(self, row: int, /) -> list[dict[str, Any]]:
        """The annotations, as in a COCO file."""
        ...

    def count(self, row: int, /) -> int:
        """Number of objects to learn, without reading them."""
        ...

    def sizes(self, row: int, /) -> int | str:
        """A value that changes with the annotations."""
        ...


class ImageData(Dataset):
    """Images by index; labels and groups are known without decoding.

    An item is a dict with ``image`` (a decoded PIL image, "RGB" or "L", of any size; with other
    bands an array (h, w, bands), NaN for missing pixels; for ``video:`` a `Video`), ``id`` (str,
    the same in every run), and, where known, ``label``, ``mask`` (uint8 (h, w): class indices, 255
    = unlabelled), ``boxes`` (float32 (n, 4): left, top, right, bottom in pixels) with
    ``box_labels`` (int64 (n,): class indices) and ``masks`` (uint8 (n, h, w), 1 = object),
    ``caption`` (one or several: see `captions_of`), ``group`` (str) and ``meta`` (dict): ``path``
    of a file, with boxes also its ``entry`` in the COCO file, or a position; see `Images`.
    Picklable, for DataLoader workers.

    Attributes:
        name: the spec string it was opened with.
        ids: list[str].
        labels: one per image, or None: a class (int; -1 is unknown), or a row with a 0 or 1 for
            every class.
        classes: class names, by index in labels, masks or boxes; list[str] or None.
        has_masks: whether items have a ``mask``.
        has_boxes, has_outlines: whether items have ``boxes``, and whether boxes have ``masks``.
        categories: for boxes, ``id`` (in their file) and ``name`` of each class; else None.
        groups: list[str] or None; a split never divides a group.
        bands: names of the bands, or None if the source declares none.
        dtype: dtype of images with bands; None if it is unknown before reading them.
        task: one of `vim_ssl.metrics.medmnist.TASKS`, or None.
        splits: names of the source's splits; empty if it has none.
        split: the open split, or "all".
        faults: descriptions of faults of the source as a whole.
        passed_over: what -> number of files or folders that the source does not read, and warnings
            about their layout; see `PassedOver`.
        left_out: reason -> number of images of the source that `subset` removed for it.
        min_side: see `decode_image`; None decodes every image at full size.
        is_stream: False; True for an `ImageStream`, whose images are read in order.
        kind: "image" or "video".
        sampling: for videos, the `Sampling` of their clips; else None.
    """

    is_stream: ClassVar[Literal[False]] = False
    kind: ClassVar[str] = "image"
    sampling: Any = None

    def __init__(
        self,
        images: Images | Sequence[str],
        ids: Iterable[str],
        *,
        name: str,
        labels: Iterable[Any] | None = None,
        classes: Sequence[str] | None = None,
        groups: Iterable[str] | None = None,
        captions: Captions | None = None,
        masks: Masks | None = None,
        objects: Objects | None = None,
        splits: Sequence[str] = (),
        split: str = "all",
        bands: Sequence[str] | None = None,
        dtype: Any = None,
        task: str | None = None,
        source_fingerprint: str = "",
        faults: Iterable[str] = (),
    ):
        self.name, self.split, self.splits = name, split, list(splits)
        self.ids = list(ids)
        self.labels = None if labels is None else list(labels)
        self.classes = None if classes is None else list(classes)
        self.groups = None if groups is None else list(groups)
        self.task, self.faults = task, list(faults)
        self.bands = None if bands is None else tuple(bands)
        self.dtype = None if dtype is None else np.dtype(dtype)
        self.min_side: int | None = None
        self.passed_over = PassedOver()
        self.left_out: dict[str, int] = {}
        self._images, self._captions, self._masks = images, captions, masks
        self._objects, self.has_masks = objects, masks is not None
        self.has_boxes = objects is not None
        self.has_outlines = objects is not None and objects.outlines
        self.categories = None if objects is None else objects.categories
        # The image, caption, mask and objects of item i are at _rows[i].
        self._rows: Sequence[int] = range(len(self.ids))
        self._source_fingerprint = source_fingerprint
        for what, column in (("labels", self.labels), ("groups", self.groups)):
            if column is not None and len(column) != len(self.ids):
                raise ValueError(f"{len(column)} {what} for {len(self.ids)} images.")

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Decode image ``index``.

        Raises: IndexError; BadImage if it cannot be decoded, if its mask or boxes do not fit it, or
            if its EXIF orientation makes their position on it ambiguous.
        """
        item: dict[str, Any] = {"id": self.ids[index]}
        raw = self.raw(index)
        try:
            item["image"] = self._decode(raw)
            if self._captions is not None:
                item["caption"] = self._captions[self._rows[index]]
            if self.has_masks and self._masks is not None:
                image = item["image"]
                size = image.shape[1::-1] if isinstance(image, np.ndarray) else image.size
                item["mask"] = self._masks.read(self._rows[index], size)
            if self.has_boxes and self._objects is not None:
                item |= self._objects.read(self._rows[index], item["image"].size)
        except BadImage as error:
            raise BadImage(item["id"], error.reason) from error
        if self.labels is not None:
            item["label"] = self.labels[index]
        if self.groups is not None:
            item["group"] = self.groups[index]
        if isinstance(raw, str | Path):
            item["meta"] = {"path": str(raw)}
            if self._objects is not None:
                item["meta"]["entry"] = self._objects.images[self._rows[index]]
        elif location := getattr(self._images, "location", None):
            item["meta"] = location(self._rows[index])
        return item

    def _decode(self, raw: RawImage) -> Any:
        if isinstance(raw, np.ndarray):
            return array_image(raw)
        if isinstance(raw, Image.Image):
            return clean_image(raw)
        dense = self.has_masks or self.has_boxes  # these refer to the full size
        return decode_image(raw, min_side=None if dense else self.min_side, dense=dense)

    def raw(self, index: int) -> RawImage:
        """The undecoded image; see `Images`."""
        row = self._rows[index]
        try:
            return self._images[row]
        except BadImage as error:
            raise BadImage(self.ids[index], error.reason) from error
        except Exception as error:  # a damaged table
            raise BadImage(self.ids[index], f"{type(error).__name__}: {error}") from error

    def paths(self, index: int) -> list[str]:
        """Paths of the files of image ``index``; [] if it has no file, as in tables of images."""
        paths = getattr(self._images, "paths", None)
        return paths(self._rows[index]) if paths else []

    def mask_paths(self, index: int) -> list[str]:
        """Paths of the files of the mask of image ``index``; [] if it has none."""
        paths = getattr(self._masks, "paths", None) if self.has_masks else None
        return paths(self._rows[index]) if paths else []

    def file(self, index: int) -> RawImage | None:
        """The file that holds image ``index`` alone: its path, or its bytes from a table; None for
        a part of a file, such as a tile, for a video and for an image in memory."""
        if self.kind != "image" or not getattr(self._images, "whole_files", not self.paths(index)):
            return None
        raw = self.raw(index)
        return raw if isinstance(raw, str | Path | bytes) else None

    def part(self, index: int) -> str | None:
        """The part of its files that image ``index`` is, such as a plane or a tile; None if it is
        a whole file, or has none."""
        part = getattr(self._images, "part", None)
        return part(self._rows[index]) if part else None

    @property
    def images(self) -> Images | Sequence[str]:
        """The undecoded images of the source, which all its splits share; see `row`."""
        return self._images

    def row(self, index: int) -> int:
        """The position of image ``index`` in `images`."""
        return self._rows[index]

    def locate(self, index: int) -> tuple["ImageData", int]:
        """The data set that image ``index`` comes from, and its index there; see `join`."""
        if not isinstance(self._images, _Joined):
            return self, index
        data, inner = self._images.locate(self._rows[index])
        return data.locate(inner)

    @property
    def has_captions(self) -> bool:
        """Whether the source has captions; single images may still have none."""
        return self._captions is not None

    def captions(self, index: int) -> list[str]:
        """Captions of image ``index``, read without decoding it. Raises: BadImage."""
        if self._captions is None:
            return []
        try:
            return captions_of(self._captions[self._rows[index]])
        except BadImage as error:
            raise BadImage(self.ids[index], error.reason) from error

    def box_count(self, index: int) -> int:
        """Number of boxes of image ``index``, counted without decoding it."""
        return 0 if self._objects is None else self._objects.count(self._rows[index])

    def annotated(self, index: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Image entry and annotations of image ``index``, as in a COCO file. Raises: ValueError."""
        if self._objects is None:
            raise ValueError(f"{self.name} has no boxes.")
        row = self._rows[index]
        return self._objects.images[row], self._objects.annotations(row)

    def classes_in_mask(self, index: int) -> frozenset[int]:
        """The class indices in the file of image ``index``'s mask, which is read once; none if it
        cannot be read."""
        if classes_in := getattr(self._masks, "classes_in", None):
            return classes_in(self._rows[index])
        try:
            return frozenset(np.unique(self[index]["mask"]).tolist()) - {IGNORE}
        except BadImage:
            return frozenset()

    def samples(
        self, transform: Callable[[dict], dict], seed: int = 0, *, repeats: int = 1
    ) -> SeededSamples:
        """Return training samples with a random transform applied; see `SeededSamples`."""
        return SeededSamples(self, transform, seed, repeats=repeats)

    def subset(self, indices: Iterable[int], reason: str = "") -> "ImageData":
        """Select the images at these indices, in this order; classes and splits are kept.

        Args:
            reason: why the others are removed, to be counted in ``left_out``.
        """
        indices = [int(i) for i in indices]
        subset = object.__new__(type(self))
        subset.__dict__.update({k: v for k, v in self.__dict__.items() if k != "fingerprint"})
        if reason and (removed := len(self) - len(indices)):
            total = self.left_out.get(reason, 0) + removed
            subset.left_out = self.left_out | {reason: total}
        subset._rows = [self._rows[i] for i in indices]
        subset.ids = [self.ids[i] for i in indices]
        subset.labels = None if self.labels is None else [self.labels[i] for i in indices]
        subset.groups = None if self.groups is None else [self.groups[i] for i in indices]
        return subset

    def images_only(self) -> "ImageData":
        """Return the same images without masks and boxes: these are not read, and an image whose
        mask or boxes do not fit it is readable."""
        images = self.subset(range(len(self)))
        images.has_masks = images.has_boxes = images.has_outlines = False
        return images

    @property
    def multi_label(self) -> bool:
        """Whether labels are rows of 0 and 1."""
        return self.labels is not None and hasattr(next(iter(self.labels), None), "__len__")

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that change with the ids, file sizes and labels of the images.

        It is the same on every machine with the same data; images are not decoded.
        """
        digest = blake2b(self._source_fingerprint.encode(), digest_size=8)
        sizes = getattr(self._images, "sizes", None)
        for i, row in enumerate(self._rows):
            size = sizes(row) if sizes else ""
            label = "" if self.labels is None else as_key(self.labels[i])
            for known, truth in ((self.has_masks, self._masks), (self.has_boxes, self._objects)):
                label = truth.sizes(row) if known and truth is not None else label
            digest.update(f"{self.ids[i]}\0{size}\0{label}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()

    def __repr__(self) -> str:
        known = f", {len(self.classes)} classes" if self.classes else ""
        return f"ImageData({self.name!r}, {len(self)} images{known}, split={self.split!r})"


def captions_of(value: Any) -> list[str]:
    """Convert an item's ``caption`` (one text, several, or none) to a list of texts, without
    missing ones; see `vim_ssl.data.values.name_of`."""
    texts = value if isinstance(value, list | tuple) else [value]
    return [text.strip() for text in texts if isinstance(text, str) and name_of(text)]


class _Joined:
    """The images of several data sets, concatenated."""

    def __init__(self, sets: Sequence[ImageData]):
        self.sets = list(sets)
        self.ends = list(accumulate(map(len, sets)))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, row: int) -> RawImage:
        data, index = self.locate(row)
        return data.raw(index)

    def paths(self, row: int) -> list[str]:
        data, index = self.locate(row)
        return data.paths(index)

    def locate(self, row: int) -> tuple[ImageData, int]:
        """The data set that contains a row, and its index there."""
        number = bisect_right(self.ends, row)
        return self.sets[number], row - (self.ends[number - 1] if number else 0)


class _JoinedCaptions:
    """The captions of `_Joined` images."""

    def __init__(self, images: _Joined):
        self.images = images

    def __getitem__(self, row: int) -> list[str]:
        data, index = self.images.locate(row)
        return data.captions(index)


def join(sets: Sequence[ImageData]) -> ImageData:
    """Join several data sets into one for pretraining.

    Labels and groups are dropped, because they differ between sources; captions are kept if all
    sets have them, bands if they are the same in all. Ids are ``number of the set/id in the set``.

    Raises: ValueError for videos.
    """
    if other := next((data for data in sets if data.kind != "image"), None):
        raise ValueError(f"{other.name} has {other.kind}s; only images can be joined.")
    images, names, first = _Joined(sets), [data.name for data in sets], sets[0]
    joined = ImageData(
        images,
        [f"{number}/{id}" for number, data in enumerate(sets) for id in data.ids],
        name=" + ".join(_times(name, len(list(same))) for name, same in groupby(names)),
        captions=_JoinedCaptions(images) if all(data.has_captions for data in sets) else None,
        bands=first.bands if all(data.bands == first.bands for data in sets) else None,
        dtype=first.dtype if all(data.dtype == first.dtype for data in sets) else None,
        source_fingerprint=" ".join(data.fingerprint for data in sets),
        faults=[fault for data in sets for fault in data.faults],
    )
    # A set that is repeated counts once.
    joined.passed_over = sum({data.name: data.passed_over for data in sets}.values(), PassedOver())
    return joined


def _times(name: str, count: int) -> str:
    return f"{count} * {name}" if count > 1 else name
