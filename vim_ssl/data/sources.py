"""`open_data`: from a spec string to pictures."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from vim_ssl.data.dataset import ImageData
from vim_ssl.data.folder import open_folder
from vim_ssl.data.hub import open_hub
from vim_ssl.data.sample_sets import open_sample
from vim_ssl.data.spec import DataSpec, parse_spec

_OPENERS: dict[str, Callable[[DataSpec], ImageData]] = {
    "folder": open_folder,
    "hf": open_hub,
    "sample": open_sample,
}


def open_data(spec: str | Path, *, split: str | None = None) -> ImageData:
    """Open pictures: a folder's path, ``hf:owner/name[:config]`` or ``sample:name``.

    Args:
        spec: ``SCHEME:LOCATION?key=value&...``; see `DataSpec` for the keys.
        split: opens this split whatever the spec says. Without any the training part is opened,
            of a source that has splits; "all" opens everything.
    Returns: the pictures, map-style.
    Raises: ValueError for a spec that does not fit the source, FileNotFoundError for missing
        data; each says what to do.
    """
    parsed = parse_spec(spec)
    if split is not None:
        parsed = replace(parsed, split=split)
    if parsed.streaming:
        raise ValueError(
            f"{str(spec)!r}: streaming is not built yet; without it the data are read by index."
        )
    data = _OPENERS[parsed.scheme](parsed)
    if parsed.limit is not None and parsed.limit < len(data):
        # Spread out, since many sets are sorted by class.
        data = data.subset(i * len(data) // parsed.limit for i in range(parsed.limit))
    return data
