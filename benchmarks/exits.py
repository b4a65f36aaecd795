"""Do runs of two processes end with exit code 0, every time?

    python benchmarks/exits.py --runs 30

Some stacks of launcher, gloo and torch abort at exit, after correct output. Each run trains the
demo's objective on 64 digits for a few steps on two CPU processes. Rows, one a run, are appended to
results/exits.csv, which git tracks; --out FOLDER takes another.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rows import append_rows, origin, results_parser

ROOT = Path(__file__).parents[1]
COLUMNS = ("date", "hardware", "versions", "run", "exit_code", "seconds")
SCRIPT = [
    str(ROOT / "recipes" / "mim_pretrain.py"), "--preset", "demo", "--epochs", "1",
    "--warmup-epochs", "0", "--data", "sample:mnist5k?split=train&limit=64", "--batch-size", "8",
    "--workers", "1", "--threads", "1", "--model-args", "depth=1", "embed_dim=32",
]  # fmt: skip
LAUNCH = [
    sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu",
    "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no",
    "--dynamo_backend", "no", "--main_process_port", "0",
]  # fmt: skip


def main() -> int:
    parser = results_parser(__doc__, "exits.csv")
    parser.add_argument("--runs", type=int, default=30, help="one after the other")
    args = parser.parse_args()
    common = {k: v for k, v in origin().items() if k in COLUMNS}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for run in range(args.runs):
            started = time.perf_counter()
            done = subprocess.run(
                [*LAUNCH, *SCRIPT, "--output", f"{folder}/{run}"], capture_output=True, text=True,
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
