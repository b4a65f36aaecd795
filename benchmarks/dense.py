"""Overfit dense tasks on four real images, and measure memory for one image at the paper's size.

    python benchmarks/dense.py                          # every part: some ten minutes of one core
    python benchmarks/dense.py --only cascade --out FOLDER

`cascade`, `rcnn` and `upernet` train all weights from scratch with downstream/detection.py and
segmentation.py on four aerial tiles of 90 px with outlines of buildings (the sample set
`buildings`), without augmentation, and test on the same four. Targets are an AP50 of 90 for the
cascade, for boxes and masks, and a mIoU of 95 for UPerNet. `memory` is the peak of a process that
detects objects in one image of 1024 px with Vim-Ti and the paper's cascade, with random weights;
the target is 4 GiB. Rows are appended to results/dense.csv, or to --out.
"""

import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from process import peak_mib, run_apart
from rows import ORIGIN, append_rows, origin, results_parser

PARTS = ("cascade", "rcnn", "upernet", "memory")
COLUMNS = (*ORIGIN, "threads", "what", "conditions", "steps", "cpu_seconds", "box_ap", "box_ap50",
           "mask_ap", "mask_ap50", "miou", "peak_mb")  # fmt: skip
ENCODER = "vim_nano_patch8_64"
LEARN = {"encoder": ENCODER, "hflip": 0.0, "warmup_epochs": 5, "batch_size": 4, "base_lr": 3e-3,
         "layer_decay": None, "trackers": ("none",)}  # fmt: skip


def four_tiles(root: Path) -> None:
    """Write four tiles with at least two buildings each, all of them large.

    They are written in COCO's layout to ``root``/coco and as images with masks to ``root``/masks;
    every split has the same four.
    """
    from vim_ssl.data import open_data
    from vim_ssl.data.sources.coco import ground_truth, mask_tools

    data = open_data("sample:buildings?split=all")
    smallest = {i: min(o["area"] for o in data.annotated(i)[1])
                for i in range(len(data)) if data.box_count(i) > 1}  # fmt: skip
    chosen = sorted(smallest, key=lambda i: -smallest[i])[:4]
    table = ground_truth(data, chosen)
    for image, index in zip(table["images"], chosen, strict=True):
        image["file_name"] = f"{image['id']}.png"
        photo = data[index]["image"]
        outlines = [a["segmentation"] for a in table["annotations"] if a["image_id"] == image["id"]]
        mask = Image.fromarray(mask_tools().decode(outlines).max(2))
        for split in ("train", "val"):
            for folder, content in ((f"coco/{split}", photo), (f"masks/images/{split}", photo),
                                    (f"masks/masks/{split}", mask)):  # fmt: skip
                (root / folder).mkdir(parents=True, exist_ok=True)
                content.save(root / folder / image["file_name"])
    (root / "masks" / "classes.txt").write_text("ground\nbuilding\n")
    (root / "coco" / "annotations").mkdir()
    for split in ("train", "val"):
        (root / "coco" / "annotations" / f"{split}.json").write_text(json.dumps(table))


def overfit(head: str, steps: int, threads: int, root: Path) -> dict:
    """Train and test; return the row."""
    from vim_ssl.downstream import detection, segmentation

    four_tiles(root)
    common = LEARN | {"epochs": steps, "threads": threads, "output": str(root / "run")}
    began = time.process_time()
    if head == "upernet":
        names: tuple[str, ...] = ("miou",)
        metrics = segmentation.run(segmentation.Config(
            data=f"masks:{root / 'masks'}", short_side=96, crop=96, scale=(1.0, 1.0), max_share=1.0,
            photometric=False, **common,
        ))  # fmt: skip
    else:
        names = ("box_ap", "box_ap50", "mask_ap", "mask_ap50")
        metrics = detection.run(detection.Config(
            data=f"coco:{root / 'coco'}", head=head, size=128, scale=(1.0, 1.0), **common,
        ))  # fmt: skip
    return {name: metrics[name] for name in names} | {
        "steps": steps, "cpu_seconds": round(time.process_time() - began, 1),
        "conditions": f"{ENCODER} from scratch, 4 aerial tiles with buildings learned by heart",
    }  # fmt: skip


def memory(threads: int) -> dict:
    """Detect objects in one image of 1024 px; return the row."""
    import torch

    from vim_ssl import load_encoder
    from vim_ssl.tasks.detection import Detection

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    encoder = load_encoder("vim_tiny_patch16_224", num_classes=0, img_size=1024)
    model = Detection(encoder, [str(i) for i in range(80)]).eval()
    photo = Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (1024, 1024, 3), dtype=np.uint8)
    )
    began = time.process_time()
    model.predict(photo)
    return {
        "cpu_seconds": round(time.process_time() - began, 1),
        "peak_mb": round(peak_mib()),
        "conditions": "Vim-Ti and the cascade with 80 classes, one image of 1024 px, float32",
    }


def reaches_target(part: str, row: dict) -> bool:
    if part == "cascade":
        return min(row["box_ap50"], row["mask_ap50"]) >= 90
    if part == "upernet":
        return row["miou"] >= 95
    return part == "rcnn" or row["peak_mb"] <= 4096


def main() -> int:
    parser = results_parser(__doc__, "dense.csv")
    parser.add_argument("--only", nargs="+", default=PARTS, choices=PARTS, help="parts to run")
    parser.add_argument("--steps", type=int, default=150, help="training steps of four images")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    args = parser.parse_args()
    good = True
    for part in args.only:
        if part == "memory":
            row = run_apart(memory, args.threads)
        else:
            with tempfile.TemporaryDirectory() as root:
                row = run_apart(overfit, part, args.steps, args.threads, Path(root))
        row |= {"what": part, "threads": args.threads}
        append_rows(args.out / "dense.csv", COLUMNS, [origin() | row])
        values = {k: v for k, v in row.items() if k not in ("what", "conditions", "threads")}
        print(f"{part:8} {row['conditions']}: {values}", flush=True)
        good &= reaches_target(part, row)
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
