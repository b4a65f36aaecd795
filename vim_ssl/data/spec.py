"""The spec string: one way to name data everywhere, ``SCHEME:LOCATION?key=value&...``."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

BUILT = (
    "folder", "hf", "csv", "parquet", "imagenet", "medmnist", "dicom", "nifti", "geotiff",
    "eurosat", "bigearthnet", "pairs", "sample", "wds",
    "ade20k", "masks", "coco", "video", "slide",
)  # fmt: skip
# What one split is called in different places; the first is the name used here.
SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid"),
    "test": ("test", "testing"),
}


@dataclass(frozen=True)
class DataSpec:
    """A parsed spec.

    Attributes:
        scheme: one of `BUILT`.
        location: a path or name, as the scheme takes it.
        split: the split to open; "all" for everything; None for the training part.
        image, label, caption, group: columns (of "wds": extensions) to take these from.
            ``label=none`` leaves labels out.
        axis: of volumes, the axis (0, 1, 2) across which planes are taken.
        window: of deep grey, the values that become black and white: ``LOW,HIGH`` or percentiles,
            ``0.5%,99.5%``.
        bands: of rasters, which and in what order: names or numbers, ``B04,B03,B02``.
        tile: cuts rasters and slides into squares of so many pixels.
        mpp: of slides, micrometres a pixel of a tile.
        shrink: of slides, in its place: how many of the slide's pixels make one of a tile's.
        tissue: of slides, the share of a tile that must be coloured; "none" keeps all tiles.
        frames: of a clip of a video.
        fps: frames of a clip that make a second; without it they are spread over the whole video.
        clips: of each video, where one is judged.
        tones: of emoji, ``tones=none`` leaves those with a skin tone out.
        limit: at most this many images, spread evenly over the data.
        streaming: read in order without an index, for pretraining from "hf"; "wds" always is.
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

    def __str__(self) -> str:
        """The spec string; `parse_spec` of it gives an equal spec."""
        given = {key: getattr(self, key) for key in OPTIONS}
        texts = {k: "true" if v is True else str(v) for k, v in given.items() if v}
        query = "&".join(f"{k}={quote(v, safe='/:[]%,')}" for k, v in texts.items())
        mark = "?" if query or "?" in self.location else ""
        return f"{self.scheme}:{self.location}{mark}{query}"

    def takes(self, *keys: str) -> None:
        """Raise ValueError when a key was given that this source does not take."""
        takes = ("split", "limit", *keys)
        for key in OPTIONS:
            if getattr(self, key) and key not in takes:
                raise ValueError(
                    f"{self.scheme}:{self.location} takes no option {key!r}; it takes "
                    f"{', '.join(takes)}."
                )


AND = " + "  # between specs that are read as one
OPTIONS = tuple(f.name for f in fields(DataSpec) if f.name not in ("scheme", "location"))


def parse_spec(spec: str | Path) -> DataSpec:
    """Read a spec string; a `Path`, and any string that names an existing path, is a folder.

    The scheme is what stands before the first colon, two letters or more (so ``C:\\photos`` is a
    path); the options are what stands after the last question mark. Values may be %-encoded.

    Raises: ValueError for an unknown scheme, option or value, naming the near match.
    """
    text = str(spec)
    if not text.strip():
        raise ValueError("The data spec is empty; give a folder, or SCHEME:LOCATION.")
    if isinstance(spec, Path) or os.path.exists(os.path.expanduser(text)):
        return DataSpec("folder", text)
    head, mark, query = text.rpartition("?")
    body, options = (head, _options(query, text)) if mark else (text, {})
    match = re.match(r"([A-Za-z][A-Za-z0-9+_.-]+):(.*)", body, re.DOTALL)
    if not match:
        return replace(DataSpec("folder", body), **options)
    scheme, location = match[1].lower(), match[2]
    if scheme not in BUILT:
        raise ValueError(
            f"{text!r}: unknown scheme {scheme!r}.{near(scheme, BUILT)} Known are a "
            f"folder's path, {', '.join(f'{s}:' for s in BUILT)}."
        )
    if not location:
        raise ValueError(f"{text!r} names no location; expected {scheme}:LOCATION.")
    return replace(DataSpec(scheme, location), **options)


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


def pick_split(wanted: str | None, splits: Sequence[str], source: str) -> str:
    """Which split to open: the source's own name of it, or "all".

    Without a wish it is the training part, so that nothing sees a test part by accident; a source
    with one split, or none, opens whole. "val" and "validation" mean the same.

    Raises: ValueError listing the splits.
    """
    if wanted == "all" or (wanted is None and not splits):
        return "all"
    listed = ", ".join(splits) or "none"
    if wanted is None:
        if len(splits) == 1:
            return splits[0]
        for name in splits:
            if canonical_split(name) == "train":
                return name
        raise ValueError(
            f"{source} has the splits {listed}, none for training; add ?split=NAME, or ?split=all."
        )
    for name in splits:
        if name == wanted:
            return name
    for name in splits:
        if canonical_split(name) == canonical_split(wanted):
            return name
    raise ValueError(
        f"{source} has no split {wanted!r}.{near(wanted, splits)} It has: {listed}; 'all' opens "
        "everything."
    )


def canonical_split(name: str) -> str:
    """The common name of a split: "val" → "validation"; unknown names stay."""
    for canonical, names in SPLIT_NAMES.items():
        if name.lower() in names:
            return canonical
    return name


def near(word: str, known: Sequence[str]) -> str:
    """ " Did you mean 'x'?" with its leading space, or nothing."""
    match = get_close_matches(word, known, n=1)
    return f" Did you mean {match[0]!r}?" if match else ""


def _options(query: str, text: str) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for part in query.split("&") if query else ():
        key, equals, value = part.partition("=")
        value = unquote(value)
        if key not in OPTIONS:
            raise ValueError(
                f"{text!r}: unknown option {key!r}.{near(key, OPTIONS)} Options are "
                f"{', '.join(OPTIONS)}."
            )
        if not equals or not value:
            raise ValueError(f"{text!r}: option {key!r} has no value; write {key}=VALUE.")
        if key in options:
            raise ValueError(f"{text!r}: option {key!r} is given twice.")
        options[key] = value
        if key in ("limit", "tile", "frames", "clips"):
            if not value.isdigit() or int(value) < 1:
                raise ValueError(f"{text!r}: {key}={value} is not a whole number above 0.")
            options[key] = int(value)
        if key in ("fps", "mpp", "shrink"):
            try:
                options[key] = float(value)
            except ValueError:
                options[key] = 0.0
            if not 0 < options[key] < 1e6:
                raise ValueError(f"{text!r}: {key}={value} is not a number above 0.")
        if key == "streaming":
            if value.lower() not in ("true", "false"):
                raise ValueError(f"{text!r}: streaming={value} is neither true nor false.")
            options[key] = value.lower() == "true"
    return options
