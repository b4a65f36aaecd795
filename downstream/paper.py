"""Check the claims of the Vim paper, one by one.

    python downstream/paper.py                           # the table, with states
    python downstream/paper.py --run parameters speed    # measure claims, scaled down
    python downstream/paper.py --run all --seeds 1       # half an hour of one CPU core
    python downstream/paper.py --full imagenet-tiny --imagenet ROOT

Every row of the table is a claim of arXiv 2401.09417 with its published value, our value and a
state, which a rule decides; see docs/paper.md. Measurements are appended to a CSV file as they
come; the same command goes on where it was stopped.
"""

import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import vim_ssl.utils.openmp  # noqa: F401 (before torch)

from vim_ssl import cli
from vim_ssl.tasks.paper.campaign import open_jobs, run_jobs
from vim_ssl.tasks.paper.claims import ALL, chosen_claims
from vim_ssl.tasks.paper.measure import Settings
from vim_ssl.tasks.paper.page import page, state_of, text_table
from vim_ssl.tasks.paper.rows import TABLE, Rows
from vim_ssl.tasks.paper.training import DATA
from vim_ssl.utils.config import opt, parse
from vim_ssl.utils.environment import CHECKOUT
from vim_ssl.utils.files import atomic_write

COMMITTED = CHECKOUT / "benchmarks" / "results"  # absent from an installed package


@dataclass
class Config:
    """Check the claims of the Vim paper."""

    run: tuple[str, ...] = opt((), f"claims to measure, scaled down; {ALL}: every one", "measure")
    full: tuple[str, ...] = opt((), "claims to measure at full size, one after another", "measure")
    data: tuple[str, ...] = opt(tuple(DATA), "image sets of scaled-down trainings", "measure")
    seeds: int = opt(3, "seeds of scaled-down trainings; a state needs two", "measure")
    seconds: float = opt(30.0, "processor time of a scaled-down training", "measure")
    pixels: tuple[int, ...] = opt(
        (640,), "image sides whose time and memory are measured; 1248 decides", "measure"
    )
    output: str = opt(f"runs/paper/{TABLE}", "CSV file for the rows", "output")
    page: str = opt("", "write the page of documentation to this file", "output")
    imagenet: str = opt("", "folder of ImageNet-1k, for --full", "full size")
    coco: str = opt("", "folder of COCO, for --full", "full size")
    ade20k: str = opt("", "folder of ADE20K, for --full", "full size")
    launch: str = opt(
        "", "start processes with this, such as 'accelerate launch --num_processes 8'", "full size"
    )

    def __post_init__(self):
        if self.seeds < 1 or self.seconds <= 0 or any(px < 32 or px % 16 for px in self.pixels):
            raise ValueError(
                f"seeds {self.seeds}, seconds {self.seconds:g}, pixels {self.pixels}: expected at "
                "least one seed, seconds above 0, and sides that are multiples of 16 from 32 on."
            )
        for name in self.data:
            if name not in DATA:
                raise ValueError(f"data {name!r} is unknown; use {' or '.join(DATA)}.")


def run(config: Config) -> dict[str, Any]:
    """Measure, then print the table. Returns: key -> state."""
    rows, settings = open_rows(config), make_settings(config)
    if config.run:
        settings.log.parent.mkdir(parents=True, exist_ok=True)
        jobs = open_jobs(chosen_claims(config.run), rows, settings)
        run_jobs(jobs, rows, settings)
    for claim in chosen_claims(config.full):
        if claim.full is None:
            settings.report(f"{claim.key} has no larger size: use --run {claim.key}.")
            continue
        folder = Path(config.output).parent / "full" / claim.key
        fields = {"imagenet": config.imagenet, "coco": config.coco, "ade20k": config.ade20k,
                  "output": str(folder)}  # fmt: skip
        claim.full.run(claim.key, rows, settings, fields, config.launch)
    if config.page:
        atomic_write(Path(config.page), page(rows, settings))
    chosen = chosen_claims((*config.run, *config.full) or (ALL,))
    print(text_table(chosen, rows, settings))
    return {claim.key: state_of(claim, rows, settings) for claim in chosen}


def open_rows(config: Config) -> Rows:
    return Rows(Path(config.output), COMMITTED if COMMITTED.is_dir() else None)


def make_settings(config: Config) -> Settings:
    log = Path(config.output).with_suffix(".log")
    return Settings(
        config.data, config.seeds, config.seconds, config.pixels, cli.main,
        lambda text: print(text, flush=True), log,
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    config = parse(Config, argv=argv, description=__doc__)
    stop: Any = signal.signal(signal.SIGTERM, _stop)
    try:
        run(config)
    except SystemExit:  # also from a training, which handles the signal itself
        print("\nStopped; the rows are kept, and the same command goes on.", flush=True)
        raise
    finally:
        signal.signal(signal.SIGTERM, stop)
    return 0


def _stop(signum: int, frame: Any) -> None:
    sys.exit(0)


if __name__ == "__main__":
    sys.exit(cli.guarded(main))
