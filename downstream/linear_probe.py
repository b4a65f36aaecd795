"""Linear probe: how well do frozen features tell the classes apart?

    python downstream/linear_probe.py                                    # newest run, its data
    python downstream/linear_probe.py --encoder RUN_OR_FILE --data hf:timm/eurosat-rgb
    python downstream/linear_probe.py --shots 1 2 4 8 16                 # and with few labels
    accelerate launch downstream/linear_probe.py --data FOLDER           # images shared out

Logistic regression on standardised features (L-BFGS), weighted nearest neighbours beside it,
against the same encoder untrained and against raw pixels. The readout (class token; mean of the
patches; both; both and the means at a quarter, half and three quarters of the depth) and C are
chosen on a part of the training set; the test set is used once. Of data without a test split a
part is held out here; a run pretrained on the same data has seen its images, not its labels.

Accuracy, or where an image has several labels the mean average precision over the classes
(macro), and over all pairs (micro); of MedMNIST its own AUC and ACC too. ``--head lars`` is MAE's
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
from vim_ssl.evaluation.comparison import METRIC_TITLES, Comparison, ComparisonConfig
from vim_ssl.evaluation.extract import Features, extract_features
from vim_ssl.evaluation.knn import knn_votes, nearest
from vim_ssl.evaluation.linear_heads import LinearHead, fit_lars, fit_logistic, lars_reach
from vim_ssl.evaluation.readout import C_GRID, choose_readout
from vim_ssl.metrics.bootstrap import Metric
from vim_ssl.metrics.classification import accuracy, answer_metrics
from vim_ssl.metrics.medmnist import medmnist_metrics
from vim_ssl.report import write_report
from vim_ssl.utils.config import opt, parse

MAX_PIXELS = 64 * 64 * 3  # values an image above which regression on raw pixels takes too long
SHRUNK = 32  # pixels a side that larger images have then
FEW_SHOT_C = 1.0  # so few labels leave none to choose it by
REACH = 5  # how often its own length a weight should be able to move; see `lars_reach`


@dataclass
class Config(ComparisonConfig):
    """Linear probe and nearest neighbours on frozen features."""

    validation: float = opt(0.2, "share of the training set to choose C and readout on")
    head: str = opt("logistic", "of L-BFGS, or MAE's by LARS", choices=("logistic", "lars"))
    c_grid: tuple[float, ...] = opt(C_GRID, "of logistic: values of C to try, ascending")
    lars_lr: float = opt(0.1, "learning rate per 256 images; MAE's is for a million of them")
    lars_batch: int = opt(16384, "images a step; all, where there are fewer")
    lars_epochs: int = opt(90, "passes over the features")
    knn_k: int = opt(20, "neighbours that vote")
    shots: tuple[int, ...] = opt((), "also train on so many of each class, such as 1 2 4 8 16")
    shot_seeds: int = opt(3, "draws of the few")

    def __post_init__(self):
        if min(self.shots, default=1) < 1 or self.shot_seeds < 1:
            raise ValueError("shots and shot_seeds must be 1 or more.")
        if list(self.c_grid) != sorted(self.c_grid) or min(self.c_grid, default=0) <= 0:
            raise ValueError(f"c_grid {self.c_grid} must ascend and be above 0.")


def probe(
    name: str,
    train: Features,
    test: Features,
    readouts: dict[str, slice],
    config: Config,
    task: str = "",
) -> tuple[dict[str, Any], dict[str, Metric]]:
    """Choose on a part of ``train``, fit on all of it, test once: readout and C of the head,
    readout and standardisation of the nearest neighbours.

    Args:
        readouts: name -> columns of the features.
        task: MedMNIST's, whose own figures the row has then too: ``auc`` and ``acc`` of the head.
    Returns: the row of the table, and the figures in it to be compared with others.
    """
    fit_part, val_part = stratified_split(
        train.y.tolist(), config.validation, config.seed, train.groups
    )
    x, x_val, y, y_val = train.x[fit_part], train.x[val_part], train.y[fit_part], train.y[val_part]
    C = None
    if config.head == "logistic":
        readout, C, validation = choose_readout(x, y, x_val, y_val, readouts, config.c_grid)
    else:
        scored = {r: _lars(x[:, c], y, config).score(x_val[:, c], y_val)
                  for r, c in readouts.items()}  # fmt: skip
        readout = max(scored, key=lambda r: scored[r])  # the first of equals
        validation = scored[readout]
    tried = []
    for name_knn, columns in readouts.items():
        for standardise in (True, False):
            parts = x[:, columns], y, x_val[:, columns]
            found = answer_metrics(_neighbours(*parts, standardise, config), y_val)
            tried.append((found["main"].value, name_knn, standardise))
    # max takes the first of equals
    _, knn_readout, standardise = max(tried, key=lambda result: result[0])
    x, x_test = (part.x[:, readouts[readout]] for part in (train, test))
    head = _lars(x, train.y, config) if C is None else fit_logistic(x, train.y, C)
    columns = readouts[knn_readout]
    votes = _neighbours(train.x[:, columns], train.y, test.x[:, columns], standardise, config)
    row: dict[str, Any] = {"features": name, "readout": readout, "dim": x.shape[1], "C": C}
    row |= {"knn_readout": knn_readout, "knn_standardised": standardise}
    row["validation"] = round(100 * validation, 2)
    figures = {}
    for key, answer in (("logistic", _answer(head, x_test)), ("knn", votes)):
        for kind, figure in answer_metrics(answer, test.y).items():
            figures[key if kind == "main" else f"{key}_{kind}"] = figure
    for key, figure in figures.items():
        row[key] = round(figure.value, 2)
        row[f"{key}_ci"] = figure.interval(test.groups, seed=config.seed)
    if task:
        scores = head.probabilities(x_test, int(train.y.max()) + 1).numpy()
        row |= medmnist_metrics(test.y.numpy(), scores, task, test.groups)
    return row, figures


def _lars(x, y, config: Config) -> LinearHead:
    return fit_lars(x, y, base_lr=config.lars_lr, batch=config.lars_batch,
                    epochs=config.lars_epochs, seed=config.seed)  # fmt: skip


def _answer(head: LinearHead, x: torch.Tensor) -> torch.Tensor:
    """Labels (n,), or the scores of every class (n, classes) where an image has several."""
    return head.scores(x) if head.classes is None else head.predict(x)


def _neighbours(bank, labels, queries, standardise: bool, config: Config) -> torch.Tensor:
    """What `_answer` gives, by vote."""
    found = nearest(bank, queries, k=config.knn_k, standardise=standardise)
    votes = knn_votes(labels, *found)
    return votes.argmax(1) if labels.ndim == 1 else votes


def few_shots(
    name: str, train: Features, test: Features, readouts: dict[str, slice], config: Config
) -> list[dict[str, Any]]:
    """Accuracy by logistic regression on few labels, mean and deviation over draws.

    C is fixed and every readout shown, as there are no further labels to choose them by.
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
        raise ValueError(f"{train.name} has several labels an image; --shots needs one of each.")
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
            extract_features(torch.nn.Identity(), part, transform, workers=config.workers)
            for part in (train, test)
        ]
        tables.add(name, pixels[0], pixels[1], {"pixels": slice(None)})
    metrics, folder = comparison.record(
        rows=tables.rows, differences=tables.differences(), few_shot=tables.few_shot,
        skipped=tables.skipped,
    )  # fmt: skip
    _print_table(metrics)
    print(f"Written: {folder / 'metrics.json'}")
    if (folder.parent / "metrics.jsonl").exists():
        print(f"Report: {write_report(folder.parent)}")
    return metrics


