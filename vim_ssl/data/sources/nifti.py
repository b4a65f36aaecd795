"""``nifti:``: the planes of NIfTI volumes as 8-bit images."""

import gzip
import json
import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache, partial
from hashlib import blake2b
from math import prod
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from vim_ssl.data.dataset import ImageData
from vim_ssl.data.images import BadImage
from vim_ssl.data.labels import IGNORE, checked, checked_classes, classes_in, named_classes
from vim_ssl.data.passed_over import add_warning, pass_over, some_of
from vim_ssl.data.pixels import to_8bit
from vim_ssl.data.registry import Splits, source
from vim_ssl.data.sources.folder import (
    OnDisk,
    check_option,
    folder_groups,
    match_masks,
    read_layout,
    split_folders,
)
from vim_ssl.data.spec import DataSpec
from vim_ssl.data.window import Window
from vim_ssl.utils.files import atomic_path, read_text, user_cache
from vim_ssl.utils.optional import require

ENDINGS = (".nii", ".nii.gz", ".hdr", ".img")  # the last two are header and values of a pair
AXES = ("0", "1", "2")
DEFAULT_WINDOW = Window(0.5, 99.5, percent=True)
CHANNEL = re.compile(r"(.+)_(\d{4})")  # nnU-Net: case and channel
# A volume's modality at the end of its name, after that of its case.
MODALITY = re.compile(
    r"(.+)[-_. ](t1|t1w|t1n|t1c|t1ce|t1gd|t2|t2w|t2f|flair|dwi|adc|pd|swi|bold|ct|cta|pet|mr|mri)",
    re.IGNORECASE,
)
NNUNET = ("imagesTr", "imagesTs", "imagesVal")  # its folders


@source("nifti", extra="medical", options=("label", "axis", "window", "group", "channel"))
def open_nifti(spec: DataSpec) -> Splits:
    """Open ``nifti:PATTERN``: every plane of one volume, or of all volumes in a folder or a glob.

    Volumes are reoriented to canonical axes (right, anterior, superior). ``axis=2``, the default,
    gives axial planes, 1 coronal and 0 sagittal ones; anterior or superior is up. Only the first
    volume of a time series is read; the others are counted in ``passed_over``. Values from the
    0.5th to the 99.5th percentile of the volume become 0 to 255; ``window=LOW,HIGH`` (values, such
    as HU) or ``1%,99%`` sets another window. NaN and infinite values become 0.

    If the folder contains ``images/`` and ``masks/`` (or ``images/`` and ``labels/``, ``imagesTr/``
    and ``labelsTr/``) with volumes of the same names, each plane has a mask of class numbers, with
    255 for unlabelled pixels; ``label=none`` ignores the masks. The classes are named in
    ``classes.txt``, as for ``masks:``, or in the ``dataset.json`` of the Medical Segmentation
    Decathlon or nnU-Net. A volume whose mask has another shape or position is skipped and named in
    ``faults``. Of the channels ``CASE_0000``, ``CASE_0001`` … of nnU-Net, which share a mask, the
    first is read, or another with ``channel=1``.

    The group is the volume, or, with ``group=folder``, its folder (for example one per patient).
    The ids are ``path/plane``. ``label=folder`` makes the outermost folder the class. Folders are
    splits if all are named train, val or test.

    When its first plane is read, a volume is unpacked and windowed into the user's cache.

    Raises: ImportError without nibabel; FileNotFoundError; ValueError if there is no volume.
    """
    import_nibabel()
    for option, values in (("axis", AXES), ("label", ("folder", "none")), ("group", ("folder",)),
                           ("channel", tuple(map(str, range(100))))):  # fmt: skip
        check_option(spec, option, values)
    axis = int(spec.axis or 2)
    window = Window.parse(spec.window) if spec.window else DEFAULT_WINDOW
    channel = None if spec.channel is None else int(spec.channel)
    root, names, masks_root, mask_of = match_masks(
        spec, "volume", ENDINGS, strict=True, choose=partial(_choose, channel=channel)
    )
    if not spec.group:
        _warn_of_modalities(names)
    volumes: dict[str, Volume] = {}
    faults = [] if masks_root or channel is not None else _channels(root, names)
    for name in names:
        try:
            volumes[name] = _read_header(root / name, axis, masks_root, mask_of.get(name, ""))
        except Exception as error:  # readers raise errors of nearly any type
            faults.append(f"{name} cannot be read ({type(error).__name__}: {error})")
    if more := {name: volume.more for name, volume in volumes.items() if volume.more}:
        pass_over("further volumes of a series", sum(more.values()), more)
    if not volumes:
        raise ValueError(
            f"nifti:{spec.location}: none of {len(names)} volumes can be read: {faults[0]}"
        )

    def choose(spec: DataSpec) -> ImageData:
        layout = read_layout(list(volumes), spec.split, spec.label or "none", str(root))
        planes = [(name, plane) for name in layout.names for plane in range(volumes[name].planes)]
        classes, masks, more = layout.classes, None, list[str]()
        if masks_root:
            top = Path(spec.location).expanduser()
            used = [mask_of[name] for name in volumes]
            classes, more = _classes(top, masks_root, used)
            masks = PlaneMasks(str(masks_root), planes, volumes, axis, len(classes))
        label_of = layout.label_of
        folders = folder_groups(layout.names, layout.splits, layout.labels)
        group_of = dict(zip(layout.names, folders if spec.group else layout.names, strict=True))
        return ImageData(
            PlaneImages(str(root), planes, axis, window, volumes),
            [f"{name}/{plane:04d}" for name, plane in planes],
            name=str(spec), labels=[label_of[name] for name, _ in planes] if label_of else None,
            classes=classes, masks=masks, splits=layout.splits,
            groups=[group_of[name] for name, _ in planes],
            split=layout.split, faults=[*faults, *more],
        )  # fmt: skip

    return Splits(split_folders(list(volumes)), choose)


