"""The report of a run: `report.html`, one self-contained file without network requests.

    run directory -> record.Record -> page.render (templates/page.html) -> report.html

record.py    read the files of the run            page.py      header and curves of the page
results.py   results, and what explains them      images.py    images over the steps
curve.py     the geometry of a plot               settings.py  the lists of settings
titles.py    names                                compare.py   one page for several runs
trial.py     the page of a trial

Content that the run has not written yet is skipped, so the report can be written at any time.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from vim_ssl.report.record import Record
from vim_ssl.training.run import newest_run
from vim_ssl.utils.files import atomic_write


def write_report(folder: str | Path) -> Path:
    """Write ``report.html`` for the run in ``folder``, from the files the run has written so far.

    Returns: the path of the report, which is written atomically.
    Raises: FileNotFoundError if ``folder`` contains neither config.json nor metrics.jsonl.
    """
    from vim_ssl.report.page import render  # jinja2, only where a page is drawn
    from vim_ssl.report.trial import is_trial, render_trial

    run = Record(Path(folder))
    path = run.folder / "report.html"
    # The log may contain file names that are not valid Unicode; the report is written anyway.
    page = render_trial(run) if is_trial(run) else render(run)
    atomic_write(path, page.encode(errors="replace"))
    return path


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``vim-ssl report [RUN]``: write the report of a run again."""
    parser = argparse.ArgumentParser(description="Write the report of a run, finished or not.")
    parser.add_argument("run", nargs="?", help="run directory; default: the newest with an encoder")
    run = parser.parse_args(argv).run
    print(f"Report: {write_report(run or newest_run())}")
    return 0
