"""Ten steps of every paper preset through the real trainer: does it run as it stands, at what cost?

    python benchmarks/presets.py                        # all of them: an hour on one core
    python benchmarks/presets.py --only mae_tiny_224 --out FOLDER

Each preset keeps its model, resolution, masking, optimiser, schedule and precision, and trains in a
process of its own; only data, batch, accumulation, workers and the number of steps are cut to what
a CPU can do, and fine-tuning starts from untrained weights.
The steps lie at the very start of a warm-up of thousands, so the losses show that the arithmetic is
sound, not that anything is learnt. `distill`'s teacher has its true architecture with random
weights: nothing is downloaded. `cpu_seconds_a_step` is the median of the last half of the steps, in
the process's own CPU time, which on one thread is what a machine without other work takes. The peak
is the whole process's, with the checkpoint and the evaluation at the end. `full_hours` multiplies
the seconds up to the pictures of the preset's own data x its epochs; in a batch of two, the
optimiser's part weighs more than in the paper's. Rows go to results/presets.csv, or to --out.
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
from types import ModuleType

from rows import ORIGIN, append_rows, origin, results_parser

from vim_ssl import classification
from vim_ssl.data import open_data
from vim_ssl.downstream import finetune, segmentation
from vim_ssl.recipes import clip_pretrain, mim_pretrain, supervised_pretrain
from vim_ssl.runs import read_metrics


@dataclasses.dataclass(frozen=True)
class Script:
    """A recipe or task: its module, the module that calls `fit`, what its presets are for."""

    module: ModuleType
    fits: ModuleType
    pictures: dict[str, int]  # preset -> pictures an epoch of its own data
    changes: dict = dataclasses.field(default_factory=dict)


IMAGENET, ADE20K = 1_281_167, 20_210
SCRIPTS = (
    Script(mim_pretrain, mim_pretrain, {
        name: IMAGENET for name in mim_pretrain.PRESETS if name.endswith(("_192", "_224"))}),
    Script(supervised_pretrain, classification, {
        name: IMAGENET for name in supervised_pretrain.PRESETS if name != "demo"}),
    Script(finetune, classification, dict.fromkeys(finetune.PRESETS, IMAGENET),
           {"encoder": "vim_small_patch16_224"}),
    Script(clip_pretrain, clip_pretrain, {
        "cc3m_small_224": 3_000_000, "cc12m_small_224": 12_000_000,
        "datacomp_small_224": 12_800_000}, {"accumulation": 1}),
    *(Script(segmentation, segmentation, {f"ade20k_upernet_{size}": ADE20K},
             {"encoder": f"vim_{size}_patch16_224"}) for size in ("tiny", "small")),
)  # fmt: skip
OF = {preset: script for script in SCRIPTS for preset in script.pictures}
COLUMNS = (
    *ORIGIN, "threads", "recipe", "preset", "objective", "encoder", "trained_parameters", "teacher",
    "precision", "data", "batch", "steps", "cpu_seconds_a_step", "peak_mb", "first_loss",
    "last_loss", "all_finite", "epochs", "pictures_an_epoch", "full_hours",
)  # fmt: skip


def labelled_pixels(folder: Path) -> str:
    """ADE20K in little: nine photographs, labelled by their grey with 150 classes' numbers."""
    photos = open_data("sample:photos")
    for i in range(len(photos)):
        part, picture = "train" if i else "test", photos[i]["image"].convert("RGB")
        picture.thumbnail((640, 640))
        grey = picture.convert("L").point(lambda value: value * 149 // 255)
        for kind, image in (("images", picture), ("masks", grey)):
            (folder / kind / part).mkdir(parents=True, exist_ok=True)
            image.save(folder / kind / part / f"{i}.png")
    (folder / "classes.txt").write_text("".join(f"grey {i}\n" for i in range(150)))
    return f"masks:{folder}"


def train(preset: str, folder: Path, changes: dict) -> dict:
    """Train it here, in this process; returns what only this process knows."""
    script = OF[preset]
    config = script.module.PRESETS[preset]()
    config = dataclasses.replace(config, output=str(folder), **script.changes | changes)
    objective, teacher, trained, moments = getattr(config, "objective", ""), "", 0, []
    if objective == "distill":
        import timm

        create = timm.create_model
        timm.create_model = lambda name, pretrained, **more: create(name, **more)
        teacher = f"{config.teacher}, random weights"
    fit = script.fits.fit

    def observed(model, *args, **options):
        nonlocal trained
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)

        def note(module, _):
            if module.training:  # not the pictures at the end
                moments.append(time.process_time())

        model.register_forward_pre_hook(note)
        return fit(model, *args, **options)

    script.fits.fit = observed
    script.module.run(config)
    steps = [after - before for before, after in pairwise(moments)]
    seconds = statistics.median(steps[len(steps) // 2 :])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kB on Linux, bytes on a Mac
    pictures = script.pictures[preset]
    return {
        "recipe": script.module.__name__.rpartition(".")[2], "preset": preset,
        "objective": objective, "encoder": config.encoder, "trained_parameters": trained,
        "teacher": teacher, "precision": config.precision, "data": config.data,
        "batch": config.batch_size, "threads": config.threads,
        "peak_mb": round(peak / 2 ** (20 if sys.platform == "darwin" else 10)),
        "cpu_seconds_a_step": round(seconds, 3), "epochs": config.epochs,
        "pictures_an_epoch": pictures,
        "full_hours": round(seconds / config.batch_size * pictures * config.epochs / 3600),
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
    parser.add_argument("--only", nargs="+", default=list(OF), choices=OF, metavar="PRESET",
                        help=f"of {', '.join(OF)}")  # fmt: skip
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
            more = {}
            if OF[preset].module is segmentation:
                # Crops keep their true size.
                more = {"data": labelled_pixels(Path(root) / f"{preset}-data")}
            row = measure(preset, changes | more, Path(root))
            append_rows(args.out / "presets.csv", COLUMNS, [origin() | row])
            print(
                f"{preset:18} {row['cpu_seconds_a_step']:8.2f} s a step {row['peak_mb']:7,} MB   "
                f"loss {row['first_loss']} to {row['last_loss']}   "
                f"in full {row['full_hours']:,} h",
                flush=True,
            )
            sound = sound and row["all_finite"]
    return int(not sound)


if __name__ == "__main__":
    sys.exit(main())
