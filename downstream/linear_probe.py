"""Linear probe: classification with frozen features.

    python downstream/linear_probe.py                                    # newest run, its data
    python downstream/linear_probe.py --encoder RUN_OR_FILE --data hf:timm/eurosat-rgb
    python downstream/linear_probe.py --shots 1 2 4 8 16                 # also with few labels
    accelerate launch downstream/linear_probe.py --data FOLDER           # images split over ranks

Logistic regression on standardised features (L-BFGS) and weighted nearest neighbours are compared
with the untrained encoder and with raw pixels. The readout (class token; mean of the patches; both;
both plus the means at a quarter, half and three quarters of the depth) and C are selected on a
validation split of the training set; the test set is used once. If the data has no test split, part
of it is held out; a run pretrained on the same data has seen these images, but not their labels.

The metric is accuracy; with several labels per image, the mean average precision over the classes
(macro) and over all pairs (micro); for MedMNIST also its AUC and ACC. ``--head lars`` trains MAE's
head instead, without augmentation.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

import torch

from vim_ssl import VimEncoder, create_transform
from vim_ssl.cli import guarded
from vim_ssl.data import stratified_split
from vim_ssl.data.split import few_of_each
from vim_ssl.data.transforms.clip import ClipTransform
from vim_ssl.data.transforms.image import Transform
from vim_ssl.evaluation.comparison import METRIC_TITLES, Comparison, ComparisonConfig, pivot
from vim_ssl.evaluation.extract import Features, extract_features
from vim_ssl.evaluation.knn import knn_votes, nearest
from vim_ssl.evaluation.linear_heads import LinearHead, fit_lars, fit_logistic, lars_reach
from vim_ssl.evaluation.readout import C_GRID, choose_readout
from vim_ssl.metrics.bootstrap import Metric
from vim_ssl.metrics.classification import accuracy, answer_metrics
from vim_ssl.metrics.medmnist import medmnist_metrics
from vim_ssl.tasks.runner import finish_run
from vim_ssl.utils.config import opt, parse

MAX_PIXELS = 64 * 64 * 3  # values per image; above it, regression on raw pixels takes too long
SHRUNK = 32  # side in pixels to which larger images are resized
FEW_SHOT_C = 1.0  # fixed, because there are no further labels to select it
REACH = 5  # required travel of a weight relative to its norm; see `lars_reach`


@dataclass
class Config(ComparisonConfig):
    """Linear probe and nearest neighbours on frozen features."""

    validation: float = opt(0.2, "fraction of the training set used to select C and readout")
    head: str = opt(
        "logistic", "linear head: logistic regression (L-BFGS) or MAE's LARS-trained head",
        choices=("logistic", "lars"),
    )  # fmt: skip
    c_grid: tuple[float, ...] = opt(C_GRID, "logistic: values of C, in ascending order")
    lars_lr: float = opt(
        0.1, "lars: learning rate per 256 images; MAE's default is tuned for about a million images"
    )
    lars_batch: int = opt(16384, "lars: batch size, capped at the number of images")
    lars_epochs: int = opt(90, "lars: passes over the features")
    knn_k: int = opt(20, "number of nearest neighbours")
    shots: tuple[int, ...] = opt((), "also train on this many images per class, such as 1 2 4 8 16")
    shot_seeds: int = opt(3, "random draws per number of shots")

    def __post_init__(self):
        if min(self.shots, default=1) < 1 or self.shot_seeds < 1:
            raise ValueError("shots and shot_seeds must be 1 or more.")
        if list(self.c_grid) != sorted(self.c_grid) or min(self.c_grid, default=0) <= 0:
            raise ValueError(
                f"c_grid is {self.c_grid}; its values must be positive and in ascending order."
            )


def probe(
    name: str,
    train: Features,
    test: Features,
    readouts: dict[str, slice],
    config: Config,
    task: str = "",
) -> tuple[dict[str, Any], dict[str, Metric]]:
    """Select hyperparameters on a validation split of ``train``, refit on all of ``train`` and
    evaluate once on ``test``.

    For the linear head: the readout, and C if ``head="logistic"``. For kNN: the readout and whether
    to standardise.

    Args:
        readouts: name -> columns of the features.
        task: MedMNIST task; the row then also has the head's ``auc`` and ``acc``.
    Returns: the row of the table, and its metrics, for comparison with others.
    """
    rest, held_out = stratified_split(
        train.y.tolist(), config.validation, config.seed, train.groups
    )
    x, x_val, y, y_val = train.x[rest], train.x[held_out], train.y[rest], train.y[held_out]
    C = None
    if config.head == "logistic":
        readout, C, validation = choose_readout(x, y, x_val, y_val, readouts, config.c_grid)
    else:
        scored = {r: _lars(x[:, c], y, config).score(x_val[:, c], y_val)
                  for r, c in readouts.items()}  # fmt: skip
        readout = max(scored, key=lambda r: scored[r])  # ties: the first
        validation = scored[readout]
    tried = []
    for name_knn, columns in readouts.items():
        for standardise in (True, False):
            answer = _neighbours(x[:, columns], y, x_val[:, columns], standardise, config)
            tried.append((answer_metrics(answer, y_val)["main"].value, name_knn, standardise))
    # Ties: the first.
    _, knn_readout, standardise = max(tried, key=lambda result: result[0])
    x, x_test = (split.x[:, readouts[readout]] for split in (train, test))
    head = _lars(x, train.y, config) if C is None else fit_logistic(x, train.y, C)
    columns = readouts[knn_readout]
    votes = _neighbours(train.x[:, columns], train.y, test.x[:, columns], standardise, config)
    row: dict[str, Any] = {"features": name, "readout": readout, "dim": x.shape[1], "C": C}
    row |= {"knn_readout": knn_readout, "knn_standardised": standardise}
    row["validation"] = round(100 * validation, 2)
    metrics = {}
    for key, answer in (("logistic", _answer(head, x_test)), ("knn", votes)):
        for kind, metric in answer_metrics(answer, test.y).items():
            metrics[key if kind == "main" else f"{key}_{kind}"] = metric
    for key, metric in metrics.items():
        row[key] = round(metric.value, 2)
        row[f"{key}_ci"] = metric.interval(test.groups, seed=config.seed)
    if task:
        scores = head.probabilities(x_test, int(train.y.max()) + 1).numpy()
        row |= medmnist_metrics(test.y.numpy(), scores, task, test.groups)
    return row, metrics


def _lars(x, y, config: Config) -> LinearHead:
    return fit_lars(x, y, base_lr=config.lars_lr, batch=config.lars_batch,
                    epochs=config.lars_epochs, seed=config.seed)  # fmt: skip


def _answer(head: LinearHead, x: torch.Tensor) -> torch.Tensor:
    """Predict labels (n,), or with several labels per image scores (n, classes)."""
    return head.scores(x) if head.classes is None else head.predict(x)


def _neighbours(bank, labels, queries, standardise: bool, config: Config) -> torch.Tensor:
    """Predict as `_answer` does, by the vote of the nearest neighbours."""
    votes = knn_votes(labels, *nearest(bank, queries, k=config.knn_k, standardise=standardise))
    return votes.argmax(1) if labels.ndim == 1 else votes


def few_shots(
    name: str, train: Features, test: Features, readouts: dict[str, slice], config: Config
) -> list[dict[str, Any]]:
    """Return the accuracy of logistic regression on few labels, mean and deviation over draws.

    C is fixed and every readout has a row, because there are no further labels to select them.
    """
    rows = []
    for count in config.shots:
        draws = [few_of_each(train.y.tolist(), count, config.seed + s)
                 for s in range(config.shot_seeds)]  # fmt: skip
        for readout, columns in readouts.items():
            values = []
            for chosen in draws:
                head = fit_logistic(train.x[chosen][:, columns], train.y[chosen], FEW_SHOT_C)
                values.append(accuracy(head.predict(test.x[:, columns]), test.y).value)
            rows.append({
                "features": name, "readout": readout, "shots": count, "C": FEW_SHOT_C,
                "mean": round(mean(values), 2), "values": [round(v, 2) for v in values],
                "std": round(stdev(values), 2) if len(values) > 1 else None,
            })  # fmt: skip
    return rows


def run(config: Config) -> dict:
    comparison = Comparison("linear_probe", config)
    train, test = comparison.train, comparison.test
    if config.shots and train.multi_label:
        raise ValueError(
            f"{train.name} is multi-label; --shots requires exactly one label per image."
        )
    if comparison.main:
        _warn_of_lars(len(train), config)
    tables = _Tables(config, getattr(test, "task", None) or "")
    for features in comparison.features():
        tables.add(*features)
    if not comparison.main:
        return {}
    if config.baselines:
        name, transform = _raw_pixels(comparison.encoder)
        pixels = [
            extract_features(torch.nn.Identity(), split, transform, workers=config.workers)
            for split in (train, test)
        ]
        tables.add(name, pixels[0], pixels[1], {"pixels": slice(None)})
    metrics, folder = comparison.record(
        rows=tables.rows, differences=tables.differences(), few_shot=tables.few_shot,
        skipped=tables.skipped,
    )  # fmt: skip
    return finish_run(
        folder, metrics, lambda m: f"{table(m)}\nWritten: {folder / 'metrics.json'}",
        page=folder.parent,
    )  # fmt: skip


def _raw_pixels(encoder: VimEncoder) -> tuple[str, Transform]:
    """Return name and transform of the raw pixels, resized if too large for a regression."""
    config = dict(encoder.data_config)
    if math.prod(encoder.input_shape) <= MAX_PIXELS:
        return "raw pixels", create_transform(encoder)
    config["input_size"] = (encoder.in_chans, SHRUNK, SHRUNK)
    transform = create_transform(config)
    if encoder.reads_clips:
        transform = ClipTransform(transform, training=False)
    return f"raw pixels, {SHRUNK}x{SHRUNK}", transform


class _Tables:
    """Collect the rows of all features and compute their differences."""

    def __init__(self, config: Config, task: str):
        self.config, self.task = config, task
        self.rows: list[dict] = []
        self.few_shot: list[dict] = []
        self.skipped: list[str] = []
        self.metrics: dict[str, dict[str, Metric]] = {}

    def add(self, name: str, train: Features, test: Features, readouts: dict[str, slice]) -> None:
        row, self.metrics[name] = probe(name, train, test, readouts, self.config, self.task)
        self.rows.append(row)
        self.few_shot += few_shots(name, train, test, readouts, self.config)
        self.skipped, self.groups = train.skipped + test.skipped, test.groups

    def differences(self) -> list[dict]:
        """Return the gains of the first features over each of the others, on the same images."""
        (first, metrics), *others = self.metrics.items()
        rows = []
        for other, theirs in others:
            row: dict[str, Any] = {"features": first, "over": other}
            for key, metric in metrics.items():
                gain = metric - theirs[key]
                row[key] = round(gain.value, 2)
                row[f"{key}_ci"] = gain.interval(self.groups, seed=self.config.seed)
            rows.append(row)
        return rows


def _warn_of_lars(images: int, config: Config) -> None:
    reach = lars_reach(images, config.lars_lr, config.lars_epochs)
    if config.head == "lars" and reach < REACH:
        print(f"MAE's head learns little from {images:,} images in {config.lars_epochs} epochs; "
              f"try --lars-lr {config.lars_lr * 2 * REACH / reach:.2g}.", flush=True)  # fmt: skip


def table(metrics: dict[str, Any]) -> str:
    """Format all rows, differences and few-shot results."""
    lines = [f"\n{'features':26} {'readout':10} {'linear head':24} {'kNN':22}"]
    for row in metrics["rows"]:
        cells = [f"{row[k]:5.1f} % [{row[f'{k}_ci'][0]:.1f}, {row[f'{k}_ci'][1]:.1f}]"
                 for k in ("logistic", "knn")]  # fmt: skip
        lines += [f"{row['features']:26} {row['readout']:10} {cells[0]:24} {cells[1]:22}"]
        if "acc" in row:
            area = "not defined" if row["auc"] is None else f"{row['auc']:.3f}"
            lines += [f"{'':26} {'':10} MedMNIST's AUC {area}, ACC {row['acc']:.3f}"]
    lines += [f"{METRIC_TITLES[metrics['figure']]} on the test split, 95 % interval in brackets."]
    for row in metrics["differences"]:
        low, high = row["logistic_ci"]
        lines += [f"{row['features']} over {row['over']}: {row['logistic']:+.1f} [{low:+.1f}, "
                  f"{high:+.1f}] with the linear head, on the same images."]  # fmt: skip
    if metrics["few_shot"]:
        lines += _few_shot_lines(metrics)
    if skipped := metrics["skipped"]:
        lines += [f"{len(skipped)} images could not be read: {skipped[:3]} …"]
    return "\n".join(lines)


def _few_shot_lines(metrics: dict[str, Any]) -> list[str]:
    shots = "".join(f"{n:>14}" for n in metrics["protocol"]["shots"])
    cells = [f"{row['mean']:.1f}" + (f" ± {row['std']:.1f}" if row["std"] is not None else "")
             for row in metrics["few_shot"]]  # fmt: skip
    return [
        f"\n{'labels per class':26} {'readout':10}{shots}",
        *pivot(metrics["few_shot"], cells, 14),
        f"Accuracy, mean ± deviation over {metrics['protocol']['shot_seeds']} draws.",
    ]  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    run(parse(Config, argv=argv, description=__doc__))
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
