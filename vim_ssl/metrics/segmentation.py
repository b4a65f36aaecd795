"""Segmentation metrics of a whole data set, and their tables.

All metrics come from one confusion matrix over the labelled pixels of all images; they are not
means of metrics per image.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vim_ssl.data.labels import IGNORE
from vim_ssl.metrics.bootstrap import Metric
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
        Raises: ValueError if the sizes differ.
        """
        if truth.shape != guess.shape:
            raise ValueError(
                f"{name}: the truth has shape {truth.shape}, the prediction {guess.shape}."
            )
        n, labelled = len(self.classes), truth != IGNORE
        pairs = truth[labelled].astype(np.int64) * n + guess[labelled]
        confusion = np.bincount(pairs, minlength=n * n).reshape(n, n)
        self.confusion += confusion
        counts = _counts(confusion)
        self._groups.append(name if group is None else group)
        self._counts.append(counts)
        pixels = int(confusion.sum())
        accuracy = confusion.trace() / pixels if pixels else math.nan
        self._images.append((name, pixels, float(accuracy), mean_iou(counts)))

    def compute(self, seed: int = 0) -> dict[str, Any]:
        """Compute, in per cent rounded to 0.01, ``miou``, ``aacc`` (pixel accuracy), ``macc`` (mean
        recall of the classes), ``mdice``, and ``miou_ci``: the middle 95 % of 1,000 bootstrap
        resamples of the images or groups, or None if there are fewer than five.

        A class counts for mIoU and mDice if it occurs in the truth or a prediction, and for mAcc if
        it occurs in the truth.
        """
        hits, truth, predicted = counts = _counts(self.confusion)
        if not truth.sum():
            raise ValueError("the images have no labelled pixels; evaluation needs at least one.")
        present, labelled = truth + predicted > 0, truth > 0
        shares = {
            "miou": mean_iou(counts),
            "aacc": hits.sum() / truth.sum(),
            "macc": (hits[labelled] / truth[labelled]).mean(),
            "mdice": (2 * hits[present] / (truth + predicted)[present]).mean(),
        }
        values = {name: round(100 * float(share), 2) for name, share in shares.items()}
        return values | {"miou_ci": self.interval(self.miou, seed)}

    @property
    def miou(self) -> Metric:
        """The mIoU over weighted images, in per cent."""
        rows = np.stack(self._counts).reshape(len(self._counts), -1).astype(float)
        return Metric(lambda weights: 100 * mean_iou((weights @ rows).reshape(3, -1)), len(rows))

    def interval(self, metric: Metric, seed: int = 0) -> list[float] | None:
        """The 95 % interval of a metric of these images, by `Metric.group_interval`."""
        return metric.group_interval(self._groups, seed)

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
