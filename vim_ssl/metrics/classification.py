"""Classification metrics for each type of target, and their tables.

targets      label                     prediction
class        (b,) int64                the class with the largest logit
multi-label  (b, classes) of 0 and 1   the labels with logits above 0
ordinal      (b,) int64, ordered       the number of logits above 0, out of classes - 1
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vim_ssl.metrics.bootstrap import Groups, Metric
from vim_ssl.metrics.ranking import top_k
from vim_ssl.metrics.sentences import metric_text
from vim_ssl.metrics.tables import per_class, write_csv
from vim_ssl.metrics.titles import measured_on, shows_top5
from vim_ssl.utils.numbers import require_finite

TARGETS = ("class", "multi-label", "ordinal")
MAIN_METRIC = {"class": "top1", "multi-label": "map_macro", "ordinal": "top1"}


def outputs(targets: str, classes: int) -> int:
    """Number of outputs of a head for this number of classes."""
    return max(classes - 1, 1) if targets == "ordinal" else classes


def predicted(logits: Tensor, targets: str) -> Tensor:
    """Predict labels from logits (b, outputs): (b,) int64, or (b, classes) int64 of 0 and 1 for
    multi-label."""
    if targets == "class":
        return logits.argmax(1)
    answers = (logits > 0).long()
    return answers if targets == "multi-label" else answers.sum(1)


def probabilities(logits: Tensor, targets: str) -> Tensor:
    """Convert logits (b, outputs) to class probabilities (b, classes); independent ones for
    multi-label."""
    if targets == "class":
        return logits.softmax(1)
    answers = torch.sigmoid(logits)
    if targets == "multi-label":
        return answers
    # P(more than k - 1) - P(more than k)
    return F.pad(answers, (1, 0), value=1.0) - F.pad(answers, (0, 1), value=0.0)


# ---------------------------------------------------------------- single metrics


def accuracy(predicted, truth) -> Metric:
    """Proportion of the images (n,) for which ``predicted`` equals ``truth``."""
    return proportion(np.asarray(predicted) == np.asarray(truth))


def proportion(right) -> Metric:
    """Mean of ``right`` (n,), bool or between 0 and 1, such as `vim_ssl.metrics.ranking.top_k`."""
    right = 100.0 * np.asarray(right, dtype=np.float64)
    return Metric(lambda weights: float(weights @ right / weights.sum()), len(right), True)


def mean_average_precision(scores, truth) -> dict[str, Metric]:
    """mAP of multi-label data: ``macro``, the mean over the classes that have at least one image,
    and ``micro``, the average precision of all (image, class) pairs in one ranking.

    Args:
        scores, truth: (n, classes); a higher score is more certain; truth is 0 or 1.
    Raises: ValueError for scores that are not finite, or another shape of the truth.
    """
    scores, truth = np.asarray(scores), np.asarray(truth)
    require_finite(scores, "the scores")
    if scores.shape != truth.shape:
        raise ValueError(f"scores have shape {scores.shape}, the truth {truth.shape}.")
    n, classes = truth.shape
    each = [_average_precision(scores[:, c], truth[:, c]) for c in range(classes)]
    pairs = _average_precision(scores.reshape(-1), truth.reshape(-1))

    def macro(weights: np.ndarray) -> float:
        values = np.array([precision(weights) for precision in each])
        defined = values[~np.isnan(values)]
        return 100.0 * float(defined.mean()) if len(defined) else float("nan")

    def micro(weights: np.ndarray) -> float:
        return 100.0 * pairs(np.repeat(weights, classes))

    return {"macro": Metric(macro, n), "micro": Metric(micro, n)}


def _average_precision(scores: np.ndarray, truth: np.ndarray) -> Callable[[np.ndarray], float]:
    """Return a function from weights (n,) to the area under the precision-recall curve in steps, as
    in scikit-learn; NaN without positives. Sorts only once; equal scores are one step."""
    order = np.argsort(-scores, kind="stable")
    ends = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))
    positive = truth[order] > 0

    def precision(weights: np.ndarray) -> float:
        weights = weights[order]
        hits, seen = np.cumsum(weights * positive)[ends], np.cumsum(weights)[ends]
        if hits[-1] == 0:
            return float("nan")
        gained = np.diff(hits, prepend=0.0)
        return float((gained * hits / np.maximum(seen, 1e-12)).sum() / hits[-1])

    return precision


def balanced_accuracy(predicted: np.ndarray, truth: np.ndarray) -> Metric:
    """Mean recall of the classes that occur."""
    right, classes = predicted == truth, int(truth.max()) + 1

    def weighted(weights: np.ndarray) -> float:
        samples = np.bincount(truth, weights, classes)
        hits = np.bincount(truth, weights * right, classes)
        return 100.0 * float((hits[samples > 0] / samples[samples > 0]).mean())

    return Metric(weighted, len(truth))


# ---------------------------------------------------------------- metrics of a task


def answer_metrics(answers, truth) -> dict[str, Metric]:
    """``main``: for single labels (n,) the accuracy of predicted labels (n,) or of scores (n,
    classes); for several labels per image the macro mAP, which also has ``micro``.

    Raises: ValueError for scores that are not finite.
    """
    if np.ndim(truth) == 1:
        if np.ndim(answers) == 1:
            return {"main": accuracy(answers, truth)}
        first = top_k(torch.as_tensor(answers), torch.as_tensor(truth), (1,))[0]
        return {"main": proportion(first)}
    precision = mean_average_precision(answers, truth)
    return {"main": precision["macro"], "micro": precision["micro"]}


def require_labels(truth: Tensor, name: str) -> None:
    """Raise ValueError if no image has one of several labels (n, classes): mean average precision
    is undefined then."""
    if truth.ndim == 2 and not truth.any():
        raise ValueError(
            f"none of the {len(truth)} images of {name} has a label, so average precision is not "
            "defined; hold out more images, or use another --seed."
        )


def metric_columns(
    metrics: dict[str, Metric], key: str, groups: Groups, seed: int
) -> dict[str, Any]:
    """Return the columns of `answer_metrics` in a table: the `Metric.entries` of ``KEY``, for
    several labels per image also those of ``KEY_micro``."""
    row: dict[str, Any] = {}
    for kind, metric in metrics.items():
        name = key if kind == "main" else f"{key}_{kind}"
        row |= metric.entries(name, groups, seed=seed)
    return row


def target_metrics(logits: Tensor, labels: Tensor, targets: str) -> dict[str, Metric]:
    """Compute the metrics for a type of target, in per cent.

    Args:
        logits: (n, outputs) float32.
        labels: (n,) int64, or (n, classes) of 0 and 1.
    Returns: ``top1``, ``top5`` (with at least six classes), ``balanced_accuracy`` and, for ordinal
        targets, ``mean_error`` in classes; for multi-label ``map_macro``, ``map_micro`` and
        ``exact`` (all labels correct). Equal logits count as in random order.
    Raises: ValueError for logits that are not finite, labels outside of the classes, or no image.
    """
    check_answers(logits, labels, targets)
    guess = predicted(logits, targets)
    if targets == "multi-label":
        precision = mean_average_precision(logits.float().numpy(), labels.numpy())
        metrics = {f"map_{how}": metric for how, metric in precision.items()}
        return metrics | {"exact": accuracy((guess == labels).all(1), True)}
    metrics = {"top1": accuracy(guess, labels)}
    if targets == "class":
        first, five = top_k(logits, labels, (1, 5))
        metrics["top1"] = proportion(first)
        if logits.shape[1] > 5:
            metrics["top5"] = proportion(five)
    if targets == "ordinal":
        error = (guess - labels).abs().double().numpy()
        metrics["mean_error"] = Metric(lambda w: float(w @ error / w.sum()), len(error))
    return metrics | {"balanced_accuracy": balanced_accuracy(guess.numpy(), labels.numpy())}


def check_answers(logits: Tensor, labels: Tensor, targets: str) -> None:
    """Raise ValueError unless there is an image, the logits are finite, and the labels are those of
    their classes."""
    if not len(labels) or len(logits) != len(labels):
        raise ValueError(f"{len(logits)} predictions for {len(labels)} labels; expected one each.")
    require_finite(logits, "the logits")
    if targets == "multi-label":
        return
    classes = logits.shape[1] + (targets == "ordinal")
    low, high = int(labels.min()), int(labels.max())
    if not 0 <= low <= high < classes:
        raise ValueError(
            f"labels are from {low} to {high}; expected 0 to {classes - 1} for {classes} classes. "
            "Images without a label (-1) cannot be evaluated."
        )


def rounded(metrics: dict[str, Metric]) -> dict[str, float]:
    """Return the values: percentages rounded to 0.01, ``mean_error`` to 0.0001."""
    return {name: round(metric.value, _digits(name)) for name, metric in metrics.items()}


def _digits(name: str) -> int:
    return 4 if name == "mean_error" else 2


def classification_metrics(
    logits: Tensor, labels: Tensor, targets: str, groups: Groups = None
) -> dict[str, Any]:
    """Evaluate predictions: return the `Metric.entries` of `target_metrics` and, for single labels,
    the ``confusion`` matrix (rows: truth, columns: prediction).

    Args:
        groups: see `Metric.estimate`.
    Raises: the errors of `target_metrics`.
    """
    values: dict[str, Any] = {}
    for name, metric in target_metrics(logits, labels, targets).items():
        values |= metric.entries(name, groups, digits=_digits(name))
    if targets == "multi-label":
        return values
    classes = logits.shape[1] + (targets == "ordinal")
    confusion = confusion_matrix(labels, predicted(logits, targets), classes)
    return values | {"confusion": confusion.tolist()}


def confusion_matrix(labels: Tensor, predicted: Tensor, classes: int) -> np.ndarray:
    """Count the images of each true class (rows) by their predicted class (columns).

    Args:
        labels, predicted: (n,) int64.
    Returns: (classes, classes) int64.
    """
    pairs = (labels.long() * classes + predicted.long()).numpy()
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def summary(metrics: dict[str, Any]) -> str:
    """One line of text: the metrics, the split and the number of its images, ``n``."""
    key, name = ("top1", "top-1") if "top1" in metrics else ("map_macro", "mAP")
    text = f"{name} {metric_text(metrics, key)}"
    if "top5" in metrics and shows_top5(len(metrics["confusion"])):
        text += f", top-5 {metrics['top5']:.1f} %"
    for name in ("auc", "acc"):
        if metrics.get(name) is not None:
            text += f", {name.upper()} {metrics[name]:.3f}"
    return f"{text} · {measured_on(metrics['split'], metrics['n'])}"


def write_tables(
    folder: Path, metrics: dict, logits: Tensor, labels: Tensor, ids: list[str],
    classes: list[str], targets: str, groups: Groups = None,
) -> None:  # fmt: skip
    """Write ``predictions.csv`` and, for single labels, ``classes.csv``.

    ``predictions.csv`` has a row per image: id, label, prediction, ``confidence`` (the probability
    of the prediction; for multi-label, of every class), for single labels ``label_probability``,
    and with ``groups`` also ``group``. ``classes.csv`` has a row per class: samples, recall,
    precision, F1, the class it is most often confused with.
    """
    confidence = logits.softmax(1) if targets == "class" else torch.sigmoid(logits)
    rows: list[list[str]] = []
    for name, label, guess, row, shares in zip(
        ids, labels, predicted(logits, targets), confidence, probabilities(logits, targets),
        strict=True,
    ):  # fmt: skip
        if targets == "multi-label":
            sets = (_names(values, classes) for values in (label, guess))
            rows.append([name, *sets, " ".join(f"{p:.4f}" for p in row.tolist()), ""])
        else:
            sure = f"{row.max().item():.4f}" if targets == "class" else ""
            of_label = f"{shares[int(label)].item():.4f}"
            rows.append([name, classes[int(label)], classes[int(guess)], sure, of_label])
    columns = ["id", "label", "predicted", "confidence", "label_probability"]
    if groups is not None:
        columns.append("group")
        rows = [[*row, str(group)] for row, group in zip(rows, groups, strict=True)]
    write_csv(folder / "predictions.csv", columns, rows)
    if targets != "multi-label":
        columns = ["class", "samples", "recall", "precision", "f1", "most_taken_for"]
        keys = ["class", "count", "recall", "precision", "dice", "most_taken_for"]
        per = per_class(np.array(metrics["confusion"]), classes)
        write_csv(folder / "classes.csv", columns, ([row[key] for key in keys] for row in per))


def _names(values: Tensor, classes: list[str]) -> str:
    return "|".join(name for name, value in zip(classes, values.tolist(), strict=True) if value)
