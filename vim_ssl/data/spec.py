"""Data specs: strings ``SCHEME:LOCATION?key=value&...`` that name data in every command."""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import takewhile
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from vim_ssl.data.registry import OPTIONS, SOURCES, find_opener, is_known

AND = " + "  # joins specs into one data set
# Canonical name of a split → the names that data sets use for it.
SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "dev"),
    "test": ("test", "testing"),
}


@dataclass(frozen=True)
class DataSpec:
    """A parsed spec.

    Attributes:
        scheme: one of `vim_ssl.data.registry.SOURCES`.
        location: a path or name, in the form of the scheme.
        split: the split to open; "all" for all images; None for the training split.
        image, label, caption, group: columns (for "wds": file extensions) with these contents.
            ``label=none`` skips labels.
        axis: volumes: the axis (0, 1, 2) perpendicular to the planes.
        channel: volumes: the channel of nnU-Net that is read, from 0.
        window: grey deeper than 8 bits: the values mapped to black and white, ``LOW,HIGH``, or
            percentiles, ``0.5%,99.5%``.
        bands: rasters: names or numbers of the bands, in order, ``B04,B03,B02``.
        values: rasters: ``values=stored`` keeps the numbers in the files, without the scale and
            offset of their tags, and without palettes.
        tile: rasters and slides: side of the square tiles in pixels.
        overlap: rasters: number of pixels that neighbouring tiles share, which then cover the
            whole raster.
        mpp: slides: micrometres per pixel of a tile.
        shrink: slides: alternatively, the slide's pixels per pixel of a tile.
        tissue: slides: minimum coloured fraction of a tile; "none" keeps all tiles.
        frames: videos: frames per clip.
        fps: videos: frames per second in a clip; None spreads them over the whole video.
        clips: videos: clips per video in evaluation.
        tones: emoji: ``tones=none`` skips those with a skin tone.
        limit: maximum number of images, spread evenly over the data.
        streaming: read "hf" data in order without an index, for pretraining; "wds" is always
            read in order.
        more: further options that the source declares.
    """

    scheme: str
    location: str
    split: str | None = None
    image: str | None = None
    label: str | None = None
    caption: str | None = None
    group: str | None = None
    axis: str | None = None
    channel: str | None = None
    window: str | None = None
    bands: str | None = None
    values: str | None = None
    tile: int | None = None
    overlap: int | None = None
    mpp: float | None = None
    shrink: float | None = None
    tissue: str | None = None
    frames: int | None = None
    fps: float | None = None
    clips: int | None = None
    tones: str | None = None
    limit: int | None = None
    streaming: bool = False
    more: dict[str, Any] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        """The spec string; `parse_spec` turns it back into an equal spec."""
        texts = {k: "true" if v is True else str(v) for k, v in self.options().items()}
        query = "&".join(f"{k}={quote(v, safe='/:[]%,')}" for k, v in texts.items())
        mark = "?" if query or "?" in self.location else ""
        return f"{self.scheme}:{self.location}{mark}{query}"

    def options(self) -> dict[str, Any]:
        """The given options, by name."""
        values = {key: getattr(self, key, None) or self.more.get(key) for key in OPTIONS}
        return {key: value for key, value in values.items() if value}

    def takes(self, *keys: str) -> None:
        """Raise ValueError if an option is given that the source does not accept."""
        takes = ("split", "limit", *keys)
        for key in self.options():
            if key not in takes:
                raise ValueError(
                    f"{self.scheme}:{self.location} takes no option {key!r}; it takes "
                    f"{', '.join(takes)}."
                )


