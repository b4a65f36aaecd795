"""``coco:``: images with objects (boxes and outlines) in COCO's format."""

import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import lru_cache
from itertools import product
from pathlib import Path
from urllib.parse import unquote, urlsplit

from vim_ssl.data.dataset import ImageData
from vim_ssl.data.objects import (
    CocoObjects,
    Table,
    check_same_categories,
    ground_truth,
    read_table,
    some,
    with_categories,
)
from vim_ssl.data.outlines import clipped, mask_tools, to_rle
from vim_ssl.data.passed_over import pass_over
from vim_ssl.data.paths import differs_in_case, find_spelling, forget_names
from vim_ssl.data.registry import Splits, source
from vim_ssl.data.sources.folder import FileImages, check_option
from vim_ssl.data.spec import SPLIT_NAMES, DataSpec, canonical_split, pick_split
from vim_ssl.data.walk import contents, list_files

__all__ = [
    "CocoObjects", "Table", "check_same_categories", "clipped", "ground_truth", "mask_tools",
    "open_coco", "read_table", "to_rle",
]  # fmt: skip

PROBED = 20  # number of file names looked up to find a split's image folder
INSTANCES = "instances_"
ROBOFLOW = "_annotations.coco"
LAYOUT = (
    "Expected annotations/instances_train2017.json and instances_val2017.json with train2017/ and "
    "val2017/, or annotations/train.json and val.json with train/ and val/, or "
    "train/_annotations.coco.json and its images beside it, or one result.json with images/."
)


@source("coco", extra="detection", options=("label",))
def open_coco(spec: DataSpec) -> Splits:
    """Open ``coco:ROOT``: COCO as it is unpacked (``annotations/instances_val2017.json`` with
    ``val2017/``), or ``annotations/val.json`` with ``val/`` or ``images/``, or split folders with a
    JSON file each (Roboflow), or JSON files in ROOT (Label Studio); or ``coco:FILE.json``.

    Classes are the categories sorted by id, numbered from 0; ``split=all`` matches those of several
    files by name. Objects have masks if any has an outline; ``label=boxes`` skips outlines,
    ``label=none`` also skips boxes. An object without a box has that of its outline. Skipped are:
    an annotation without either, or of an unlisted image, or with an ``iscrowd`` other than 0 or 1,
    and an image whose file is missing; ``faults`` counts and names them. Nothing in the files is
    executed, and no image outside of ROOT is read: of absolute paths, URLs and paths with "..", the
    longest ending is used that names a file there.

    Raises: FileNotFoundError naming the missing files; ValueError for a file that is not COCO, for
        duplicate ids or ids of two types, and for unlisted categories.
    """
    check_option(spec, "label", ("boxes", "none"))
    root = Path(spec.location).expanduser()
    files = _annotation_files(root)
    if root.is_file():
        root = root.parent.parent if root.parent.name == "annotations" else root.parent

    def choose(spec: DataSpec) -> ImageData:
        split = pick_split(spec.split, list(files), f"coco:{spec.location}")
        chosen = {name: path for name, path in files.items() if split in ("all", name)}
        tables = [_read(str(path), path.stat().st_mtime_ns) for path in chosen.values()]
        tables = [with_categories(table, tables[0].categories) for table in tables]
        names: list[str] = []
        faults = [fault for table in tables for fault in table.faults]
        missing: set[int] = set()
        for (name, path), table in zip(chosen.items(), tables, strict=True):
            listed = [image["file_name"] for image in table.images]
            folder = _image_folder(root, path, name, listed)
            below = folder.path.relative_to(root).as_posix()
            matches = folder.find_all(listed)
            cased = [file for file, given in zip(matches, listed, strict=True)
                     if file and differs_in_case(given, file)]  # fmt: skip
            if cased:
                faults.append(
                    f"the names of {len(cased):,} images in {below}/ are in another letter case "
                    f"than in {path.name}: {some(cased)}; other systems do not find them so."
                )
            if absent := [i for i, file in enumerate(matches) if file is None]:
                faults.append(
                    f"{len(absent):,} images are missing in {below}/ and skipped: "
                    f"{some(listed[i] for i in absent)}."
                )
            times = Counter(os.path.normpath(file) for file in matches if file)
            if twice := [file for file, n in times.items() if n > 1]:
                faults.append(
                    f"{len(twice):,} images are listed more than once, each time with only some "
                    f"of their objects: {some(twice)}; join these entries."
                )
            missing |= {len(names) + i for i in absent}
            names += [
                f"{below}/{file or given}" for file, given in zip(matches, listed, strict=True)
            ]
        outlines = spec.label is None and any(any(table.outlines) for table in tables)
        bare = sum(sum(table.boxes) - sum(table.outlines) for table in tables)
        if outlines and bare:
            faults.append(
                f"{bare:,} objects have a box but no outline and are skipped; label=boxes includes "
                "them, without outlines."
            )
        images = FileImages(str(root), names)
        objects = classes = None
        if spec.label != "none":
            objects = CocoObjects(tables, outlines)
            classes = [category["name"] for category in objects.categories]
        data = ImageData(
            images, names, name=str(spec), objects=objects, classes=classes,
            splits=list(files), split=split, faults=faults,
        )  # fmt: skip
        return data.subset(i for i in range(len(names)) if i not in missing)

    return Splits(list(files), choose)


