"""Folders of images, with optional class and split folders; also helpers for other sources that
read files."""

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vim_ssl.data.dataset import ImageData
from vim_ssl.data.labels import mask_folders, paired
from vim_ssl.data.layouts import warn_of_layout
from vim_ssl.data.passed_over import add_warning
from vim_ssl.data.registry import Splits, source
from vim_ssl.data.spec import SPLIT_NAMES, DataSpec, canonical_split, pick_split
from vim_ssl.data.values import class_keys, fold, sort_classes
from vim_ssl.data.walk import find_images, match_files, pass_over_empty

NAMED = 3  # number of examples in a warning
_SPLIT_FOLDERS = frozenset(name for names in SPLIT_NAMES.values() for name in names)


@dataclass(eq=False)
class OnDisk:
    """Data that is read from files, row by row.

    Attributes:
        root: the folder that file names are relative to.
        rows: the source's description of each row, such as a file name.
    """

    root: str
    rows: Sequence[Any]

    def __len__(self) -> int:
        return len(self.rows)

    def names(self, row: int) -> list[str]:
        """Return the files of a row, relative to the root."""
        raise NotImplementedError

    def paths(self, row: int) -> list[str]:
        """Return the paths of the files of a row."""
        return [os.path.join(self.root, name) for name in self.names(row)]

    def sizes(self, row: int) -> int | str:
        """Return the total size of a row's files in bytes; -1 if one is missing."""
        try:
            return sum(map(os.path.getsize, self.paths(row)))
        except OSError:
            return -1


class FileImages(OnDisk):
    """One file per row; a row is its name."""

    whole_files = True

    def __getitem__(self, row: int) -> str:
        return os.path.join(self.root, self.rows[row])

    def names(self, row: int) -> list[str]:
        return [self.rows[row]]


@source("folder", options=("label", "group"))
def open_folder(spec: DataSpec) -> Splits:
    """Open a folder of images.

    Images are found by extension at any depth; hidden files and folders are skipped.

    - Folders are splits if all that contain images are named train, val (valid, validation) or
      test.
    - Folders are classes if there are at least two and every image is exactly one folder deep. The
      classes are the sorted folder names of all splits, with integers in numeric order. Any other
      layout (a flat folder, nested folders by date) has no labels. ``label=none`` ignores class
      folders; ``label=folder`` makes the outermost folder the class, at any depth.
    - ``group=folder`` makes the folder of an image its group.

    The ids are the paths relative to the root, with forward slashes.

    Raises: FileNotFoundError, NotADirectoryError; ValueError for a folder without an image (naming
        its content), and for labels that the layout does not have.
    """
    check_option(spec, "label", ("folder", "none"))
    check_option(spec, "group", ("folder",))
    root = Path(spec.location).expanduser()
    return folder_splits(root, find_images(root, spec.location))


def folder_splits(
    root: Path,
    names: list[str],
    files: Callable[[str, list[str]], Any] = FileImages,
    data_class: type[ImageData] = ImageData,
) -> Splits:
    """Return the splits of files, determined by their folders as in `open_folder`.

    Args:
        names: sorted paths relative to ``root``, with forward slashes.
        files: (root, names of the chosen split) → the images, the first argument of ``data_class``.
        data_class: class of the returned data.
    """

    def choose(spec: DataSpec) -> ImageData:
        layout = read_layout(names, spec.split, spec.label, str(root))
        groups = folder_groups(layout.names, splits, layout.labels) if spec.group else None
        images = files(str(root), layout.names)
        return layout.open(images, str(spec), data_class, groups=groups)

    splits = split_folders(names)
    pass_over_empty(root, names, splits)
    return Splits(splits, choose)


@dataclass(frozen=True)
class Layout:
    """Splits and labels determined by the folders below a root.

    Attributes:
        names: the paths of the chosen split, relative to the root.
        splits, split, labels, classes: as in `ImageData`.
    """

    names: list[str]
    splits: list[str]
    split: str
    labels: list[int] | None
    classes: list[str] | None

    @property
    def label_of(self) -> dict[str, int]:
        """Name → label; empty without labels."""
        return dict(zip(self.names, self.labels or (), strict=False))

    def open(
        self, images: FileImages, name: str, data_class: type[ImageData] = ImageData, **columns: Any
    ) -> Any:
        """Return the images with the ids, labels and splits of this layout."""
        return data_class(
            images, self.names, name=name, labels=self.labels, classes=self.classes,
            splits=self.splits, split=self.split, **columns,
        )  # fmt: skip


