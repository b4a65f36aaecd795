"""``hf:``: Hugging Face datasets: a name on the Hub, or a local folder that `datasets` reads."""

import errno
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from vim_ssl.data.classes import unite_classes
from vim_ssl.data.dataset import ImageData
from vim_ssl.data.images import BadImage
from vim_ssl.data.loading.streamed import ImageStream, Shard
from vim_ssl.data.passed_over import add_warning, some_of
from vim_ssl.data.paths import find_path
from vim_ssl.data.registry import Splits, source
from vim_ssl.data.sources.folder import split_views
from vim_ssl.data.sources.hub_labels import (
    Parts,
    column_of_splits,
    is_text_column,
    listed_classes,
    parquet_parts,
    read_labels,
)
from vim_ssl.data.spec import DataSpec, pick_split
from vim_ssl.data.tables import SPLIT_COLUMN, find_column, sort_splits
from vim_ssl.data.values import groups_or_ids
from vim_ssl.utils.files import reading, writable

_LABEL_NAMES = ("label", "labels", "fine_label")
_CAPTION_NAMES = ("caption", "captions", "text")
UNWRITABLE = (errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EPERM)
_NO_IMAGE = "the table has no image in this row"


class TableColumn:
    """One column of a table, read row by row.

    It keeps a table of only this column, because `table[name][row]` takes milliseconds.
    """

    def __init__(self, table: Any, name: str):
        self.table, self.name = table.select_columns([name]), name

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, row: int) -> Any:
        return self.table[row][self.name]

    def all(self) -> list[Any]:
        return self.table[:][self.name]


class TableImages(TableColumn):
    """The image column, undecoded, so that a broken image becomes a BadImage. Relative paths are
    relative to ``root``."""

    def __init__(self, table: Any, name: str, root: str):
        super().__init__(table, name)
        self.root, self.named = root, is_text_column(table.features[name])

    def __getitem__(self, row: int) -> str | bytes:
        image = _image(super().__getitem__(row), row)
        return self._path(image) if isinstance(image, str) else image

    def paths(self, row: int) -> list[str]:
        """Return the file of a row if the column contains paths, else []."""
        name = super().__getitem__(row) if self.named else None
        return [self._path(name)] if name else []

    def _path(self, name: str) -> str:
        odd = "\\" in name or name.startswith("~") or name.lower().startswith("file:")
        path = os.path.join(self.root, name)
        if odd or not os.path.exists(path):
            return os.path.join(self.root, find_path(self.root, name)[0])
        return path


class TableArrays(TableColumn):
    """A column of arrays (h, w) or (h, w, bands), read as (h, w, bands) in the column's dtype."""

    def __init__(self, table: Any, name: str):
        super().__init__(table, name)
        self.table, self.dtype = self.table.with_format("numpy"), table.features[name].dtype

    def __getitem__(self, row: int) -> np.ndarray:
        values = super().__getitem__(row)
        if np.isnan(values).all():  # a missing row, also in an integer column
            raise BadImage(f"row {row}", _NO_IMAGE)
        return np.atleast_3d(values.astype(self.dtype))


@source("hf", options=("image", "label", "caption", "group"))
def open_hub(spec: DataSpec) -> Splits:
    """Open ``hf:owner/name[:config]`` or ``hf:/local/path`` (saved with ``save_to_disk``, or a
    folder of tables).

    The image column is the one of type Image, else of type Array2D (h, w) or Array3D (h, w, bands).
    Labels come from the column of type ClassLabel (if there are several, the one named "label"), or
    of lists of ClassLabel, which become rows of 0 and 1. Captions come from a column of strings or
    lists of strings named "caption", "captions" or "text". ``image= label= caption= group=`` select
    other columns. Any column of integers or strings can be the label; the classes are then its
    sorted values in all splits. Class names of splits, and of files, are matched by name. A column
    named "split" divides a single table into splits. The ids are ``table/row``.

    Raises: FileNotFoundError for a missing local path; ConnectionError if the Hub cannot be
        reached; ValueError for an unknown or gated name, and for columns that do not fit.
    """
    return open_tables(*_load(spec.location))


