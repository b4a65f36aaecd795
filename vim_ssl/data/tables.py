"""Read CSV and TSV files with a header."""

import csv
import io
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import chain, repeat
from pathlib import Path

from vim_ssl.data.spec import near
from vim_ssl.utils.files import read_text

TABLES = (".csv", ".tsv")


def read_rows(
    lines: Iterable[str], suffix: str, source: str, strict: bool = False
) -> tuple[list[str], Iterator[tuple[int, list[str], str]]]:
    """Read a table row by row.

    Args:
        lines: lines with their line ends.
        suffix: suffix of the file. The delimiter is the first of tab, "," and ";" that occurs in
            the header; without any, the suffix determines it.
        source: name of the table, for messages.
        strict: strip fields, and report a lone quote instead of reading on to the next quote.
            Tables with tabs are seldom quoted: there a quote is plain text unless two of them
            enclose the whole field.
    Returns: the header and, for each non-empty row, the line it begins at, its fields, and a
        description of its fault ("" if there is none).
    Raises: ValueError for a header that cannot be read.
    """
    lines = iter(lines)
    first = next(lines, "")
    delimiter = next(
        (sign for sign in "\t,;" if sign in first), "\t" if suffix.lower() == ".tsv" else ","
    )
    plain = strict and delimiter == "\t"
    clean = _unquoted if plain else str.strip if strict else str
    reader = csv.reader(
        chain([first], lines), delimiter=delimiter, strict=strict,
        quoting=csv.QUOTE_NONE if plain else csv.QUOTE_MINIMAL,
    )  # fmt: skip

    def rows() -> Iterator[tuple[int, list[str], str]]:
        while True:
            line = reader.line_num + 1
            try:
                row = next(reader, None)
            except csv.Error as error:
                end = reader.line_num  # a lone quote consumes the lines up to the next quote
                yield line, [], f"{error}{f'; lost down to line {end}' if end > line else ''}"
                continue
            if row is None:
                return
            if row:
                yield line, [clean(value) for value in row], ""

    try:
        header = next(reader, [])
    except csv.Error as error:
        raise ValueError(f"{source}: the header cannot be read: {error}") from error
    return [clean(name).strip() for name in header], rows()


def read_columns(file: Path, source: str) -> dict[str, tuple[str, ...]]:
    """Read a whole table: column name → its values.

    Raises: FileNotFoundError; ValueError for text that is not UTF-8, and for a row whose length
        differs from the header's.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{source}: the file does not exist.")
    text = io.StringIO(read_text(file), newline="")
    header, numbered = read_rows(text, file.suffix, source)
    rows = []
    for number, (line, row, fault) in enumerate(numbered, 1):
        if fault:
            raise ValueError(f"{source}, line {line}: {fault}")
        if len(row) != len(header):
            raise ValueError(
                f"{source}: row {number} has {len(row)} fields, the header has {len(header)}; "
                "quote fields that contain the delimiter."
            )
        rows.append(row)
    return dict(zip(header, zip(*rows, strict=True) if rows else repeat(()), strict=False))


def find_column(
    requested: str | None, known: Sequence[str], columns: Collection[str], option: str, source: str
) -> str | None:
    """Return the requested column, else the first known name among the columns, else None.

    Raises: ValueError if the requested column does not exist.
    """
    if requested and requested not in columns:
        raise ValueError(
            f"{source} has no column {requested!r} for {option}=.{near(requested, list(columns))} "
            f"It has {', '.join(columns)}."
        )
    return requested or next((name for name in known if name in columns), None)


def _unquoted(value: str) -> str:
    value = value.strip()
    if len(value) > 1 and value[0] == value[-1] == '"':
        return value[1:-1].replace('""', '"')
    return value
