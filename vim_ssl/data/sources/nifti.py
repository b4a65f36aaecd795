"""NIfTI: ``nifti:root``, the planes of volumes as 8-bit images."""

import glob
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from vim_ssl.data.dataset import ImageData
from vim_ssl.data.images import BadImage
from vim_ssl.data.labels import IGNORE, checked, mask_folders, named_classes, paired
from vim_ssl.data.sources.folder import OnDisk, read_layout
from vim_ssl.data.spec import DataSpec
from vim_ssl.data.window import Window, to_8bit
from vim_ssl.utils.files import atomic_path, user_cache

ENDINGS = (".nii", ".nii.gz")
DEFAULT_WINDOW = Window(0.5, 99.5, percent=True)


def open_nifti(spec: DataSpec) -> ImageData:
    """Open every plane of the volumes below a folder, or of one file, or of those of a glob.

    Volumes are turned to the canonical axes (right, anterior, superior). ``axis=2``, the default,
    gives axial planes, 1 coronal and 0 sagittal ones; anterior or superior is up. Of a series of
    volumes in time the first is read. Values from the 0.5th to the 99.5th percentile of the volume
    become 0 to 255; ``window=LOW,HIGH`` (values, such as HU) or ``1%,99%`` sets others.

    Where the folder holds ``images/`` and ``masks/`` (or ``images/`` and ``labels/``, ``imagesTr/``
    and ``labelsTr/``) with volumes of the same names, each plane has a mask of class numbers, 255
    for none; ``label=none`` leaves them out. ``classes.txt`` names them as those of ``masks:``,
    else the ``dataset.json`` of the Medical Segmentation Decathlon or of nnU-Net.
    A volume whose mask has another shape or lies elsewhere is left out and named in ``faults``.

    The group is the volume; with ``group=folder`` the folder it is in, such as a patient's. The ids
    are ``path/plane``. ``label=folder`` takes the outermost
    folder as the class; folders named train, val and test, and no others, are splits.

    A volume is unpacked once, windowed, into the user's cache, when its first plane is read.

    Raises: ImportError without nibabel; FileNotFoundError; ValueError when there is no volume.
    """
    spec.takes("label", "axis", "window", "group")
    nibabel = import_nibabel()
    source = f"nifti:{spec.location}"
    axis = int(spec.axis) if spec.axis in ("0", "1", "2") else 2
    if spec.axis not in (None, "0", "1", "2"):
        raise ValueError(f"{source}: axis={spec.axis} is none of 0, 1 and 2.")
    if spec.label not in (None, "none", "folder"):
        raise ValueError(f"{source}: label={spec.label} is nothing it has; it takes label=folder.")
    if spec.group not in (None, "folder"):
        raise ValueError(f"{source}: group={spec.group} is nothing it has; it takes group=folder.")
    window = Window.parse(spec.window) if spec.window else DEFAULT_WINDOW
    folders = mask_folders(spec.location) if spec.label != "folder" else None
    root, names = _find(str(folders[0]) if folders else spec.location)
    mask_of: dict[str, str] = {}
    if folders and spec.label is None:
        masks = _find(str(folders[1]))[1]
        mask_of = dict(zip(names, paired(names, masks, *folders, ENDINGS), strict=True))

    planes: dict[str, int] = {}
    spacing: dict[str, tuple[float, ...]] = {}
    faults = []
    for name in names:
        try:
            image = nibabel.load(root / name)
            planes[name] = _canonical_shape(image)[axis]
            spacing[name] = _spacing(image, axis)
            if folders and mask_of:
                _check_same_place(image, nibabel.load(folders[1] / mask_of[name]))
        except Exception as error:  # a broken file makes readers raise nearly anything
            planes.pop(name, None)
            faults.append(f"{name} cannot be read ({type(error).__name__}: {error})")
    if not planes:
        raise ValueError(f"{source}: none of {len(names)} volumes can be read: {faults[0]}")

    classes = None
    if folders and mask_of:
        top = Path(spec.location).expanduser()
        told = None if (top / "classes.txt").exists() else _told_classes(top / "dataset.json")
        used = (mask_of[name] for name in planes)
        classes = named_classes(top, folders[1], used, _numbers) if told is None else told
    found = read_layout(list(planes), spec.split, spec.label or "none", str(root))
    rows = [(name, plane) for name in found.names for plane in range(planes[name])]
    class_of = dict(zip(found.names, found.labels or (), strict=False))
    masks_of_rows = None
    if folders and classes:
        parts = {name: Part(mask_of[name], planes[name], spacing[name]) for name in found.names}
        masks_of_rows = PlaneMasks(str(folders[1]), rows, parts, axis, len(classes))
    return ImageData(
        PlaneImages(str(root), rows, axis, window),
        [f"{name}/{plane:04d}" for name, plane in rows],
        name=str(spec), labels=[class_of[name] for name, _ in rows] if class_of else None,
        classes=classes or found.classes, masks=masks_of_rows, splits=found.splits,
        groups=[name.rpartition("/")[0] if spec.group else name for name, _ in rows],
        split=found.split, faults=faults,
    )  # fmt: skip


