"""What the numbers in a file mean: their range, which is white, which are missing or transparent.

Readers of images, volumes and masks take these meanings from here. A viewer's conversions are for
images only: in a mask, a number is a class (`label_numbers`).
"""

import io
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, TiffImagePlugin

from vim_ssl.data.ranges import fills

# The size from which Pillow refuses images too; one of this size takes half a gigabyte.
DEFAULT_MAX_PIXELS = 178_956_970
# Pillow passes EPS files to Ghostscript, which executes them as programs: unsafe. Of FITS files it
# ignores offset and scale, and reads signed numbers as unsigned.
_REFUSED_FORMATS = ("EPS", "FITS")
_LABEL_FORMATS = ("PNG", "TIFF", "BMP", "DIB")
_LABEL_MODES = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L", "I;16N")
# Lossy compressions of TIFF (tag 259): JPEG, old JPEG, WebP, lossy JPEG of DNG.
_LOSSY = (6, 7, 50001, 34892)
_BITS, _COMPRESSION, _PHOTOMETRIC, _SAMPLES, _PLANES, _KIND = 258, 259, 262, 277, 284, 339


class BadImage(ValueError):
    """An image that cannot be decoded.

    Attributes:
        id: the image's id in its data set, or its path.
        reason: description of the fault.
    """

    # A DataLoader rebuilds a worker's exception from its text only, hence the default.
    def __init__(self, id: str, reason: str = ""):
        super().__init__(id, reason)
        self.id, self.reason = id, reason

    def __str__(self) -> str:
        return f"{self.id}: {self.reason}" if self.reason else self.id


def most_pixels() -> int:
    """The maximum number of pixels of an image to decode: VIM_SSL_MAX_PIXELS or the default."""
    given = os.environ.get("VIM_SSL_MAX_PIXELS", "")
    if given and not given.isdigit():
        raise ValueError(f"VIM_SSL_MAX_PIXELS is {given!r}; expected a whole number of pixels.")
    return int(given or 0) or DEFAULT_MAX_PIXELS


def open_image(source: str | Path | bytes, limit: int) -> Image.Image:
    """Open an image file, or its bytes, with Pillow, without decoding it.

    Args:
        limit: number of pixels that must be allowed; the caller checks it.
    Raises: Pillow's errors; BadImage for a TIFF of a kind that Pillow does not read, describing it.
    """
    if Image.MAX_IMAGE_PIXELS is not None and limit > DEFAULT_MAX_PIXELS:
        # The user set a higher limit; Pillow would refuse at its default before ours is checked.
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, limit)
    Image.init()
    formats = [name for name in Image.OPEN if name not in _REFUSED_FORMATS]
    try:
        return Image.open(
            io.BytesIO(source) if isinstance(source, bytes) else source, formats=formats
        )
    except Image.UnidentifiedImageError:
        if kind := _describe_tiff(source):
            raise BadImage("image", f"{kind}, which is not read as an image; {_REMEDY}") from None
        raise


def _file(source: str | Path | bytes) -> Any:
    return io.BytesIO(source) if isinstance(source, bytes) else source


_REMEDY = "open it with geotiff:, or save it with 8 or 16 bits and interleaved colours"


def _describe_tiff(source: str | Path | bytes) -> str:
    """Describe the pixels of a TIFF file by its header; "" for other and damaged files."""
    try:
        with open(source, "rb") if isinstance(source, str | Path) else io.BytesIO(source) as file:
            head = file.read(8)
            if head[:4] not in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
                return ""
            head += file.read(8 if b"+" in head[2:4] else 0)
            tags = TiffImagePlugin.ImageFileDirectory_v2(head)
            file.seek(tags.next)
            tags.load(file)
        bits, kinds = tags.get(_BITS, (1,)), tags.get(_KIND, (1,))
        kind = {2: "signed ", 3: "float ", 5: "complex ", 6: "complex "}.get(kinds[0], "")
        depth = "/".join(map(str, dict.fromkeys(bits)))
        return f"a TIFF of {tags.get(_SAMPLES, 1)} × {depth} {kind}bits per pixel"
    except Exception:  # damaged headers raise errors of nearly any type
        return ""


# ---------------------------------------------------------------- numbers and their range


def integer_range(bits: int, signed: bool = False) -> tuple[int, int]:
    """Return the smallest and the largest integer of a type."""
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


def to_8bit(
    values: np.ndarray,
    low: float,
    high: float,
    *,
    white_is_zero: bool = False,
    missing: np.ndarray | None = None,
) -> np.ndarray:
    """Scale values to uint8: ``low`` and less to 0, ``high`` and more to 255.

    Args:
        white_is_zero: invert the grey: ``low`` becomes 255.
        missing: bool, True where nothing was measured. These pixels and non-finite ones become 0,
            also if the grey is inverted.
    """
    share = (values.astype(np.float64) - low) / ((high - low) or 1.0)
    absent = ~np.isfinite(share) if missing is None else missing | ~np.isfinite(share)
    share[absent] = 0
    grey = (share * 255).clip(0, 255).round().astype(np.uint8)
    if white_is_zero:
        grey = 255 - grey
    grey[absent] = 0
    return grey


