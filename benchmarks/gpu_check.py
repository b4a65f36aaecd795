"""Run every check and measurement that needs a GPU, in order of priority.

    python benchmarks/gpu_check.py                               # or: make gpu-check; 14 minutes
    python benchmarks/gpu_check.py --only machine correctness kernels --budget 300 --out FOLDER
    python benchmarks/gpu_check.py --only models pretraining --budget 300 --out FOLDER
    python benchmarks/gpu_check.py --dry-run                     # tiny, on a CPU

Sections: machine (versions and ceilings), correctness (errors against float64, and the tests marked
gpu), kernels, models (Vim against DeiT), pretraining (a short run, and resuming it), peers (other
implementations of the scan), tests (all of tests/kernels/ on the GPU) and mamba (the CUDA kernel of
mamba-ssm). Each runs in a fresh process, which is stopped when its share of the budget is used.
Rows are appended to CSV files in --out (results/, which git tracks) as they are measured, beside
one log. summary.md there compares those of this call with the targets in README.md and the
expected values.

It runs from a plain checkout (PYTHONPATH=.), without git, network or the `datasets` package, and
writes only below --out: the caches are in .cache/gpu_check there, or where HF_HOME,
NUMBA_CACHE_DIR, TORCHINDUCTOR_CACHE_DIR, TRITON_CACHE_DIR (compiled kernels) and VIM_SSL_CACHE
point. COMMIT=NAME names the commit where there is no git.

The exit code is 0, or 10 + the number of the first section that failed (11 machine, 12 correctness
…). A section that was stopped is no failure unless a check in it had failed.
"""

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

sys.path.insert(0, str(Path(__file__).parent / "gpu"))  # for `targets` and `sections`

import targets
from rows import read_rows, results_parser

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
# Section -> its share of the remaining time, relative to the sections after it: seconds of the
# default budget.
SECTIONS = {"machine": 30, "correctness": 120, "kernels": 150, "models": 220, "pretraining": 80,
            "peers": 80, "tests": 80, "mamba": 80}  # fmt: skip
CACHES = {  # variable -> a folder of the cache
    "HF_HOME": "hf", "NUMBA_CACHE_DIR": "numba", "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TRITON_CACHE_DIR": "triton", "VIM_SSL_CACHE": "vim_ssl",
}  # fmt: skip


@dataclass
class Outcome:
    """What became of a section.

    Attributes:
        failed: True if it or a check in it failed.
        state: one of `targets.STATES`, "FAILED …", "skipped …" or "not run".
    """

    name: str
    state: str = "not run"
    failed: bool = False
    seconds: float = 0.0


def say(*words: object) -> None:
    print(*words, flush=True)


def run_sections(names: list[str], out: Path, budget: float, dry: bool) -> list[Outcome]:
    """Run each section in a fresh process; write the summary before the first and after each."""
    started, outcomes = time.monotonic(), [Outcome(name) for name in names]
    before = {path.name: len(read_rows(path)) for path in out.glob("*.csv")}
    _write_summary(out, outcomes, before, dry)
    with open(out / "gpu_check.log", "ab") as log:
        for i, name in enumerate(names):
            used = time.monotonic() - started
            share = SECTIONS[name] / sum(SECTIONS[n] for n in names[i:])
            seconds = (budget - used) * share
            if seconds < 1:
                outcomes[i] = Outcome(name, "skipped: the time is up")
                say(f"=== {name}: skipped, the time is up")
                _write_summary(out, outcomes, before, dry)
                continue
            line = f"=== {name}: up to {seconds:.0f} s; used {used:.0f} s of {budget:.0f} s\n"
            _print_and_log(line.encode(), log)
            try:
                outcomes[i] = _run_section(name, out, seconds, dry, log)
            except Exception:  # the sections after it run all the same
                outcomes[i] = Outcome(name, "FAILED to start", True)
                _print_and_log(traceback.format_exc().encode(), log)
            done = outcomes[i]
            _print_and_log(f"=== {name}: {done.state} after {done.seconds:.0f} s\n\n".encode(), log)
            _write_summary(out, outcomes, before, dry)
        _print_and_log((out / "summary.md").read_bytes(), log)
    return outcomes


