"""The sources: which module opens a scheme, and which options each of them takes.

A new scheme is a file with a decorated opener and a line in `SOURCES`; one of another package
registers itself when its entry point in the group ``vim_ssl.plugins`` is loaded.

    @source("dicom", extra="medical", options=("label", "window"))
    def open_dicom(spec: DataSpec) -> ImageData: ...
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any, TypeVar

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
}
# Option → its type; a number must be above 0. `DataSpec` describes those that are named here.
OPTIONS: dict[str, type] = {
    "split": str, "image": str, "label": str, "caption": str, "group": str, "axis": str,
    "window": str, "bands": str, "tile": int, "mpp": float, "shrink": float, "tissue": str,
    "frames": int, "fps": float, "clips": int, "tones": str, "limit": int, "streaming": bool,
}  # fmt: skip

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Opener:
    """What opens a scheme: its function, the options it takes beside split and limit, and the
    extra of pip that installs what it needs."""

    function: Callable[..., Any]
    options: tuple[str, ...] = ()
    extra: str = ""

    def __call__(self, spec: Any) -> Any:
        """Open a `DataSpec`. Raises: ValueError for an option that this source does not take;
        ImportError for a missing library; and what the function raises."""
        spec.takes(*self.options)
        opened = self._call(self.function, spec)
        if isinstance(opened, Splits):
            return Splits(opened.names, partial(self._call, opened.open))
        return opened

    def _call(self, function: Callable[..., Any], spec: Any) -> Any:
        try:
            return function(spec)
        except ModuleNotFoundError as error:
            if not self.extra:
                raise
            raise ImportError(
                f"{spec.scheme}: needs {error.name}: pip install 'vim-ssl[{self.extra}]'"
            ) from error


@dataclass(frozen=True)
class Splits:
    """A source whose files are listed: what an opener returns to be called once for all splits.

    Attributes:
        names: of its splits; none where it has no splits.
        open: a DataSpec → the images of its ``split``, which `pick_split` understands.
    """

    names: Sequence[str]
    open: Callable[[Any], Any]


_openers: dict[tuple[str, bool], Opener] = {}  # by scheme and whether it gives a stream


def source(
    scheme: str,
    *,
    options: Sequence[str] = (),
    declares: Mapping[str, type] | None = None,
    extra: str = "",
    stream: bool = False,
) -> Callable[[F], F]:
    """Register the decorated function as what opens a scheme: DataSpec → ImageData, or `Splits`.

    Args:
        options: that it takes beside ``split`` and ``limit``.
        declares: further options, which `OPTIONS` does not name, with their types (str, int or
            float); they stand in ``spec.more``.
        extra: of pip, which installs the libraries it needs.
        stream: the function gives an ImageStream; a scheme may have both.
    Raises: ValueError for a scheme that another module opens, and for an option that is unknown
        or of two types.
    """
    declares = dict(declares or {})

    def register(function: F) -> F:
        if SOURCES.setdefault(scheme, function.__module__) != function.__module__:
            raise ValueError(
                f"{function.__module__} registers {scheme!r}, which {SOURCES[scheme]} opens; "
                "choose another scheme."
            )
        for name, kind in declares.items():
            if kind not in (str, int, float) or OPTIONS.setdefault(name, kind) is not kind:
                raise ValueError(
                    f"{scheme}: declares the option {name!r} as {kind.__name__}; it is str, int "
                    f"or float, and of one type in all sources ({OPTIONS.get(name)})."
                )
        if unknown := set(options) - set(OPTIONS):
            raise ValueError(f"{scheme}: takes {', '.join(sorted(unknown))}: add to declares=.")
        _openers[scheme, stream] = Opener(function, (*options, *declares), extra)
        return function

    return register


def is_known(scheme: str) -> bool:
    """Whether a scheme can be opened; plugins are loaded before the answer is no."""
    if scheme not in SOURCES:
        load_plugins()
    return scheme in SOURCES


def find_opener(scheme: str, stream: bool = False) -> Opener | None:
    """What opens a known scheme by index, or as a stream; its module is imported."""
    if (scheme, stream) not in _openers:
        import_module(SOURCES[scheme])
    return _openers.get((scheme, stream))


def stream_schemes() -> list[str]:
    """The schemes that can be read in order. Imports all sources."""
    return [scheme for scheme in SOURCES if find_opener(scheme, stream=True)]