def read_layout(names: list[str], split: str | None, label: str | None, root: str) -> Layout:
    """Determine splits and classes from the folders, as in `open_folder`.

    Args:
        names: sorted paths relative to ``root``, with forward slashes.
        split, label: as in the spec.
    Raises: ValueError for a split or labels that the folders do not have.
    """
    names_of = by_split(names)
    splits = split_folders(names)
    classes_of = {s: _classes(held, bool(s), label, root) for s, held in names_of.items()}
    name_of = _one_spelling({s: held for s, held in classes_of.items() if held})
    split = pick_split(split, splits, f"The folder {root}")
    chosen = [name for name in names_of if split in ("all", name)]
    labels = classes = None
    if all(classes_of[name] for name in chosen):
        classes = sort_classes(set(name_of.values()))
        number = {name: i for i, name in enumerate(classes)}
        folders = (name.split("/")[1 if s else 0] for s in chosen for name in names_of[s])
        labels = [number[name_of[folder]] for folder in folders]
    names = [name for s in chosen for name in names_of[s]]
    return Layout(names, splits, split, labels, classes)


def folder_groups(
    names: Sequence[str], splits: Sequence[str], labels: Sequence[int] | None = None
) -> list[str]:
    """Return the folder of each file, without its split folder: a group of two splits has one name.

    Split folders that directly contain files are groups of their split, and so are class folders:
    they are not the same group because two splits have the same class.

    Args:
        names: paths relative to the root, with forward slashes.
        splits: the split folders; empty if the folders are not splits.
        labels: the labels by outermost folder, None without.
    """
    groups = [name.rpartition("/")[0] for name in names]
    depth = 2 if labels is not None else 1  # of the split folders and class folders
    if not splits:
        return groups
    return [g.partition("/")[2] if g.count("/") >= depth else g for g in groups]


def split_views(data: ImageData, split_of: Sequence[str]) -> Splits:
    """Return the splits of data whose images are all open.

    Args:
        split_of: the split of each image of ``data``; "" if it has none.
    """

    def choose(spec: DataSpec) -> ImageData:
        split = pick_split(spec.split, data.splits, f"{spec.scheme}:{spec.location}")
        view = data.subset(i for i in range(len(data)) if split == "all" or split_of[i] == split)
        view.name, view.split = str(spec), split
        return view

    return Splits(data.splits, choose)


def check_option(spec: DataSpec, option: str, values: Sequence[str]) -> None:
    """Raise ValueError if the source does not accept the option's value."""
    value = getattr(spec, option)
    if value and value not in values:
        raise ValueError(
            f"{spec.scheme}:{spec.location}: unsupported {option}={value}; use "
            f"{' or '.join(f'{option}={offered}' for offered in values)}."
        )


def match_masks(
    spec: DataSpec,
    what: str,
    endings: Sequence[str],
    strict: bool = False,
    choose: Callable[[list[str], list[str] | None], list[str]] | None = None,
) -> tuple[Path, list[str], Path | None, dict[str, str]]:
    """Find the files that a spec names, as `match_files` does, and the mask of each.

    Args:
        choose: names of files, and of their masks (None without masks) → the names to read; also
            called for the masks, with None.
    Returns: folder and names of the images; folder of the masks, and image name → mask name.
        Without `mask_folders`, or with ``label=``, the last two are None and {}.
    """
    source = f"{spec.scheme}:{spec.location}"
    folders = mask_folders(spec.location) if spec.label != "folder" else None
    images = str(folders[0]) if folders else spec.location
    root, names = match_files(images, source, what, endings, strict)
    choose = choose or (lambda names, masks: names)
    if not folders or spec.label:
        return root, choose(names, None), None, {}
    masks = choose(match_files(str(folders[1]), source, "mask", endings, strict)[1], None)
    names = choose(names, masks)
    paired_masks = paired(names, masks, *folders, endings if strict else ())
    return root, names, folders[1], dict(zip(names, paired_masks, strict=True))


