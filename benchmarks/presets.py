"""Ten steps of every paper preset through the real trainer: does it run as it stands, at what cost?

    python benchmarks/presets.py                        # all six: a quarter of an hour on one core
    python benchmarks/presets.py --only mae_tiny_224 --out FOLDER

Each preset keeps its model, resolution, masking, optimiser, schedule and precision, and trains in a
process of its own; only data, batch, workers and the number of steps are cut to what a CPU can do.
The steps lie at the very start of a warm-up of thousands, so the losses show that the arithmetic is
sound, not that anything is learnt. `distill`'s teacher has its true architecture with random
weights: nothing is downloaded. `cpu_seconds_a_step` is the median of the last half of the steps, in
the process's own CPU time, which on one thread is what a machine without other work takes. The peak
is the whole process's, with the checkpoint and the pictures at the end. `imagenet_hours` multiplies
the seconds up to 1,281,167 pictures x the preset's epochs; in a batch of two, the optimiser's part
weighs more than in the paper's. Rows go to results/presets.csv, or to --out FOLDER.
"""

import argparse
import dataclasses
import json
import math
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

from rows import ORIGIN, append_rows, origin, results_parser

from vim_ssl.recipes import mim_pretrain
from vim_ssl.runs import read_metrics

PAPER = [name for name in mim_pretrain.PRESETS if name.endswith(("_192", "_224"))]
IMAGENET = 1_281_167
COLUMNS = (
    *ORIGIN, "threads", "preset", "objective", "encoder", "trained_parameters", "teacher",
    "precision", "data", "batch", "steps", "cpu_seconds_a_step", "peak_mb", "first_loss",
    "last_loss", "all_finite", "epochs", "imagenet_hours",
)  # fmt: skip


def train(preset: str, folder: Path, changes: dict) -> dict:
    """Train it here, in this process; returns what only this process knows."""
    config = dataclasses.replace(mim_pretrain.PRESETS[preset](), output=str(folder), **changes)
    teacher, trained, moments = "", 0, []
    if config.objective == "distill":
        import timm

        create = timm.create_model
        timm.create_model = lambda name, pretrained, **more: create(name, **more)
        teacher = f"{config.teacher}, random weights"
    build = mim_pretrain.build_objective

    def observed(*args):
        nonlocal trained
        objective = build(*args)
        trained = sum(p.numel() for p in objective.parameters() if p.requires_grad)

        def note(module, _):
            if module.training:  # not the pictures at the end
                moments.append(time.process_time())

        objective.register_forward_pre_hook(note)
        return objective

    mim_pretrain.build_objective = observed
    mim_pretrain.run(config)
    steps = [after - before for before, after in pairwise(moments)]
    seconds = statistics.median(steps[len(steps) // 2 :])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kB on Linux, bytes on a Mac
    return {
        "preset": preset, "objective": config.objective, "encoder": config.encoder,
        "trained_parameters": trained, "teacher": teacher, "precision": config.precision,
        "data": config.data, "batch": config.batch_size, "threads": config.threads,
        "peak_mb": round(peak / 2 ** (20 if sys.platform == "darwin" else 10)),
        "cpu_seconds_a_step": round(seconds, 3), "epochs": config.epochs,
        "imagenet_hours": round(seconds / config.batch_size * IMAGENET * config.epochs / 3600),
    }  # fmt: skip


def measure(preset: str, changes: dict, root: Path) -> dict:
    """Train it in a process of its own; returns its row."""
    folder, told = root / preset, root / f"{preset}.json"
    command = [sys.executable, __file__, "--only", preset, "--tell", str(told),
               "--changes", json.dumps(changes)]  # fmt: skip
    done = subprocess.run([*command, "--output", str(folder)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{preset} failed:\n{done.stdout[-2000:]}{done.stderr[-3000:]}")
    rows = read_metrics(folder)
    finite = all(math.isfinite(row["loss"] + row["grad_norm"]) for row in rows)
    return json.loads(told.read_text()) | {
        "steps": rows[-1]["step"], "all_finite": finite and not rows[-1]["bad_steps"],
        "first_loss": round(rows[0]["loss"], 5), "last_loss": round(rows[-1]["loss"], 5),
    }  # fmt: skip


def main() -> int:
    parser = results_parser(__doc__, "presets.csv")
    parser.add_argument("--only", nargs="+", default=PAPER, choices=PAPER, help="presets")
    parser.add_argument("--data", default="sample:fluent-emoji?limit=20", help="pictures")
    parser.add_argument("--batch", type=int, default=2, help="pictures a step")
    parser.add_argument("--steps", type=int, default=10, help="optimiser steps")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    for name in ("--tell", "--changes", "--output"):  # of the processes that this one starts
        parser.add_argument(name, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.tell:
        told = train(args.only[0], Path(args.output), json.loads(args.changes))
        Path(args.tell).write_text(json.dumps(told))
        return 0
    changes = {
        "data": args.data, "batch_size": args.batch, "max_steps": args.steps, "workers": 0,
        "log_every": 1, "threads": args.threads,
    }  # fmt: skip
    sound = True
    with tempfile.TemporaryDirectory() as root:
        for preset in args.only:
            row = measure(preset, changes, Path(root))
            append_rows(args.out / "presets.csv", COLUMNS, [origin() | row])
            print(
                f"{preset:18} {row['cpu_seconds_a_step']:8.2f} s a step {row['peak_mb']:7,} MB   "
                f"loss {row['first_loss']} to {row['last_loss']}   "
                f"ImageNet {row['imagenet_hours']:,} h",
                flush=True,
            )
            sound = sound and row["all_finite"]
    return int(not sound)


if __name__ == "__main__":
    sys.exit(main())
