"""What a measurement of a claim is: jobs that write rows, and findings that read them."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from vim_ssl.tasks.paper.findings import Finding
from vim_ssl.tasks.paper.rows import Key, Row, Rows


@dataclass(frozen=True)
class Settings:
    """How much is measured.

    Attributes:
        data: names of the image sets of trainings.
        seeds: number of seeds of a training.
        seconds: processor time of a training.
        pixels: side of the images whose time and memory are measured.
        command: runs ``vim-ssl`` with these arguments in this process; returns its exit code.
        report: prints a line of progress.
        log: file for what the trainings print.
    """

    data: tuple[str, ...]
    seeds: int
    seconds: float
    pixels: tuple[int, ...]
    command: Callable[[Sequence[str]], int]
    report: Callable[[str], None] = print
    log: Path = Path(os.devnull)

    @property
    def budget(self) -> str:
        return f"{self.seconds:g} s"


class Job(Protocol):
    """One measurement, which writes a row of its ``key``; claims may share jobs."""

    @property
    def key(self) -> Key: ...

    @property
    def order(self) -> tuple:
        """Jobs run in this order."""
        ...

    def estimate(self, rows: Rows, settings: Settings) -> float:
        """Seconds that it will take."""
        ...

    def run(self, rows: Rows, settings: Settings) -> None: ...


class Measure(Protocol):
    """How a claim is measured, scaled down."""

    @property
    def command(self) -> str:
        """What reproduces the value; "" if ``vim-ssl paper --run KEY`` does."""
        ...

    def jobs(self, settings: Settings) -> list[Job]: ...

    def findings(self, rows: Rows, settings: Settings) -> list[Finding]: ...

    def sources(self, rows: Rows, settings: Settings) -> list[Row]:
        """The rows behind the findings, for their conditions."""
        ...
