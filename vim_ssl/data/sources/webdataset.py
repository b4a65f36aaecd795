"""``wds:``: webdataset shards: tar files in which the files of a sample share a name and are
adjacent.

    a/0001.jpg  a/0001.cls  a/0001.txt  a/0001.json      the sample a/0001

Python's `tarfile` reads them; nothing in them is executed. The image, ``cls`` (an integer), ``txt``
(the caption) and ``json`` are used, all other files are skipped.
"""

import io
import json
import os
import re
import tarfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import blake2b
from itertools import product
from typing import Any

from vim_ssl.data.formats import pass_over_others
from vim_ssl.data.images import EXTENSIONS, BadImage
from vim_ssl.data.loading.streamed import (
    RETRIES,
    ImageStream,
    Shard,
    file_name,
    is_remote,
    open_file,
)
from vim_ssl.data.open import warn_once
from vim_ssl.data.passed_over import add_warning, pass_over
from vim_ssl.data.registry import source
from vim_ssl.data.spec import DataSpec, splits_of_files
from vim_ssl.data.values import name_of, whole_number_of
from vim_ssl.data.walk import HIDDEN, is_hidden, list_files, match_paths
from vim_ssl.utils.files import atomic_write, decode_text, user_cache

IMAGES = tuple(extension[1:] for extension in EXTENSIONS)
TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
KINDS = {"wds": TARS, "parquet": (".parquet",)}  # endings of files read from a folder, by scheme
DEREFERENCE = "pack the files themselves, with tar --dereference --hard-dereference"
# What is reported of a tar, by kind.
FAULTS = {
    "alone": "labels, captions or json files have no image beside them and are lost; the files of "
    "a sample must have one name and follow each other",
    "images": "samples have several images, of which the first in the tar is read; choose one by "
    "its extension with image=",
    "twice": "samples have the name of an earlier sample of their tar",
    "dots": "images are not read, because a name ends at its first dot; rename them",
    "outside": "files are skipped, because their names are absolute or contain '..'",
    "links": f"files are links, which are not followed in compressed or remote tars; {DEREFERENCE}",
    "empty": "shards contain no sample",
}
Content = bytes | BadImage
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
        self, tar: tarfile.TarFile, read: bool = True, tally: "Tally | None" = None
    ) -> Iterator[tuple[str, dict[str, Content]]]:
        """Yield names and files of the samples that have an image.

        Args:
            read: read the files; otherwise their content is empty.
            tally: what is skipped, updated in place.
        Raises: tarfile's error for a damaged tar, after the samples before the damage.
        """
        tally = tally or Tally()
        now = ""
        files: dict[str, Content] = {}
        try:
            for member in tar:
                if tally.is_skipped(member):
                    continue
                folder, slash, file = member.name.rpartition("/")
                stem, _, extension = file.partition(".")
                key, extension = folder + slash + stem, extension.lower()
                if key != now or extension in files:
                    if self._is_sample(now, files, tally):
                        yield now, files
                    now, files = key, {}
                if extension in self._used():
                    tally.check_link(tar, member)
                    files[extension] = _content(tar, member) if read else b""
                else:
                    tally.pass_over(member.name, extension)
        except CutOffError:  # cut off between two files: this sample is complete
            if self._is_sample(now, files, tally):
                yield now, files
            raise
        if self._is_sample(now, files, tally):
            yield now, files

    def _is_sample(self, name: str, files: Mapping[str, Content], tally: "Tally") -> bool:
        is_sample = self._image(files) is not None
        tally.add_sample(name, files, is_sample, choose=self.image is None)
        return is_sample

    def _used(self) -> tuple[str | None, ...]:
        return (*IMAGES, "cls", "txt", "json", self.image, self.label, self.caption)

    def _image(self, files: Mapping[str, Content]) -> str | None:
        if self.image:
            return self.image if self.image in files else None
        return next((extension for extension in files if extension in IMAGES), None)

    def _record(self, name: str, files: Mapping[str, Content]) -> dict[str, Any]:
        record: dict[str, Any] = {"id": name, "image": files[self._image(files) or ""]}
        try:
            meta = json.loads(_text(files, "json")) if "json" in files else None
            if isinstance(meta, dict):
                record["meta"] = meta
            for key, default in (("label", "cls"), ("caption", "txt")):
                field = getattr(self, key) or default
                value: Any = None
                if field in files:
                    value = _text(files, field).strip()
                elif isinstance(meta, dict):
                    value = meta.get(field)
                if key == "label" and field != "none":
                    value = whole_number(value)
                if value is not None and field != "none":
                    several = isinstance(value, list)  # captions, of which one is drawn
                    record[key] = value if several or key == "label" else str(value)
        except Exception as error:  # for example text instead of a number
            fault = f"its label, caption or json cannot be read ({error}); label=none ignores it"
            record["image"] = BadImage(name, fault)
        return record


