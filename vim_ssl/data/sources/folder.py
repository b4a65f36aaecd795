"""A folder of images: flat, with class folders, or with split folders over either."""

import os
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vim_ssl.data.dataset import ImageData
from vim_ssl.data.images import EXTENSIONS
from vim_ssl.data.registry import Splits, source
from vim_ssl.data.spec import SPLIT_NAMES, DataSpec, near, pick_split

_SPLIT_FOLDERS = frozenset(name for names in SPLIT_NAMES.values() for name in names)


class OnDisk:
    """What is read from files, row by row."""

    def paths(self, row: int) -> list[str]:
        """The files that a row is read from."""
        raise NotImplementedError

    def sizes(self, row: int) -> int | str:
        """Bytes of these files; -1 when one is gone."""
        try:
            return sum(map(os.path.getsize, self.paths(row)))
        except OSError:
            return -1


class FileImages(OnDisk):
    """Files under one root; a list of short names is all that travels to workers."""

    def __init__(self, root: str, names: list[str]):
        self.root, self.names = root, names

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, row: int) -> str:
        return os.path.join(self.root, self.names[row])

    def paths(self, row: int) -> list[str]:
        return [self[row]]


@source("folder", options=("label", "group"))
def open_folder(spec: DataSpec) -> Splits:
    """Open a folder of images.

    Images are found by extension at any depth; hidden files and folders are passed over.

    - Folders named train, val (valid, validation) and test, and no other with images, are splits.
    - Class folders: every image lies exactly one folder deep, in two folders or more. Their
      sorted names, numbers by size, over all splits, are the classes. Anything else (a flat folder,
      nested folders by date) has no labels. ``label=none`` leaves them out, ``label=folder`` takes
      the outermost folder as the class whatever lies below.
    - ``group=folder`` makes the folder that an image lies in its group.

    The ids are the paths below the root, with forward slashes.

    Raises: FileNotFoundError, NotADirectoryError; ValueError for a folder without an image
        (naming what it holds), and for labels that the layout cannot give.
    """
    for key, allowed in (("label", ("folder", "none")), ("group", ("folder",))):
        value = getattr(spec, key)
        if value and value not in allowed:
            raise ValueError(
                f"{key}={value} is nothing a folder has; it takes "
                f"{' or '.join(f'{key}={a}' for a in allowed)}."
            )
    root = Path(spec.location).expanduser()
    names = find_images(root, spec.location)

    def choose(spec: DataSpec) -> ImageData:
        found = read_layout(names, spec.split, spec.label, str(root))
        groups = [name.rpartition("/")[0] for name in found.names] if spec.group else None
        return ImageData(
            FileImages(str(root), found.names), found.names, name=str(spec), labels=found.labels,
            classes=found.classes, groups=groups, splits=found.splits, split=found.split,
        )  # fmt: skip

    return Splits([split for split in by_split(names) if split], choose)


def split_views(data: ImageData, split_of: Sequence[str]) -> Splits:
    """The splits of data that were opened whole.

    Args:
        split_of: the split of every image; of data without splits of any length.
    """

    def choose(spec: DataSpec) -> ImageData:
        split = pick_split(spec.split, data.splits, f"{spec.scheme}:{spec.location}")
        view = data.subset(i for i in range(len(data)) if split == "all" or split_of[i] == split)
        view.name, view.split = str(spec), split
        return view

    return Splits(data.splits, choose)


@dataclass(frozen=True)
class Layout:
    """What the folders below a root say: the ``names`` of the chosen split, and as in `ImageData`
    their labels and classes."""

    names: list[str]
    splits: list[str]
    split: str
    labels: list[int] | None
    classes: list[str] | None


def read_layout(names: list[str], split: str | None, label: str | None, root: str) -> Layout:
    """Splits and classes by folders, as `open_folder` describes them.

    Args:
        names: sorted paths below ``root``, with forward slashes.
        split, label: as in the spec; "none" leaves labels out.
    Raises: ValueError for a split or labels that the folders do not give.
    """
    parts = by_split(names)
    labelled = {part: _classes(held, bool(part), label, root) for part, held in parts.items()}
    splits = [part for part in parts if part]
    split = pick_split(split, splits, f"The folder {root}")
    chosen = [part for part in parts if split in ("all", part)]
    labels = classes = None
    if all(labelled[part] for part in chosen):
        classes = sort_classes({name for held in labelled.values() for name in held or ()})
        number = {name: i for i, name in enumerate(classes)}
        labels = [number[name.split("/")[1 if p else 0]] for p in chosen for name in parts[p]]
    names = [name for part in chosen for name in parts[part]]
    return Layout(names, splits, split, labels, classes)


