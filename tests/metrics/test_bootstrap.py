"""Figures and their intervals: scikit-learn's average precision, honest bootstraps."""

import numpy as np
import pytest
import torch

from vim_ssl.metrics.bootstrap import wilson_interval
from vim_ssl.metrics.classification import accuracy, mean_average_precision


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


def test_of_a_single_group_the_images_are_drawn():
    figure = accuracy([i < 7 for i in range(10)], [True] * 10)
    assert figure.interval(["one"] * 10) == figure.interval() == wilson_interval(70.0, 10)


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