def _raw_pixels(encoder: VimEncoder) -> tuple[str, Transform]:
    """What the encoder is shown; shrunk where that is too much to fit a regression to."""
    config = dict(encoder.data_config)
    if math.prod(encoder.input_shape) <= MAX_PIXELS:
        return "raw pixels", create_transform(encoder)
    config["input_size"] = (encoder.in_chans, SHRUNK, SHRUNK)
    transform = create_transform(config)
    if encoder.reads_clips:
        transform = ClipTransform(transform, training=False)
    return f"raw pixels, {SHRUNK}x{SHRUNK}", transform


class _Tables:
    """The rows of all features, and what compares them."""

    def __init__(self, config: Config, task: str):
        self.config, self.task = config, task
        self.rows: list[dict] = []
        self.few_shot: list[dict] = []
        self.skipped: list[str] = []
        self.figures: dict[str, dict[str, Metric]] = {}

    def add(self, name: str, train: Features, test: Features, readouts: dict[str, slice]) -> None:
        row, self.figures[name] = probe(name, train, test, readouts, self.config, self.task)
        self.rows.append(row)
        self.few_shot += few_shots(name, train, test, readouts, self.config)
        self.skipped, self.groups = train.skipped + test.skipped, test.groups

    def differences(self) -> list[dict]:
        """By how much the first features are better than each other, on the same images."""
        (first, figures), *others = self.figures.items()
        rows = []
        for other, theirs in others:
            row: dict[str, Any] = {"features": first, "over": other}
            for key, figure in figures.items():
                gain = figure - theirs[key]
                row[key] = round(gain.value, 2)
                row[f"{key}_ci"] = gain.interval(self.groups, seed=self.config.seed)
            rows.append(row)
        return rows


