"""Evaluate frozen features by nearest neighbours, with the protocol used in papers.

    python downstream/knn.py                                     # newest run, its data
    python downstream/knn.py --encoder RUN_OR_FILE --data FOLDER_WITH_CLASSES
    accelerate launch downstream/knn.py --data FOLDER            # images split over ranks

The k training images with the highest cosine similarity vote for their labels, with weights
exp(similarity / 0.07) (DINO, arXiv:2104.14294). Nothing is selected: every k and every readout is
printed. By default features are not standardised; ``--standardise`` subtracts the mean of the
training set and divides by its standard deviation. This is not the papers' protocol, but helps
encoders trained to predict pixels.

The metric is accuracy, or with several labels per image the mean average precision of the votes.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vim_ssl.cli import guarded
from vim_ssl.evaluation.comparison import METRIC_TITLES, Comparison, ComparisonConfig, pivot
from vim_ssl.evaluation.extract import Features
from vim_ssl.evaluation.knn import knn_votes, nearest
from vim_ssl.metrics.classification import answer_metrics
from vim_ssl.tasks.runner import finish_run
from vim_ssl.utils.config import opt, parse


@dataclass
class Config(ComparisonConfig):
    """Weighted nearest neighbours on frozen features."""

    k: tuple[int, ...] = opt((10, 20, 100, 200), "numbers of nearest neighbours")
    temperature: float = opt(0.07, "temperature of the vote weights; lower is sharper")
    standardise: bool = opt(False, "standardise the features first")

    def __post_init__(self):
        if min(self.k, default=0) < 1:
            raise ValueError(f"k is {self.k}; expected one or more numbers, each 1 or more.")
        if self.temperature <= 0:
            raise ValueError(f"temperature is {self.temperature:g}; it must be above 0.")


def vote(
    name: str, bank: Features, queries: Features, readouts: dict[str, slice], config: Config,
    device: str,
) -> list[dict[str, Any]]:  # fmt: skip
    """Return a row per readout and k: ``knn`` in per cent with its interval ``knn_ci``.

    Args:
        readouts: name -> columns of the features.
    """
    rows = []
    for readout, columns in readouts.items():
        similarity, neighbours = nearest(
            bank.x[:, columns], queries.x[:, columns], k=max(config.k),
            standardise=config.standardise, device=device,
        )  # fmt: skip
        for k in config.k:
            votes = knn_votes(
                bank.y, similarity[:, :k], neighbours[:, :k], temperature=config.temperature
            )
            row: dict[str, Any] = {"features": name, "readout": readout, "k": k}
            answer = votes.argmax(1) if bank.y.ndim == 1 else votes
            for kind, metric in answer_metrics(answer, queries.y).items():
                key = "knn" if kind == "main" else f"knn_{kind}"
                row[key] = round(metric.value, 2)
                row[f"{key}_ci"] = metric.interval(queries.groups, seed=config.seed)
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
    return finish_run(folder, metrics, lambda m: f"{table(m)}\nWritten: {folder / 'metrics.json'}")


def table(metrics: dict[str, Any]) -> str:
    """Format the rows: a line per readout and a column per k."""
    numbers = "".join(f"{f'k = {k}':>20}" for k in metrics["protocol"]["k"])
    cells = [f"{row['knn']:.1f} [{row['knn_ci'][0]:.1f}, {row['knn_ci'][1]:.1f}]"
             for row in metrics["rows"]]  # fmt: skip
    name = METRIC_TITLES[metrics["figure"]]
    lines = [f"\n{'features':26} {'readout':10}{numbers}", *pivot(metrics["rows"], cells, 20),
             f"{name} on the test split in per cent, 95 % interval in brackets."]  # fmt: skip
    if skipped := metrics["skipped"]:
        lines += [f"{len(skipped)} images could not be read: {skipped[:3]} …"]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    run(parse(Config, argv=argv, description=__doc__))
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
