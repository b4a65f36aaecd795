"""Which patches to hide. A mask is bool, True = masked, one entry a patch in raster order."""

import math

import torch
from torch import Tensor


class RandomMask:
    """Hide a fixed share of the patches of every picture, at random.

    Args:
        grid: rows and columns of patches.
        ratio: share of masked units, between 0 and 1; the count is rounded up, as MAE and SimMIM
            do, but one unit at least stays visible.
        unit: side of the square that is masked as one, in patches (SimMIM: 32 px).
    Draws from torch's global generator, which the data loader seeds for every sample.
    Raises: ValueError for a ratio or unit that does not fit the grid.
    """

    def __init__(self, grid: tuple[int, int], ratio: float, unit: int = 1):
        if not 0 < ratio < 1:
            raise ValueError(f"mask_ratio {ratio} must lie between 0 and 1, both excluded.")
        if unit < 1 or grid[0] % unit or grid[1] % unit:
            raise ValueError(
                f"mask_unit {unit} (patches) does not divide the {grid[0]}x{grid[1]} grid."
            )
        self.units = (grid[0] // unit, grid[1] // unit)
        self.unit = unit
        total = self.units[0] * self.units[1]
        if total < 2:
            raise ValueError(f"a {grid[0]}x{grid[1]} grid is a single unit: nothing stays visible.")
        # 0.07 * 100 is 7.000000000000001, and 7 are meant
        self.masked = min(max(math.ceil(total * ratio - 1e-9), 1), total - 1)

    def __call__(self) -> Tensor:
        """(rows * columns,) bool, True = masked."""
        rows, columns = self.units
        chosen = torch.zeros(rows * columns, dtype=torch.bool)
        chosen[torch.randperm(rows * columns)[: self.masked]] = True
        chosen = chosen.view(rows, columns)
        return chosen.repeat_interleave(self.unit, 0).repeat_interleave(self.unit, 1).flatten()


def visible_ids(mask: Tensor) -> Tensor:
    """The visible patches in raster order: (b, m) bool, True = masked -> (b, k) int64.

    The order matters: attention does not see it, a scan reads along it. (MAE's own argsort of
    noise leaves the visible patches shuffled.)
    Raises: ValueError if the samples do not all show the same number of patches.
    """
    counts = (~mask).sum(1)
    if not bool((counts == counts[0]).all()):
        raise ValueError(f"samples show different numbers of patches: {counts.tolist()}.")
    return (~mask).nonzero()[:, 1].view(len(mask), -1)
