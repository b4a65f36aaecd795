"""``medmnist:``: MedMNIST's files: images of 28 to 224 px, and volumes of 28 or 64."""

import hashlib
import json
import shutil
import zipfile
from functools import lru_cache
from pathlib import Path

import numpy as np

from vim_ssl.data.dataset import ImageData
from vim_ssl.data.registry import Splits, source
from vim_ssl.data.sources.folder import check_option
from vim_ssl.data.spec import DataSpec, pick_split
from vim_ssl.utils.files import atomic_path, user_cache

BINARY, MULTI_CLASS = "binary-class", "multi-class"
MULTI_LABEL, ORDINAL = "multi-label, binary-class", "ordinal-regression"
SPLITS = ("train", "val", "test")
ARRAYS = tuple(f"{split}_{what}" for split in SPLITS for what in ("images", "labels"))


@lru_cache(maxsize=1)
def known_sets() -> dict[str, tuple[str, tuple[str, ...]]]:
    """Map every set of MedMNIST v2 to its task and its class names in label order."""
    text = Path(__file__).with_suffix(".json").read_text(encoding="utf-8")
    return {flag: (task, tuple(classes)) for flag, (task, classes) in json.loads(text).items()}


@source("medmnist", options=("label", "axis"))
def open_medmnist(spec: DataSpec) -> Splits:
    """Open ``medmnist:FLAG.npz`` or ``medmnist:FLAG_SIZE.npz``, as MedMNIST publishes them.

    The splits are train, val and test, in the file's order, which the official Evaluator needs.
    Labels are classes, or rows of 0 and 1 in a multi-label set. The file name determines the task
    and the class names; for an unknown set, the shape and values of its labels do.

    A volume gives one image: its three middle planes as red, green and blue. ``axis=0`` (1, 2)
    gives every plane perpendicular to that axis instead, grouped by volume. The ids are
    ``split/row`` and ``split/row/plane``.

    The arrays are unpacked once into the user's cache and memory-mapped. Nothing in the file is
    unpickled.

    Raises: FileNotFoundError; ValueError for a file with another layout.
    """
    check_option(spec, "axis", ("0", "1", "2"))
    file = Path(spec.location).expanduser()
    source = f"medmnist:{spec.location}"
    if not file.is_file():
        raise FileNotFoundError(
            f"{source}: the file does not exist; download the sets from medmnist.com."
        )
    folder, arrays = _arrays(file, source)

    def choose(spec: DataSpec) -> ImageData:
        split = pick_split(spec.split, SPLITS, source)
        chosen = [name for name in SPLITS if split in ("all", name)]
        shape = arrays[f"{chosen[0]}_images"].shape
        is_volume = len(shape) == 4 and shape[-1] != 3
        axis = None if spec.axis is None else int(spec.axis)
        if axis is not None and not is_volume:
            raise ValueError(f"{source} contains images, not volumes; remove axis={axis}.")
        if is_volume and axis is None and len(set(shape[1:])) > 1:
            raise ValueError(
                f"{source} contains volumes of {shape[1:]}, whose middle planes differ in size and "
                "cannot form one image; use axis=0, 1 or 2."
            )

        task, classes = known_sets().get(file.stem.split("_")[0].lower()) or _guess(arrays)
        rows = np.concatenate([arrays[f"{name}_labels"] for name in chosen])
        labels = rows.tolist() if task == MULTI_LABEL else rows[:, 0].tolist()
        ids = [
            f"{name}/{row:06d}" for name in chosen for row in range(len(arrays[f"{name}_images"]))
        ]
        groups = None
        if axis is not None:
            planes = range(shape[1 + axis])
            groups = [name for name in ids for _ in planes]
            labels = [label for label in labels for _ in planes]
            ids = [f"{name}/{plane:03d}" for name in ids for plane in planes]
        images = PackedImages(
            [str(folder / f"{name}_images.npy") for name in chosen], is_volume, axis
        )
        labelled = spec.label != "none"
        return ImageData(
            images, ids, name=str(spec), labels=labels if labelled else None,
            classes=classes if labelled else None, groups=groups, splits=SPLITS, split=split,
            task=task if labelled else None, source_fingerprint=folder.name,
        )  # fmt: skip

    return Splits(SPLITS, choose)


class PackedImages:
    """Images of several .npy files (n, h, w[, 3]), or planes of volumes (n, d, h, w)."""

    def __init__(self, files: list[str], is_volume: bool, axis: int | None):
        self.files, self.is_volume, self.axis = files, is_volume, axis
        shapes = [_array(file).shape for file in files]
        self.planes = 1 if axis is None else shapes[0][1 + axis]
        self.counts = [shape[0] * self.planes for shape in shapes]

    def __len__(self) -> int:
        return sum(self.counts)

    def __getitem__(self, row: int) -> np.ndarray:
        number = 0
        while row >= self.counts[number]:
            row -= self.counts[number]
            number += 1
        entry = _array(self.files[number])[row // self.planes]
        if not self.is_volume:
            return np.array(entry)
        if self.axis is not None:
            return np.array(entry.take(row % self.planes, self.axis))
        middle = [entry.take(size // 2, axis) for axis, size in enumerate(entry.shape)]
        return np.stack(middle, -1)


@lru_cache(maxsize=16)
def _array(path: str) -> np.ndarray:
    return np.load(path, mmap_mode="r", allow_pickle=False)


def _unpacked(file: Path) -> Path:
    """Return the folder of the file's arrays, each a .npy; its name is a hash of the file."""
    with open(file, "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()[:16]
    folder = user_cache() / "medmnist" / digest
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(file) as packed, atomic_path(folder) as new:
        new.mkdir()
        names = [f"{name}.npy" for name in ARRAYS]
        if missing := [name for name in names if name not in packed.namelist()]:
            raise ValueError(
                f"it has no {', '.join(missing)}; it has {', '.join(packed.namelist())}"
            )
        for name in names:
            with packed.open(name) as content, open(new / name, "wb") as target:
                shutil.copyfileobj(content, target, 1 << 20)
    return folder


def _arrays(file: Path, source: str) -> tuple[Path, dict[str, np.ndarray]]:
    """Return the folder of the unpacked arrays, and the checked arrays by name.

    Raises: ValueError for a file with another layout.
    """
    try:
        folder = _unpacked(file)
        arrays = {name: _array(str(folder / f"{name}.npy")) for name in ARRAYS}
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{source} is not a MedMNIST file: {error}") from error
    for split in SPLITS:
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
        if images.dtype != np.uint8 or images.ndim not in (3, 4):
            raise ValueError(
                f"{source}: {split}_images is {images.dtype} {images.shape}; expected uint8 "
                "(n, h, w), (n, h, w, 3) or (n, d, h, w)."
            )
        if labels.ndim != 2 or len(labels) != len(images) or labels.dtype.kind not in "iu":
            raise ValueError(
                f"{source}: {split}_labels is {labels.dtype} {labels.shape}; expected integers "
                f"({len(images)}, labels)."
            )
    return folder, arrays


def _guess(arrays: dict[str, np.ndarray]) -> tuple[str, tuple[str, ...]]:
    """Return task and classes of a set with an unknown name."""
    labels = np.concatenate([arrays[f"{split}_labels"] for split in SPLITS])
    if labels.shape[1] > 1:
        return MULTI_LABEL, tuple(str(i) for i in range(labels.shape[1]))
    count = int(labels.max()) + 1
    return BINARY if count <= 2 else MULTI_CLASS, tuple(str(i) for i in range(count))
