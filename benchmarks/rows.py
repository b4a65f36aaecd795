"""Rows of CSV files with their origin, tables in Markdown, and the options of every script."""

import argparse
import csv
import statistics
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from vim_ssl.utils.environment import commit, environment
from vim_ssl.utils.files import append_rows as append_rows  # for the scripts

RESULTS = Path(__file__).parent / "results"
ORIGIN = ("date", "commit", "hardware", "versions")  # the columns that `origin` fills


def results_parser(doc: str, files: str) -> argparse.ArgumentParser:
    """Return a parser whose help shows defaults, with ``--out``, the folder for the rows.

    Args:
        doc: the script's docstring; its first line is the description.
        files: names of the CSV files that the script appends to.
    """
    parser = argparse.ArgumentParser(
        description=doc.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--out", type=Path, default=RESULTS, metavar="FOLDER",
        help=f"rows are appended to {files} there; git tracks the default",
    )  # fmt: skip
    return parser


def origin() -> dict[str, str]:
    """Return date, commit, hardware and versions."""
    return {"date": time.strftime("%Y-%m-%d"), "commit": commit(), **environment()}


def read_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file as text; an empty list if there is no such file."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def mean_and_spread(values: Sequence[float]) -> str:
    """``93.3 ± 0.4``, mean and standard deviation; the value alone if there is one, "" if none."""
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    lines.insert(1, "|---" * len(head) + "|")
    return "\n".join(lines)
