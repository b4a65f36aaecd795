"""The sections of `gpu_check.py`; each runs in a process of its own."""

from collections.abc import Callable
from pathlib import Path

import checks
import compiles
import speed
import targets
import trial
from section import Section

SECTIONS: dict[str, Callable[[Section], None]] = {
    "machine": checks.machine, "correctness": checks.correctness, "kernels": speed.kernels,
    "models": speed.models, "pretraining": trial.pretraining, "peers": speed.peers,
    "tests": checks.tests, "mamba": speed.mamba,
}  # fmt: skip


def run(name: str, out: Path, cache: Path, started: float, until: float, dry: bool) -> int:
    """Run a section, see `Section`; return its exit code: 0, or a key of `targets.STATES`."""
    section = Section(name, out, cache, started, until, dry)
    with compiles.heard(section.compiled):
        SECTIONS[name](section)
    if section.cut:
        return 1 if section.failures else targets.CUT
    return targets.BROKEN if section.failures else 0
