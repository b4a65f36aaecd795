"""Draw the images of the documentation from committed measurements; run it once after a change.

    python docs/images/make.py                     # all that are drawn from committed rows
    python docs/images/make.py --reconstruct RUN   # reconstruction.png too, by a run of MAE

reconstruction.png needs a decoder, which the bundled weights do not have. RUN is that of

    vim-ssl mim-pretrain --preset offline_rgb --encoder vim_mini_patch8_96.offline_rgb \\
      --data 'sample:fluent-emoji?split=train&tones=none' --epochs 6 --warmup-epochs 0.3 \\
      --batch-size 16 --lr-reference-batch 16 --output RUN

stopped after step 344.

transfer.png    linear probes of the bundled encoder and its baselines (transfer.csv)
cost.png        seconds per image against its size (efficiency.csv)
overview.png    reconstruction.png, predicted masks, and the cost, side by side
scan.svg        the order in which two scans read the patches
"""

import argparse
import csv
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

import matplotlib
import numpy as np
from PIL import Image

matplotlib.use("agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
RESULTS = HERE.parents[1] / "benchmarks" / "results"
COLOURS = {"vim": "#00796b", "other": "#e07b39", "plain": "#9e9e9e", "light": "#b2dfdb"}
plt.rcParams.update({
    "font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "savefig.dpi": 150,
    "axes.titlesize": 12, "svg.fonttype": "none",
})  # fmt: skip
# Task of transfer.csv -> its name in the plot; the two smallest sets are left out.
TASKS = {
    "digits": "digits",
    "emoji, 9 categories, Noto to Twemoji": "emoji,\n9 categories",
    "emoji, 98 subcategories, Noto to Fluent, without skin tones": "emoji,\n98 subcategories",
    "aerial tiles by number of trees, another photograph": "aerial tiles,\nnumber of trees",
}


def rows(name: str) -> list[dict[str, str]]:
    with open(RESULTS / name, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def cost(axes) -> None:
    """Seconds for the features of one image, against its side; medians of the measured points."""
    titles = {
        ("vim_tiny", ""): ("Vim-Ti", COLOURS["vim"]),
        ("deit_tiny", "fused"): ("DeiT-Ti, fused attention", COLOURS["other"]),
        ("deit_tiny", "plain"): ("DeiT-Ti, plain attention", COLOURS["plain"]),
    }
    for (model, attention), (title, colour) in titles.items():
        points = sorted(
            (int(row["pixels"]), float(row["seconds"]))
            for row in rows("efficiency.csv")
            if (row["model"], row["attention"]) == (model, attention)
            and row["task"] == "features" and row["state"] == "measured"
        )  # fmt: skip
        axes.loglog(*zip(*points, strict=True), "o-", color=colour, label=title, markersize=4)
    sides = [224, 512, 1024, 2048]
    axes.set_xticks(sides, [str(side) for side in sides])
    axes.set_yticks([0.1, 1, 10, 100], ["0.1", "1", "10", "100"])
    axes.minorticks_off()
    axes.set(xlabel="side of the image in pixels", ylabel="seconds, one CPU thread")
    axes.legend(frameon=False, fontsize=9)


def draw_transfer(path: Path) -> None:
    titles = {
        "pretrained encoder": ("bundled encoder", COLOURS["vim"]),
        "same encoder, untrained": ("untrained", COLOURS["light"]),
        "raw pixels, 32x32": ("raw pixels", COLOURS["plain"]),
        "ViT, MAE for the same time": ("ViT by MAE", COLOURS["other"]),
    }
    values: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row in rows("transfer.csv"):
        values[row["task"], row["features"]].append(float(row["logistic"]))
    figure, axes = plt.subplots(figsize=(9, 3.4))
    for i, (features, (title, colour)) in enumerate(titles.items()):
        heights = [mean(values[task, features]) for task in TASKS]
        spreads = [stdev(values[task, features]) for task in TASKS]
        axes.bar(np.arange(len(TASKS)) + 0.2 * (i - 1.5), heights, 0.19, yerr=spreads, label=title,
                 color=colour, error_kw={"elinewidth": 1, "ecolor": "#555555"})  # fmt: skip
    axes.set_xticks(range(len(TASKS)), list(TASKS.values()))
    axes.set_ylabel("linear probe, accuracy in %")
    axes.legend(frameon=False, ncols=4, loc="upper right", fontsize=9)
    figure.tight_layout()
    figure.savefig(path)


def draw_cost(path: Path) -> None:
    figure, axes = plt.subplots(figsize=(6.5, 3.4))
    cost(axes)
    figure.tight_layout()
    figure.savefig(path)


def draw_overview(path: Path) -> None:
    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(13, 3.6), gridspec_kw={"width_ratios": [1, 1.28, 1.7]}, layout="constrained"
    )
    left.imshow(Image.open(HERE / "reconstruction.png"))
    left.set_title("image, visible, reconstruction")
    lobes = Image.open(RESULTS / "dense_pictures" / "lobes-of-the-brain.png").convert("RGB")
    middle.imshow(lobes.crop((0, 20, 984, 838)))  # without its titles and legend
    middle.set_title("image, truth, predicted mask")
    for axes in (left, middle):
        axes.axis("off")
    cost(right)
    right.set_title("time against image size")
    figure.savefig(path)


def draw_reconstruction(run: Path, path: Path, chosen=(216, 30, 60), scale: int = 2) -> None:
    """Emoji that were not trained on: the image, its visible patches, the prediction for the rest.

    Args:
        chosen: numbers of the images in the test split.
    """
    import json

    import torch
    from safetensors.torch import load_file

    from vim_ssl.data import create_transform, open_data
    from vim_ssl.objectives.pixels import denormalize, patchify, unpatchify
    from vim_ssl.recipes import mim_pretrain
    from vim_ssl.utils.config import from_dict

    settings = json.loads((run / "config.json").read_text())
    known = mim_pretrain.Config.__dataclass_fields__
    config = from_dict(mim_pretrain.Config, {k: v for k, v in settings.items() if k in known})
    encoder = mim_pretrain.build_model(config)
    objective = mim_pretrain.build_objective(config, encoder).eval()
    newest = max((run / "checkpoints").glob("step-*"), key=lambda step: step.stat().st_mtime)
    objective.load_state_dict(load_file(newest / "model.safetensors"))

    data = open_data("sample:fluent-emoji?split=test&tones=none")
    transform = create_transform(encoder)
    images = torch.stack([transform(data[i]["image"]) for i in chosen])
    torch.manual_seed(0)
    patches = encoder.grid_size[0] * encoder.grid_size[1]
    hidden = torch.rand(len(images), patches).argsort(1) < 0.75 * patches
    with torch.no_grad():
        predicted = objective.predict(images, hidden)
    side, patch = images.shape[-2:], encoder.patch_embed.patch_size
    true = patchify(images, patch)
    joined = unpatchify(torch.where(hidden[..., None], predicted, true), patch, side)
    grey = torch.full_like(true, 0.75)
    columns = [denormalize(x, encoder.data_config) for x in (images, joined)]
    shown = patchify(columns[0], patch)
    columns.insert(1, unpatchify(torch.where(hidden[..., None], grey, shown), patch, side))
    columns = [torch.nn.functional.pad(x.clamp(0, 1), (3, 3, 3, 3), value=1) for x in columns]
    lines = [torch.cat(line, -1) for line in zip(*columns, strict=True)]
    grid = torch.cat(lines, 1)  # (c, h, w)
    pixels = (grid.permute(1, 2, 0) * 255).round().byte().numpy()
    image = Image.fromarray(pixels)
    image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--reconstruct", metavar="RUN", type=Path, help="run of MAE")
    run = parser.parse_args().reconstruct
    if run:
        draw_reconstruction(run, HERE / "reconstruction.png")
    draw_transfer(HERE / "transfer.png")
    draw_cost(HERE / "cost.png")
    if (HERE / "reconstruction.png").exists():
        draw_overview(HERE / "overview.png")


if __name__ == "__main__":
    main()
