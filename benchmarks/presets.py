"""Run ten steps of every paper preset through the real trainer: check that it works, and its cost.

    python benchmarks/presets.py                        # presets without a row: an hour of one core
    python benchmarks/presets.py --only mae_tiny_224 --out FOLDER          # one of them again

Each preset keeps its model, resolution, masking, optimiser, schedule and precision, and trains in a
fresh process. Only data, batch, accumulation, workers and the number of steps are reduced to fit a
CPU, and fine-tuning starts from untrained weights. Instead of ADE20K, COCO and Kinetics, a few
photographs of the same size with made-up labels are used; videos have two classes. The steps are at
the start of a warm-up of thousands, so finite losses show that the arithmetic is sound, not that
the model learns. The teacher of `distill` has random weights: nothing is downloaded.
`cpu_seconds_a_step` is the median over the last half of the steps of the process's CPU time, which
on one thread is the time on an idle machine. The peak is that of the whole process, including the
checkpoint and the final evaluation. `full_hours` multiplies the seconds by the images of the
preset's dataset and its epochs; with a batch of two, the optimiser's share is larger than in the
paper. Rows are appended to results/presets.csv, or to --out.
"""

import dataclasses
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType

from PIL import Image
from process import peak_mib, run_apart
from rows import ORIGIN, append_rows, origin, read_rows, results_parser

from vim_ssl.data import open_data
from vim_ssl.downstream import detection, finetune, segmentation, video
from vim_ssl.recipes import clip_pretrain, mim_pretrain, supervised_pretrain
from vim_ssl.tasks import runner
from vim_ssl.training.run import read_metrics

TABLE = "presets.csv"
FRAMES = 16


def photographs() -> Iterator[tuple[int, Image.Image]]:
    """Nine photographs of at most 640 px, numbered."""
    photos = open_data("sample:photos")
    for i in range(len(photos)):
        photo = photos[i]["image"].convert("RGB")
        photo.thumbnail((640, 640))
        yield i, photo


