"""Compare the speed of a commit with another's on this machine, and print what got slower.

    python benchmarks/compare_commits.py BASE                  # with this checkout as it is
    python benchmarks/compare_commits.py BASE HEAD --only step data
    python benchmarks/compare_commits.py BASE --only demo      # the whole training of `make demo`

Each commit is extracted into a temporary folder, which is first on the import path of its
processes. Two processes, one per commit, take turns, so that other work on the machine disturbs
both alike, and a whole program is started again for every turn. The value of a turn is the ratio
of two times that follow one another; printed are the median of the ratios and their quartiles.
Times are those of the processor, on one thread, which other work hardly lengthens; the demo's, on
all cores, is by the clock, so leave the machine to it. The first turn, which compiles, is dropped.

A measure is slower if its median ratio exceeds 1 by --threshold and three quarters of its turns are
slower. Exit code: 1 if any is. Rows are appended to results/commits.csv, or to --out.
"""

import io
import json
import math
import os
import re
import shlex
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from measures import MEASURES, Seconds, photographs
from rows import ORIGIN, append_rows, origin, results_parser

from vim_ssl.utils.environment import commit

ROOT = Path(__file__).parents[1]
SCRIPT = Path(__file__).with_name("measures.py")
FILE = "commits.csv"
COLUMNS = (
    *ORIGIN, "base", "measure", "clock", "ratio", "ratio_low", "ratio_high", "base_cpu_seconds",
    "head_cpu_seconds", "base_wall_seconds", "head_wall_seconds", "turns", "load",
)  # fmt: skip
POLL = 0.02  # seconds between looks at a file that a program writes


@dataclass(frozen=True)
class Checkout:
    """The files of a commit in ``folder``."""

    name: str
    folder: Path

    def environment(self, **more: str) -> dict[str, str]:
        """The environment of its processes: the package from ``folder``, and no settings of
        threads, which commits may make themselves."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "KMP_"))}
        return kept | {"PYTHONPATH": str(self.folder), **more}


Turn = Callable[[], dict[str, Seconds]]


def checkout(name: str | None, folder: Path) -> Checkout:
    """Extract a commit into ``folder``; without a name, return this checkout as it is."""
    if name is None:
        return Checkout(commit(), ROOT)
    git = ["git", "-C", str(ROOT)]
    short = subprocess.check_output([*git, "rev-parse", "--short", f"{name}^{{commit}}"], text=True)
    archive = subprocess.check_output([*git, "archive", short.strip()])
    with tarfile.open(fileobj=io.BytesIO(archive)) as file:
        file.extractall(folder, filter="data")
    return Checkout(short.strip(), folder)


# --- whole programs --------------------------------------------------------------------------


def spent(command: Sequence[str], at: Checkout, folder: Path, until: Path | None = None) -> Seconds:
    """Run a program, with ``until`` only until that file exists; return the seconds of the
    processor, of all its processes, and by the clock.

    Raises: RuntimeError with the end of its output if it fails.
    """
    with open(folder / "log", "w+", errors="replace") as log:
        began = time.perf_counter()
        process = subprocess.Popen(
            command, cwd=folder, env=at.environment(), stdout=log, stderr=log
        )
        stopped = until is not None and _appears(until, process.pid)
        if stopped:
            process.kill()
        _, status, usage = os.wait4(process.pid, 0)
        seconds = usage.ru_utime + usage.ru_stime, time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode and not stopped:
            log.seek(0)
            raise RuntimeError(f"{at.name}: {shlex.join(command)} failed:\n{log.read()[-3000:]}")
    return seconds


def _appears(path: Path, pid: int) -> bool:
    """Wait for a file; False if the process ends before, which leaves it to be waited for."""
    while not path.exists():
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return False
        time.sleep(POLL)
    return True


def warmed(turn: Turn) -> Turn:
    """Take a turn, which compiles, and return it."""
    turn()
    return turn


def imports(at: Checkout, folder: Path) -> Turn:
    """The package alone, and with its encoders."""
    codes = ("import vim_ssl", "from vim_ssl import load_encoder")
    return warmed(lambda: {code: spent([sys.executable, "-c", code], at, folder) for code in codes})


def command(*arguments: str) -> list[str]:
    """The command `vim-ssl`, which an installed one would shadow."""
    return [sys.executable, "-m", "vim_ssl.cli", *arguments]


def help_texts(at: Checkout, folder: Path) -> Turn:
    """The overview, and the help of a recipe and of a task."""
    calls = (["--help"], ["mim-pretrain", "--help"], ["linear-probe", "--help"])
    return warmed(
        lambda: {f"vim-ssl {' '.join(call)}": spent(command(*call), at, folder) for call in calls}
    )


def first_step(at: Checkout, folder: Path) -> Turn:
    """From the command to the first line of the log: a step of the demo's preset."""
    images = photographs(folder / "images", 256, (64, 64))

    def turn() -> dict[str, Seconds]:
        with tempfile.TemporaryDirectory(dir=folder) as runs:
            run = Path(runs, "run")
            words = command(
                "mim-pretrain", "--preset", "demo", "--data", images, "--output", str(run),
                "--log-every", "1", "--threads", "1",
            )  # fmt: skip
            return {"first step": spent(words, at, folder, run / "metrics.jsonl")}

    return warmed(turn)


