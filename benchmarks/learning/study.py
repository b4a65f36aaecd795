"""Compare the objectives with equal encoders, equal data and equal budgets, on five seeds.

    python benchmarks/learning/study.py                 # four hours on two CPU cores

On digits (28 px, 49 patches) and colour images (emoji, 64 px, 64 patches) every objective trains
the same 0.5 M-parameter Vim twice: on as many images as `mae`, and for the same time as `mae`.
`mae` also runs with the visible patches shuffled, and on timm's ViT of the same size (the external
reference, equal time and equal images). The frozen features are then evaluated on test images by
logistic regression and by nearest neighbours; readout and C are selected on a validation part of
the training set. Baselines are the untrained encoders and raw pixels.

Seconds are one thread's CPU time, including data loading, which other work on the machine does not
affect. The cost of a step is first measured for every arm, in turns. Rows are appended to
results/learning.csv as they come; an interrupted study resumes.
"""

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import vim_ssl.utils.openmp  # noqa: F401 (before torch)

import torch
from campaign import costs, fit_seconds, run_jobs
from rows import ORIGIN, append_rows, origin, read_rows, results_parser

from vim_ssl import create_transform
from vim_ssl.checkpoints.timm_models import same_images
from vim_ssl.data import labelled_splits
from vim_ssl.downstream import linear_probe
from vim_ssl.evaluation.extract import extract_features
from vim_ssl.evaluation.features import encode_splits
from vim_ssl.evaluation.readout import available_readouts
from vim_ssl.recipes.mim_pretrain import Config, build_data, build_model, build_objective
from vim_ssl.recipes.mim_pretrain import mae_minute as preset
from vim_ssl.training.accelerator import make_accelerator

TABLE, COSTS = "learning.csv", "learning_costs.csv"
COLUMNS = (*ORIGIN, "data", "arm", "budget", "seed", "epochs", "pictures", "cpu_seconds",
           "logistic", "readout", "knn")  # fmt: skip

QUIET = {"epochs": 2, "threads": 1, "eval_every": 1e9, "log_every": 50, "save_every": 1e9,
         "trackers": ("none",)}  # fmt: skip
DATA = {
    "digits": replace(preset(), **QUIET),
    "colour": replace(preset(), data="sample:noto-emoji?split=train", hflip=0.5,
                      encoder="vim_nano_patch8_64", crop_scale=(0.4, 1.0), **QUIET),
}  # fmt: skip
ARMS = {
    "mae": {},
    "mae, shuffled": {"keep_order": False},
    "simmim": {"objective": "simmim", "mask_ratio": 0.6},
    "ar": {"objective": "ar", "cluster": 1},
    # On another seed, a loss on all patches with 60 % masked gave lower accuracy.
    "distill": {"objective": "distill", "teacher_layers": 2, "mask_ratio": 0.75},
    # On another seed, the learning rate and mask ratio of the others gave lower accuracy.
    "mae on ViT": {"base_lr": 5e-4, "warmup_epochs": 0.5, "mask_ratio": 0.6},
}  # fmt: skip
VIT = {"embed_dim": 96, "depth": 4, "num_heads": 3}  # 0.45 M parameters; the Vim has 0.50 M
SAME = {"mae", "mae, shuffled"}  # of equal cost; their time and images are the budgets
# `ar` reads forward only, so its untrained network differs.
UNTRAINED = {"untrained": "mae", "untrained, forward only": "ar", "untrained ViT": "mae on ViT"}
BASELINES = (*UNTRAINED, "pixels")


def settings(data: str, arm: str, seed: int, **more) -> Config:
    return replace(DATA[data], **ARMS.get(arm, {}), seed=seed, **more)


def with_vit(config: Config, size: dict[str, int]) -> Config:
    """The same with timm's ViT of this ``size``, with the images and patches of the Vim."""
    with torch.device("meta"):
        vim = build_model(config)
    args = size | same_images(vim)
    return replace(config, encoder="timm:vit_tiny_patch16_224", model_args=args)


def build(arm: str, config: Config, vit: dict[str, int]):
    """Objective and samples of an arm; ``vit`` is the size of a ViT."""
    torch.manual_seed(config.seed)
    config = with_vit(config, vit) if "ViT" in arm else config
    encoder = build_model(config)
    return build_objective(config, encoder), build_data(config, encoder)[1]


