"""Labels and splits of Hugging Face tables: class names of splits and of files are matched by
name."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice
from typing import Any, TypeAlias

from vim_ssl.data.classes import unite_classes
from vim_ssl.data.spec import canonical_split
from vim_ssl.data.split import is_known
from vim_ssl.data.tables import SPLIT_COLUMN, find_column, read_splits, unread_splits
from vim_ssl.data.values import number_labels
from vim_ssl.utils.files import reading

_LABEL_TYPES = ("int", "uint", "bool", "float", "string", "large_string")
BATCH = 10_000  # values of a column read at once
# By split, the number of rows and the features of the files that its table was made of, in order.
Parts: TypeAlias = Mapping[str, Sequence[tuple[int, Any]]]


def parquet_parts(files: Mapping[str, Sequence[str]]) -> Parts:
    """Return the rows and features of local parquet files by split; of other files nothing.

    The datasets library reads all files with the class names of one of them.
    Raises: ValueError naming a damaged file.
    """
    names = [name for of_split in files.values() for name in of_split]
    if len(names) < 2 or not all(
        name.endswith(".parquet") and os.path.isfile(name) for name in names
    ):
        return {}
    from datasets import Features
    from pyarrow import parquet

    def part(name: str) -> tuple[int, Any]:
        with reading(name, "a parquet file"):
            footer = parquet.read_metadata(name)
            return footer.num_rows, Features.from_arrow_schema(footer.schema.to_arrow_schema())

    with ThreadPoolExecutor(16) as pool:
        known = dict(zip(names, pool.map(part, names), strict=True))
    return {split: [known[name] for name in of_split] for split, of_split in files.items()}


def united_features(parts: Parts) -> Any:
    """Return features of parquet files whose columns of ClassLabel have the names of all files;
    None if all files have the same names."""
    from datasets import ClassLabel, Features

    every = [features for of_split in parts.values() for _, features in of_split]
    united = {}
    for name, kind in every[0].items() if every else ():
        lists = [features[name].names for features in every
                 if isinstance(features.get(name), ClassLabel)]  # fmt: skip
        if isinstance(kind, ClassLabel) and any(names != lists[0] for names in lists):
            united[name] = ClassLabel(names=unite_classes(lists)[0])
    return Features({**every[0], **united}) if united else None


def listed_classes(kind: Any) -> list[str] | None:
    """Return the class names of a column of lists of ClassLabel."""
    import datasets

    inner = getattr(kind, "feature", None)
    return inner.names if isinstance(inner, datasets.ClassLabel) else None


def _row(numbers: list[int] | None, count: int) -> list[int]:
    """Convert a list of classes to a row of 0 and 1, or a row of -1 if they are unknown."""
    if numbers is None or min(numbers, default=0) < 0:
        return [-1] * count
    return [int(i in numbers) for i in range(count)]


def read_labels(
    name: str, chosen: Sequence[str], tables: Mapping[str, Any], parts: Parts
) -> tuple[list[Any] | None, list[str] | None, list[str]]:
    """Return the labels of the chosen tables, the class names, and remarks; None for withheld
    labels."""
    kind = tables[chosen[0]].features[name]

    def values(split: str) -> list[Any]:
        table = tables[split]
        return (
            table.select_columns([name])[:][name]
            if name in table.features
            else ([None] * len(table))
        )

    if _names_of(kind) is None:
        if not str(getattr(kind, "dtype", "")).startswith(_LABEL_TYPES):
            raise ValueError(
                f"label={name}: the column must contain integers, strings or lists of ClassLabel."
            )
        if other := [s for s, t in tables.items() if _names_of(t.features.get(name))]:
            raise ValueError(
                f"label={name}: the column is of type ClassLabel in {other[0]}, but not in "
                f"{chosen[0]}; use one type."
            )
        every = {split: values(split) for split in tables}
        _refuse_fractions(name, chain(*every.values()))
        return number_labels(chain(*(every[split] for split in chosen)), chain(*every.values()))
    known = {
        split: [_names_of(f.get(name)) or _names_of(tables[split].features.get(name)) or []
                for _, f in parts[split]] for split in tables
    }  # fmt: skip
    classes, numbers, remarks = unite_classes(list(chain(*known.values())))
    numbers_of = iter(numbers)
    of_parts = {split: list(islice(numbers_of, len(known[split]))) for split in tables}
    labels: list[Any] = []
    for split in chosen:
        stored = iter(values(split))
        for (rows, _), number in zip(parts[split], of_parts[split], strict=True):
            labels += [_numbered(value, number) for value in islice(stored, rows)]
    if listed_classes(kind) is not None:
        labels = [_row(value, len(classes)) for value in labels]
    else:
        labels = [-1 if value is None else value for value in labels]
    return (labels, classes, remarks) if any(map(is_known, labels)) else (None, None, [])


def _names_of(kind: Any) -> list[str] | None:
    """Return the class names of a column of ClassLabel, or of lists of it."""
    return listed_classes(kind) or getattr(kind, "names", None)


def _numbered(value: Any, numbers: Sequence[int]) -> Any:
    """Return a stored label, or list of labels, in other numbers; None and -1 are unknown."""
    if value is None:
        return None
    if isinstance(value, list):
        return [numbers[v] if v >= 0 else v for v in value]
    return numbers[value] if value >= 0 else -1


def _refuse_fractions(name: str, values: Iterable[Any]) -> None:
    """Raise ValueError for a float label that is not a whole number; NaN is missing."""
    for value in values:
        if isinstance(value, float) and value == value and not value.is_integer():
            raise ValueError(
                f"label={name}: {value} is not a class; the column must contain integers, strings "
                "or lists of ClassLabel."
            )


def column_of_splits(tables: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Return the split of each row of a single table, and remarks, as for tables of text. Several
    tables are splits themselves, so the former is empty."""
    first = next(iter(tables.values()))
    name = find_column(None, (SPLIT_COLUMN,), first.features, "split", "the table")
    if len(tables) > 1:
        differing = [
            split
            for split, table in tables.items()
            if name is not None
            and name in table.features
            and set(map(canonical_split, _texts(table, name))) != {canonical_split(split)}
        ]
        return [], [
            f"the column {name!r} is not used, because the tables are the splits "
            f"{', '.join(tables)}; its values differ in {split}" for split in differing[:1]
        ]  # fmt: skip
    if name is None:
        return [], list(unread_splits((name, _texts(first, name)) for name in first.features
                                      if is_text_column(first.features[name]) or
                                      getattr(first.features[name], "names", None)))  # fmt: skip
    return read_splits(_texts(first, name), [f"row {row}" for row in range(len(first))])


def _texts(table: Any, name: str) -> Iterator[Any]:
    """Yield the values of a column; of one of classes, their names."""
    column, names = table.select_columns([name]), getattr(table.features[name], "names", None)
    for start in range(0, len(column), BATCH):
        for value in column[start : start + BATCH][name]:
            yield names[value] if names and value is not None and value >= 0 else value


def is_text_column(kind: Any) -> bool:
    """Return whether a column contains strings or lists of strings."""
    inner = getattr(kind, "feature", kind)
    return getattr(inner, "dtype", "") in ("string", "large_string")
