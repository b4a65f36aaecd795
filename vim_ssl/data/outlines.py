"""Outlines of objects: polygons and run-length encodings (RLE) as in COCO's format."""

import math
from operator import mul
from typing import Any

import numpy as np

from vim_ssl.utils.optional import require

NEAR = 2.0  # pixels by which an outline may miss its box because of rounding
TINY = 0.01  # an outline that extends over less of its box's area is not its


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


# What an outline may have to do with its box -> a description.
MISFITS = {
    "size": "outlines in {} are RLEs of another size than their image, [height, width] in pixels",
    "fractions": (
        "outlines in {} lie within 0 to 1, as fractions of the image; COCO's are in pixels. "
        "Multiply them by the size of their image"
    ),
    "empty": "outlines in {} contain no pixel of their image",
    "apart": "outlines in {} do not overlap their box",
    "small": f"outlines in {{}} extend over less than {TINY:.0%} of their box",
}


def misfit(outline: list | dict, box: list[float], height: int, width: int) -> str:
    """Return the key in `MISFITS` of an outline that cannot be that of the box (left, top, width,
    height); "" for one that can, and for one that is refused when it is read."""
    if isinstance(outline, dict) and outline.get("size") != [height, width]:
        return "size"
    edges = clipped(box, width, height)
    try:
        extent, area = _extent(outline, height, width)
        if edges is None or not all(map(math.isfinite, (*extent, area))):
            return ""
        left, top, right, bottom = extent
        wide, high = edges[2] - edges[0], edges[3] - edges[1]
        within_1 = isinstance(outline, list) and 0 <= min(left, top) <= max(right, bottom) <= 1
        if within_1 and max(wide, high) > 2:
            return "fractions"
        outside = min(right, bottom) <= 0 or left >= width or top >= height
        if outside or (area < 1 and not mask_tools().area(to_rle(outline, height, width))):
            return "empty"
    except (TypeError, ValueError, OverflowError, ImportError):
        return ""
    across = min(right, edges[2]) - max(left, edges[0])
    down = min(bottom, edges[3]) - max(top, edges[1])
    if min(across, down) < -NEAR:
        return "apart"
    return "small" if (right - left) * (bottom - top) < TINY * wide * high else ""


def _extent(
    outline: list | dict, height: int, width: int
) -> tuple[tuple[float, float, float, float], float]:
    """Return left, top, right and bottom of an outline, not clipped, and about its area."""
    if isinstance(outline, dict):
        rle = to_rle(outline, height, width)
        left, top, wide, high = mask_tools().toBbox(rle).tolist()
        return (left, top, left + wide, top + high), float(mask_tools().area(rle))
    xs = [x for polygon in outline for x in polygon[::2]]
    ys = [y for polygon in outline for y in polygon[1::2]]
    # Without numpy, which is slow for lists as short as these.
    area = sum(abs(_twice_area(p[::2], p[1::2])) for p in outline) / 2
    return (min(xs), min(ys), max(xs), max(ys)), area


def _twice_area(xs: list[float], ys: list[float]) -> float:
    return sum(map(mul, xs, [*ys[1:], ys[0]])) - sum(map(mul, ys, [*xs[1:], xs[0]]))


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
