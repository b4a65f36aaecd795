"""Webdataset shards: tar files in which a sample's files stand side by side under one name.

    a/0001.jpg  a/0001.cls  a/0001.txt  a/0001.json      the sample a/0001

They are read with Python's `tarfile`, and nothing in them is ever executed: an image, ``cls`` (a
whole number), ``txt`` (the caption) and ``json`` are looked at, all other files are passed over.
"""

import glob
import json
import os
import re
import tarfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import blake2b
from itertools import product
from typing import Any

from vim_ssl.data.images import EXTENSIONS, BadImage
from vim_ssl.data.loading.streamed import (
    RETRIES,
    ImageStream,
    Shard,
    file_name,
    is_remote,
    open_file,
)
from vim_ssl.data.spec import DataSpec
from vim_ssl.utils.files import atomic_write, user_cache

IMAGES = tuple(extension[1:] for extension in EXTENSIONS)
KINDS = {"wds": "*.tar", "parquet": "*.parquet"}  # what is read of a folder, by scheme
END_MARK = bytes(tarfile.BLOCKSIZE)
MAX_FILE = 2**28  # bytes of an image, caption or json; the largest that are read
THREADS = 16  # shards looked at together; most of the time is waiting


@dataclass(frozen=True)
class TarReader:
    """A tar's name → its samples. ``image``, ``label`` and ``caption`` name extensions; the last
    two also fields of the json. ``label="none"`` leaves labels out."""

    image: str | None = None
    label: str | None = None
    caption: str | None = None

    def __call__(self, name: str) -> Iterator[dict[str, Any]]:
        with open_tar(name) as tar:
            for key, files in self.samples(tar):
                yield self._record(f"{file_name(name)}/{key}", files)

    def samples(
        self, tar: tarfile.TarFile, read: bool = True, others: Counter | None = None
    ) -> Iterator[tuple[str, dict[str, bytes]]]:
        """Names and files (empty unless to be read) of the samples that have an image.

        ``others`` counts the extensions passed over. Of a damaged tar the samples before the damage
        come, then tarfile's error.
        """
        now = ""
        files: dict[str, bytes] = {}
        try:
            for member in tar:
                folder, slash, file = member.name.rpartition("/")
                stem, _, extension = file.partition(".")
                if not stem:  # hidden files, as macOS adds them between a sample's own
                    continue
                key, extension = folder + slash + stem, extension.lower()
                if key != now or extension in files:
                    if self._image(files):
                        yield now, files
                    now, files = key, {}
                if not member.isreg():
                    continue
                if extension in self._wanted():
                    files[extension] = _content(tar, member) if read else b""
                elif others is not None:
                    others[extension or "without extension"] += 1
        except CutOffError:  # between two files: what was read is whole
            if self._image(files):
                yield now, files
            raise
        if self._image(files):
            yield now, files

    def _wanted(self) -> tuple[str | None, ...]:
        return (*IMAGES, "cls", "txt", "json", self.image, self.label, self.caption)

    def _image(self, files: dict[str, bytes]) -> str | None:
        if self.image:
            return self.image if self.image in files else None
        return next((extension for extension in files if extension in IMAGES), None)

    def _record(self, name: str, files: dict[str, bytes]) -> dict[str, Any]:
        record: dict[str, Any] = {"id": name, "image": files[self._image(files) or ""]}
        try:
            meta = json.loads(files["json"]) if "json" in files else None
            if isinstance(meta, dict):
                record["meta"] = meta
            for key, default in (("label", "cls"), ("caption", "txt")):
                field = getattr(self, key) or default
                value = None
                if field in files:
                    value = files[field].decode().strip()
                elif isinstance(meta, dict):
                    value = meta.get(field)
                if value is not None and field != "none":
                    several = isinstance(value, list)  # captions, of which one is drawn
                    record[key] = int(value) if key == "label" else value if several else str(value)
        except Exception as error:  # whatever stands where a number was expected
            fault = f"its label, caption or json cannot be read ({error}); label=none leaves it out"
            record["image"] = BadImage(name, fault)
        return record


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """A file of a tar; nothing (so a broken image) where it would fill the memory: a header can
    promise any size, and a sparse file holds it in a few bytes."""
    if member.size > MAX_FILE or member.issparse():
        return b""
    content = tar.extractfile(member)
    return content.read() if content else b""