def by_split(names: list[str]) -> dict[str, list[str]]:
    """Group images by split folder, train first; all under "" if the folders are not splits."""
    tops = {name.split("/")[0] if "/" in name else "" for name in names}
    if not {top.lower() for top in tops} <= _SPLIT_FOLDERS:
        return {"": names}
    order = [name for names in SPLIT_NAMES.values() for name in names]
    return {
        top: [name for name in names if name.startswith(f"{top}/")]
        for top in sorted(tops, key=lambda top: order.index(top.lower()))
    }


def split_folders(names: list[str]) -> list[str]:
    """Return the split folders, train first; [] if the folders are not splits. Warns of files and
    folders that keep others from being splits, of two folders for one split, and as
    `warn_of_layout`."""
    splits = [name for name in by_split(names) if name]
    warn_of_layout(names, splits)
    if splits:
        same = Counter(map(canonical_split, splits))
        if twice := [name for name in splits if same[canonical_split(name)] > 1]:
            add_warning(
                f"{', '.join(f'{name}/' for name in twice)} are folders of one split, and only one "
                "of them is used; move the images into one folder."
            )
        return splits
    tops = {name.split("/")[0] if "/" in name else "" for name in names}
    known = sorted(top for top in tops if top.lower() in _SPLIT_FOLDERS)
    if len({canonical_split(top) for top in known}) > 1:
        flat = [name for name in names if "/" not in name]
        beside = [*flat[:NAMED], *sorted(f"{top}/" for top in tops - {*known, ""})]
        more = " …" if len(beside) > NAMED or len(flat) > NAMED else ""
        add_warning(
            f"{', '.join(known)} are not read as splits, because their parent folder also contains "
            f"{', '.join(beside[:NAMED])}{more}. All images form one split; move the others away."
        )
    return splits


def _one_spelling(classes_of: dict[str, set[str]]) -> dict[str, str]:
    """Map the class folders of all splits to class names. Folders of two splits whose names differ
    only in letter case, spaces or the like are one class, as spelled in the first split; two such
    folders of one split are two classes. Both cause a warning."""
    name_of = {name: name for held in classes_of.values() for name in sorted(held)}
    alike: dict[str, list[str]] = {}
    for name, key in class_keys(name_of.keys()).items():
        alike.setdefault(fold(key), []).append(name)
    for names in alike.values():
        if len(names) < 2:
            continue
        differing = f"the class folders {', '.join(map(repr, names))} differ only in case or spaces"
        if any(len(held.intersection(names)) > 1 for held in classes_of.values()):
            add_warning(f"{differing}, and are different classes; join them if they are one.")
        else:
            name_of |= dict.fromkeys(names, names[0])
            add_warning(f"{differing}, and are read as one class; rename them if they are not.")
    return name_of


def _warn_of_strays(paths: list[list[str]], where: str) -> None:
    """Warn that images have no labels because of a few that are not in class folders.

    Args:
        paths: the parts of each image's path, without the split.
    """
    classes = {path[0] for path in paths if len(path) == 2}
    strays = ["/".join(path) for path in paths if len(path) != 2]
    if len(classes) > 1 and 0 < len(strays) <= len(paths) / 2:
        outside = any("/" not in name for name in strays)
        remedy = "move them away" if outside else "add label=folder to use the outermost folders"
        more = " …" if len(strays) > NAMED else ""
        add_warning(
            f"the images {where}have no labels, because {len(strays):,} of {len(paths):,} are not "
            f"exactly in a class folder: {', '.join(strays[:NAMED])}{more}; {remedy}."
        )


def _classes(names: list[str], split: bool, label: str | None, root: str) -> set[str] | None:
    """Return the names of the class folders, or None if these images have no labels.

    Args:
        split: True if the names begin with a split folder.
    """
    if label == "none":
        return None
    paths = [name.split("/")[1 if split else 0 :] for name in names]
    classes = {path[0] for path in paths if len(path) > 1}
    if label == "folder":
        if flat := [path[0] for path in paths if len(path) == 1]:
            raise ValueError(
                f"label=folder, but {len(flat)} images in {root} are not in a class folder: "
                f"{', '.join(flat[:NAMED])}{' …' if len(flat) > NAMED else ''}; move them away."
            )
        return classes
    if len(classes) > 1 and all(len(path) == 2 for path in paths):
        return classes
    _warn_of_strays(paths, f"of {names[0].split('/')[0]}/ " if split else "")
    return None