def open_tables(tables: Mapping[str, Any], parts: Parts | None = None, root: str = "") -> Splits:
    """Open `datasets` tables by split, as `open_hub` describes.

    Args:
        parts: by split, the number of rows and the features of the files that its table was made
            of, in order; by default each table is one part.
        root: folder that paths in the image column are relative to.
    """
    local = {name: [(len(table), table.features)] for name, table in tables.items()}
    for name, of_split in (parts or {}).items():
        if name in tables and sum(rows for rows, _ in of_split) == len(tables[name]):
            local[name] = list(of_split)
    split_of, remarks = column_of_splits(tables)

    def choose(spec: DataSpec) -> ImageData:
        data = _images_of(replace(spec, split="all") if split_of else spec, tables, local, root)
        data.faults = [*data.faults, *remarks]
        if not split_of:
            return data
        data.splits = names
        return split_views(data, split_of).open(spec)

    names = sort_splits(split_of) if split_of else list(tables)
    return Splits(names, choose)


def _images_of(spec: DataSpec, tables: Mapping[str, Any], parts: Parts, root: str) -> ImageData:
    source = f"{spec.scheme}:{spec.location}"
    split = pick_split(spec.split, list(tables), source)
    chosen = list(tables) if split == "all" else [split]
    first = tables[chosen[0]]
    for name in chosen:
        if len(tables[name]) == 0:
            raise ValueError(f"{source}: the split {name!r} is empty.")

    image = _image_column(spec.image, first.features, source)
    label = _label_column(spec.label, first.features, source)
    caption = _caption_column(spec.caption, first.features, source)
    group = find_column(spec.group, (), first.features, "group", source)
    used = [column for column in (image, caption, group) if column]
    for name in chosen:
        if lacking := [column for column in used if column not in tables[name].features]:
            raise ValueError(
                f"{source}: the split {name!r} has no column {lacking[0]!r}, which {chosen[0]!r} "
                "has; open the splits one by one."
            )

    import datasets

    kind = first.features[image]
    if isinstance(kind, dict | datasets.Image):
        undecoded = datasets.Image(decode=False)
        table = _join(
            [tables[n].select_columns(used).cast_column(image, undecoded) for n in chosen]
        )
    else:
        table = _join([tables[n].select_columns(used) for n in chosen])
    arrays = _check_arrays(kind, f"{source}: image={image}")
    labels = classes = groups = None
    faults: list[str] = []
    ids = [f"{name}/{row}" for name in chosen for row in range(len(tables[name]))]
    if label:
        labels, classes, faults = read_labels(label, chosen, tables, parts)
    if group:
        groups, remarks = groups_or_ids(TableColumn(table, group).all(), ids)
        faults = faults + remarks
    return ImageData(
        TableArrays(table, image) if arrays else TableImages(table, image, root), ids,
        name=str(spec), labels=labels, classes=classes, groups=groups, faults=faults,
        captions=TableColumn(table, caption) if caption else None,
        bands=name_bands(kind.shape, kind.dtype) if arrays else None,
        dtype=kind.dtype if arrays else None, splits=list(tables), split=split,
        # Image sizes would require reading the whole table; use its fingerprint instead.
        source_fingerprint=" ".join(tables[name]._fingerprint for name in chosen),
    )  # fmt: skip


@dataclass(frozen=True)
class ParquetReader:
    """Reads the samples of a parquet file, given its name, a few rows at a time."""

    begins: dict[str, tuple[str, int]]  # the split of each file, and its first row there
    image: str
    label: str | None
    caption: str | None
    numbers: dict[str, list[int]]  # the numbers of the classes of each file

    def __call__(self, name: str) -> Iterator[dict[str, Any]]:
        import fsspec
        from pyarrow.parquet import ParquetFile

        columns = [column for column in (self.image, self.label, self.caption) if column]
        split, row = self.begins[name]
        with fsspec.open(name, "rb") as file:
            # No threads: this may run in forked DataLoader workers.
            batches = ParquetFile(file).iter_batches(32, columns=columns, use_threads=False)
            for values in (values for batch in batches for values in batch.to_pylist()):
                record: dict[str, Any] = {"id": f"{split}/{row}"}
                try:
                    record["image"] = _image(values[self.image], row)
                except BadImage as bad:
                    record["image"] = bad
                if self.label:
                    label = values[self.label]
                    known = label is not None and label >= 0
                    record["label"] = self.numbers[name][label] if known else -1
                if self.caption:
                    record["caption"] = values[self.caption]
                yield record
                row += 1


