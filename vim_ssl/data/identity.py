"""Which images are the same, by their content: never by a name, a path or a spec.

content_keys(data, by)    a key of 48 bits per image
TrainingRecord            the images of one training, by key; travels with the weights
compare(data, trainings)  which images of ``data`` these trainings used, and which they held out
"""

import base64
import math
import os
import sqlite3
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
from PIL import Image
from tqdm import tqdm

from vim_ssl.data.clips import images_in
from vim_ssl.data.contents import READERS, sampled, sampled_file
from vim_ssl.data.dataset import ImageData
from vim_ssl.data.dicom_pixels import silenced
from vim_ssl.data.images import BadImage, clean_image, decode_image
from vim_ssl.data.loading.streamed import ImageStream
from vim_ssl.utils.files import user_cache

# How images are compared: by decoded pixels, which are the same in a file, a table and in memory;
# or by the bytes of files, if there are too many to decode.
PIXELS, FILES = "pixels-2", "files-2"
# In records of earlier versions: all bytes of an image in a table are hashed, and the files of
# parts are known by their bytes.
EARLIER = {"pixels": PIXELS, "files": FILES}
PIXELS_UP_TO = 2**27  # bytes of files to decode: 128 MB, a few seconds
RECORDED_UP_TO = 2**31  # bytes of images without labels, 2 GB
KEY_BYTES = 6  # comparing 50,000 images with a million, one wrong match in 5,000 times
CACHED_FROM = 500  # files; the keys of fewer are not kept in the user's cache
UNKNOWN = 0  # the key of an image that cannot be read; it equals no other


# ---------------------------------------------------------------- keys


@dataclass(frozen=True)
class Keys:
    """Keys of n images.

    Attributes:
        images: uint64 (n,), one per image; `UNKNOWN` if it cannot be read.
        files: for an image that is a part of files, such as a plane or a tile, the keys of these
            files; else ().
        in_memory: bool (n,), whether the key is of pixels though files are compared by their bytes.
    """

    images: np.ndarray
    files: list[tuple[int, ...]]
    in_memory: np.ndarray


class _Known(NamedTuple):
    """The key of an image, and the two others of `Keys`."""

    key: int
    files: tuple[int, ...] = ()
    in_memory: bool = False


@dataclass(frozen=True)
class _Position:
    """Where an image is: in ``files`` (all of them, or a ``part``), which are read as ``how`` says
    ("pixels", or one of `READERS`), or known by its ``key``."""

    files: tuple[str, ...] = ()
    part: str | None = None
    how: str = "bytes"
    key: int = UNKNOWN
    in_memory: bool = False


def content_keys(data: ImageData | ImageStream, by: str, *, quiet: bool = False) -> Keys:
    """Return the keys of all images.

    Planes and tiles are identified by the contents of their files and their position in them,
    videos by the bytes of their files, all other images as ``by`` says. The content of a volume is
    that of its decompressed file; of rasters and DICOM, it is their values, with `FILES` the bytes.

    Args:
        by: `PIXELS` or `FILES`, or one of `EARLIER`; images that are not in files are always
            compared by pixels.
        quiet: show no progress bar; else one appears after a few seconds.
    """
    if data.is_stream:
        records = (r for shard in range(len(data.shards)) for r in data.records(shard))
        result = _keys_at([_position_of(record["image"], by) for record in records], quiet)
    else:
        requested = [data.locate(i) for i in range(len(data))]
        known = {id(inner): _known_keys(inner, by) for inner, _ in requested}
        new = {(id(inner), row): (inner, row) for inner, row in requested
               if inner.row(row) not in known[id(inner)]}  # fmt: skip
        positions = [_position(inner, row, by) for inner, row in new.values()]
        for (inner, row), keys in zip(new.values(), _keys_at(positions, quiet), strict=True):
            known[id(inner)][inner.row(row)] = keys
        result = [known[id(inner)][inner.row(row)] for inner, row in requested]
    return Keys(
        np.array([key for key, _, _ in result], np.uint64), [files for _, files, _ in result],
        np.array([in_memory for _, _, in_memory in result], bool),
    )  # fmt: skip


# Images → how they are compared → row → its key, and the keys of its files.
_known: "WeakKeyDictionary[Any, dict[str, dict[int, _Known]]]" = WeakKeyDictionary()


def _known_keys(data: ImageData, by: str) -> dict[int, _Known]:
    """The keys that are known already, by row; splits of one data set share them."""
    try:
        return _known.setdefault(data.images, {}).setdefault(by, {})
    except TypeError:  # a list cannot be referred to weakly
        return {}


