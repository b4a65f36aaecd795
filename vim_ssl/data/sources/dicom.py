"""``dicom:``: slices of DICOM files as 8-bit images, without patient information."""

import logging
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from vim_ssl.data.dataset import ImageData
from vim_ssl.data.images import BadImage
from vim_ssl.data.pixels import to_8bit
from vim_ssl.data.registry import Splits, source
from vim_ssl.data.sources.folder import OnDisk, read_layout, split_folders
from vim_ssl.data.spec import DataSpec, near
from vim_ssl.data.walk import walk_files
from vim_ssl.data.window import Window
from vim_ssl.utils.optional import require

log = logging.getLogger(__name__)

# Values of `label=`; none identifies the patient.
LABELS = {
    "modality": "Modality", "body_part": "BodyPartExamined", "view": "ViewPosition",
    "laterality": "ImageLaterality", "folder": "",
}  # fmt: skip
DEFAULT_WINDOW = Window(0.5, 99.5, percent=True)
_HEADER = [
    "SOPClassUID", "PatientID", "StudyInstanceUID", "SeriesInstanceUID", "InstanceNumber",
    "ImagePositionPatient", "ImageOrientationPatient", "NumberOfFrames", "Rows", "Columns",
    "BitsAllocated", "PerFrameFunctionalGroupsSequence", "SharedFunctionalGroupsSequence",
    *filter(None, LABELS.values()),
]  # fmt: skip
_VALUES = [
    "PhotometricInterpretation", "RescaleSlope", "RescaleIntercept", "ModalityLUTSequence",
    "WindowCenter", "WindowWidth", "VOILUTFunction", "VOILUTSequence", "PixelPaddingValue",
    "BitsStored", "PixelRepresentation", "SamplesPerPixel", "PerFrameFunctionalGroupsSequence",
    "SharedFunctionalGroupsSequence",
    *(f"{colour}PaletteColorLookupTable{part}" for colour in ("Red", "Green", "Blue")
      for part in ("Descriptor", "Data")),
    *(f"Segmented{colour}PaletteColorLookupTableData" for colour in ("Red", "Green", "Blue")),
]  # fmt: skip

# Uncompressed transfer syntaxes: implicit, explicit and big-endian.
_PLAIN = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2")


@dataclass(frozen=True)
class Slice:
    """One frame of a file. ``patient`` and ``series`` never leave this module."""

    name: str
    frame: int
    patient: str
    series: str
    position: tuple[float, float]  # sort key: position along the normal, then instance number
    syntax: str
    label: str


@source("dicom", extra="medical", options=("label", "window"))
def open_dicom(spec: DataSpec) -> Splits:
    """Open every image of the DICOM files below ``dicom:root``, or of one file, grey or colour,
    8-bit.

    Files are recognised by content, not by name. A file with several frames gives several images, a
    file without pixels gives none. The slices of a series are sorted by position, else by instance
    number. Stored values are rescaled (slope and intercept, or a table), windowed with the file's
    first window, else from the 0.5th to the 99.5th percentile, and inverted for MONOCHROME1.
    ``window=-160,240`` sets another window, in the rescaled unit (HU for CT).

    A file with a broken header, or with fewer frames than declared, is skipped with a warning that
    contains its name but none of its content.

    The group is the patient, so that no patient is on two sides of a split; it is a number that
    does not reveal the PatientID. Without PatientID the group is the study, else the series, else
    the folder. An id is ``hash of the series/index in it``; `locate` returns its file. ``label=``
    takes modality, body_part, view, laterality or folder (the outermost). Folders are splits if all
    are named train, val or test.

    Raises: ImportError without pydicom, or without a decoder for these files; FileNotFoundError;
        ValueError for a folder without a DICOM image.
    """
    window = Window.parse(spec.window) if spec.window else None
    kind = None if spec.label == "none" else spec.label
    if kind and kind not in LABELS:
        raise ValueError(
            f"dicom:{spec.location}: unsupported label={kind}.{near(kind, list(LABELS))} Use one "
            f"of {', '.join(LABELS)}. Free-text fields are not allowed because they can contain "
            "patient names."
        )
    root, files = Path(spec.location).expanduser(), None
    if root.is_file():
        root, files = root.parent, [root.name]
    slices, others = _ordered(root, LABELS.get(kind or ""), files)
    _check_syntaxes({one.syntax for one in slices})
    if others:
        log.warning("dicom:%s: skipped %s", root, _listed(others))
    names = sorted({one.name for one in slices})
    patients = {name: f"patient-{i:05d}"
                for i, name in enumerate(dict.fromkeys(one.patient for one in slices))}  # fmt: skip

    def choose(spec: DataSpec) -> ImageData:
        layout = read_layout(names, spec.split, "folder" if kind == "folder" else "none", str(root))
        inside = set(layout.names)
        chosen = [one for one in slices if one.name in inside]
        ids = [name for name, one in zip(_ids(slices), slices, strict=True) if one.name in inside]

        labels, classes = None, layout.classes
        if label_of := layout.label_of:
            labels = [label_of[one.name] for one in chosen]
        elif kind:
            classes = sorted({one.label for one in slices} - {""})
            labels = [classes.index(one.label) if one.label else -1 for one in chosen]
        rows = [(one.name, one.frame) for one in chosen]
        return ImageData(
            DicomImages(str(root), rows, window), ids, name=str(spec), labels=labels,
            classes=classes, groups=[patients[one.patient] for one in chosen],
            splits=layout.splits, split=layout.split,
        )  # fmt: skip

    return Splits(split_folders(names), choose)


