"""Mask files: match them to images, check their values, list their classes."""

import os
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from vim_ssl.data.images import BadImage
from vim_ssl.utils.files import read_text

IGNORE = 255  # the value of an unlabelled pixel


def checked(
    values: np.ndarray, size: tuple[int, int], name: str, classes: int, first: int = 0
) -> np.ndarray:
    """Return the mask if it fits its image of ``size`` (width, height).

    Args:
        name: name of the mask file, for messages.
        classes: number of classes; their values start at ``first``.
    Raises: BadImage for another size, or a value that is not a class.
    """
    if values.shape != (size[1], size[0]):
        height, width = values.shape
        raise BadImage(name, f"the mask has {width}×{height} pixels, its image {size[0]}×{size[1]}")
    wrong = (values != IGNORE) & (values >= classes + first)
    if wrong.any():
        raise BadImage(
            name,
            f"the mask contains the value {values[wrong][0]}; expected {classes} classes, "
            f"{first} to {classes - 1 + first}, or {IGNORE} for unlabelled pixels",
        )
    return values


def paired(
    names: Sequence[str],
    masks: Sequence[str],
    images_folder: Path,
    masks_folder: Path,
    endings: Sequence[str] = (),
) -> list[str]:
    """Match each image to the mask with the same name up to the ending (one of ``endings``, else
    the part after the last dot).

    Raises: FileNotFoundError naming images without a mask; ValueError for masks of the same name.
    """

    def stem(name: str) -> str:
        ending = next((e for e in endings if name.lower().endswith(e)), os.path.splitext(name)[1])
        return name.removesuffix(name[len(name) - len(ending) :])

    mask_of: dict[str, str] = {}
    for name in masks:
        if (other := mask_of.setdefault(stem(name), name)) != name:
            raise ValueError(f"{masks_folder} has two masks {other} and {name}; keep one.")
    # nnU-Net names the first of several channels _0000.
    matches = [mask_of.get(stem(n)) or mask_of.get(stem(n).removesuffix("_0000")) for n in names]
    missing = [name for name, match in zip(names, matches, strict=True) if not match]
    if missing:
        some = ", ".join(missing[:3]) + (" …" if len(missing) > 3 else "")
        raise FileNotFoundError(
            f"{len(missing)} of {len(names)} images in {images_folder} have no mask with the same "
            f"name in {masks_folder}: {some}"
        )
    return [match for match in matches if match]


def mask_folders(root: str) -> tuple[Path, Path] | None:
    """Return the folders of the images and of their masks, or None unless both exist."""
    top = Path(root).expanduser()
    for pair in (("images", "masks"), ("images", "labels"), ("imagesTr", "labelsTr")):
        images, masks = (top / name for name in pair)
        if images.is_dir() and masks.is_dir():
            return images, masks
    return None


def named_classes(
    root: Path, folder: Path, names: Iterable[str], numbers: Callable[[Path], np.ndarray]
) -> list[str]:
    """Return the lines of ``classes.txt`` in ``root``; without this file, name the classes by their
    values in the masks.

    Args:
        names: file names of the masks in ``folder``.
        numbers: reads the values in a mask; a module-level function; may raise BadImage.
    Raises: ValueError for fewer than 2 classes or more than 255.
    """
    file = root / "classes.txt"
    if file.exists():
        lines = (line.strip() for line in read_text(file).splitlines())
        classes = [line for line in lines if line]
    else:
        classes = _classes_in_use(folder, names, numbers)
    if not 2 <= len(classes) <= IGNORE:
        raise ValueError(f"{root} has {len(classes)} classes; expected 2 to {IGNORE}.")
    return classes


def _classes_in_use(
    folder: Path, names: Iterable[str], numbers: Callable[[Path], np.ndarray]
) -> list[str]:
    """The numbers from 0 to the largest value in these masks, as class names; skips broken
    files."""
    used: set[int] = set()
    for name in names:
        path = folder / name
        try:
            file = path.stat()
            used |= _values_in(numbers, path, file.st_size, file.st_mtime_ns)
        except (BadImage, OSError):
            continue
    if used - {IGNORE} in (set(), {0}):
        seen = ", ".join(map(str, sorted(used))) or "none"
        white = " Save objects as 1 on 0, not as 255 on 0." if IGNORE in used else ""
        raise ValueError(
            f"The masks in {folder} have fewer than two classes (values: {seen}). Classes are "
            f"0, 1, 2 …; {IGNORE} marks unlabelled pixels.{white}"
        )
    if (most := max(used - {IGNORE})) >= IGNORE:
        raise ValueError(
            f"The masks in {folder} contain the value {most}; classes are 0 to {IGNORE - 1}, and "
            f"{IGNORE} marks unlabelled pixels."
        )
    return [str(i) for i in range(most + 1)]


@lru_cache(maxsize=2**17)  # reading all masks is slow
def _values_in(
    read: Callable[[Path], np.ndarray], path: Path, size: int, changed: int
) -> frozenset[int]:
    """The values in a mask file; read again if its size or modification time changes."""
    return frozenset(read(path).tolist())
