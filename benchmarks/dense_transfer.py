"""Evaluate the packaged encoder `offline_rgb` in dense tasks on held-out real data.

    python benchmarks/dense_transfer.py                 # 24 runs: an hour of two cores
    python benchmarks/dense_transfer.py --summary       # the table of docs/results.md, from rows
    python benchmarks/dense_transfer.py --steps 3 --out FOLDER           # test that every run works

Four tasks are trained with downstream/detection.py and segmentation.py on three seeds, from the
pretrained weights and from the same encoder untrained, without layer decay; everything else is
equal, including the order of the images. Every run trains the whole encoder with fresh heads and is
tested once, at its end. Rows are appended to results/dense_transfer.csv as they come; runs with
rows are skipped. --images FOLDER saves an image grid of truth and prediction for each task's first
pretrained run. Get the data with: vim-ssl samples get tree-crowns buildings brain-lobes ct-organs.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
from campaign import run_jobs
from PIL import Image
from rows import (
    ORIGIN,
    RESULTS,
    append_rows,
    markdown_table,
    mean_and_spread,
    origin,
    read_rows,
    results_parser,
)

from vim_ssl.data import boxed_splits, masked_splits
from vim_ssl.data.sources.masks import ADE20K_CLASSES
from vim_ssl.downstream import detection, segmentation
from vim_ssl.tasks.detection import MIN_SCORE, load_detection
from vim_ssl.tasks.segmentation import load_segmentation
from vim_ssl.utils.drawing import class_colours, mask_grid, object_grid

ENCODER = "vim_mini_patch8_96.offline_rgb"
TABLE = "dense_transfer.csv"
# Layer decay protects pretrained lower blocks; untrained ones need none.
ARMS: dict[str, dict] = {
    "offline_rgb": {},
    "untrained": {"from_scratch": True, "layer_decay": None},
}
COLUMNS = (*ORIGIN, "task", "arm", "seed", "figure", "value", "train", "test", "epochs",
           "cpu_seconds")  # fmt: skip
GRID_ROWS, GRID_COLOURS = 3, 64  # limits an image grid to 300 kB
COMMON = {"threads": 1, "trackers": ("none",), "save_every": 1e9, "batch_size": 4,
          "lr_reference_batch": 4}  # fmt: skip


@dataclass(frozen=True)
class Task:
    """A script, its data and settings, and their description in the table.

    Attributes:
        script: module in downstream/.
        data: data spec.
        metric: key in the script's metrics, and its description.
        test: description of the test split.
        labels: source of the labels.
        settings: settings in addition to `COMMON` and the script's defaults.
        layout: (spec, folder) -> spec of the same data, written to the folder in another layout.
    """

    script: ModuleType
    data: str
    metric: tuple[str, str]
    test: str
    labels: str
    settings: dict
    layout: Callable[[str, Path], str] | None = None


def as_ade20k(spec: str, root: Path) -> str:
    """Write images with masks in ADE20K's layout: 150 classes, from 1; 255 becomes 0 (ignored)."""
    for split, data in zip(("training", "validation"), masked_splits(spec, 0.2, 0), strict=True):
        for folder in ("images", "annotations"):
            (root / folder / split).mkdir(parents=True)
        for i in range(len(data)):
            name = f"{i:03d}.png"
            data[i]["image"].save(root / "images" / split / name)
            Image.fromarray(data[i]["mask"] + np.uint8(1)).save(root / "annotations" / split / name)
    names = [*(data.classes or []), *(["unused"] * ADE20K_CLASSES)][:ADE20K_CLASSES]
    lines = [f"{number}\t\t\t\t{name}" for number, name in enumerate(names, 1)]
    (root / "objectInfo150.txt").write_text("\n".join(["Idx\tRatio\tTrain\tVal\tName", *lines]))
    return f"ade20k:{root}"


TASKS = {  # epochs: some five minutes of one core, 330 to 560 steps of 4 images
    "tree crowns": Task(
        detection, "sample:tree-crowns", ("box_ap50", "box AP50"), "248 crowns: another photograph",
        "boxes drawn by people (NEON, DeepForest)", {"size": 128, "head": "rcnn", "epochs": 16},
    ),
    "buildings": Task(
        detection, "sample:buildings", ("mask_ap", "mask AP"),
        "20 buildings: the eastern fifth of one scene, no gap",
        "outlines drawn by people (SpaceNet)", {"size": 128, "epochs": 30},
    ),
    "lobes of the brain": Task(
        segmentation, "sample:brain-lobes", ("miou", "mIoU, 8 lobes and the rest"),
        "right half of one head, trained on the left, 1 cm between", "drawn by people (AAL)",
        {"short_side": 96, "crop": 96, "scale": (0.75, 1.5), "max_share": 1.0, "hflip": 0.0,
         "epochs": 28},
        as_ade20k,
    ),
    "organs in CT": Task(
        segmentation, "sample:ct-organs", ("volume_dice", "Dice, 8 organs"), "another scan",
        "TotalSegmentator's output, no person's",
        {"crop": 96, "scale": (0.75, 1.5), "max_share": 1.0, "hflip": 0.0, "dice": 1.0,
         "epochs": 20},
    ),
}  # fmt: skip


