"""Figures of volumes equal a naive count; what is empty, missed or incomplete is as described."""

import csv
import math

import numpy as np
import pytest

from vim_ssl.metrics.volumes import VolumeMetrics, dice, hausdorff95

SPACING = (3.0, 1.0, 0.5)


def blobs(seed: int, shape=(5, 9, 8)) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centre = [rng.uniform(0.3, 0.7) * side for side in shape]
    at = np.indices(shape)
    return sum((a - c) ** 2 for a, c in zip(at, centre, strict=True)) < rng.uniform(3, 9)


def naive(truth: np.ndarray, guess: np.ndarray, spacing) -> float:
    """All pairs of surface voxels."""

    def surface(x: np.ndarray) -> np.ndarray:
        padded = np.pad(x, 1)
        inner = np.ones_like(padded)
        for axis in range(x.ndim):
            for step in (-1, 1):
                inner &= np.roll(padded, step, axis)
        return np.argwhere(padded & ~inner) * spacing

    a, b = surface(truth), surface(guess)
    between = np.linalg.norm(a[:, None] - b[None], axis=-1)
    return max(np.percentile(between.min(axis), 95) for axis in (0, 1))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), SPACING], ids=str)
def test_the_distance_is_that_of_all_pairs(seed, spacing):
    truth, guess = blobs(seed), blobs(seed + 50)
    assert hausdorff95(truth, guess, spacing) == pytest.approx(naive(truth, guess, spacing))
    assert hausdorff95(truth, truth, spacing) == 0


@pytest.mark.parametrize(
    ("seed", "even", "uneven"),
    [(0, 3.605551, 3.711177), (1, 3.162278, 6.091994), (2, 1.668483, 3.162278),
     (3, 2.385463, 2.236068)],
)  # fmt: skip
def test_the_distance_is_that_of_monai(seed, even, uneven):
    """What compute_hausdorff_distance(percentile=95) of MONAI 1.6.1 gives for these objects."""
    pair = blobs(seed), blobs(seed + 50)
    assert hausdorff95(*pair, (1.0, 1.0, 1.0)) == pytest.approx(even, rel=1e-5)
    assert hausdorff95(*pair, SPACING) == pytest.approx(uneven, rel=1e-5)


@pytest.mark.parametrize("shape", [(1, 9, 8), (5, 9, 1), (1, 1, 8)], ids=str)
def test_an_axis_of_one_voxel_has_no_surface(shape):
    truth, guess = np.zeros(shape, bool), np.zeros(shape, bool)
    wide = tuple(slice(0, None) if side == 1 else slice(1, 6) for side in shape)
    truth[wide] = True
    guess[tuple(slice(0, None) if side == 1 else slice(2, 7) for side in shape)] = True
    flat = naive(truth.squeeze(), guess.squeeze(), [1.0] * truth.squeeze().ndim)
    assert hausdorff95(truth, guess, (1.0, 1.0, 1.0)) == pytest.approx(flat)


def test_what_is_empty():
    empty, there = np.zeros((5, 9, 8), bool), blobs(0)
    assert math.isnan(dice(empty, empty))
    assert math.isnan(hausdorff95(empty, empty, SPACING))
    diagonal = math.hypot(15, 9, 4)
    for pair in ((empty, there), (there, empty)):
        assert dice(*pair) == 0
        assert hausdorff95(*pair, SPACING) == pytest.approx(diagonal)


def volume(scores: VolumeMetrics, name: str, truth, guess, group=None, planes=None) -> None:
    for number, pair in enumerate(zip(truth, guess, strict=True)):
        place = {"volume": name, "plane": number, "planes": planes or len(truth)}
        scores.add(place | {"spacing": SPACING}, *pair, group)


def test_the_figures_are_means_over_volumes_and_then_classes(tmp_path):
    scores = VolumeMetrics(["none", "organ", "tumour", "never"])
    shares: dict[int, list] = {1: [], 2: []}
    far: dict[int, list] = {1: [], 2: []}
    for i in range(6):
        truth, guess = np.uint8(blobs(i)), np.uint8(blobs(i + 50))
        if i < 2:  # two of the volumes have a tumour
            truth[2:, 4:, 4:], guess[2:, 4:, 5:] = 2, 2
        for k in shares:
            if (truth == k).any() or (guess == k).any():
                pair = truth == k, guess == k
                shares[k].append(2 * (pair[0] & pair[1]).sum() / (pair[0].sum() + pair[1].sum()))
                far[k].append(naive(*pair, SPACING))
        volume(scores, f"{i}.nii", truth, guess)
    found = scores.compute()
    assert (found["volumes"], found["volumes_incomplete"]) == (6, [])
    mean = np.mean([np.mean(values) for values in shares.values()])
    assert found["volume_dice"] == pytest.approx(100 * mean, abs=0.006)
    mean = np.mean([np.mean(values) for values in far.values()])
    assert found["volume_hd95"] == pytest.approx(mean, abs=0.006)
    low, high = found["volume_dice_ci"]
    assert low < found["volume_dice"] < high
    scores.write(tmp_path)
    with open(tmp_path / "volumes.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 18
    assert rows[2]["class"] == "never"
    assert rows[2]["dice"] == rows[2]["hd95_mm"] == "nan"


def test_groups_ignored_voxels_and_lost_planes():
    truth, guess = np.uint8(blobs(0)), np.uint8(blobs(0))
    wrong = guess.copy()
    wrong[0] = 1
    unknown = truth.copy()
    unknown[0] = 255
    grouped = VolumeMetrics(["none", "organ"])
    for i in range(6):
        volume(grouped, f"{i}", unknown, wrong, group=f"patient{i // 3}")
    volume(grouped, "cut", truth, guess, planes=7)
    volume(grouped, "last", truth, guess)
    found = grouped.compute()
    assert (found["volumes"], found["volumes_incomplete"]) == (7, ["cut"])
    assert (found["volume_dice"], found["volume_hd95"], found["volume_dice_ci"]) == (100, 0, None)
    nothing = VolumeMetrics(["none", "organ"])
    volume(nothing, "a", truth * 0, truth * 0)
    assert nothing.compute()["volume_dice"] is nothing.compute()["volume_hd95"] is None
    assert VolumeMetrics(["none", "organ"]).compute()["volumes"] == 0


def test_a_single_class_gives_no_score():
    metrics = VolumeMetrics(["background"])
    empty = np.zeros((2, 2), np.uint8)
    metrics.add({"volume": "a", "plane": 0, "planes": 1, "spacing": (1, 1, 1)}, empty, empty)
    values = metrics.compute()
    assert (values["volumes"], values["volume_dice"], values["volume_dice_ci"]) == (1, None, None)
