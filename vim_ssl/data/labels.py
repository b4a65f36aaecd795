"""Mask files: match them to images, check their values, list their classes."""

import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from vim_ssl.data.images import EXTENSIONS, BadImage
from vim_ssl.data.passed_over import pass_over
from vim_ssl.utils.files import read_text

IGNORE = 255  # the value of an unlabelled pixel
SAMPLE = 32  # masks that are read when a file names the classes
LOOKED_AT = 1000  # masks that are read to find which classes a split has
MANY_VALUES = 64  # more in one mask are grey levels or objects, not classes
FEW_USED = 32  # from this number of classes on, a quarter must occur
# Words of a first line that names columns.
HEADER = {"id", "ids", "index", "number", "value", "label", "class", "name", "names", "colour",
          "color", "r", "g", "b", "red", "green", "blue"}  # fmt: skip
NAMED = 3  # examples in a message
# What programs append to an image's name for its mask.
MASK_NAME = re.compile(r"[-_. ](masks?|labels?|labelids|gt|seg|segmentation)$", re.IGNORECASE)
WHITE = f"Save objects as 1 on 0, not as {IGNORE} on 0."


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


# ---------------------------------------------------------------- pairs of image and mask


def paired(
    names: Sequence[str],
    masks: Sequence[str],
    images_folder: Path,
    masks_folder: Path,
    endings: Sequence[str] = (),
) -> list[str]:
    """Match each image to its mask: the one with the same name up to the ending (one of
    ``endings``, else the part after the last dot). Without it, the mask ``a.jpg.png`` or
    ``a_mask.png`` belongs to ``a.jpg``, in upper or lower case.

    Returns: the masks, in the order of ``names``; masks without an image are counted.
    Raises: FileNotFoundError naming images without a mask; ValueError for masks of the same name,
        and for images that share a mask.
    """
    endings = endings or EXTENSIONS

    def stem(name: str) -> str:
        ending = next((e for e in endings if name.lower().endswith(e)), os.path.splitext(name)[1])
        return name.removesuffix(name[len(name) - len(ending) :])

    def loose(name: str) -> str:
        name = stem(name)
        return MASK_NAME.sub("", stem(name) if name.lower().endswith(tuple(endings)) else name)

    exact = _by_key(masks, stem, masks_folder)
    lower: dict[str, str] | None = None
    mask_of: dict[str, str] = {}
    for name in names:
        # nnU-Net names channels _0000, _0001 …
        keys = stem(name), name, re.sub(r"_\d{4}$", "", stem(name))
        mask = next((exact[key] for key in keys if key in exact), None)
        if mask is None:
            lower = lower or _by_key(masks, lambda name: loose(name).lower(), masks_folder)
            mask = lower.get(stem(name).lower())
        if mask is not None:
            mask_of[name] = mask
    if missing := [name for name in names if name not in mask_of]:
        raise FileNotFoundError(
            f"{len(missing)} of {len(names)} images in {images_folder} have no mask with the same "
            f"name in {masks_folder}: {_some(missing)}"
        )
    image_of: dict[str, str] = {}
    for name, mask in mask_of.items():
        if (other := image_of.setdefault(mask, name)) != name:
            raise ValueError(
                f"{images_folder} has two images {other} and {name} with the same mask {mask}; "
                "give each a name and a mask of its own."
            )
    bare = [name for name in masks if name not in image_of]
    pass_over("masks without an image", len(bare), bare)
    return list(mask_of.values())


def _by_key(masks: Iterable[str], key: Callable[[str], str], folder: Path) -> dict[str, str]:
    """Map keys to masks. Raises: ValueError for two masks with the same key."""
    result: dict[str, str] = {}
    for name in masks:
        if (other := result.setdefault(key(name), name)) != name:
            raise ValueError(f"{folder} has two masks {other} and {name}; keep one.")
    return result


def mask_folders(root: str) -> tuple[Path, Path] | None:
    """Return the folders of the images and of their masks, or None unless both exist."""
    top = Path(root).expanduser()
    for pair in (("images", "masks"), ("images", "labels"), ("imagesTr", "labelsTr")):
        images, masks = (top / name for name in pair)
        if images.is_dir() and masks.is_dir():
            return images, masks
    return None


