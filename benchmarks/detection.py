"""Detectors that learn four pictures by heart, and the memory of one picture at the paper's size.

    python benchmarks/detection.py                      # both heads, then the memory
    python benchmarks/detection.py --only cascade --out FOLDER

`cascade` and `rcnn` train downstream/detection.py from scratch, in full: 4 pictures of 128 px with
discs and squares drawn on noise, boxes and masks, without augmentation; tested on the same four.
An AP50 of 90 or more, of boxes and of masks, is wanted of the cascade. `memory` is the peak of a
process of its own that searches one picture of 1024 px with Vim-Ti and the paper's cascade, weights
random; 4 GiB are wanted. Rows are appended to results/detection.csv; --out FOLDER takes another.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from rows import ORIGIN, append_rows, origin, results_parser

PARTS = ("cascade", "rcnn", "memory")
COLUMNS = (*ORIGIN, "threads", "what", "conditions", "steps", "cpu_seconds", "box_ap", "box_ap50",
           "mask_ap", "mask_ap50", "peak_mb")  # fmt: skip
SIDE, CLASSES = 128, ("disc", "square")


def draw(root: Path, split: str) -> None:
    """Four pictures in COCO's layout, the same in every split."""
    (root / split).mkdir(parents=True)
    (root / "annotations").mkdir(exist_ok=True)
    images, annotations = [], []
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE
    for number in range(1, 5):
        rng = np.random.default_rng(number)
        top, left, cy = rng.uniform(0.05, 0.6), rng.uniform(0.5, 0.6), rng.uniform(0.25, 0.75)
        disc = np.hypot(y - cy, x - 0.25) < rng.uniform(0.1, 0.2)
        square = (np.abs(y - top - 0.15) < 0.15) & (np.abs(x - left - 0.15) < 0.15)
        values = np.array([[110, 120, 90], [220, 200, 60], [20, 30, 120]])[disc + 2 * square]
        values = (values + rng.integers(-20, 21, values.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(values).save(root / split / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "width": SIDE, "height": SIDE})
        for category, mask in enumerate((disc, square), start=1):
            rows, columns = np.nonzero(mask)
            box = [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
            flat = mask.T.reshape(-1).astype(int)
            runs = np.diff([0, *np.flatnonzero(np.diff(flat)) + 1, flat.size])
            annotations.append({
                "id": len(annotations) + 1, "image_id": number, "category_id": category,
                "iscrowd": 0, "area": int(mask.sum()), "bbox": [int(side) for side in box],
                "segmentation": {"size": [SIDE, SIDE], "counts": runs.tolist()},
            })  # fmt: skip
    table = {
        "images": images, "annotations": annotations,
        "categories": [{"id": i, "name": name} for i, name in enumerate(CLASSES, start=1)],
    }  # fmt: skip
    (root / "annotations" / f"{split}.json").write_text(json.dumps(table))


def overfit(head: str, steps: int, threads: int, root: Path) -> dict:
    """Train and test; returns the row."""
    from vim_ssl.downstream import detection

    for split in ("train", "val"):
        draw(root / "data", split)
    encoder = "vim_nano_patch8_64"
    config = detection.Config(
        encoder=encoder, data=f"coco:{root / 'data'}", output=str(root / "run"), head=head,
        size=SIDE, scale=(1.0, 1.0), hflip=0.0, epochs=steps, warmup_epochs=5, batch_size=4,
        base_lr=3e-3, layer_decay=None, threads=threads, trackers=("none",),
    )  # fmt: skip
    began = time.process_time()
    metrics = detection.run(config)
    names = ("box_ap", "box_ap50", "mask_ap", "mask_ap50")
    return {name: metrics[name] for name in names} | {
        "steps": steps, "cpu_seconds": round(time.process_time() - began, 1),
        "conditions": f"{encoder} from scratch, 4 pictures of {SIDE} px learned by heart",
    }  # fmt: skip


def memory(threads: int) -> dict:
    """Search one picture at 1024 px; returns the row."""
    import torch

    from vim_ssl import load_encoder
    from vim_ssl.detection import Detection

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    encoder = load_encoder("vim_tiny_patch16_224", num_classes=0, img_size=1024)
    model = Detection(encoder, [str(i) for i in range(80)]).eval()
    picture = Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (1024, 1024, 3), dtype=np.uint8)
    )
    began = time.process_time()
    model.predict(picture)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kB on Linux, bytes on a Mac
    return {
        "cpu_seconds": round(time.process_time() - began, 1),
        "peak_mb": round(peak / 2 ** (20 if sys.platform == "darwin" else 10)),
        "conditions": "Vim-Ti and the cascade with 80 classes, one picture of 1024 px, float32",
    }


def main() -> int:
    parser = results_parser(__doc__, "detection.csv")
    parser.add_argument("--only", nargs="+", default=PARTS, choices=PARTS, help="parts")
    parser.add_argument("--steps", type=int, default=150, help="of training, four pictures each")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--tell", help=argparse.SUPPRESS)  # of the processes that this one starts
    args = parser.parse_args()
    if args.tell:
        with tempfile.TemporaryDirectory() as root:
            (part,) = args.only
            row = (
                memory(args.threads)
                if part == "memory"
                else overfit(part, args.steps, args.threads, Path(root))
            )
        Path(args.tell).write_text(json.dumps(row))
        return 0
    good = True
    for part in args.only:
        with tempfile.TemporaryDirectory() as root:
            told = Path(root) / "row.json"
            command = [sys.executable, __file__, "--only", part, "--tell", str(told)]
            command += ["--steps", str(args.steps), "--threads", str(args.threads)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{part} failed:\n{done.stdout[-2000:]}{done.stderr[-3000:]}")
            row = json.loads(told.read_text()) | {"what": part, "threads": args.threads}
        append_rows(args.out / "detection.csv", COLUMNS, [origin() | row])
        shown = {k: v for k, v in row.items() if k not in ("what", "conditions", "threads")}
        print(f"{part:8} {row['conditions']}: {shown}", flush=True)
        if part == "cascade":
            good &= min(row["box_ap50"], row["mask_ap50"]) >= 90
        if part == "memory":
            good &= row["peak_mb"] <= 4096
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
