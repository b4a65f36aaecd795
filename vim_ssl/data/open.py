"""`open_data`: from a spec string to images."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import overload

from vim_ssl.data.dataset import ImageData, join
from vim_ssl.data.loading.streamed import ImageStream
from vim_ssl.data.samples.sets import open_sample
from vim_ssl.data.sources.bigearthnet import open_bigearthnet
from vim_ssl.data.sources.coco import open_coco
from vim_ssl.data.sources.dicom import open_dicom
from vim_ssl.data.sources.eurosat import open_eurosat
from vim_ssl.data.sources.folder import open_folder
from vim_ssl.data.sources.geotiff import open_geotiff
from vim_ssl.data.sources.hub import open_hub, stream_hub
from vim_ssl.data.sources.imagenet import open_imagenet
from vim_ssl.data.sources.masks import open_ade20k, open_masks
from vim_ssl.data.sources.medmnist import open_medmnist
from vim_ssl.data.sources.nifti import open_nifti
from vim_ssl.data.sources.pairs import open_pairs
from vim_ssl.data.sources.slides import open_slide
from vim_ssl.data.sources.tables import open_csv, open_parquet
from vim_ssl.data.sources.video import open_video
from vim_ssl.data.sources.webdataset import stream_tars
from vim_ssl.data.spec import DataSpec, canonical_split, parse_spec, sets_of

log = logging.getLogger(__name__)

_OPENERS: dict[str, Callable[[DataSpec], ImageData]] = {
    "folder": open_folder,
    "hf": open_hub,
    "pairs": open_pairs,
    "csv": open_csv,
    "parquet": open_parquet,
    "imagenet": open_imagenet,
    "medmnist": open_medmnist,
    "dicom": open_dicom,
    "nifti": open_nifti,
    "geotiff": open_geotiff,
    "eurosat": open_eurosat,
    "bigearthnet": open_bigearthnet,
    "sample": open_sample,
    "ade20k": open_ade20k,
    "masks": open_masks,
    "coco": open_coco,
    "video": open_video,
    "slide": open_slide,
}
TOLD = 5  # faults that opening tells of, one by one
_STREAMS: dict[str, Callable[[DataSpec], ImageStream]] = {"hf": stream_hub, "wds": stream_tars}


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
    and the other schemes of `vim_ssl.data.spec.BUILT`.

    Args:
        spec: ``SCHEME:LOCATION?key=value&...``; see `DataSpec` for the keys. Several joined by
            " + " are read as one set without labels, one of which may stand in it many times:
            ``A + 20 * B``; see `join`.
        split: opens this split whatever the spec says. Without any the training part is opened,
            of a source that has splits; "all" opens everything.
        streams: whether images that are read in order will do: ``wds:`` and ``streaming=true``.
    Returns: the images, map-style unless the spec names a stream.
    Raises: ValueError for a spec that does not fit the source, FileNotFoundError for missing
        data; each says what to do.
    """
    if isinstance(spec, str) and len(joined := sets_of(spec)) > 1:
        counts, parts = zip(*joined, strict=True)
        if stream := next((p for p in parts if p.streaming or p.scheme not in _OPENERS), None):
            raise ValueError(f"{spec!r}: {stream} is a stream, which cannot be joined to others.")
        opened = [open_data(str(part), split=split) for part in parts]
        return join([data for data, n in zip(opened, counts, strict=True) for _ in range(n)])
    parsed = parse_spec(spec)
    if split is not None:
        parsed = replace(parsed, split=split)
    if parsed.streaming or parsed.scheme not in _OPENERS:
        return _open_stream(parsed, streams)
    data = _OPENERS[parsed.scheme](parsed)
    name = f"{parsed.scheme}:{parsed.location}"
    for fault in data.faults[:TOLD]:
        warn_once(f"{name}: {fault}")
    if (more := len(data.faults) - TOLD) > 0:
        warn_once(f"{name}: {more:,} more; `vim-ssl data check` names them all.")
    if parsed.limit is not None and parsed.limit < len(data):
        # Spread out, since many sets are sorted by class.
        data = data.subset(i * len(data) // parsed.limit for i in range(parsed.limit))
    return data


@overload
def open_split(spec: str, wanted: Sequence[str] = ...) -> ImageData: ...


@overload
def open_split(
    spec: str, wanted: Sequence[str] = ..., *, streams: bool
) -> ImageData | ImageStream: ...


def open_split(
    spec: str, wanted: Sequence[str] = ("test", "validation"), *, streams: bool = False
) -> ImageData | ImageStream:
    """The part that the spec names, else the first of those wanted, or all there is.

    Args:
        wanted: canonical names of splits.
        streams: see `open_data`.
    """
    everything = open_data(spec, split="all", streams=streams)
    # Sets joined by " + " have no splits of their own to choose from.
    if not everything.splits or parse_spec(spec).split is not None:
        return open_data(spec, streams=streams)
    for split in wanted:
        if any(canonical_split(name) == split for name in everything.splits):
            return open_data(spec, split=split, streams=streams)
    return everything


@cache  # once, however often the same data is opened
def warn_once(fault: str) -> None:
    log.warning(fault)


def _open_stream(spec: DataSpec, wanted: bool) -> ImageStream:
    if spec.scheme not in _STREAMS:
        raise ValueError(
            f"{spec}: a {spec.scheme} is read by index, nothing of it is loaded beforehand; leave "
            f"streaming=true out. Streams are {', '.join(f'{s}:' for s in _STREAMS)}."
        )
    if not wanted:
        raise ValueError(
            f"{spec} is a stream, which is read in order and for pretraining only; here images "
            "are needed by index: give a folder, hf:NAME without streaming=true, or sample:NAME."
        )
    stream = _STREAMS[spec.scheme](spec)
    return stream if spec.limit is None else stream.limited(spec.limit)