# ---------------------------------------------------------------- names of classes


def read_classes(file: Path) -> list[str]:
    """Read class names, one per line: line 1 names class 0. Numbers in front, from 0 in steps of
    one, are left out of the names; empty lines at the end do not count.

    Raises: ValueError for an empty line, a comment, a header or a name that occurs twice, and for
        numbers in front or behind that begin at 1 or are in another order.
    """
    lines = [line.strip() for line in re.split(r"\r\n?|\n", read_text(file))]
    while lines and not lines[-1]:
        lines.pop()
    for number, line in enumerate(lines, 1):
        wrong = "is empty" if not line else "is a comment" if line.startswith(("#", "//")) else ""
        if not wrong and line in lines[: number - 1]:
            wrong = f"repeats the name {line!r}"
        if wrong:
            raise ValueError(
                f"{file}: line {number} {wrong}. The first line names class 0, the second class 1, "
                "and so on: write a name of its own into each line, or delete the line if it "
                "stands for no class."
            )
    if len(lines) > 1:
        _check_only_names(file, lines)
    parts = [re.fullmatch(r"(\d+)(?:\s*[:;,=.)]\s*|\s+)(\S.*)", line) for line in lines]
    numbers = [int(part[1]) for part in parts if part]
    if not lines or len(numbers) < len(lines):
        return lines
    if numbers == list(range(len(lines))):
        names = [part[2] for part in parts if part]
        return names if len(set(names)) == len(names) else lines
    if sorted(numbers) in (list(range(len(lines))), list(range(1, len(lines) + 1))):
        raise ValueError(
            f"{file}: line 1, {lines[0]!r}, names class 0, but its number is {numbers[0]}. Sort "
            "the lines by class number from 0 on, with a line for every number."
        )
    return lines


def _check_only_names(file: Path, lines: Sequence[str]) -> None:
    """Raise ValueError for a header, and for class numbers behind the names in another order than
    that of the lines."""
    header = re.split(r"[\s,;:]+", lines[0].lower())
    numbered = all(re.match(r"\d", line) or re.search(r"\d$", line) for line in lines[1:])
    if len(header) > 1 and numbered and set(header) <= HEADER:
        wrong = f"line 1, {lines[0]!r}, is a header"
    else:
        matches = [re.fullmatch(r"(\D.*?)(?:\s*[:;,=]\s*|\s+)(\d+)", line) for line in lines]
        parts = [(part[1], int(part[2])) for part in matches if part]
        numbers = [number for _, number in parts]
        orders = [list(range(i, i + len(lines))) for i in (0, 1)]
        # "grade 1" and "grade 2" are names; numbers from 0 on in order are harmless.
        if numbers == orders[0] or sorted(numbers) not in orders or len(dict(parts)) < len(lines):
            return
        wrong = f"there is a number behind each name ({lines[0]!r})"
    raise ValueError(
        f"{file}: {wrong}. Write only the names, one per line: the first line names class 0, the "
        "second class 1, and so on."
    )


def named_classes(
    root: Path, folder: Path, names: Iterable[str], numbers: Callable[[Path], np.ndarray]
) -> tuple[list[str], list[str]]:
    """Return the names in ``classes.txt`` of ``root``, else the class numbers in the masks; see
    `checked_classes` for the faults."""
    file = next((f for f in sorted(root.glob("[cC]*")) if f.name.lower() == "classes.txt"), None)
    classes = read_classes(file) if file else None
    classes, faults = checked_classes(classes, root, folder, names, numbers)
    for other in (f for depth in ("*", "*/*") for f in sorted(root.glob(f"{depth}/classes.txt"))):
        if file is None or read_classes(other) != classes:
            faults.append(
                f"{other.relative_to(root).as_posix()} is not read"
                f"{' and names other classes' if file else ''}; the classes of all splits are "
                f"named in {root / 'classes.txt'}"
            )
    return classes, faults


