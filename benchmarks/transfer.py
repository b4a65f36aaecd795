"""What the suite's own encoder is worth on real sets of other kinds, by linear probe.

    python benchmarks/transfer.py                       # half an hour of one core
    python benchmarks/transfer.py --encoder vit         # then the ViT of learning/anchor.py
    python benchmarks/transfer.py --summary             # the table of the README, from the rows

Three seeds, each with its own choice of C and readout, untrained weights, and, of sets without a
test part, split by group. Beside the encoder stand the same untrained and raw pixels at 32 px, and
timm's ViT of its size under MAE, trained for the same time. Rows are appended to
results/transfer.csv as they come; what is there already is not done again, and features are kept
in the user's cache. No image of a test part was trained on; DICOM and satellite tiles, no image
at all. Of the DICOM files' 13 patients one has 120 of 148 images, and of each modality one to
three patients are tested: that row shows that the path works, little more.
"""

import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "learning"))

import anchor
import torch
from rows import ORIGIN, append_rows, mean_and_spread, origin, read_rows, results_parser

from vim_ssl.data import labelled_splits
from vim_ssl.downstream import linear_probe
from vim_ssl.evaluation.features import encode_splits
from vim_ssl.evaluation.readout import available_readouts

ENCODER, VIT = "vim_mini_patch8_96.offline_rgb", "vit"
TABLE = "transfer.csv"
FIGURES = ("logistic", "knn")
COLUMNS = (*ORIGIN, "task", "encoder", "seed", "train", "test", "features", "logistic",
           "logistic_low", "logistic_high", "readout", "knn", "knn_low", "knn_high")  # fmt: skip
# Task -> data, what to test on if that is another set, and where the labels come from.
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
    """A row for the encoder, the same untrained, and raw pixels; of the ViT for itself alone."""
    data, test_data, _ = TASKS[task]
    with tempfile.TemporaryDirectory() as folder:
        config = linear_probe.Config(
            encoder=encoder, data=data, test_data=test_data, seed=seed, output=folder
        )
        found = probe_vit(config) if encoder == VIT else linear_probe.run(config)
    common = {"task": task, "encoder": encoder, "seed": seed}
    common |= {part: found[part] for part in ("train", "test")}
    rows = []
    for row in found["rows"]:
        rows.append(common | {key: row[key] for key in ("features", "logistic", "readout", "knn")})
        for figure in ("logistic", "knn"):
            low, high = row[f"{figure}_ci"]
            rows[-1] |= {f"{figure}_low": low, f"{figure}_high": high}
    return rows


def probe_vit(config: linear_probe.Config) -> dict:
    """What of `linear_probe.run`'s result is used here."""
    parts = labelled_splits(config.data, config.test, config.seed, config.test_data)
    encoder = anchor.load()
    train, test = encode_splits(encoder, parts)
    readouts = available_readouts(encoder, config.readouts)
    row, _ = linear_probe.probe("ViT, MAE for the same time", train, test, readouts, config)
    return {"train": len(parts[0]), "test": len(parts[1]), "rows": [row]}


def summary(rows: list[dict[str, str]]) -> str:
    """A line a task: mean and deviation over the seeds, linear head / nearest neighbours."""
    kinds = list(dict.fromkeys(row["features"] for row in rows))
    lines = ["| task | labels | seeds | train, test | " + " | ".join(kinds) + " |",
             "|---" * (4 + len(kinds)) + "|"]  # fmt: skip
    for task in dict.fromkeys(row["task"] for row in rows):
        of_task = [row for row in rows if row["task"] == task]
        sizes = dict.fromkeys(f"{int(row['train']):,}, {int(row['test']):,}" for row in of_task)
        cells = [TASKS[task][2] if task in TASKS else "",
                 str(len({row["seed"] for row in of_task})), "; ".join(sizes)]  # fmt: skip
        for kind in kinds:
            found = [row for row in of_task if row["features"] == kind]
            means = [mean_and_spread([float(r[figure]) for r in found]) for figure in FIGURES]
            cells.append(" / ".join(means) if found else "")
        lines.append(f"| {task} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = results_parser(__doc__, TABLE)
    parser.add_argument("--encoder", default=ENCODER,
                        help=f"a name, run or file, or {VIT}: see learning/anchor.py")  # fmt: skip
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS, metavar="TASK",
                        help=f"of {'; '.join(TASKS)}")  # fmt: skip
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the probes")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--summary", action="store_true", help="only print the table")
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
    shown = {ENCODER if args.encoder == VIT else args.encoder, VIT}
    print(summary([row for row in read_rows(args.out / TABLE) if row["encoder"] in shown]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
