"""The page of a run: `report.html`, one self-contained file that makes no network requests.

    run directory -> record.Record -> page.render (templates/page.html) -> report.html

record.py    what the run has written so far      settings.py  the lists of settings
curve.py     the geometry of one curve            page.py      the content of every section

Content that a run has not written yet is skipped, so the page can be drawn at any time.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from vim_ssl.report.page import render
from vim_ssl.report.record import Record
from vim_ssl.training.run import newest_run
from vim_ssl.utils.files import atomic_write


def write_report(folder: str | Path) -> Path:
    """Draw ``report.html`` of the run in ``folder`` from what the run has written so far.

    Returns: the page's path. A reader sees the old page or the new one, never a part.
    Raises: FileNotFoundError if ``folder`` holds neither config.json nor metrics.jsonl.
    """
    run = Record(Path(folder))
    path = run.folder / "report.html"
    # The log may hold file names that are not valid Unicode; they must not cost the page.
    atomic_write(path, render(run).encode(errors="replace"))
    return path


def main(argv: Sequence[str] | None = None) -> int:
    """``vim-ssl report [RUN]``: draw the page of a run again."""
    parser = argparse.ArgumentParser(description="Draw the page of a run, finished or not.")
    parser.add_argument("run", nargs="?", help="run directory; default: the newest with an encoder")
    run = parser.parse_args(argv).run
    print(f"Report: {write_report(run or newest_run())}")
    return 0
