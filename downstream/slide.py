"""Classify whole slides by the features of their tiles: their mean, and attention.

    python downstream/embed.py --encoder RUN --data 'slide:ROOT?tile=256&split=all' --output tiles
    python downstream/slide.py --features tiles

The features come from files that `embed.py` wrote, tile by tile, in bounded memory and resumable;
the encoder is not needed any more. Slides, not tiles, are held out and counted; those of one group
(``slide:TABLE.csv?group=patient``) stay together. Two classifiers are compared: logistic regression
on the mean of a slide's tiles, and gated attention over them (arXiv:1802.04712), trained here. In
the run lie metrics.json, predictions.csv (a line a test slide), attention.csv (a line a tile of
these: where it lies and what it weighs) and report.html.
"""

import contextlib
import csv
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vim_ssl.cli import guarded
from vim_ssl.data import stratified_split
from vim_ssl.data.loading.indexed import SeededSamples
from vim_ssl.evaluation.embeddings import read_embeddings
from vim_ssl.evaluation.linear_heads import fit_logistic
from vim_ssl.metrics.classification import classification_metrics
from vim_ssl.report import write_report
from vim_ssl.tasks.slides import AttentionPool, BagObjective, Bags, DrawTiles, bags_of
from vim_ssl.training.accelerator import make_accelerator
from vim_ssl.training.config import TrainConfig
from vim_ssl.training.loop import fit
from vim_ssl.training.run import Run, stored_or
from vim_ssl.utils.config import opt, parse, to_dict
from vim_ssl.utils.environment import environment

MEAN_C = 1.0  # of the logistic regression; slides are too few to choose it by


@dataclass
class Config(TrainConfig):
    """A classifier of slides on features of their tiles."""

    features: str = opt("", "folder that embed.py wrote of slide: data", "data")
    test_features: str = opt("", "of the test slides; default: a share of them", "data")
    test: float = opt(0.2, "share of the slides held out without test_features", "data")
    tiles: int = opt(256, "of a slide in a training step", "data")
    hidden: int = opt(128, "width of the attention", "model")
    dropout: float = opt(0.25, "of the features", "model")
    epochs: float = opt(50, "passes over the slides", "optimiser")
    batch_size: int = opt(4, "slides a process and micro-batch", "optimiser")
    base_lr: float = opt(1e-3, "learning rate per lr_reference_batch slides", "optimiser")
    lr_reference_batch: int = opt(16, "slides that base_lr is meant for", "optimiser")
    warmup_epochs: float = opt(2.0, "linear warm-up", "optimiser")
    workers: int = opt(0, "data loading processes a rank", "run")
    eval_every: float = opt(1e9, "epochs between evaluations", "run")

    def __post_init__(self):
        super().__post_init__()
        if self.ema or self.grad_checkpointing:
            raise ValueError("ema and grad_checkpointing are of encoders; here there is none.")
        if self.tiles < 1:
            raise ValueError(f"tiles is {self.tiles}; it must be 1 or more.")


def build_data(config: Config) -> tuple[Bags, Bags, int]:
    """Training and test slides, and the number of classes."""
    tiles = read_embeddings(Path(config.features))
    train = bags_of(tiles, config.features)
    if config.test_features:
        other = read_embeddings(Path(config.test_features))
        test = bags_of(other, config.test_features)
        check_alike(config, tiles.made_of, other.made_of)
        check_apart(config, train, test)
    elif len(train) < 2:
        raise ValueError(f"{config.features} holds {len(train)} labelled slides; it needs two.")
    else:
        first, second = stratified_split(train.labels, config.test, config.seed, train.groups)
        train, test = train.subset(first), train.subset(second)
    if len(set(train.labels)) < 2:
        raise ValueError(f"{config.features} has no training slides of two classes.")
    return train, test, max(train.labels + test.labels) + 1


def check_alike(config: Config, one: dict[str, Any], other: dict[str, Any]) -> None:
    """Raises: ValueError where features or labels of both sides do not mean the same."""
    for key in ("weights", "readout", "transform", "classes"):
        if one.get(key) != other.get(key):
            raise ValueError(
                f"{config.features} and {config.test_features} were made with other {key} "
                f"({one.get(key)}, {other.get(key)}); embed both with the same encoder and classes."
            )