def _warn_of_lars(images: int, config: Config) -> None:
    reach = lars_reach(images, config.lars_lr, config.lars_epochs)
    if config.head == "lars" and reach < REACH:
        print(f"Of {images:,} images MAE's head learns little in {config.lars_epochs} epochs; "
              f"try --lars-lr {config.lars_lr * 2 * REACH / reach:.2g}.", flush=True)  # fmt: skip


def _print_table(metrics: dict) -> None:
    print(f"\n{'features':26} {'readout':10} {'logistic regression':24} {'kNN':22}")
    for row in metrics["rows"]:
        cells = [f"{row[k]:5.1f} % [{row[f'{k}_ci'][0]:.1f}, {row[f'{k}_ci'][1]:.1f}]"
                 for k in ("logistic", "knn")]  # fmt: skip
        print(f"{row['features']:26} {row['readout']:10} {cells[0]:24} {cells[1]:22}")
        if "acc" in row:
            area = "not defined" if row["auc"] is None else f"{row['auc']:.3f}"
            print(f"{'':26} {'':10} MedMNIST's AUC {area}, ACC {row['acc']:.3f}")
    print(f"{METRIC_TITLES[metrics['figure']]} on the test part, 95 % interval in brackets.")
    for row in metrics["differences"]:
        low, high = row["logistic_ci"]
        print(f"{row['features']} over {row['over']}: {row['logistic']:+.1f} [{low:+.1f}, "
              f"{high:+.1f}] by the linear head, on the same images.")  # fmt: skip
    if metrics["few_shot"]:
        _print_few_shots(metrics)
    if metrics["skipped"]:
        print(f"{len(metrics['skipped'])} images could not be read: {metrics['skipped'][:3]} …")


def _print_few_shots(metrics: dict) -> None:
    shots = metrics["protocol"]["shots"]
    print(f"\n{'labels of each class':26} {'readout':10}" + "".join(f"{n:>14}" for n in shots))
    lines: dict[tuple[str, str], str] = {}
    for row in metrics["few_shot"]:
        place = row["features"], row["readout"]
        cell = f"{row['mean']:.1f}" + (f" ± {row['std']:.1f}" if row["std"] is not None else "")
        lines[place] = lines.get(place, "") + f"{cell:>14}"
    for (features, readout), cells in lines.items():
        print(f"{features:26} {readout:10}{cells}")
    print(f"Accuracy, mean ± deviation over {metrics['protocol']['shot_seeds']} draws.")


def main(argv: Sequence[str] | None = None) -> int:
    run(parse(Config, argv=argv, description=__doc__))
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