def locate(root: str | Path) -> dict[str, str]:
    """Map every id of ``dicom:root`` to its file, to inspect images reported as broken.

    Do not publish the paths: they may reveal more about a patient than the ids.
    """
    slices, _ = _ordered(Path(root).expanduser(), None)
    return {name: one.name for name, one in zip(_ids(slices), slices, strict=True)}


@dataclass(eq=False)
class DicomImages(OnDisk):
    """Slices as uint8 (h, w) or (h, w, 3); a row is (file name, frame)."""

    window: Window | None

    def names(self, row: int) -> list[str]:
        return [self.rows[row][0]]

    def __getitem__(self, row: int) -> np.ndarray:
        name, frame = self.rows[row]
        try:
            with _silenced():
                return read_slice(os.path.join(self.root, name), frame, self.window)
        except FileNotFoundError:
            raise BadImage(name, "the file no longer exists") from None
        except Exception as error:  # decoders raise errors of nearly any type for a broken file
            # The error's message is left out because it may quote the header.
            raise BadImage(name, f"its pixels cannot be read ({type(error).__name__})") from None


def read_slice(path: str, frame: int = 0, window: Window | None = None) -> np.ndarray:
    """Read one frame of a DICOM file as uint8 (h, w) or (h, w, 3); see `open_dicom`.

    Raises: pydicom's errors for an unreadable file.
    """
    pydicom = import_pydicom()
    from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_voi_lut, pixel_array

    header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=_VALUES)
    stored = pixel_array(path, index=frame)
    colours = header.get("PhotometricInterpretation", "")
    if colours == "PALETTE COLOR":
        coloured = apply_color_lut(stored, header)
        return to_8bit(coloured, 0, np.iinfo(coloured.dtype).max)
    if stored.ndim == 3:
        return to_8bit(stored, 0, 2 ** header.get("BitsStored", 8) - 1)

    scale = _functional(header, frame, "PixelValueTransformationSequence")
    values = apply_modality_lut(stored, scale).astype(np.float64)
    if (padding := header.get("PixelPaddingValue")) is not None:
        values[stored == padding] = np.nan
    voi = _functional(header, frame, "FrameVOILUTSequence")
    if window is None and "WindowCenter" not in voi and "VOILUTSequence" in voi:
        table = apply_voi_lut(np.nan_to_num(values).astype(np.int64), voi)
        depth = voi.VOILUTSequence[0].LUTDescriptor[2]
        grey = to_8bit(table, 0, 2**depth - 1)
    elif window is None and "WindowCenter" in voi and "WindowWidth" in voi:
        grey = to_8bit(_windowed(values, voi), 0, 1)
    else:
        grey = to_8bit(values, *(window or DEFAULT_WINDOW).limits(values))
    if colours == "MONOCHROME1":
        return np.where(np.isnan(values), 0, 255 - grey).astype(np.uint8)
    return grey


def _windowed(values: np.ndarray, voi: Any) -> np.ndarray:
    """Map values to 0..1 with a file's first window: DICOM PS3.3, C.11.2.1.2 and C.11.2.1.3."""
    centre, width = (
        float(value if isinstance(value, float | int) else value[0])
        for value in (voi.WindowCenter, voi.WindowWidth)
    )
    function = voi.get("VOILUTFunction", "LINEAR")
    if function == "SIGMOID":
        return 1 / (1 + np.exp(-4 * (values - centre) / width))
    if function == "LINEAR_EXACT":
        return (values - centre) / width + 0.5
    return (values - (centre - 0.5)) / max(width - 1, 1e-6) + 0.5


# ---------------------------------------------------------------- headers


def import_pydicom() -> Any:
    """Return the module pydicom. Raises: ImportError with the package to install."""
    return require("pydicom", "medical", "DICOM files (dicom:)")


@contextmanager
def _silenced() -> Iterator[None]:
    """Suppress pydicom's warnings and log messages, because they quote header values."""
    logger = logging.getLogger("pydicom")
    before, logger.disabled = logger.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.disabled = before


