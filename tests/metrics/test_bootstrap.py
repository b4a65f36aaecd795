"""Figures and their intervals: scikit-learn's average precision, honest bootstraps."""

import numpy as np
import pytest
import torch

from vim_ssl.metrics.bootstrap import Metric, wilson_interval
from vim_ssl.metrics.classification import (
    accuracy,
    balanced_accuracy,
    classification_metrics,
    mean_average_precision,
)
from vim_ssl.metrics.medmnist import MULTI_CLASS, medmnist_metrics
from vim_ssl.metrics.segmentation import SegmentationMetrics
from vim_ssl.metrics.volumes import VolumeMetrics


def ranking(n: int = 200, classes: int = 4, ties: bool = False):
    """Scores that know a little of the truth; with ties only five values are taken."""
    draw = np.random.default_rng(0)
    truth = (draw.random((n, classes)) < np.linspace(0.05, 0.6, classes)).astype(int)
    scores = truth + 1.5 * draw.standard_normal((n, classes))
    return (np.round(scores).clip(-1, 3) if ties else scores), truth


@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize("average", ["macro", "micro"])
def test_average_precision_is_scikit_learns(average, ties):
    from sklearn.metrics import average_precision_score

    scores, truth = ranking(ties=ties)
    figure = mean_average_precision(torch.tensor(scores), torch.tensor(truth))[average]
    expected = 100 * average_precision_score(truth, scores, average=average)
    assert figure.value == pytest.approx(expected, abs=1e-9)
    weights = np.random.default_rng(1).integers(0, 3, len(truth)).astype(float)
    again = 100 * average_precision_score(truth, scores, average=average, sample_weight=weights)
    assert figure.weighted(weights) == pytest.approx(again, abs=1e-9)


def test_a_class_without_an_image_does_not_count():
    scores, truth = ranking()
    with_more = np.concatenate([truth, np.zeros((len(truth), 1), int)], axis=1)
    wider = np.concatenate([scores, scores[:, :1]], axis=1)
    expected = mean_average_precision(scores, truth)["macro"].value
    assert mean_average_precision(wider, with_more)["macro"].value == pytest.approx(expected)


