"""Masks: bool, True = masked, one entry per patch in raster order."""

import math

import torch
from torch import Tensor


class RandomMask:
    """Mask a fixed fraction of the patches of every image, at random.

    Args:
        grid: rows and columns of patches.
        ratio: fraction of masked units, between 0 and 1; their number is rounded up, as in MAE and
            SimMIM, but at least one stays visible.
        unit: side in patches of a unit, a square that is masked as a whole (SimMIM: 32 px).
    Uses torch's global generator, which the data loader seeds for every sample.
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
        total = self.choices()
        if total < 2:
            raise ValueError(
                f"a {grid[0]}x{grid[1]} grid has only one unit, or row of units, to mask; masking "
                "needs at least two. Use a smaller mask_unit or mask='random'."
            )
        # minus 1e-9, because 0.07 * 100 is 7.000000000000001
        self.masked = min(max(math.ceil(total * ratio - 1e-9), 1), total - 1)

    def choices(self) -> int:
        """Return the number of pieces to choose from: units, or rows of units."""
        return self.units[0] * self.units[1]

    def draw(self) -> Tensor:
        """Draw a mask of units, (rows, columns) bool, True = masked."""
        total = self.choices()
        chosen = torch.zeros(total, dtype=torch.bool)
        return chosen.index_fill_(0, torch.randperm(total)[: self.masked], 1).view(self.units)

    def __call__(self) -> Tensor:
        """Draw a mask of patches, (rows * columns,) bool, True = masked."""
        hidden = self.draw()
        if self.unit > 1:
            hidden = hidden.repeat_interleave(self.unit, 0).repeat_interleave(self.unit, 1)
        return hidden.flatten()


class TubeMask(RandomMask):
    """Mask the same patches in all ``times`` tubelets of a clip, so that still content cannot be
    copied from another frame. Reference: VideoMAE, arXiv:2203.12602."""

    def __init__(self, grid: tuple[int, int], ratio: float, unit: int = 1, times: int = 1):
        super().__init__(grid, ratio, unit)
        self.times = times

    def __call__(self) -> Tensor:
        return super().__call__().repeat(self.times)


class RowMask(RandomMask):
    """Mask whole rows of units: visible patches are contiguous along the scan."""

    def choices(self) -> int:
        return self.units[0]

    def draw(self) -> Tensor:
        chosen = torch.zeros(self.units, dtype=torch.bool)
        chosen[torch.randperm(self.units[0])[: self.masked]] = True
        return chosen


class BlockMask(RandomMask):
    """Mask rectangles until the ratio is reached exactly; the last one is truncated.

    Each has at least `SMALLEST` units, or the number still missing, and an aspect ratio between 0.3
    and 1 / 0.3.
    Reference: block-wise masking of BEiT, arXiv:2106.08254, algorithm 1.
    """

    SMALLEST = 16
    ASPECT = math.log(0.3)

    def draw(self) -> Tensor:
        rows, columns = self.units
        hidden = torch.zeros(rows, columns, dtype=torch.bool)
        while (missing := self.masked - int(hidden.sum())) > 0:
            size, shape, down, across = torch.rand(4).tolist()
            least = min(self.SMALLEST, missing)
            area = least + size * (missing - least)
            aspect = math.exp(self.ASPECT * (1 - 2 * shape))
            height = min(max(round(math.sqrt(area * aspect)), 1), rows)
            width = min(max(round(math.sqrt(area / aspect)), 1), columns)
            top, left = int(down * (rows - height + 1)), int(across * (columns - width + 1))
            block = torch.zeros_like(hidden)
            block[top : top + height, left : left + width] = True
            fresh = (block & ~hidden).flatten().nonzero()[:missing, 0]
            hidden.view(-1)[fresh] = True
        return hidden


MASKS = {"random": RandomMask, "row": RowMask, "block": BlockMask, "tube": TubeMask}


def checked_mask(mask: Tensor, b: int, grid: tuple[int, int]) -> Tensor:
    """Return ``mask``. Raises: ValueError if it is not bool of shape (b, rows * columns)."""
    shape = (b, grid[0] * grid[1])
    if mask.dtype != torch.bool or mask.shape != shape:
        raise ValueError(
            f"mask is {mask.dtype} {tuple(mask.shape)}; expected torch.bool {shape}, True = masked."
        )
    return mask


def visible_ids(mask: Tensor) -> Tensor:
    """Return the indices of visible patches: (b, m) bool, True = masked -> (b, k) int64, ascending.

    The order matters for a scan, not for attention. (MAE's argsort of noise shuffles them.)
    Raises: ValueError if the samples have different numbers of visible patches.
    """
    counts = (~mask).sum(1)
    if not bool((counts == counts[0]).all()):
        raise ValueError(f"the masks leave different numbers of patches: {counts.tolist()}.")
    return (~mask).nonzero()[:, 1].view(len(mask), -1)
