"""AUC and accuracy: MedMNIST's, figure for figure."""

import numpy as np
import pytest

from vim_ssl.data.sources.medmnist import BINARY, MULTI_CLASS, MULTI_LABEL
from vim_ssl.metrics.medmnist import (
    ORDINAL,
    TASKS,
    _checked,
    _metrics,
    medmnist_accuracy,
    medmnist_auc,
    medmnist_metrics,
)

CASES = {  # task → (truth's shape or number of classes, columns of the scores)
    BINARY: (2, 2),
    MULTI_CLASS: (5, 5),
    ORDINAL: (5, 5),
    MULTI_LABEL: (4, 4),
}


def case(task, n=60):
    draw = np.random.default_rng(TASKS.index(task))
    classes, columns = CASES[task]
    if task == MULTI_LABEL:
        truth = draw.integers(0, 2, (n, classes))
    else:
        truth = draw.integers(0, classes, (n, 1))
    scores = draw.random((n, columns)).round(1)  # with ties
    return truth, scores


@pytest.mark.parametrize("task", TASKS)
def test_equal_to_the_official_evaluator(task):
    evaluator = pytest.importorskip("medmnist.evaluator", exc_type=ImportError)
    truth, scores = case(task)
    assert medmnist_auc(truth, scores, task) == pytest.approx(
        evaluator.getAUC(truth, scores, task), abs=1e-12
    )
    assert medmnist_accuracy(truth, scores, task) == pytest.approx(
        evaluator.getACC(truth, scores, task), abs=1e-12
    )


def area(truth, scores):
    """The share of pairs that are ranked right, ties counting half."""
    above, below = scores[truth == 1][:, None], scores[truth == 0][None]
    return ((above > below) + 0.5 * (above == below)).mean()


@pytest.mark.parametrize("task", TASKS)
def test_equal_to_the_definition(task):
    truth, scores = case(task)
    if task == BINARY:
        auc, acc = area(truth[:, 0], scores[:, 1]), (truth[:, 0] == (scores[:, 1] > 0.5)).mean()
    elif task == MULTI_LABEL:
        auc = np.mean([area(truth[:, i], scores[:, i]) for i in range(4)])
        acc = (truth == (scores > 0.5)).mean()
    else:
        auc = np.mean([area((truth[:, 0] == i).astype(int), scores[:, i]) for i in range(5)])
        acc = (truth[:, 0] == scores.argmax(1)).mean()
    assert medmnist_auc(truth, scores, task) == pytest.approx(auc, abs=1e-12)
    assert medmnist_accuracy(truth, scores, task) == pytest.approx(acc, abs=1e-12)


@pytest.mark.parametrize(
    ("truth", "scores", "task", "message"),
    [
        (np.zeros((3, 1)), np.zeros((3, 2)), "multiclass", "is not one of 'binary-class'"),
        (np.zeros((3, 1)), np.zeros(3), MULTI_CLASS, r"truth \(3, 1\) and scores \(3,\)"),
        (np.zeros((3, 2)), np.zeros((3, 4)), MULTI_LABEL, "do not fit"),
        (np.zeros(3), np.zeros((4, 2)), MULTI_CLASS, "one row per sample"),
    ],
)
def test_errors(truth, scores, task, message):
    with pytest.raises(ValueError, match=message):
        medmnist_auc(truth, scores, task)


def test_a_volume_has_the_mean_score_of_its_planes():
    planes = np.array([[0.9, 0.1], [0.2, 0.8], [0.4, 0.6], [0.2, 0.8], [0.9, 0.1]])
    truth, volumes = np.array([0, 1, 0, 1, 1]), ["b", "a", "b", "a", "a"]
    found = medmnist_metrics(truth, planes, BINARY, volumes)
    wholes = np.array([[0.65, 0.35], [1.3 / 3, 1.7 / 3]])
    assert found == medmnist_metrics(np.array([0, 1]), wholes, BINARY)
    assert (found["auc"], found["acc"]) == (1.0, 1.0)
    found = medmnist_metrics(truth, planes, BINARY)
    assert (found["auc"], found["acc"]) == (0.75, 0.6)
    found = medmnist_metrics(truth[:1], planes[:1], BINARY)
    assert (found["auc"], found["acc"]) == (None, 1.0)


@pytest.mark.parametrize("task", TASKS)
def test_the_area_over_weighted_samples_is_scikit_learns(task):
    from sklearn.metrics import roc_auc_score

    truth, scores = _checked(*case(task), task)
    weights = np.random.default_rng(1).integers(0, 3, len(truth)).astype(float)
    weights[:15] += 1  # so that every class has some
    found = _metrics(truth, scores, task)["auc"].weighted(weights)
    if task in (MULTI_CLASS, ORDINAL):
        truth = truth[:, None] == np.arange(scores.shape[1])
    columns = zip(truth.reshape(60, -1).T, scores.reshape(60, -1).T, strict=True)
    areas = [roc_auc_score(*pair, sample_weight=weights) for pair in columns]
    assert found == pytest.approx(100 * np.mean(areas), abs=1e-9)
