"""How good predicted masks of volumes are, volume by volume: Dice and the Hausdorff distance.

Class 0 is the background and has no figure. Of a class that a volume neither has nor is said to
have there is none either (nan, left out of means); one that is missed altogether, or found where
there is none, has Dice 0 and the diagonal of the volume as its distance.
"""

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vim_ssl.data.labels import IGNORE

RESAMPLES = 1000


class VolumeScores:
    """Figures of volumes, whose planes come one after another.

    Args:
        classes: their names.
    Attributes: ``incomplete``, names of volumes of which planes have not come, and which are left
        out.
    """

    def __init__(self, classes: Sequence[str]):
        self.classes = list(classes)
        self.incomplete: list[str] = []
        self._rows: list[tuple[str, str, np.ndarray]] = []  # name, group, (2, classes - 1)
        self._place: dict[str, Any] = {}
        self._planes: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def add(
        self, place: dict[str, Any], truth: np.ndarray, guess: np.ndarray, group: str | None = None
    ) -> None:
        """Take a plane; no more than one volume is kept at a time.

        Args:
            place: ``volume`` (its name), ``plane`` (number), ``planes`` (how many it has) and
                ``spacing``, millimetres from plane to plane, row to row, column to column.
            truth: (h, w), class numbers, and 255 for pixels that do not count. guess: as well.
            group: volumes of one group are no independent samples.
        """
        if place["volume"] != self._place.get("volume"):
            self.close()
        self._place = place | {"group": place["volume"] if group is None else group}
        self._planes[place["plane"]] = truth, guess

    def close(self) -> None:
        """Judge the volume whose planes have come last."""
        place, planes = self._place, self._planes
        self._place, self._planes = {}, {}
        if not planes:
            return
        if len(planes) != place["planes"]:
            self.incomplete.append(place["volume"])
            return
        truth, guess = (
            np.stack([planes[number][side] for number in sorted(planes)]) for side in (0, 1)
        )
        counted = truth != IGNORE
        row = np.full((2, len(self.classes) - 1), math.nan)
        for number in range(1, len(self.classes)):
            pair = (truth == number) & counted, (guess == number) & counted
            row[:, number - 1] = dice(*pair), hausdorff95(*pair, place["spacing"])
        self._rows.append((place["volume"], place["group"], row))

    def figures(self, seed: int = 0) -> dict[str, Any]:
        """``volumes`` (how many are judged), ``volume_dice`` in per cent, ``volume_hd95`` in
        millimetres: of each class the mean over the volumes that have a figure of it, and of those
        the mean; None where there is none. ``volume_dice_ci`` is the middle 95 % of 1,000 bootstrap
        resamples of the volumes, or of their groups; None below five of them."""
        self.close()
        rows = np.array([row for *_, row in self._rows]).reshape(
            len(self._rows), 2, len(self.classes) - 1
        )
        groups = sorted({group for _, group, _ in self._rows})
        members = [[i for i, (_, of, _) in enumerate(self._rows) if of == g] for g in groups]
        found = _mean(rows)
        interval = None
        if len(groups) >= 5:
            draws = np.random.default_rng(seed).integers(len(groups), size=(RESAMPLES, len(groups)))
            values = [
                _mean(rows[[i for group in draw for i in members[group]], :1])[0] for draw in draws
            ]
            if not np.isnan(values).all():
                interval = [round(100 * v, 2) for v in np.nanpercentile(values, [2.5, 97.5])]
        return {
            "volumes": len(rows), "volumes_incomplete": self.incomplete,
            "volume_dice": None if math.isnan(found[0]) else round(100 * found[0], 2),
            "volume_dice_ci": interval,
            "volume_hd95": None if math.isnan(found[1]) else round(found[1], 2),
        }  # fmt: skip

    def write(self, folder: Path) -> None:
        """``volumes.csv``, a line for each volume and class."""
        self.close()
        with open(folder / "volumes.csv", "w", newline="", encoding="utf-8") as file:
            lines = csv.writer(file)
            lines.writerow(["volume", "group", "class", "dice", "hd95_mm"])
            for name, group, row in self._rows:
                for number, (share, distance) in enumerate(row.T, 1):
                    cells = f"{share:.4f}", f"{distance:.3f}"
                    lines.writerow([name, group, self.classes[number], *cells])


def dice(truth: np.ndarray, guess: np.ndarray) -> float:
    """Twice what two bool arrays share, over the sum of both; nan if both are empty."""
    total = int(truth.sum()) + int(guess.sum())
    return 2 * int((truth & guess).sum()) / total if total else math.nan


def hausdorff95(truth: np.ndarray, guess: np.ndarray, spacing: Sequence[float]) -> float:
    """The 95th percentile of the distances from one surface to the other, the larger of both ways.

    A surface is the voxels that have a neighbour, by a face, outside of the object or of the array;
    an axis of one voxel does not count. nan if both are empty, the array's diagonal if one is.

    Args:
        truth, guess: bool arrays. spacing: from voxel to voxel along each axis.
    Reference: MONAI's HausdorffDistanceMetric(percentile=95).
    """
    from scipy.ndimage import binary_erosion, distance_transform_edt

    if not truth.any() and not guess.any():
        return math.nan
    if not truth.any() or not guess.any():
        return math.dist([0.0] * truth.ndim, np.multiply(truth.shape, spacing))
    # The rest is far from both objects, and nothing there is nearest to anything.
    places = np.nonzero(truth | guess)
    box = tuple(slice(int(p.min()), int(p.max()) + 1) for p in places)
    wide = [axis for axis, side in enumerate(truth.shape) if side > 1]
    shape = [box[axis].stop - box[axis].start for axis in wide]
    objects = [x[box].reshape(shape) for x in (truth, guess)]
    if not wide:
        return 0.0
    surfaces = [x & ~binary_erosion(x) for x in objects]
    step = [spacing[axis] for axis in wide]
    ways = (distance_transform_edt(~to, sampling=step)[of] for of, to in (surfaces, surfaces[::-1]))
    return max(float(np.percentile(way, 95)) for way in ways)


def _mean(rows: np.ndarray) -> np.ndarray:
    """(volumes, figures, classes) -> (figures,): over the volumes, then over the classes."""
    there = ~np.isnan(rows)
    counts, sums = there.sum(0), np.where(there, rows, 0).sum(0)
    means = np.divide(sums, counts, out=np.full(sums.shape, math.nan), where=counts > 0)
    known = (counts > 0).sum(1)
    total = np.where(counts > 0, means, 0).sum(1)
    return np.divide(total, known, out=np.full(total.shape, math.nan), where=known > 0)
