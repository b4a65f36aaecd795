"""Segmentation metrics per volume: Dice and the Hausdorff distance.

Class 0 is the background and is not evaluated. If a class occurs neither in the truth nor in the
prediction of a volume, its values are NaN and are skipped. If it occurs in only one of them, its
Dice is 0 and its distance is the diagonal of the volume.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vim_ssl.data.labels import IGNORE
from vim_ssl.metrics.bootstrap import Metric
from vim_ssl.metrics.tables import write_csv


class VolumeMetrics:
    """Metrics of volumes whose planes are added one by one.

    Args:
        classes: names of the classes.
    Attributes: ``incomplete``, names of volumes with missing planes, which are skipped.
    """

    def __init__(self, classes: Sequence[str]):
        self.classes = list(classes)
        self.incomplete: list[str] = []
        self._rows: list[tuple[str, str, np.ndarray]] = []  # name, group, (2, classes - 1)
        self._current: dict[str, Any] = {}
        self._planes: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def add(
        self, plane: dict[str, Any], truth: np.ndarray, guess: np.ndarray, group: str | None = None
    ) -> None:
        """Add a plane; at most one volume is in memory.

        Args:
            plane: ``volume`` (name), ``plane`` (index), ``planes`` (number of planes in the volume)
                and ``spacing`` (millimetres between planes, rows and columns).
            truth: (h, w), class indices, and 255 for pixels to ignore.
            guess: (h, w), predicted class indices.
            group: volumes of the same group are not independent samples.
        """
        if plane["volume"] != self._current.get("volume"):
            self.close()
        self._current = plane | {"group": plane["volume"] if group is None else group}
        self._planes[plane["plane"]] = truth, guess

    def close(self) -> None:
        """Evaluate the current volume; call it after the last plane."""
        volume, planes = self._current, self._planes
        self._current, self._planes = {}, {}
        if not planes:
            return
        if len(planes) != volume["planes"]:
            self.incomplete.append(volume["volume"])
            return
        truth, guess = (
            np.stack([planes[number][side] for number in sorted(planes)]) for side in (0, 1)
        )
        counted = truth != IGNORE
        row = np.full((2, len(self.classes) - 1), math.nan)
        for number in range(1, len(self.classes)):
            pair = (truth == number) & counted, (guess == number) & counted
            row[:, number - 1] = dice(*pair), hausdorff95(*pair, volume["spacing"])
        self._rows.append((volume["volume"], volume["group"], row))

    def compute(self, seed: int = 0) -> dict[str, Any]:
        """Compute ``volumes`` (number of volumes), ``volume_dice`` in per cent and ``volume_hd95``
        in millimetres: for each class the mean over the volumes where it is defined, then the mean
        over the classes; with the `Metric.entries` over the volumes or groups."""
        self.close()
        shape = len(self._rows), 2, len(self.classes) - 1
        rows = np.array([row for *_, row in self._rows], dtype=np.float64).reshape(shape)
        groups = [group for _, group, _ in self._rows]

        def metric(row: int, scale: float) -> Metric:
            part = rows[:, row : row + 1]
            return Metric(lambda weights: scale * _mean(part, weights)[0], len(rows))

        return {
            "volumes": len(rows), "volumes_incomplete": self.incomplete,
            **metric(0, 100).entries("volume_dice", groups, seed=seed),
            **metric(1, 1).entries("volume_hd95", groups, seed=seed),
        }  # fmt: skip

    def write(self, folder: Path) -> None:
        """Write ``volumes.csv``, one row per volume and class."""
        self.close()
        write_csv(
            folder / "volumes.csv",
            ["volume", "group", "class", "dice", "hd95_mm"],
            (
                [name, group, self.classes[number], float(share), f"{distance:.3f}"]
                for name, group, row in self._rows
                for number, (share, distance) in enumerate(row.T, 1)
            ),
        )


def dice(truth: np.ndarray, guess: np.ndarray) -> float:
    """Dice of two bool arrays; NaN if both are empty."""
    total = int(truth.sum()) + int(guess.sum())
    return 2 * int((truth & guess).sum()) / total if total else math.nan


def hausdorff95(truth: np.ndarray, guess: np.ndarray, spacing: Sequence[float]) -> float:
    """The 95th percentile of the distances from one surface to the other, in the direction where it
    is larger; NaN if both objects are empty, the diagonal of the array if only one is.

    A surface consists of the voxels with a face neighbour outside of the object or of the array;
    axes of a single voxel are ignored.

    Args:
        truth, guess: bool arrays.
        spacing: distance between voxels along each axis.
    Reference: MONAI's HausdorffDistanceMetric(percentile=95).
    """
    from scipy.ndimage import binary_erosion, distance_transform_edt

    if not truth.any() and not guess.any():
        return math.nan
    if not truth.any() or not guess.any():
        return math.dist([0.0] * truth.ndim, np.multiply(truth.shape, spacing))
    # Crop to the bounding box of both objects: distances do not depend on the rest.
    box = tuple(slice(int(i.min()), int(i.max()) + 1) for i in np.nonzero(truth | guess))
    wide = [axis for axis, side in enumerate(truth.shape) if side > 1]
    shape = [box[axis].stop - box[axis].start for axis in wide]
    objects = [x[box].reshape(shape) for x in (truth, guess)]
    if not wide:
        return 0.0
    surfaces = [x & ~binary_erosion(x) for x in objects]
    step = [spacing[axis] for axis in wide]
    ways = (distance_transform_edt(~to, sampling=step)[of] for of, to in (surfaces, surfaces[::-1]))
    return max(float(np.percentile(way, 95)) for way in ways)


def _mean(rows: np.ndarray, weights: np.ndarray) -> list[float]:
    """Average rows (volumes, metrics, classes) with weights (volumes,), then over the classes;
    return (metrics,), NaN if undefined."""
    defined = ~np.isnan(rows)
    counts = np.tensordot(weights, defined, 1)
    sums = np.tensordot(weights, np.where(defined, rows, 0), 1)
    known = counts > 0
    return [
        float((total[k] / count[k]).mean()) if k.any() else math.nan
        for total, count, k in zip(sums, counts, known, strict=True)
    ]
