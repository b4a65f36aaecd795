"""``wds:``: webdataset shards: tar files in which the files of a sample share a name and are
adjacent.

    a/0001.jpg  a/0001.cls  a/0001.txt  a/0001.json      the sample a/0001

Python's `tarfile` reads them; nothing in them is executed. The image, ``cls`` (an integer), ``txt``
(the caption) and ``json`` are used, all other files are skipped.
"""

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
from vim_ssl.data.registry import source
from vim_ssl.data.spec import DataSpec
from vim_ssl.data.walk import match_paths
from vim_ssl.utils.files import atomic_write, user_cache

IMAGES = tuple(extension[1:] for extension in EXTENSIONS)
KINDS = {"wds": "*.tar", "parquet": "*.parquet"}  # files read from a folder, by scheme
END_MARK = bytes(tarfile.BLOCKSIZE)
MAX_FILE = 2**28  # bytes; larger images, captions or json files are not read
THREADS = 16  # shards counted in parallel; most of the time is waiting


@dataclass(frozen=True)
class TarReader:
    """Reads the samples of a tar, given its name.

    Attributes:
        image, label, caption: file extensions; label and caption can also be fields of the json.
            ``label="none"`` ignores labels.
    """

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
        """Yield names and files of the samples that have an image.

        Args:
            read: read the files; otherwise their content is empty.
            others: a counter of skipped extensions, updated in place.
        Raises: tarfile's error for a damaged tar, after the samples before the damage.
        """
        now = ""
        files: dict[str, bytes] = {}
        try:
            for member in tar:
                folder, slash, file = member.name.rpartition("/")
                stem, _, extension = file.partition(".")
                if not stem:  # hidden files, which macOS adds between those of a sample
                    continue
                key, extension = folder + slash + stem, extension.lower()
                if key != now or extension in files:
                    if self._image(files):
                        yield now, files
                    now, files = key, {}
                if not member.isreg():
                    continue
                if extension in self._used():
                    files[extension] = _content(tar, member) if read else b""
                elif others is not None:
                    others[extension or "without extension"] += 1
        except CutOffError:  # cut off between two files: this sample is complete
            if self._image(files):
                yield now, files
            raise
        if self._image(files):
            yield now, files

    def _used(self) -> tuple[str | None, ...]:
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
        except Exception as error:  # for example text instead of a number
            fault = f"its label, caption or json cannot be read ({error}); label=none ignores it"
            record["image"] = BadImage(name, fault)
        return record


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """Read a file of a tar. Return b"" (a broken image) for a huge or sparse file: a header can
    declare any size, and a sparse file can have it with only a few bytes stored."""
    if member.size > MAX_FILE or member.issparse():
        return b""
    content = tar.extractfile(member)
    return content.read() if content else b""


@source("wds", stream=True, options=("image", "label", "caption", "streaming"))
def stream_tars(spec: DataSpec) -> ImageStream:
    """Open ``wds:PATTERN``: a tar, a folder of tars, a glob, a brace range such as
    ``shard-{000..099}.tar``, or such a range of URLs (http, or hf://, s3:// … through fsspec).

    Samples are counted once from the tar headers, and the counts are cached; for remote shards, a
    ``sizes.json`` beside them is used if it exists. A truncated or damaged tar gives the samples
    before the damage.

    Raises: FileNotFoundError for a pattern without a match; ConnectionError for an unreachable
        host; ValueError for shards without an image.
    """
    if spec.split not in (None, "all"):
        raise ValueError(
            f"wds:{spec.location} has no splits; use a pattern that matches the shards of "
            f"{spec.split!r}."
        )
    names = expand(spec.location)
    reader = TarReader(spec.image, spec.label, spec.caption)
    shards, faults, others = count_shards(names, reader)
    if not any(shard.count for shard in shards):
        held = ", ".join(f"{count} × {extension}" for extension, count in others.most_common(5))
        expected = spec.image or "jpg, png, webp …"
        raise ValueError(
            f"The {len(names)} shard(s) of wds:{spec.location} contain no image ({expected}); they "
            f"contain {held or 'no other files'}. {' '.join(faults[:3])}".strip()
        )
    return ImageStream(shards, reader, name=str(spec), faults=faults)


