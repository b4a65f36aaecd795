"""Values that are NaN or infinite are refused by name; every other value passes."""

import numpy as np
import pytest
import torch

from vim_ssl.utils.numbers import NotFinite, finite_rows, require_finite

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("values", "count", "row"),
    [
        (torch.tensor([[0.0, 1], [NAN, 2], [INF, NAN]]), "3 of 6", 1),
        (np.array([1.0, -INF, INF]), "2 of 3", 1),
        (torch.tensor([1.0, NAN], dtype=torch.bfloat16), "1 of 2", 1),
        (torch.tensor(NAN), "1 of 1", 0),
    ],
)
def test_the_number_of_wrong_values_and_the_first_row_are_named(values, count, row):
    says = f"the scores: {count} values are not finite .*the first in row {row}; look again"
    with pytest.raises(NotFinite, match=says):
        require_finite(values, "the scores", "look again")


@pytest.mark.parametrize(
    "values",
    [
        torch.tensor([3.0e38, 3.0e38]), torch.full((9,), 60_000.0, dtype=torch.float16),
        np.full(4, 1.7e308), torch.empty(0, 5), torch.tensor([1, 2]), torch.tensor([True]), [0.5],
    ],
    ids=["large", "half", "sum-overflows", "empty", "integers", "bool", "list"],
)  # fmt: skip
def test_finite_values_pass(values):
    require_finite(values, "the scores")


def test_rows_are_finite_as_a_whole():
    x = torch.tensor([[0.0, 1], [NAN, 2], [3, INF]])
    assert finite_rows(x).tolist() == [True, False, False]
    assert finite_rows(x[:0]).tolist() == []
