"""Kill a training at random moments, resume it every time, and compare it with an unbroken run.

    python benchmarks/resume.py                         # 20 kills on 1 process, 20 on 2

One kill in five happens at start-up, at a random moment before the first new step; the others
happen during steps and saves, up to some seconds after it. A kill is SIGKILL to the launcher and
all its descendants; every fifth is SIGTERM to the training processes instead, after which the
launcher must exit with 0. The losses must equal those of the unbroken run bit for bit. One row per
kill is appended to results/resume.csv, or to --out.
"""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from process import launcher
from rows import ORIGIN, append_rows, origin, results_parser

from vim_ssl.training.run import Run, read_metrics

COLUMNS = (
    *ORIGIN, "processes", "kill", "signal", "seconds_after_launch", "logged_step", "resumed_from",
    "steps", "differing_losses",
)  # fmt: skip
SETTINGS = [
    "--preset", "demo", "--data", "sample:mnist5k?split=train&limit=60", "--accumulation", "2",
    "--threads", "1", "--workers", "1", "--log-every", "1", "--eval-every", "1000",
    "--save-steps", "3", "--decoder-dim", "16", "--warmup-epochs", "1",
    "--model-args", "depth=2", "embed_dim=16", "drop_path_rate=0.3",
]  # fmt: skip


def launch(processes: int, folder: Path, epochs: int, *more: str) -> subprocess.Popen:
    command = [*launcher(processes), *SETTINGS, "--epochs", str(epochs),
               "--batch-size", str(8 // processes), "--output", str(folder), *more]  # fmt: skip
    with open(folder.with_suffix(".log"), "a") as log:
        return subprocess.Popen(
            command, stdout=log, stderr=log, start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip


def finish(process: subprocess.Popen, folder: Path) -> None:
    if process.wait():
        raise RuntimeError(folder.with_suffix(".log").read_text()[-3000:])


def _lines(log: Path) -> int:
    return len(log.read_text().splitlines()) if log.exists() else 0


def losses(folder: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in read_metrics(folder)}


def campaign(processes: int, kills: int, epochs: int, span: float, draw: random.Random, root: Path):
    """Train once without a break and once with ``kills`` kills; return the rows."""
    whole, killed = root / f"whole-{processes}", root / f"killed-{processes}"
    finish(launch(processes, whole, epochs), whole)
    rows = []
    for kill in range(1, kills + 1):
        number = signal.SIGTERM if kill % 5 == 0 else signal.SIGKILL
        process = launch(processes, killed, epochs, "--resume", "auto")
        began, log = time.perf_counter(), killed / "metrics.jsonl"
        if kill % 5 == 1:
            time.sleep(draw.uniform(0.0, 6.0))
        else:
            before = _lines(log)
            while process.poll() is None and _lines(log) <= before:
                before = min(before, _lines(log))  # a resumed run truncates the log
                time.sleep(0.02)
            time.sleep(draw.uniform(0.0, span))
        if process.poll() is not None:
            print(
                f"the run ended before kill {kill}: set fewer --kills or more --epochs", flush=True
            )
            break
        moment = time.perf_counter() - began
        parent = psutil.Process(process.pid)
        if number == signal.SIGKILL:  # each rank has its own session
            for victim in [*parent.children(recursive=True), parent]:
                victim.kill()
        else:
            for rank in parent.children():
                rank.send_signal(number)
        if process.wait() and number == signal.SIGTERM:
            raise RuntimeError(f"the launcher exited with {process.returncode} after SIGTERM")
        checkpoints = Run(killed).checkpoints()
        rows.append({
            "processes": processes, "kill": kill, "signal": number.name,
            "seconds_after_launch": round(moment, 2),
            "logged_step": _lines(log),
            "resumed_from": checkpoints[-1].name if checkpoints else "start",
        })  # fmt: skip
        print(*list(rows[-1].values()), flush=True)
    finish(launch(processes, killed, epochs, "--resume", "auto"), killed)
    expected, actual = losses(whole), losses(killed)
    differing = sum(expected[step] != actual.get(step) for step in expected)
    differing += len(actual.keys() - expected.keys())
    print(f"{processes} processes: {differing} of {len(expected)} losses differ", flush=True)
    return [row | {"steps": len(expected), "differing_losses": differing} for row in rows]


def main() -> int:
    parser = results_parser(__doc__, "resume.csv")
    add = parser.add_argument
    add("--kills", type=int, default=20, help="kills per campaign")
    add("--processes", type=int, nargs="+", default=[1, 2],
        help="processes per training; one campaign for each")  # fmt: skip
    add("--epochs", type=int, default=200, help="epochs of the training, 4 steps each")
    add("--span", type=float, default=2.0, help="longest wait after a new step, seconds")
    add("--seed", type=int, default=0, help="seed of the random moments")
    args = parser.parse_args()
    draw, differing = random.Random(args.seed), 0
    with tempfile.TemporaryDirectory() as folder:
        for processes in args.processes:
            rows = campaign(processes, args.kills, args.epochs, args.span, draw, Path(folder))
            append_rows(args.out / "resume.csv", COLUMNS, [origin() | row for row in rows])
            differing += sum(row["differing_losses"] for row in rows)
    return int(differing > 0)


if __name__ == "__main__":
    sys.exit(main())
