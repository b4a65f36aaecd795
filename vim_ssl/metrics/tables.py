"""Classes and predictions as CSV files and printed tables."""

import csv
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vim_ssl.utils.files import atomic_path

Row = dict[str, Any]


def ratio(part: float, whole: float) -> float:
    """part / whole; NaN if whole is 0."""
    return float(part / whole) if whole else math.nan


def per_class(confusion: np.ndarray, classes: Sequence[str]) -> list[Row]:
    """Compute one row per class from a confusion matrix (rows: truth, columns: prediction).

    Returns: rows of class, count, share (of all), iou, recall, precision, dice (equal to F1), and
        most_taken_for, the class it is most often confused with, or "". Values of an absent class
        are NaN.
    """
    rows = []
    for i, name in enumerate(classes):
        hits, truth, predicted = (
            int(n) for n in (confusion[i, i], confusion[i].sum(), confusion[:, i].sum())
        )
        others = np.where(np.arange(len(classes)) == i, 0, confusion[i])
        rows.append({
            "class": name, "count": truth, "share": ratio(truth, confusion.sum()),
            "iou": ratio(hits, truth + predicted - hits), "recall": ratio(hits, truth),
            "precision": ratio(hits, predicted), "dice": ratio(2 * hits, truth + predicted),
            "most_taken_for": classes[int(others.argmax())] if others.any() else "",
        })  # fmt: skip
    return rows


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence]) -> None:
    """Write a table in UTF-8; floats get four decimals.

    Bytes of a file name that are not UTF-8 become backslash escapes, which
    `vim_ssl.utils.names.original` reverses; names with commas, quotes or line breaks are quoted.
    The file is replaced only once all rows are written.
    """
    with (
        atomic_path(path) as partial,
        open(partial, "w", newline="", encoding="utf-8", errors="backslashreplace") as file,
    ):
        table = csv.writer(file)
        table.writerow(columns)
        table.writerows([f"{v:.4f}" if isinstance(v, float) else v for v in row] for row in rows)


def class_table(
    rows: Sequence[Row], count: str, columns: dict[str, str], *, scale: float = 1, most: int = 20
) -> str:
    """Format the classes with the largest ``count`` as a table, one per line.

    Args:
        columns: heading -> key of a row.
        scale: factor for floats, which are printed with one decimal; None is printed as a dash.
    """

    def cell(value: Any) -> str:
        if isinstance(value, float):
            return f"{scale * value:.1f}"
        return "-" if value is None else str(value)

    rows = sorted(rows, key=lambda row: -row[count])
    width = max([5, *(len(row["class"]) for row in rows[:most])])
    lines = [f"{'class':{width}}" + "".join(f"  {head:>7}" for head in columns)]
    for row in rows[:most]:
        cells = (f"  {cell(row[key]):>7}" for key in columns.values())
        lines.append(f"{row['class']:{width}}" + "".join(cells))
    if len(rows) > most:
        lines.append(f"… and {len(rows) - most} more in classes.csv")
    return "\n".join(lines)
