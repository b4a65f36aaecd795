"""``masks:`` and ``ade20k:``: images that each have a mask of class numbers."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vim_ssl.data.dataset import ImageData
from vim_ssl.data.labels import (
    IGNORE,
    checked,
    checked_classes,
    classes_in,
    named_classes,
    paired,
)
from vim_ssl.data.pixels import label_numbers
from vim_ssl.data.registry import Splits, source
from vim_ssl.data.sources.folder import (
    FileImages,
    by_split,
    check_option,
    folder_groups,
    split_folders,
)
from vim_ssl.data.spec import DataSpec, pick_split
from vim_ssl.data.walk import contents, find_images
from vim_ssl.utils.files import read_text

# Not GIF: writers reorder its palette, and a class number is an index into the palette.
LOSSLESS = (".bmp", ".png", ".tif", ".tiff")
ADE20K_CLASSES = 150


@dataclass(eq=False)
class MaskFiles(FileImages):
    """Mask files below one root, read as class numbers.

    Attributes:
        classes: number of classes.
        zero_is_none: True if 0 means "unlabelled" and 1 is the first class.
    """

    classes: int
    zero_is_none: bool

    def classes_in(self, row: int) -> frozenset[int]:
        return classes_in(_numbers, self[row], self.classes, int(self.zero_is_none))

    def read(self, row: int, size: tuple[int, int]) -> np.ndarray:
        """Read the mask of an image of ``size`` (width, height): uint8 (h, w), 0 to classes - 1, or
        `IGNORE`.

        Raises: BadImage for an unreadable file, another size, or a number that is not a class.
        """
        first = int(self.zero_is_none)
        values = checked(label_numbers(self[row]), size, self.rows[row], self.classes, first)
        if self.zero_is_none:
            values = np.where((values == 0) | (values == IGNORE), IGNORE, values - 1)
        return values.astype(np.uint8)


@source("masks", options=("group",))
def open_masks(spec: DataSpec) -> Splits:
    """Open ``images/`` and ``masks/``, with files of the same names; both may have split folders.

    A mask is a lossless grey or palette file (PNG, TIFF, BMP) with class numbers from 0; `IGNORE`
    (255) means unlabelled. ``classes.txt`` names the classes, one per line; without it, all masks
    are read once to count the classes. ``group=folder``: as for a plain folder.

    Raises: FileNotFoundError that lists everything missing; ValueError for invalid masks.
    """

    def classes(root: Path, names: list[str]) -> tuple[list[str], list[str]]:
        return named_classes(root, root / "masks", names, _numbers)

    return _open(spec, "masks", classes)


@source("ade20k", options=("group",))
def open_ade20k(spec: DataSpec) -> Splits:
    """Open ADEChallengeData2016: ``images/`` and ``annotations/``, both with ``training`` and
    ``validation``. ``objectInfo150.txt``, if present, names the 150 classes; 0 means unlabelled.

    Raises: see `open_masks`.
    """

    def classes(root: Path, names: list[str]) -> tuple[list[str], list[str]]:
        return checked_classes(_ade20k_names(root), root, root / "annotations", names, _numbers, 1)

    return _open(spec, "annotations", classes, zero_is_none=True)


def _ade20k_names(root: Path) -> list[str]:
    table = root / "objectInfo150.txt"
    if not table.exists():
        return [str(i) for i in range(1, ADE20K_CLASSES + 1)]
    rows = [line.split("\t") for line in read_text(table).splitlines()]
    named = [row[-1].partition(",")[0].strip() for row in rows if row[0].strip().isdigit()]
    if len(named) != ADE20K_CLASSES:
        raise ValueError(f"{table} names {len(named)} classes; expected {ADE20K_CLASSES}.")
    return named


def _numbers(path: Path) -> np.ndarray:
    """Return the class numbers in a mask file. Raises: BadImage."""
    return np.unique(label_numbers(path))


def _open(
    spec: DataSpec,
    masks_folder: str,
    find_classes: Callable[[Path, list[str]], tuple[list[str], list[str]]],
    zero_is_none: bool = False,
) -> Splits:
    check_option(spec, "group", ("folder",))
    root = Path(spec.location).expanduser()
    _check_folders(root, masks_folder)
    names = find_images(root / "images", str(root / "images"))
    masks = _masks_of(names, root, masks_folder)
    classes, faults = find_classes(root, masks)
    names_of = by_split(names)
    splits = split_folders(names)
    mask_of = dict(zip(names, masks, strict=True))

    def choose(spec: DataSpec) -> ImageData:
        split = pick_split(spec.split, splits, f"The folder {root}")
        chosen = [name for s in names_of if split in ("all", s) for name in names_of[s]]
        files = MaskFiles(
            str(root / masks_folder), [mask_of[name] for name in chosen], len(classes), zero_is_none
        )
        return ImageData(
            FileImages(str(root / "images"), chosen), chosen, name=str(spec), masks=files,
            classes=classes, splits=splits, split=split, faults=faults,
            groups=folder_groups(chosen, splits) if spec.group else None,
        )  # fmt: skip

    return Splits(splits, choose)


def _check_folders(root: Path, masks_folder: str) -> None:
    missing = [name for name in ("images", masks_folder) if not (root / name).is_dir()]
    if missing:
        raise FileNotFoundError(
            f"{root} has no {' and no '.join(f'{name}/' for name in missing)}; it "
            f"{contents(root)}. Expected images/ and {masks_folder}/ with files of the same names."
        )


def _masks_of(names: Sequence[str], root: Path, folder: str) -> list[str]:
    """Return each image's mask file. Raises: FileNotFoundError naming the images without one."""
    masks = find_images(root / folder, str(root / folder))
    for name in masks:
        extension = os.path.splitext(name)[1]
        if extension.lower() not in LOSSLESS:
            raise ValueError(
                f"{root / folder / name}: a {extension} file does not preserve class numbers; save "
                f"masks as PNG (accepted are {' '.join(LOSSLESS)})."
            )
    return paired(names, masks, root / "images", root / folder)
