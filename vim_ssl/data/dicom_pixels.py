"""The pixels of DICOM files as 8-bit images: how their header says that numbers are to be shown."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from vim_ssl.data.pixels import BadImage, look_up, to_8bit
from vim_ssl.data.window import Window
from vim_ssl.utils.optional import require

DEFAULT_WINDOW = Window(0.5, 99.5, percent=True)
# Uncompressed transfer syntaxes: implicit, explicit and big-endian; and run-length coding.
IMPLICIT, EXPLICIT, BIG_ENDIAN = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2"
DEFLATED, RUN_LENGTH = "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.5"
PLAIN = (IMPLICIT, EXPLICIT, BIG_ENDIAN)
# JPEG-LS and JPEG 2000: their codestream has a depth of its own, by which pydicom corrects values.
_CODED_DEPTH = tuple(f"1.2.840.10008.1.2.4.{i}" for i in (80, 81, 90, 91, 92, 93, 201, 202, 203))
_GREY = ("MONOCHROME1", "MONOCHROME2", "PALETTE COLOR")
_COLOURS = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")  # pydicom makes them RGB
_BANDS = ("Red", "Green", "Blue")
_PADDING = [
    (f"{kind}PixelPaddingValue", f"{kind}PixelPaddingRangeLimit")
    for kind in ("", "Float", "DoubleFloat")
]
# Without these the meaning of the pixels is unknown; floats have no representation.
_REQUIRED = ("SamplesPerPixel", "PhotometricInterpretation", "BitsAllocated")
_OF_INTEGERS = ("BitsStored", "PixelRepresentation")
TAGS = [
    *_REQUIRED, *_OF_INTEGERS, "HighBit", "PixelPresentation",
    "RescaleSlope", "RescaleIntercept", "ModalityLUTSequence",
    "WindowCenter", "WindowWidth", "VOILUTFunction", "VOILUTSequence",
    *(name for names in _PADDING for name in names),
    "PerFrameFunctionalGroupsSequence", "SharedFunctionalGroupsSequence",
    *(f"{band}PaletteColorLookupTable{part}" for band in _BANDS
      for part in ("Descriptor", "Data")),
    *(f"Segmented{band}PaletteColorLookupTableData" for band in _BANDS),
]  # fmt: skip


def import_pydicom() -> Any:
    """Return the module pydicom. Raises: ImportError with the package to install."""
    return require("pydicom", "medical", "DICOM files (dicom:)")


def read_header(file: Any, tags: list[str]) -> Any:
    """Read these elements of an open file, except the pixels. Files without preamble, or without
    file meta information, are read too; their transfer syntax follows from how they are encoded.

    Raises: pydicom's InvalidDicomError for other files; its errors for damaged ones.
    """
    pydicom = import_pydicom()
    head = file.read(132)
    file.seek(0)
    # Without preamble, the first element is of group 2 or 8, in either byte order.
    first = (b"\2\0", b"\0\2", b"\x08\0", b"\0\x08")
    if head[128:] != b"DICM" and head[:2] not in first:
        raise pydicom.errors.InvalidDicomError
    header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=tags, force=True)
    if not header.file_meta.get("TransferSyntaxUID"):
        implicit, little = header.original_encoding
        header.file_meta.TransferSyntaxUID = (
            IMPLICIT if implicit else EXPLICIT if little else BIG_ENDIAN
        )
    return header


def read_slice(path: str | Path, frame: int = 0, window: Window | None = None) -> np.ndarray:
    """Read one frame of a DICOM file as uint8 (h, w) or (h, w, 3), as a viewer shows it.

    Stored numbers are rescaled, windowed (by the file's first window or table, else by percentiles)
    and inverted for MONOCHROME1; padding is black. Palettes, also supplemental ones, give colour.
    Elements without a value count as absent.

    Args:
        window: another window, in the rescaled unit.
    Raises: BadImage for headers that do not say what the pixels mean; pydicom's errors.
    """
    with open(path, "rb") as file:
        header = read_header(file, TAGS)
    syntax = str(header.file_meta.TransferSyntaxUID)
    _check_meaning(header)
    stored = _decoded(path, header, syntax, frame)
    if stored.ndim == 3:
        return to_8bit(stored, 0, 2**header.BitsStored - 1)
    numbers = _without_unused_bits(stored, header, syntax)
    if header.PhotometricInterpretation == "PALETTE COLOR":
        return _coloured(numbers, header)[0]
    grey = _grey(numbers, _padding(stored, numbers, header), header, frame, window)
    if header.get("PixelPresentation") in ("COLOR", "MIXED") and _has_palette(header):
        colours, first = _coloured(numbers, header)
        return np.where((numbers >= first)[..., None], colours, grey[..., None])
    return grey


def functional(header: Any, frame: int, sequence: str) -> Any:
    """Return the item of an enhanced file that describes a frame; else the header itself."""
    frames = header.get("PerFrameFunctionalGroupsSequence") or []
    shared = header.get("SharedFunctionalGroupsSequence") or []
    for group in (*frames[frame : frame + 1], *shared[:1]):
        if items := group.get(sequence):
            return items[0]
    return header


def stored_frames(path: str | Path) -> np.ndarray:
    """Return the stored numbers of all frames of a DICOM file. Raises: see `read_slice`."""
    with open(path, "rb") as file:
        header = read_header(file, TAGS)
    return _decoded(path, header, str(header.file_meta.TransferSyntaxUID), None)


def _decoded(path: str | Path, header: Any, syntax: str, frame: int | None) -> np.ndarray:
    from pydicom.pixels import pixel_array

    # Unused bits are kept where they may hold a padding value.
    options: dict[str, Any] = {} if syntax in _CODED_DEPTH else {"correct_unused_bits": False}
    if syntax == DEFLATED:
        whole = import_pydicom().dcmread(path)
        whole.file_meta.TransferSyntaxUID = EXPLICIT
        return pixel_array(whole, index=frame, **options)
    try:
        return pixel_array(path, index=frame, transfer_syntax_uid=syntax, **options)
    except RuntimeError:
        if syntax in PLAIN:
            raise
        name = import_pydicom().uid.UID(syntax).name
        raise BadImage("image", f"no installed package decodes its pixels ({name})") from None


def _check_meaning(header: Any) -> None:
    """Raise BadImage if the header does not say what the pixels mean."""
    needed = _REQUIRED if header.get("BitsAllocated") in (32, 64) else _REQUIRED + _OF_INTEGERS
    if missing := [name for name in needed if header.get(name) in (None, "")]:
        raise BadImage("image", f"its header has no value of {', '.join(missing)}")
    known = _GREY if header.SamplesPerPixel == 1 else _COLOURS
    if header.PhotometricInterpretation not in known:
        raise BadImage(
            "image", f"its photometric interpretation is not read; read are {', '.join(known)}"
        )


def _without_unused_bits(stored: np.ndarray, header: Any, syntax: str) -> np.ndarray:
    """Cut numbers to their stored bits: the others may hold overlays, padding or anything."""
    if stored.dtype.kind == "f" or syntax in _CODED_DEPTH:
        return stored
    used, whole = header.BitsStored, 8 * stored.dtype.itemsize
    top = used
    if syntax in (*PLAIN, DEFLATED, RUN_LENGTH) and header.get("HighBit") is not None:
        top = max(used, min(header.HighBit + 1, whole))
    if used >= whole:
        return stored
    return np.right_shift(np.left_shift(stored, whole - top), whole - used)  # keeps the sign


def _padding(stored: np.ndarray, numbers: np.ndarray, header: Any) -> np.ndarray:
    """Return where the pixels are padding, as bool (h, w), from a value or a range of values.

    Both are compared as the file stores them: 63536 is −2000 in signed 16 bits.
    """
    missing = np.zeros(stored.shape, bool)
    for value, limit in _PADDING:
        ends = [number for name in (value, limit) if (number := _number(header, name)) is not None]
        if not ends or _number(header, value) is None:
            continue
        if stored.dtype.kind != "f":
            info = np.iinfo(stored.dtype)
            ends = [(int(end) - info.min) % 2**info.bits + info.min for end in ends]
        for values in (stored, numbers):
            missing |= (values >= min(ends)) & (values <= max(ends))
    return missing


def _grey(
    numbers: np.ndarray, missing: np.ndarray, header: Any, frame: int, window: Window | None
) -> np.ndarray:
    """Return grey as uint8 (h, w)."""
    inverted = header.PhotometricInterpretation == "MONOCHROME1"
    signed = header.get("PixelRepresentation") == 1
    scale = functional(header, frame, "PixelValueTransformationSequence")
    voi = functional(header, frame, "FrameVOILUTSequence")
    if tables := scale.get("ModalityLUTSequence"):
        table, first, _ = _table(tables[0], "LUT", header, signed)
        values, signed = look_up(numbers, table, first).astype(np.float64), False
    else:
        slope, intercept = (_number(scale, f"Rescale{part}") for part in ("Slope", "Intercept"))
        values = numbers * (slope or 1.0) + (intercept or 0.0)  # a slope of 0 cannot be meant
        signed = signed or (intercept or 0.0) < 0
    limits = None if window else _file_window(voi)
    if limits is None and window is None and (tables := voi.get("VOILUTSequence")):
        table, first, top = _table(tables[0], "LUT", header, signed)
        scaled, low, high = look_up(np.rint(values), table, first), 0.0, float(top)
    elif limits is not None:
        scaled, low, high = _windowed(values, *limits), 0.0, 1.0
    else:
        scaled = values
        low, high = (window or DEFAULT_WINDOW).limits(np.where(missing, np.nan, values))
    return to_8bit(scaled, low, high, white_is_zero=inverted, missing=missing)


def _file_window(voi: Any) -> tuple[float, float, str] | None:
    """Return centre, width and function of a file's first window that has a positive width."""
    centres, widths = _numbers(voi, "WindowCenter"), _numbers(voi, "WindowWidth")
    for centre, width in zip(centres, widths, strict=False):
        if centre is not None and width is not None and width > 0:
            return centre, width, str(voi.get("VOILUTFunction") or "LINEAR")
    return None


def _windowed(values: np.ndarray, centre: float, width: float, function: str) -> np.ndarray:
    """Map values to 0..1 with a window: DICOM PS3.3, C.11.2.1.2 and C.11.2.1.3."""
    if function == "SIGMOID":
        return 1 / (1 + np.exp((-4 * (values - centre) / width).clip(max=700)))
    if function == "LINEAR_EXACT":
        return (values - centre) / width + 0.5
    return (values - (centre - 0.5)) / max(width - 1, 1e-6) + 0.5


# ---------------------------------------------------------------- elements


def _numbers(dataset: Any, name: str) -> list[float | None]:
    """Return the values of an element, None for those that are no finite number; [] if absent."""
    value = dataset.get(name)
    several = not isinstance(value, str | bytes) and hasattr(value, "__iter__")
    numbers: list[float | None] = []
    for one in value if several else [] if value is None else [value]:
        try:
            number = float(one)
        except (TypeError, ValueError):
            number = np.nan
        numbers.append(number if np.isfinite(number) else None)
    return numbers


def _number(dataset: Any, name: str) -> float | None:
    """Return the first value of an element; None if it is absent, empty or no finite number."""
    return next(iter(_numbers(dataset, name)), None)


def _table(owner: Any, name: str, header: Any, signed: bool) -> tuple[np.ndarray, int, int]:
    """Read the table in the elements ``name`` + Descriptor and Data.

    Args:
        owner: the dataset that holds it.
        header: the header, which knows the byte order.
        signed: whether the numbers to look up may be below 0.
    Returns: the entries, the number that the first is for, and the entry that is white.
    """
    entries, first, depth = (int(value) for value in owner[f"{name}Descriptor"].value)
    entries = entries % 2**16 or 2**16
    first = (first + 2**15) % 2**16 - 2**15 if signed else first % 2**16
    element = owner[f"{name}Data"]
    big = not header.original_encoding[1]
    if isinstance(element.value, bytes):
        words = len(element.value) >= 2 * entries
        order = ">" if big else "<"
        table = np.frombuffer(element.value, f"{order}u2" if words else np.uint8)
        if not words and big and element.VR == "OW":  # two entries in a word
            table = table[: len(table) // 2 * 2].reshape(-1, 2)[:, ::-1].ravel()
    else:
        table = np.atleast_1d(np.asarray(element.value, np.int64)) % 2**16
        words = len(table) >= entries
        if not words:  # two entries in a word
            table = table.astype("<u2").view(np.uint8)
    table = table[:entries].astype(np.int64)
    top = 2**depth - 1 if words and 8 <= depth <= 16 else 255
    if not len(table) or table.max() > top:
        top = 2**16 - 1
    return table, first, top


def _has_palette(header: Any) -> bool:
    return bool(header.get("RedPaletteColorLookupTableDescriptor"))


def _coloured(numbers: np.ndarray, header: Any) -> tuple[np.ndarray, int]:
    """Return the colours of numbers by the palette, uint8 (h, w, 3), and the number that its first
    entry is for."""
    bands, signed = [], header.get("PixelRepresentation") == 1
    if header.get("RedPaletteColorLookupTableData") is None:
        return _by_segments(numbers, header, signed)
    tables = [_table(header, f"{band}PaletteColorLookupTable", header, signed) for band in _BANDS]
    top = max(top for _, _, top in tables)
    if max(table.max() for table, _, _ in tables) <= 255:  # 8 bits, although 16 are declared
        top = 255
    for table, first, _ in tables:
        bands.append(to_8bit(look_up(numbers, table, first), 0, top))
    return np.stack(bands, axis=-1), tables[0][1]


def _by_segments(numbers: np.ndarray, header: Any, signed: bool) -> tuple[np.ndarray, int]:
    """As `_coloured`, for a palette that is stored in segments."""
    from pydicom.pixels import apply_color_lut

    entries, first, _ = (int(v) for v in header.RedPaletteColorLookupTableDescriptor)
    first = (first + 2**15) % 2**16 - 2**15 if signed else first % 2**16
    ramp = np.arange(entries % 2**16 or 2**16, dtype=np.int64) + first
    table = apply_color_lut(ramp, header)[..., :3]
    return to_8bit(look_up(numbers, table, first), 0, np.iinfo(table.dtype).max), first


@contextmanager
def silenced() -> Iterator[None]:
    """Suppress pydicom's warnings and log messages, because they quote header values."""
    logger = logging.getLogger("pydicom")
    before, logger.disabled = logger.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.disabled = before