def checked_classes(
    classes: list[str] | None,
    root: Path,
    folder: Path,
    names: Iterable[str],
    numbers: Callable[[Path], np.ndarray],
    first: int = 0,
) -> tuple[list[str], list[str]]:
    """Check classes against the values in the masks.

    Args:
        classes: class names, from a file in ``root``, or None to name them by their numbers. With
            names, only `SAMPLE` masks are read, spread evenly, or all if these are dubious.
        names: file names of the masks in ``folder``.
        numbers: reads the values in a mask; a module-level function; may raise BadImage.
        first: value of the first class; smaller values are unlabelled.
    Returns: the names, and the faults of the masks.
    Raises: ValueError for fewer than 2 classes or more than 255, and for masks whose values cannot
        be class numbers; see `classes_of`.
    """
    if classes is not None and not 2 <= len(classes) <= IGNORE:
        raise ValueError(
            f"{root} has {len(classes)} classes; expected 2 to {IGNORE}, one name per line."
        )
    names = list(dict.fromkeys(names))
    few = min(SAMPLE, len(names)) if classes else len(names)
    for count in (few, len(names)):
        values: dict[str, frozenset[int]] = {}
        broken: dict[str, str] = {}
        for name in (names[i * len(names) // count] for i in range(count)):
            try:
                file = (folder / name).stat()
                values[name] = _values_in(numbers, folder / name, file.st_size, file.st_mtime_ns)
            except (BadImage, OSError) as error:
                reason = getattr(error, "reason", "") or str(error)
                broken[name] = reason.removeprefix("the mask cannot be read: ")
        try:
            known, faults = classes_of(values, classes, f"The masks in {folder}", first, broken)
        except ValueError:
            if count == len(names):
                raise
            continue
        return known, faults
    raise AssertionError("unreachable")


def classes_of(
    values: Mapping[str, frozenset[int]],
    classes: list[str] | None,
    where: str,
    first: int = 0,
    broken: Mapping[str, str] | None = None,
) -> tuple[list[str], list[str]]:
    """Return the class names and the faults of masks with these values.

    Args:
        values: the values in each mask, by its name.
        classes, first: see `checked_classes`.
        where: the subject of messages, such as "The masks in FOLDER".
        broken: name → reason of each mask that cannot be read.
    Raises: ValueError if no mask can be read, if none has only classes, and if all labelled pixels
        are of one class although others are unlabelled; without names also for gaps and for too
        many values.
    """
    broken = broken or {}
    if broken and not values:
        name, reason = next(iter(broken.items()))
        raise ValueError(f"{where} cannot be read: {name}: {reason}.")
    used = frozenset[int]().union(*values.values())
    labelled = {value for value in used if value != IGNORE and value >= first}
    names = _numbered(values, labelled, where) if classes is None else classes
    beyond = {v: name for name, held in values.items() for v in held & labelled
              if v >= first + len(names)}  # fmt: skip
    wrong = [name for name, held in values.items() if held & beyond.keys()]
    faults = []
    if wrong:
        text = (
            f"contain the value {min(beyond)}; expected {len(names)} classes, {first} to "
            f"{first + len(names) - 1}, or {IGNORE} for unlabelled pixels ({_some(wrong)}). "
            f"Renumber the values, or name every class, from {first} on"
        )
        if len(wrong) == len(values):
            raise ValueError(f"{where} {text}.")
        faults.append(f"{len(wrong):,} of {len(values):,} masks read {text}")
    white = [name for name, held in values.items() if held == {0, IGNORE} and not first]
    if len(labelled) < 2:
        only = [names[value - first] for value in labelled if value < first + len(names)]
        what = f"no labelled pixel but of class {only[0]!r}" if only else "no labelled pixel"
        seen = ", ".join(map(str, sorted(used))) or "none"
        text = f"have {what} (values: {seen}); {_unlabelled(first)}"
        if classes is None or used - labelled or not used:
            raise ValueError(f"{where} {text}.{f' {WHITE}' if white else ''}")
        faults.append(f"{where} {text}")
    elif white:
        faults.append(
            f"{len(white):,} of {len(values):,} masks read have only the values 0 and {IGNORE}, "
            f"and {IGNORE} is unlabelled: {_some(white)}. {WHITE[:-1]}"
        )
    if broken:
        name, reason = next(iter(broken.items()))
        faults.append(f"{len(broken):,} masks cannot be read, for example {name}: {reason}")
    return names, faults


def _unlabelled(first: int) -> str:
    if first:
        return (
            f"0 and {IGNORE} mark unlabelled pixels, classes begin at {first}. If 0 is a class, "
            "read the folder as masks: with images/ and masks/"
        )
    return f"classes are 0, 1, 2 …, and {IGNORE} marks unlabelled pixels"


def _numbered(values: Mapping[str, frozenset[int]], labelled: set[int], where: str) -> list[str]:
    """Return the numbers from 0 to the largest value as names. Raises: ValueError."""
    most = max(labelled, default=0)
    if len(labelled) < 2:
        seen = ", ".join(map(str, sorted(frozenset[int]().union(*values.values())))) or "none"
        white = f" {WHITE}" if any(IGNORE in held for held in values.values()) else ""
        raise ValueError(
            f"{where} have fewer than two classes (values: {seen}). Classes are 0, 1, 2 …; "
            f"{IGNORE} marks unlabelled pixels.{white}"
        )
    if most >= IGNORE:
        raise ValueError(
            f"{where} contain the value {most}; classes are 0 to {IGNORE - 1}, and {IGNORE} marks "
            "unlabelled pixels."
        )
    name = max(values, key=lambda name: len(values[name]))
    wrong = ""
    if len(values[name]) > MANY_VALUES:
        wrong = f"have up to {len(values[name])} values ({name})"
    elif most >= FEW_USED and 4 * len(labelled) < most + 1:
        wrong = f"have only the values {', '.join(map(str, sorted(labelled)))}"
    if wrong:
        raise ValueError(
            f"{where} {wrong}, which look like grey levels and not like class numbers 0, 1, 2 …. "
            "Number the classes from 0 on, in files without smoothing or lossy compression; if "
            "the values are class numbers, name all classes in classes.txt."
        )
    return [str(i) for i in range(most + 1)]


def classes_in(
    read: Callable[[Path], np.ndarray], path: str | Path, classes: int, first: int = 0
) -> frozenset[int]:
    """Return the indices of the classes in a mask file, read once; none if it cannot be read.

    Args:
        read: reads the values in a mask; a module-level function; may raise BadImage.
        classes, first: number of classes, and the value of the first one.
    """
    path = Path(path)
    try:
        file = path.stat()
        values = _values_in(read, path, file.st_size, file.st_mtime_ns)
    except (BadImage, OSError):
        return frozenset()
    return frozenset(v - first for v in values if first <= v < first + classes and v != IGNORE)


def absent_classes(train: Any, test: Any) -> list[str]:
    """Describe the classes that no training mask has: they cannot be learned.

    At most `LOOKED_AT` masks of each split are read, and only until every class has occurred.

    Args:
        train, test: `ImageData` with masks.
    """
    missing = set(range(len(train.classes or ()))) - _classes_of(train)
    if not missing:
        return []
    tested = missing & _classes_of(test, missing)
    texts = []
    which = "" if len(train) <= LOOKED_AT else f" of {LOOKED_AT:,} that were read"
    for indices, tail in ((tested, ", but test masks have them"), (missing - tested, "")):
        if indices and (tail or not which):
            names = [train.classes[i] for i in sorted(indices)]
            texts.append(
                f"{train.name}: no training mask{which} has {len(names):,} of the "
                f"{len(train.classes):,} classes{tail}: {_some(names)}; they cannot be learned"
            )
    return texts


def _classes_of(data: Any, sought: Collection[int] = ()) -> set[int]:
    """The classes in up to `LOOKED_AT` masks; stops when all (those ``sought``) occurred."""
    result: set[int] = set()
    needed = set(sought) or set(range(len(data.classes or ())))
    few = min(len(data), LOOKED_AT)
    for i in range(few):
        result |= data.classes_in_mask(i * len(data) // few)
        if needed <= result:
            break
    return result


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + (" …" if len(names) > NAMED else "")


@lru_cache(maxsize=2**17)  # reading all masks is slow
def _values_in(
    read: Callable[[Path], np.ndarray], path: Path, size: int, changed: int
) -> frozenset[int]:
    """The values in a mask file; read again if its size or modification time changes."""
    return frozenset(read(path).tolist())
