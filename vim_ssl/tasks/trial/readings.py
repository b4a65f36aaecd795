"""Classify frozen features, with settings chosen on the validation split of a trial."""

from dataclasses import asdict, dataclass
from typing import Any

from vim_ssl.evaluation.extract import Features
from vim_ssl.evaluation.knn import Neighbours, choose_neighbours_on, evaluate_neighbours
from vim_ssl.evaluation.linear_heads import fit_logistic
from vim_ssl.evaluation.readout import choose_readout
from vim_ssl.metrics.bootstrap import Metric
from vim_ssl.metrics.classification import answer_metrics

Readouts = dict[str, slice]


@dataclass(frozen=True)
class Reading:
    """A classifier of frozen features: logistic regression if ``C`` is given, otherwise kNN.

    Attributes:
        readout: name of the features.
        k, standardise: see `Neighbours`.
    """

    readout: str
    C: float | None = None
    k: int = 0
    standardise: bool = False

    def __str__(self) -> str:
        if self.C is not None:
            return f"linear probe, readout {self.readout}, C {self.C:g}"
        way = Neighbours(self.readout, self.standardise, self.k).metric
        return f"kNN, readout {self.readout}, k {self.k}, {way}"

    def record(self) -> dict[str, Any]:
        return asdict(self)


def choose_reading(
    train: Features, validation: Features, readouts: Readouts, device: str = "cpu"
) -> tuple[Reading, float]:
    """Choose classifier, readout, C, k and metric by their score on the validation images.

    Returns: the reading, and its score in per cent.
    """
    readout, C, score = choose_readout(train.x, train.y, validation.x, validation.y, readouts)
    neighbours, of_neighbours = choose_neighbours_on(train, validation, readouts, device=device)
    if of_neighbours > 100 * score:
        chosen = Reading(neighbours.readout, None, neighbours.k, neighbours.standardise)
        return chosen, of_neighbours
    return Reading(readout, C), 100 * score


def read(
    reading: Reading, train: Features, test: Features, readouts: Readouts, device: str = "cpu"
) -> Metric:
    """Fit the classifier to the training images; return its metric on the test images."""
    if reading.C is None:
        chosen = Neighbours(reading.readout, reading.standardise, reading.k)
        return evaluate_neighbours(chosen, train, test, readouts, device)[1]["main"]
    columns = readouts[reading.readout]
    head = fit_logistic(train.x[:, columns], train.y, reading.C)
    x = test.x[:, columns]
    answers = head.scores(x) if head.classes is None else head.predict(x)
    return answer_metrics(answers, test.y)["main"]
