"""Equal scores are in no order: whatever ties counts as if it were drawn."""

from itertools import permutations

import pytest
import torch

from vim_ssl.metrics.classification import answer_metrics, classification_metrics
from vim_ssl.metrics.ranking import hit_chances, top_k


def by_drawing(scores: list[float], right: list[bool], k: int) -> float:
    """The share of all orders of the keys in which a right one is among the first k."""
    orders = list(permutations(range(len(scores))))
    hits = [any(right[i] for i in sorted(order, key=lambda i: -scores[i])[:k]) for order in orders]
    return sum(hits) / len(hits)


@pytest.mark.parametrize(
    ("scores", "right"),
    [
        ([3, 2, 1, 0, -1], [0, 1, 0, 0, 0]),
        ([1, 1, 1, 1, 1], [0, 0, 1, 0, 0]),
        ([1, 1, 1, 1, 1], [1, 0, 1, 0, 0]),
        ([2, 1, 1, 1, 0], [0, 0, 1, 0, 1]),
        ([2, 1, 1, 0, 0], [0, 0, 0, 1, 1]),
        ([2, 2, 2, 1, 1], [1, 1, 0, 1, 0]),
        ([2, 1, 1, 0, 0], [0, 0, 0, 0, 0]),
    ],
)
def test_ties_count_as_the_mean_over_all_orders(scores, right):
    ks = (1, 2, 3, 5, 8)
    found = hit_chances(torch.tensor([scores]).float(), torch.tensor([right]).bool(), ks)
    assert found[:, 0].tolist() == pytest.approx([by_drawing(scores, right, k) for k in ks])


def test_a_tolerance_makes_rounded_cosines_equal():
    scores = torch.tensor([[0.5, 0.5 + 3e-7, 0.4]])
    assert top_k(scores, torch.tensor([0]), (1,))[0, 0] == 0
    assert top_k(scores, torch.tensor([0]), (1,), tolerance=1e-6)[0, 0] == 0.5


def test_labels_beyond_the_scores_are_never_hit_and_negative_ones_refused():
    scores = torch.zeros(2, 3)
    assert top_k(scores, torch.tensor([0, 7]), (1, 5)).tolist() == [[pytest.approx(1 / 3), 0],
                                                                     [1, 0]]  # fmt: skip
    with pytest.raises(ValueError, match="the labels have -1"):
        top_k(scores, torch.tensor([0, -1]), (1,))
    assert top_k(scores[:0], torch.tensor([], dtype=torch.int64), (1,)).shape == (1, 0)


@pytest.mark.parametrize("first", [0, 5])
def test_equal_logits_give_chance_whichever_classes_occur(first):
    """Not 100 %, as if the classes of the lowest numbers were preferred."""
    labels = torch.tensor([first, first + 1, first + 2, first + 3])
    found = classification_metrics(torch.zeros(4, 10), labels, "class")
    assert (found["top1"], found["top5"]) == (10, 50)


def test_equal_votes_of_neighbours_count_in_part():
    votes = torch.tensor([[0.5, 0.5, 0], [0, 0.4, 0.6]])
    assert answer_metrics(votes, torch.tensor([0, 2]))["main"].value == 75
    assert answer_metrics(votes, torch.tensor([1, 2]))["main"].value == 75
