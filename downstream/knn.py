"""Evaluate frozen features by nearest neighbours, with the protocol used in papers.

    python downstream/knn.py                                     # newest run, its data
    python downstream/knn.py --encoder RUN_OR_FILE --data FOLDER_WITH_CLASSES
    accelerate launch downstream/knn.py --data FOLDER            # images split over ranks

The k training images with the highest cosine similarity vote for their labels, with weights
exp(similarity / 0.07) (DINO, arXiv:2104.14294). Two tables are printed. In the first, readout,
metric and k are selected on a validation split of the training set, as in `linear_probe.py`, which
gives the same result; the untrained encoder and raw pixels are compared. In the second, nothing is
selected: every k and readout has a column or row, with the cosine of plain features as in papers.
``--standardise`` subtracts the mean of the training set and divides by its standard deviation
first, in both tables; this helps encoders trained to predict pixels.

The result is accuracy, or with several labels per image the mean average precision of the votes.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vim_ssl.cli import guarded
from vim_ssl.evaluation.comparison import (
    Comparison,
    ComparisonConfig,
    caption,
    differences,
    pivot,
    sentence,
    settings_table,
)
from vim_ssl.evaluation.extract import Features
from vim_ssl.evaluation.knn import (
    K_GRID,
    TEMPERATURE,
    choose_neighbours,
    evaluate_neighbours,
    knn_votes,
    nearest,
    usable_k,
)
from vim_ssl.metrics.bootstrap import Metric
from vim_ssl.metrics.classification import answer_metrics, metric_columns
from vim_ssl.metrics.sentences import interval_text, metric_text
from vim_ssl.tasks.runner import finish_run
from vim_ssl.utils.config import opt, parse


@dataclass
class Config(ComparisonConfig):
    """Weighted nearest neighbours on frozen features."""

    k: tuple[int, ...] = opt(
        (), f"numbers of nearest neighbours; default: those of {', '.join(map(str, K_GRID))} that "
        "the training set has"
    )  # fmt: skip
    temperature: float = opt(TEMPERATURE, "temperature of the vote weights; lower is sharper")
    standardise: bool = opt(False, "only use standardised features")

    def __post_init__(self):
        if min(self.k, default=1) < 1:
            raise ValueError(f"k is {self.k}; expected numbers, each 1 or more.")
        if self.temperature <= 0:
            raise ValueError(f"temperature is {self.temperature:g}; it must be above 0.")


def vote(
    name: str, bank: Features, queries: Features, readouts: dict[str, slice], config: Config,
    device: str,
) -> list[dict[str, Any]]:  # fmt: skip
    """Return a row per readout and k: ``knn`` in per cent with its `Metric.entries`.

    Args:
        readouts: name -> columns of the features.
    Raises: ValueError if every k exceeds the bank; a k that does is left out.
    """
    rows = []
    numbers = usable_k(config.k, len(bank.y))
    for readout, columns in readouts.items():
        similarity, neighbours = nearest(
            bank.x[:, columns], queries.x[:, columns], k=max(numbers),
            standardise=config.standardise, device=device,
        )  # fmt: skip
        for k in numbers:
            answers = knn_votes(
                bank.y, similarity[:, :k], neighbours[:, :k], temperature=config.temperature
            )
            row: dict[str, Any] = {"features": name, "readout": readout, "k": k}
            metrics = answer_metrics(answers, queries.y)
            rows.append(row | metric_columns(metrics, "knn", queries.groups, config.seed))
    return rows


def select(
    name: str, bank: Features, queries: Features, readouts: dict[str, slice], config: Config,
    device: str,
) -> tuple[dict[str, Any], dict[str, Metric]]:  # fmt: skip
    """Return the row of the selected readout, metric and k, and its metrics; see
    `choose_neighbours`."""
    chosen, validation = choose_neighbours(
        bank, readouts, k=config.k, standardise=(True,) if config.standardise else (True, False),
        validation=config.validation, seed=config.seed, temperature=config.temperature,
        device=device,
    )  # fmt: skip
    _, metrics = evaluate_neighbours(chosen, bank, queries, readouts, device)
    row = {
        "features": name, "readout": chosen.readout, "k": chosen.k, "metric": chosen.metric,
        "validation": round(validation, 2),
        **metric_columns(metrics, "knn", queries.groups, config.seed),
    }  # fmt: skip
    return row, metrics


def run(config: Config) -> dict:
    comparison = Comparison("knn", config)
    usable_k(config.k, len(comparison.train))  # raises before anything is computed
    rows, selected, metrics = [], [], {}
    groups, skipped, size = None, [], 0
    for features in comparison.features():
        name, bank, queries, _ = features
        rows += vote(*features, config, comparison.device)
        row, of_row = select(*features, config, comparison.device)
        selected.append(row)
        metrics[name] = {"knn": of_row["main"]}
        skipped, groups, size = bank.skipped + queries.skipped, queries.groups, len(bank.y)
    if not comparison.main:
        return {}
    gains = differences(metrics, groups, config.seed)
    result, folder = comparison.record(
        rows=rows, selected=selected, differences=gains, skipped=skipped,
        k_left_out=[k for k in config.k or K_GRID if k > size],
        summary=[sentence("kNN", "knn", selected[0]["knn"], gains), *comparison.remarks()],
    )  # fmt: skip
    return finish_run(folder, result, lambda m: f"{table(m)}\nWritten: {folder / 'metrics.json'}")


def table(metrics: dict[str, Any]) -> str:
    """Format both tables: the selected settings; and a line per readout, a column per k."""
    rows = [
        (row["features"], "kNN", metric_text(row, "knn", width=5),
         f"readout {row['readout']}, k {row['k']}, {row['metric']}")
        for row in metrics["selected"]
    ]  # fmt: skip
    protocol = metrics["protocol"]
    numbers = dict.fromkeys(row["k"] for row in metrics["rows"])
    cells = [
        "undefined" if row["knn"] is None
        else f"{row['knn']:.1f} {interval_text(row, 'knn', reason=False)}"
        for row in metrics["rows"]
    ]  # fmt: skip
    way = "cosine of standardised features" if protocol["standardise"] else "cosine, as in papers"
    heads = "".join(f"{f'k = {k}':>20}" for k in numbers)
    lines = ["", *settings_table(rows), *caption(metrics), *metrics["summary"]]
    lines += [f"\nEvery readout and k, nothing selected ({way}), in per cent:"]
    lines += [f"{'features':26} {'readout':10}{heads}", *pivot(metrics["rows"], cells, 20)]
    if left_out := metrics["k_left_out"]:
        what = ", ".join(map(str, left_out))
        lines += [f"k = {what} left out: more than the {metrics['train']:,} training images."]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    run(parse(Config, argv=argv, description=__doc__))
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