def look_up(numbers: np.ndarray, table: np.ndarray, first: int) -> np.ndarray:
    """Replace integers by the entries of a table, the first of which is for the number ``first``;
    numbers beyond the ends take the nearest entry."""
    return table[(numbers.astype(np.int64) - first).clip(0, len(table) - 1)]


# ---------------------------------------------------------------- image files


@dataclass(frozen=True)
class Encoding:
    """How an image file stores its numbers; Pillow's mode does not determine it.

    Attributes:
        bits: bits per sample.
        kind: of a number: "u" unsigned, "i" signed, "f" float.
        white_is_zero: a viewer shows the smallest number as white.
        undone: Pillow has inverted such numbers already, for display.
        samples: numbers per pixel in the file.
        key: the number, or colour, that is transparent; else None.
        lossy: the file's compression changes numbers.
    """

    bits: int = 8
    kind: str = "u"
    white_is_zero: bool = False
    undone: bool = False
    samples: int = 1
    key: Any = None
    lossy: bool = False

    @property
    def range(self) -> tuple[int, int]:
        """The smallest and the largest number of an integer type."""
        return integer_range(self.bits, self.kind == "i")


def encoding_of(image: Image.Image) -> Encoding:
    """Return how an open image stores its numbers. Call it before the image is decoded: it corrects
    how Pillow will decode some TIFF files.

    Raises: BadImage for files that Pillow decodes wrongly: TIFF with separate planes that are not
        RGB, JPEG 2000 in colour with more than 8 bits.
    """
    key, raw = image.info.get("transparency"), _raw_mode(image)
    tags = getattr(image, "tag_v2", None)  # TIFF
    if tags is not None:
        _correct_tiff(image, tags)
        bits = tags.get(_BITS, (1,))[0]
        white_is_zero = tags.get(_PHOTOMETRIC) == 0
        return Encoding(
            bits, {2: "i", 3: "f"}.get(tags.get(_KIND, (1,))[0], "u"), white_is_zero,
            white_is_zero and bits <= 8, tags.get(_SAMPLES, 1),
            lossy=tags.get(_COMPRESSION) in _LOSSY,
        )  # fmt: skip
    if image.format == "JPEG2000" and getattr(image, "tile", None):
        _check_jpeg2000(image)
    if image.mode == "I" and image.format is None:  # created in memory: a true 32-bit image
        return Encoding(32, "i")
    if image.mode.startswith("F"):
        return Encoding(32, "f")
    # PNG and PGM have 16 bits; older versions of Pillow open them as "I".
    deep = 16 if image.mode.startswith("I") or ";16" in raw else 8
    bits = {"1": 1, "L;2": 2, "L;4": 4}.get(raw, deep)
    return Encoding(1 if image.mode == "1" else bits, key=key)


def numbers_of(image: Image.Image, encoding: Encoding) -> np.ndarray:
    """Return the numbers that the file of a grey or palette image stores, (h, w), without the
    conversions that Pillow made for display."""
    values = np.asarray(image)
    if values.dtype == bool:
        values = values.astype(np.uint8)
    elif image.mode == "L" and encoding.bits < 8:
        values = values // (255 // (2**encoding.bits - 1))
    if encoding.undone and image.mode != "P":
        values = 2**encoding.bits - 1 - values
    if encoding.kind == "i" and encoding.bits == 8:
        values = values.view(np.int8)
    if encoding.kind == "u" and encoding.bits == 32:  # Pillow keeps them in a signed type
        values = values.astype(np.int64) & 0xFFFFFFFF
    return values


def grey_image(image: Image.Image, encoding: Encoding) -> Image.Image:
    """Convert grey of any depth to an 8-bit "L" image, or "LA" if a number is transparent; see
    `grey_from`.

    Raises: BadImage for a float image without a finite value.
    """
    return grey_from(numbers_of(image, encoding), encoding)


def grey_from(values: np.ndarray, encoding: Encoding) -> Image.Image:
    """Convert numbers (h, w) to an 8-bit "L" image, or "LA" if one of them is transparent.

    Integers map linearly from the range of their type to 0..255, floats within 0..1 by 255, other
    floats from their finite minimum and maximum. Non-finite pixels become 0; ``info["missing"]``
    counts them, ``info["fills"]`` lists `vim_ssl.data.ranges.fills`, and ``info["bits"]`` is the
    depth of integers.

    Raises: BadImage for floats without a finite value.
    """
    low, high = encoding.range if encoding.kind != "f" else _float_range(values)
    grey = Image.fromarray(to_8bit(values, low, high, white_is_zero=encoding.white_is_zero))
    if encoding.key is not None:
        grey.putalpha(Image.fromarray(np.where(values == encoding.key, 0, 255).astype(np.uint8)))
    if encoding.kind == "f" and (missing := int((~np.isfinite(values)).sum())):
        grey.info["missing"] = missing
    if probable := fills(values):
        grey.info["fills"] = probable
    if encoding.kind != "f":
        grey.info["bits"] = encoding.bits
    return grey


