"""Decode image files of common formats to 8-bit "RGB" or "L"."""

import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from vim_ssl.data.pixels import (
    DEFAULT_MAX_PIXELS,
    BadImage,
    Encoding,
    encoding_of,
    grey_from,
    grey_image,
    most_pixels,
    open_image,
)

__all__ = [
    "DEFAULT_MAX_PIXELS", "EXTENSIONS", "MODES", "BadImage", "array_image", "clean_image",
    "decode_image", "image_size", "most_pixels",
]  # fmt: skip

MODES = ("RGB", "L")
_ORIENTATION = 0x0112


def decode_image(
    source: str | Path | bytes,
    *,
    mode: str | None = None,
    min_side: int | None = None,
    max_pixels: int | None = None,
    dense: bool = False,
) -> Image.Image:
    """Decode one image to a loaded 8-bit image. The content determines the format, not the name.

    See `clean_image` for unusual modes. An animation gives its first frame. CMYK JPEGs are read as
    Adobe writes them (inverted). Colour profiles are not applied.

    Args:
        source: a file, or its bytes.
        mode: "RGB" or "L" converts; None keeps colour as "RGB" and grey as "L".
        min_side: decode a large JPEG at 1/2, 1/4 or 1/8 of its size, several times faster, with
            neither side below this (pixels). Other formats ignore it.
        max_pixels: refuse larger images; default: the environment variable VIM_SSL_MAX_PIXELS, else
            `DEFAULT_MAX_PIXELS`.
        dense: the image has a mask or boxes. If its EXIF orientation rotates or mirrors it without
            changing its size, it is refused, because the size of its labels then does not show
            whether they were rotated too.
    Returns: an image in mode "RGB" or "L".
    Raises: BadImage, and no other error, if decoding fails; ValueError for a wrong mode.
    """
    if mode is not None and mode not in MODES:
        raise ValueError(f"mode {mode!r} is not one of 'RGB', 'L' or None.")
    name = f"{len(source)} bytes" if isinstance(source, bytes) else str(source)
    limit = max_pixels or most_pixels()
    try:
        if not (len(source) if isinstance(source, bytes) else os.path.getsize(source)):
            raise BadImage(name, "the file is empty")
        with open_image(source, limit) as image:
            if min_side:
                image.draft(image.mode, (min_side, min_side))
            if image.width * image.height > limit:
                raise BadImage(name, _too_large(f"{image.width}×{image.height} pixels", limit))
            encoding = encoding_of(image)
            if image.format != "TIFF":  # Pillow rotates a TIFF while loading and drops the tag
                image.load()
            if dense:
                _check_drawn_upright(image)
            image.load()
            return _cleaned(image, mode, encoding)
    except BadImage as error:
        raise BadImage(name, error.reason) from None
    except Image.DecompressionBombError as error:
        raise BadImage(name, _too_large(str(error), limit)) from error
    except Image.UnidentifiedImageError as error:
        raise BadImage(name, "not an image that Pillow can read") from error
    except Exception as error:  # decoders raise errors of nearly any type for a broken file
        raise BadImage(name, f"{type(error).__name__}: {error}") from error


def image_size(source: str | Path | bytes) -> tuple[int, int]:
    """Width and height in pixels from the header of an image, before its EXIF orientation.

    Raises: BadImage if Pillow cannot read the header.
    """
    try:
        with open_image(source, most_pixels()) as image:
            return image.size
    except BadImage as error:
        name = f"{len(source)} bytes" if isinstance(source, bytes) else str(source)
        raise BadImage(name, error.reason) from None
    except Exception as error:  # as in `decode_image`
        name = f"{len(source)} bytes" if isinstance(source, bytes) else str(source)
        raise BadImage(name, f"{type(error).__name__}: {error}") from error


def has_many_bits(file: str | Path) -> bool:
    """True if the header of an image file says that it has integers of more than 8 bits.

    Raises: BadImage if Pillow cannot read the header.
    """
    try:
        with open_image(file, most_pixels()) as image:
            encoding = encoding_of(image)
    except BadImage:
        raise
    except Exception as error:  # as in `decode_image`
        raise BadImage(str(file), f"{type(error).__name__}: {error}") from error
    return encoding.bits > 8 and encoding.kind != "f"