def check_apart(config: Config, train: Bags, test: Bags) -> None:
    """Raises: ValueError where a test slide is a training slide."""
    known = {bag.id: bag for bag in train.bags}
    same = [bag.id for bag in test.bags if bag.id in known and torch.equal(bag.x, known[bag.id].x)]
    if same:
        raise ValueError(
            f"{len(same)} slides of {config.test_features} are in {config.features} too, such as "
            f"{same[0]}; test on others."
        )
    # Without patients a slide is its own group, and what it is called says nothing.
    if both := {b.group for b in test.bags if b.group != b.id}.intersection(train.groups):
        raise ValueError(
            f"{len(both)} groups have slides in {config.features} and {config.test_features}, such "
            f"as {min(both)}; test on others."
        )


def run(config: Config) -> dict[str, Any]:
    accelerator = make_accelerator(config)
    train, test, classes = build_data(config)
    torch.manual_seed(config.seed)
    pool = AttentionPool(train.bags[0].x.shape[1], classes, config.hidden, config.dropout)
    pool.standardise_by(train)
    samples = SeededSamples(train, DrawTiles(config.tiles), config.seed)
    folder = Run.open("slide", config, accelerator)
    metrics: dict[str, Any] = {
        "task": "slide", "features": config.features, "train": len(train), "test": len(test),
    }  # fmt: skip
    with contextlib.closing(folder):
        fit(BagObjective(pool).train(), samples, config, folder, accelerator)
        if accelerator.is_main_process:
            metrics["mean"] = classification_metrics(
                by_mean(train, test, classes), truth(test), "class", test.groups
            )
            logits, weights = by_attention(pool, test)
            metrics["attention"] = classification_metrics(logits, truth(test), "class", test.groups)
            metrics |= {"protocol": to_dict(config), **environment()}
            with folder.writing("metrics.json"):
                write(folder.folder, test, logits, weights)
                text = json.dumps(metrics, indent=2) + "\n"
                (folder.folder / "metrics.json").write_text(text)
            for name in ("mean", "attention"):
                low, high = metrics[name]["top1_ci"]
                print(f"{name:10} top-1 {metrics[name]['top1']:.1f} % [{low:.1f}, {high:.1f}]")
            print(f"on {len(test):,} test slides, trained on {len(train):,} · {folder.folder}")
            with folder.writing("report.html"):
                print(f"Report: {write_report(folder.folder)}")
    accelerator.end_training()
    return metrics


def truth(bags: Bags) -> Tensor:
    return torch.tensor(bags.labels)


def by_mean(train: Bags, test: Bags, classes: int) -> Tensor:
    """(test slides, classes): 1 for the class that logistic regression on the means gives."""
    means, asked = (torch.stack([bag.x.mean(0) for bag in part.bags]) for part in (train, test))
    head = fit_logistic(means, truth(train), MEAN_C)
    found = torch.as_tensor(head.predict(asked)).long()
    return torch.nn.functional.one_hot(found, classes).float()


@torch.no_grad()
def by_attention(pool: AttentionPool, test: Bags) -> tuple[Tensor, list[Tensor]]:
    """Logits (test slides, classes), and the weights of all tiles of each."""
    device = next(pool.parameters()).device
    found = [pool.eval()(bag.x[None].to(device)) for bag in test.bags]
    logits = torch.cat([logits for logits, _ in found]).float().cpu()
    return logits, [weights[0].cpu() for _, weights in found]


def write(folder: Path, test: Bags, logits: Tensor, weights: list[Tensor]) -> None:
    """predictions.csv and attention.csv."""
    with open(folder / "predictions.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["id", "label", "predicted", "confidence"])
        for bag, row in zip(test.bags, logits.softmax(1), strict=True):
            table.writerow([bag.id, bag.label, int(row.argmax()), f"{row.max().item():.4f}"])
    with open(folder / "attention.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["id", "left", "top", "weight"])
        for bag, own in zip(test.bags, weights, strict=True):
            for (left, top), weight in zip(bag.places.tolist(), own.tolist(), strict=True):
                table.writerow([bag.id, left, top, f"{weight:.6f}"])


def main(argv: Sequence[str] | None = None) -> int:
    run(parse(Config, None, argv, default_preset=stored_or(None), description=__doc__))
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
