"""Rows of CSV files with their origin, tables in Markdown, and the options of every script."""

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

# For the scripts.
from vim_ssl.utils.environment import ORIGIN as ORIGIN
from vim_ssl.utils.environment import origin as origin
from vim_ssl.utils.files import append_rows as append_rows
from vim_ssl.utils.files import read_rows as read_rows
from vim_ssl.utils.names import markdown_table as markdown_table

RESULTS = Path(__file__).parent / "results"


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


def mean_and_spread(values: Sequence[float]) -> str:
    """``93.3 ± 0.4``, mean and standard deviation; the value alone if there is one, "" if none."""
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"