def _stem(name: str) -> str:
    """Return the name of a volume without its ending."""
    ending = next((e for e in ENDINGS[1::-1] + ENDINGS[2:] if name.lower().endswith(e)), "")
    return name[: len(name) - len(ending)]


def _choose(names: list[str], masks: list[str] | None, channel: int | None) -> list[str]:
    """Return the volumes to read: a pair of files by its header, and of the channels of a case one.

    Args:
        masks: names of the masks; a case is what has one. None: every name that ends in a number of
            a channel has other channels, but only if ``channel`` is given.
    Raises: ValueError if no volume has the channel.
    """
    pairs = {_stem(name) for name in names if name.lower().endswith(".hdr")}
    names = [n for n in names if not (n.lower().endswith(".img") and _stem(n) in pairs)]
    if masks is None and channel is None:
        return names
    cases = None if masks is None else {_stem(mask) for mask in masks}
    kept: list[str] = []
    others: list[str] = []
    numbers: set[int] = set()
    for name in names:
        match = CHANNEL.fullmatch(_stem(name))
        has_channels = match and (cases is None or (_stem(name) not in cases and match[1] in cases))
        if not match or not has_channels:
            kept.append(name)
            continue
        numbers.add(int(match[2]))
        (kept if int(match[2]) == (channel or 0) else others).append(name)
    if others and not kept:
        raise ValueError(
            f"no volume is of channel={channel or 0}; there are the channels "
            f"{', '.join(map(str, sorted(numbers)))}."
        )
    pass_over("of other channels", len(others), others)
    return kept


def _channels(root: Path, names: list[str]) -> list[str]:
    """Report the channels of cases that are read as volumes of their own."""
    matches = [CHANNEL.fullmatch(_stem(name)) for name in names]
    numbers = sorted({int(match[2]) for match in matches if match})
    if root.name not in NNUNET or not all(matches) or numbers[:2] != [0, 1]:
        return []
    return [
        f"the channels {', '.join(map(str, numbers))} of a case are read as separate volumes; "
        "channel=0 reads one"
    ]


def _warn_of_modalities(names: list[str]) -> None:
    """Warn of volumes of one case, such as a_t1.nii and a_flair.nii, that are separate groups."""
    cases = Counter(match[1] for match in map(MODALITY.fullmatch, map(_stem, names)) if match)
    if several := [case for case, count in cases.items() if count > 1]:
        add_warning(
            f"the modalities of a case are separate groups and may be in training and in test: "
            f"{some_of(several)}. Put each case into a folder and add group=folder, or give one "
            "modality, such as *_t1.nii.gz."
        )


