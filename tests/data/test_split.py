"""Splits keep classes in proportion and groups whole."""

from collections import Counter

import numpy as np
import pytest

from vim_ssl.data import stratified_split
from vim_ssl.data.split import as_key, few_of_each, hold_out, is_known


@pytest.mark.parametrize("fraction", [0.1, 0.2, 0.5, 0.75])
def test_every_class_gives_its_share(fraction):
    labels = [0] * 100 + [1] * 40 + [2] * 20
    first, second = stratified_split(labels, fraction, seed=0)
    assert sorted(first + second) == list(range(160))
    assert second == sorted(second)
    count = Counter(labels[i] for i in second)
    assert count == {0: 100 * fraction, 1: 40 * fraction, 2: 20 * fraction}


def test_seeds():
    labels = [0, 1] * 50
    assert stratified_split(labels, 0.2, seed=1) == stratified_split(labels, 0.2, seed=1)
    assert stratified_split(labels, 0.2, seed=1) != stratified_split(labels, 0.2, seed=2)


def test_classes_too_small_for_their_share_take_turns():
    labels = [i // 2 for i in range(200)]  # 100 classes of two
    first, second = stratified_split(labels, 0.1, seed=0)
    assert len(second) == 20
    assert max(Counter(labels[i] for i in second).values()) == 1
    assert {labels[i] for i in first} == set(labels)


@pytest.mark.parametrize("seed", range(5))
def test_a_group_stays_on_one_side(seed):
    draw = np.random.default_rng(seed)
    sizes = draw.integers(1, 12, 80)
    groups = [f"p{g}" for g, size in enumerate(sizes) for _ in range(size)]
    labels = [g % 3 for g, size in enumerate(sizes) for _ in range(size)]
    first, second = stratified_split(labels, 0.25, seed, groups)
    assert not {groups[i] for i in first} & {groups[i] for i in second}
    for label in range(3):
        share = sum(labels[i] == label for i in second) / labels.count(label)
        assert 0.15 < share < 0.35


def test_one_huge_group_does_not_swallow_the_second_side():
    groups = ["huge"] * 900 + ["a"] * 50 + ["b"] * 50
    for seed in range(5):
        first, second = stratified_split([0, 1] * 500, 0.1, seed, groups)
        assert len(second) in (50, 100)
        assert len(first) + len(second) == 1000


@pytest.mark.parametrize("seed", range(8))
def test_few_patients_of_every_class_are_on_both_sides(seed):
    """Though one has most of the images: what is then due would take whole classes."""
    patients = ((2, 2, 1), (1, 2, 10), (1, 2, 2, 120, 1), (2, 2), (1,))  # images, by class
    labels = [label for label, sizes in enumerate(patients) for _ in range(sum(sizes))]
    groups = [f"{label}-{p}" for label, sizes in enumerate(patients)
              for p, size in enumerate(sizes) for _ in range(size)]  # fmt: skip
    first, second = stratified_split(labels, 0.2, seed, groups)
    assert not {groups[i] for i in first} & {groups[i] for i in second}
    for side in (first, second):
        assert {labels[i] for i in side} >= {0, 1, 2, 3}
    assert 4 in {labels[i] for i in first}  # the class of a single patient can be learned


@pytest.mark.parametrize("seed", range(4))
def test_classes_of_one_patient_each_stay_on_the_first_side(seed):
    labels = [0] * 120 + [1] * 10 + [2] * 3 + [3] * 2
    groups = ["a"] * 120 + ["b"] * 10 + ["c"] * 2 + ["d"] + ["e"] * 2
    first, second = stratified_split(labels, 0.2, seed, groups)
    assert {labels[i] for i in first} == {0, 1, 2, 3}
    assert {labels[i] for i in second} == {2}


@pytest.mark.parametrize("seed", range(3))
def test_patients_with_several_labels_keep_the_share(seed):
    """Nearly every patient is the only one of his combination of 14 labels."""
    rows = np.random.default_rng(seed).integers(2, size=(300, 14)).repeat(3, axis=0)
    second = stratified_split(rows, 0.2, seed, [f"p{i // 3}" for i in range(900)])[1]
    assert 170 <= len(second) <= 190


def test_of_two_patients_one_is_held_out_whatever_they_have():
    assert stratified_split([0, 0, 1], 0.3, 0, ["a", "a", "b"]) == ([0, 1], [2])


def test_classes_too_small_for_their_share_take_turns_in_groups_too():
    labels = [i // 4 for i in range(400)]  # 100 classes of two patients with two images
    second = stratified_split(labels, 0.05, 0, [f"p{i // 2}" for i in range(400)])[1]
    assert 16 <= len(second) <= 24


@pytest.mark.parametrize("fraction", [0.01, 0.99])
def test_neither_side_is_empty(fraction):
    first, second = stratified_split([0, 0, 1], fraction, seed=0)
    assert first
    assert second


@pytest.mark.parametrize(
    ("labels", "fraction", "groups", "message"),
    [
        ([0, 1], 0, None, "fraction 0 "),
        ([0, 1], 1.0, None, "between 0 and 1"),
        ([0], 0.5, None, "two images"),
        ([0, 1], 0.5, ["a", "a"], "two groups"),
        ([0, 1], 0.5, ["a"], "1 groups for 2 labels"),
    ],
)
def test_errors(labels, fraction, groups, message):
    with pytest.raises(ValueError, match=message):
        stratified_split(labels, fraction, 0, groups)


def test_hold_out_does_not_depend_on_order():
    keys = [f"{i:03d}" for i in range(100)]
    strata = [i % 4 for i in range(100)]
    held = hold_out(keys, strata, 0.2, salt="x")
    assert held == hold_out(keys[::-1], strata[::-1], 0.2, salt="x")
    assert held != hold_out(keys, strata, 0.2, salt="y")
    assert Counter(int(key) % 4 for key in held) == dict.fromkeys(range(4), 5)


@pytest.mark.parametrize("kind", [list, np.array], ids=["lists", "arrays"])
def test_images_with_several_labels_are_split_by_their_rows(kind):
    rows = [kind([i % 2, i % 5 == 0, 0]) for i in range(100)]
    first, second = stratified_split(rows, 0.2, seed=0)
    assert sorted(first + second) == list(range(100))
    assert Counter(as_key(rows[i]) for i in second) == {
        key: count / 5 for key, count in Counter(map(as_key, rows)).items()
    }


@pytest.mark.parametrize(
    ("label", "known"),
    [(0, True), (7, True), (-1, False), ([0, 1, 0], True), (np.array([0, -1]), False)],
    ids=str,
)
def test_a_label_is_known_or_not(label, known):
    assert is_known(label) is known


def test_few_of_each_class_are_drawn_by_the_seed():
    labels = [0, 1, 2, 1, 0, 2, 2, 1, 0, 1] * 3
    chosen = [few_of_each(labels, 4, seed) for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]
    for indices in chosen:
        assert sorted(labels[i] for i in indices) == [0] * 4 + [1] * 4 + [2] * 4
        assert len(set(indices)) == 12
    assert len(few_of_each([0, 0, 1], 2, 0)) == 3  # a class with fewer gives all it has
