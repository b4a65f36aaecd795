"""`open_data`: from a spec string to pictures."""

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import overload

from vim_ssl.data.dataset import ImageData, join
from vim_ssl.data.loading.streamed import ImageStream
from vim_ssl.data.samples.sets import open_sample
from vim_ssl.data.sources.coco import check_same_categories, open_coco
from vim_ssl.data.sources.dicom import open_dicom
from vim_ssl.data.sources.folder import open_folder
from vim_ssl.data.sources.geotiff import open_bigearthnet, open_eurosat, open_geotiff
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
from vim_ssl.data.spec import DataSpec, canonical_split, parse_spec
from vim_ssl.data.split import as_key, is_known, stratified_split

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
AND = " + "  # between specs that are read as one
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
    """Open pictures: a folder's path, ``hf:owner/name[:config]``, ``csv:file.csv``, ``wds:shards``
    and the other schemes of `vim_ssl.data.spec.BUILT`.

    Args:
        spec: ``SCHEME:LOCATION?key=value&...``; see `DataSpec` for the keys. Several joined by
            " + " are read as one set without labels, one of which may stand in it many times:
            ``A + 20 * B``; see `join`.
        split: opens this split whatever the spec says. Without any the training part is opened,
            of a source that has splits; "all" opens everything.
        streams: whether pictures that are read in order will do: ``wds:`` and ``streaming=true``.
    Returns: the pictures, map-style unless the spec names a stream.
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
        _warn(f"{name}: {fault}")
    if (more := len(data.faults) - TOLD) > 0:
        _warn(f"{name}: {more:,} more; `vim-ssl data check` names them all.")
    if parsed.limit is not None and parsed.limit < len(data):
        # Spread out, since many sets are sorted by class.
        data = data.subset(i * len(data) // parsed.limit for i in range(parsed.limit))
    return data


@overload
def open_part(spec: str, wanted: Sequence[str] = ...) -> ImageData: ...


@overload
def open_part(
    spec: str, wanted: Sequence[str] = ..., *, streams: bool
) -> ImageData | ImageStream: ...


def open_part(
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


def labelled_only(data: ImageData) -> ImageData:
    """The pictures whose label is known."""
    return data.subset(i for i, label in enumerate(data.labels or []) if is_known(label))


def sets_of(spec: str) -> list[tuple[int, DataSpec]]:
    """What a spec reads as one: "A + 20 * B" -> [(1, A), (20, B)]; of a single set that set."""
    if AND not in spec or Path(spec).expanduser().exists():
        return [(1, parse_spec(spec))]
    return [(times, parse_spec(name)) for times, name in map(_times, spec.split(AND))]


def _times(part: str) -> tuple[int, str]:
    """ "20 * SPEC" -> (20, "SPEC")"""
    found = re.match(r"\s*([1-9]\d*) \* (.*)", part)
    return (int(found[1]), found[2].strip()) if found else (1, part.strip())


@cache  # once, however often the same data is opened
def _warn(fault: str) -> None:
    log.warning(fault)


def _open_stream(spec: DataSpec, wanted: bool) -> ImageStream:
    if spec.scheme not in _STREAMS:
        raise ValueError(
            f"{spec}: a {spec.scheme} is read by index, nothing of it is loaded beforehand; leave "
            f"streaming=true out. Streams are {', '.join(f'{s}:' for s in _STREAMS)}."
        )
    if not wanted:
        raise ValueError(
            f"{spec} is a stream, which is read in order and for pretraining only; here pictures "
            "are needed by index: give a folder, hf:NAME without streaming=true, or sample:NAME."
        )
    stream = _STREAMS[spec.scheme](spec)
    return stream if spec.limit is None else stream.limited(spec.limit)


def labelled_parts(
    spec: str | Path, test: float, seed: int, test_spec: str = ""
) -> tuple[ImageData, ImageData]:
    """The training and the test part of labelled pictures.

    The source's own test (or else validation) split is used where there is one, whatever split
    ``spec`` names, with a warning of groups that are on both its sides; otherwise a stratified
    share is held out, groups kept together. Pictures without a label are left out.

    Args:
        test: share to hold out, in (0, 1), of a source without splits.
        seed: of that choice.
        test_spec: other data of the same classes, whose test part is taken (all of it, if it has no
            splits); of ``spec`` the training part still, so that a picture held out in both is
            new.
    Raises: ValueError for pictures without labels of at least two classes, or of other classes.
    """
    train, other = _labelled(spec, test, seed)
    if test_spec:
        other = _labelled(test_spec, 0.0, seed)[1]
        if train.classes != other.classes:
            raise ValueError(
                f"{spec} has the classes {_few(train.classes)}, {test_spec} {_few(other.classes)}; "
                "test on data of the same classes."
            )
    else:
        _tell_of_both(spec, train, other)
    parts = []
    for part in (train, other):
        part = labelled_only(part)
        if len({as_key(label) for label in part.labels or []}) < 2:
            raise ValueError(
                f"{part.name} ({part.split}) has no labels of two classes; it needs them."
            )
        parts.append(part)
    return parts[0], parts[1]


def _labelled(spec: str | Path, test: float, seed: int) -> tuple[ImageData, ImageData]:
    """Both parts, labelled or not; for ``test`` 0 a source without splits is both."""
    everything = open_data(spec, split="all")
    if held_out := _held_out(everything):
        others = [open_data(spec, split=name) for name in held_out]
        # The labels of a test split are often withheld.
        other = next((part for part in others if part.labels is not None), others[0])
        return open_data(spec, split="train"), other
    if everything.labels is None or not test:
        return everything, everything
    known = labelled_only(everything)
    labels = known.labels or []
    first, second = stratified_split(labels, test, seed, known.groups)
    if not known.multi_label and (left := set(labels) - {labels[i] for i in second}):
        name = known.classes[min(left)] if known.classes else min(left)
        _warn(
            f"{spec}: {len(left)} of {len(set(labels))} classes, such as {name}, are not in the "
            "part that is held out: too few pictures, or a single group. Nothing is said of them."
        )
    return known.subset(first), known.subset(second)


def _few(classes: Sequence[str] | None) -> str:
    names = classes or ()
    return ", ".join(names[:5]) + (f" … ({len(names)})" if len(names) > 5 else "")


def masked_parts(spec: str | Path, test: float, seed: int) -> tuple[ImageData, ImageData]:
    """The training and the test part of pictures with masks; as `labelled_parts`.

    Raises: ValueError for pictures without masks.
    """
    everything = open_data(spec, split="all")
    if not everything.has_masks:
        raise ValueError(
            f"{spec} has no masks; name a folder with images/ and masks/ as masks:FOLDER "
            "(nifti:FOLDER, geotiff:FOLDER), or ade20k:ROOT."
        )
    if held_out := _held_out(everything):
        train, other = open_data(spec, split="train"), open_data(spec, split=held_out[0])
        _tell_of_both(spec, train, other)
        return train, other
    return _cut(everything, test, seed)


def boxed_parts(spec: str | Path, test: float, seed: int) -> tuple[ImageData, ImageData]:
    """The training and the test part of pictures with boxes; as `labelled_parts`. Of several splits
    to test on, the first in which there are boxes.

    Raises: ValueError for pictures without boxes, or parts of different classes.
    """
    train = open_data(spec)
    if not train.has_boxes:
        raise ValueError(f"{spec} has no boxes; name a folder in COCO's layout as coco:ROOT.")
    if not (held_out := _held_out(train)):
        return _cut(open_data(spec, split="all"), test, seed)
    train = open_data(spec, split="train")
    others = [open_data(spec, split=name) for name in held_out]
    other = next((o for o in others if any(map(o.box_count, range(len(o))))), others[0])
    check_same_categories(train.categories or [], [other.categories or []])
    _tell_of_both(spec, train, other)
    return train, other


def _tell_of_both(spec: str | Path, train: ImageData, other: ImageData) -> None:
    """Warn of pictures and groups that a source has on both sides of its split."""
    for what, one, two in (("pictures", train.ids, other.ids),
                           ("groups", train.groups, other.groups)):  # fmt: skip
        if both := set(one or ()) & set(two or ()) - {""}:  # "" is an empty field of a table
            _warn(
                f"{spec}: {len(both):,} {what} are in both {train.split} and {other.split}, such "
                f"as {min(both)}: what is found in them says little about others."
            )


def _cut(everything: ImageData, test: float, seed: int) -> tuple[ImageData, ImageData]:
    alike = [0] * len(everything)
    first, second = stratified_split(alike, test, seed, everything.groups)
    return everything.subset(first), everything.subset(second)


def _held_out(everything: ImageData) -> list[str]:
    """The splits to test on, of a source that has such a one beside a training part."""
    splits = {canonical_split(name) for name in everything.splits}
    return [name for name in ("test", "validation") if {name, "train"} <= splits]