def parse_spec(spec: str | Path) -> DataSpec:
    """Parse a spec string; a `Path`, and any string that names an existing path, is a folder.

    The scheme precedes the first colon and has two letters or more (``C:\\photos`` is a path); the
    options follow the last question mark, ``key=value``, unless the location exists with it (or it
    is one of a glob). Values may be %-encoded.

    Raises: ValueError for an unknown scheme, option or value; suggests the closest known name.
    """
    text = str(spec)
    if not text.strip():
        raise ValueError("The data spec is empty; give a folder, or SCHEME:LOCATION.")
    if isinstance(spec, Path):
        return DataSpec("folder", text)
    scheme, location, query = _cut(text)
    if not is_known(scheme):
        raise ValueError(
            f"{text!r}: unknown scheme {scheme!r}.{near(scheme, list(SOURCES))} Use the path of a "
            f"folder, or one of {', '.join(f'{s}:' for s in SOURCES)}."
        )
    if not location:
        raise ValueError(f"{text!r} has no location; expected {scheme}:LOCATION.")
    given = _options(query, scheme, text)
    fields = {key: value for key, value in given.items() if key in DataSpec.__dataclass_fields__}
    more = {key: value for key, value in given.items() if key not in fields}
    return DataSpec(scheme, location, **fields, more=more)


def _cut(text: str) -> tuple[str, str, str]:
    """Return scheme, location and options of a spec. A path that exists is not divided."""
    if _exists(text):
        return "folder", text, ""
    head, mark, query = text.rpartition("?")
    if not mark or not re.match(r"([A-Za-z_]\w*(=|&|$)|$)", query):
        head, query = text, ""
    elif _exists(head):
        return "folder", head, query
    match = re.match(r"([A-Za-z][A-Za-z0-9+_.-]+):(.*)", text, re.DOTALL)
    if not match:
        return "folder", head, query
    start, location = match.span(2)[0], match[2]
    return (match[1].lower(), *((location, "") if _exists(location) else (head[start:], query)))


def _exists(path: str) -> bool:
    return os.path.exists(os.path.expanduser(path))


def sets_of(spec: str) -> list[tuple[int, DataSpec]]:
    """The data sets that a spec joins, with their counts: "A + 20 * B" -> [(1, A), (20, B)]. A
    file or folder that has " + " in its name is one set."""
    pieces, parts = spec.split(AND), []
    while pieces:
        ends = (n for n in range(len(pieces), 1, -1) if _is_path(AND.join(pieces[:n])))
        end = next(ends, 1)
        parts.append(AND.join(pieces[:end]))
        del pieces[:end]
    if len(parts) == 1:
        return [(1, parse_spec(spec))]
    return [(times, parse_spec(name)) for times, name in map(_times, parts)]


def _is_path(part: str) -> bool:
    """Whether the name that contains the last " + " of a part exists, as a file or a folder."""
    _, location, _ = _cut(_times(part)[1])
    path = os.path.expanduser(location)
    before, plus, after = path.rpartition(AND)
    return bool(plus) and os.path.lexists(before + plus + re.split(r"[/\\]", after)[0])


def _times(part: str) -> tuple[int, str]:
    """ "20 * SPEC" -> (20, "SPEC")"""
    if _exists(part):
        return 1, part
    match = re.match(r"\s*([1-9]\d*) \* (.*)", part)
    return (int(match[1]), match[2].strip()) if match else (1, part.strip())


def same_data(one: str, other: str) -> bool:
    """True if two specs share a data set: the same files, or the same scheme and name.

    Splits and options are ignored.
    """
    return not _locations(one).isdisjoint(_locations(other))


def _locations(spec: str) -> set[tuple[str, str]]:
    """(scheme, location) of every set; ("", resolved path) for existing files."""
    locations = set()
    for _, parsed in sets_of(spec):
        path = os.path.expanduser(parsed.location)
        exists = os.path.exists(path)
        locations.add(("", os.path.realpath(path)) if exists else (parsed.scheme, path))
    return locations


def existing_paths(spec: str) -> list[str]:
    """The resolved paths of the files and folders that a spec names; [] if it is no spec."""
    try:
        return [path for scheme, path in _locations(spec) if not scheme]
    except ValueError:
        return []


