"""Masks hide exactly what was asked for, and the visible patches keep the order of the scan."""

import pytest
import torch

from vim_ssl.objectives.masking import MASKS, BlockMask, RandomMask, RowMask, visible_ids


@pytest.mark.parametrize(
    ("grid", "ratio", "unit", "hidden"),
    [
        ((14, 14), 0.75, 1, 147),
        ((7, 7), 0.75, 1, 37),  # 36.75 is rounded up
        ((14, 14), 0.6, 2, 4 * 30),  # 29.4: SimMIM at 224 px, 32-px units of 16-px patches
        ((10, 10), 0.07, 1, 7),  # 7.000000000000001 in floating point
        ((4, 6), 0.5, 2, 12),
        ((1, 2), 0.9, 1, 1),  # one patch stays visible
        ((3, 3), 0.01, 1, 1),  # one patch is hidden
        ((4, 4), 0.99, 2, 12),
        ((2, 5), 1e-12, 1, 1),
    ],
    ids=lambda v: str(v),
)
def test_every_mask_hides_the_same_number_of_patches(grid, ratio, unit, hidden):
    draw = RandomMask(grid, ratio, unit)
    for _ in range(5):
        mask = draw()
        assert (mask.dtype, mask.shape) == (torch.bool, (grid[0] * grid[1],))
        assert int(mask.sum()) == hidden  # True = masked


@pytest.mark.parametrize(("grid", "unit"), [((8, 8), 2), ((4, 12), 4), ((6, 3), 3)], ids=str)
def test_units_are_hidden_as_whole_squares_in_their_own_place(grid, unit):
    mask = RandomMask(grid, 0.5, unit)().view(grid)
    seen = set()
    for top in range(0, grid[0], unit):
        for left in range(0, grid[1], unit):
            square = mask[top : top + unit, left : left + unit]
            assert bool(square.all()) or not bool(square.any())
            seen.add(bool(square.all()))
    assert seen == {True, False}


def test_every_patch_is_hidden_about_as_often_as_the_ratio_says():
    draw = RandomMask((4, 4), 0.75)
    share = torch.stack([draw() for _ in range(2000)]).float().mean(0)
    assert (share - 0.75).abs().max() < 0.05


@pytest.mark.parametrize("unit", [1, 2])
@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.75, 0.99])
def test_blocks_hide_the_same_number_as_random_masks(ratio, unit):
    count = int(RandomMask((14, 14), ratio, unit)().sum())
    assert {int(BlockMask((14, 14), ratio, unit)().sum()) for _ in range(20)} == {count}


def test_blocks_leave_visible_patches_together():
    """Of two neighbours, fewer stand on different sides of the mask than by chance (0.5)."""

    def borders(kind):
        torch.manual_seed(0)
        masks = torch.stack([kind((14, 14), 0.5)().view(14, 14) for _ in range(50)])
        return (masks[:, 1:] != masks[:, :-1]).float().mean()

    assert borders(RandomMask) > 0.45
    assert borders(BlockMask) < 0.3


@pytest.mark.parametrize(("unit", "rows"), [(1, 9), (2, 10)])
def test_rows_are_hidden_whole(unit, rows):
    """60 % of 14 rows are 8.4, of 7 double rows 4.2."""
    draw = RowMask((14, 6 * unit), 0.6, unit)
    masks = [draw().view(14, -1) for _ in range(5)]
    assert all(bool((mask == mask[:, :1]).all()) for mask in masks)
    assert {int(mask[:, 0].sum()) for mask in masks} == {rows}
    assert not all(torch.equal(mask, masks[0]) for mask in masks)


def test_a_single_row_cannot_be_hidden():
    with pytest.raises(ValueError, match="needs at least two"):
        RowMask((1, 9), 0.5)


@pytest.mark.parametrize("kind", MASKS.values(), ids=MASKS)
def test_the_mask_follows_the_global_seed(kind):
    draw = kind((6, 6), 0.5)
    masks = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        masks.append(draw())
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.5, 1.5, float("nan")])
def test_a_ratio_that_hides_nothing_or_all_is_refused(ratio):
    with pytest.raises(ValueError, match="between 0 and 1"):
        RandomMask((4, 4), ratio)


@pytest.mark.parametrize(("grid", "unit"), [((14, 14), 4), ((4, 6), 4), ((4, 4), 0)], ids=str)
def test_a_unit_that_does_not_fit_the_grid_is_refused(grid, unit):
    with pytest.raises(ValueError, match=rf"mask_unit {unit} .* {grid[0]}x{grid[1]} grid"):
        RandomMask(grid, 0.5, unit)


def test_a_grid_of_one_unit_is_refused():
    with pytest.raises(ValueError, match="needs at least two"):
        RandomMask((2, 2), 0.5, unit=2)


# ------------------------------------------------------------------ the scan order


def test_the_visible_patches_come_in_raster_order():
    """A scan reads along the sequence; the shuffled order of MAE's argsort would not do."""
    draw = RandomMask((8, 8), 0.75)
    mask = torch.stack([draw() for _ in range(16)])
    keep = visible_ids(mask)
    assert (keep.dtype, keep.shape) == (torch.int64, (16, 16))
    assert (keep.diff(dim=1) > 0).all()
    assert torch.equal(torch.ones_like(mask).scatter(1, keep, False), mask)


def test_samples_that_show_different_numbers_of_patches_are_refused():
    mask = torch.tensor([[True, False, False], [True, True, False]])
    with pytest.raises(ValueError, match=r"different numbers of patches: \[2, 1\]"):
        visible_ids(mask)
