"""Classify whole slides from the features of their tiles, by their mean and by attention.

    python downstream/embed.py --encoder RUN --data 'slide:ROOT?tile=256&split=all' --output tiles
    python downstream/slide.py --features tiles

The features come from the files that `embed.py` wrote tile by tile, in bounded memory and
resumable; the encoder is no longer needed. Slides, not tiles, are held out and counted; slides of
one group (``slide:TABLE.csv?group=patient``) stay together. Two classifiers are compared: logistic
regression on the mean of a slide's tiles, and gated attention over them (arXiv:1802.04712), which
is trained here. The run contains metrics.json, predictions.csv (a row per test slide), classes.csv
(a row per class), attention.csv (a row per tile of a test slide: its position and weight) and
report.html.
"""

import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import vim_ssl.utils.openmp  # noqa: F401 (before torch)

import torch
from torch import Tensor

from vim_ssl.cli import guarded
from vim_ssl.data import stratified_split
from vim_ssl.data.loading.indexed import SeededSamples
from vim_ssl.evaluation.baselines import MOST_FREQUENT, compare_with, most_frequent
from vim_ssl.evaluation.embeddings import read_embeddings
from vim_ssl.evaluation.linear_heads import fit_logistic
from vim_ssl.evaluation.seen import remarks_on_features
from vim_ssl.metrics.classification import accuracy, classification_metrics, write_tables
from vim_ssl.metrics.sentences import metric_text
from vim_ssl.metrics.tables import write_csv
from vim_ssl.metrics.titles import measured_on
from vim_ssl.tasks.runner import Training, fingerprints, finish_run, train_run
from vim_ssl.tasks.slides import (
    FEATURES,
    AttentionPool,
    DrawTiles,
    SlideClassifier,
    SlideObjective,
    Slides,
    check_alike,
    copies,
    group_tiles,
    with_classes_of,
)
from vim_ssl.training.accelerator import make_accelerator
from vim_ssl.training.config import NEVER, TrainConfig
from vim_ssl.training.run import stored_or
from vim_ssl.utils.config import opt, parse, to_dict
from vim_ssl.utils.environment import environment
from vim_ssl.utils.files import optional_output

MEAN_C = 1.0  # C of the logistic regression; there are too few slides to select it