class PlaneImages(OnDisk):
    """Planes across an axis of volumes, each as uint8 (h, w)."""

    def __init__(self, root: str, planes: Sequence[tuple[str, int]], axis: int, window: Window):
        self.root, self.planes, self.axis, self.window = root, planes, axis, window

    def __len__(self) -> int:
        return len(self.planes)

    def paths(self, row: int) -> list[str]:
        return [os.path.join(self.root, self.planes[row][0])]

    def __getitem__(self, row: int) -> np.ndarray:
        name, plane = self.planes[row]
        try:
            volume = _volume(os.path.join(self.root, name), self.window)
        except Exception as error:  # a broken file makes readers raise nearly anything
            raise BadImage(name, f"the volume cannot be read ({error})") from error
        return upright(volume, plane, self.axis)


@dataclass(frozen=True)
class Part:
    """Of a volume: its mask's file, how many planes it has, and the millimetres between planes,
    rows and columns."""

    mask: str
    planes: int
    spacing: tuple[float, ...]


class PlaneMasks(OnDisk):
    """The masks of such planes."""

    def __init__(
        self, root: str, planes: Sequence[tuple[str, int]], parts: dict[str, Part], axis: int,
        classes: int,
    ):  # fmt: skip
        self.root, self.planes, self.parts, self.axis = root, planes, parts, axis
        self.classes = classes

    def paths(self, row: int) -> list[str]:
        return [self._path(row)]

    def read(self, row: int, size: tuple[int, int]) -> np.ndarray:
        """As `vim_ssl.data.sources.masks.MaskFiles.read`."""
        name, plane = self.planes[row]
        try:
            volume = _volume(self._path(row), None)
        except Exception as error:  # a broken file makes readers raise nearly anything
            raise BadImage(name, f"the mask cannot be read ({error})") from error
        return checked(upright(volume, plane, self.axis), size, name, self.classes)

    def place(self, row: int) -> dict[str, Any]:
        """As `vim_ssl.metrics.volumes.VolumeScores.add` takes it."""
        name, plane = self.planes[row]
        part = self.parts[name]
        return {"volume": name, "plane": plane, "planes": part.planes, "spacing": part.spacing}

    def _path(self, row: int) -> str:
        return os.path.join(self.root, self.parts[self.planes[row][0]].mask)


def upright(volume: np.ndarray, plane: int, axis: int) -> np.ndarray:
    """A plane across ``axis`` of a volume in canonical axes, front or top up."""
    # Not take(), which copies all of a volume that lies in memory as NIfTI has it.
    return np.array(np.moveaxis(volume, axis, 0)[plane][:, ::-1].T)


def _told_classes(file: Path) -> list[str] | None:
    """The names in a dataset.json, None without one: its ``labels`` are number to name in the
    Decathlon, name to number in nnU-Net.

    Raises: ValueError for any others, such as nnU-Net's regions of several numbers, for nnU-Net's
        label of voxels that have none, and for fewer than 2 classes or more than 255.
    """
    if not file.exists():
        return None
    try:
        labels = json.loads(file.read_text(encoding="utf-8"))["labels"].items()
        numbered = all(str(key).isdigit() for key, _ in labels)
        # By way of text, since int() makes a class of 1.5 and of true.
        names = {int(str(k if numbered else v)): v if numbered else k for k, v in labels}
        classes = [names[number].strip() for number in range(len(labels))]
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(
            f'{file}: its "labels" do not name the classes from 0 on, as {{"0": "background", "1": '
            '"liver"}} does; correct it, or name them in a classes.txt beside it, a line each.'
        ) from error
    if not numbered and "ignore" in classes:
        raise ValueError(
            f'{file}: number {classes.index("ignore")} is "ignore", which would be learned as a '
            f"class. Voxels that have none are {IGNORE} here: renumber them in the masks, and take "
            'it out of "labels".'
        )
    if not 2 <= len(classes) <= IGNORE:
        raise ValueError(f"{file} names {len(classes)} classes; expected 2 to {IGNORE}.")
    return classes