@source("hf", stream=True, options=("image", "label", "caption", "streaming"))
def stream_hub(spec: DataSpec) -> ImageStream:
    """Open ``hf:NAME?streaming=true``: parquet files on the Hub or in a local folder.

    Items are those of `open_hub`. Each file is a shard; before training, only the footers are read,
    to count rows. Labels come from a column of type ClassLabel.

    Raises: see `open_hub`; also ValueError for files that are not parquet.
    """
    source = f"hf:{spec.location}"
    builder = _located(spec.location, "load_dataset_builder")
    if isinstance(builder, Path):
        raise ValueError(
            f"{source} was saved with save_to_disk and is memory-mapped; read it by index, without "
            "streaming=true."
        )
    import fsspec
    from datasets import Features
    from pyarrow import parquet

    files = {str(split): list(names) for split, names in (builder.config.data_files or {}).items()}
    split = pick_split(spec.split, list(files), source)
    chosen = list(files) if split == "all" else [split]
    names = [name for s in chosen for name in files[s]]
    if other := [name for name in names if not name.endswith(".parquet")]:
        raise ValueError(
            f"{source} contains files that are not parquet, such as {other[0]}; stream tar files "
            "with wds:hf://datasets/OWNER/NAME/…, read others without streaming=true."
        )

    def footer(name: str) -> Any:
        with fsspec.open(name, "rb") as file:
            return parquet.read_metadata(file)

    with ThreadPoolExecutor(16) as pool:
        footers = dict(zip(names, pool.map(footer, names), strict=True))
    features = builder.info.features or Features.from_arrow_schema(
        footers[names[0]].schema.to_arrow_schema()
    )
    image = _image_column(spec.image, features, source)
    label = _label_column(spec.label, features, source)
    classes = getattr(features[label], "names", None) if label else None
    if _check_arrays(features[image], f"{source}: image={image}"):
        raise ValueError(
            f"{source} contains arrays, which cannot be streamed; remove streaming=true."
        )
    if label and classes is None and not spec.label:  # lists of classes
        label = None
    if label and classes is None:
        raise ValueError(
            f"{source}: label={label} is not of type ClassLabel, which a stream needs; remove "
            "streaming=true, or use label=none."
        )
    numbers: dict[str, list[int]] = {}
    faults: list[str] = []
    if label and classes is not None:
        local = {name: Features.from_arrow_schema(f.schema.to_arrow_schema()).get(label)
               for name, f in footers.items()}  # fmt: skip
        lists = [getattr(kind, "names", None) or classes for kind in local.values()]
        classes, of_files, faults = unite_classes([classes, *lists])
        numbers = dict(zip(local, of_files[1:], strict=True))
    begins = {}
    for s in chosen:
        row = 0
        for name in files[s]:
            begins[name] = (s, row)
            row += footers[name].num_rows
    name = find_column(None, (SPLIT_COLUMN,), features, "split", source)
    if name and len(files) == 1:
        faults = [*faults, f"the column {name!r} is not used in a stream, which reads all rows"]
    caption = _caption_column(spec.caption, features, source)
    shards = [Shard(name, f.num_rows, str(f.serialized_size)) for name, f in footers.items()]
    return ImageStream(
        shards, ParquetReader(begins, image, label, caption, numbers), name=str(spec),
        classes=classes, splits=list(files), split=split, faults=faults,
    )  # fmt: skip


def _load(location: str) -> tuple[dict[str, Any], Parts]:
    """Return the tables by split, and the parts of those that are local parquet files."""
    import datasets

    path = Path(location).expanduser()
    with reading(location, "tables"):
        loaded = _located(location, "load_dataset")
        if isinstance(loaded, Path):
            return by_split(datasets.load_from_disk(loaded)), {}
    if not path.is_dir() or not any(path.rglob("*.parquet")):
        return by_split(loaded), {}
    files = datasets.load_dataset_builder(str(path)).config.data_files or {}
    read = {os.path.realpath(name) for names in files.values() for name in names}
    unread = [file.relative_to(path).as_posix() for file in sorted(path.rglob("*.parquet"))
              if os.path.realpath(file) not in read]  # fmt: skip
    if unread:
        add_warning(
            f"{some_of(unread)} are in none of the splits {', '.join(map(str, files))} and are not "
            "read; open them with parquet:, or rename them"
        )
    return by_split(loaded), parquet_parts({str(s): list(names) for s, names in files.items()})


def by_split(loaded: Any) -> dict[str, Any]:
    """Return the tables of a `Dataset` or `DatasetDict` by split."""
    tables = loaded if isinstance(loaded, dict) else {str(loaded.split or "train"): loaded}
    # A table may have a tensor format; read plain values instead.
    return {split: table.with_format(None) for split, table in tables.items()}