@dataclass
class Config(TrainConfig):
    """Train a classifier of slides on the features of their tiles."""

    features: str = opt("", "folder that embed.py wrote for slide: data", "data")
    test_features: str = opt("", "folder of test slides; default: hold out some slides", "data")
    test: float = opt(0.2, "fraction of slides held out if there are no test_features", "data")
    tiles: int = opt(256, "tiles per slide in a training step", "data")
    hidden: int = opt(128, "width of the attention", "model")
    dropout: float = opt(0.25, "dropout on the features", "model")
    epochs: float = opt(50, "passes over the slides", "optimiser")
    batch_size: int = opt(4, "slides per process and micro-batch", "optimiser")
    base_lr: float = opt(1e-3, "learning rate per lr_reference_batch slides", "optimiser")
    lr_reference_batch: int = opt(
        16, "effective batch size for which base_lr is specified", "optimiser"
    )
    warmup_epochs: float = opt(2.0, "epochs of linear warm-up", "optimiser")
    workers: int = opt(0, "data loading processes per rank", "run")
    eval_every: float = opt(
        NEVER, "epochs between evaluations; never: only at the end", "run", words={"never": NEVER}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.ema or self.grad_checkpointing:
            raise ValueError("ema and grad_checkpointing need an encoder; this task has none.")
        if self.tiles < 1:
            raise ValueError(f"tiles is {self.tiles}; it must be 1 or more.")


def build_data(config: Config) -> tuple[Slides, Slides, int]:
    """Return training slides, test slides and the number of classes."""
    tiles = read_embeddings(Path(config.features))
    train = group_tiles(tiles, config.features)
    if config.test_features:
        other = read_embeddings(Path(config.test_features))
        test = group_tiles(other, config.test_features)
        names = config.features, config.test_features
        check_alike(names, tiles.made_of, other.made_of, FEATURES)
        test = with_classes_of(test, train)
        check_apart(config, train, test)
    elif len(train) < 2:
        raise ValueError(f"{config.features} has {len(train)} labelled slides; expected 2 or more.")
    else:
        rest, held_out = stratified_split(train.labels, config.test, config.seed, train.groups)
        train, test = train.subset(rest), train.subset(held_out)
        if same := copies(train, test):
            warnings.warn(
                f"{len(same)} held-out slides have the features of a training slide, such as "
                f"{same[0][1]} those of {same[0][0]}: copies. Remove them, or give them one group.",
                stacklevel=2,
            )
    if len(set(train.labels)) < 2:
        raise ValueError(f"the training slides of {config.features} have only one class.")
    return train, test, max(train.labels + test.labels) + 1


def check_apart(config: Config, train: Slides, test: Slides) -> None:
    """Raise ValueError if a slide or group is in both the training and the test slides."""
    if same := copies(train, test):
        there, here = same[0]
        named = f" (named {there} there)" if there != here else ""
        raise ValueError(
            f"{len(same)} slides of {config.test_features} are also in {config.features}, such as "
            f"{here}{named}; test on others."
        )
    # Without patients each slide is its own group, and equal names do not imply one patient.
    if both := {s.group for s in test.slides if s.group != s.id}.intersection(train.groups):
        raise ValueError(
            f"{len(both)} groups have slides in {config.features} and {config.test_features}, such "
            f"as {min(both)}; test on others."
        )


def run(config: Config) -> dict[str, Any]:
    accelerator = make_accelerator(config)
    train, test, classes = build_data(config)
    remarks = remarks_on_features(config.test_features or config.features)
    for remark in remarks if accelerator.is_main_process else ():
        print(remark, flush=True)
    torch.manual_seed(config.seed)
    names = (train.made_of.get("classes") or list(map(str, range(classes))))[:classes]
    made_of = {key: train.made_of.get(key) for key in (*FEATURES, "data")} if train.made_of else {}
    model = SlideClassifier(
        names, dim=train.slides[0].x.shape[1], hidden=config.hidden, dropout=config.dropout,
        made_of=made_of,
    )  # fmt: skip
    pool = model.pool
    pool.standardise_by(train)
    samples = SeededSamples(train, DrawTiles(config.tiles), config.seed)

    def save(folder: Path, ema: Any, record: dict[str, Any]) -> None:
        model.save(folder)  # no moving average; see Config

    def conclude(training: Training) -> dict[str, Any]:
        training.save()  # also when a finished run of an earlier version is resumed
        mean_answers = predict_by_mean(train, test, classes)
        by_mean = classification_metrics(mean_answers, truth(test), "class", test.groups)
        logits, weights = predict_by_attention(pool, test)
        by_attention = classification_metrics(logits, truth(test), "class", test.groups)
        folder = training.run.folder
        with optional_output("predictions.csv or attention.csv"):
            ids, names = [slide.id for slide in test.slides], [str(i) for i in range(classes)]
            write_tables(
                folder, by_attention, logits, truth(test), ids, names, "class", test.groups
            )
            write_attention(folder / "attention.csv", test, weights)
        metrics = {
            "task": "slide", "features": config.features, "train": len(train), "test": len(test),
            "split": "test" if config.test_features else "held out", "n": len(test),
            "mean": by_mean, "attention": by_attention,
            **compare(logits, mean_answers, train, test),
            **fingerprints(train, test), **training.scope, "protocol": to_dict(config),
            **environment(),
        }  # fmt: skip
        metrics["summary"] += remarks
        return finish_run(training.run, metrics, lambda m: f"{summary(m)}\n{folder}")

    return train_run(
        "slide", config, SlideObjective(pool), samples, accelerator, model=pool, data=train.name,
        save=save, what="model", conclude=conclude, depends_on={"test data": test.fingerprint},
    )  # fmt: skip


def compare(logits: Tensor, mean_answers: Tensor, train: Slides, test: Slides) -> dict[str, Any]:
    """Compare attention with the mean of the tiles and the most frequent class; see
    `compare_with`."""
    count = len(test)
    metric, by_mean, constant = (
        accuracy(answers, truth(test))
        for answers in (logits.argmax(1), mean_answers.argmax(1),
                        most_frequent(truth(train), count))
    )  # fmt: skip
    baselines = {"the mean of the tiles": by_mean, MOST_FREQUENT: constant}
    return compare_with("Attention, top-1 accuracy", metric, baselines, "top1", test.groups)


def summary(metrics: dict[str, Any]) -> str:
    lines = []
    for name in ("mean", "attention"):
        lines.append(f"{name:10} top-1 {metric_text(metrics[name], 'top1')}")
    where = measured_on(metrics["split"], metrics["n"], "slides")
    counts = f"{where}, trained on {metrics['train']:,}"
    return "\n".join([*lines, counts, *metrics["summary"]])


def truth(slides: Slides) -> Tensor:
    return torch.tensor(slides.labels)


def predict_by_mean(train: Slides, test: Slides, classes: int) -> Tensor:
    """Return one-hot predictions (test slides, classes) of logistic regression on the means."""
    x, x_test = (torch.stack([s.x.mean(0) for s in split.slides]) for split in (train, test))
    head = fit_logistic(x, truth(train), MEAN_C)
    predicted = torch.as_tensor(head.predict(x_test)).long()
    return torch.nn.functional.one_hot(predicted, classes).float()


@torch.no_grad()
def predict_by_attention(pool: AttentionPool, test: Slides) -> tuple[Tensor, list[Tensor]]:
    """Return logits (test slides, classes), and the weights of all tiles of each slide."""
    device = next(pool.parameters()).device
    answers = [pool.eval()(slide.x[None].to(device)) for slide in test.slides]
    logits = torch.cat([logits for logits, _ in answers]).float().cpu()
    return logits, [weights[0].cpu() for _, weights in answers]


def write_attention(path: Path, test: Slides, weights: list[Tensor]) -> None:
    """Write a row per tile of the test slides: its position and weight."""
    rows = (
        [slide.id, left, top, f"{weight:.6f}"]
        for slide, of_tiles in zip(test.slides, weights, strict=True)
        for (left, top), weight in zip(slide.positions.tolist(), of_tiles.tolist(), strict=True)
    )
    write_csv(path, ["id", "left", "top", "weight"], rows)


def main(argv: Sequence[str] | None = None) -> int:
    run(parse(Config, None, argv, default_preset=stored_or(None), description=__doc__))
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
