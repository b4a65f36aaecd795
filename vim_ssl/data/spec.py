"""The spec string: one way to name data everywhere, ``SCHEME:LOCATION?key=value&...``."""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from vim_ssl.data.registry import OPTIONS, SOURCES, find_opener, is_known

AND = " + "  # between specs that are read as one
# Names of the splits in use elsewhere; the key is the canonical name.
SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid"),
    "test": ("test", "testing"),
}


@dataclass(frozen=True)
class DataSpec:
    """A parsed spec.

    Attributes:
        scheme: one of `vim_ssl.data.registry.SOURCES`.
        location: a path or name, in the form of the scheme.
        split: the split to open; "all" for all images; None for the training split.
        image, label, caption, group: columns ("wds": extensions) that hold these. ``label=none``
            skips labels.
        axis: volumes: the axis (0, 1, 2) across which planes are taken.
        window: deep grey: the values that become black and white, ``LOW,HIGH`` or percentiles,
            ``0.5%,99.5%``.
        bands: rasters: names or numbers of the bands, in order, ``B04,B03,B02``.
        tile: rasters and slides: side of the squares that they are cut into, pixels.
        mpp: slides: micrometres per pixel of a tile.
        shrink: slides: alternatively, the slide's pixels per pixel of a tile.
        tissue: slides: the least coloured share of a tile; "none" keeps all tiles.
        frames: videos: frames per clip.
        fps: videos: frames per second in a clip; None spreads them over the whole video.
        clips: videos: clips per video in evaluation.
        tones: emoji: ``tones=none`` skips those with a skin tone.
        limit: at most this many images, spread evenly over the data.
        streaming: read in order without an index, to pretrain on "hf"; "wds" always is.
        more: further options, which its source declares.
    """

    scheme: str
    location: str
    split: str | None = None
    image: str | None = None
    label: str | None = None
    caption: str | None = None
    group: str | None = None
    axis: str | None = None
    window: str | None = None
    bands: str | None = None
    tile: int | None = None
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
        """The spec string; `parse_spec` of it gives an equal spec."""
        texts = {k: "true" if v is True else str(v) for k, v in self.options().items()}
        query = "&".join(f"{k}={quote(v, safe='/:[]%,')}" for k, v in texts.items())
        mark = "?" if query or "?" in self.location else ""
        return f"{self.scheme}:{self.location}{mark}{query}"

    def options(self) -> dict[str, Any]:
        """The given options, by name."""
        values = {key: getattr(self, key, None) or self.more.get(key) for key in OPTIONS}
        return {key: value for key, value in values.items() if value}

    def takes(self, *keys: str) -> None:
        """Raise ValueError for a given option that the source does not take."""
        takes = ("split", "limit", *keys)
        for key in self.options():
            if key not in takes:
                raise ValueError(
                    f"{self.scheme}:{self.location} takes no option {key!r}; it takes "
                    f"{', '.join(takes)}."
                )


def parse_spec(spec: str | Path) -> DataSpec:
    """Parse a spec string; a `Path`, and any string that names an existing path, is a folder.

    The scheme stands before the first colon and has two letters or more (``C:\\photos`` is a path);
    the options stand after the last question mark. Values may be %-encoded.

    Raises: ValueError for an unknown scheme, option or value, with the near match.
    """
    text = str(spec)
    if not text.strip():
        raise ValueError("The data spec is empty; give a folder, or SCHEME:LOCATION.")
    if isinstance(spec, Path) or os.path.exists(os.path.expanduser(text)):
        return DataSpec("folder", text)
    head, mark, query = text.rpartition("?")
    body = head if mark else text
    match = re.match(r"([A-Za-z][A-Za-z0-9+_.-]+):(.*)", body, re.DOTALL)
    scheme, location = (match[1].lower(), match[2]) if match else ("folder", body)
    if not is_known(scheme):
        raise ValueError(
            f"{text!r}: unknown scheme {scheme!r}.{near(scheme, list(SOURCES))} Known are a "
            f"folder's path, {', '.join(f'{s}:' for s in SOURCES)}."
        )
    if match and not location:
        raise ValueError(f"{text!r} names no location; expected {scheme}:LOCATION.")
    given = _options(query, scheme, text) if mark else {}
    fields = {key: value for key, value in given.items() if key in DataSpec.__dataclass_fields__}
    more = {key: value for key, value in given.items() if key not in fields}
    return DataSpec(scheme, location, **fields, more=more)


def sets_of(spec: str) -> list[tuple[int, DataSpec]]:
    """The sets that a spec joins, and how often: "A + 20 * B" -> [(1, A), (20, B)]."""
    if AND not in spec or Path(spec).expanduser().exists():
        return [(1, parse_spec(spec))]
    return [(times, parse_spec(name)) for times, name in map(_times, spec.split(AND))]


def _times(part: str) -> tuple[int, str]:
    """ "20 * SPEC" -> (20, "SPEC")"""
    match = re.match(r"\s*([1-9]\d*) \* (.*)", part)
    return (int(match[1]), match[2].strip()) if match else (1, part.strip())


def same_data(one: str, other: str) -> bool:
    """True if two specs have a set in common: the same files, or the same name in a scheme.

    Splits and options are ignored: they select images, or say how to read them.
    """
    return not _locations(one).isdisjoint(_locations(other))


def _locations(spec: str) -> set[tuple[str, str]]:
    """Scheme and location of every set; for existing files no scheme, and the resolved path."""
    locations = set()
    for _, parsed in sets_of(spec):
        path = os.path.expanduser(parsed.location)
        exists = os.path.exists(path)
        locations.add(("", os.path.realpath(path)) if exists else (parsed.scheme, path))
    return locations


def pick_split(requested: str | None, splits: Sequence[str], source: str) -> str:
    """The split to open: its name in the source, or "all".

    By default the training split, so that nothing is trained on a test split by accident; a source
    with one split, or none, opens whole. "val" and "validation" mean the same.

    Raises: ValueError listing the splits.
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
            f"{source} has the splits {listed}, none for training; add ?split=NAME, or ?split=all."
        )
    raise ValueError(
        f"{source} has no split {requested!r}.{near(requested, splits)} It has: {listed}; 'all' "
        "opens everything."
    )


def canonical_split(name: str) -> str:
    """The canonical name of a split: "val" → "validation"; unknown names stay."""
    for canonical, names in SPLIT_NAMES.items():
        if name.lower() in names:
            return canonical
    return name


def near(word: str, known: Sequence[str]) -> str:
    """ " Did you mean 'x'?" with its leading space, or nothing."""
    match = get_close_matches(word, known, n=1)
    return f" Did you mean {match[0]!r}?" if match else ""


def _options(query: str, scheme: str, text: str) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for part in query.split("&") if query else ():
        key, equals, value = part.partition("=")
        value = unquote(value)
        if key not in OPTIONS:
            find_opener(scheme)  # whose module may declare it
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
        raise ValueError(f"{text!r}: {key}={value} is not a number above 0.")
    return number


def _flag(key: str, value: str, text: str) -> bool:
    if value.lower() not in ("true", "false"):
        raise ValueError(f"{text!r}: {key}={value} is neither true nor false.")
    return value.lower() == "true"


_READ: dict[type, Callable[[str, str, str], Any]] = {
    str: lambda key, value, text: value, int: _count, float: _number, bool: _flag,
}  # fmt: skip
