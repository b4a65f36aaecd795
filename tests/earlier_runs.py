"""Data, commands and outputs of the runs in fixtures/earlier, for its make.py and for
test_earlier_runs.py."""

import importlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import vim_ssl

EARLIER = Path(__file__).parent / "fixtures" / "earlier"
TEXTS = ["a red square", "blue", ""]
COMMON = [
    "--batch-size", "4", "--workers", "0", "--threads", "1", "--log-every", "1",
    "--keep-checkpoints", "1", "--trackers", "none", "--warmup-epochs", "0",
    "--base-lr", "5e-3", "--lr-reference-batch", "4",
    "--eps", "1e-3",  # large, so that Adam does not magnify rounding errors of small gradients
]  # fmt: skip
TINY = ["depth=1", "embed_dim=8", "d_state=4", "patch_size=4", "img_size=16"]
PRETRAIN = [
    "--preset", "mae_nano_64", "--data", "data/images", *COMMON, "--decoder-dim", "8",
    "--epochs", "1.5", "--model-args", *TINY,
]  # fmt: skip
DOWNSTREAM = ["--encoder", "runs/mae", *COMMON]


@dataclass(frozen=True)
class Earlier:
    """A run: its script, its arguments, and the step at which it was stopped."""

    script: str
    argv: list[str]
    stop: int

    def main(self, *argv: str) -> None:
        assert importlib.import_module(f"vim_ssl.{self.script}").main(list(argv)) == 0


# Downstream runs start from the encoder of `mae`, which comes first.
RUNS = {
    "mae": Earlier("recipes.mim_pretrain", [*PRETRAIN, "--ema", "0.9"], 8),
    "simmim": Earlier("recipes.mim_pretrain", [*PRETRAIN, "--objective", "simmim"], 3),
    "ar": Earlier("recipes.mim_pretrain", [*PRETRAIN, "--objective", "ar", "--cluster", "1"], 3),
    "distill": Earlier("recipes.mim_pretrain", [*PRETRAIN, "--objective", "distill"], 3),
    "video": Earlier(
        "recipes.mim_pretrain",
        [*PRETRAIN, "--data", "video:data/clips?frames=4", "--tubelet", "2", "--epochs", "2"],
        3,
    ),
    "clip": Earlier(
        "recipes.clip_pretrain",
        [
            "--preset", "emoji_clip", "--data", "pairs:data/pairs", "--val", "pairs:data/pairs",
            "--encoder", "vim_nano_patch8_64", "--model-args", *TINY, *COMMON,
            "--text-width", "8", "--text-depth", "1", "--text-heads", "2", "--embed-dim", "8",
            "--vocab-size", "270", "--context-length", "8", "--epochs", "2",
        ],
        4,
    ),
    "finetune": Earlier(
        "downstream.finetune",
        [*DOWNSTREAM, "--data", "data/images", "--epochs", "2", "--eval-every", "1"],
        3,
    ),
    "segmentation": Earlier(
        "downstream.segmentation",
        [
            *DOWNSTREAM, "--data", "masks:data/masks", "--crop", "16", "--channels", "4",
            "--auxiliary", "0", "--epochs", "3", "--ema", "0.9", "--eval-every", "1",
        ],
        3,
    ),
    "detection": Earlier(
        "downstream.detection",
        [
            *DOWNSTREAM, "--data", "coco:data/shapes", "--size", "64", "--channels", "4",
            "--hidden", "4", "--samples", "16", "--most", "10", "--batch-size", "2",
            "--epochs", "2", "--eval-every", "1",
        ],
        3,
    ),
}  # fmt: skip
# Two of the commands that a finished run is given; both write below the run.
PROBE = Earlier(
    "downstream.linear_probe",
    ["--encoder", "runs/mae", "--no-cache", "--device", "cpu", "--shots", "1", "--knn-k", "5",
     "--output", "runs/mae/linear_probe"],
    0,
)  # fmt: skip
EMBED = Earlier(
    "downstream.embed",
    ["--encoder", "runs/mae", "--device", "cpu", "--shard-rows", "10", "--format", "npy",
     "--output", "runs/mae/embed"],
    0,
)  # fmt: skip
ENCODER = {
    "img_size": 16, "patch_size": 4, "in_chans": 2, "embed_dim": 8, "d_state": 4, "depth": 2,
    "num_classes": 3, "num_registers": 2, "global_pool": "token+avg",
    "data_config": {"mean": (0.1, 0.2), "std": (0.3, 0.4), "bands": ("B04", "B08")},
}  # fmt: skip


# ---------------------------------------------------------------- data


