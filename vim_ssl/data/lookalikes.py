"""Images that look alike: recompressed, resized, slightly cropped or brightened copies.

Perceptual hashes (`imagehash.phash`) of an image and of its slight crops find candidates, in time
linear in the number of images; small grey copies of the two images confirm them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import combinations, pairwise
from typing import Any

import numpy as np
from PIL import Image

from vim_ssl.data.images import clean_image

MISSING = find_spec("imagehash") is None
SIDE = 32  # pixels of the small copies
# The part of an image that a cropped copy shows: left, top, right, bottom, as fractions.
CROPS = (
    (0.0, 0.0, 1.0, 1.0), (0.015, 0.015, 0.985, 0.985), (0.035, 0.035, 0.965, 0.965),
    (0.055, 0.055, 0.945, 0.945),
    (0.05, 0.0, 1.0, 1.0), (0.0, 0.0, 0.95, 1.0), (0.0, 0.05, 1.0, 1.0), (0.0, 0.0, 1.0, 0.95),
)  # fmt: skip
DISTANCE = 4  # bits of 64 in which the hashes of copies differ at most
EQUAL = 2  # bands of a hash that are compared at once: few others have the same bits in both
BANDS = DISTANCE + EQUAL  # of these, at least so many have no differing bit
CROWDED = 1000  # images with equal bits in these bands; more have them in common, not as copies
BLOCK = 2**20  # pairs that are compared at once
# Correlation of the small copies, in grey and in colour. Those of a crop do not fit exactly.
ALIKE, ALIKE_CROPPED = (0.99, 0.99), (0.985, 0.955)
SMALL = 64  # pixels; a crop is not recognised in an image with a shorter side
COLOUR_SIDE = 16  # pixels of the small copies in colour
CONTRAST = 4.0  # grey levels; a lower deviation is a blank image


@dataclass(frozen=True)
class Look:
    """What an image looks like.

    Attributes:
        hashes: uint64 (len(CROPS),).
        grey: uint8 (SIDE, SIDE).
        colour: uint8 (COLOUR_SIDE, COLOUR_SIDE, 3).
        small: whether a side is below `SMALL`.
    """

    hashes: np.ndarray
    grey: np.ndarray
    colour: np.ndarray
    small: bool


def look_of(image: Any) -> Look | None:
    """Return the look of an image; None for a blank one, for an array of bands, and without
    imagehash."""
    if not isinstance(image, Image.Image) or MISSING:
        return None
    import imagehash

    image = clean_image(image)
    small = min(image.size) < SMALL
    if max(image.size) > 4 * SIDE:
        image = image.resize((4 * SIDE, 4 * SIDE), Image.Resampling.BOX)
    colour = image.convert("RGB").resize((COLOUR_SIDE, COLOUR_SIDE), Image.Resampling.BOX)
    grey = image.convert("L")
    sides = np.array([grey.width, grey.height, grey.width, grey.height])
    copies = [
        grey.resize((SIDE, SIDE), Image.Resampling.LANCZOS, tuple(np.array(crop) * sides))
        for crop in CROPS
    ]
    values = np.asarray(copies[0])
    if values.std() < CONTRAST:
        return None
    hashes = [int(str(imagehash.phash(copy)), 16) for copy in copies]
    return Look(np.array(hashes, np.uint64), values, np.asarray(colour), small)


def lookalikes(looks: Sequence[Look]) -> list[tuple[int, int]]:
    """Return the pairs of indices, first < second, of images that look alike."""
    if len(looks) < 2:
        return []
    hashes = np.stack([look.hashes for look in looks])
    pairs = np.unique(np.concatenate(list(_candidates(hashes))), axis=0)
    greys = np.stack([look.grey for look in looks])
    colours = np.stack([look.colour for look in looks])
    small = np.array([look.small for look in looks])
    matches: set[tuple[int, int]] = set()
    for begin in range(0, len(pairs), 4096):
        whole, other, crop = pairs[begin : begin + 4096].T
        cropped = crop != 0
        alike = ~cropped | ~(small[whole] | small[other])
        in_grey = _correlation(greys[whole], _cropped(greys[other], crop))
        in_colour = _correlation(*(colours[rows].astype(np.float32) for rows in (whole, other)))
        for likeness, exact, loose in zip((in_grey, in_colour), ALIKE, ALIKE_CROPPED, strict=True):
            alike &= likeness >= np.where(cropped, loose, exact)
        matches |= {(min(a, b), max(a, b)) for a, b in
                    zip(whole[alike].tolist(), other[alike].tolist(), strict=True)}  # fmt: skip
    return sorted(matches)


def _candidates(hashes: np.ndarray) -> Iterator[np.ndarray]:
    """Yield arrays (pairs, 3) of a whole image, another image, and the crop of it whose hash
    differs from the whole image's in at most `DISTANCE` bits.

    Args:
        hashes: uint64 (n, len(CROPS)).
    """
    yield np.zeros((0, 3), np.int64)
    edges = [64 * band // BANDS for band in range(BANDS + 1)]
    for bands in combinations(pairwise(edges), EQUAL):
        keys = np.zeros_like(hashes)
        for low, high in bands:
            width = np.uint64(high - low)
            keys = keys << width | (hashes >> np.uint64(low)) & (
                (np.uint64(1) << width) - np.uint64(1)
            )
        order = np.argsort(keys[:, 0], kind="stable")
        ranked = keys[order, 0]
        for crop in range(hashes.shape[1]):
            first = np.searchsorted(ranked, keys[:, crop], "left")
            count = np.searchsorted(ranked, keys[:, crop], "right") - first
            count[count > CROWDED] = 0
            for rows in np.array_split(np.flatnonzero(count), int(count.sum()) // BLOCK + 1):
                yield _near(hashes, order, rows, first[rows], count[rows], crop)


def _near(
    hashes: np.ndarray,
    order: np.ndarray,
    rows: np.ndarray,
    first: np.ndarray,
    count: np.ndarray,
    crop: int,
) -> np.ndarray:
    """Return the candidates among images ``rows`` and the ``count`` images from ``first`` on in
    ``order``; see `_candidates`."""
    other = np.repeat(rows, count)
    within = np.arange(len(other)) - np.repeat(np.cumsum(count) - count, count)
    whole = order[np.repeat(first, count) + within]
    near = _bits_set(hashes[whole, 0] ^ hashes[other, crop]) <= DISTANCE
    near &= (whole < other) if crop == 0 else (whole != other)
    chosen = np.stack([whole[near], other[near]], 1)
    return np.concatenate([chosen, np.full((len(chosen), 1), crop)], 1)


_SET = np.array([bin(value).count("1") for value in range(256)], np.uint8)


def _bits_set(values: np.ndarray) -> np.ndarray:
    return _SET[values.view(np.uint8).reshape(-1, 8)].sum(1)


def _cropped(greys: np.ndarray, crops: np.ndarray) -> np.ndarray:
    """Crop small copies (n, SIDE, SIDE), and resize them to their size by interpolation."""
    result = np.empty(greys.shape, np.float32)
    for number in np.unique(crops):
        left, top, right, bottom = CROPS[number]
        rows, columns = _resampling(top, bottom), _resampling(left, right)
        chosen = crops == number
        result[chosen] = rows @ greys[chosen].astype(np.float32) @ columns.T
    return result


def _resampling(low: float, high: float) -> np.ndarray:
    """The matrix (SIDE, SIDE) that interpolates the positions from ``low`` to ``high``."""
    at = (low + (np.arange(SIDE) + 0.5) / SIDE * (high - low)) * SIDE - 0.5
    weights = np.clip(1 - np.abs(at[:, None] - np.arange(SIDE)), 0, None)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def _correlation(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return the correlation (n,) of small copies (n, …)."""
    x, y = (v.reshape(len(v), -1).astype(np.float32) for v in (one, other))
    x, y = x - x.mean(1, keepdims=True), y - y.mean(1, keepdims=True)
    norm = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    return (x * y).sum(1) / np.maximum(norm, 1e-6)
