"""Linear probe: classification with frozen features.

    python downstream/linear_probe.py                                    # newest run, its data
    python downstream/linear_probe.py --encoder RUN_OR_FILE --data hf:timm/eurosat-rgb
    python downstream/linear_probe.py --shots 1 2 4 8 16                 # also with few labels
    accelerate launch downstream/linear_probe.py --data FOLDER           # images split over ranks

Logistic regression on standardised features (L-BFGS) and weighted nearest neighbours are compared
with the untrained encoder and with raw pixels. The readout (class token; mean of the patches; both;
both plus the means at a quarter, half and three quarters of the depth), C, and for the neighbours
metric and k are selected on a validation split of the training set; the test set is used once.
`knn.py` selects in the same way and gives the same result. If the data has no test split, part of
it is held out, for an encoder trained with these labels the part that it held out; a run pretrained
on the same data has seen these images, but not their labels.

The metric is accuracy; with several labels per image, the mean average precision over the classes
(macro) and over all pairs (micro); for MedMNIST also its AUC and ACC. ``--head lars`` trains MAE's
head instead, without augmentation.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import vim_ssl.utils.openmp  # noqa: F401 (before torch)

import torch

from vim_ssl.cli import guarded
from vim_ssl.data import stratified_split
from vim_ssl.data.split import few_of_each
from vim_ssl.evaluation.comparison import (
    Comparison,
    ComparisonConfig,
    caption,
    differences,
    pivot,
    sentence,
    settings_table,
)
from vim_ssl.evaluation.examples import (
    Viewer,
    feature_maps,
    nearest_neighbours,
    worst_mistakes,
    write_examples,
)
from vim_ssl.evaluation.extract import Features
from vim_ssl.evaluation.knn import choose_neighbours, evaluate_neighbours, usable_k
from vim_ssl.evaluation.linear_heads import LinearHead, fit_lars, fit_logistic, lars_reach
from vim_ssl.evaluation.readout import C_GRID, choose_readout
from vim_ssl.metrics.bootstrap import Metric
from vim_ssl.metrics.classification import (
    accuracy,
    answer_metrics,
    confusion_matrix,
    metric_columns,
    write_tables,
)
from vim_ssl.metrics.medmnist import medmnist_metrics
from vim_ssl.metrics.sentences import metric_text
from vim_ssl.tasks.classification import class_names
from vim_ssl.tasks.runner import finish_run
from vim_ssl.utils.config import opt, parse
from vim_ssl.utils.files import optional_output

FEW_SHOT_C = 1.0  # fixed, because there are no further labels to select it
TITLES = {"logistic": "Linear probe", "knn": "kNN"}  # key of a row -> title
REACH = 5  # required travel of a weight relative to its norm; see `lars_reach`


@dataclass
class Config(ComparisonConfig):
    """Linear probe and nearest neighbours on frozen features."""

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
    knn_k: int = opt(0, "number of nearest neighbours; 0: selected, as in knn")
    shots: tuple[int, ...] = opt((), "also train on this many images per class, such as 1 2 4 8 16")
    shot_seeds: int = opt(3, "random draws per number of shots")

    def __post_init__(self):
        if min(self.shots, default=1) < 1 or self.shot_seeds < 1:
            raise ValueError("shots and shot_seeds must be 1 or more.")
        if self.knn_k < 0:
            raise ValueError(f"knn_k is {self.knn_k}; it must be 1 or more, or 0 to select it.")
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
    device: str = "cpu",
) -> tuple[dict[str, Any], dict[str, Metric], LinearHead]:
    """Select hyperparameters on a validation split of ``train``, refit on all of ``train`` and
    evaluate once on ``test``.

    For the linear head: the readout, and C if ``head="logistic"``. For kNN: see
    `choose_neighbours`.

    Args:
        readouts: name -> columns of the features.
        task: MedMNIST task; the row then also has the head's ``auc`` and ``acc``.
        device: where neighbours are searched.
    Returns: the row of the table, its metrics, for comparison with others, and the linear head.
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
    neighbours, knn_validation = choose_neighbours(
        train, readouts, k=_neighbour_counts(config), validation=config.validation,
        seed=config.seed, device=device,
    )  # fmt: skip
    x, x_test = (split.x[:, readouts[readout]] for split in (train, test))
    head = _lars(x, train.y, config) if C is None else fit_logistic(x, train.y, C)
    of_head = answer_metrics(_answer(head, x_test), test.y)
    _, of_neighbours = evaluate_neighbours(neighbours, train, test, readouts, device)
    row: dict[str, Any] = {
        "features": name, "readout": readout, "dim": x.shape[1], "C": C,
        "knn_readout": neighbours.readout, "knn_standardised": neighbours.standardise,
        "knn_metric": neighbours.metric, "knn_k": neighbours.k,
        "validation": round(100 * validation, 2), "knn_validation": round(knn_validation, 2),
    }  # fmt: skip
    metrics: dict[str, Metric] = {}
    for key, values in (("logistic", of_head), ("knn", of_neighbours)):
        row |= metric_columns(values, key, test.groups, config.seed)
        metrics |= {key if kind == "main" else f"{key}_{kind}": m for kind, m in values.items()}
    if task:
        scores = head.probabilities(x_test, int(train.y.max()) + 1).numpy()
        row |= medmnist_metrics(test.y.numpy(), scores, task, test.groups)
    return row, metrics, head


def _neighbour_counts(config: Config) -> tuple[int, ...]:
    return (config.knn_k,) if config.knn_k else ()


