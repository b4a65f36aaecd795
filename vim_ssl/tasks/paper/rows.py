"""The measurements of `vim-ssl paper` as rows of a CSV file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vim_ssl.utils.environment import ORIGIN, origin
from vim_ssl.utils.files import append_rows, read_rows

# `budget` is what limits a measurement, such as seconds of training; `correct` has a bit per test
# image, in hexadecimal digits, so that intervals can be computed from the file.
COLUMNS = (*ORIGIN, "measure", "arm", "data", "seed", "budget", "metric", "value", "seconds",
           "steps", "settings", "correct")  # fmt: skip
TABLE = "paper.csv"
Row = Mapping[str, str]


@dataclass(frozen=True)
class Key:
    """What a row measures."""

    measure: str
    arm: str
    data: str = ""
    seed: str = ""
    budget: str = ""


@dataclass
class Rows:
    """The rows of a campaign, and the committed ones.

    Attributes:
        output: the file of the campaign, which gets new rows.
        folder: of the committed rows, also of other benchmarks; None outside a checkout.
    """

    output: Path
    folder: Path | None = None
    _read: dict[Path, list[dict[str, str]]] = field(default_factory=dict)

    def select(self, **columns: str) -> list[Row]:
        """The rows with these values: those of the campaign if there are any, else committed
        ones. Rows of different machines are thus never mixed."""
        chosen = self.of_campaign(**columns)
        return chosen or [row for row in self.committed(TABLE) if _has(row, columns)]

    def of_campaign(self, **columns: str) -> list[Row]:
        """The rows of the campaign with these values."""
        return [row for row in self._of(self.output) if _has(row, columns)]

    def keys(self) -> set[Key]:
        """What the campaign has measured."""
        names = Key.__dataclass_fields__
        return {Key(*(row[name] for name in names)) for row in self._of(self.output)}

    def append(self, key: Key, **values: Any) -> None:
        append_rows(self.output, COLUMNS, [origin() | vars(key) | values])
        self._read.pop(self.output, None)

    def committed(self, file: str) -> list[dict[str, str]]:
        """The rows of a benchmark; none outside a checkout."""
        return self._of(self.folder / file) if self.folder else []

    def _of(self, path: Path) -> list[dict[str, str]]:
        if path not in self._read:
            # A row without its last column was cut by a kill.
            self._read[path] = [row for row in read_rows(path) if None not in row.values()]
        return self._read[path]


def _has(row: Row, columns: Mapping[str, str]) -> bool:
    return all(row[name] == value for name, value in columns.items())


def conditions(rows: Sequence[Row]) -> str:
    """Return hardware, versions, commits and dates of rows in one line."""
    parts = []
    for column in ("hardware", "versions", "commit", "date"):
        values = sorted({row[column] for row in rows if row.get(column)})
        if values:
            parts.append(f"commit {', '.join(values)}" if column == "commit" else "; ".join(values))
    return " · ".join(parts)