def _numbers(path: Path) -> np.ndarray:
    """The class numbers in a volume, plane by plane: a count of all at once takes much memory."""
    try:
        volume = _volume(str(path), None)
    except Exception as error:  # a broken file makes readers raise nearly anything
        raise BadImage(path.name, str(error)) from error
    return np.unique(np.concatenate([np.unique(plane) for plane in volume]))


@lru_cache(maxsize=64)
def _volume(path: str, window: Window | None) -> np.ndarray:
    """uint8 (x, y, z) in canonical axes, from the cache: grey, or without a window the numbers as
    they are.

    Raises: ValueError for values that are no class numbers.
    """
    found = os.stat(path)
    key = repr((os.path.abspath(path), found.st_size, found.st_mtime_ns, window))
    place = user_cache() / "nifti" / f"{blake2b(key.encode(), digest_size=12).hexdigest()}.npy"
    if not place.exists():
        nibabel = import_nibabel()
        image = nibabel.as_closest_canonical(nibabel.load(path))
        values = np.asarray(image.dataobj[(..., *[0] * (image.ndim - 3))], dtype=np.float32)
        grey = to_8bit(values, *window.limits(values)) if window else _class_numbers(values)
        place.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(place) as partial, partial.open("wb") as file:
            np.save(file, grey)
    return np.load(place, mmap_mode="r", allow_pickle=False)


def import_nibabel() -> Any:
    """The library. Raises: ImportError that says what to install."""
    try:
        import nibabel
    except ImportError as error:
        raise ImportError("nifti: data needs nibabel: pip install 'vim-ssl[medical]'") from error
    return nibabel


def _class_numbers(values: np.ndarray) -> np.ndarray:
    whole = np.rint(values)
    good = (np.abs(values - whole) < 1e-3) & (whole >= 0) & (whole <= IGNORE)  # NaN is not
    if not good.all():
        raise ValueError(
            f"it holds {values[~good][0]:g}; a mask's values are whole numbers from 0 to {IGNORE}"
        )
    return whole.astype(np.uint8)


def _canonical_affine(image: Any) -> np.ndarray:
    """From places in canonical axes to the scanner's millimetres."""
    import nibabel

    turned = nibabel.io_orientation(image.affine)
    return image.affine @ nibabel.orientations.inv_ornt_aff(turned, image.shape[:3])


def _spacing(image: Any, axis: int) -> tuple[float, ...]:
    """Millimetres from plane to plane across ``axis``, row to row and column to column."""
    import nibabel

    unit = {"meter": 1e3, "micron": 1e-3}.get(image.header.get_xyzt_units()[0], 1.0)
    sizes = [unit * float(s) for s in nibabel.affines.voxel_sizes(_canonical_affine(image))]
    columns, rows = (sizes[other] for other in range(3) if other != axis)
    return sizes[axis], rows, columns


def _check_same_place(image: Any, mask: Any) -> None:
    """Raises: ValueError for a mask of another shape or place than its volume."""
    shapes = [_canonical_shape(x) for x in (image, mask)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"its mask has {shapes[1]} voxels, the volume {shapes[0]}")
    here, there = _canonical_affine(image), _canonical_affine(mask)
    if np.abs(here - there).max() > 0.05 * np.abs(here[:3, :3]).max():
        raise ValueError("its mask lies elsewhere: their affines differ")


def _canonical_shape(image: Any) -> tuple[int, int, int]:
    """Sizes along right, anterior and superior, without reading the values."""
    import nibabel

    if image.ndim < 3 or 0 in image.shape:
        raise ValueError(f"its shape {image.shape} is no volume")
    if image.get_data_dtype().kind not in "iufb":
        raise ValueError(f"its values are of type {image.get_data_dtype()}, not plain numbers")
    axes = nibabel.io_orientation(image.affine)[:, 0]
    sizes = {int(axis): size for axis, size in zip(axes, image.shape, strict=False)}
    return sizes[0], sizes[1], sizes[2]


def _find(location: str) -> tuple[Path, list[str]]:
    """A folder, and the sorted names of the volumes below it."""
    path = Path(location).expanduser()
    if path.is_dir():
        root, found = path, [p for p in path.rglob("*") if p.is_file()]
    elif path.is_file():
        root, found = path.parent, [path]
    else:
        found = [Path(name) for name in glob.glob(str(path), recursive=True)]
        root = Path(os.path.commonpath([p.parent for p in found])) if found else path
    names = sorted(p.relative_to(root).as_posix() for p in found if p.name.endswith(ENDINGS)
                   and not p.name.startswith("."))  # fmt: skip
    if not names:
        raise FileNotFoundError(
            f"nifti:{location} names no file that ends in {' or '.join(ENDINGS)}; give a file, a "
            "folder or a glob."
        )
    return root, names