# ------------------------------------------------------------------------- annotation files


@lru_cache(maxsize=4)  # a large file takes half a minute, and is opened once per split
def _read(path: str, stamp: int) -> Table:
    try:
        content = json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    return read_table(content, Path(path).name)


def _annotation_files(root: Path) -> dict[str, Path]:
    """Map each split to its file, train first."""
    if root.is_file():
        return {_split_name(root): root}
    folder, paths = root / "annotations", _json_files(root / "annotations")
    official = [path for path in paths if path.name.startswith(INSTANCES)]
    paths = official or paths or _in_split_folders(root)
    if not paths:
        folder, paths = root, _json_files(root)
    if not paths:
        if (root / "annotations").is_dir():
            raise FileNotFoundError(f"{root / 'annotations'} contains no .json file. {LAYOUT}")
        raise FileNotFoundError(f"{root} has no annotations/; it {contents(root)}. {LAYOUT}")
    splits = defaultdict(list)
    for path in paths:
        splits[_split_name(path)].append(path)
    known = {name: of for name, of in splits.items() if canonical_split(name) in SPLIT_NAMES}
    for name, of in known.items():
        if len(of) > 1:
            raise ValueError(
                f"{folder} has several files for {name}: {some(p.name for p in of)}; keep one."
            )
    order, chosen = list(SPLIT_NAMES), known or splits
    others = [path.name for name, of in splits.items() if name not in chosen for path in of]
    pass_over("other JSON files", len(others), others)
    if twice := [of for of in chosen.values() if len(of) > 1]:
        raise ValueError(f"{some(twice[0])} have the same name; keep one.")
    return {
        name: chosen[name][0]
        for name in sorted(chosen, key=lambda n: order.index(canonical_split(n)) if known else 0)
    }


def _json_files(folder: Path) -> list[Path]:
    return [folder / name for name in list_files(folder, (".json",))] if folder.is_dir() else []


def _in_split_folders(root: Path) -> list[Path]:
    """Return the JSON file of each split folder, as Roboflow writes them."""
    names = sorted(os.listdir(root)) if root.is_dir() else []
    matches = []
    for name in names:
        if canonical_split(name) in SPLIT_NAMES:
            files = _json_files(root / name)
            matches += [path for path in files if path.stem == ROBOFLOW] or files[:1]
    return matches


def _split_name(path: Path) -> str:
    """Return the split of a file: its name, or that of its folder."""
    if canonical_split(path.parent.name) in SPLIT_NAMES:
        return path.parent.name
    # A year after the split is dropped: train2017 is the training split.
    return re.sub(r"_?(19|20)\d\d$", "", path.stem.removeprefix(INSTANCES))


