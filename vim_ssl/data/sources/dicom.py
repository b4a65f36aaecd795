"""``dicom:``: slices of DICOM files as 8-bit images, without patient information."""

import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from vim_ssl.data.dataset import ImageData
from vim_ssl.data.dicom_pixels import (
    PLAIN,
    functional,
    import_pydicom,
    read_header,
    read_slice,
    silenced,
)
from vim_ssl.data.images import BadImage
from vim_ssl.data.passed_over import pass_over
from vim_ssl.data.registry import Splits, source
from vim_ssl.data.sources.folder import OnDisk, check_option, read_layout, split_folders
from vim_ssl.data.spec import DataSpec, near
from vim_ssl.data.walk import walk_files
from vim_ssl.data.window import Window

# Values of `label=`; none identifies the patient.
LABELS = {
    "modality": "Modality", "body_part": "BodyPartExamined", "view": "ViewPosition",
    "laterality": "ImageLaterality", "folder": "",
}  # fmt: skip
GROUPS = ("patient", "study", "series")  # values of `group=`
_HEADER = [
    "SOPClassUID", "SOPInstanceUID", "ImageType", "PatientID", "StudyInstanceUID",
    "SeriesInstanceUID", "InstanceNumber",
    "ImagePositionPatient", "ImageOrientationPatient", "NumberOfFrames", "Rows", "Columns",
    "BitsAllocated", "PerFrameFunctionalGroupsSequence", "SharedFunctionalGroupsSequence",
    *filter(None, LABELS.values()),
]  # fmt: skip
# Storage classes, and modalities, of pixels that are no image of a patient.
_NO_IMAGES = {
    "1.2.840.10008.5.1.4.1.1.66.4": "DICOM segmentations",
    "1.2.840.10008.5.1.4.1.1.66.7": "DICOM segmentations",
    "1.2.840.10008.5.1.4.1.1.481.2": "DICOM dose grids",
    "1.2.840.10008.5.1.4.1.1.4.2": "DICOM spectra",
    "SEG": "DICOM segmentations",
    "RTDOSE": "DICOM dose grids",
}
# What is skipped without being a fault.
_EXPECTED = ("not DICOM", "DICOM without pixels", *_NO_IMAGES.values())


@dataclass(frozen=True)
class Slice:
    """One frame of a file. ``patient``, ``study``, ``series`` and ``instance`` never leave this
    module."""

    name: str
    frame: int
    patient: str
    study: str
    series: str
    instance: str  # unique identifier of the file
    # Sort key: localizers last, then position along the normal, then instance number.
    position: tuple[bool, float, float]
    syntax: str
    label: str


