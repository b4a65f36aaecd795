"""Read CSV and TSV files with a header: the one reader of tables."""

import csv
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from vim_ssl.data.spec import SPLIT_NAMES, canonical_split, near
from vim_ssl.data.values import name_of
from vim_ssl.utils.files import encoding_of, reading

TABLES = (".csv", ".tsv")
DELIMITERS = "\t,;|"
SPLIT_COLUMN = "split"
# First bytes of files that people give as tables -> what they are, and what to do.
PACKED = {
    b"\x1f\x8b": ("compressed with gzip", "unpack it with gunzip"),
    b"PK\x03\x04": ("a zip archive or an Excel file", "unpack it, or save it as CSV in UTF-8"),
    b"\xd0\xcf\x11\xe0": ("an old Excel file", "save it as CSV in UTF-8"),
    b"BZh": ("compressed with bzip2", "unpack it with bunzip2"),
    b"\xfd7zXZ": ("compressed with xz", "unpack it with unxz"),
    b"\x28\xb5\x2f\xfd": ("compressed with zstd", "unpack it with unzstd"),
    b"PAR1": ("a parquet file", "open it with parquet:"),
}
# A line within a quoted field that is a row of its own: an unclosed quote has swallowed it.
_SWALLOWED = re.compile(
    r"[\r\n][^\r\n]*\.(jpe?g|png|tiff?|bmp|gif|webp|dcm|nii|gz|mp4|avi|mov|svs)\"?\s*[\t,;|]",
    re.IGNORECASE,
)


class Row(NamedTuple):
    """A row of a table: the line where it begins, its fields without spaces at their ends, and a
    description of its fault ("" if there is none)."""

    line: int
    fields: list[str]
    fault: str


@dataclass(frozen=True)
class Table:
    """A whole table without faults.

    Attributes:
        source: name of the table, for messages.
        header: names of the columns; "" for a column without a name.
        rows: the rows that are not empty.
    """

    source: str
    header: list[str]
    rows: list[Row]

    def column(
        self, requested: str | None, known: Sequence[str], option: str, *, one_line: bool = True
    ) -> list[str] | None:
        """Return the values of a column; see `find_column`.

        Args:
            one_line: refuse values with line breaks.
        Raises: the errors of `find_column`; ValueError for a line break.
        """
        name = find_column(requested, known, self.header, option, self.source)
        if name is None:
            return None
        position = self.header.index(name)
        if one_line:
            for row in self.rows:
                if "\n" in row.fields[position] or "\r" in row.fields[position]:
                    raise ValueError(
                        f"{self.source}, line {row.line}: the field {name!r} has a line break; is "
                        "a quote not closed?"
                    )
        return [row.fields[position] for row in self.rows]

    def required(self, known: Sequence[str], option: str) -> list[str]:
        """Return the values of a column with one of these names. Raises: ValueError without it."""
        values = self.column(None, known, option)
        if values is None:
            raise ValueError(
                f"{self.source} has no column {' or '.join(known)}; it has {_names(self.header)}."
            )
        return values

    def splits(self, kept: Sequence[int]) -> tuple[list[str], list[str]]:
        """Return the split of each kept row, and remarks; see `read_splits`. Without a column of
        splits the former is empty."""
        values = self.column(None, (SPLIT_COLUMN,), "split")
        if values is None:
            return [], list(unread_splits(
                (name, (row.fields[i] for row in self.rows)) for i, name in enumerate(self.header)
            ))  # fmt: skip
        lines = [f"line {self.rows[i].line}" for i in kept]
        return read_splits([values[i] for i in kept], lines)