def _keys_at(positions: Sequence[_Position], quiet: bool) -> list[_Known]:
    jobs = dict.fromkeys((file, position.how) for position in positions for file in position.files)
    keys = dict(zip(jobs, _file_keys(list(jobs), quiet), strict=True))
    result: list[_Known] = []
    for position in positions:
        files = tuple(keys[file, position.how] for file in position.files)
        if position.part is None:
            key = files[0] if files else position.key
            result.append(_Known(key, (), position.in_memory))
        elif UNKNOWN in files:
            result.append(_Known(UNKNOWN))
        else:
            result.append(_Known(_hash(repr((sorted(files), position.part)).encode()), files))
    return result


def _position(data: ImageData, index: int, by: str) -> _Position:
    if (part := data.part(index)) is not None:
        how = "bytes" if by in EARLIER else getattr(data.images, "contents", "bytes")
        if by == FILES and how != "volume":
            how = "bytes"
        return _Position(tuple(data.paths(index)), part, how)
    try:
        if data.kind == "video":
            return replace(_position_of(data.raw(index), FILES), in_memory=False)
        return _position_of(data.raw(index), by)
    except BadImage:
        return _Position()


def _position_of(raw: Any, by: str) -> _Position:
    if isinstance(raw, str | Path):
        return _Position((str(raw),), how="pixels" if _by_pixels(by) else "bytes")
    if isinstance(raw, bytes) and not _by_pixels(by):
        return _Position(key=_hash(raw) if by in EARLIER else _hash(*sampled(raw)))
    if isinstance(raw, BadImage):
        return _Position()
    return _Position(key=pixels_key(raw), in_memory=not _by_pixels(by))


def _by_pixels(by: str) -> bool:
    return EARLIER.get(by, by) == PIXELS


def pixels_key(image: Any) -> int:
    """Return the key of an image's values: a PIL image, an array, or the bytes or path of a file.

    Grey images have the same key as images with three equal channels. A file that cannot be
    decoded is identified by its bytes.
    """
    with suppress(BadImage):
        if isinstance(image, bytes | str | Path):
            image = decode_image(image)
        values = np.asarray(clean_image(image) if isinstance(image, Image.Image) else image)
        if values.ndim == 3 and (values == values[..., :1]).all():
            values = values[..., 0]
        return _hash(f"{values.shape} {values.dtype}".encode(), np.ascontiguousarray(values))
    return _hash(*sampled(image)) if isinstance(image, bytes) else UNKNOWN


def _hash(*parts: Any) -> int:
    digest = blake2b(digest_size=KEY_BYTES)
    for part in parts:
        digest.update(part)
    return int.from_bytes(digest.digest(), "little") or 1


# ---------------------------------------------------------------- files


def _file_keys(jobs: Sequence[tuple[str, str]], quiet: bool) -> list[int]:
    """Return the keys of (file or folder, how to read it), `UNKNOWN` for a missing one."""
    with (
        closing(_Cache(len(jobs) >= CACHED_FROM)) as cache, silenced(),
        ThreadPoolExecutor(8) as pool,
    ):  # fmt: skip
        keys = pool.map(lambda job: cache.get(*job) or _file_key(*job), jobs)
        bar = tqdm(keys, "comparing images", len(jobs), unit="files", delay=3, disable=quiet)
        return cache.keep(jobs, list(bar))


def _file_key(path: str, how: str) -> int:
    try:
        if os.path.isdir(path):  # the frames of a video
            frames = (_file_key(os.path.join(path, name), "bytes") for name in images_in(path))
            return _hash(repr(list(frames)).encode())
        if how == "pixels" and (key := pixels_key(path)):
            return key
        with suppress(Exception):  # decoders raise errors of nearly any type for a broken file
            return _hash(*READERS.get(how, sampled_file)(path))
        return _hash(*sampled_file(path))
    except OSError:
        return UNKNOWN


class _Cache:
    """Keys of unchanged files in the user's cache. An unusable cache is ignored."""

    def __init__(self, used: bool):
        self.known: dict[bytes, int] = {}
        self.database: sqlite3.Connection | None = None
        self.names: dict[tuple[str, str], bytes] = {}
        if not used:
            return
        with suppress(OSError, sqlite3.Error):
            user_cache().mkdir(parents=True, exist_ok=True)
            self.database = sqlite3.connect(user_cache() / "identity.sqlite", timeout=5)
            self.database.execute("create table if not exists keys (file blob primary key, key)")
            self.known = dict(self.database.execute("select file, key from keys"))

    def _name(self, path: str, how: str) -> bytes | None:
        """A hash of the path and state of a file; None for a folder or a missing file."""
        with suppress(OSError):
            stat = os.stat(path)
            if os.path.isfile(path):
                kind = {"pixels": True, "bytes": False}.get(how, how)  # as in earlier versions
                state = (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, kind)
                text = repr((os.path.realpath(path), *state))
                return blake2b(text.encode(errors="surrogateescape"), digest_size=12).digest()
        return None

    def get(self, path: str, how: str) -> int:
        """The stored key of a file, else `UNKNOWN`."""
        if self.database is None or (name := self._name(path, how)) is None:
            return UNKNOWN
        self.names[path, how] = name
        return self.known.get(name, UNKNOWN)

    def keep(self, jobs: Sequence[tuple[str, str]], keys: list[int]) -> list[int]:
        """Store the keys that are new; return all."""
        if self.database is not None:
            new = {
                self.names[job]: key for job, key in zip(jobs, keys, strict=True)
                if job in self.names and key and self.names[job] not in self.known
            }  # fmt: skip
            with suppress(sqlite3.Error), self.database:
                self.database.executemany("insert or replace into keys values (?, ?)", new.items())
        return keys

    def close(self) -> None:
        if self.database is not None:
            self.database.close()


