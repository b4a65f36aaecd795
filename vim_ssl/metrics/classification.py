"""How good a classifier's answers are: figures of every kind of target, tables.

targets      label                     prediction
class        (b,) int64                the largest logit
multi-label  (b, classes) of 0 and 1   each logit above 0
ordinal      (b,) int64, ordered       how many of the classes - 1 logits are above 0
"""

import csv
import math
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vim_ssl.metrics.bootstrap import Metric, mean_average_precision, share_right

TARGETS = ("class", "multi-label", "ordinal")
MAIN_FIGURE = {"class": "top1", "multi-label": "map_macro", "ordinal": "top1"}


def outputs(targets: str, classes: int) -> int:
    """How many outputs the head has for so many classes."""
    return max(classes - 1, 1) if targets == "ordinal" else classes


def predicted(logits: Tensor, targets: str) -> Tensor:
    """(b, outputs) -> (b,) int64, or (b, classes) int64 of 0 and 1 for multi-label."""
    if targets == "class":
        return logits.argmax(1)
    answers = (logits > 0).long()
    return answers if targets == "multi-label" else answers.sum(1)


def probabilities(logits: Tensor, targets: str) -> Tensor:
    """(b, outputs) -> (b, classes): of each class, or of each label by itself for multi-label."""
    if targets == "class":
        return logits.softmax(1)
    answers = torch.sigmoid(logits)
    if targets == "multi-label":
        return answers
    # P(more than k - 1) - P(more than k)
    return F.pad(answers, (1, 0), value=1.0) - F.pad(answers, (0, 1), value=0.0)


def figures(logits: Tensor, labels: Tensor, targets: str) -> dict[str, Metric]:
    """What answers are judged by, in per cent.

    Args:
        logits: (n, outputs) float32.
        labels: (n,) int64, or (n, classes) of 0 and 1.
    Returns: ``top1``, ``top5`` from six classes on, ``balanced_accuracy`` (the mean recall of the
        classes that there are) and, for ordinal ones, ``mean_error`` in classes; for multi-label
        ``map_macro``, ``map_micro`` and ``exact``.
    """
    guess = predicted(logits, targets)
    if targets == "multi-label":
        precision = mean_average_precision(logits.numpy(), labels.numpy())
        found = {f"map_{how}": figure for how, figure in precision.items()}
        return found | {"exact": share_right((guess == labels).all(1), True)}
    found = {"top1": share_right(guess, labels)}
    if targets == "class" and logits.shape[1] > 5:
        five = logits.topk(5, dim=1).indices == labels[:, None]
        found["top5"] = share_right(five.any(1), True)
    if targets == "ordinal":
        error = (guess - labels).abs().double().numpy()
        found["mean_error"] = Metric(lambda w: float(w @ error / w.sum()), len(error))
    return found | {"balanced_accuracy": _balanced(guess.numpy(), labels.numpy())}


def _balanced(guess: np.ndarray, truth: np.ndarray) -> Metric:
    right, classes = guess == truth, int(truth.max()) + 1

    def weighted(weights: np.ndarray) -> float:
        samples = np.bincount(truth, weights, classes)
        hits = np.bincount(truth, weights * right, classes)
        return 100.0 * float((hits[samples > 0] / samples[samples > 0]).mean())

    return Metric(weighted, len(truth))


def values(found: dict[str, Metric]) -> dict[str, float]:
    """Per cent rounded to 0.01, a ``mean_error`` to 0.0001."""
    return {k: round(f.value, 4 if k == "mean_error" else 2) for k, f in found.items()}


def judge(
    logits: Tensor, labels: Tensor, targets: str, groups: Sequence[Hashable] | None = None
) -> dict[str, Any]:
    """The values of `figures`, each with its 95 % interval ``NAME_ci``, and of single labels the
    ``confusion`` (truth by prediction).

    Args:
        groups: see `Figure.interval`.
    """
    from sklearn import metrics

    found = figures(logits, labels, targets)
    intervals = {f"{name}_ci": figure.interval(groups) for name, figure in found.items()}
    judged: dict[str, Any] = values(found) | intervals
    if targets == "multi-label":
        return judged
    classes = range(logits.shape[1] + (targets == "ordinal"))
    confusion = metrics.confusion_matrix(labels, predicted(logits, targets), labels=classes)
    return judged | {"confusion": confusion.tolist()}


def summary(metrics: dict[str, Any]) -> str:
    """One line for a person; it tells the ``split`` where there is no training to tell apart."""
    where = f"on {metrics['test']:,} test images"
    if "split" in metrics:
        where = f"on {metrics['test']:,} images (split: {metrics['split']})"
    if "top1" not in metrics:
        low, high = metrics["map_macro_ci"]
        text = f"mAP {metrics['map_macro']:.1f} % [{low:.1f}, {high:.1f}]"
    else:
        low, high = metrics["top1_ci"]
        text = f"top-1 {metrics['top1']:.1f} % [{low:.1f}, {high:.1f}]"
    if "top5" in metrics:
        text += f", top-5 {metrics['top5']:.1f} %"
    for name in ("auc", "acc"):
        if metrics.get(name) is not None:
            text += f", {name.upper()} {metrics[name]:.3f}"
    return f"{text} {where}"


def write_tables(
    folder: Path, found: dict, logits: Tensor, labels: Tensor, ids: list[str],
    classes: list[str], targets: str,
) -> None:  # fmt: skip
    """``predictions.csv`` (one line an image) and, of single labels, ``classes.csv`` (one a class:
    samples, recall, precision, F1, the class it is most often taken for)."""
    probabilities = logits.softmax(1) if targets == "class" else torch.sigmoid(logits)
    guess = predicted(logits, targets)
    with open(folder / "predictions.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["id", "label", "predicted", "confidence"])
        for name, label, hit, row in zip(ids, labels, guess, probabilities, strict=True):
            if targets == "multi-label":
                sets = (_names(values, classes) for values in (label, hit))
                table.writerow([name, *sets, " ".join(f"{p:.4f}" for p in row.tolist())])
            else:
                sure = f"{row.max().item():.4f}" if targets == "class" else ""
                table.writerow([name, classes[int(label)], classes[int(hit)], sure])
    if targets == "multi-label":
        return
    with open(folder / "classes.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["class", "samples", "recall", "precision", "f1", "most_taken_for"])
        table.writerows(_per_class(np.array(found["confusion"]), classes))


def _names(values: Tensor, classes: list[str]) -> str:
    return "|".join(name for name, value in zip(classes, values.tolist(), strict=True) if value)


def _per_class(confusion: np.ndarray, classes: list[str]) -> Iterator[list]:
    for i, name in enumerate(classes):
        hits, samples, taken = confusion[i, i], confusion[i].sum(), confusion[:, i].sum()
        recall = hits / samples if samples else math.nan
        precision = hits / taken if taken else math.nan
        f1 = 2 * hits / (samples + taken) if samples + taken else math.nan
        others = np.where(np.arange(len(classes)) == i, 0, confusion[i])
        wrong = classes[int(others.argmax())] if others.any() else ""
        yield [name, int(samples), *(f"{v:.4f}" for v in (recall, precision, f1)), wrong]