@dataclass(frozen=True)
class Volume:
    """The header of a volume.

    Attributes:
        mask: file of its mask, relative to the masks' folder; "" without masks.
        planes: number of planes.
        spacing: millimetres between planes, rows and columns.
        more: number of further volumes of a series in the file, which are not read.
    """

    mask: str
    planes: int
    spacing: tuple[float, ...]
    more: int = 0


def _read_header(path: Path, axis: int, masks_root: Path | None, mask: str) -> Volume:
    """Read a volume's header. Raises: ValueError for a mask that does not fit it; nibabel's
    errors."""
    image = _load(path)
    if masks_root:
        _check_same_grid(image, _load(masks_root / mask))
    return Volume(
        mask, _canonical_shape(image)[axis], _spacing(image, axis), prod(image.shape[3:]) - 1
    )


def _load(path: str | Path) -> Any:
    """Open a NIfTI file, by its content if the ending misleads. Raises: ValueError for other
    formats; nibabel's errors."""
    nibabel = import_nibabel()
    try:
        image = nibabel.load(path)
    except (nibabel.filebasedimages.ImageFileError, FileNotFoundError):
        # Compressed but named .nii, or the reverse, or named .Nii, which nibabel does not know.
        with open(path, "rb") as file:
            content = file.read()
        content = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
        if content[344:347] != b"n+1" and content[4:7] != b"n+2":
            raise
        kind = nibabel.Nifti2Image if content[4:7] == b"n+2" else nibabel.Nifti1Image
        image = kind.from_bytes(content)
    if not isinstance(image, nibabel.Nifti1Pair):
        raise ValueError(
            f"its format is {type(image).__name__.removesuffix('Image')}, which does not say which "
            "side is left; convert it to NIfTI"
        )
    return image


def _files(name: str) -> list[str]:
    """Return the files of a volume: one, or a header and its values."""
    if not name.lower().endswith(".hdr"):
        return [name]
    return [name, name[:-4] + (".img" if name.endswith(".hdr") else ".IMG")]


@dataclass(eq=False)
class PlaneImages(OnDisk):
    """Planes of volumes, perpendicular to an axis, as uint8 (h, w); a row is (volume name, plane
    index)."""

    axis: int
    window: Window
    volumes: dict[str, Volume]
    contents: ClassVar[str] = "volume"

    def names(self, row: int) -> list[str]:
        return _files(self.rows[row][0])

    def part(self, row: int) -> str:
        return f"axis {self.axis} plane {self.rows[row][1]}"

    def __getitem__(self, row: int) -> np.ndarray:
        name, plane = self.rows[row]
        try:
            volume = _volume(os.path.join(self.root, name), self.window)
        except Exception as error:  # readers raise errors of nearly any type
            raise BadImage(name, f"the volume cannot be read ({_line(error)})") from error
        return upright(volume, plane, self.axis)

    def location(self, row: int) -> dict[str, Any]:
        """Return ``volume`` (its name), ``plane``, ``planes``, ``spacing``, and ``file`` and
        ``axis``; see `vim_ssl.metrics.volumes.VolumeMetrics.add` and `write_volume`."""
        name, plane = self.rows[row]
        volume = self.volumes[name]
        return {
            "volume": name, "plane": plane, "planes": volume.planes, "spacing": volume.spacing,
            "file": os.path.join(self.root, name), "axis": self.axis,
        }  # fmt: skip


@dataclass(eq=False)
class PlaneMasks(OnDisk):
    """The masks of the planes."""

    volumes: dict[str, Volume]
    axis: int
    classes: int

    def names(self, row: int) -> list[str]:
        return _files(self.volumes[self.rows[row][0]].mask)

    def classes_in(self, row: int) -> frozenset[int]:
        return classes_in(_numbers, self.paths(row)[0], self.classes)

    def read(self, row: int, size: tuple[int, int]) -> np.ndarray:
        """See `vim_ssl.data.sources.masks.MaskFiles.read`."""
        name, plane = self.rows[row]
        try:
            volume = _volume(self.paths(row)[0], None)
        except Exception as error:  # readers raise errors of nearly any type
            raise BadImage(name, f"the mask cannot be read ({_line(error)})") from error
        return checked(upright(volume, plane, self.axis), size, name, self.classes)