def how_to_compare(*sets: ImageData | ImageStream) -> str:
    """Return `PIXELS`, or `FILES` for images whose files are too large to be decoded for it."""
    total = sum(_total_bytes(data) + _bytes_of_parts(data) for data in sets)
    return PIXELS if total <= PIXELS_UP_TO else FILES


def _bytes_of_parts(data: ImageData | ImageStream) -> int:
    """The size of the files whose parts are images and that are decoded for it."""
    files: set[str] = set()
    for inner, row in map(data.locate, range(len(data))) if not data.is_stream else ():
        if getattr(inner.images, "contents", "volume") != "volume":
            files.update(inner.paths(row))
    return sum(os.path.getsize(file) for file in files if os.path.isfile(file))


def _total_bytes(data: ImageData | ImageStream) -> float:
    """Estimate the size of all files or encoded images, from 64 of them. Remote shards count as
    infinitely large: they are not read again."""
    if data.is_stream:
        try:
            return sum(os.path.getsize(shard.name) for shard in data.shards)
        except OSError:
            return math.inf
    chosen = sorted({i * len(data) // 64 for i in range(64)}) if len(data) else []
    sizes = [0]
    for inner, row in map(data.locate, chosen):
        with suppress(OSError, BadImage):
            if inner.part(row) is not None:
                continue
            raw = inner.raw(row)
            if isinstance(raw, str | Path):
                sizes.append(os.path.getsize(raw))
            elif isinstance(raw, bytes):
                sizes.append(len(raw))
    return len(data) * sum(sizes) / max(len(chosen), 1)


# ---------------------------------------------------------------- trainings


@dataclass(frozen=True, eq=False)
class TrainingRecord:
    """The images of one training.

    Attributes:
        recipe, data: name of the script, and spec of the training data, for messages.
        labels: whether it learnt from labels, masks, boxes or captions.
        by: how its keys were made; "" if its images are not recorded.
        trained, held_out: sorted keys of the images it was trained on, and of its test images.
        files: keys of the files of which it was trained on parts.
        groups: keys of the names of its training groups.
        split: "held out" if it held out images of data without splits.
    """

    recipe: str
    data: str
    labels: bool
    by: str = ""
    trained: np.ndarray = field(default_factory=lambda: _sorted(()))
    held_out: np.ndarray = field(default_factory=lambda: _sorted(()))
    files: np.ndarray = field(default_factory=lambda: _sorted(()))
    groups: np.ndarray = field(default_factory=lambda: _sorted(()))
    split: str = ""

    def same_images(self, other: "TrainingRecord") -> bool:
        """Whether two trainings used and held out the same images."""
        return (self.recipe, self.by) == (other.recipe, other.by) and all(
            np.array_equal(getattr(self, name), getattr(other, name)) for name in _ARRAYS
        )

    def record(self) -> dict[str, Any]:
        """Return the entry of encoder.json; arrays become base64, `KEY_BYTES` bytes per key."""
        values = {name: _packed(getattr(self, name)) for name in _ARRAYS}
        fields = {"recipe": self.recipe, "data": self.data, "labels": self.labels}
        more = {"by": self.by, "split": self.split, **values}
        return fields | {key: value for key, value in more.items() if value}

    @classmethod
    def of_record(cls, entry: Any) -> "TrainingRecord":
        """Read an entry of encoder.json. Raises: ValueError for another content."""
        try:
            values: dict[str, Any] = {name: _unpacked(entry.get(name, "")) for name in _ARRAYS}
            values |= {key: str(entry.get(key, "")) for key in ("recipe", "data", "by", "split")}
            return cls(labels=bool(entry["labels"]), **values)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"the record of the images that an encoder was trained on is damaged ({error!r}); "
                "copy encoder.json again from its run."
            ) from error


_ARRAYS = ("trained", "held_out", "files", "groups")


def describe_training(
    recipe: str, train: ImageData | ImageStream, test: ImageData | None = None
) -> TrainingRecord:
    """Return the record of a training.

    Args:
        test: the images that it is tested on; None for one without labels, whose images are
            recorded up to `RECORDED_UP_TO`; those of a stream if its shards are local.
    """
    if test is None and _total_bytes(train) > RECORDED_UP_TO:
        return TrainingRecord(recipe, train.name, False)
    by = how_to_compare(train, *([] if test is None else [test]))
    keys = content_keys(train, by)
    tested = () if test is None else content_keys(test, by).images
    return TrainingRecord(
        recipe, train.name, test is not None, by, _sorted(keys.images), _sorted(tested),
        _sorted([key for files in keys.files for key in files]), _sorted(_group_keys(train)),
        "held out" if test is not None and test.split == "all" else "",
    )  # fmt: skip


@dataclass
class Seen:
    """How trainings used the n images of a data set. All arrays are bool (n,).

    Attributes:
        labels: their labels, masks, boxes or captions were learnt.
        pixels: their pixels were, with or without labels.
        held_out: a training with labels held them out, and no other learnt their labels.
        copies: held out, but with a copy among the images of the same training.
        by_group: not used, but another image of their group was.
        uncompared: in memory, and a training is recorded by the bytes of its files.
        unrecorded: trainings whose images are not known.
    """

    labels: np.ndarray
    pixels: np.ndarray
    held_out: np.ndarray
    copies: np.ndarray
    by_group: np.ndarray
    uncompared: np.ndarray
    unrecorded: list[TrainingRecord] = field(default_factory=list)


def compare(
    data: ImageData | ImageStream, trainings: Sequence[TrainingRecord], *, quiet: bool = False
) -> Seen:
    """Compare images with those of trainings.

    An image that a training held out counts as not used by it, even if a copy was: the test at the
    end of that training counts it too.
    """
    keys: dict[str, Keys] = {}
    count = len(data)
    none: list[np.ndarray] = [np.zeros(count, bool) for _ in range(6)]
    seen = Seen(none[0], none[1], none[2], none[3], none[4], none[5])
    for training in trainings:
        if not training.by:
            seen.unrecorded.append(training)
            continue
        if training.by not in keys:
            keys[training.by] = content_keys(data, training.by, quiet=quiet)
        images, files = keys[training.by].images, keys[training.by].files
        known = images != UNKNOWN
        held = np.isin(images, training.held_out) & known
        among = np.isin(images, training.trained) & known
        used = among & ~held
        if len(training.files):
            parts = set(training.files.tolist())
            used |= np.array([not parts.isdisjoint(of) for of in files]) & ~held
        seen.uncompared |= keys[training.by].in_memory & ~used & ~held
        seen.pixels |= used
        if training.labels:
            seen.labels |= used
            seen.held_out |= held
            seen.copies |= held & among
            seen.by_group |= _in_used_groups(data, used, training) & ~held
    seen.held_out &= ~seen.labels
    seen.by_group &= ~seen.labels
    return seen


def _in_used_groups(
    data: ImageData | ImageStream, used: np.ndarray, training: TrainingRecord
) -> np.ndarray:
    """Whether the group of an image was used: another image of it, or its name in a table."""
    if data.is_stream or (groups := data.groups) is None:
        return np.zeros(len(data), bool)
    names = {group for group, was_used in zip(groups, used, strict=True) if was_used and group}
    named = np.isin(np.array(_group_keys(data, each=True), np.uint64), training.groups)
    return np.array([group in names for group in groups], bool) | named


def _group_keys(data: ImageData | ImageStream, each: bool = False) -> list[int]:
    """Keys of the groups' names, of distinct ones unless ``each``. Names that a source numbers, or
    takes from ids or files, say nothing about other data; they are left out (`UNKNOWN` with
    ``each``)."""
    if data.is_stream or data.groups is None:
        return []
    named = "group=" in data.name or data.name.startswith("memory:")
    if data.name.startswith("dicom:") or not named:
        return [UNKNOWN] * len(data) if each else []
    pairs = zip(data.groups, data.ids, strict=True)
    groups = ["" if group == id else group for group, id in pairs]
    if not each:
        groups = list(dict.fromkeys(groups))
    return [_hash(group.encode(errors="surrogateescape")) if group else UNKNOWN for group in groups]


def _sorted(keys: Any) -> np.ndarray:
    return np.setdiff1d(np.asarray(keys, np.uint64), np.array([UNKNOWN], np.uint64))


def _packed(keys: np.ndarray) -> str:
    values = keys.astype("<u8").view(np.uint8).reshape(-1, 8)[:, :KEY_BYTES]
    return base64.b64encode(values.tobytes()).decode()


def _unpacked(text: str) -> np.ndarray:
    values = np.frombuffer(base64.b64decode(text, validate=True), np.uint8).reshape(-1, KEY_BYTES)
    return np.pad(values, ((0, 0), (0, 8 - KEY_BYTES))).reshape(-1).view("<u8").astype(np.uint64)
