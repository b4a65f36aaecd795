"""Claims whose values are committed rows of other benchmarks: the paper's future work."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vim_ssl.tasks.paper.findings import Finding
from vim_ssl.tasks.paper.measure import Job, Settings
from vim_ssl.tasks.paper.rows import Row, Rows
from vim_ssl.tasks.trial.verdict import Difference

LEVEL = 0.95


@dataclass(frozen=True)
class Arms:
    """Two arms of a benchmark, compared seed by seed.

    Attributes:
        name: on what.
        where: column -> value, of both arms.
        column: the one that names the arms.
        ours, theirs: its values.
        value: column of the value, in per cent.
    """

    name: str
    where: Mapping[str, str]
    column: str
    ours: str
    theirs: str
    value: str


@dataclass(frozen=True)
class Committed:
    """Differences of arms in the rows of a benchmark.

    Attributes:
        file: in benchmarks/results.
        arms: what is compared.
        command: what measured the rows.
        unit: of a difference.
    """

    file: str
    arms: tuple[Arms, ...]
    command: str
    unit: str = "points"

    def jobs(self, settings: Settings) -> list[Job]:
        return []

    def sources(self, rows: Rows, settings: Settings) -> list[Row]:
        return [row for arms in self.arms for side in (arms.ours, arms.theirs)
                for row in self._select(rows, arms, side)]  # fmt: skip

    def _select(self, rows: Rows, arms: Arms, side: str) -> list[Row]:
        where = {**arms.where, arms.column: side}
        return [row for row in rows.committed(self.file)
                if all(row[k] == v for k, v in where.items())]  # fmt: skip

    def findings(self, rows: Rows, settings: Settings) -> list[Finding]:
        made = []
        for arms in self.arms:
            ours, theirs = (
                {row.get("seed", "0"): float(row[arms.value])
                 for row in self._select(rows, arms, side)}
                for side in (arms.ours, arms.theirs)
            )  # fmt: skip
            if len(theirs) == 1:  # a baseline without seeds
                theirs = dict.fromkeys(ours, *theirs.values())
            seeds = sorted(ours.keys() & theirs.keys())
            if seeds:
                made.append(paired(arms.name, [ours[s] for s in seeds], [theirs[s] for s in seeds],
                                   f"{arms.ours} against {arms.theirs}", self.unit))  # fmt: skip
        return made


def paired(
    name: str, ours: Sequence[float], theirs: Sequence[float], what: str, unit: str = "points"
) -> Finding:
    """The mean difference over the seeds, with Student's interval."""
    gaps = [a - b for a, b in zip(ours, theirs, strict=True)]
    error = statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else 0.0
    gap = Difference(statistics.mean(gaps), 0.0, error, len(gaps) - 1)
    bounds = gap.interval(LEVEL)
    interval = f"[{bounds[0]:+.1f}, {bounds[1]:+.1f}]" if bounds else "one seed, no interval"
    means = f"{statistics.mean(ours):.1f} against {statistics.mean(theirs):.1f} %"
    text = f"{gap.points:+.1f} {unit} {interval} ({what}: {means})"
    return Finding(name, text, bounds[0] if bounds else math.nan)