@contextmanager
def tables_cache() -> Iterator[None]:
    """Say what to do if `datasets` cannot write its cache, into which it converts every table."""
    import datasets

    remedy = "Set HF_HOME to a folder in which this user may write."
    folder = Path(datasets.config.HF_DATASETS_CACHE)
    try:
        yield
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        with writable(folder, remedy):
            raise


def _located(location: str, function: str) -> Any:
    """Call a function of `datasets` with the location and return its result. For a table saved with
    ``save_to_disk``, which these functions do not read, return its path."""
    import datasets

    load = getattr(datasets, function)
    path = Path(location).expanduser()
    if path.exists():
        saved = (path / "dataset_dict.json").exists() or (path / "state.json").exists()
        with tables_cache():
            return path if saved else load(str(path))
    if location.startswith(("/", ".", "~")) or "\\" in location or location.count("/") > 1:
        raise FileNotFoundError(f"hf:{location}: the local path does not exist.")
    name, _, config = location.partition(":")
    with tables_cache():
        return _load_from_hub(load, name, config or None)


def _load_from_hub(load: Callable, name: str, config: str | None) -> Any:
    import datasets

    try:
        return load(name, config)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise ValueError(
            f"hf:{name} is not on the Hub, or you have no access: {error} Check the name. For a "
            "gated data set, accept its terms on its page and run 'hf auth login'."
        ) from error
    except (ConnectionError, OSError) as error:
        if error.errno in UNWRITABLE:
            raise
        raise ConnectionError(
            f"hf:{name} is neither a local folder nor cached, and the Hub cannot be reached: "
            f"{error}"
        ) from error
    except ValueError as error:
        raise ValueError(f"hf:{name}: {error} Select a config with hf:{name}:CONFIG.") from error


def _image(value: Any, row: int) -> str | bytes:
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if not value:
        raise BadImage(f"row {row}", _NO_IMAGE)
    return value


def _check_arrays(kind: Any, column: str) -> bool:
    """Return whether an image column of this type contains arrays.

    Raises: ValueError for a type that cannot contain images, or has the channels first.
    """
    import datasets

    if isinstance(kind, dict | datasets.Image | datasets.Value):
        return False
    if not isinstance(kind, datasets.Array2D | datasets.Array3D):
        raise ValueError(
            f"{column} has type {type(kind).__name__}; expected Image, bytes, paths, or arrays of "
            "type Array2D (h, w) or Array3D (h, w, bands)."
        )
    check_bands_last(kind.shape, column)
    return True


def check_bands_last(shape: Sequence[int], what: str) -> None:
    """Raise ValueError for the shape of an array whose bands seem to come first."""
    first, *last = shape
    if len(last) == 2 and last[0] == last[1] != first:
        raise ValueError(
            f"{what} has arrays of shape {tuple(shape)}, expected (h, w, bands); if the bands come "
            "first, move them to the end, as np.moveaxis(array, 0, -1) does."
        )


def name_bands(shape: Sequence[int], dtype: str) -> list[str] | None:
    """Return names for the bands of arrays (h, w[, bands]); None for grey and colour images."""
    count = (*shape, 1)[2]
    plain = dtype == "uint8" and count in (1, 3)
    return None if plain else [f"band{i}" for i in range(1, count + 1)]


def _caption_column(name: str | None, features: Any, source: str) -> str | None:
    known = [n for n in _CAPTION_NAMES if is_text_column(features.get(n))]
    return find_column(name, known, features, "caption", source)


def _image_column(name: str | None, features: Any, source: str) -> str:
    import datasets

    if requested := find_column(name, (), features, "image", source):
        return requested
    types: Any = (datasets.Image, (datasets.Array2D, datasets.Array3D))
    columns = ([n for n, kind in features.items() if isinstance(kind, type)] for type in types)
    names: list[str] = next(filter(None, columns), [])
    if "image" in names or (not names and "image" in features):  # else bytes or paths
        return "image"
    if len(names) == 1:
        return names[0]
    what = f"several image columns ({', '.join(names)})" if names else "no image column"
    raise ValueError(
        f"{source} has {what}; select one with image=. Columns: {', '.join(features)}."
    )


def _label_column(name: str | None, features: Any, source: str) -> str | None:
    import datasets

    if name == "none":
        return None
    if requested := find_column(name, (), features, "label", source):
        return requested
    names = [n for n, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    names = names or [n for n, kind in features.items() if listed_classes(kind)]
    if len(names) == 1:
        return names[0]
    return next((n for n in _LABEL_NAMES if n in names), None)


def _join(tables: list[Any]) -> Any:
    import datasets

    return tables[0] if len(tables) == 1 else datasets.concatenate_datasets(tables)
