"""How good predicted masks are: figures of a whole data set, tables, drawings.

All figures come from one confusion matrix over the labelled pixels of all images; the mean of
images' own IoU would be another number.
"""

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vim_ssl.data.labels import IGNORE

RESAMPLES = 1000


class MaskScores:
    """Counts of pixels, image by image.

    Args:
        classes: their names.
    Attributes: ``confusion`` int64 (classes, classes), truth by prediction.
    """

    def __init__(self, classes: Sequence[str]):
        self.classes = list(classes)
        n = len(self.classes)
        self.confusion = np.zeros((n, n), np.int64)
        self._rows: list[tuple[str, np.ndarray]] = []  # group, (3, classes): hits, truth, found
        self._images: list[tuple[str, int, float, float]] = []

    def add(self, name: str, truth: np.ndarray, guess: np.ndarray, group: str | None = None):
        """Count an image.

        Args:
            name: its id.
            truth: (h, w), class numbers, and 255 for pixels that do not count.
            guess: (h, w), class numbers.
            group: images of one group are no independent samples.
        Raises: ValueError for two sizes.
        """
        if truth.shape != guess.shape:
            raise ValueError(f"{name}: the truth is {truth.shape}, the prediction {guess.shape}.")
        n, labelled = len(self.classes), truth != IGNORE
        pairs = truth[labelled].astype(np.int64) * n + guess[labelled]
        counts = np.bincount(pairs, minlength=n * n).reshape(n, n)
        self.confusion += counts
        row = np.stack([counts.diagonal(), counts.sum(1), counts.sum(0)])
        self._rows.append((name if group is None else group, row))
        pixels = int(counts.sum())
        accuracy = counts.trace() / pixels if pixels else math.nan
        self._images.append((name, pixels, accuracy, float(mean_iou(row))))

    def figures(self, seed: int = 0) -> dict[str, Any]:
        """In per cent, rounded to 0.01: ``miou``, ``aacc`` (pixels), ``macc`` (mean of the classes'
        recalls), ``mdice``; ``miou_ci`` is the middle 95 % of 1,000 bootstrap resamples of the
        images, or of their groups; None below five of them.

        A class counts for mIoU and mDice if it is in the truth or predicted anywhere, for mAcc if
        it is in the truth.
        """
        hits, truth, found = self._counts()
        if not truth.sum():
            raise ValueError("no pixel of the images is labelled; there is nothing to judge.")
        present, seen = truth + found > 0, truth > 0
        figures = {
            "miou": mean_iou(np.stack([hits, truth, found])),
            "aacc": hits.sum() / truth.sum(),
            "macc": (hits[seen] / truth[seen]).mean(),
            "mdice": (2 * hits[present] / (truth + found)[present]).mean(),
        }
        return {k: _percent(v) for k, v in figures.items()} | {"miou_ci": self._interval(seed)}

    def _counts(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.confusion.diagonal(), self.confusion.sum(1), self.confusion.sum(0)

    def _interval(self, seed: int) -> list[float] | None:
        groups: dict[str, np.ndarray] = {}
        for name, row in self._rows:
            groups[name] = groups[name] + row if name in groups else row
        n = len(groups)
        if n < 5:
            return None
        draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), RESAMPLES)
        rows = np.stack(list(groups.values())).reshape(n, -1)
        values = [mean_iou((draw @ rows).reshape(3, -1)) for draw in draws.astype(float)]
        return [_percent(v) for v in np.nanpercentile(values, [2.5, 97.5])]

    def per_class(self) -> list[dict[str, Any]]:
        """A row a class: pixels, share of all, iou, recall, precision, dice, the class that it is
        most often taken for; nan where a class is absent."""
        rows = []
        for i, name in enumerate(self.classes):
            hits, truth, found = (int(count[i]) for count in self._counts())
            others = np.where(np.arange(len(self.classes)) == i, 0, self.confusion[i])
            rows.append(
                {
                    "class": name,
                    "pixels": truth,
                    "share": _share(truth, self.confusion.sum()),
                    "iou": _share(hits, truth + found - hits),
                    "recall": _share(hits, truth),
                    "precision": _share(hits, found),
                    "dice": _share(2 * hits, truth + found),
                    "most_taken_for": self.classes[int(others.argmax())] if others.any() else "",
                }
            )
        return rows

    def write(self, folder: Path) -> None:
        """``classes.csv`` (a line a class) and ``predictions.csv`` (a line an image)."""
        rows = self.per_class()
        with open(folder / "classes.csv", "w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows(
                {k: f"{v:.4f}" if isinstance(v, float) else v for k, v in row.items()}
                for row in rows
            )
        with open(folder / "predictions.csv", "w", newline="", encoding="utf-8") as file:
            lines = csv.writer(file)
            lines.writerow(["id", "labelled_pixels", "accuracy", "miou"])
            lines.writerows([n, p, f"{a:.4f}", f"{m:.4f}"] for n, p, a, m in self._images)

    def table(self, most: int = 20) -> str:
        """For a person: the largest classes, one a line."""
        rows = sorted(self.per_class(), key=lambda row: -row["pixels"])
        rows = [row for row in rows if row["pixels"]]
        width = max(len(row["class"]) for row in rows[:most])
        lines = [f"{'class':{width}}  {'share':>6}  {'IoU':>6}  {'recall':>6}  {'Dice':>6}"]
        for row in rows[:most]:
            cells = [f"{100 * row[key]:6.1f}" for key in ("share", "iou", "recall", "dice")]
            lines.append(f"{row['class']:{width}}  " + "  ".join(cells))
        if len(rows) > most:
            lines.append(f"… and {len(rows) - most} more in classes.csv")
        return "\n".join(lines)


def mean_iou(counts: np.ndarray) -> float:
    """(3, classes) of hits, truth, found -> mean over the classes that occur; nan if none does."""
    hits, truth, found = counts
    union = truth + found - hits
    present = union > 0
    return float((hits[present] / union[present]).mean()) if present.any() else math.nan


def _share(part: float, whole: float) -> float:
    return float(part / whole) if whole else math.nan


def _percent(share: float) -> float:
    return round(100 * float(share), 2)