def demo(at: Checkout, folder: Path) -> Turn:
    """The command by which `make demo` trains, and the clock of its steps alone."""
    venv = Path(sys.prefix)
    make = ["make", "--dry-run", f"VENV={venv}", f"--old-file={venv}/.installed-demo", "demo"]
    lines = subprocess.check_output(make, cwd=at.folder, text=True).replace("\\\n", " ")
    (train,) = (line for line in lines.splitlines() if re.search("mim.pretrain", line))

    def turn(*options: str) -> dict[str, Seconds]:
        with tempfile.TemporaryDirectory(dir=folder) as runs:
            more = shlex.join(["--output", f"{runs}/run", *options])
            script = f"cd {shlex.quote(str(at.folder))} && {train} {more}"
            whole = spent(["sh", "-c", script], at, folder)
            *_, last = Path(runs, "run", "metrics.jsonl").read_text().splitlines()
            steps = float(json.loads(last)["seconds"])
        return {"demo, whole training": whole, "demo, its steps": (math.nan, steps)}

    turn("--max-steps", "1")  # compiles
    return turn


PROGRAMS: dict[str, Callable[[Checkout, Path], Turn]] = {
    "import": imports, "help": help_texts, "first-step": first_step, "demo": demo,
}  # fmt: skip
NAMES = (*PROGRAMS, *MEASURES)
BY_THE_CLOCK = ("demo",)


# --- turns -----------------------------------------------------------------------------------


@contextmanager
def started(measure: str, at: Checkout) -> Iterator[Turn]:
    """Prepare a measure of a checkout; its turns are equal from the first that it yields."""
    with tempfile.TemporaryDirectory() as folder:
        if measure in PROGRAMS:
            yield PROGRAMS[measure](at, Path(folder))
            return
        command = [sys.executable, str(SCRIPT), measure]
        env = at.environment(OMP_NUM_THREADS="1")
        with (
            open(f"{folder}/log", "w+", errors="replace") as log,
            subprocess.Popen(command, cwd=folder, env=env, stdin=-1, stdout=-1, stderr=log,
                             text=True) as process,
        ):  # fmt: skip

            def answer() -> dict[str, Seconds]:
                if line := process.stdout.readline():
                    return {name: tuple(seconds) for name, seconds in json.loads(line).items()}
                log.seek(0)
                raise RuntimeError(f"{at.name}: {measure} failed:\n{log.read()[-3000:]}")

            def turn() -> dict[str, Seconds]:
                print(file=process.stdin, flush=True)
                return answer()

            answer()
            yield turn


def take_turns(measure: str, base: Checkout, head: Checkout, turns: int) -> dict[str, list]:
    """Return, for all that a measure gives, a pair of `Seconds`, base and head, per turn."""
    pairs: dict[str, list[tuple[Seconds, Seconds]]] = {}
    with ExitStack() as stack:
        of_base, of_head = (stack.enter_context(started(measure, at)) for at in (base, head))
        for _ in range(turns):
            before, after = of_base(), of_head()
            for name in (name for name in before if name in after):
                pairs.setdefault(name, []).append((before[name], after[name]))
    return pairs


