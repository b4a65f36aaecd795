"""Segmentation metrics of a whole data set, and their tables.

All metrics come from one confusion matrix over the labelled pixels of all images; they are not
means of metrics per image.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vim_ssl.data.labels import IGNORE
from vim_ssl.metrics.bootstrap import Metric
from vim_ssl.metrics.sentences import Gain
from vim_ssl.metrics.tables import class_table, per_class, write_csv


class SegmentationMetrics:
    """Metrics of predictions that are added image by image.

    Args:
        classes: names of the classes.
    Attributes: ``confusion`` int64 (classes, classes); rows: truth, columns: prediction.
    """

    def __init__(self, classes: Sequence[str]):
        self.classes = list(classes)
        n = len(self.classes)
        self.confusion = np.zeros((n, n), np.int64)
        self._groups: list[str] = []
        self._counts: list[np.ndarray] = []  # (3, classes): hits, truth, predicted
        self._images: list[tuple[str, int, float, float]] = []

    def add(self, name: str, truth: np.ndarray, guess: np.ndarray, group: str | None = None):
        """Count the pixels of an image.

        Args:
            name: id of the image.
            truth: (h, w), class indices, and 255 for pixels to ignore.
            guess: (h, w), predicted class indices.
            group: images of the same group are not independent samples.
        Raises: ValueError if the sizes differ, and for other class indices.
        """
        if truth.shape != guess.shape:
            raise ValueError(
                f"{name}: the truth has shape {truth.shape}, the prediction {guess.shape}."
            )
        n, labelled = len(self.classes), truth != IGNORE
        for what, values in (("truth", truth[labelled]), ("prediction", guess[labelled])):
            if values.size and not 0 <= int(values.min()) <= int(values.max()) < n:
                raise ValueError(
                    f"{name}: the {what} has classes from {values.min()} to {values.max()}; "
                    f"expected 0 to {n - 1}, and 255 in the truth for pixels to ignore."
                )
        pairs = truth[labelled].astype(np.int64) * n + guess[labelled].astype(np.int64)
        confusion = np.bincount(pairs, minlength=n * n).reshape(n, n)
        self.confusion += confusion
        counts = _counts(confusion)
        self._groups.append(name if group is None else group)
        self._counts.append(counts)
        pixels = int(confusion.sum())
        accuracy = confusion.trace() / pixels if pixels else math.nan
        self._images.append((name, pixels, float(accuracy), mean_iou(counts)))

    def compute(self, seed: int = 0) -> dict[str, Any]:
        """Compute ``miou``, ``aacc`` (pixel accuracy), ``macc`` (mean recall of the classes) and
        ``mdice``, with the `Metric.entries` over the images or groups.

        A class counts for mIoU and mDice if it occurs in the truth or a prediction, and for mAcc if
        it occurs in the truth.
        """
        if not self.confusion.sum():
            raise ValueError("the images have no labelled pixels; evaluation needs at least one.")
        values: dict[str, Any] = {}
        for name, metric in self.metrics().items():
            values |= metric.entries(name, self._groups, seed=seed)
        return values

    def metrics(self) -> dict[str, Metric]:
        """The metrics of `compute` over weighted images, in per cent."""
        rows = np.stack(self._counts).reshape(len(self._counts), -1).astype(np.float64)

        def metric(of_counts: Callable[[np.ndarray], float]) -> Metric:
            return Metric(
                lambda weights: 100 * of_counts((weights @ rows).reshape(3, -1)), len(rows)
            )

        parts = {"miou": mean_iou, "aacc": _accuracy, "macc": _mean_recall, "mdice": _mean_dice}
        return {name: metric(of_counts) for name, of_counts in parts.items()}

    @property
    def miou(self) -> Metric:
        return self.metrics()["miou"]

    def gain(self, over: str, other: "SegmentationMetrics", seed: int = 0) -> Gain:
        """The gain in mIoU over other predictions of the same images."""
        return Gain.of(over, self.miou - other.miou, self._groups, seed=seed)

    def constant(self, index: int) -> "SegmentationMetrics":
        """Return the metrics of predicting class ``index`` for every pixel of the same images."""
        other = SegmentationMetrics(self.classes)
        other.confusion[:, index] = self.confusion.sum(1)
        other._groups, other._images = self._groups, []
        for _, truth, _ in self._counts:
            confusion = np.zeros_like(other.confusion)
            confusion[:, index] = truth
            other._counts.append(_counts(confusion))
        return other

    def write(self, folder: Path) -> None:
        """Write ``classes.csv`` (one row per class) and ``predictions.csv`` (one per image)."""
        rows = per_class(self.confusion, self.classes)
        columns = ["pixels" if key == "count" else key for key in rows[0]]
        write_csv(folder / "classes.csv", columns, (list(row.values()) for row in rows))
        columns = ["id", "labelled_pixels", "accuracy", "miou"]
        write_csv(folder / "predictions.csv", columns, self._images)

    def table(self) -> str:
        """Table of the largest classes, as text."""
        rows = [row for row in per_class(self.confusion, self.classes) if row["count"]]
        columns = {"share": "share", "IoU": "iou", "recall": "recall", "Dice": "dice"}
        return class_table(rows, "count", columns, scale=100)


def _counts(confusion: np.ndarray) -> np.ndarray:
    """Counts (3, classes) of hits, truth and predictions from a confusion matrix."""
    return np.stack([confusion.diagonal(), confusion.sum(1), confusion.sum(0)])


def mean_iou(counts: np.ndarray) -> float:
    """Mean IoU over the classes that occur, or NaN, from counts (3, classes); see `_counts`."""
    hits, truth, predicted = counts
    union = truth + predicted - hits
    present = union > 0
    return float((hits[present] / union[present]).mean()) if present.any() else math.nan


def _accuracy(counts: np.ndarray) -> float:
    hits, truth, _ = counts
    return float(hits.sum() / truth.sum()) if truth.sum() else math.nan


def _mean_recall(counts: np.ndarray) -> float:
    hits, truth, _ = counts
    labelled = truth > 0
    return float((hits[labelled] / truth[labelled]).mean()) if labelled.any() else math.nan


def _mean_dice(counts: np.ndarray) -> float:
    hits, truth, predicted = counts
    present = truth + predicted > 0
    shares = 2 * hits[present] / (truth + predicted)[present]
    return float(shares.mean()) if present.any() else math.nan