def pick_split(requested: str | None, splits: Sequence[str], source: str) -> str:
    """Return the name of the split to open, as the source spells it, or "all".

    The default is the training split, so that no test split is used for training by accident; a
    source with a single split, or without splits, is opened whole. "val" and "validation" mean the
    same.

    Raises: ValueError that lists the splits.
    """
    if requested == "all" or (requested is None and not splits):
        return "all"
    if requested is None and len(splits) == 1:
        return splits[0]
    if requested is not None and requested in splits:
        return requested
    for name in splits:
        if canonical_split(name) == canonical_split(requested or "train"):
            return name
    listed = ", ".join(splits) or "none"
    if requested is None:
        raise ValueError(
            f"{source} has the splits {listed}, but no training split; add ?split=NAME or "
            "?split=all."
        )
    raise ValueError(
        f"{source} has no split {requested!r}.{near(requested, splits)} It has: {listed}; 'all' "
        "opens all images."
    )


def canonical_split(name: str) -> str:
    """The canonical name of a split: "val" → "validation"; unknown names are unchanged."""
    for canonical, names in SPLIT_NAMES.items():
        if name.lower() in names:
            return canonical
    return name


def splits_of_files(names: Sequence[str]) -> list[str]:
    """Return the canonical split that the name of each file says, or else one of its folders below
    those that all files share; "" if none or several do: train-00000.parquet, my_test.tar,
    val/0000.parquet."""
    parents = [Path(name).parent.parts for name in names]
    ends = zip(min(parents), max(parents), strict=False)
    shared = len(list(takewhile(lambda pair: pair[0] == pair[1], ends)))

    def split_of(text: str) -> str:
        words = [canonical_split(word) for word in re.split(r"[^A-Za-z]+", text)]
        if words[0] in SPLIT_NAMES:
            return words[0]
        known = set(words) & set(SPLIT_NAMES)
        return known.pop() if len(known) == 1 else ""

    return [
        next(filter(None, map(split_of, (Path(name).stem, *reversed(folders[shared:])))), "")
        for name, folders in zip(names, parents, strict=True)
    ]


def near(word: str, known: Sequence[str]) -> str:
    """ " Did you mean 'x'?" with a leading space; "" without a close match."""
    match = get_close_matches(word, known, n=1)
    return f" Did you mean {match[0]!r}?" if match else ""


def _options(query: str, scheme: str, text: str) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for part in query.split("&") if query else ():
        key, equals, value = part.partition("=")
        value = unquote(value)
        if key not in OPTIONS:
            find_opener(scheme)  # imports the source's module, which may declare the option
        if key not in OPTIONS:
            raise ValueError(
                f"{text!r}: unknown option {key!r}.{near(key, list(OPTIONS))} Options are "
                f"{', '.join(OPTIONS)}."
            )
        if not equals or not value:
            raise ValueError(f"{text!r}: option {key!r} has no value; write {key}=VALUE.")
        if key in options:
            raise ValueError(f"{text!r}: option {key!r} is given twice.")
        options[key] = _READ[OPTIONS[key]](key, value, text)
    return options


def _count(key: str, value: str, text: str) -> int:
    if not value.isdigit() or int(value) < 1:
        raise ValueError(f"{text!r}: {key}={value} is not a whole number above 0.")
    return int(value)


def _number(key: str, value: str, text: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = 0.0
    if not 0 < number < 1e6:
        raise ValueError(f"{text!r}: {key}={value} is not a number above 0 and below 1,000,000.")
    return number


def _flag(key: str, value: str, text: str) -> bool:
    if value.lower() not in ("true", "false"):
        raise ValueError(f"{text!r}: {key}={value} is neither true nor false.")
    return value.lower() == "true"


_READ: dict[type, Callable[[str, str, str], Any]] = {
    str: lambda key, value, text: value, int: _count, float: _number, bool: _flag,
}  # fmt: skip