def find_images(root: Path, given: str) -> list[str]:
    """Sorted names of all images below root, with forward slashes."""
    return find_files(root, given, "image", EXTENSIONS)


def find_files(root: Path, given: str, what: str, extensions: Sequence[str]) -> list[str]:
    """Sorted names of all files below root that end so, with forward slashes.

    Args:
        given: the root as the user named it.
        what: they are, for messages.
    Raises: as `open_folder`.
    """
    if not root.exists():
        raise FileNotFoundError(f"There is no folder {given!r}.{_hint(given)}")
    if not root.is_dir():
        raise NotADirectoryError(f"{given!r} is a file; give the folder that holds the {what}s.")
    names: list[str] = []
    others: Counter[str] = Counter()
    seen = set()  # links are followed, as data sets are often linked together; but not in circles

    def refuse(error: OSError) -> None:
        raise error

    for folder, below, files in os.walk(root, onerror=refuse, followlinks=True):
        identity = os.stat(folder)
        if identity.st_ino and (identity.st_dev, identity.st_ino) in seen:
            below.clear()
            continue
        seen.add((identity.st_dev, identity.st_ino))
        below[:] = [name for name in below if not name.startswith(".")]
        prefix = Path(folder).relative_to(root).as_posix() + "/" if Path(folder) != root else ""
        for name in files:
            extension = os.path.splitext(name)[1].lower()
            if name.startswith("."):
                others["hidden"] += 1
            elif extension in extensions:
                names.append(prefix + name)
            else:
                others[extension or "without extension"] += 1
    if not names:
        held = ", ".join(f"{count} × {kind}" for kind, count in others.most_common(5))
        raise ValueError(
            f"The folder {given!r} holds no {what} at any depth; it holds {held or 'no file'}. "
            f"{what.capitalize()}s are files that end in {' '.join(extensions)}."
        )
    return sorted(names)


def sort_classes(names: Collection[Any]) -> list[Any]:
    """Class names in order: by size where all are whole numbers, so that ranks of ten and more are
    what they say, else by spelling."""
    whole = all(re.fullmatch(r"\s*[+-]?\d+\s*", str(name)) for name in names)
    return sorted(names, key=lambda name: (int(name) if whole else 0, name))


def by_split(names: list[str]) -> dict[str, list[str]]:
    """Images by split folder, train first; all under "" when the folders are no splits."""
    tops = {name.split("/")[0] if "/" in name else "" for name in names}
    if not {top.lower() for top in tops} <= _SPLIT_FOLDERS:
        return {"": names}
    order = [name for names in SPLIT_NAMES.values() for name in names]
    return {
        top: [name for name in names if name.startswith(f"{top}/")]
        for top in sorted(tops, key=lambda top: order.index(top.lower()))
    }


def _classes(names: list[str], split: bool, label: str | None, root: str) -> set[str] | None:
    """The class folders' names, or None when this part (below a split's folder) has no labels."""
    if label == "none":
        return None
    places = [name.split("/")[1 if split else 0 :] for name in names]
    classes = {place[0] for place in places if len(place) > 1}
    if label == "folder":
        if flat := sum(len(place) == 1 for place in places):
            raise ValueError(
                f"label=folder, but {flat} images lie outside of any class folder in {root}."
            )
        return classes
    return classes if len(classes) > 1 and all(len(place) == 2 for place in places) else None


def _hint(given: str) -> str:
    from vim_ssl.data.samples.fetch import SAMPLES  # samples are data too; not needed otherwise

    if guess := near(given, list(SAMPLES)).replace("mean '", "mean 'sample:"):
        return guess
    if given.count("/") == 1 and not given.startswith((".", "~", "/")):
        return f" A data set of the Hugging Face Hub is written 'hf:{given}'."
    return ""
