"""NIfTI: ``nifti:root``, the planes of volumes as 8-bit pictures."""

import glob
import os
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from vim_ssl.data.dataset import ImageData
from vim_ssl.data.folder import read_layout
from vim_ssl.data.images import BadImage
from vim_ssl.data.samples import user_cache
from vim_ssl.data.spec import DataSpec
from vim_ssl.data.window import Window, to_8bit

ENDINGS = (".nii", ".nii.gz")
DEFAULT_WINDOW = Window(0.5, 99.5, percent=True)


def open_nifti(spec: DataSpec) -> ImageData:
    """Open every plane of the volumes below a folder, or of one file, or of those of a glob.

    Volumes are turned to the canonical axes (right, anterior, superior). ``axis=2``, the default,
    gives axial planes, 1 coronal and 0 sagittal ones; anterior or superior is up. Of a series of
    volumes in time the first is read. Values from the 0.5th to the 99.5th percentile of the volume
    become 0 to 255; ``window=LOW,HIGH`` (values, such as HU) or ``1%,99%`` sets others.

    The group is the volume. The ids are ``path/plane``. ``label=folder`` takes the outermost
    folder as the class; folders named train, val and test, and no others, are splits.

    A volume is unpacked once, windowed, into the user's cache, when its first plane is read.

    Raises: ImportError without nibabel; FileNotFoundError; ValueError when there is no volume.
    """
    spec.takes("label", "axis", "window")
    nibabel = import_nibabel()
    source = f"nifti:{spec.location}"
    axis = int(spec.axis) if spec.axis in ("0", "1", "2") else 2
    if spec.axis not in (None, "0", "1", "2"):
        raise ValueError(f"{source}: axis={spec.axis} is none of 0, 1 and 2.")
    if spec.label not in (None, "none", "folder"):
        raise ValueError(f"{source}: label={spec.label} is nothing it has; it takes label=folder.")
    window = Window.parse(spec.window) if spec.window else DEFAULT_WINDOW
    root, names = _find(spec.location)

    planes: dict[str, int] = {}
    faults = []
    for name in names:
        try:
            image = nibabel.load(root / name)
            planes[name] = _canonical_shape(image)[axis]
        except Exception as error:  # a broken file makes readers raise nearly anything
            faults.append(f"{name} cannot be read ({type(error).__name__}: {error})")
    if not planes:
        raise ValueError(f"{source}: none of {len(names)} volumes can be read: {faults[0]}")

    found = read_layout(list(planes), spec.split, spec.label or "none", str(root))
    rows = [(name, plane) for name in found.names for plane in range(planes[name])]
    class_of = dict(zip(found.names, found.labels or (), strict=False))
    return ImageData(
        PlanePictures(str(root), rows, axis, window),
        [f"{name}/{plane:04d}" for name, plane in rows],
        name=str(spec), labels=[class_of[name] for name, _ in rows] if class_of else None,
        classes=found.classes, groups=[name for name, _ in rows], splits=found.splits,
        split=found.split, faults=faults,
    )  # fmt: skip


class PlanePictures:
    """Planes across an axis of volumes, each as uint8 (h, w)."""

    def __init__(self, root: str, planes: Sequence[tuple[str, int]], axis: int, window: Window):
        self.root, self.planes, self.axis, self.window = root, planes, axis, window

    def __len__(self) -> int:
        return len(self.planes)

    def sizes(self, row: int) -> int:
        """Bytes of the file; -1 when it is gone."""
        try:
            return os.path.getsize(os.path.join(self.root, self.planes[row][0]))
        except OSError:
            return -1

    def __getitem__(self, row: int) -> np.ndarray:
        name, plane = self.planes[row]
        try:
            volume = _volume(os.path.join(self.root, name), self.window)
        except Exception as error:  # a broken file makes readers raise nearly anything
            raise BadImage(name, f"the volume cannot be read ({error})") from error
        return np.array(volume.take(plane, self.axis)[:, ::-1].T)


@lru_cache(maxsize=64)
def _volume(path: str, window: Window) -> np.ndarray:
    """uint8 (x, y, z) in canonical axes, from the cache."""
    found = os.stat(path)
    key = repr((os.path.abspath(path), found.st_size, found.st_mtime_ns, window))
    place = user_cache() / "nifti" / f"{blake2b(key.encode(), digest_size=12).hexdigest()}.npy"
    if not place.exists():
        nibabel = import_nibabel()
        image = nibabel.as_closest_canonical(nibabel.load(path))
        values = np.asarray(image.dataobj[(..., *[0] * (image.ndim - 3))], dtype=np.float32)
        grey = to_8bit(values, *window.limits(values))
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=place.parent, suffix=".partial", delete=False) as new:
            np.save(new, grey)
        os.replace(new.name, place)
    return np.load(place, mmap_mode="r", allow_pickle=False)


def import_nibabel() -> Any:
    """The library. Raises: ImportError that says what to install."""
    try:
        import nibabel
    except ImportError as error:
        raise ImportError("nifti: data needs nibabel: pip install 'vim-ssl[medical]'") from error
    return nibabel


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
