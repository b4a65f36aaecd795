"""Evaluate pretraining on 4,000 unlabelled digits, on three seeds.

    python benchmarks/digits.py                           # minutes per seed on two CPU cores

For every seed: pretrain, then evaluate by linear probe, nearest neighbours and fine-tuning on ten
labels per class, each compared with the same encoder untrained and raw pixels. The 1,000 test
digits are fixed and were not used in pretraining or any selection. Rows are appended to
results/digits.csv, or to --out.
Further options go to recipes/mim_pretrain.py.
"""

import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rows import ORIGIN, append_rows, mean_and_spread, origin, results_parser

from vim_ssl.training.run import read_metrics

ROOT = Path(__file__).parents[1]
COLUMNS = (
    *ORIGIN, "threads", "preset", "seed", "features", "figure",
    "value", "readout", "pretrain_seconds", "epochs",
)  # fmt: skip


def run_seed(preset: str, seed: int, threads: int, folder: Path, more: list[str]) -> list[dict]:
    """Pretrain and evaluate one seed in fresh processes; return the rows."""
    out = folder / f"{preset}-{seed}"

    def script(path: str, *args: str) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        log = out.with_suffix(".log")
        with open(log, "a") as file:
            command = [sys.executable, str(ROOT / path), *args, "--seed", str(seed)]
            done = subprocess.run(command, env=environment, stdout=file, stderr=file, cwd=folder)
        if done.returncode:
            raise RuntimeError(f"{path} failed:\n{log.read_text()[-3000:]}")

    train = ("--threads", str(threads))
    if not (out / "report.html").exists():  # not done yet, or interrupted: resume
        script("recipes/mim_pretrain.py", "--preset", preset, "--output", str(out), *train, *more)
    script("downstream/linear_probe.py", "--encoder", str(out), "--no-cache", "--knn-k", "20")
    few = ("--encoder", str(out), "--labels-per-class", "10", *train)
    if not (out / "tuned" / "metrics.json").exists():
        script("downstream/finetune.py", *few, "--output", str(out / "tuned"))
    if not (out / "scratch" / "metrics.json").exists():
        script("downstream/finetune.py", *few, "--output", str(out / "scratch"), "--from-scratch")

    last = read_metrics(out)[-1]
    common = {"preset": preset, "seed": seed, "pretrain_seconds": last["seconds"],
              "epochs": last["epoch"]}  # fmt: skip
    rows = []
    for row in _json(out / "linear_probe" / "metrics.json")["rows"]:
        for metric, readout in (("logistic", row["readout"]), ("knn", row["knn_readout"])):
            rows.append(common | {"features": row["features"], "figure": metric,
                                  "value": row[metric], "readout": readout})  # fmt: skip
    for name, features in (("tuned", "pretrained encoder"), ("scratch", "same encoder, untrained")):
        value = _json(out / name / "metrics.json")["top1"]
        rows.append(common | {"features": features, "figure": "finetune_10", "value": value})
    return rows


def _json(path: Path) -> dict:
    return json.loads(path.read_text())


def main() -> int:
    parser = results_parser(__doc__, "digits.csv")
    add = parser.add_argument
    parser.epilog = "Further options go to recipes/mim_pretrain.py."
    add("--preset", default="demo", help="preset of recipes/mim_pretrain.py")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="a run each")
    add("--threads", type=int, default=2, help="threads per run")
    add("--jobs", type=int, default=1, help="seeds run in parallel")
    add("--runs", type=Path, help="folder to keep the runs in; default: a temporary folder")
    args, more = parser.parse_known_args()
    folder = args.runs or Path(tempfile.mkdtemp(prefix="digits-"))
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(args.jobs) as pool:
        jobs = [pool.submit(run_seed, args.preset, seed, args.threads, folder.resolve(), more)
                for seed in args.seeds]  # fmt: skip
        rows = [row for job in jobs for row in job.result()]
    common = origin() | {"threads": args.threads}
    append_rows(args.out / "digits.csv", COLUMNS, (common | row for row in rows))
    for metric in ("logistic", "knn", "finetune_10"):
        for features in dict.fromkeys(row["features"] for row in rows):
            values = [
                r["value"] for r in rows if (r["figure"], r["features"]) == (metric, features)
            ]
            if values:
                print(f"{metric:12} {features:26} {mean_and_spread(values)}  {values}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