def expand(pattern: str, scheme: str = "wds") -> list[str]:
    """Return the files that a pattern matches, in order; for a folder, those of the scheme's kind.

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
            path = os.path.join(path, KINDS[scheme])
        files = match_paths(path)
        if not files:
            raise FileNotFoundError(f"{scheme}:{pattern}: no file matches {path!r}.")
        names += files
    return list(dict.fromkeys(names))


def _choices(inside: str) -> list[str]:
    """Expand what stands between braces: ``000..003`` or ``a,b``."""
    if match := re.fullmatch(r"(\d+)\.\.(\d+)", inside):
        first, last = match.groups()
        return [str(i).zfill(len(first)) for i in range(int(first), int(last) + 1)]
    return inside.split(",")


# ---------------------------------------------------------------- counting


def count_shards(
    names: list[str], reader: TarReader
) -> tuple[list[Shard], list[str], Counter[str]]:
    """Return the shards with their counts, the faults, and the number of other files by extension.

    Counts are cached by the names of the shards.
    """
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
        rows = dict(zip(names, pool.map(look, names), strict=True))
    if rows != known:
        with suppress(OSError):  # the cache is optional
            cache.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(cache, json.dumps(rows))
    others: Counter[str] = Counter()
    for row in rows.values():
        others.update(row["others"])
    shards = [Shard(name, row["count"], row["stamp"][0]) for name, row in rows.items()]
    return shards, [row["fault"] for row in rows.values() if row["fault"]], others


def count(name: str, reader: TarReader) -> dict[str, Any]:
    """Count a tar's samples from its headers; retry a remote tar. Raises: ConnectionError."""
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
    except Exception as error:  # readers raise errors of nearly any type for a damaged file
        if is_remote(name) and not isinstance(error, tarfile.TarError):
            raise ConnectionError(f"{name} cannot be read: {error}") from error
        fault = f"{type(error).__name__}: {error}"
    if fault:
        fault = f"{name} is damaged after {samples} samples, which are used ({fault})"
    return {"count": samples, "fault": fault, "others": dict(others)}


def _stamp(name: str) -> list[str]:
    """Return the size of a file (the same for copies), and its modification time or ETag."""
    if not is_remote(name):
        stat = os.stat(name)
        return [str(stat.st_size), str(stat.st_mtime_ns)]
    try:
        with open_file(name) as file:
            headers = getattr(file, "headers", {})
            size = headers.get("Content-Length") or getattr(file, "size", "")
            return [str(size), headers.get("ETag") or headers.get("Last-Modified") or ""]
    except OSError as error:
        raise ConnectionError(f"{name} cannot be opened: {error}") from error


def _sizes(folder: str) -> dict[str, int]:
    """Read a remote webdataset's sample counts, if it lists them: file name → samples."""
    if is_remote(folder):
        with suppress(Exception), open_file(f"{folder}/sizes.json") as file:
            counts = dict(json.loads(file.read()))
            return {name: int(count) for name, count in counts.items()}
    return {}


@contextmanager
def open_tar(name: str) -> Iterator[tarfile.TarFile]:
    """Open a tar, plain or compressed; a remote tar can only be read sequentially."""
    with open_file(name) as file:
        mode = "r|*" if is_remote(name) else "r:*"
        with tarfile.open(  # type: ignore[call-overload]
            fileobj=file, mode=mode, tarinfo=WholeHeader
        ) as tar:
            yield tar


class CutOffError(tarfile.ReadError):
    """A tar ends where a header is expected."""


class WholeHeader(tarfile.TarInfo):
    """A tar header that must be followed by others or the end mark. tarfile itself silently ends at
    a broken or truncated header, and (in Python 3.11) seeks backwards for a negative size."""

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
            raise CutOffError(f"no end mark, but {error}: truncated?") from error
