"""Hugging Face datasets: a name on the Hub, or a local folder that `datasets` can read."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vim_ssl.data.dataset import ImageData
from vim_ssl.data.images import BadImage
from vim_ssl.data.spec import DataSpec, near, pick_split

_LABEL_NAMES = ("label", "labels", "fine_label")
_LABEL_TYPES = ("int", "uint", "bool", "string", "large_string")
_CAPTION_NAMES = ("caption", "text")


class TableColumn:
    """One column of a table, read row by row.

    A table of this column alone, because `table[name][row]` takes milliseconds.
    """

    def __init__(self, table: Any, name: str):
        self.table, self.name = table.select_columns([name]), name

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, row: int) -> Any:
        return self.table[row][self.name]

    def all(self) -> list[Any]:
        return self.table[:][self.name]


class TablePictures(TableColumn):
    """The image column, undecoded: our own decoding turns a broken picture into BadImage."""

    def __getitem__(self, row: int) -> str | bytes:
        value = super().__getitem__(row)
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if not value:
            raise BadImage(f"row {row}", "the table has no picture in this row")
        return value


def open_hub(spec: DataSpec) -> ImageData:
    """Open ``hf:owner/name[:config]`` or ``hf:/local/path`` (saved with ``save_to_disk``, or a
    folder of tables).

    The picture column is the one of type Image; labels come from the column of type ClassLabel
    (with several, the one named "label"), captions from a text column named "caption" or "text".
    ``image= label= caption= group=`` name others; any column of whole numbers or strings can be a
    label, its sorted values over all splits are then the classes.
    The ids are ``split/row``.

    Raises: ImportError without `datasets`; FileNotFoundError for a missing local path;
        ConnectionError when the Hub is not reached; ValueError for an unknown or gated name,
        and for columns that do not fit.
    """
    spec.takes("image", "label", "caption", "group")
    tables = _load(spec.location)
    source = f"hf:{spec.location}"
    split = pick_split(spec.split, list(tables), source)
    chosen = list(tables) if split == "all" else [split]
    first = tables[chosen[0]]
    for name in chosen:
        if len(tables[name]) == 0:
            raise ValueError(f"{source}: the split {name!r} is empty.")

    image = _image_column(spec.image, first.features, source)
    label = _label_column(spec.label, first.features, source)
    caption = _column(spec.caption, first.features, source, "caption") or next(
        (n for n in _CAPTION_NAMES if getattr(first.features.get(n), "dtype", "") == "string"), None
    )
    group = _column(spec.group, first.features, source, "group")

    import datasets

    if not isinstance(first.features[image], datasets.Value):
        undecoded = datasets.Image(decode=False)
        table = _join([tables[n].cast_column(image, undecoded) for n in chosen])
    else:
        table = _join([tables[n] for n in chosen])
    labels = classes = None
    if label:
        labels, classes = _labels(label, [tables[n] for n in chosen], tables.values())
    return ImageData(
        TablePictures(table, image),
        [f"{name}/{row}" for name in chosen for row in range(len(tables[name]))],
        name=str(spec),
        labels=labels,
        classes=classes,
        groups=[str(g) for g in TableColumn(table, group).all()] if group else None,
        captions=TableColumn(table, caption) if caption else None,
        splits=list(tables),
        split=split,
        # Picture sizes would need a read of the whole table; its own fingerprint stands for them.
        source_fingerprint=" ".join(tables[name]._fingerprint for name in chosen),
    )


def _load(location: str) -> dict[str, Any]:
    """The tables by split."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError("hf: data needs datasets: pip install datasets") from error

    path = Path(location).expanduser()
    if path.exists():
        saved = (path / "dataset_dict.json").exists() or (path / "state.json").exists()
        loaded = datasets.load_from_disk(path) if saved else datasets.load_dataset(str(path))
    elif location.startswith(("/", ".", "~")) or "\\" in location or location.count("/") > 1:
        raise FileNotFoundError(f"hf:{location}: there is no such local path.")
    else:
        name, _, config = location.partition(":")
        loaded = _load_from_hub(name, config or None)
    tables = loaded if isinstance(loaded, dict) else {str(loaded.split or "train"): loaded}
    # A table may have been saved to give tensors; here it gives plain values.
    return {split: table.with_format(None) for split, table in tables.items()}


def _load_from_hub(name: str, config: str | None) -> Any:
    import datasets

    try:
        return datasets.load_dataset(name, config)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise ValueError(
            f"hf:{name} is not on the Hub, or you have no access: {error} Check the name; for a "
            "gated data set accept its terms on its page and run 'hf auth login'."
        ) from error
    except (ConnectionError, OSError) as error:
        raise ConnectionError(
            f"hf:{name} is neither a local folder nor in the cache, and the Hub was not reached: "
            f"{error}"
        ) from error
    except ValueError as error:
        raise ValueError(f"hf:{name}: {error} A config is written hf:{name}:CONFIG.") from error


def _column(name: str | None, features: Any, source: str, option: str) -> str | None:
    if name is not None and name not in features:
        raise ValueError(
            f"{source} has no column {name!r} for {option}=.{near(name, list(features))} It has "
            f"{', '.join(features)}."
        )
    return name


def _image_column(name: str | None, features: Any, source: str) -> str:
    import datasets

    if chosen := _column(name, features, source, "image"):
        return chosen
    found = [n for n, kind in features.items() if isinstance(kind, datasets.Image)]
    if "image" in found or len(found) == 1:
        return "image" if "image" in found else found[0]
    what = f"several picture columns ({', '.join(found)})" if found else "no picture column"
    raise ValueError(f"{source} has {what}; name one with image=. Columns: {', '.join(features)}.")


def _label_column(name: str | None, features: Any, source: str) -> str | None:
    import datasets

    if name == "none":
        return None
    if _column(name, features, source, "label"):
        return name
    found = [n for n, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    if len(found) == 1:
        return found[0]
    return next((n for n in _LABEL_NAMES if n in found), None)


def _labels(
    name: str, chosen: list[Any], tables: Iterable[Any]
) -> tuple[list[int] | None, list[str] | None]:
    """Labels of the chosen tables and their names; None for a part whose labels are withheld."""
    kind = chosen[0].features[name]
    names = getattr(kind, "names", None)
    if names is None and not str(getattr(kind, "dtype", "")).startswith(_LABEL_TYPES):
        raise ValueError(f"label={name}: the column holds neither whole numbers nor strings.")
    values = [value for table in chosen for value in TableColumn(table, name).all()]
    if names is None:
        known = {value for table in tables for value in TableColumn(table, name).all()} - {None}
        number = {value: i for i, value in enumerate(sorted(known))}
        names, values = [str(v) for v in number], [number.get(v) for v in values]
    labels = [-1 if value is None else int(value) for value in values]
    return (labels, names) if max(labels) >= 0 else (None, None)


def _join(tables: list[Any]) -> Any:
    import datasets

    return tables[0] if len(tables) == 1 else datasets.concatenate_datasets(tables)
