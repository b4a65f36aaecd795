"""Open the images that a spec string names."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, overload

from vim_ssl.data.dataset import ImageData, join
from vim_ssl.data.images import BadImage, decode_image, has_many_bits
from vim_ssl.data.loading.streamed import ImageStream
from vim_ssl.data.pages import PAGES, count_pages, some_of
from vim_ssl.data.passed_over import PassedOver
from vim_ssl.data.ranges import LOOKED_AT, levels_of, narrow
from vim_ssl.data.registry import Splits, find_opener, stream_schemes
from vim_ssl.data.spec import DataSpec, canonical_split, parse_spec, sets_of

log = logging.getLogger(__name__)

WARNED = 5  # maximum number of faults that are listed in warnings


@overload
def open_data(spec: str | Path, *, split: str | None = None) -> ImageData: ...


@overload
def open_data(
    spec: str | Path, *, split: str | None = None, streams: bool
) -> ImageData | ImageStream: ...


def open_data(
    spec: str | Path, *, split: str | None = None, streams: bool = False
) -> ImageData | ImageStream:
    """Open images: a folder's path, ``hf:owner/name[:config]``, ``csv:file.csv``, ``wds:shards``
    and the other schemes of `vim_ssl.data.registry.SOURCES`.

    Args:
        spec: ``SCHEME:LOCATION?key=value&...``; see `DataSpec` for the keys. Several specs joined
            by " + " are read as one set without labels; a factor repeats a set: ``A + 20 * B``;
            see `join`.
        split: open this split instead of the spec's; "all" opens all images. The default is the
            training split, if the source has splits.
        streams: accept images that are read in order: ``wds:`` and ``streaming=true``.
    Returns: the images by index, or a stream if the spec names one.
    Raises: ValueError for a spec that does not fit the source; FileNotFoundError for missing data.
    """
    if isinstance(spec, str) and len(joined := sets_of(spec)) > 1:
        counts, parts = zip(*joined, strict=True)
        if stream := next((part for part in parts if _is_stream(part)), None):
            raise ValueError(f"{spec!r}: {stream} is a stream; only indexed data can be joined.")
        opened = [open_data(str(part), split=split) for part in parts]
        return join([data for data, n in zip(opened, counts, strict=True) for _ in range(n)])
    parsed = parse_spec(spec)
    if split is not None:
        parsed = replace(parsed, split=split)
    opener = find_opener(parsed.scheme)
    if parsed.streaming or opener is None:
        return _open_stream(parsed, streams)
    return finished(opener(parsed), parsed)


@dataclass(frozen=True)
class Source:
    """An open source.

    Attributes:
        splits: names of the splits; empty if the source has none.
        open: opens one of these splits, "all", or, for None, the spec's split; see `open_data`.
    """

    splits: Sequence[str]
    open: Callable[[str | None], Any]


def open_source(spec: str | Path, *, streams: bool = False) -> Source:
    """Open a source once to read several of its splits. Arguments and errors: see `open_data`."""
    sets = sets_of(spec) if isinstance(spec, str) else [(1, parse_spec(spec))]
    parsed = sets[0][1]
    opener = None if len(sets) > 1 or parsed.streaming else find_opener(parsed.scheme)
    opened = opener(replace(parsed, split="all")) if opener else None
    if isinstance(opened, Splits):

        def choose(split: str | None) -> ImageData:
            return finished(opened, replace(parsed, split=split or parsed.split))

        return Source(opened.names, choose)
    everything = (
        open_data(spec, split="all", streams=streams)
        if opened is None  # several sets, or a stream
        else finished(opened, parsed)
    )

    def reopen(split: str | None) -> ImageData | ImageStream:
        return everything if split == "all" else open_data(spec, split=split, streams=streams)

    return Source(everything.splits, reopen)


def finished(opened: ImageData | Splits, spec: DataSpec) -> ImageData:
    """Select the spec's split and at most ``limit`` images; warn about the source's faults and what
    it passes over."""
    data = opened.open(spec) if isinstance(opened, Splits) else opened
    _pass_over_pages(data)
    _warn(data, f"{spec.scheme}:{spec.location}")
    _warn_of_narrow(data, f"{spec.scheme}:{spec.location}")
    if spec.limit is not None and spec.limit < len(data):
        # Spread evenly, because many data sets are sorted by class.
        chosen = data.subset(i * len(data) // spec.limit for i in range(spec.limit))
        single = data.labels is not None and not data.multi_label
        if single and (lost := set(data.labels or ()) - set(chosen.labels or ())):
            warn_once(
                f"{spec}: limit={spec.limit} keeps no image of {len(lost):,} classes; choose "
                "another limit, or shuffle the rows."
            )
        data = chosen
    return data


@overload
def open_split(spec: str, requested: Sequence[str] = ...) -> ImageData: ...


@overload
def open_split(
    spec: str, requested: Sequence[str] = ..., *, streams: bool
) -> ImageData | ImageStream: ...


def open_split(
    spec: str, requested: Sequence[str] = ("test", "validation"), *, streams: bool = False
) -> ImageData | ImageStream:
    """Open the split that the spec names, else the first requested split that exists, else all
    images.

    Args:
        requested: canonical names of splits, in order of preference.
        streams: see `open_data`.
    """
    source = open_source(spec, streams=streams)
    # Sets joined by " + " have no splits to choose from.
    if not source.splits or parse_spec(spec).split is not None:
        return source.open(None)
    for split in requested:
        if any(canonical_split(name) == split for name in source.splits):
            return source.open(split)
    return source.open("all")


def _pass_over_pages(data: ImageData) -> None:
    """Count the pages after the first in some of the files; `vim-ssl data check` counts all."""
    if not len(data) or not data.paths(0) or data.file(0) is None:
        return
    chosen = some_of(data.ids)
    pages = {data.ids[i]: count_pages(data.paths(i)[0]) - 1 for i in chosen}
    if several := [name for name, more in pages.items() if more]:
        looked = "" if len(chosen) == len(data) else f" (in {len(chosen):,} files looked at)"
        data.passed_over = data.passed_over + PassedOver()  # a copy
        data.passed_over.add(PAGES + looked, sum(pages.values()), several)


def _warn_of_narrow(data: ImageData, name: str) -> None:
    """Warn if some of the images use a small part of their type's range. None is decoded if the
    header of the first one has 8 bits, or if it is not a file."""
    if not len(data) or not data.paths(0) or data.file(0) is None:
        return
    few, levels = min(len(data), LOOKED_AT), []
    for i in range(few):
        try:
            file = data.file(i * len(data) // few)
            if not isinstance(file, str | Path) or not has_many_bits(file):
                return
            levels.append(levels_of(decode_image(file)))
        except (BadImage, OSError):
            continue
    if fault := narrow(levels):
        warn_once(f"{name}: {fault}.")


def _warn(data: ImageData | ImageStream, name: str) -> None:
    """Warn about the faults of a source, and what it passes over."""
    for fault in data.faults[:WARNED]:
        warn_once(f"{name}: {fault}")
    if (more := len(data.faults) - WARNED) > 0:
        warn_once(f"{name}: {more:,} more faults; `vim-ssl data check` lists them all.")
    for warning in data.passed_over.warnings:
        warn_once(f"{name}: {warning}")
    if data.passed_over:
        warn_once(f"{name}: passed over: {data.passed_over}; see `vim-ssl data check`.")


@cache  # warns once even if the same data is opened again
def warn_once(fault: str) -> None:
    log.warning(fault)


def _is_stream(spec: DataSpec) -> bool:
    return spec.streaming or find_opener(spec.scheme) is None


def _open_stream(spec: DataSpec, accepted: bool) -> ImageStream:
    opener = find_opener(spec.scheme, stream=True)
    if opener is None:
        raise ValueError(
            f"{spec}: {spec.scheme}: data is read by index without loading it first; remove "
            f"streaming=true. Streams are {', '.join(f'{s}:' for s in stream_schemes())}."
        )
    if not accepted:
        raise ValueError(
            f"{spec} is a stream, which only pretraining can read; images are needed by index "
            "here. Give a folder, hf:NAME without streaming=true, or sample:NAME."
        )
    opened = opener(spec)
    _warn(opened, f"{spec.scheme}:{spec.location}")
    if spec.limit is None:
        return opened
    stream = opened.limited(spec.limit)
    stream.passed_over = opened.passed_over
    return stream