# ------------------------------------------------------------------------- images


class _Folder:
    """A folder of images, whose files are known by the names that a file of annotations gives
    them. Each folder is listed only once, and nothing outside of it is read."""

    def __init__(self, path: Path):
        self.path = path
        self._listed: dict[str, set[str]] = {}

    def has(self, name: str) -> bool:
        folder, _, file = name.rpartition("/")
        if folder not in self._listed:
            path = self.path / folder
            self._listed[folder] = set(os.listdir(path)) if path.is_dir() else set()
        return file in self._listed[folder]

    def find(self, given: str, *, endings: bool = True, spellings: bool = True) -> str | None:
        """Return the file that a name means, relative to this folder; None if there is none.

        Args:
            endings: accept a file that the name ends in.
            spellings: accept another spelling of the name; see `find_spelling`.
        """
        names = dict.fromkeys((given, _plain(given), _plain(unquote(given))))
        inside = [name for name in names if not _leaves(name)]
        if endings:
            for name in names:
                parts = [part for part in name.split("/") if part not in ("", ".", "..")]
                inside += ["/".join(parts[i:]) for i in range(len(parts))]
        if exact := next(filter(self.has, inside), None):
            return exact
        near = (find_spelling(str(self.path), name) for name in inside if name and spellings)
        return next(filter(None, near), None)

    def find_all(self, given: Sequence[str]) -> list[str | None]:
        """Return the file of each name.

        Paths from another place are matched by their endings: those that leave this folder, and all
        if no name is right as it is. A file that several such names end in is the file of none.
        """
        matches = [self.find(name, endings=False) for name in given]
        foreign = not any(matches)
        ends = {
            i: self.find(name)
            for i, (name, file) in enumerate(zip(given, matches, strict=True))
            if file is None and (foreign or _leaves(_plain(name)))
        }
        once = {given[i]: file for i, file in ends.items()}
        times = Counter(filter(None, [*matches, *once.values()]))
        for i, file in ends.items():
            matches[i] = file if file and times[file] == 1 else None
        return matches


def _plain(name: str) -> str:
    """Return a name with forward slashes, without the host of a URL and the drive of Windows."""
    if "://" in name:
        name = urlsplit(name).path
    name = re.sub(r"^[A-Za-z]:(?=[\\/])", "", name.replace("\\", "/"))
    return re.sub(r"^(\./)+", "", name)


def _image_folder(root: Path, file: Path, split: str, names: list[str]) -> _Folder:
    """Return the folder of a split's images: the usual folder that has most of a few samples, by
    their names or else by the endings of these.

    Raises: FileNotFoundError; ValueError if names are outside of ``root``.
    """
    few = names[:: max(len(names) // PROBED, 1)]
    stem = file.stem.removeprefix(INSTANCES)
    paths = [root / stem, root / split, *(root / "images" / x for x in (stem, split, "")), root]
    if file.parent not in (root, root / "annotations"):
        paths.insert(0, file.parent)
    folders = [_Folder(path) for path in dict.fromkeys(paths)]
    forget_names()
    for spellings, endings in product((False, True), (False, True)):
        counts = [
            sum(folder.find(n, endings=endings, spellings=spellings) is not None for n in few)
            for folder in folders
        ]
        if any(counts):
            return folders[counts.index(max(counts))]
    if outside := [name for name in few if _leaves(_plain(name))]:
        raise ValueError(
            f"the file name {outside[0]!r} is outside of {root}, and no file in it has this name."
        )
    looked = ", ".join(f"{path.relative_to(root).as_posix()}/" for path in paths[:-1])
    raise FileNotFoundError(
        f"The images of {split!r} are not in {root}, for example {names[0]}; looked in {looked}. "
        f"{LAYOUT}"
    )


def _leaves(name: str) -> bool:
    """True for an absolute path, and for one that goes up."""
    return name.startswith("/") or ".." in name.split("/")
