"""Ten steps of every paper preset through the real trainer: does it run as it stands, at what cost?

    python benchmarks/presets.py                        # what has no row yet: an hour of one core
    python benchmarks/presets.py --only mae_tiny_224 --out FOLDER          # one of them anew

Each preset keeps its model, resolution, masking, optimiser, schedule and precision, and trains in a
process of its own; only data, batch, accumulation, workers and the number of steps are cut to what
a CPU can do, and fine-tuning starts from untrained weights. For ADE20K, COCO and Kinetics stand a
few photographs, with made-up labels, as large as theirs; of videos there are two classes.
The steps lie at the very start of a warm-up of thousands, so the losses show that the arithmetic is
sound, not that anything is learnt. `distill`'s teacher has its true architecture with random
weights: nothing is downloaded. `cpu_seconds_a_step` is the median of the last half of the steps, in
the process's own CPU time, which on one thread is what a machine without other work takes. The peak
is the whole process's, with the checkpoint and the evaluation at the end. `full_hours` multiplies
the seconds up to the images of the preset's own data x its epochs; in a batch of two, the
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
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType

from PIL import Image
from rows import ORIGIN, append_rows, origin, read_rows, results_parser

from vim_ssl.data import open_data
from vim_ssl.downstream import detection, finetune, segmentation, video
from vim_ssl.recipes import clip_pretrain, mim_pretrain, supervised_pretrain
from vim_ssl.tasks import classification, dense
from vim_ssl.training.run import read_metrics

TABLE = "presets.csv"
FRAMES = 16


def photographs() -> Iterator[tuple[int, Image.Image]]:
    """Nine of 640 px at most, numbered."""
    photos = open_data("sample:photos")
    for i in range(len(photos)):
        photo = photos[i]["image"].convert("RGB")
        photo.thumbnail((640, 640))
        yield i, photo


def labelled_pixels(folder: Path) -> str:
    """ADE20K in little: photographs, labelled by their grey with 150 classes' numbers."""
    for i, photo in photographs():
        part = "train" if i else "test"
        grey = photo.convert("L").point(lambda value: value * 149 // 255)
        for kind, image in (("images", photo), ("masks", grey)):
            (folder / kind / part).mkdir(parents=True, exist_ok=True)
            image.save(folder / kind / part / f"{i}.png")
    (folder / "classes.txt").write_text("".join(f"grey {i}\n" for i in range(150)))
    return f"masks:{folder}"


def outlined_objects(folder: Path) -> str:
    """COCO in little: photographs, the middle of each an object of one of 80 classes."""
    categories = [{"id": 1 + i, "name": f"object {i}"} for i in range(80)]
    tables: dict[str, dict] = {
        part: {"images": [], "annotations": [], "categories": categories}
        for part in ("train", "val")
    }
    for i, photo in photographs():
        part, (width, height) = "train" if i else "val", photo.size
        (folder / part).mkdir(parents=True, exist_ok=True)
        photo.save(folder / part / f"{i}.png")
        tables[part]["images"].append(
            {"id": i, "file_name": f"{i}.png", "width": width, "height": height}
        )
        left, top, right, bottom = width / 4, height / 4, 3 * width / 4, 3 * height / 4
        tables[part]["annotations"].append({
            "id": 1 + i, "image_id": i, "category_id": 1 + i, "iscrowd": 0,
            "bbox": [left, top, width / 2, height / 2], "area": width * height / 4,
            "segmentation": [[left, top, right, top, right, bottom, left, bottom]],
        })  # fmt: skip
    (folder / "annotations").mkdir()
    for part, table in tables.items():
        (folder / "annotations" / f"{part}.json").write_text(json.dumps(table))
    return f"coco:{folder}"


def moving_images(folder: Path) -> str:
    """Kinetics in little: frames that pan over photographs, in two classes."""
    for i, photo in photographs():
        place = folder / ("train" if i > 1 else "test") / f"class {i % 2}" / f"{i}"
        place.mkdir(parents=True)
        width, height = photo.size
        for frame in range(FRAMES):
            left = frame * width // (4 * FRAMES)
            photo.crop((left, 0, left + 3 * width // 4, height)).save(place / f"{frame}.jpg")
    return f"video:{folder}?frames={FRAMES}"


LITTLE = {
    "photographs, every pixel labelled": labelled_pixels,
    "photographs, an object outlined": outlined_objects,
    "pans over photographs": moving_images,
}


@dataclasses.dataclass(frozen=True)
class Script:
    """A recipe or task: its module, the module that calls `fit`, what its presets are for.

    Attributes:
        images: preset -> images an epoch of its own data.
        changes: what is asked of its presets beside what is asked of all.
        data: one of `LITTLE`, where --data will not do.
    """

    module: ModuleType
    fits: ModuleType
    images: dict[str, int]
    changes: dict = dataclasses.field(default_factory=dict)
    data: str = ""


IMAGENET, ADE20K, COCO, KINETICS = 1_281_167, 20_210, 117_266, 240_436
PIXELS, OBJECTS, CLIPS = LITTLE
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
    *(Script(segmentation, dense, {f"ade20k_upernet_{size}": ADE20K},
             {"encoder": f"vim_{size}_patch16_224"}, PIXELS) for size in ("tiny", "small")),
    *(Script(detection, dense, {f"coco_cascade_{size}": COCO},
             {"encoder": f"vim_{size}_patch16_224", "batch_size": 1}, OBJECTS)
      for size in ("tiny", "small")),
    Script(video, classification, dict.fromkeys(video.PRESETS, KINETICS),
           {"encoder": "vim_small_patch16_224", "batch_size": 1}, CLIPS),
)  # fmt: skip
OF = {preset: script for script in SCRIPTS for preset in script.images}
COLUMNS = (
    *ORIGIN, "threads", "recipe", "preset", "objective", "encoder", "trained_parameters", "teacher",
    "precision", "data", "batch", "steps", "cpu_seconds_a_step", "peak_mb", "first_loss",
    "last_loss", "all_finite", "epochs", "pictures_an_epoch", "full_hours",
)  # fmt: skip


def train(preset: str, folder: Path, changes: dict) -> dict:
    """Train it here, in this process; returns what only this process knows."""
    script = OF[preset]
    config = script.module.PRESETS[preset]()
    config = dataclasses.replace(config, output=str(folder), **changes)
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
            if module.training:  # not the images at the end
                moments.append(time.process_time())

        model.register_forward_pre_hook(note)
        return fit(model, *args, **options)

    script.fits.fit = observed
    script.module.run(config)
    steps = [after - before for before, after in pairwise(moments)]
    seconds = statistics.median(steps[len(steps) // 2 :])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kB on Linux, bytes on a Mac
    images = script.images[preset]
    return {
        "recipe": script.module.__name__.rpartition(".")[2], "preset": preset,
        "objective": objective, "encoder": config.encoder, "trained_parameters": trained,
        "teacher": teacher, "precision": config.precision,
        "batch": config.batch_size, "threads": config.threads,
        "peak_mb": round(peak / 2 ** (20 if sys.platform == "darwin" else 10)),
        "cpu_seconds_a_step": round(seconds, 3), "epochs": config.epochs,
        "pictures_an_epoch": images,
        "full_hours": round(seconds / config.batch_size * images * config.epochs / 3600),
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
    parser = results_parser(__doc__, TABLE)
    parser.add_argument("--only", nargs="+", default=list(OF), choices=OF, metavar="PRESET",
                        help=f"of {', '.join(OF)}")  # fmt: skip
    parser.add_argument("--data", default="sample:fluent-emoji?limit=20", help="images")
    parser.add_argument("--batch", type=int, default=2, help="images a step; one of COCO, videos")
    parser.add_argument("--steps", type=int, default=10, help="optimiser steps")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    for name in ("--tell", "--changes", "--output"):  # of the processes that this one starts
        parser.add_argument(name, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.tell:
        told = train(args.only[0], Path(args.output), json.loads(args.changes))
        Path(args.tell).write_text(json.dumps(told))
        return 0
    common = {
        "batch_size": args.batch, "max_steps": args.steps, "workers": 0, "log_every": 1,
        "threads": args.threads,
    }  # fmt: skip
    done = {row["preset"] for row in read_rows(args.out / TABLE)
            if int(row["steps"]) >= args.steps}  # fmt: skip
    sound = True
    with tempfile.TemporaryDirectory() as root:
        for preset in args.only:
            if preset in done:
                print(f"{preset:20} has its row; --out FOLDER measures it anew", flush=True)
                continue
            script = OF[preset]
            data = args.data
            if script.data:
                data = LITTLE[script.data](Path(root) / f"{preset}-data")
            row = measure(preset, common | {"data": data} | script.changes, Path(root))
            row["data"] = script.data or args.data
            append_rows(args.out / TABLE, COLUMNS, [origin() | row])
            print(
                f"{preset:20} {row['cpu_seconds_a_step']:8.2f} s a step {row['peak_mb']:7,} MB   "
                f"loss {row['first_loss']} to {row['last_loss']}   "
                f"in full {row['full_hours']:,} h",
                flush=True,
            )
            sound = sound and row["all_finite"]
    return int(not sound)


if __name__ == "__main__":
    sys.exit(main())