def pixels(seed: int, kind: int, side: int) -> np.ndarray:
    """(side, side, 3) uint8, by whole numbers alone: the same on every machine."""
    y, x = np.mgrid[:side, :side]
    slopes = [(3 + kind + c, 5 + 4 * kind - c) for c in range(3)]
    bands = [(a * x + b * y + 37 * seed + (x * y * (seed + 1)) // 16) % 256 for a, b in slopes]
    return np.stack(bands, -1).astype(np.uint8)


def write(path: Path, values: np.ndarray) -> None:
    """A BMP: file sizes are part of a run's fingerprint, and no compression changes them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


def write_data(root: Path) -> None:
    """Make ``root``/data, of which the runs were made."""
    for i in range(24):
        name = f"{('plain', 'steep')[i % 2]}/{i:02}.bmp"
        write(root / "data/images" / name, pixels(i, i % 2, 32))
    for i in range(16):
        for t in range(4):
            write(root / f"data/clips/{i:02}/{t}.bmp", pixels(i + t, i % 2, 32))
    for i in range(12):
        write(root / f"data/pairs/{i:02}.bmp", pixels(i, i % 3, 32))
        text = f"a {('red', 'green', 'blue')[i % 3]} square\nnumber {i}\n"
        (root / f"data/pairs/{i:02}.txt").write_bytes(text.encode())
    _write_masks(root / "data/masks")
    _write_objects(root / "data/shapes")


def _write_masks(root: Path) -> None:
    for split, count in (("train", 8), ("val", 4)):
        for i in range(count):
            mask = np.zeros((32, 32), np.uint8)
            mask[4 + i : 16 + i, 2:14] = 1
            mask[i : 20 + i, 18:30] = 2
            write(root / f"images/{split}/{i}.bmp", pixels(i, 0, 32) // 2 + 60 * mask[..., None])
            write(root / f"masks/{split}/{i}.bmp", mask)
    (root / "classes.txt").write_bytes(b"ground\nleft\nright\n")


def _write_objects(root: Path) -> None:
    categories = [{"id": 3, "name": "left"}, {"id": 8, "name": "right"}]
    for split, count in (("train", 4), ("val", 2)):
        images, objects = [], []
        for i in range(count):
            values = pixels(i, 0, 64) // 2
            images.append({"id": i + 1, "file_name": f"{i}.bmp", "width": 64, "height": 64})
            for category, left, top, side in ((3, 4, 6 + 4 * i, 20), (8, 34, 20 - 4 * i, 26)):
                right, bottom = left + side, top + side
                values[top:bottom, left:right, category % 3] += 100
                outline = [left, top, right, top, right, bottom, left, bottom]
                objects.append({
                    "id": len(objects) + 1, "image_id": i + 1, "category_id": category,
                    "iscrowd": 0, "area": side * side, "bbox": [left, top, side, side],
                    "segmentation": [outline],
                })  # fmt: skip
            write(root / split / f"{i}.bmp", values)
        table = {"images": images, "annotations": objects, "categories": categories}
        (root / "annotations").mkdir(exist_ok=True)
        (root / f"annotations/{split}.json").write_bytes(json.dumps(table).encode())


# ---------------------------------------------------------------- outputs


def batch(*shape: int) -> torch.Tensor:
    """A smooth input of this shape, float32."""
    steps = torch.arange(int(np.prod(shape)), dtype=torch.float64)
    return (steps * 0.37).sin().reshape(shape).float()


@torch.no_grad()
def outputs(name: str, run: Path) -> dict[str, np.ndarray]:
    """What the models that a run has left give for fixed inputs."""
    x = batch(1, 3, 64, 64) if name == "detection" else batch(2, 3, 16, 16)
    found = {}
    if name == "video":
        x = batch(2, 3, 4, 16, 16)
    encoder = vim_ssl.load_encoder(run)
    found["encoder"] = encoder.forward_features(x)
    if name == "mae":
        for which, ema in (("weights", False), ("average", True)):
            found[which] = vim_ssl.load_encoder(run, ema=ema)(x)
    if name == "clip":
        clip = vim_ssl.load_clip(run)
        found |= {"image": clip.encode_image(x), "text": clip.encode_text(TEXTS)}
    if name == "finetune":
        found["logits"] = vim_ssl.load_encoder(run, num_classes=None)(x)
    if name == "segmentation":
        from vim_ssl.downstream.segmentation import load_segmentation

        found["logits"] = load_segmentation(run).logits(x)
    if name == "detection":
        from vim_ssl.downstream.detection import load_detection

        model = load_detection(run)
        (last,) = model.encoder.forward_intermediates(x, 1, norm=True, intermediates_only=True)
        levels = model.pyramid(last)
        levels = levels.values() if isinstance(levels, dict) else levels
        found["pyramid"] = torch.cat([level.flatten() for level in levels])
        image = Image.fromarray(pixels(0, 0, 64))
        found["scores"] = torch.from_numpy(np.sort(model.predict(image)["scores"]))
    return {key: value.numpy() for key, value in found.items()}
