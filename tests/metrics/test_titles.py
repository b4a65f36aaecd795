"""Titles of metrics say how they were measured, and a sentence compares a result with baselines."""

import pytest

from vim_ssl.metrics.sentences import Gain, result_sentence
from vim_ssl.metrics.titles import (
    LOGGED,
    RESULTS,
    logged_title,
    measured_on,
    shows_top5,
    split_name,
)


def test_a_check_during_training_has_another_title_than_the_final_result():
    finals = {title.text for title in RESULTS.values()}
    logged = [logged_title(key) for key in LOGGED]
    logged += [logged_title(f"{split}_{key}") for split in ("val", "test") for key in RESULTS]
    texts = [title.text for title in logged]
    assert not finals & set(texts)
    named = [text for text in texts if "during training" not in text]
    assert len(set(named)) == len(named)


@pytest.mark.parametrize("key", ["knn_top1", "linear_top1"])
def test_a_check_says_its_protocol_and_n(key):
    title = logged_title(key, {"check_images": 500.0, "check_train_images": 2000.0})
    assert "in-training check" in title.text
    assert title.how.startswith("500 held-out images of the training split, 2,000 others to fit; ")
    assert ("k 20" if key == "knn_top1" else "C 0.1") in title.how
    earlier = logged_title(key, {})  # logged before the numbers of images were
    assert earlier.text == title.text
    assert "held-out" not in earlier.how


@pytest.mark.parametrize(
    ("key", "config", "split"),
    [
        ("val_top1", {"validation": 0.1}, "validation split"),
        ("val_top1", {"validation": 0.0}, "test split"),
        ("test_miou", {}, "test split"),
    ],
)
def test_a_metric_during_training_names_its_split(key, config, split):
    assert logged_title(key, None, config).text.endswith(f", {split}, during training")


def test_an_unknown_key_is_its_own_title():
    assert logged_title("target_std").text == "target_std"


@pytest.mark.parametrize(
    ("split", "text"),
    [
        ("test", "test split, n = 1,234 images"),
        ("val", "validation split, n = 1,234 images"),
        ("held out", "held-out images, n = 1,234"),
        ("all", "all images, n = 1,234"),
    ],
)
def test_where_a_metric_was_measured(split, text):
    assert measured_on(split, 1234) == text


def test_images_held_out_of_data_without_splits_are_named_so():
    class Data:
        split = "all"

    assert split_name(Data()) == "held out"
    assert split_name(Data(), held_out=False) == "all"
    Data.split = "val"
    assert split_name(Data()) == "val"


def test_top5_needs_ten_classes():
    assert [shows_top5(n) for n in (4, 9, 10, 1000)] == [False, False, True, True]


ABOVE = Gain("raw pixels", 3.14, (1.0, 5.2))
BELOW = Gain("kNN", -2.0, (-3.5, -0.5))
EQUAL = Gain("chance", -0.3, (-1.02, 0.4))


@pytest.mark.parametrize(
    ("gains", "rest"),
    [
        ([ABOVE, BELOW], ": 3.1 points above raw pixels (95 % interval 1.0 to 5.2), 2.0 below kNN "
                         "(0.5 to 3.5)."),
        ([EQUAL, ABOVE], ": no measurable difference from chance (95 % interval −1.0 to 0.4), 3.1 "
                         "points above raw pixels (1.0 to 5.2)."),
        ([Gain("one class", 4.0)], ": 4.0 points above one class (no interval: too few "
                                   "groups)."),
        ([Gain("one class", 0.0, None, "all alike")], ": no difference from one class (no "
                                                      "interval: all alike)."),
        ([], "; no baseline was evaluated."),
    ],
)  # fmt: skip
def test_the_sentence_says_above_below_or_no_difference(gains, rest):
    assert result_sentence("Linear probe", 76.2, gains) == f"Linear probe 76.2 %{rest}"