def summarised(name: str, pairs: Sequence[tuple[Seconds, Seconds]], clock: str) -> dict:
    """Return the row of a measure; ``clock``, "cpu" or "wall", names the times that count."""
    column = 0 if clock == "cpu" else 1
    ratios = [head[column] / base[column] for base, head in pairs]
    load = f"{os.getloadavg()[0]:.1f}"
    row = {"measure": name, "clock": clock, "turns": len(pairs), "load": load}
    for key, ratio in zip(("ratio_low", "ratio", "ratio_high"), quartiles(ratios), strict=True):
        row[key] = f"{ratio:.3f}"
    for side, at in enumerate(("base", "head")):
        for index, kind in enumerate(("cpu", "wall")):
            seconds = statistics.median(pair[side][index] for pair in pairs)
            row[f"{at}_{kind}_seconds"] = "" if math.isnan(seconds) else f"{seconds:.5f}"
    return row


def quartiles(values: Sequence[float]) -> list[float]:
    if len(values) == 1:
        return 3 * list(values)
    return statistics.quantiles(values, n=4, method="inclusive")


def verdict(row: dict, threshold: float) -> str:
    """Return SLOWER, faster, or "" for a difference within the threshold or the spread."""
    ratio, low, high = (float(row[key]) for key in ("ratio", "ratio_low", "ratio_high"))
    if ratio > 1 + threshold and low > 1:
        return "SLOWER"
    return "faster" if ratio < 1 / (1 + threshold) and high < 1 else ""


def text_of(row: dict, threshold: float) -> str:
    """The line of a measure in the table."""
    times = (float(row[f"{at}_{row['clock']}_seconds"]) for at in ("base", "head"))
    spread = f"{row['ratio']} ({row['ratio_low']}–{row['ratio_high']})"
    cells = f"{row['measure']:36} {row['clock']:4}", *(f"{1e3 * t:10,.1f}" for t in times)
    return f"{' '.join(cells)}   {spread:22} {verdict(row, threshold)}".rstrip()


def main() -> int:
    parser = results_parser(__doc__, FILE)
    add = parser.add_argument
    add("base", help="commit to compare with, such as main")
    add("head", nargs="?", help="commit to examine; without it, this checkout as it is")
    usual = [name for name in NAMES if name != "demo"]
    add("--only", nargs="+", choices=NAMES, default=usual, metavar="MEASURE",
        help=f"of {', '.join(NAMES)}")  # fmt: skip
    add("--turns", type=int, default=5, help="times that each commit is measured")
    add("--threshold", type=float, default=0.03, help="relative difference that counts")
    args = parser.parse_args()
    rows: list[dict] = []
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        base, head = (checkout(name, Path(folder, side))
                      for side, name in (("base", args.base), ("head", args.head)))  # fmt: skip
        here = origin() | {"commit": head.name, "base": base.name}
        print(f"{'measure':36}      {base.name:>10} {head.name:>10}   ratio (quartiles)   in ms")
        for measure in args.only:
            clock = "wall" if measure in BY_THE_CLOCK else "cpu"
            try:
                measured = take_turns(measure, base, head, args.turns)
            except Exception as error:  # of this measure only
                failed.append(measure)
                print(f"{measure} FAILED: {error}", flush=True)
                continue
            for name, pairs in measured.items():
                rows.append(summarised(name, pairs, clock))
                print(text_of(rows[-1], args.threshold), flush=True)
                append_rows(args.out / FILE, COLUMNS, [here | rows[-1]])
    slower = [row["measure"] for row in rows if verdict(row, args.threshold) == "SLOWER"]
    print(f"Slower: {'; '.join(slower) or 'none'}.")
    if failed:
        print(f"Failed: {'; '.join(failed)}.")
    return int(bool(slower or failed))


if __name__ == "__main__":
    sys.exit(main())