def _run_section(name: str, out: Path, seconds: float, dry: bool, log: BinaryIO) -> Outcome:
    """Run a section, print and log its output, and end it with all its processes."""
    command = [sys.executable, "-u", __file__, "--section", name, "--out", str(out),
               "--budget", str(seconds), *["--dry-run"] * dry]  # fmt: skip
    started = time.monotonic()
    process = subprocess.Popen(
        command, cwd=ROOT, env=_environment(name, out, dry), stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
        start_new_session=True,  # so that its children can be killed with it
    )  # fmt: skip
    # A process that cannot be killed, as in a call to the driver, must not block the next section.
    broken: list[bytes] = []
    copier = threading.Thread(target=_copy, args=(process.stdout, log, broken), daemon=True)
    copier.start()
    code = None
    try:
        with suppress(subprocess.TimeoutExpired):
            code = process.wait(seconds)
    finally:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            process.wait(5)
        copier.join(5)
    state = targets.STATES.get(code, f"FAILED ({code})")
    if code is None and broken:
        state += "; a check is BROKEN"
    failed = bool(broken) or code not in (0, targets.CUT, None)
    return Outcome(name, state, failed, time.monotonic() - started)


def _copy(source: BinaryIO, log: BinaryIO, broken: list[bytes]) -> None:
    """Print and log the lines; collect those of checks that failed, see `Section.fail`."""
    for line in source:
        if b"BROKEN: " in line:
            broken.append(line)
        _print_and_log(line, log)


def _print_and_log(line: bytes, log: BinaryIO) -> None:
    print(line.decode(errors="replace"), end="", flush=True)
    log.write(line)
    log.flush()


def _cache(out: Path) -> Path:
    return out / ".cache" / "gpu_check"


def _environment(name: str, out: Path, dry: bool) -> dict[str, str]:
    """Environment of a section: the checkout's modules, caches that can be written, no network."""
    paths = [str(ROOT), *(str(BENCHMARKS / name) for name in ("", "gpu", "kernels"))]
    variables = {key: str(Path(os.environ.get(key) or _cache(out) / folder).resolve())
                 for key, folder in CACHES.items()}  # fmt: skip
    for folder in variables.values():
        Path(folder).mkdir(parents=True, exist_ok=True)
    environment = os.environ | variables | {
        "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "TRITON_INTERPRET": "0",
    }  # fmt: skip
    if dry:
        # The interpreter takes seconds for each scan; only the ceilings cannot do without.
        environment |= {"TRITON_INTERPRET": "1" if name == "machine" else "0"}
        environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return environment


def _write_summary(out: Path, outcomes: list[Outcome], before: dict[str, int], dry: bool) -> None:
    sections = [(one.name, one.state, f"{one.seconds:.0f}") for one in outcomes]
    try:
        text = targets.summary(out, sections, before, dry)
    except Exception:  # no summary is worth a section
        text = traceback.format_exc()
    with suppress(OSError):
        (out / "summary.md").write_text(text, encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    parser = results_parser(__doc__, "CSV files")
    add = parser.add_argument
    add("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="sections to run")
    add("--budget", type=float, default=sum(SECTIONS.values()), metavar="SECONDS",
        help="for all sections together")  # fmt: skip
    add("--dry-run", action="store_true", help="tiny, on a CPU, without the Triton scan")
    add("--section", choices=SECTIONS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    out = args.out.resolve()
    if args.section:
        started = time.monotonic()  # importing torch is a part of its time
        import sections

        until = started + args.budget
        return sections.run(args.section, out, _cache(out), started, until, args.dry_run)
    if not args.dry_run and not _has_gpu():
        print("gpu_check.py: torch finds no CUDA device; --dry-run needs none.", file=sys.stderr)
        return 1
    out.mkdir(parents=True, exist_ok=True)
    outcomes = run_sections(args.only, out, args.budget, args.dry_run)
    say(f"Rows, log and summary: {out}")
    failed = [one.name for one in outcomes if one.failed]
    return 10 + 1 + list(SECTIONS).index(failed[0]) if failed else 0


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def end_on_signals() -> None:
    """Let SIGTERM and SIGHUP (the terminal was closed) end the section with this process."""
    for one in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(one) is not signal.SIG_IGN:  # as under nohup
            signal.signal(one, _stop)


def _stop(number: int, _) -> None:
    sys.exit(128 + number)  # through the `finally` that ends the section's processes


if __name__ == "__main__":
    end_on_signals()
    sys.exit(main())