def _line(error: Exception) -> str:
    """Return an error's text in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def upright(volume: np.ndarray, plane: int, axis: int) -> np.ndarray:
    """Return the plane with index ``plane`` along ``axis`` of a volume in canonical (RAS) axes,
    oriented with anterior or superior at the top."""
    # Not take(): with NIfTI's memory order it copies the whole volume.
    return np.array(np.moveaxis(volume, axis, 0)[plane][:, ::-1].T)


def write_volume(
    path: Path, like: str, axis: int, planes: Iterable[tuple[int, np.ndarray]]
) -> None:
    """Write class numbers as a compressed NIfTI volume with the axes and position of ``like``.

    Args:
        like: path of a volume.
        axis: the canonical axis perpendicular to the planes, as in `upright`.
        planes: index and uint8 (h, w), as from `upright`; missing planes become `IGNORE`.
    Raises: ValueError for a plane of another size.
    """
    nibabel = import_nibabel()
    source = _load(like)
    volume = np.full(_canonical_shape(source), IGNORE, np.uint8)
    for index, plane in planes:
        target, values = np.moveaxis(volume, axis, 0)[index], plane.T[:, ::-1]
        if target.shape != values.shape:
            raise ValueError(
                f"plane {index} has {values.shape} pixels, those of {like} {target.shape}."
            )
        target[...] = values
    turned = nibabel.io_orientation(source.affine)
    back = nibabel.orientations.ornt_transform([[0, 1], [1, 1], [2, 1]], turned)
    image = nibabel.Nifti1Image(nibabel.apply_orientation(volume, back), source.affine)
    for which in ("qform", "sform"):  # viewers differ in which of both they use
        get = getattr(source, f"get_{which}", None)
        affine, code = get(coded=True) if get else (source.affine, 1)
        getattr(image, f"set_{which}")(source.affine if affine is None else affine, int(code))
    image.header.set_xyzt_units(source.header.get_xyzt_units()[0])
    path.write_bytes(gzip.compress(image.to_bytes(), mtime=0))


def _classes(root: Path, masks_root: Path, masks: list[str]) -> tuple[list[str], list[str]]:
    """Return the class names from classes.txt or dataset.json, else the numbers in the masks, and
    the faults of the masks."""
    file = root / "dataset.json"
    if file.exists() and not (root / "classes.txt").exists():
        return checked_classes(_json_classes(file), root, masks_root, masks, _numbers)
    return named_classes(root, masks_root, masks, _numbers)


def _json_classes(file: Path) -> list[str]:
    """Read the class names in a dataset.json: its ``labels`` map number to name in the Decathlon,
    and name to number in nnU-Net.

    Raises: ValueError for anything else, such as nnU-Net's regions with several numbers; for
        nnU-Net's "ignore" label; for fewer than 2 classes or more than 255.
    """
    try:
        labels = json.loads(read_text(file))["labels"].items()
        numbered = all(str(key).isdigit() for key, _ in labels)
        # Through str, because int() accepts 1.5 and true.
        names = {int(str(k if numbered else v)): v if numbered else k for k, v in labels}
        classes = [names[number].strip() for number in range(len(labels))]
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(
            f'{file}: its "labels" do not name the classes from 0 on, as {{"0": "background", "1": '
            '"liver"}} does; correct it, or name the classes in classes.txt beside it, one per '
            "line."
        ) from error
    if not numbered and "ignore" in classes:
        raise ValueError(
            f'{file}: number {classes.index("ignore")} is "ignore", which would be learned as a '
            f"class. Unlabelled voxels must be {IGNORE}: renumber them in the masks, and remove "
            'the entry from "labels".'
        )
    if twice := {name for name in classes if classes.count(name) > 1}:
        raise ValueError(f"{file} has several classes {min(twice)!r}; give each another name.")
    if not 2 <= len(classes) <= IGNORE:
        raise ValueError(f"{file} names {len(classes)} classes; expected 2 to {IGNORE}.")
    return classes


def _numbers(path: Path) -> np.ndarray:
    """Return the class numbers in a volume. Reads plane by plane to limit memory."""
    try:
        volume = _volume(str(path), None)
    except Exception as error:  # readers raise errors of nearly any type
        raise BadImage(path.name, _line(error)) from error
    return np.unique(np.concatenate([np.unique(plane) for plane in volume]))


@lru_cache(maxsize=64)
def _volume(path: str, window: Window | None) -> np.ndarray:
    """Read a volume through the cache as uint8 (x, y, z) in canonical axes: windowed grey, or class
    numbers if ``window`` is None.

    Raises: ValueError for values that are not class numbers.
    """
    stats = [os.stat(file) for file in _files(path)]
    changes = [value for stat in stats for value in (stat.st_size, stat.st_mtime_ns)]
    key = repr((os.path.abspath(path), *changes, window))
    cached = user_cache() / "nifti" / f"{blake2b(key.encode(), digest_size=12).hexdigest()}.npy"
    if not cached.exists():
        nibabel = import_nibabel()
        image = nibabel.as_closest_canonical(_load(path))
        values = np.asarray(image.dataobj[(..., *[0] * (image.ndim - 3))], dtype=np.float32)
        if window and not np.isfinite(values).any():
            raise ValueError("none of its values is finite")
        grey = to_8bit(values, *window.limits(values)) if window else _class_numbers(values)
        cached.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(cached) as partial, partial.open("wb") as file:
            np.save(file, grey)
    return np.load(cached, mmap_mode="r", allow_pickle=False)


def import_nibabel() -> Any:
    """Return the module nibabel. Raises: ImportError with the package to install."""
    return require("nibabel", "medical", "NIfTI volumes (nifti:)")


def _class_numbers(values: np.ndarray) -> np.ndarray:
    whole = np.rint(values)
    good = (np.abs(values - whole) < 1e-3) & (whole >= 0) & (whole <= IGNORE)  # NaN is not
    if not good.all():
        raise ValueError(
            f"it contains {values[~good][0]:g}; the values of a mask must be integers from 0 to "
            f"{IGNORE}"
        )
    return whole.astype(np.uint8)


def _canonical_affine(image: Any) -> np.ndarray:
    """Return the affine from voxels in canonical axes to the scanner's millimetres."""
    import nibabel

    turned = nibabel.io_orientation(image.affine)
    return image.affine @ nibabel.orientations.inv_ornt_aff(turned, image.shape[:3])


