"""Nearest neighbours on frozen features, by the protocol that papers report.

    python downstream/knn.py                                     # newest run, its data
    python downstream/knn.py --encoder RUN_OR_FILE --data FOLDER_WITH_CLASSES
    accelerate launch downstream/knn.py --data FOLDER            # images shared out

The labels of the k training images most similar by cosine vote, each with exp(similarity / 0.07)
votes (DINO, arXiv:2104.14294). Nothing is chosen: every k and every readout is shown. Features are
compared as they are; ``--standardise`` first takes the training set's mean and deviation out of
each, which is not the papers' protocol but helps encoders trained to predict pixels.

Accuracy, or where an image has several labels the mean average precision of the votes.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vim_ssl.cli import guarded
from vim_ssl.evaluation.comparison import METRIC_TITLES, Comparison, ComparisonConfig
from vim_ssl.evaluation.extract import Features
from vim_ssl.evaluation.knn import knn_votes, nearest
from vim_ssl.metrics.classification import answer_metrics
from vim_ssl.utils.config import opt, parse


@dataclass
class Config(ComparisonConfig):
    """Weighted nearest neighbours on frozen features."""

    k: tuple[int, ...] = opt((10, 20, 100, 200), "numbers of neighbours that vote")
    temperature: float = opt(0.07, "of the weights; lower: the nearest count for more")
    standardise: bool = opt(False, "give every feature mean 0 and deviation 1 first")

    def __post_init__(self):
        if min(self.k, default=0) < 1:
            raise ValueError(f"k is {self.k}; expected one or more numbers, each 1 or more.")
        if self.temperature <= 0:
            raise ValueError(f"temperature is {self.temperature:g}; it must be above 0.")


def vote(
    name: str, bank: Features, queries: Features, readouts: dict[str, slice], config: Config,
    device: str,
) -> list[dict[str, Any]]:  # fmt: skip
    """A row for every readout and k: ``knn`` in per cent with its interval ``knn_ci``.

    Args:
        readouts: name -> columns of the features.
    """
    rows = []
    for readout, columns in readouts.items():
        similarity, places = nearest(
            bank.x[:, columns], queries.x[:, columns], k=max(config.k),
            standardise=config.standardise, device=device,
        )  # fmt: skip
        for k in config.k:
            votes = knn_votes(
                bank.y, similarity[:, :k], places[:, :k], temperature=config.temperature
            )
            row: dict[str, Any] = {"features": name, "readout": readout, "k": k}
            answer = votes.argmax(1) if bank.y.ndim == 1 else votes
            for kind, figure in answer_metrics(answer, queries.y).items():
                key = "knn" if kind == "main" else f"knn_{kind}"
                row[key] = round(figure.value, 2)
                row[f"{key}_ci"] = figure.interval(queries.groups, seed=config.seed)
            rows.append(row)
    return rows


def run(config: Config) -> dict:
    comparison = Comparison("knn", config)
    rows, skipped = [], []
    for name, bank, queries, readouts in comparison.features():
        rows += vote(name, bank, queries, readouts, config, comparison.device)
        skipped = bank.skipped + queries.skipped
    if not comparison.main:
        return {}
    metrics, folder = comparison.record(rows=rows, skipped=skipped)
    _print_table(metrics)
    print(f"Written: {folder / 'metrics.json'}")
    return metrics


def _print_table(metrics: dict) -> None:
    numbers = metrics["protocol"]["k"]
    print(f"\n{'features':26} {'readout':10}" + "".join(f"{f'k = {k}':>20}" for k in numbers))
    lines: dict[tuple[str, str], str] = {}
    for row in metrics["rows"]:
        place, (low, high) = (row["features"], row["readout"]), row["knn_ci"]
        cell = f"{row['knn']:.1f} [{low:.1f}, {high:.1f}]"
        lines[place] = lines.get(place, "") + f"{cell:>20}"
    for (features, readout), cells in lines.items():
        print(f"{features:26} {readout:10}{cells}")
    title = METRIC_TITLES[metrics["figure"]]
    print(f"{title} on the test part in per cent, 95 % interval in brackets.")
    if metrics["skipped"]:
        print(f"{len(metrics['skipped'])} images could not be read: {metrics['skipped'][:3]} …")


def main(argv: Sequence[str] | None = None) -> int:
    run(parse(Config, argv=argv, description=__doc__))
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
