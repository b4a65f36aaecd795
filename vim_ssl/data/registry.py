"""Registry of data sources: the module that opens each scheme and the options it accepts.

A new scheme needs a file with a decorated opener and a line in `SOURCES`. A scheme in another
package registers itself when its entry point in the group ``vim_ssl.plugins`` is loaded.

    @source("dicom", extra="medical", options=("label", "window"))
    def open_dicom(spec: DataSpec) -> ImageData: ...
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any, TypeVar

from vim_ssl.data.passed_over import PassedOver, counted
from vim_ssl.utils.plugins import load_plugins

# Scheme → the module that opens it, imported when the scheme is first used.
SOURCES: dict[str, str] = {
    "folder": "vim_ssl.data.sources.folder",
    "hf": "vim_ssl.data.sources.hub",
    "csv": "vim_ssl.data.sources.tables",
    "parquet": "vim_ssl.data.sources.tables",
    "imagenet": "vim_ssl.data.sources.imagenet",
    "medmnist": "vim_ssl.data.sources.medmnist",
    "dicom": "vim_ssl.data.sources.dicom",
    "nifti": "vim_ssl.data.sources.nifti",
    "geotiff": "vim_ssl.data.sources.geotiff",
    "eurosat": "vim_ssl.data.sources.eurosat",
    "bigearthnet": "vim_ssl.data.sources.bigearthnet",
    "pairs": "vim_ssl.data.sources.pairs",
    "sample": "vim_ssl.data.samples.sets",
    "wds": "vim_ssl.data.sources.webdataset",
    "ade20k": "vim_ssl.data.sources.masks",
    "masks": "vim_ssl.data.sources.masks",
    "coco": "vim_ssl.data.sources.coco",
    "video": "vim_ssl.data.sources.video",
    "slide": "vim_ssl.data.sources.slides",
    "memory": "vim_ssl.data.sources.memory",
}
# Option → its type; numbers must be above 0. `DataSpec` documents the options listed here.
OPTIONS: dict[str, type] = {
    "split": str, "image": str, "label": str, "caption": str, "group": str, "axis": str,
    "window": str, "bands": str, "tile": int, "overlap": int, "mpp": float, "shrink": float,
    "tissue": str, "frames": int, "fps": float, "clips": int, "tones": str, "limit": int,
    "streaming": bool, "values": str, "channel": str,
}  # fmt: skip

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Opener:
    """The function that opens a scheme, the options it accepts in addition to split and limit, and
    the pip extra that installs the required libraries."""

    function: Callable[..., Any]
    options: tuple[str, ...] = ()
    extra: str = ""

    def __call__(self, spec: Any) -> Any:
        """Open a `DataSpec`. Raises: ValueError for an option that this source does not accept;
        ImportError for a missing library; any error of the function."""
        spec.takes(*self.options)
        return self._call(self.function, PassedOver(), spec)

    def _call(self, function: Callable[..., Any], before: PassedOver, spec: Any) -> Any:
        """Call a function of the source, and store what it passes over, here and ``before``."""
        try:
            with counted() as counts:
                opened = function(spec)
            counts = before + counts
            if isinstance(opened, Splits):
                return Splits(opened.names, partial(self._call, opened.open, counts))
            opened.passed_over = counts + opened.passed_over
            return opened
        except ModuleNotFoundError as error:
            if not self.extra:
                raise
            raise ImportError(
                f"{spec.scheme}: needs {error.name}: pip install 'vim-ssl[{self.extra}]'"
            ) from error


@dataclass(frozen=True)
class Splits:
    """A source whose files are already listed; lets an opener run once for all splits.

    Attributes:
        names: names of the splits; empty if the source has none.
        open: maps a DataSpec to the images of its split; see `pick_split`.
    """

    names: Sequence[str]
    open: Callable[[Any], Any]


_openers: dict[tuple[str, bool], Opener] = {}  # key: (scheme, whether it opens a stream)


def source(
    scheme: str,
    *,
    options: Sequence[str] = (),
    declares: Mapping[str, type] | None = None,
    extra: str = "",
    stream: bool = False,
) -> Callable[[F], F]:
    """Register the decorated function, DataSpec → ImageData or `Splits`, as a scheme's opener.

    Args:
        options: accepted options in addition to ``split`` and ``limit``.
        declares: further options that `OPTIONS` does not list, with their types (str, int or
            float); their values are in ``spec.more``.
        extra: pip extra that installs the required libraries.
        stream: the function returns an ImageStream; a scheme may have both.
    Raises: ValueError for a scheme that another module opens, for an unknown option, and for an
        option declared with two types.
    """
    declares = dict(declares or {})

    def register(function: F) -> F:
        if SOURCES.setdefault(scheme, function.__module__) != function.__module__:
            raise ValueError(
                f"{function.__module__} registers {scheme!r}, which {SOURCES[scheme]} already "
                "opens; choose another scheme."
            )
        for name, kind in declares.items():
            if kind not in (str, int, float) or OPTIONS.setdefault(name, kind) is not kind:
                raise ValueError(
                    f"{scheme}: declares the option {name!r} as {kind.__name__}; expected str, int "
                    f"or float, and the same type in all sources ({OPTIONS.get(name)})."
                )
        if unknown := set(options) - set(OPTIONS):
            raise ValueError(
                f"{scheme}: unknown options {', '.join(sorted(unknown))}; add them to declares=."
            )
        _openers[scheme, stream] = Opener(function, (*options, *declares), extra)
        return function

    return register


def is_known(scheme: str) -> bool:
    """True if a scheme can be opened. Loads the plugins if the scheme is not built in."""
    if scheme not in SOURCES:
        load_plugins()
    return scheme in SOURCES


def find_opener(scheme: str, stream: bool = False) -> Opener | None:
    """Return the opener of a known scheme, by index or as a stream, or None. Imports its
    module."""
    if (scheme, stream) not in _openers:
        import_module(SOURCES[scheme])
    return _openers.get((scheme, stream))


def stream_schemes() -> list[str]:
    """The schemes that can be opened as streams. Imports all sources."""
    return [scheme for scheme in SOURCES if find_opener(scheme, stream=True)]