def train(arm: str, config: Config, vit: dict[str, int]):
    """Train to the end in ``config.output`` or a temporary folder; return encoder, CPU seconds."""
    with tempfile.TemporaryDirectory() as folder:
        config = replace(config, output=config.output or folder)
        accelerator = make_accelerator(config)
        objective, samples = build(arm, config, vit)
        seconds = fit_seconds("mim_pretrain", objective, samples, config, accelerator)
    return objective.encoder, seconds


def evaluate(encoder, data: str, seed: int) -> dict:
    """Evaluate frozen features; without an encoder, raw pixels."""
    splits = labelled_splits(DATA[data].data, 0.2, seed)
    config = linear_probe.Config(seed=seed, readouts=("avg", "layers"), knn_k=20)
    if encoder is None:
        data_config = build_model(DATA[data]).data_config
        channels, side, _ = data_config["input_size"]
        transform = create_transform(data_config | {"input_size": (channels, *[min(32, side)] * 2)})
        features = [extract_features(torch.nn.Identity(), split, transform) for split in splits]
        return linear_probe.probe("pixels", *features, {"pixels": slice(None)}, config)[0]
    features = encode_splits(encoder.eval(), splits, cache=False)
    return linear_probe.probe(
        data, *features, available_readouts(encoder, config.readouts), config
    )[0]


def work(out: Path, data: str, arm: str, budget: str, seed: int, epochs: float) -> None:
    """Train and evaluate one arm in this process; append the row."""
    torch.set_num_threads(1)
    config = settings(data, arm, seed, **({"epochs": epochs} if epochs else {}))
    seconds, images = 0.0, 0
    if arm in BASELINES:
        trained = UNTRAINED.get(arm, "")
        untrained = settings(data, trained, seed)
        encoder = build(trained, untrained, VIT)[0].encoder if trained else None
    else:
        encoder, seconds = train(arm, config, VIT)
        size, batch = len(labelled_splits(config.data, 0.2, 0)[0]), config.batch_size
        images = batch * round(epochs * (size // batch))
    row = {"data": data, "arm": arm, "budget": budget, "seed": seed, "epochs": epochs,
           "pictures": images, "cpu_seconds": round(seconds, 1)}  # fmt: skip
    result = evaluate(encoder, data, seed)
    row |= {key: result[key] for key in ("logistic", "readout", "knn")}
    append_rows(out / TABLE, COLUMNS, [origin() | row])


def plan(out: Path, data: str) -> list[tuple[str, str, float]]:
    """(arm, budget, epochs) of every run of a seed."""

    def steps(arm: str, count: int) -> float:
        return train(arm, settings(data, arm, 1000, max_steps=count), VIT)[1]

    epochs, cost = DATA[data].epochs, costs(out / COSTS, data, ARMS, steps, 10)
    jobs = [(arm, "none", 0.0) for arm in BASELINES]
    jobs += [(arm, "both", epochs) for arm in ARMS if arm in SAME]
    for arm in ARMS.keys() - SAME:
        jobs.append((arm, "time", round(epochs * cost["mae"] / cost[arm], 2)))
        jobs.append((arm, "pictures", epochs))
    return jobs


def main() -> int:
    parser = results_parser(__doc__, f"{TABLE} and {COSTS}")
    add = parser.add_argument
    add("--data", nargs="+", default=list(DATA), choices=DATA, help="images")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="seeds of the runs")
    add("--jobs", type=int, default=2, help="parallel runs, one thread each")
    add("--one", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        data, arm, budget, seed, epochs = args.one
        work(args.out, data, arm, budget, int(seed), float(epochs))
        return 0
    torch.set_num_threads(1)
    done = {(r["data"], r["arm"], r["budget"], int(r["seed"])) for r in read_rows(args.out / TABLE)}
    plans = {data: plan(args.out, data) for data in args.data}
    jobs = [(data, arm, budget, seed, epochs) for seed in args.seeds for data in args.data
            for arm, budget, epochs in plans[data]
            if (data, arm, budget, seed) not in done]  # fmt: skip
    jobs.sort(key=lambda job: job[2] == "pictures")  # the more expensive half last
    return min(run_jobs(__file__, args.out, jobs, args.jobs), 1)


if __name__ == "__main__":
    sys.exit(main())