def _ordered(
    root: Path, label: str | None, files: list[str] | None = None
) -> tuple[list[Slice], dict[str, list[str]]]:
    """Return the slices below root, or of ``files`` in it, sorted within each series, and the
    skipped files by reason."""
    if not root.is_dir():
        raise FileNotFoundError(f"dicom:{root}: the folder does not exist.")
    names = walk_files(root)[0] if files is None else files
    names = [name for name in names if name.rpartition("/")[2] != "DICOMDIR"]
    others: dict[str, list[str]] = {}
    by_series: dict[str, list[Slice]] = {}
    import_pydicom()
    with _silenced(), ThreadPoolExecutor(8) as pool:
        read = pool.map(lambda name: _read_header(root, name, label), names)
        for name, result in zip(names, read, strict=True):
            if isinstance(result, str):
                others.setdefault(result, []).append(name)
                continue
            for one in result:
                by_series.setdefault(one.series, []).append(one)
    if not by_series:
        raise ValueError(
            f"dicom:{root} contains no DICOM image at any depth; it contains {_listed(others)}."
        )
    slices = [
        one
        for series in by_series.values()
        for one in sorted(series, key=lambda one: (*one.position, one.name, one.frame))
    ]
    return slices, others


def _listed(others: dict[str, list[str]]) -> str:
    """Describe the skipped files, with example names of each kind."""
    kinds = sorted(others.items(), key=lambda kind: -len(kind[1]))[:5]
    return ", ".join(
        f"{len(names)} × {what} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
        for what, names in kinds
    ) or "no files"  # fmt: skip


def _read_header(root: Path, name: str, label: str | None) -> list[Slice] | str:
    """Return the slices of a file, or the reason why it has none."""
    pydicom = import_pydicom()
    try:
        with open(root / name, "rb") as file:
            header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=_HEADER)
            left = os.fstat(file.fileno()).st_size - file.tell()
        if not header.get("Rows"):
            return "DICOM without pixels"
        return _slices(header, name, label, left)
    except pydicom.errors.InvalidDicomError:
        return "not DICOM"
    except Exception:  # readers raise errors of nearly any type for broken headers
        return "broken header"


def _slices(header: Any, name: str, label: str | None, left: int) -> list[Slice] | str:
    """Return the result of `_read_header` for a header followed by ``left`` bytes of pixels.

    Raises: ValueError, TypeError for invalid values.
    """
    meta = getattr(header, "file_meta", {})
    syntax = str(meta.get("TransferSyntaxUID", ""))
    frames = int(header.get("NumberOfFrames") or 1)
    # Compressed frames may have any size; for colour, only one channel is required.
    least = header.Rows * header.Columns * header.BitsAllocated / 8 if syntax in _PLAIN else 0
    if frames < 1 or (frames > 1 and frames * least > left):
        return "number of frames differs from the header"
    # If tags are blank (anonymised files), a folder counts as one series of one patient.
    series = str(header.get("SeriesInstanceUID") or name.rpartition("/")[0])
    patient = str(header.get("PatientID") or header.get("StudyInstanceUID") or series)
    text = str(header.get(label) or "").strip().lower() if label else ""
    number = float(header.get("InstanceNumber") or 0)
    return [
        Slice(name, frame, patient, series, (_position(header, frame), number), syntax, text)
        for frame in range(frames)
    ]


def _position(header: Any, frame: int) -> float:
    """Return the position of a slice along the normal of its series (mm); 0 if not declared."""
    origin = _functional(header, frame, "PlanePositionSequence").get("ImagePositionPatient")
    axes = _functional(header, frame, "PlaneOrientationSequence").get("ImageOrientationPatient")
    if not origin or not axes or len(origin) != 3 or len(axes) != 6:
        return 0.0
    normal = np.cross(np.array(axes[:3], float), np.array(axes[3:], float))
    position = round(float(normal @ np.array(origin, float)), 3)
    if not np.isfinite(position):  # cannot be sorted
        raise ValueError("no position")
    return position


def _functional(header: Any, frame: int, sequence: str) -> Any:
    """Return the item of an enhanced file that describes a frame; else the header itself."""
    frames = header.get("PerFrameFunctionalGroupsSequence") or []
    shared = header.get("SharedFunctionalGroupsSequence") or []
    for group in (*frames[frame : frame + 1], *shared[:1]):
        if items := group.get(sequence):
            return items[0]
    return header


def _ids(slices: Sequence[Slice]) -> list[str]:
    count: Counter[str] = Counter()
    ids = []
    for one in slices:
        series = blake2b(one.series.encode(), digest_size=6).hexdigest()
        ids.append(f"{series}/{count[series]:04d}")
        count[series] += 1
    return ids


def _check_syntaxes(syntaxes: set[str]) -> None:
    """Raise ImportError for a compression that no installed package decodes."""
    from pydicom.pixels import get_decoder
    from pydicom.uid import UID

    for syntax in sorted(syntaxes - {""}):
        try:
            decoder = get_decoder(UID(syntax))
        except NotImplementedError:
            continue  # its images fail individually when they are decoded
        if not decoder.is_available:
            needed = "; or ".join(decoder.missing_dependencies)
            raise ImportError(
                f"dicom: files with the transfer syntax {UID(syntax).name} need another package: "
                f"{needed}. Install most decoders with: pip install 'vim-ssl[medical]'"
            )