def _lars(x, y, config: Config) -> LinearHead:
    return fit_lars(x, y, base_lr=config.lars_lr, batch=config.lars_batch,
                    epochs=config.lars_epochs, seed=config.seed)  # fmt: skip


def _answer(head: LinearHead, x: torch.Tensor) -> torch.Tensor:
    """Predict labels (n,), or with several labels per image scores (n, classes)."""
    return head.scores(x) if head.classes is None else head.predict(x)


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
    usable_k(_neighbour_counts(config), len(train))  # raises before anything is computed
    if comparison.main:
        _warn_of_lars(len(train), config)
    tables = _Tables(config, getattr(test, "task", None) or "", comparison.device)
    probed: tuple[LinearHead, Features, Features, dict[str, slice]] | None = None
    for name, train_features, test_features, readouts in comparison.features():
        head = tables.add(name, train_features, test_features, readouts)
        probed = probed or (head, train_features, test_features, readouts)
    if probed is None:  # not the main process
        return {}
    gains = differences(tables.metrics, tables.groups, config.seed)
    first = tables.rows[0]
    metrics, folder = comparison.record(
        rows=tables.rows, differences=gains, few_shot=tables.few_shot, skipped=tables.skipped,
        summary=[
            *(sentence(title, key, first[key], gains) for key, title in TITLES.items()),
            *comparison.remarks(),
        ],
    )  # fmt: skip
    with optional_output("the tables or examples"):
        explain(folder, comparison, first, *probed)
    return finish_run(
        folder, metrics, lambda m: f"{table(m)}\nWritten: {folder / 'metrics.json'}",
        page=folder.parent,
    )  # fmt: skip


def explain(
    folder: Path, comparison: Comparison, row: dict[str, Any], head: LinearHead, train: Features,
    test: Features, readouts: dict[str, slice],
) -> None:  # fmt: skip
    """Write the predictions of the linear head for the test images, and images for the report: the
    worst mistakes, nearest neighbours and maps of the patch features.

    Args:
        row, head, train, test, readouts: of the first encoder.
    """
    encoder, multi_label = comparison.encoder, comparison.train.multi_label
    classes = class_names(comparison.train)
    if not multi_label:  # the test images may have more
        classes += [str(i) for i in range(len(classes), int(test.y.max()) + 1)]
    x = test.x[:, readouts[row["readout"]]]
    likely = head.probabilities(x, len(classes))
    view = Viewer(comparison.test, encoder)
    folder.mkdir(parents=True, exist_ok=True)
    parts: dict[str, Any] = {"maps": feature_maps(view, encoder, test.ids)}
    if multi_label:
        write_tables(
            folder, {}, head.scores(x), test.y, test.ids, classes, "multi-label", test.groups
        )
    else:
        guess = head.predict(x)
        counts = {"confusion": confusion_matrix(test.y, guess, len(classes))}
        write_tables(folder, counts, likely.log(), test.y, test.ids, classes, "class", test.groups)
        parts["mistakes"] = worst_mistakes(view, test.ids, test.y, guess, likely, classes)
    columns = readouts[row["knn_readout"]]
    parts["neighbours"] = nearest_neighbours(
        Viewer(comparison.train, encoder), view, (train.ids, train.x[:, columns], train.y),
        (test.ids, test.x[:, columns], test.y), classes, standardise=row["knn_standardised"],
    )  # fmt: skip
    write_examples(folder, **parts)


class _Tables:
    """Collect the rows of all features."""

    def __init__(self, config: Config, task: str, device: str):
        self.config, self.task, self.device = config, task, device
        self.rows: list[dict] = []
        self.few_shot: list[dict] = []
        self.skipped: list[str] = []
        self.groups: list[str] | None = None
        self.metrics: dict[str, dict[str, Metric]] = {}

    def add(
        self, name: str, train: Features, test: Features, readouts: dict[str, slice]
    ) -> LinearHead:
        row, self.metrics[name], head = probe(
            name, train, test, readouts, self.config, self.task, self.device
        )
        self.rows.append(row)
        self.few_shot += few_shots(name, train, test, readouts, self.config)
        self.skipped, self.groups = train.skipped + test.skipped, test.groups
        return head


def _warn_of_lars(images: int, config: Config) -> None:
    reach = lars_reach(images, config.lars_lr, config.lars_epochs)
    if config.head == "lars" and reach < REACH:
        print(f"MAE's head learns little from {images:,} images in {config.lars_epochs} epochs; "
              f"try --lars-lr {config.lars_lr * 2 * REACH / reach:.2g}.", flush=True)  # fmt: skip


def table(metrics: dict[str, Any]) -> str:
    """Format all rows with their settings, few-shot results, and the comparison with baselines."""
    rows = []
    for row in metrics["rows"]:
        of_head = f"readout {row['readout']}" + ("" if row["C"] is None else f", C {row['C']:g}")
        rows += [
            (row["features"], "linear probe", metric_text(row, "logistic", width=5), of_head),
            (row["features"], "kNN", metric_text(row, "knn", width=5),
             f"readout {row['knn_readout']}, k {row['knn_k']}, {row['knn_metric']}"),
        ]  # fmt: skip
        if "acc" in row:
            area = "not defined" if row["auc"] is None else f"{row['auc']:.3f}"
            rows += [(row["features"], "linear probe", f"AUC {area}, ACC {row['acc']:.3f}",
                      "as MedMNIST defines them")]  # fmt: skip
    lines = ["", *settings_table(rows), *caption(metrics)]
    if metrics["few_shot"]:
        lines += _few_shot_lines(metrics)
    return "\n".join([*lines, *metrics["summary"]])


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