def labelled_pixels(folder: Path) -> str:
    """A small ADE20K: photographs whose grey values give one of 150 classes to every pixel."""
    for i, photo in photographs():
        split = "train" if i else "test"
        grey = photo.convert("L").point(lambda value: value * 149 // 255)
        for kind, image in (("images", photo), ("masks", grey)):
            (folder / kind / split).mkdir(parents=True, exist_ok=True)
            image.save(folder / kind / split / f"{i}.png")
    (folder / "classes.txt").write_text("".join(f"grey {i}\n" for i in range(150)))
    return f"masks:{folder}"


def outlined_objects(folder: Path) -> str:
    """A small COCO: photographs, the middle of each an object of one of 80 classes."""
    categories = [{"id": 1 + i, "name": f"object {i}"} for i in range(80)]
    tables: dict[str, dict] = {
        split: {"images": [], "annotations": [], "categories": categories}
        for split in ("train", "val")
    }
    for i, photo in photographs():
        split, (width, height) = "train" if i else "val", photo.size
        (folder / split).mkdir(parents=True, exist_ok=True)
        photo.save(folder / split / f"{i}.png")
        tables[split]["images"].append(
            {"id": i, "file_name": f"{i}.png", "width": width, "height": height}
        )
        left, top, right, bottom = width / 4, height / 4, 3 * width / 4, 3 * height / 4
        tables[split]["annotations"].append({
            "id": 1 + i, "image_id": i, "category_id": 1 + i, "iscrowd": 0,
            "bbox": [left, top, width / 2, height / 2], "area": width * height / 4,
            "segmentation": [[left, top, right, top, right, bottom, left, bottom]],
        })  # fmt: skip
    (folder / "annotations").mkdir()
    for split, table in tables.items():
        (folder / "annotations" / f"{split}.json").write_text(json.dumps(table))
    return f"coco:{folder}"


def moving_images(folder: Path) -> str:
    """A small Kinetics: frames that pan over photographs, in two classes."""
    for i, photo in photographs():
        frames = folder / ("train" if i > 1 else "test") / f"class {i % 2}" / f"{i}"
        frames.mkdir(parents=True)
        width, height = photo.size
        for frame in range(FRAMES):
            left = frame * width // (4 * FRAMES)
            photo.crop((left, 0, left + 3 * width // 4, height)).save(frames / f"{frame}.jpg")
    return f"video:{folder}?frames={FRAMES}"


SMALL_DATA = {
    "photographs, every pixel labelled": labelled_pixels,
    "photographs, an object outlined": outlined_objects,
    "pans over photographs": moving_images,
}


@dataclasses.dataclass(frozen=True)
class Script:
    """A recipe or task and its presets.

    Attributes:
        module: module with the presets and `run`.
        images: preset -> images per epoch of its dataset.
        changes: settings that replace those of the presets, in addition to the common ones.
        data: key of `SMALL_DATA`, if --data has no suitable labels.
    """

    module: ModuleType
    images: dict[str, int]
    changes: dict = dataclasses.field(default_factory=dict)
    data: str = ""


IMAGENET, ADE20K, COCO, KINETICS = 1_281_167, 20_210, 117_266, 240_436
PIXELS, OBJECTS, CLIPS = SMALL_DATA
SCRIPTS = (
    Script(mim_pretrain, {
        name: IMAGENET for name in mim_pretrain.PRESETS if name.endswith(("_192", "_224"))}),
    Script(supervised_pretrain, {
        name: IMAGENET for name in supervised_pretrain.PRESETS if name.endswith("_224")}),
    Script(finetune, dict.fromkeys(finetune.PRESETS, IMAGENET),
           {"encoder": "vim_small_patch16_224"}),
    Script(clip_pretrain, {
        "cc3m_small_224": 3_000_000, "cc12m_small_224": 12_000_000,
        "datacomp_small_224": 12_800_000}, {"accumulation": 1}),
    *(Script(segmentation, {f"ade20k_upernet_{size}": ADE20K},
             {"encoder": f"vim_{size}_patch16_224"}, PIXELS) for size in ("tiny", "small")),
    *(Script(detection, {f"coco_cascade_{size}": COCO},
             {"encoder": f"vim_{size}_patch16_224", "batch_size": 1}, OBJECTS)
      for size in ("tiny", "small")),
    Script(video, dict.fromkeys(video.PRESETS, KINETICS),
           {"encoder": "vim_small_patch16_224", "batch_size": 1}, CLIPS),
)  # fmt: skip
OF = {preset: script for script in SCRIPTS for preset in script.images}
COLUMNS = (
    *ORIGIN, "threads", "recipe", "preset", "objective", "encoder", "trained_parameters", "teacher",
    "precision", "data", "batch", "steps", "cpu_seconds_a_step", "peak_mb", "first_loss",
    "last_loss", "all_finite", "epochs", "pictures_an_epoch", "full_hours",
)  # fmt: skip


def train(preset: str, folder: Path, changes: dict) -> dict:
    """Train a preset in this process; return its row."""
    script = OF[preset]
    config = script.module.PRESETS[preset]()
    config = dataclasses.replace(config, output=str(folder), **changes)
    objective, teacher, trained, moments = getattr(config, "objective", ""), "", 0, []
    if objective == "distill":
        import timm

        create = timm.create_model
        timm.create_model = lambda name, pretrained, **more: create(name, **more)
        teacher = f"{config.teacher}, random weights"
    fit = runner.fit

    def observed(model, *args, **options):
        nonlocal trained
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)

        def note(module, _):
            if module.training:  # not the final evaluation
                moments.append(time.process_time())

        model.register_forward_pre_hook(note)
        return fit(model, *args, **options)

    runner.fit = observed
    try:
        script.module.run(config)
    finally:
        runner.fit = fit
    steps = [after - before for before, after in pairwise(moments)]
    seconds = statistics.median(steps[len(steps) // 2 :])
    images = script.images[preset]
    rows = read_metrics(folder)
    finite = all(math.isfinite(row["loss"] + row["grad_norm"]) for row in rows)
    return {
        "recipe": script.module.__name__.rpartition(".")[2], "preset": preset,
        "objective": objective, "encoder": config.encoder, "trained_parameters": trained,
        "teacher": teacher, "precision": config.precision,
        "batch": config.batch_size, "threads": config.threads,
        "peak_mb": round(peak_mib()),
        "cpu_seconds_a_step": round(seconds, 3), "epochs": config.epochs,
        "pictures_an_epoch": images,
        "full_hours": round(seconds / config.batch_size * images * config.epochs / 3600),
        "steps": rows[-1]["step"], "all_finite": finite and not rows[-1]["bad_steps"],
        "first_loss": round(rows[0]["loss"], 5), "last_loss": round(rows[-1]["loss"], 5),
    }  # fmt: skip


def main() -> int:
    parser = results_parser(__doc__, TABLE)
    add = parser.add_argument
    add("--only", nargs="+", default=list(OF), choices=OF, metavar="PRESET",
        help=f"of {', '.join(OF)}")  # fmt: skip
    add("--data", default="sample:fluent-emoji?limit=20", help="images")
    add("--batch", type=int, default=2, help="images per step; one for COCO and videos")
    add("--steps", type=int, default=10, help="optimiser steps")
    add("--threads", type=int, default=1, help="of torch")
    args = parser.parse_args()
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
                print(f"{preset:20} has a row; --out FOLDER measures it again", flush=True)
                continue
            script = OF[preset]
            data = args.data
            if script.data:
                data = SMALL_DATA[script.data](Path(root) / f"{preset}-data")
            changes = common | {"data": data} | script.changes
            row = run_apart(train, preset, Path(root) / preset, changes)
            row["data"] = script.data or args.data
            append_rows(args.out / TABLE, COLUMNS, [origin() | row])
            print(
                f"{preset:20} {row['cpu_seconds_a_step']:8.2f} s/step {row['peak_mb']:7,} MB   "
                f"loss {row['first_loss']} to {row['last_loss']}   "
                f"in full {row['full_hours']:,} h",
                flush=True,
            )
            sound = sound and row["all_finite"]
    return int(not sound)


if __name__ == "__main__":
    sys.exit(main())