def _spacing(image: Any, axis: int) -> tuple[float, ...]:
    """Return the millimetres between planes along ``axis``, between rows and between columns."""
    import nibabel

    unit = {"meter": 1e3, "micron": 1e-3}.get(image.header.get_xyzt_units()[0], 1.0)
    sizes = [unit * float(s) for s in nibabel.affines.voxel_sizes(_canonical_affine(image))]
    columns, rows = (sizes[other] for other in range(3) if other != axis)
    return sizes[axis], rows, columns


def _check_same_grid(image: Any, mask: Any) -> None:
    """Raise ValueError for a mask whose shape or position differs from its volume's, and for one of
    several volumes."""
    if (several := prod(mask.shape[3:])) > 1:
        raise ValueError(f"its mask has {several} volumes; expected one, with class numbers")
    shapes = [_canonical_shape(x) for x in (image, mask)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"its mask has {shapes[1]} voxels, the volume has {shapes[0]}")
    here, there = _canonical_affine(image), _canonical_affine(mask)
    if not np.abs(here - there).max() <= 0.05 * np.abs(here[:3, :3]).max():  # NaN is not
        raise ValueError("its mask has another position: their affines differ")


def _canonical_shape(image: Any) -> tuple[int, int, int]:
    """Return the sizes along the right, anterior and superior axes, without reading the values."""
    import nibabel

    if image.ndim < 3 or 0 in image.shape:
        raise ValueError(f"shape {image.shape} is not a volume; expected at least 3 non-empty axes")
    if image.get_data_dtype().kind not in "iufb":
        raise ValueError(f"its values have type {image.get_data_dtype()}; expected real numbers")
    axes = nibabel.io_orientation(image.affine)[:, 0] if np.isfinite(image.affine).all() else None
    if axes is None or not np.isfinite(axes).all():
        raise ValueError("its header gives an axis no direction or size (sform or qform)")
    sizes = {int(axis): size for axis, size in zip(axes, image.shape, strict=False)}
    return sizes[0], sizes[1], sizes[2]