def whole_number(label: Any) -> int | None:
    """Return a label as the number of its class; None if it is missing. Raises: ValueError for
    anything but a whole number."""
    name = repr(label) if isinstance(label, bool | list | dict) else name_of(label)
    if name is None:
        return None
    number = whole_number_of(name)
    if number is None:
        raise ValueError(f"the label {label!r} is not a whole number")
    return number


def _text(files: Mapping[str, Content], extension: str) -> str:
    content = files[extension]
    if isinstance(content, BadImage):
        raise content
    return decode_text(content, f".{extension}")


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> Content:
    """Read a file of a tar. Return b"" (a broken image) for a huge or sparse file: a header can
    declare any size, and a sparse file can have it with only a few bytes stored. A link is followed
    within a tar that is a plain local file."""
    if member.islnk() or member.issym():
        if not _can_follow(tar):
            return BadImage(member.name, f"it is a link to {member.linkname}; {DEREFERENCE}")
        try:
            with tar.extractfile(member) as file:  # type: ignore[union-attr]
                return file.read(MAX_FILE)
        except Exception:  # a missing target, or a circle
            return BadImage(member.name, f"it is a link to {member.linkname}, not in the tar")
    if member.size > MAX_FILE or member.issparse():
        return b""
    content = tar.extractfile(member)
    return content.read() if content else b""


def _can_follow(tar: tarfile.TarFile) -> bool:
    return isinstance(tar.fileobj, io.BufferedReader)


