"""Baselines of classification: the most frequent class, and neighbours of raw pixels."""

import numpy as np
import pytest
import torch

from vim_ssl import VimEncoder
from vim_ssl.data import ImageData
from vim_ssl.evaluation import baselines
from vim_ssl.evaluation.baselines import (
    KNN_PIXELS,
    MOST_FREQUENT,
    classification_baselines,
    compare_with,
    most_frequent,
)
from vim_ssl.metrics.classification import accuracy


def encoder() -> VimEncoder:
    return VimEncoder(img_size=16, patch_size=8, in_chans=1, embed_dim=8, depth=1, num_classes=3)


def levels(count: int, labels, seed: int) -> ImageData:
    """Grey images; the class is the level."""
    draw = np.random.default_rng(seed)
    classes = [int(np.argmax(label)) if np.ndim(label) else label for label in labels]
    arrays = []
    for label in classes:
        values = draw.integers(0, 40, (16, 16, 1))
        values[5 * label : 5 * label + 5] += 150
        arrays.append(values.astype(np.uint8))
    return ImageData(arrays, map(str, range(count)), name="levels", labels=labels, bands=["L"])


def test_a_class_is_answered_without_looking():
    assert most_frequent(torch.tensor([2, 0, 2, 1]), 3).tolist() == [2, 2, 2]
    shares = most_frequent(torch.tensor([[1, 0], [1, 1]]), 2)
    assert shares.tolist() == [[1.0, 0.5]] * 2


@pytest.mark.parametrize("several", [False, True], ids=["single", "several"])
def test_baselines_use_the_splits_of_the_result(several):
    labels = [0] * 20 + [1] * 10 + [2] * 10
    of_test = [0, 1, 2, 2]
    rows = (lambda ys: np.eye(3, dtype=int)[ys].tolist()) if several else list
    train, test = levels(40, rows(labels), 0), levels(4, rows(of_test), 1)
    truth = torch.tensor(rows(of_test))
    found = classification_baselines(encoder(), train, test, truth, batch_size=8, workers=0)
    assert list(found) == [MOST_FREQUENT, KNN_PIXELS]
    assert found[KNN_PIXELS].value == 100  # the levels are easy
    # One of four images; the mean precision of constant scores is the mean share of the labels.
    assert found[MOST_FREQUENT].value == pytest.approx(100 / 3 if several else 25)


def test_raw_pixels_are_left_out_if_all_training_images_are_of_one_group():
    train, test = levels(9, [0, 1, 2] * 3, 0), levels(3, [0, 1, 2], 1)
    train.groups = ["one site"] * 9
    found = classification_baselines(encoder(), train, test, torch.tensor([0, 1, 2]))
    assert list(found) == [MOST_FREQUENT]


def test_raw_pixels_are_left_out_if_there_are_too_many_images(monkeypatch):
    monkeypatch.setattr(baselines, "MAX_IMAGES", 10)
    monkeypatch.setattr(baselines, "extract_features", None)  # no image is read
    train, test = levels(9, [0, 1, 2] * 3, 0), levels(3, [0, 1, 2], 1)
    found = classification_baselines(encoder(), train, test, torch.tensor([0, 1, 2]))
    assert list(found) == [MOST_FREQUENT]


def test_the_record_and_the_sentence_have_paired_intervals():
    """Two classifiers with the same errors do not differ, however wide their intervals are."""
    truth = np.arange(40) % 2
    right, wrong = truth.copy(), 1 - truth
    right[:4] = wrong[:4]
    written = compare_with(
        "Top-1 accuracy", accuracy(right, truth),
        {"same": accuracy(right, truth), "constant": accuracy(0 * truth, truth)}, "top1", None,
    )  # fmt: skip
    assert written["baselines"]["constant"]["top1"] == 50.0
    low, high = written["baselines"]["constant"]["top1_ci"]
    assert low < 50 < high
    (sentence,) = written["summary"]
    assert sentence.startswith(
        "Top-1 accuracy 90.0 %: no measurable difference from same (95 % interval −8.8 to 8.8), "
        "40.0 points above constant ("
    )
