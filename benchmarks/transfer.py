"""Evaluate the packaged encoder `offline_rgb` on other kinds of real data, by linear probe.

    python benchmarks/transfer.py                       # half an hour of one core
    python benchmarks/transfer.py --encoder vit         # then the ViT of learning/anchor.py
    python benchmarks/transfer.py --summary             # the table of docs/results.md, from rows

Each of three seeds selects C and readout, draws untrained weights and, for sets without a test
split, splits by group. Baselines are the same encoder untrained, raw pixels at 32 px, and timm's
ViT of the same size, trained by MAE for the same time. Rows are appended to results/transfer.csv as
they come; tasks with rows are skipped, and features are cached in the user's cache. Pretraining
used no image of a test split, and no DICOM or satellite images at all. One of the 13 DICOM patients
has 120 of the 148 images, and the test split has one to three patients per modality: that row shows
little more than that the code works.
"""

import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "learning"))  # for `anchor`

import vim_ssl.utils.openmp  # noqa: F401 (before torch)

import anchor
import torch
from rows import (
    ORIGIN,
    append_rows,
    markdown_table,
    mean_and_spread,
    origin,
    read_rows,
    results_parser,
)

from vim_ssl.data import labelled_splits
from vim_ssl.downstream import linear_probe
from vim_ssl.evaluation.features import encode_splits
from vim_ssl.evaluation.readout import available_readouts

ENCODER, VIT = "vim_mini_patch8_96.offline_rgb", "vit"
TABLE = "transfer.csv"
METRICS = ("logistic", "knn")
COLUMNS = (*ORIGIN, "task", "encoder", "seed", "train", "test", "features", "logistic",
           "logistic_low", "logistic_high", "readout", "knn", "knn_low", "knn_high")  # fmt: skip
# Task -> data, test data if it is another set, source of the labels.
TASKS = {
    "digits": ("sample:mnist5k", "", "MNIST"),
    "emoji, 9 categories, Noto to Twemoji": (
        "sample:noto-emoji", "sample:twemoji", "Unicode's groups (emojibase)"),
    "emoji, 98 subcategories, Noto to Fluent, without skin tones": (
        "sample:noto-emoji?label=subcategory&tones=none",
        "sample:fluent-emoji?label=subcategory&tones=none", "Unicode's groups (emojibase)"),
    "aerial tiles by number of trees, another photograph": (
        "sample:aerial", "", "boxes drawn by people (NEON, DeepForest)"),
    "satellite tiles, a building or none": ("sample:satellite", "", "SpaceNet's polygons"),
    "DICOM by modality, other patients": ("sample:dicom", "", "the files' own headers"),
}  # fmt: skip


def measure(task: str, encoder: str, seed: int) -> list[dict]:
    """Return rows for the encoder, the same untrained, and raw pixels; for the ViT only its row."""
    data, test_data, _ = TASKS[task]
    with tempfile.TemporaryDirectory() as folder:
        config = linear_probe.Config(
            encoder=encoder, data=data, test_data=test_data, seed=seed, output=folder, knn_k=20
        )
        result = probe_vit(config) if encoder == VIT else linear_probe.run(config)
    common = {"task": task, "encoder": encoder, "seed": seed}
    common |= {split: result[split] for split in ("train", "test")}
    rows = []
    for row in result["rows"]:
        rows.append(common | {key: row[key] for key in ("features", "logistic", "readout", "knn")})
        for metric in METRICS:
            low, high = row[f"{metric}_ci"] or ("", "")  # none of fewer than five groups
            rows[-1] |= {f"{metric}_low": low, f"{metric}_high": high}
    return rows


def probe_vit(config: linear_probe.Config) -> dict:
    """Evaluate the ViT; return the part of `linear_probe.run`'s result that `measure` uses."""
    splits = labelled_splits(config.data, config.test, config.seed, config.test_data)
    encoder = anchor.load()
    train, test = encode_splits(encoder, splits)
    readouts = available_readouts(encoder, config.readouts)
    row, *_ = linear_probe.probe("ViT, MAE for the same time", train, test, readouts, config)
    return {"train": len(splits[0]), "test": len(splits[1]), "rows": [row]}


def summary(rows: list[dict[str, str]]) -> str:
    """One line per task: mean and deviation over the seeds, linear probe / nearest neighbours."""
    kinds = list(dict.fromkeys(row["features"] for row in rows))
    lines = []
    for task in dict.fromkeys(row["task"] for row in rows):
        of_task = [row for row in rows if row["task"] == task]
        sizes = dict.fromkeys(f"{int(row['train']):,}, {int(row['test']):,}" for row in of_task)
        cells = [task, TASKS[task][2] if task in TASKS else "",
                 str(len({row["seed"] for row in of_task})), "; ".join(sizes)]  # fmt: skip
        for kind in kinds:
            of_kind = [row for row in of_task if row["features"] == kind]
            means = [mean_and_spread([float(r[metric]) for r in of_kind]) for metric in METRICS]
            cells.append(" / ".join(means) if of_kind else "")
        lines.append(cells)
    return markdown_table(["task", "labels", "seeds", "train, test", *kinds], lines)


def main() -> int:
    parser = results_parser(__doc__, TABLE)
    add = parser.add_argument
    add("--encoder", default=ENCODER,
        help=f"preset, run or file, or {VIT}: see learning/anchor.py")  # fmt: skip
    add("--tasks", nargs="+", default=list(TASKS), choices=TASKS, metavar="TASK",
        help=f"tasks: {'; '.join(TASKS)}")  # fmt: skip
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of the probes")
    add("--threads", type=int, default=1, help="of torch")
    add("--summary", action="store_true", help="only print the table")
    args = parser.parse_args()
    if not args.summary:
        torch.set_num_threads(args.threads)
        done = {(row["task"], row["encoder"], int(row["seed"]))
                for row in read_rows(args.out / TABLE)}  # fmt: skip
        for seed in args.seeds:
            for task in args.tasks:
                if (task, args.encoder, seed) not in done:
                    began = time.process_time()
                    rows = measure(task, args.encoder, seed)
                    append_rows(args.out / TABLE, COLUMNS, [origin() | row for row in rows])
                    seconds = time.process_time() - began
                    print(f"{task}, seed {seed}: {seconds:.0f} s of CPU time", flush=True)
    encoders = {ENCODER if args.encoder == VIT else args.encoder, VIT}
    print(summary([row for row in read_rows(args.out / TABLE) if row["encoder"] in encoders]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
