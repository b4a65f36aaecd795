"""Decode image files of common formats to 8-bit "RGB" or "L"."""

import io
import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

# The size from which Pillow refuses images too; one of this size takes half a gigabyte.
DEFAULT_MAX_PIXELS = 178_956_970
MODES = ("RGB", "L")
_ORIENTATION = 0x0112
# Pillow passes EPS files to Ghostscript, which executes them as programs: unsafe.
_REFUSED_FORMATS = ("EPS",)


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
    Adobe writes them (inverted), and converted without a colour profile.

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
        with _open(source, limit) as image:
            if min_side:
                image.draft(image.mode, (min_side, min_side))
            if image.width * image.height > limit:
                raise BadImage(name, _too_large(f"{image.width}×{image.height} pixels", limit))
            if image.format != "TIFF":  # Pillow rotates a TIFF while loading and drops the tag
                image.load()
            if dense:
                _check_drawn_upright(image)
            image.load()
            return clean_image(image, mode)
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
        with _open(source, most_pixels()) as image:
            return image.size
    except Exception as error:  # as in `decode_image`
        name = f"{len(source)} bytes" if isinstance(source, bytes) else str(source)
        raise BadImage(name, f"{type(error).__name__}: {error}") from error


def clean_image(image: Image.Image, mode: str | None = None) -> Image.Image:
    """Convert any Pillow image to 8-bit "RGB" or "L", upright and opaque.

    - The EXIF orientation is applied.
    - Transparency (alpha, or a transparent colour) is composited on white.
    - Integer grey of 12, 16 or 32 bits maps linearly from its type's full range to 0..255, so
      the same value is the same grey in every image.
    - Float grey within 0..1 is scaled by 255; otherwise the image's finite minimum and maximum
      become 0 and 255. NaN becomes 0.
    - Black and white becomes "L"; palette, CMYK, YCbCr and HSV become "RGB".

    Raises: BadImage for a mode that cannot be converted.
    """
    image = _upright(image)
    if image.mode.startswith(("I", "F")):
        image = _deep_grey_to_8bit(image)
    plain = "L" if image.mode in ("1", "L", "LA", "La") else "RGB"
    try:
        if image.has_transparency_data:
            image = image.convert("LA" if plain == "L" else "RGBA")
            opaque = Image.new(plain, image.size, "white")
            opaque.paste(image.convert(plain), mask=image.getchannel("A"))
            image = opaque
        mode = mode or plain
        return image if image.mode == mode else image.convert(plain).convert(mode)
    except ValueError as error:
        raise BadImage("image", f"mode {image.mode} has no conversion to {plain}") from error


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
    if values.ndim == 2 or (values.dtype == np.uint8 and values.shape[2:] == (3,)):
        try:
            return clean_image(Image.fromarray(values))
        except TypeError:
            reason = f"grey of type {values.dtype} is not an image; convert it to uint8"
            raise BadImage("image", reason) from None
    if not np.isfinite(values).any():
        raise BadImage("image", "all its values are missing")
    return values


def _open(source: str | Path | bytes, limit: int) -> Image.Image:
    if Image.MAX_IMAGE_PIXELS is not None and limit > DEFAULT_MAX_PIXELS:
        # The user set a higher limit; Pillow would refuse at its default before ours is checked.
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, limit)
    Image.init()
    formats = [name for name in Image.OPEN if name not in _REFUSED_FORMATS]
    return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=formats)


def most_pixels() -> int:
    """The maximum number of pixels of an image to decode: VIM_SSL_MAX_PIXELS or the default."""
    given = os.environ.get("VIM_SSL_MAX_PIXELS", "")
    if given and not given.isdigit():
        raise ValueError(f"VIM_SSL_MAX_PIXELS is {given!r}; expected a whole number of pixels.")
    return int(given or 0) or DEFAULT_MAX_PIXELS


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


def _deep_grey_to_8bit(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    if image.mode.startswith("F"):
        finite = values[np.isfinite(values)].astype(np.float64)
        if not finite.size:
            raise BadImage("image", "a float image without a finite value")
        low, high = float(finite.min()), float(finite.max())
        if low >= 0 and high <= 1:
            low, high = 0.0, 1.0
    else:
        low, high = _integer_range(image)
        if low == 0 and high == 2**32 - 1:  # Pillow keeps unsigned 32 bits in a signed type
            values = values.astype(np.int64) & 0xFFFFFFFF
    scaled = (values.astype(np.float64) - low) * (255 / (high - low or 1))
    grey = np.nan_to_num(scaled, nan=0, posinf=255, neginf=0).clip(0, 255).round()
    return Image.fromarray(grey.astype(np.uint8))


def _integer_range(image: Image.Image) -> tuple[float, float]:
    """Minimum and maximum of the file's integer type; Pillow's mode does not determine it."""
    tags = getattr(image, "tag_v2", None)  # TIFF
    if tags is not None:
        bits = tags.get(258, (16,))[0]  # BitsPerSample
        signed = tags.get(339, (1,))[0] == 2  # SampleFormat
        return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    if image.mode == "I" and image.format is None:  # created in memory: a true 32-bit image
        return -(2**31), 2**31 - 1
    return 0, 2**16 - 1  # PNG and PGM; older versions of Pillow open them as "I"


EXTENSIONS = (
    ".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png",
    ".pnm", ".ppm", ".tif", ".tiff", ".webp",
)  # fmt: skip