def read_splits(values: Iterable[Any], rows: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the split of each row, "" without one, and remarks. Spellings of one split are one:
    "Train" and "train", "val" and "valid".

    Args:
        values: the column of splits.
        rows: what a message calls each row.
    """
    texts = [name_of(value) or "" for value in values]
    spellings: dict[str, set[str]] = defaultdict(set)
    for text in set(texts):
        spellings[canonical_split(text.lower())].add(text)
    name = {text: text if len(of) == 1 else canonical
            for canonical, of in spellings.items() for text in of}  # fmt: skip
    remarks = []
    if lacking := texts.count(""):
        bare = [row for row, text in zip(rows, texts, strict=True) if not text]
        remarks.append(f"{lacking:,} rows name no split and are in none: {', '.join(bare[:3])}")
    return [name[text] for text in texts], remarks


def sort_splits(split_of: Iterable[str]) -> list[str]:
    """Return the different names of splits but "": train, validation and test first."""
    order = list(SPLIT_NAMES)

    def position(name: str) -> tuple[int, str]:
        split = canonical_split(name)
        return (order.index(split) if split in order else len(order), name)

    return sorted(set(split_of) - {""}, key=position)


def unread_splits(columns: Iterable[tuple[str, Iterable[Any]]]) -> Iterator[str]:
    """Describe the columns that are not named "split" but have only names of splits, several.

    Args:
        columns: name and values of each.
    """
    for column, values in columns:
        splits: set[str] = set()
        for name in filter(None, map(name_of, values)):
            if canonical_split(name) not in SPLIT_NAMES:
                break
            splits.add(canonical_split(name))
        else:
            if len(splits) > 1:
                yield (
                    f"the column {column!r} seems to name splits, but all rows are read as one "
                    f"split; rename it to {SPLIT_COLUMN!r} to use it"
                )


def read_rows(file: Path, source: str) -> tuple[list[str], Iterator[Row]]:
    """Read a table row by row.

    The delimiter is the one of tab, comma, semicolon and "|" that occurs most often in the header.
    Between tabs, a quote is plain text unless two of them enclose the whole field. Lines may end in
    any way; a byte order mark, empty lines, and Excel's line ``sep=;`` are skipped.

    Args:
        source: name of the table, for messages.
    Returns: the header, and the rows that are not empty. Bytes that are not UTF-8 become
        surrogates.
    Raises: FileNotFoundError; ValueError for a header that cannot be read.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{source}: the file does not exist.")
    _refuse_packed(file, source)
    lines = _lines(file)
    delimiter, first, before = "", "", 0
    for first in lines:
        if match := re.fullmatch(r'"?sep=(.)"?', first.strip()):
            delimiter = match[1]
        elif first.strip():
            break
        before += 1
    if "\0" in first:
        raise ValueError(f"{source} contains NUL bytes, so it is not UTF-8; save it as UTF-8.")
    delimiter = delimiter or _delimiter(first, file.suffix)
    plain = delimiter == "\t"
    reader = csv.reader(
        chain([first], lines), delimiter=delimiter, strict=True, skipinitialspace=not plain,
        quoting=csv.QUOTE_NONE if plain else csv.QUOTE_MINIMAL,
    )  # fmt: skip
    clean = _unquoted if plain else str.strip
    try:
        header = [clean(name).strip() for name in next(reader, [])]
    except csv.Error as error:
        raise ValueError(f"{source}: the header cannot be read: {_reason(error)}") from error

    def rows() -> Iterator[Row]:
        while True:
            line = before + reader.line_num + 1
            try:
                fields = next(reader, None)
            except csv.Error as error:
                end = before + reader.line_num  # a lone quote consumes lines up to the next quote
                lost = f"; lost down to line {end}" if end > line else ""
                yield Row(line, [], f"{_reason(error)}{lost}")
                continue
            if fields is None:
                return
            fields = [clean(value) for value in fields]
            if any(fields):
                yield Row(line, fields, _fault(fields, len(header)))

    return header, rows()


def load_table(file: Path, source: str) -> Table:
    """Read a whole table.

    Raises: FileNotFoundError; ValueError for text that is not UTF-8, and for a row that cannot be
        read or whose length differs from the header's.
    """
    header, rows = read_rows(file, source)
    kept = []
    for row in rows:
        if row.fault:
            hint = "; quote fields that contain the delimiter" if row.fields else ""
            raise ValueError(f"{source}, line {row.line}: {row.fault}{hint}.")
        if not is_text(row.fields):
            raise ValueError(f"{file} is not UTF-8 (line {row.line}); save it as UTF-8.")
        kept.append(row)
    return Table(source, header, kept)


def is_text(fields: Iterable[str]) -> bool:
    """True if all fields were UTF-8; see `read_rows`."""
    try:
        for field in fields:
            if not field.isascii():
                field.encode()
    except UnicodeEncodeError:
        return False
    return True


def find_column(
    requested: str | None, known: Sequence[str], columns: Iterable[str], option: str, source: str
) -> str | None:
    """Return the requested column, else the first known name among the columns, in any letter case,
    else None. A column without a name is never returned.

    Raises: ValueError if the requested column does not exist, or if two columns have its name.
    """
    columns = list(columns)
    if requested and requested not in columns:
        raise ValueError(
            f"{source} has no column {requested!r} for {option}=.{near(requested, columns)} "
            f"It has {_names(columns)}."
        )
    # An exact name goes before one in another letter case.
    lower = {column.lower(): column for column in reversed(columns)}
    lower |= {column: column for column in columns}
    name = requested or next((lower[name] for name in known if name in lower), None)
    if name and columns.count(name) > 1:
        raise ValueError(f"{source} has several columns {name!r}; rename all but one.")
    return name


def _names(columns: Iterable[str]) -> str:
    return ", ".join(column or "(no name)" for column in columns) or "no columns"


def _refuse_packed(file: Path, source: str) -> None:
    with open(file, "rb") as raw:
        begin = raw.read(max(map(len, PACKED)))
    for mark, (kind, remedy) in PACKED.items():
        if begin.startswith(mark):
            raise ValueError(f"{source} is {kind}, not a table of text; {remedy}.")


def _lines(file: Path) -> Iterator[str]:
    with open(file, "rb") as raw:
        encoding = encoding_of(raw.read(4))
    with (
        reading(file, "a table", "save it as UTF-8"),
        open(file, encoding=encoding, errors="surrogateescape", newline="") as lines,
    ):
        yield from lines


def _delimiter(header: str, suffix: str) -> str:
    plain = re.sub('"[^"]*"', "", header)
    best = max(DELIMITERS, key=plain.count)  # the first of those that occur equally often
    return best if best in plain else "\t" if suffix.lower() == ".tsv" else ","


def _fault(fields: Sequence[str], columns: int) -> str:
    if any("\0" in field for field in fields):
        return "it contains a NUL byte"
    if any(_SWALLOWED.search(field) for field in fields if "\n" in field or "\r" in field):
        return "a quoted field contains a further row; is a quote not closed?"
    if len(fields) != columns:
        return f"{len(fields)} fields, the header has {columns}"
    return ""


def _reason(error: csv.Error) -> str:
    text = str(error)
    return "a quote is not closed" if "unexpected end" in text or "limit" in text else text


def _unquoted(value: str) -> str:
    value = value.strip()
    if len(value) > 1 and value[0] == value[-1] == '"':
        return value[1:-1].replace('""', '"')
    return value