def _float_range(values: np.ndarray) -> tuple[float, float]:
    finite = values[np.isfinite(values)]
    if not finite.size:
        raise BadImage("image", "a float image without a finite value")
    low, high = float(finite.min()), float(finite.max())
    return (0.0, 1.0) if low >= 0 and high <= 1 else (low, high)


def label_numbers(source: str | Path | bytes | Image.Image) -> np.ndarray:
    """Read class numbers as the file stores them, without a viewer's conversions: the indices of a
    palette, 0 and 1 of black and white, small numbers of few bits, WhiteIsZero not inverted.

    Args:
        source: a PNG, TIFF or BMP file, its bytes, or an image.
    Returns: unsigned integers (h, w).
    Raises: BadImage with the name of the file for anything that holds no class numbers: colour or
        float modes (naming the mode), formats and compressions that change numbers, numbers below
        0, and files that cannot be read.
    """
    if isinstance(source, Image.Image):
        return _label_numbers(source)
    name = f"{len(source)} bytes" if isinstance(source, bytes) else Path(source).name
    try:
        with open_image(source, most_pixels()) as image:
            return _label_numbers(image)
    except BadImage as error:
        raise BadImage(name, f"the mask cannot be read: {error.reason}") from None
    except Exception as error:  # decoders raise errors of nearly any type
        kind = type(error).__name__
        raise BadImage(name, f"the mask cannot be read: {kind}: {error}") from error


def _label_numbers(image: Image.Image) -> np.ndarray:
    if image.mode not in _LABEL_MODES:
        raise BadImage(
            "mask",
            f"it has mode {image.mode}; expected one class number per pixel, in a grey or palette "
            "file",
        )
    encoding = encoding_of(image)
    if image.format not in (None, *_LABEL_FORMATS) or encoding.lossy:
        raise BadImage(
            "mask", f"as {image.format} its class numbers are not preserved; save it as PNG"
        )
    if encoding.samples > 1:
        raise BadImage("mask", f"it has {encoding.samples} numbers per pixel; expected one")
    values = numbers_of(image, encoding)
    if values.min(initial=0) < 0:
        raise BadImage("mask", f"it contains {values.min()}; class numbers start at 0")
    return values.astype(np.uint32)


# ---------------------------------------------------------------- faults of decoders


def _raw_mode(image: Image.Image) -> str:
    """Pillow's name of the way in which the pixels are stored; "" once the image is decoded."""
    tiles = getattr(image, "tile", None)
    arguments = tiles[0][3] if tiles else ""
    return str(arguments[0] if isinstance(arguments, tuple) and arguments else arguments)


def _correct_tiff(image: Any, tags: Any) -> None:
    """Correct the raw modes where Pillow takes 16-bit planes for 8-bit ones, and where it swaps the
    bytes of decompressed numbers a second time. Raises: BadImage for other separate planes."""
    planar = tags.get(_PLANES, 1) == 2 and tags.get(_SAMPLES, 1) > 1
    bits, order = tags.get(_BITS, (1,))[0], getattr(tags, "prefix", b"II")
    if planar and (image.mode not in ("RGB", "RGBA", "CMYK") or (image.mode, bits) == ("CMYK", 16)):
        raise BadImage("image", f"a TIFF with separate planes of mode {image.mode}; {_REMEDY}")

    def correct(raw: str, compressed: bool) -> str:
        if planar and bits == 16 and len(raw) == 1:
            return raw + (";16L" if order == b"II" else ";16B")
        return (
            raw.replace("B", "N") if compressed and raw in ("I;16BS", "I;32BS", "F;32BF") else raw
        )

    tiles = []
    for tile in image.tile:
        arguments = tile[3]
        if isinstance(arguments, tuple) and arguments:
            arguments = (correct(arguments[0], tile[0] == "libtiff"), *arguments[1:])
        whole = (*tile[:3], arguments)
        tiles.append(type(tile)(*whole) if hasattr(tile, "_replace") else whole)
    image.tile = tiles


def _check_jpeg2000(image: Any) -> None:
    """Raise BadImage for colour of more than 8 bits, the brightest values of which Pillow turns
    into 0."""
    position = image.fp.tell()
    image.fp.seek(0)
    content = image.fp.read()
    image.fp.seek(position)
    start = content.find(b"\xff\x4f\xff\x51")  # start of the codestream, and its sizes
    if start < 0 or len(content) < start + 42:
        return
    (samples,) = struct.unpack_from(">H", content, start + 40)
    depths = content[start + 42 : start + 42 + 3 * samples : 3]
    if samples > 1 and any((depth & 127) + 1 > 8 for depth in depths):
        raise BadImage(
            "image",
            "JPEG 2000 in colour with more than 8 bits is not read, because the decoder turns "
            "white into black; save it with 8 bits, or as PNG",
        )
