"""The sections of `gpu_check.py`; each runs in a process of its own."""

from collections.abc import Callable
from pathlib import Path

import checks
import compiles
import speed
import trial
from section import Section

SECTIONS: dict[str, Callable[[Section], None]] = {
    "machine": checks.machine, "correctness": checks.correctness, "kernels": speed.kernels,
    "models": speed.models, "pretraining": trial.pretraining, "peers": speed.peers,
    "tests": checks.tests, "mamba": speed.mamba,
}  # fmt: skip


def run(name: str, out: Path, cache: Path, started: float, until: float, dry: bool) -> bool:
    """Run a section, see `Section`; True if nothing in it failed."""
    section = Section(name, out, cache, started, until, dry)
    with compiles.heard(section.compiled):
        SECTIONS[name](section)
    return section.failures == 0