def stream_tars(spec: DataSpec) -> ImageStream:
    """Open ``wds:PATTERN``: a tar, a folder of tars, a glob, a brace range such as
    ``shard-{000..099}.tar``, or such a range of URLs (http, or hf://, s3:// … through fsspec).

    The samples of local tars are counted once from their headers; for remote ones a webdataset's
    ``sizes.json`` beside the shards spares reading all of them once. Counts are cached. A tar that
    is cut off or damaged gives the samples before the damage.

    Raises: FileNotFoundError for a pattern that matches nothing; ConnectionError when a shard's
        host is not reached; ValueError when the shards hold no image.
    """
    spec.takes("image", "label", "caption", "streaming")
    if spec.split not in (None, "all"):
        raise ValueError(
            f"wds:{spec.location} has no splits; name the shards of {spec.split!r} by the pattern."
        )
    names = expand(spec.location)
    reader = TarReader(spec.image, spec.label, spec.caption)
    shards, faults, others = count_shards(names, reader)
    if not any(shard.count for shard in shards):
        held = ", ".join(f"{count} × {extension}" for extension, count in others.most_common(5))
        wanted = spec.image or "jpg, png, webp …"
        raise ValueError(
            f"The {len(names)} shard(s) of wds:{spec.location} hold no image ({wanted}); they "
            f"hold {held or 'nothing else'}. {' '.join(faults[:3])}".strip()
        )
    return ImageStream(shards, reader, name=str(spec), faults=faults)


def expand(pattern: str, scheme: str = "wds") -> list[str]:
    """The files that a pattern of a scheme names, in order; of a folder, those of its kind.

    Raises: FileNotFoundError.
    """
    parts = re.split(r"\{([^{}]*)\}", pattern)
    choices = [_choices(part) if i % 2 else [part] for i, part in enumerate(parts)]
    names: list[str] = []
    for name in map("".join, product(*choices)):
        if is_remote(name):
            names.append(name)
            continue
        path = os.path.expanduser(name)
        if os.path.isdir(path):
            path = os.path.join(glob.escape(path), KINDS[scheme])
        found = [path] if os.path.isfile(path) else sorted(glob.glob(path, recursive=True))
        if not found:
            raise FileNotFoundError(f"{scheme}:{pattern}: there is no file {path!r}.")
        names += found
    return list(dict.fromkeys(names))


def _choices(inside: str) -> list[str]:
    """``000..003`` or ``a,b`` between braces."""
    if match := re.fullmatch(r"(\d+)\.\.(\d+)", inside):
        first, last = match.groups()
        return [str(i).zfill(len(first)) for i in range(int(first), int(last) + 1)]
    return inside.split(",")


# ---------------------------------------------------------------- counting


