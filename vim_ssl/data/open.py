"""`open_data`: from a spec string to images."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, overload

from vim_ssl.data.dataset import ImageData, join
from vim_ssl.data.loading.streamed import ImageStream
from vim_ssl.data.registry import Splits, find_opener, stream_schemes
from vim_ssl.data.spec import DataSpec, canonical_split, parse_spec, sets_of

log = logging.getLogger(__name__)

WARNED = 5  # faults that opening warns of one by one


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
        spec: ``SCHEME:LOCATION?key=value&...``; see `DataSpec` for the keys. Several joined by
            " + " are read as one set without labels, one of which may stand in it many times:
            ``A + 20 * B``; see `join`.
        split: open this split, whatever the spec says; "all" opens all images. By default the
            training split is opened, if the source has splits.
        streams: accept images that are read in order: ``wds:`` and ``streaming=true``.
    Returns: the images, by index unless the spec names a stream.
    Raises: ValueError for a spec that does not fit the source, FileNotFoundError for missing
        data; each says what to do.
    """
    if isinstance(spec, str) and len(joined := sets_of(spec)) > 1:
        counts, parts = zip(*joined, strict=True)
        if stream := next((part for part in parts if _is_stream(part)), None):
            raise ValueError(f"{spec!r}: {stream} is a stream, which cannot be joined to others.")
        opened = [open_data(str(part), split=split) for part in parts]
        return join([data for data, n in zip(opened, counts, strict=True) for _ in range(n)])
    parsed = parse_spec(spec)
    if split is not None:
        parsed = replace(parsed, split=split)
    opener = find_opener(parsed.scheme)
    if parsed.streaming or opener is None:
        return _open_stream(parsed, streams)
    return _finished(opener(parsed), parsed)


@dataclass(frozen=True)
class Source:
    """An open source.

    Attributes:
        splits: their names; none where it has no splits.
        open: opens a split of these, "all", or for None what the spec names; see `open_data`.
    """

    splits: Sequence[str]
    open: Callable[[str | None], Any]


def open_source(spec: str | Path, *, streams: bool = False) -> Source:
    """Open a source once, to read several of its splits.

    Args:
        spec, streams: see `open_data`.
    Raises: as `open_data`.
    """
    sets = sets_of(spec) if isinstance(spec, str) else [(1, parse_spec(spec))]
    parsed = sets[0][1]
    opener = None if len(sets) > 1 or parsed.streaming else find_opener(parsed.scheme)
    opened = opener(replace(parsed, split="all")) if opener else None
    if isinstance(opened, Splits):

        def choose(split: str | None) -> ImageData:
            return _finished(opened, replace(parsed, split=split or parsed.split))

        return Source(opened.names, choose)
    everything = (
        open_data(spec, split="all", streams=streams)
        if opened is None  # several sets, or a stream
        else _finished(opened, parsed)
    )

    def reopen(split: str | None) -> ImageData | ImageStream:
        return everything if split == "all" else open_data(spec, split=split, streams=streams)

    return Source(everything.splits, reopen)


def _finished(opened: ImageData | Splits, spec: DataSpec) -> ImageData:
    """The images that a spec names, with warnings of the source's faults, at most ``limit``."""
    data = opened.open(spec) if isinstance(opened, Splits) else opened
    name = f"{spec.scheme}:{spec.location}"
    for fault in data.faults[:WARNED]:
        warn_once(f"{name}: {fault}")
    if (more := len(data.faults) - WARNED) > 0:
        warn_once(f"{name}: {more:,} more; `vim-ssl data check` names them all.")
    if spec.limit is not None and spec.limit < len(data):
        # Spread out, since many sets are sorted by class.
        data = data.subset(i * len(data) // spec.limit for i in range(spec.limit))
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
    """Open the split that the spec names, else the first of those requested, or all there is.

    Args:
        requested: canonical names of splits.
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


@cache  # once, however often the same data is opened
def warn_once(fault: str) -> None:
    log.warning(fault)


def _is_stream(spec: DataSpec) -> bool:
    return spec.streaming or find_opener(spec.scheme) is None


def _open_stream(spec: DataSpec, accepted: bool) -> ImageStream:
    opener = find_opener(spec.scheme, stream=True)
    if opener is None:
        raise ValueError(
            f"{spec}: a {spec.scheme} is read by index, nothing of it is loaded beforehand; leave "
            f"streaming=true out. Streams are {', '.join(f'{s}:' for s in stream_schemes())}."
        )
    if not accepted:
        raise ValueError(
            f"{spec} is a stream, which is read in order and for pretraining only; here images "
            "are needed by index: give a folder, hf:NAME without streaming=true, or sample:NAME."
        )
    stream = opener(spec)
    return stream if spec.limit is None else stream.limited(spec.limit)