def test_the_bootstrap_of_a_share_is_about_wilsons():
    right = np.arange(400) % 10 < 7
    figure = accuracy(right, np.ones(400, bool))
    assert figure.interval() == wilson_interval(70.0, 400)
    pairs = [str(i // 2) for i in range(400)]  # of which seven in ten are right, as of images
    both = accuracy(np.repeat(right[:200], 2), np.ones(400, bool))
    assert both.interval(pairs) == pytest.approx(wilson_interval(70.0, 200), abs=1.5)


def test_groups_of_one_image_each_are_no_groups():
    """So that of 0 and 100 % something is said, too."""
    figure = accuracy([1] * 20, [1] * 20)
    alone = [str(i) for i in range(20)]
    assert figure.interval(alone) == figure.interval() == wilson_interval(100.0, 20)


def test_images_of_one_group_count_as_one():
    """Four hundred images of ten patients, all of a patient's right or all wrong."""
    groups = [str(i // 40) for i in range(400)]
    figure = accuracy([int(group) < 7 for group in groups], [True] * 400)
    plain, grouped = figure.interval(), figure.interval(groups)
    assert grouped[1] - grouped[0] > 4 * (plain[1] - plain[0])


def test_of_few_groups_there_is_no_interval():
    """Ten images of one patient, or of four, say next to nothing of other patients."""
    figure = accuracy([i < 7 for i in range(10)], [True] * 10)
    for groups in (["one"] * 10, [str(i % 4) for i in range(10)]):
        assert figure.estimate(groups) == (None, "fewer than 5 groups")
    assert figure.interval([str(i % 5) for i in range(10)]) is not None


def test_images_without_a_group_are_groups_of_their_own():
    figure = accuracy([i < 7 for i in range(20)], [True] * 20)
    for nothing in ("", None):
        some = ["patient"] * 2 + [nothing] * 18
        low, high = figure.interval(some)
        assert (low, high) == figure.interval(["patient"] * 2 + [f"x{i}" for i in range(10, 28)])
    assert figure.interval([None] * 20) == figure.interval()


def test_a_difference_on_the_same_images_is_surer_than_two_intervals():
    truth = np.arange(500) % 5
    first = np.where(np.arange(500) % 3 == 0, (truth + 1) % 5, truth)
    second = np.where(np.arange(500) % 50 == 0, (truth + 1) % 5, first)  # a few more mistakes
    better, worse = accuracy(first, truth), accuracy(second, truth)
    low, high = (better - worse).interval()
    assert 0 < low < better.value - worse.value < high
    assert better.interval()[0] < worse.interval()[1]  # which taken alone do not part them


def test_the_same_seed_draws_the_same_interval():
    figure = mean_average_precision(*ranking())["macro"]
    assert figure.interval(seed=3) == figure.interval(seed=3)
    assert figure.interval(seed=3) != figure.interval(seed=4)


@pytest.mark.parametrize("n", [100, 400])
def test_a_bootstrap_covers_95_percent(n):
    """Of a mean of 0 and 100 the standard error is 50 / √n; at 90 % it would be 1.645 of them."""
    values = 100.0 * (np.arange(n) % 2)
    low, high = Metric(lambda w: float(w @ values / w.sum()), n).interval()
    assert (high - low) / 2 == pytest.approx(1.96 * 50 / n**0.5, rel=0.06)


# ------------------------------------------------------------------------- never a point


def classes_of(n: int, right: bool) -> dict:
    labels = torch.arange(n) % 3
    logits = torch.nn.functional.one_hot(labels if right else (labels + 1) % 3, 7).float()
    return classification_metrics(logits, labels, "class")


def ordinal_of(n: int, right: bool) -> dict:
    labels = torch.arange(n) % 3
    logits = (labels[:, None] > torch.arange(2)).float() - 0.5
    return classification_metrics(logits if right else 0 * logits - 1, labels, "ordinal")


def several_labels_of(n: int, right: bool) -> dict:
    labels = torch.nn.functional.one_hot(torch.arange(n) % 3, 3)
    logits = labels - 0.5 if right else 0.5 - labels
    return classification_metrics(logits, labels, "multi-label")


def masks_of(n: int, right: bool) -> dict:
    scores, mask = SegmentationMetrics(["a", "b"]), np.eye(4, dtype=np.uint8)
    for i in range(n):
        scores.add(str(i), mask, mask if right else 1 - mask)
    return scores.compute()


def volumes_of(n: int, right: bool) -> dict:
    scores, mask = VolumeMetrics(["none", "organ"]), np.eye(4, dtype=np.uint8)
    for i in range(n):
        plane = {"volume": str(i), "plane": 0, "planes": 1, "spacing": (1, 1, 1)}
        scores.add(plane, mask, mask if right else 1 - mask)
    return scores.compute()


def medmnist_of(n: int, right: bool) -> dict:
    truth = np.arange(n) % 3
    scores = np.eye(3)[truth if right else (truth + 1) % 3]
    return medmnist_metrics(truth, scores, MULTI_CLASS)


@pytest.mark.parametrize("right", [True, False], ids=["right", "wrong"])
@pytest.mark.parametrize("n", [1, 3, 5, 30])
@pytest.mark.parametrize(
    "figures", [classes_of, ordinal_of, several_labels_of, masks_of, volumes_of, medmnist_of]
)
def test_no_interval_is_a_point(figures, n, right):
    found = figures(n, right)
    intervals = [name for name in found if name.endswith("_ci")]
    assert intervals
    for name in intervals:
        if found[name] is None:
            assert found[f"{name}_none"]
            continue
        low, high = found[name]
        assert low < high
        assert low <= found[name.removesuffix("_ci")] <= high


def test_one_reason_stands_beside_each_missing_interval():
    found = classes_of(3, True)
    assert found["top1_ci"] == wilson_interval(100, 3) == (43.85, 100)
    assert found["balanced_accuracy_ci_none"] == "fewer than 5 images"
    assert classes_of(30, True)["balanced_accuracy_ci_none"] == "the resamples have the same value"


def test_groups_that_are_all_right_are_as_sure_as_their_number():
    groups = [str(i // 8) for i in range(80)]
    sure = accuracy([1] * 80, [1] * 80).interval(groups)
    assert sure == wilson_interval(100, 10)
    halves = accuracy([i % 2 for i in range(80)], [1] * 80)  # half of each group
    assert halves.interval(groups) == wilson_interval(50, 10)


@pytest.mark.parametrize(("ours", "theirs"), [(1, 1), (1, 0), (0, 1), (0, 0)])
def test_a_difference_without_variation_is_that_of_tango(ours, theirs):
    """statsmodels' and Tango's score interval; that of independent images, too, and of groups."""
    n, z = 20, 1.96
    gain = accuracy([ours] * n, [1] * n) - accuracy([theirs] * n, [1] * n)
    half = 100 * z * z / (n + z * z)
    value = 100 * (ours - theirs)
    expected = (-half, half) if not value else sorted((value, value - np.sign(value) * 2 * half))
    assert gain.interval() == pytest.approx(expected, abs=0.006)
    wide = gain.interval([str(i // 2) for i in range(n)])
    assert wide[1] - wide[0] > gain.interval()[1] - gain.interval()[0]
    few = accuracy([ours] * 4, [1] * 4) - accuracy([theirs] * 4, [1] * 4)
    assert few.estimate() == (None, "fewer than 5 images")


def test_a_difference_too_small_for_two_decimals_is_rounded_outwards():
    """As of one image in a million."""
    right = np.arange(20) > 0
    gain = Metric(lambda w: 1e-4 * float(w @ right / w.sum()) - 1e-4, 20)
    low, high = gain.interval()
    assert low < gain.value < high


def test_an_undefined_metric_has_no_interval():
    truth = np.zeros((6, 2), int)
    found = mean_average_precision(np.random.default_rng(0).random((6, 2)), truth)["macro"]
    assert found.entries("map") == {
        "map": None, "map_ci": None, "map_ci_none": "the value is undefined"
    }  # fmt: skip
    assert balanced_accuracy(np.array([0, 1] * 3), np.array([0, 1, 1] * 2)).interval() is not None