def measure(name: str, arm: str, seed: int, max_steps: int, images: Path | None) -> dict:
    """Train and test; return the row."""
    task = TASKS[name]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        data = task.layout(task.data, root / "data") if task.layout else task.data
        config = task.script.Config(
            encoder=ENCODER, data=data, seed=seed, max_steps=max_steps, output=str(root / "run"),
            **COMMON | task.settings | ARMS[arm],
        )  # fmt: skip
        began = time.process_time()
        metrics = task.script.run(config)
        seconds = time.process_time() - began
        if images:
            images.mkdir(parents=True, exist_ok=True)
            grid = image_grid(task, data, root / "run").quantize(GRID_COLOURS)
            grid.save(images / f"{name.replace(' ', '-')}.png", optimize=True)
    return {
        "task": name, "arm": arm, "seed": seed, "figure": task.metric[0],
        "value": float(metrics[task.metric[0]]), "train": metrics["train"], "test": metrics["test"],
        # 0 epochs mark a trial, which the table and later runs must not take for a full run.
        "epochs": 0 if max_steps else config.epochs, "cpu_seconds": round(seconds, 1),
    }  # fmt: skip


def image_grid(task: Task, data: str, run: Path) -> Image.Image:
    """Return truth and prediction of a few test images, with most objects or evenly spaced."""
    _, test = (boxed_splits if task.script is detection else masked_splits)(data, 0.2, 0)
    few = [(2 * i + 1) * len(test) // (2 * GRID_ROWS) for i in range(GRID_ROWS)]
    if test.has_boxes:
        few = sorted(range(len(test)), key=test.box_count)[-GRID_ROWS:]
    rows = []
    if task.script is detection:
        detector = load_detection(run)
        for item in (test[i] for i in few):
            objects = detector.predict(item["image"])
            sure = {key: value[objects["scores"] >= MIN_SCORE] for key, value in objects.items()}
            rows.append((item["image"], item, sure))
        return object_grid(rows, detector.classes)
    model = load_segmentation(run)
    rows = [(item["image"], item["mask"], model.predict(item["image"]))
            for item in (test[i] for i in few)]  # fmt: skip
    return mask_grid(rows, model.classes, class_colours(len(model.classes)).numpy())


def summary(rows: list[dict[str, str]]) -> str:
    """Return one line per task: mean and deviation over the seeds."""
    lines = []
    for name, task in TASKS.items():
        full = [row for row in rows if row["task"] == name
                and float(row["epochs"]) == task.settings["epochs"]]  # fmt: skip
        if full:
            sizes = f"{full[0]['train']}, {full[0]['test']}"
            means = [mean_and_spread([float(row["value"]) for row in full if row["arm"] == arm])
                     for arm in ARMS]  # fmt: skip
            lines.append((name, task.metric[1], task.test, task.labels, sizes, *means))
    return markdown_table(("task", "metric, %", "tested on", "labels", "train, test", *ARMS), lines)


def main() -> int:
    parser = results_parser(__doc__, TABLE)
    add = parser.add_argument
    add("--tasks", nargs="+", default=list(TASKS), choices=TASKS, metavar="TASK",
        help=f"tasks: {'; '.join(TASKS)}")  # fmt: skip
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of the runs")
    add("--jobs", type=int, default=2, help="parallel runs, one thread each")
    add("--steps", type=int, default=0, help="trial: end each run after this many steps")
    add("--images", "--pictures", type=Path, metavar="FOLDER", help="folder for image grids")
    add("--summary", action="store_true", help="only print the table")
    add("--one", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        name, arm, seed, steps, images = args.one
        row = measure(name, arm, int(seed), int(steps), Path(images) if images else None)
        append_rows(args.out / TABLE, COLUMNS, [origin() | row])
        return 0
    if args.steps and args.out.resolve() == RESULTS.resolve():
        parser.error(
            "--steps is for trials: also give --out FOLDER, to keep their rows out of results/."
        )
    failed = 0
    if not args.summary:
        done = {(row["task"], row["arm"], int(row["seed"]), float(row["epochs"]))
                for row in read_rows(args.out / TABLE)}  # fmt: skip
        jobs = []
        for seed in args.seeds:
            for name in args.tasks:
                for arm in ARMS:
                    if (name, arm, seed, float(TASKS[name].settings["epochs"])) not in done:
                        drawn = arm == "offline_rgb" and seed == args.seeds[0] and args.images
                        jobs.append((name, arm, seed, args.steps, drawn or ""))
        failed = run_jobs(__file__, args.out, jobs, args.jobs)
    print(summary(read_rows(args.out / TABLE)))
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
