"""Segment an image of any size with a sliding window."""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from vim_ssl.utils.numbers import REMEDY, require_finite
from vim_ssl.utils.tiling import starts

MAX_VALUES = 2**27  # maximum logits in memory (0.5 GB of float32), for any image size


@torch.inference_mode()
def label_pixels(
    logits_of: Callable[[Tensor], Tensor],
    image: Tensor,
    size: tuple[int, int],
    *,
    classes: int,
    window: int,
    stride: int,
    batch_size: int = 4,
    max_values: int = MAX_VALUES,
    prepare: Callable[[Tensor], Tensor] = lambda windows: windows,
    dtype: torch.dtype = torch.int64,
) -> Tensor:
    """Return the class of every pixel: argmax of the windows' mean logits, resized to ``size``.

    Memory besides the image depends on ``max_values`` and not on the sizes: larger results are
    computed in blocks, and windows at block borders are computed again. Blocks change the result
    only by rounding.

    Args:
        logits_of: (b, c, window, window) -> (b, classes, ·, ·), resized to the window here.
        image: (c, h, w), in any dtype that ``prepare`` accepts.
        size: (height, width) of the result, for example that of the labels.
        window, stride: in pixels of ``image``; the last window of a row ends at its border.
        batch_size: number of windows per batch.
        prepare: normalises windows (b, c, ·, ·), pixel by pixel. They are then padded with zeros if
            the image is smaller than a window.
        dtype: dtype of the result.
    Returns: (height, width) on the image's device.
    Raises: ValueError for logits that are not finite.
    """
    if not 0 < stride <= window:
        raise ValueError(f"stride {stride} is not between 1 and the window's {window} pixels.")
    h, w = image.shape[1:]
    padding = 0, max(window - w, 0), 0, max(window - h, 0)

    def padded_logits(windows: Tensor) -> Tensor:
        return logits_of(F.pad(prepare(windows), padding)).float()

    result = torch.empty(size, dtype=dtype, device=image.device)
    rows, columns = _blocks((h, w), size, max(max_values // classes, 1))
    for row in rows:
        for column in columns:
            top, left = _Samples(row, size[0], h), _Samples(column, size[1], w)
            sums = _average(
                padded_logits, image, (top.first, top.stop), (left.first, left.stop),
                classes, window, stride, batch_size,
            )  # fmt: skip
            require_finite(sums, "the logits of the pixels", REMEDY)
            step = max(max_values // (8 * classes * len(column)), 1)  # rows resized at a time
            for first in range(row.start, row.stop, step):
                rows_now = range(first, min(first + step, row.stop))
                part = _Samples(rows_now, size[0], h).take(sums, 1, top.first)
                labels = left.take(part, 2, left.first).argmax(0)
                result[first : rows_now.stop, column.start : column.stop] = labels
    return result


def _average(logits_of, image, rows, columns, classes, window, stride, batch_size) -> Tensor:
    """Return the windows' mean logits in a region (ranges (first, stop)), (classes, ·, ·)."""
    sides = [range(*rows), range(*columns)]
    at = [
        [s for s in starts(side, window, stride) if s < span[1] and s + window > span[0]]
        for side, span in zip(image.shape[1:], (rows, columns), strict=True)
    ]
    sums = image.new_zeros(classes, *map(len, sides), dtype=torch.float32)
    counts = [image.new_zeros(len(side), dtype=torch.float32) for side in sides]
    for count, side, begins in zip(counts, sides, at, strict=True):
        for s in begins:
            count[max(s - side.start, 0) : s + window - side.start] += 1
    corners = [(y, x) for y in at[0] for x in at[1]]
    for i in range(0, len(corners), batch_size):
        part = corners[i : i + batch_size]
        cut = torch.stack([image[:, y : y + window, x : x + window] for y, x in part])
        results = logits_of(cut)
        for (y, x), logits in zip(part, results, strict=True):
            logits = F.interpolate(
                logits[None], (window, window), mode="bilinear", align_corners=False
            )[0]
            top, left = (max(side.start - s, 0) for side, s in zip(sides, (y, x), strict=True))
            height = min(y + window, rows[1]) - (y + top)
            width = min(x + window, columns[1]) - (x + left)
            first, second = y + top - rows[0], x + left - columns[0]
            sums[:, first : first + height, second : second + width] += logits[
                :, top : top + height, left : left + width
            ]
    return sums.div_(counts[0][:, None] * counts[1])


class _Samples:
    """Linear interpolation along one side, as `torch.nn.functional.interpolate` does it.

    Args:
        pixels: range of pixels of the result, within its ``size``.
        size, source: length of the side in the result and in the source.
    Attributes ``first`` and ``stop``: the range of source pixels needed.
    """

    def __init__(self, pixels: range, size: int, source: int):
        centres = torch.arange(pixels.start, pixels.stop, dtype=torch.float64) + 0.5
        at = (centres * (source / size) - 0.5).clamp(0, source - 1)
        self.below = at.floor().long()
        self.above = (self.below + 1).clamp(max=source - 1)
        self.share = (at - self.below).float()
        self.first, self.stop = int(self.below[0]), int(self.above[-1]) + 1

    def take(self, x: Tensor, dim: int, first: int) -> Tensor:
        """Interpolate ``x`` along ``dim``; its first pixel is pixel ``first`` of the source."""
        shape = [-1 if d == dim else 1 for d in range(x.dim())]
        below, above = (
            x.index_select(dim, (i - first).to(x.device)) for i in (self.below, self.above)
        )
        return torch.lerp(below, above, self.share.to(x.device).view(shape))


def _blocks(
    source: tuple[int, int], size: tuple[int, int], max_pixels: int
) -> tuple[list[range], list[range]]:
    """Return ranges of rows and columns of the result: the fewest blocks with at most
    ``max_pixels`` source pixels each."""
    parts = [1, 1]

    def sides() -> list[int]:
        return [math.ceil(s / n) for s, n in zip(source, parts, strict=True)]

    while math.prod(sides()) > max_pixels:
        longer = sides().index(max(sides()))
        parts[longer] += 1
        if parts[longer] > size[longer]:
            raise ValueError(f"max_values allows only {max_pixels} pixels at a time; increase it.")
    cut = []
    for side, n in zip(size, parts, strict=True):
        edges = [i * side // n for i in range(n + 1)]
        cut.append([range(a, b) for a, b in pairwise(edges)])
    return cut[0], cut[1]