class Tally:
    """Counts what is skipped in a tar, or doubtful, and keeps an example of each kind.

    Attributes:
        others: extension → number of files that are not used.
        faults: key of `FAULTS` → its number, and an example.
    """

    def __init__(self) -> None:
        self.others: Counter[str] = Counter()
        self.faults: dict[str, tuple[int, str]] = {}
        self._names: set[str] = set()

    def add(self, kind: str, example: str) -> None:
        count, first = self.faults.get(kind, (0, example))
        self.faults[kind] = count + 1, first

    def is_skipped(self, member: tarfile.TarInfo) -> bool:
        """Whether a member is a folder, a hidden file, as macOS adds between those of a sample, or
        has a name outside of the tar."""
        if not (member.isreg() or member.islnk() or member.issym()):
            return True
        parts = member.name.split("/")
        if ".." in parts or parts[0] == "":
            self.add("outside", member.name)
            return True
        if any(is_hidden(part) for part in parts if part != "."):
            self.others[HIDDEN] += 1
            return True
        return False

    def check_link(self, tar: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        if (member.islnk() or member.issym()) and not _can_follow(tar):
            self.add("links", member.name)

    def pass_over(self, name: str, extension: str) -> None:
        self.others[extension or "without extension"] += 1
        if extension.rpartition(".")[2] in IMAGES and not _is_second_image(extension):
            self.add("dots", name)

    def add_sample(
        self, name: str, files: Mapping[str, Content], is_sample: bool, choose: bool
    ) -> None:
        """Count a sample, or files without an image beside them.

        Args:
            choose: whether the image is the first one of the sample.
        """
        if not is_sample:
            for extension in files:
                self.add("alone", f"{name}.{extension}")
        elif name in self._names:
            self.add("twice", name)
        elif choose and sum(extension in IMAGES for extension in files) > 1:
            self.add("images", name)
        else:
            self._names.add(name)


def _is_second_image(extension: str) -> bool:
    """Whether an extension such as "seg.png" names a further image of a sample, not a part of its
    name, such as "001.jpg"."""
    return extension.partition(".")[0].isalpha()


@source("wds", stream=True, options=("image", "label", "caption", "streaming"))
def stream_tars(spec: DataSpec) -> ImageStream:
    """Open ``wds:PATTERN``: a tar, a folder of tars, a glob, a brace range such as
    ``shard-{000..099}.tar``, or such a range of URLs (http, or hf://, s3:// … through fsspec).

    Samples are counted once from the tar headers, and the counts are cached; for remote shards, a
    ``sizes.json`` beside them is used if it exists. A truncated or damaged tar gives the samples
    before the damage. ``faults`` names these, and counts files without an image beside them, names
    that occur twice, and links that cannot be followed.

    Raises: FileNotFoundError for a pattern without a match; ConnectionError for an unreachable
        host; ValueError for shards without an image.
    """
    if spec.split not in (None, "all"):
        raise ValueError(
            f"wds:{spec.location} has no splits; use a pattern that matches the shards of "
            f"{spec.split!r}."
        )
    names = expand(spec.location)
    splits = sorted(set(splits_of_files(names)) - {""})
    if len(splits) > 1 and spec.split != "all":
        add_warning(
            f"the shards of {' and '.join(splits)} are all read; use a pattern that matches those "
            "of one split, or add split=all"
        )
    reader = TarReader(spec.image, spec.label, spec.caption)
    shards, faults, others = count_shards(names, reader)
    if not any(shard.count for shard in shards):
        held = ", ".join(f"{count} × {extension}" for extension, count in others.most_common(5))
        expected = spec.image or "jpg, png, webp …"
        raise ValueError(
            f"The {len(names)} shard(s) of wds:{spec.location} contain no image ({expected}); they "
            f"contain {held or 'no other files'}. {' '.join(faults[:3])}".strip()
        )
    if hidden := others.pop(HIDDEN, 0):
        pass_over(HIDDEN, hidden)
    pass_over_others({f".{extension}": count for extension, count in others.items()}, {})
    return ImageStream(shards, reader, name=str(spec), faults=faults)


def expand(pattern: str, scheme: str = "wds") -> list[str]:
    """Return the files that a pattern matches, in order; for a folder, those of the scheme's kind.

    Raises: FileNotFoundError.
    """
    if os.path.isfile(os.path.expanduser(pattern)):  # also a name with braces or brackets
        return [os.path.expanduser(pattern)]
    parts = re.split(r"\{([^{}]*)\}", pattern)
    choices = [_choices(part) if i % 2 else [part] for i, part in enumerate(parts)]
    names: list[str] = []
    for name in map("".join, product(*choices)):
        if is_remote(name):
            names.append(name)
            continue
        path = os.path.expanduser(name)
        if os.path.isdir(path):
            files = [os.path.join(path, file) for file in list_files(path, KINDS[scheme])]
            path = os.path.join(path, f"*{KINDS[scheme][0]}")
        else:
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
    used = reader.image, reader.label, reader.caption
    key = blake2b(repr((names, used, "tally")).encode(), digest_size=12).hexdigest()
    cache = user_cache() / "shards" / f"{key}.json"
    known: dict[str, Any] = {}
    with suppress(OSError, TypeError, ValueError):
        known = dict(json.loads(cache.read_text(encoding="utf-8")))
    sizes = {folder: _sizes(folder) for folder in {n.rpartition("/")[0] for n in names}}

    def look(name: str) -> dict[str, Any]:
        folder, _, file = name.rpartition("/")
        if file in sizes[folder]:
            return {
                "count": sizes[folder][file], "stamp": ["", ""], "fault": "", "others": {},
                "faults": {},
            }  # fmt: skip
        stamp = _stamp(name)
        before = known.get(name, {})
        if before.get("stamp") == stamp and not (is_remote(name) and before["fault"]):
            return before
        if is_remote(name):
            warn_once(
                f"wds:{folder or name}: without a sizes.json beside them (file name: number of "
                "samples), remote shards are read whole once to count their samples."
            )
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
    damaged = [row["fault"] for row in rows.values() if row["fault"]]
    return shards, [*damaged, *_faults(rows)], others


def _faults(rows: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Describe the faults of all shards, one line for each kind."""
    for kind, text in FAULTS.items():
        counts = {file_name(name): row["faults"][kind]
                 for name, row in rows.items() if kind in row["faults"]}  # fmt: skip
        if counts:
            name, (_, example) = next(iter(counts.items()))
            where = "/".join(filter(None, (name, example)))
            yield f"{sum(n for n, _ in counts.values()):,} {text}, for example {where}"


def count(name: str, reader: TarReader) -> dict[str, Any]:
    """Count a tar's samples from its headers; retry a remote tar. Raises: ConnectionError."""
    for attempt in range(RETRIES if is_remote(name) else 0):
        try:
            return _count(name, reader)
        except ConnectionError:
            time.sleep(2 ** (attempt + 1))
    return _count(name, reader)


def _count(name: str, reader: TarReader) -> dict[str, Any]:
    samples, fault, tally = 0, "", Tally()
    try:
        with open_tar(name) as tar:
            for _ in reader.samples(tar, read=False, tally=tally):
                samples += 1
    except PermissionError:
        raise
    except Exception as error:  # readers raise errors of nearly any type for a damaged file
        if is_remote(name) and not isinstance(error, tarfile.TarError):
            raise ConnectionError(f"{name} cannot be read: {error}") from error
        fault = f"{type(error).__name__}: {error}"
    if fault:
        fault = f"{name} is damaged after {samples} samples, which are used ({fault})"
    elif not samples:
        tally.add("empty", "")
    return {
        "count": samples, "fault": fault, "others": dict(tally.others), "faults": tally.faults,
    }  # fmt: skip


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
    """Read a remote webdataset's sample counts, if it lists them: file name → samples. They are in
    ``sizes.json``, or in ``index.json``, as the wids of webdataset writes it."""
    if is_remote(folder):
        with suppress(Exception), open_file(f"{folder}/sizes.json") as file:
            counts = dict(json.loads(decode_text(file.read(), "sizes.json")))
            return {name: int(count) for name, count in counts.items()}
        with suppress(Exception), open_file(f"{folder}/index.json") as file:
            shards = json.loads(decode_text(file.read(), "index.json"))["shardlist"]
            return {file_name(shard["url"]): int(shard["nsamples"]) for shard in shards}
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
