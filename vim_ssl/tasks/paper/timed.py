"""Claims about speed and memory: Vim-Ti beside DeiT-Ti with plain and with fused attention.

The values are those of benchmarks/efficiency.py, committed as efficiency.csv, and rows of this
command. A claim is decided at the paper's image size, on a GPU if there are rows of one; other
values are only reported.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from vim_ssl.tasks.paper.efficiency import DONE, Point, measured
from vim_ssl.tasks.paper.findings import NOISE, Finding
from vim_ssl.tasks.paper.measure import Job, Settings
from vim_ssl.tasks.paper.rows import Key, Row, Rows

CLAIMED_PX = 1248
TABLE = "efficiency.csv"
SECONDS, MEMORY = "seconds", "MiB"
COLUMN = {SECONDS: "seconds", MEMORY: "rise_mib"}  # of efficiency.csv
CPU = "cpu"
PATIENCE = 1800.0  # seconds of wall time until a point is given up
CONDITIONS = "cpu, 1 thread, batch 1, float32"
VIM, DEIT = "vim_tiny", "deit_tiny"
ATTENTION = ("plain", "fused")  # the paper's DeiT had the first
# Seconds of a point at 1248 px on one thread, and how they grow with tokens: for the estimate.
FROM_EXPERIENCE = {"": (10.0, 1.0), "fused": (18.0, 1.8), "plain": (40.0, 2.0)}


@dataclass(frozen=True)
class Timing:
    """Measure a point on one CPU thread."""

    attention: str
    task: str
    pixels: int
    point: Point = field(init=False, compare=False)

    def __post_init__(self):
        model = DEIT if self.attention else VIM
        point = Point("cpu", 1, model, self.attention, self.task, self.pixels, 1, "float32")
        object.__setattr__(self, "point", point)

    @property
    def key(self) -> Key:
        arm = ", ".join(filter(None, (self.point.model, self.attention)))
        return Key("efficiency", arm, f"{self.task}, {self.pixels} px")

    @property
    def order(self) -> tuple:
        return (2, self.pixels, self.task, self.attention)

    def estimate(self, rows: Rows, settings: Settings) -> float:
        seconds, power = FROM_EXPERIENCE[self.attention]
        return 8 + seconds * (self.pixels / CLAIMED_PX) ** (2 * power)

    def run(self, rows: Rows, settings: Settings) -> None:
        row = measured(self.point, seconds=PATIENCE)
        if row["state"] != DONE:
            settings.report(f"{self.point}: {row['state']}; no row is written.")
            return
        for metric, name in COLUMN.items():
            rows.append(self.key, metric=metric, value=row[name], settings=CONDITIONS)


@dataclass(frozen=True)
class Efficiency:
    """Vim's seconds or memory against those of DeiT.

    Attributes:
        task: see `Point`.
        metric: `SECONDS`: times as fast; `MEMORY`: per cent less.
        bar: the published value; 0: less at all.
    """

    task: str
    metric: str
    bar: float

    @property
    def command(self) -> str:
        return ""

    def jobs(self, settings: Settings) -> list[Job]:
        return [Timing(attention, self.task, px)
                for px in settings.pixels for attention in ("", *ATTENTION)]  # fmt: skip

    def sources(self, rows: Rows, settings: Settings) -> list[Row]:
        return [row for _, _, row in self._values(rows)]

    def findings(self, rows: Rows, settings: Settings) -> list[Finding]:
        # (device, conditions, pixels) -> attention -> the last value
        known: dict[tuple[str, str, int], dict[str, float]] = {}
        for where, attention, row in self._values(rows):
            value = row["value"] if "measure" in row else row[COLUMN[self.metric]]
            known.setdefault(where, {})[attention] = float(value)
        gpu = any(device != CPU and px == CLAIMED_PX for device, _, px in known)
        made = []
        for (device, _, px), values in sorted(known.items(), key=lambda item: -item[0][2]):
            decides = px == CLAIMED_PX and (device != CPU or not gpu)
            name = f"{device}, {px} px"
            for attention in ATTENTION:
                if min(values.get("", 0), values.get(attention, 0)) > 0:
                    pair = values[""], values[attention]
                    made.append(self._finding(f"{name}, {attention} attention", decides, *pair))
        return made

    def _finding(self, name: str, decides: bool, ours: float, theirs: float) -> Finding:
        if self.metric == SECONDS:
            times = theirs / ours
            text = f"{times:.1f} times as fast ({ours:.2f} against {theirs:.2f} s)"
            return Finding(name, text, times, max(self.bar, 1.0 + NOISE), 1.0 + NOISE, decides)
        less = 100 * (1 - ours / theirs)
        change = f"{abs(less):.1f} % {'less' if less > 0 else 'more'}"
        text = f"{change} ({ours:,.0f} against {theirs:,.0f} MiB)"
        return Finding(name, text, less, max(self.bar, 100 * NOISE), 100 * NOISE, decides)

    def _values(self, rows: Rows) -> Iterator[tuple[tuple[str, str, int], str, Row]]:
        """Yield (device, conditions, pixels), attention, row."""
        for row in rows.committed(TABLE):
            if (row["task"], row["state"]) == (self.task, DONE) and row["model"] in (VIM, DEIT):
                where = ", ".join(row[k] for k in ("hardware", "threads", "batch", "dtype"))
                yield (row["device"], where, int(row["pixels"])), row["attention"], row
        for here in rows.select(measure="efficiency", metric=self.metric):
            task, _, pixels = here["data"].partition(", ")
            if task == self.task:
                where = f"{here['hardware']}, {here['settings']}"
                yield (CPU, where, int(pixels.split()[0])), here["arm"].partition(", ")[2], here