def count_shards(
    names: list[str], reader: TarReader
) -> tuple[list[Shard], list[str], Counter[str]]:
    """The shards with their counts, what is wrong with which, and what else they hold."""
    key = blake2b(repr((names, reader.image)).encode(), digest_size=12).hexdigest()
    cache = user_cache() / "shards" / f"{key}.json"
    known: dict[str, Any] = {}
    with suppress(OSError, ValueError):
        known = json.loads(cache.read_text())
    sizes = {folder: _sizes(folder) for folder in {n.rpartition("/")[0] for n in names}}

    def look(name: str) -> dict[str, Any]:
        folder, _, file = name.rpartition("/")
        if file in sizes[folder]:
            return {"count": sizes[folder][file], "stamp": ["", ""], "fault": "", "others": {}}
        stamp = _stamp(name)
        before = known.get(name, {})
        if before.get("stamp") == stamp and not (is_remote(name) and before["fault"]):
            return before
        return {**count(name, reader), "stamp": stamp}

    with ThreadPoolExecutor(THREADS) as pool:
        found = dict(zip(names, pool.map(look, names), strict=True))
    if found != known:
        with suppress(OSError):  # a cache that cannot be written is no reason to stop
            cache.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(cache, json.dumps(found))
    others: Counter[str] = Counter()
    for row in found.values():
        others.update(row["others"])
    shards = [Shard(name, row["count"], row["stamp"][0]) for name, row in found.items()]
    return shards, [row["fault"] for row in found.values() if row["fault"]], others


def count(name: str, reader: TarReader) -> dict[str, Any]:
    """One pass over a tar's headers; of a remote one that breaks off, another. Raises:
    ConnectionError."""
    for attempt in range(RETRIES if is_remote(name) else 0):
        try:
            return _count(name, reader)
        except ConnectionError:
            time.sleep(2 ** (attempt + 1))
    return _count(name, reader)


def _count(name: str, reader: TarReader) -> dict[str, Any]:
    samples, fault = 0, ""
    others: Counter[str] = Counter()
    try:
        with open_tar(name) as tar:
            for _ in reader.samples(tar, read=False, others=others):
                samples += 1
    except PermissionError:
        raise
    except Exception as error:  # a damaged file makes readers raise nearly anything
        if is_remote(name) and not isinstance(error, tarfile.TarError):
            raise ConnectionError(f"{name} could not be read: {error}") from error
        fault = f"{type(error).__name__}: {error}"
    if fault:
        fault = f"{name} is damaged after {samples} samples, which are used ({fault})"
    return {"count": samples, "fault": fault, "others": dict(others)}


def _stamp(name: str) -> list[str]:
    """Size, and time or tag: what changes with the file. The size stays when it is copied."""
    if not is_remote(name):
        found = os.stat(name)
        return [str(found.st_size), str(found.st_mtime_ns)]
    try:
        with open_file(name) as file:
            headers = getattr(file, "headers", {})
            size = headers.get("Content-Length") or getattr(file, "size", "")
            return [str(size), headers.get("ETag") or headers.get("Last-Modified") or ""]
    except OSError as error:
        raise ConnectionError(f"{name} could not be opened: {error}") from error


def _sizes(folder: str) -> dict[str, int]:
    """A remote webdataset's own list of counts, if there is one: file name → samples."""
    if is_remote(folder):
        with suppress(Exception), open_file(f"{folder}/sizes.json") as file:
            counts = dict(json.loads(file.read()))
            return {name: int(count) for name, count in counts.items()}
    return {}


@contextmanager
def open_tar(name: str) -> Iterator[tarfile.TarFile]:
    """A tar, plain or compressed; a local one is searched, a remote one read from front to back."""
    with open_file(name) as file:
        mode = "r|*" if is_remote(name) else "r:*"
        with tarfile.open(  # type: ignore[call-overload]
            fileobj=file, mode=mode, tarinfo=WholeHeader
        ) as tar:
            yield tar


class CutOffError(tarfile.ReadError):
    """A tar ends where a header should stand."""


class WholeHeader(tarfile.TarInfo):
    """A tar's headers up to its end mark. tarfile takes one that is broken or cut off for the end
    of the tar, in silence, and one of negative size (in Python 3.11) for the way back."""

    @classmethod
    def frombuf(cls, buf, encoding, errors):
        header = super().frombuf(buf, encoding, errors)
        if header.size < 0:
            raise tarfile.InvalidHeaderError("negative size")  # type: ignore[attr-defined]
        return header

    @classmethod
    def fromtarfile(cls, tar):
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise CutOffError(f"no end mark, but {error}: cut off?") from error
