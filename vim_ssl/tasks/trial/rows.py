"""trial.csv, a row per finished job, and the names of jobs."""

import csv
import io
import os
import re
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

from vim_ssl.tasks.trial.plan import Job
from vim_ssl.utils.files import append_rows

COLUMNS = ("arm", "seed", "rate", "seconds", "epochs", "images", "validation", "settings", "run")


def read_jobs(file: Path) -> dict[Job, dict[str, Any]]:
    """Return the rows of the finished jobs; a row that a kill has cut is not one."""
    rows = csv.DictReader(io.StringIO(_whole(file).decode("utf-8"), newline=""))
    return {
        Job(row["arm"], int(row["seed"]), float(row["rate"])): row
        | {"validation": float(row["validation"]), "seconds": float(row["seconds"])}
        for row in rows
    }


def write_job(file: Path, row: Mapping[str, Any]) -> None:
    """Append a row, after removing one that a kill has cut: an open quote in it would take in the
    new row."""
    if file.exists():
        os.truncate(file, len(_whole(file)))
    append_rows(file, COLUMNS, [dict(row)])


def _whole(file: Path) -> bytes:
    """The lines of a file that are complete; no row has a line break."""
    content = file.read_bytes() if file.exists() else b""
    return content[: content.rfind(b"\n") + 1]


def describe(job: Job) -> str:
    rate = f", learning rate times {job.rate:g}" if job.rate != 1 else ""
    return f"{job.arm}, seed {job.seed}{rate}"


def slug(name: str) -> str:
    """Name of a folder; a hash tells apart names that differ in punctuation or case."""
    words = re.sub(r"\W+", "-", name).strip("-")
    return f"{words}-{blake2b(name.encode(errors='surrogateescape'), digest_size=4).hexdigest()}"


def folder_of(job: Job) -> str:
    """Name of the folder of a job."""
    return f"{slug(job.arm)}-{job.seed}" + (f"-rate-{job.rate:g}" if job.rate != 1 else "")
