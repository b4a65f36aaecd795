"""Outlines of objects: polygons and run-length encodings (RLE) as in COCO's format."""

import math
from typing import Any

import numpy as np

from vim_ssl.utils.optional import require


def mask_tools() -> Any:
    """Return the module pycocotools.mask. Raises: ImportError with the package to install."""
    return require("pycocotools.mask", "detection", "Outlines and average precision")


def whole(value: Any) -> int | None:
    """Return a whole number, also one that is written as 1.0; None for anything else."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def read_outline(value: Any) -> list | dict | None:
    """Return a ``segmentation`` as a list of polygons or an RLE; None if it has no area.

    A polygon [x, y, x, y …] may stand alone, and its points may be pairs.
    """
    if isinstance(value, dict):
        return value if "counts" in value else None
    if not isinstance(value, list):
        return None
    if value and (not isinstance(value[0], list) or _are_points(value)):
        value = [value]  # one polygon, not in a list
    flat = [[x for p in one for x in p] if _are_points(one) else one for one in value]
    # pycocotools reads four numbers as a box and fails on two.
    return [p for p in flat if isinstance(p, list) and len(p) >= 6 and len(p) % 2 == 0] or None


def _are_points(polygon: Any) -> bool:
    return (
        isinstance(polygon, list) and len(polygon) > 2
        and all(isinstance(p, list) and len(p) == 2 for p in polygon)
        and not any(isinstance(x, list) for p in polygon for x in p)
    )  # fmt: skip


def to_rle(outline: list | dict, height: int, width: int) -> dict[str, Any]:
    """Convert polygons or an RLE, compressed or not, to pycocotools' RLE.

    Raises: ValueError for an invalid outline; ImportError without pycocotools.
    """
    tools = mask_tools()
    if isinstance(outline, list):
        # pycocotools' memory grows with the length of an edge, so distant points are clipped.
        far = np.array([width, height])
        near = [polygon.clip(-far, 2 * far).reshape(-1).tolist() for polygon in _points(outline)]
        return tools.merge(tools.frPyObjects(near, height, width))
    if outline.get("size") != [height, width]:
        raise ValueError(f"an RLE has size {outline.get('size')}; expected {[height, width]}")
    counts = outline.get("counts")
    if isinstance(counts, list):
        runs = [whole(n) for n in counts]
        lengths = [n for n in runs if n is not None and n >= 0]
        if len(lengths) < len(runs) or sum(lengths) != height * width:
            raise ValueError(f"the counts of an RLE do not sum to {height * width} pixels")
        return tools.frPyObjects({"size": [height, width], "counts": lengths}, height, width)
    if not isinstance(counts, str) or _run_lengths(counts) != height * width:
        raise ValueError(f"the counts of an RLE do not sum to {height * width} pixels")
    return {"size": [height, width], "counts": counts}


def outline_box(outline: list | dict | None, height: int, width: int) -> list[float] | None:
    """Return left, top, width and height of an outline; None without one, or an invalid one.

    Raises: ImportError for an RLE without pycocotools.
    """
    try:
        if isinstance(outline, dict):
            return mask_tools().toBbox(to_rle(outline, height, width)).tolist()
        points = np.concatenate(_points(outline or []))
    except ValueError:
        return None
    low, high = points.clip(0, [width, height]).min(0), points.clip(0, [width, height]).max(0)
    return [*low.tolist(), *(high - low).tolist()]


def _points(polygons: list) -> list[np.ndarray]:
    """Return the points (n, 2) of each polygon. Raises: ValueError."""
    try:
        points = [np.array(polygon, np.float64).reshape(-1, 2) for polygon in polygons]
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError("a polygon contains a value that is not a number") from error
    if not all(np.isfinite(polygon).all() for polygon in points):
        raise ValueError("a polygon contains a number that is not finite")
    return points


def clipped(box: Any, width: int, height: int) -> tuple[float, float, float, float] | None:
    """Convert COCO's [left, top, width, height] to left, top, right, bottom, clipped to the image.
    Return None for an invalid box and for one without area inside the image."""
    try:
        left, top, wide, high = box
        if not all(map(math.isfinite, (left, top, wide, high))):
            return None
    except (TypeError, ValueError, OverflowError):
        return None
    right, bottom = min(left + wide, width), min(top + high, height)
    left, top = max(left, 0.0), max(top, 0.0)
    return (left, top, right, bottom) if right > left and bottom > top else None


def _run_lengths(counts: str) -> int:
    """Return the sum of a compressed RLE's counts; -1 if it is broken. Checked here because
    pycocotools overruns its buffer if there are too many counts.

    Each character, minus "0", has five data bits; the sixth bit is set if more characters follow,
    and the highest data bit of the last character is the sign. From the fourth count on, the
    difference to the count two before is stored.
    """
    lengths: list[int] = []
    value = shift = 0
    for character in counts:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 60:
            return -1
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (1 << shift) if bits & 16 else 0
            lengths.append(value + (lengths[-2] if len(lengths) > 2 else 0))
            if lengths[-1] < 0:
                return -1
            value = shift = 0
    return sum(lengths) if not shift else -1
