"""MedMNIST: ``medmnist:file.npz``, images of 28 to 224 px and volumes of 28 or 64."""

import hashlib
import json
import shutil
import zipfile
from functools import lru_cache
from pathlib import Path

import numpy as np

from vim_ssl.data.dataset import ImageData
from vim_ssl.data.spec import DataSpec, pick_split
from vim_ssl.utils.files import atomic_path, user_cache

BINARY, MULTI_CLASS = "binary-class", "multi-class"
MULTI_LABEL, ORDINAL = "multi-label, binary-class", "ordinal-regression"
SPLITS = ("train", "val", "test")


@lru_cache(maxsize=1)
def known_sets() -> dict[str, tuple[str, tuple[str, ...]]]:
    """Task and class names, in the order of the labels, of the sets of MedMNIST v2."""
    text = Path(__file__).with_suffix(".json").read_text(encoding="utf-8")
    return {flag: (task, tuple(classes)) for flag, (task, classes) in json.loads(text).items()}


def open_medmnist(spec: DataSpec) -> ImageData:
    """Open ``medmnist:FLAG.npz`` or ``medmnist:FLAG_SIZE.npz``, as MedMNIST hands them out.

    The splits are train, val and test; the order in each is the file's, as the official Evaluator
    needs it. Labels are classes, in a multi-label set rows of 0 and 1. Task and class names come
    from the file's name; of an unknown one the task follows from the labels' shape and values.

    A volume gives one image: its three middle planes as red, green and blue. ``axis=0`` (1, 2)
    gives every plane across that axis instead, the volume being its group. The ids are
    ``split/row`` and ``split/row/plane``.

    The arrays are unpacked once into the user's cache and read from there without filling the
    memory. Nothing in the file is unpickled.

    Raises: FileNotFoundError; ValueError for a file of another form.
    """
    spec.takes("label", "axis")
    file = Path(spec.location).expanduser()
    if not file.is_file():
        raise FileNotFoundError(
            f"medmnist:{spec.location}: there is no such file; the sets are at medmnist.com."
        )
    source = f"medmnist:{spec.location}"
    split = pick_split(spec.split, SPLITS, source)
    try:
        folder = _unpacked(file)
        arrays = {name: _array(str(folder / f"{name}.npy"))
                  for part in SPLITS for name in (f"{part}_images", f"{part}_labels")}  # fmt: skip
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{source} is no MedMNIST file: {error}") from error
    chosen = [part for part in SPLITS if split in ("all", part)]
    labels = np.concatenate([arrays[f"{part}_labels"] for part in chosen])
    for part in SPLITS:
        _check(arrays[f"{part}_images"], arrays[f"{part}_labels"], f"{source}: {part}")

    flag = file.stem.split("_")[0].lower()
    task, classes = known_sets().get(flag) or _guess(arrays)
    flat = labels.tolist() if task == MULTI_LABEL else labels[:, 0].tolist()
    shape = arrays[f"{chosen[0]}_images"].shape
    is_volume = len(shape) == 4 and shape[-1] != 3
    if spec.axis and not is_volume:
        raise ValueError(f"{source} holds images, not volumes; leave axis={spec.axis} out.")
    axis = _axis(spec.axis, source)
    if is_volume and axis is None and len(set(shape[1:])) > 1:
        raise ValueError(
            f"{source} holds volumes of {shape[1:]}, whose middle planes are no one image; say "
            "axis=0, 1 or 2."
        )
    planes = range(1 if axis is None else shape[1 + axis])
    ids = [f"{part}/{row:06d}" for part in chosen for row in range(len(arrays[f"{part}_images"]))]
    each = [(name, label, plane) for name, label in zip(ids, flat, strict=True) for plane in planes]
    labelled = spec.label != "none"
    return ImageData(
        PackedImages([str(folder / f"{part}_images.npy") for part in chosen], is_volume, axis),
        ids if axis is None else [f"{name}/{plane:03d}" for name, _, plane in each],
        name=str(spec),
        labels=[label for _, label, _ in each] if labelled else None,
        classes=classes if labelled else None,
        groups=None if axis is None else [name for name, _, _ in each],
        splits=SPLITS,
        split=split,
        task=task if labelled else None,
        source_fingerprint=folder.name,
    )


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
    """The folder of the file's arrays, each a .npy; named after the file's content."""
    with open(file, "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()[:16]
    folder = user_cache() / "medmnist" / digest
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(file) as packed, atomic_path(folder) as new:
        new.mkdir()
        wanted = [f"{part}_{what}.npy" for part in SPLITS for what in ("images", "labels")]
        if missing := [name for name in wanted if name not in packed.namelist()]:
            raise ValueError(f"it has no {', '.join(missing)}, but {', '.join(packed.namelist())}")
        for name in wanted:
            with packed.open(name) as content, open(new / name, "wb") as target:
                shutil.copyfileobj(content, target, 1 << 20)
    return folder


def _check(images: np.ndarray, labels: np.ndarray, where: str) -> None:
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise ValueError(
            f"{where}_images is {images.dtype} {images.shape}; expected uint8 (n, h, w), "
            "(n, h, w, 3) or (n, d, h, w)."
        )
    if labels.ndim != 2 or len(labels) != len(images) or labels.dtype.kind not in "iu":
        raise ValueError(
            f"{where}_labels is {labels.dtype} {labels.shape}; expected whole numbers "
            f"({len(images)}, labels)."
        )


def _guess(arrays: dict[str, np.ndarray]) -> tuple[str, tuple[str, ...]]:
    """Task and classes of a set that is not known by name."""
    labels = np.concatenate([arrays[f"{part}_labels"] for part in SPLITS])
    if labels.shape[1] > 1:
        return MULTI_LABEL, tuple(str(i) for i in range(labels.shape[1]))
    count = int(labels.max()) + 1
    return BINARY if count <= 2 else MULTI_CLASS, tuple(str(i) for i in range(count))


def _axis(given: str | None, source: str) -> int | None:
    if given not in (None, "0", "1", "2"):
        raise ValueError(f"{source}: axis={given} is none of 0, 1 and 2.")
    return None if given is None else int(given)
