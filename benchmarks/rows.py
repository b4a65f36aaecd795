"""CSV rows with what their figures depend on, for every script of this folder."""

import argparse
import csv
import statistics
import time
from pathlib import Path

from vim_ssl.utils.environment import commit, environment
from vim_ssl.utils.files import append_rows

__all__ = [
    "ORIGIN",
    "RESULTS",
    "append_rows",
    "mean_and_spread",
    "origin",
    "read_rows",
    "results_parser",
]

RESULTS = Path(__file__).parent / "results"
ORIGIN = ("date", "commit", "hardware", "versions")  # the columns that `origin` fills


def results_parser(doc: str, files: str) -> argparse.ArgumentParser:
    """A script's parser: its help shows defaults, and ``--out`` is where its rows go.

    Args:
        doc: the script's docstring; the first line describes it.
        files: names of the CSV files it appends to.
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
    """Date, commit, hardware and versions."""
    return {"date": time.strftime("%Y-%m-%d"), "commit": commit(), **environment()}


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file as text; none if there is no such file."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def mean_and_spread(values: list[float]) -> str:
    """``93.3 ± 0.4``, the mean and the standard deviation; of one value only that, of none ""."""
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"
