"""Check that runs of two processes always end with exit code 0.

    python benchmarks/exits.py --runs 30

Some combinations of launcher, gloo and torch abort at exit after correct output. Each run trains
the demo's objective on 64 digits for a few steps on two CPU processes. One row per run is appended
to results/exits.csv, or to --out.
"""

import os
import subprocess
import sys
import tempfile
import time

from process import launcher
from rows import append_rows, origin, results_parser

COLUMNS = ("date", "hardware", "versions", "run", "exit_code", "seconds")
COMMAND = [
    *launcher(2), "--preset", "demo", "--epochs", "1",
    "--warmup-epochs", "0", "--data", "sample:mnist5k?split=train&limit=64", "--batch-size", "8",
    "--workers", "1", "--threads", "1", "--model-args", "depth=1", "embed_dim=32",
]  # fmt: skip


def main() -> int:
    parser = results_parser(__doc__, "exits.csv")
    parser.add_argument("--runs", type=int, default=30, help="runs, one after the other")
    args = parser.parse_args()
    common = {k: v for k, v in origin().items() if k in COLUMNS}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for run in range(args.runs):
            started = time.perf_counter()
            done = subprocess.run(
                [*COMMAND, "--output", f"{folder}/{run}"], capture_output=True, text=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )  # fmt: skip
            seconds = round(time.perf_counter() - started, 1)
            rows.append(common | {"run": run, "exit_code": done.returncode, "seconds": seconds})
            print(f"run {run}: exit code {done.returncode}, {seconds} s", flush=True)
            if done.returncode:
                print(done.stderr[-3000:])
    append_rows(args.out / "exits.csv", COLUMNS, rows)
    bad = sum(row["exit_code"] != 0 for row in rows)
    print(f"{len(rows) - bad} of {len(rows)} runs ended with exit code 0")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