def clean_image(image: Image.Image, mode: str | None = None) -> Image.Image:
    """Convert any Pillow image to 8-bit "RGB" or "L", upright and opaque.

    - The EXIF orientation is applied.
    - Transparency (alpha, or a transparent colour) is composited on white.
    - Integer grey of 12, 16 or 32 bits, and signed grey, map linearly from their type's full range
      to 0..255, so the same value is the same grey in every image. WhiteIsZero is inverted.
    - Float grey within 0..1 is scaled by 255; otherwise the image's finite minimum and maximum
      become 0 and 255. NaN and infinite values become 0.
    - Black and white becomes "L"; palette, CMYK, YCbCr and HSV become "RGB".

    Raises: BadImage for a mode that cannot be converted, and for a file that is decoded wrongly;
        see `vim_ssl.data.pixels.encoding_of`.
    """
    return _cleaned(image, mode, encoding_of(image))


def _cleaned(image: Image.Image, mode: str | None, encoding: Encoding) -> Image.Image:
    image = _upright(image)
    signed = image.mode == "L" and encoding.kind == "i"
    scaled_key = encoding.key is not None and encoding.bits in (2, 4, 16)
    if scaled_key and image.mode == "RGB":
        raise BadImage(
            "image",
            "a 16-bit image with one transparent colour is not read; save it with 8 bits, or with "
            "an alpha channel",
        )
    stored: dict[str, Any] = {}
    if image.mode.startswith(("I", "F")) or signed or (scaled_key and image.mode == "L"):
        image = grey_image(image, encoding)
        stored = {key: image.info[key] for key in ("missing", "fills") if key in image.info}
    plain = "L" if image.mode in ("1", "L", "LA", "La") else "RGB"
    try:
        if image.has_transparency_data:
            image = image.convert("LA" if plain == "L" else "RGBA")
            opaque = Image.new(plain, image.size, "white")
            opaque.paste(image.convert(plain), mask=image.getchannel("A"))
            image = opaque
        mode = mode or plain
        image = image if image.mode == mode else image.convert(plain).convert(mode)
    except ValueError as error:
        raise BadImage("image", f"mode {image.mode} has no conversion to {plain}") from error
    if encoding.bits > 8 and encoding.kind != "f":
        stored["bits"] = encoding.bits
    image.info.update(stored.items())
    return image


def array_image(values: np.ndarray) -> Image.Image | np.ndarray:
    """Convert an array to an item's ``image``.

    Grey of any depth (h, w), and uint8 grey (h, w, 1) or colour (h, w, 3), become PIL images; see
    `clean_image`. Other bands (h, w, bands) stay an array: see
    `vim_ssl.data.transforms.image.as_tensor` for their units.

    Raises: BadImage for another number of dimensions, no pixels, grey of a type that images do not
        have, such as int64, and bands without a finite value.
    """
    if values.ndim not in (2, 3) or 0 in values.shape:
        raise BadImage("image", f"an array of shape {values.shape} is not an image")
    if values.dtype == np.uint8 and values.ndim == 3 and values.shape[2] == 1:
        values = values[..., 0]
    if values.dtype in (bool, np.uint8) and values.shape[2:] in ((), (3,)):
        image = Image.fromarray(values)
        return image if values.dtype == np.uint8 else clean_image(image)
    if values.ndim == 2:
        kind, bits = values.dtype.kind, 8 * values.dtype.itemsize
        if kind not in "uif" or (kind in "ui" and bits > 32):
            reason = f"grey of type {values.dtype} is not an image; convert it to uint8"
            raise BadImage("image", reason)
        return grey_from(values, Encoding(bits, kind))
    if not np.isfinite(values).any():
        raise BadImage("image", "all its values are missing")
    return values


def _too_large(what: str, limit: int) -> str:
    return f"{what}; the limit is {limit} pixels. To raise it, set VIM_SSL_MAX_PIXELS"


def _check_drawn_upright(image: Image.Image) -> None:
    """Raise BadImage if it is unknown whether labels were drawn on the rotated image: some programs
    apply the EXIF orientation, others, such as COCO's tools, do not."""
    try:
        turn = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged metadata: no program rotates the image
        return
    if turn in (2, 3, 4) or (turn in (5, 6, 7, 8) and image.width == image.height):
        raise BadImage(
            "image",
            f"its EXIF orientation is {turn}, and it is not known whether its labels are rotated "
            "too; save image and labels upright, without the tag",
        )


def _upright(image: Image.Image) -> Image.Image:
    try:
        if image.getexif().get(_ORIENTATION, 1) == 1:
            return image
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged metadata: keep the image as it is
        return image


EXTENSIONS = (
    ".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png",
    ".pnm", ".ppm", ".tif", ".tiff", ".webp",
)  # fmt: skip