@source("dicom", extra="medical", options=("label", "window", "group"))
def open_dicom(spec: DataSpec) -> Splits:
    """Open every image of the DICOM files below ``dicom:root``, or of one file, grey or colour,
    8-bit.

    Files are recognised by content, not by name. A file with several frames gives several images.
    The slices of a series are sorted by position, else by instance number. Stored values are
    rescaled (slope and intercept, or a table), windowed with the file's first window, else from the
    0.5th to the 99.5th percentile, and inverted for MONOCHROME1; see
    `vim_ssl.data.dicom_pixels.read_slice`. ``window=-160,240`` sets another window, in the rescaled
    unit (HU for CT).

    Segmentations, dose grids and files without pixels are passed over. A file with a broken header,
    with fewer frames than declared, or of a compression that no installed package decodes, is
    skipped; ``faults`` contains its name but none of its content, and names files that have the
    identifier of another one. Files without preamble are read. Localizers come last in a series.

    The group is the patient, so that no patient is on two sides of a split; it is a number that
    does not reveal the PatientID. Without PatientID the group is the study, else the series, else
    the folder. If all files have the same PatientID, as after some anonymisations, the group is the
    study, or the series if there is one study; ``faults`` says so. ``group=patient``, ``study`` or
    ``series`` chooses. An id is ``hash of the series/index in it``; `locate` returns its file.
    ``label=`` takes modality, body_part, view, laterality or folder (the outermost). Folders are
    splits if all are named train, val or test.

    Raises: ImportError without pydicom, or without a decoder for these files; FileNotFoundError;
        ValueError for a folder without a DICOM image.
    """
    check_option(spec, "group", GROUPS)
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
    ordered, others = _ordered(root, LABELS.get(kind or ""), files)
    id_of = dict(zip(ordered, _ids(ordered), strict=True))
    slices = _decodable(ordered, others, str(root))
    faults = []
    for what, names in others.items():
        if what in _EXPECTED:
            pass_over(what, len(names), names)
        else:
            faults.append(f"skipped {_listed({what: names})}")
    faults += _copies(slices)
    names = sorted({one.name for one in slices})
    group = spec.group or _finest_needed(slices, faults)
    keys = dict.fromkeys(getattr(one, group) for one in slices)
    number_of = {key: f"{group}-{i:05d}" for i, key in enumerate(keys)}

    def choose(spec: DataSpec) -> ImageData:
        layout = read_layout(names, spec.split, "folder" if kind == "folder" else "none", str(root))
        inside = set(layout.names)
        chosen = [one for one in slices if one.name in inside]
        ids = [id_of[one] for one in chosen]

        labels, classes = None, layout.classes
        if label_of := layout.label_of:
            labels = [label_of[one.name] for one in chosen]
        elif kind:
            classes = sorted({one.label for one in slices} - {""})
            labels = [classes.index(one.label) if one.label else -1 for one in chosen]
        rows = [(one.name, one.frame) for one in chosen]
        return ImageData(
            DicomImages(str(root), rows, window), ids, name=str(spec), labels=labels,
            classes=classes, groups=[number_of[getattr(one, group)] for one in chosen],
            splits=layout.splits, split=layout.split, faults=faults,
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
    contents: ClassVar[str] = "dicom"

    def names(self, row: int) -> list[str]:
        return [self.rows[row][0]]

    def part(self, row: int) -> str:
        return f"frame {self.rows[row][1]}"

    def __getitem__(self, row: int) -> np.ndarray:
        name, frame = self.rows[row]
        try:
            with silenced():
                return read_slice(os.path.join(self.root, name), frame, self.window)
        except FileNotFoundError:
            raise BadImage(name, "the file no longer exists") from None
        except BadImage as error:
            raise BadImage(name, error.reason) from None
        except Exception as error:  # decoders raise errors of nearly any type for a broken file
            # The error's message is left out because it may quote the header.
            raise BadImage(name, f"its pixels cannot be read ({type(error).__name__})") from None


# ---------------------------------------------------------------- headers


def _ordered(
    root: Path, label: str | None, files: list[str] | None = None
) -> tuple[list[Slice], dict[str, list[str]]]:
    """Return the slices below root, or of ``files`` in it, sorted within each series, and the
    skipped files by reason."""
    if not root.is_dir():
        raise FileNotFoundError(f"dicom:{root}: the folder does not exist.")
    names = walk_files(root)[0] if files is None else files
    names = [name for name in names if name.rpartition("/")[2].upper() != "DICOMDIR"]
    others: dict[str, list[str]] = {}
    by_series: dict[str, list[Slice]] = {}
    import_pydicom()
    with silenced(), ThreadPoolExecutor(8) as pool:
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
            header = read_header(file, _HEADER)
            left = os.fstat(file.fileno()).st_size - file.tell()
        for kind in (header.get("SOPClassUID"), header.get("Modality")):
            if str(kind) in _NO_IMAGES:
                return _NO_IMAGES[str(kind)]
        if not header.get("Rows"):
            return "DICOM without pixels"
        return _slices(header, name, label, left)
    except OSError:
        return "unreadable"
    except pydicom.errors.InvalidDicomError:
        return "not DICOM"
    except Exception:  # readers raise errors of nearly any type for broken headers
        return "broken header"


def _slices(header: Any, name: str, label: str | None, left: int) -> list[Slice] | str:
    """Return the result of `_read_header` for a header followed by ``left`` bytes of pixels.

    Raises: ValueError, TypeError for invalid values.
    """
    syntax = str(header.file_meta.TransferSyntaxUID)
    frames = int(header.get("NumberOfFrames") or 1)
    # Compressed frames may have any size; for colour, only one channel is required.
    least = header.Rows * header.Columns * header.BitsAllocated / 8 if syntax in PLAIN else 0
    if frames < 1 or (frames > 1 and frames * least > left):
        return "number of frames differs from the header"
    # If tags are blank (anonymised files), a folder counts as one series of one patient.
    series = str(header.get("SeriesInstanceUID") or name.rpartition("/")[0])
    study = str(header.get("StudyInstanceUID") or series)
    patient = str(header.get("PatientID") or study)
    text = str(header.get(label) or "").strip().lower() if label else ""
    instance, number = str(header.get("SOPInstanceUID") or ""), header.get("InstanceNumber") or 0
    localizer = "LOCALIZER" in (header.get("ImageType") or ())
    return [
        Slice(name, frame, patient, study, series, instance,
              (localizer, _position(header, frame), float(number)), syntax, text)
        for frame in range(frames)
    ]  # fmt: skip


def _position(header: Any, frame: int) -> float:
    """Return the position of a slice along the normal of its series (mm); 0 if not declared."""
    origin = functional(header, frame, "PlanePositionSequence").get("ImagePositionPatient")
    axes = functional(header, frame, "PlaneOrientationSequence").get("ImageOrientationPatient")
    if not origin or not axes or len(origin) != 3 or len(axes) != 6:
        return 0.0
    normal = np.cross(np.array(axes[:3], float), np.array(axes[3:], float))
    position = round(float(normal @ np.array(origin, float)), 3)
    if not np.isfinite(position):  # cannot be sorted
        raise ValueError("no position")
    return position


def _ids(slices: Sequence[Slice]) -> list[str]:
    count: Counter[str] = Counter()
    ids = []
    for one in slices:
        series = blake2b(one.series.encode(), digest_size=6).hexdigest()
        ids.append(f"{series}/{count[series]:04d}")
        count[series] += 1
    return ids


def _decodable(slices: list[Slice], others: dict[str, list[str]], root: str) -> list[Slice]:
    """Return the slices that the installed packages decode; add the other files to ``others``.

    Raises: ImportError if no slice is left, and ValueError if no package could decode one.
    """
    from pydicom.pixels import get_decoder
    from pydicom.uid import UID

    missing: dict[str, str] = {}
    needed = []
    for syntax in sorted({one.syntax for one in slices}):
        name = UID(syntax).name if UID(syntax).is_transfer_syntax else "unknown"
        try:
            decoder = get_decoder(UID(syntax))
        except NotImplementedError:
            missing[syntax] = f"{name}, a transfer syntax that is not read"
            continue
        if not decoder.is_available:
            needed.append(
                f"{name} need another package: {'; or '.join(decoder.missing_dependencies)}"
            )
            missing[syntax] = f"files with the transfer syntax {needed[-1]}"
    kept = [one for one in slices if one.syntax not in missing]
    if not kept and needed:
        raise ImportError(
            f"dicom:{root}: files with the transfer syntax {needed[0]}. Install most decoders "
            "with: pip install 'vim-ssl[medical]'"
        )
    for one in slices:
        if one.syntax in missing and one.name not in others.setdefault(missing[one.syntax], []):
            others[missing[one.syntax]].append(one.name)
    if not kept:
        raise ValueError(f"dicom:{root} contains no image that can be read: {_listed(others)}.")
    return kept


def _finest_needed(slices: Sequence[Slice], faults: list[str]) -> str:
    """Return what groups the slices: the patient, or, if all have the same, the study or series;
    ``faults`` then says so."""
    group = next((g for g in GROUPS if len({getattr(one, g) for one in slices}) > 1), GROUPS[0])
    if group != GROUPS[0]:
        faults.append(
            "all files have the same PatientID, or none, as after anonymisation; the group is the "
            f"{group}, so images of one patient may be in training and in test. group=patient "
            "keeps all together."
        )
    return group


def _copies(slices: list[Slice]) -> list[str]:
    """Describe the files that have the identifier of another file."""
    names: dict[str, list[str]] = {}
    for one in slices:
        if one.instance and one.name not in (same := names.setdefault(one.instance, [])):
            same.append(one.name)
    copies = [same for same in names.values() if len(same) > 1]
    if not copies:
        return []
    some = ", ".join(" = ".join(same[:2]) for same in copies[:3])
    return [
        f"{sum(map(len, copies)) - len(copies):,} files have the SOPInstanceUID of another one, as "
        f"copies do ({some}{', …' if len(copies) > 3 else ''}); keep one of each"
    ]
