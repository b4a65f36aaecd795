"""Local tables: ``csv:`` files list image paths, ``parquet:`` files contain images or paths."""

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vim_ssl.data.dataset import ImageData
from vim_ssl.data.passed_over import add_warning, some_of
from vim_ssl.data.paths import TablePaths
from vim_ssl.data.registry import Splits, source
from vim_ssl.data.sources.folder import FileImages, split_views
from vim_ssl.data.sources.hub import UNWRITABLE, open_tables, tables_cache
from vim_ssl.data.sources.hub_labels import parquet_parts, united_features
from vim_ssl.data.sources.webdataset import expand
from vim_ssl.data.spec import DataSpec, canonical_split, splits_of_files
from vim_ssl.data.tables import load_table, sort_splits
from vim_ssl.data.values import groups_or_ids, name_of, number_labels
from vim_ssl.utils.files import reading

PATH_NAMES = (
    "image", "path", "file_name", "filename", "file", "filepath", "image_path", "video",
)  # fmt: skip
LABEL_NAMES = ("label", "class", "target")
CAPTION_NAMES = ("caption", "text")


@source("csv", options=("image", "label", "caption", "group"))
def open_csv(spec: DataSpec) -> Splits:
    """Open ``csv:FILE.csv`` (or .tsv): a header, then one image per row.

    Paths are relative to the table's folder; see `vim_ssl.data.paths.find_path` for those of
    Windows and others. Columns are recognised by name in any letter case, or selected with
    ``image= label= caption= group=``: the path ("image", "path", "file_name", "filename" …), a
    label ("label", "class" or "target"), a caption ("caption", "text"), and "split". The classes
    are the sorted labels of all splits, numbers in the order of their size. A missing label (see
    `vim_ssl.data.values.MISSING`) is unknown; an image without a group is its own group. The ids
    are the paths as written; two rows must not name one file. ``faults`` names rows without a path,
    files that do not exist, and doubtful values.

    Raises: FileNotFoundError; ValueError for columns that do not fit, a duplicate path, a line
        break in a label or path, a row whose length differs from the header's, or a table without
        rows.
    """
    return read_table(spec, ImageData, FileImages)


def read_table(
    spec: DataSpec, data_class: Callable[..., ImageData], files: Callable[[str, list[str]], Any]
) -> Splits:
    """Read a table as `open_csv` does, into data of any class.

    Args:
        data_class: class with the arguments of `ImageData`.
        files: called with the root and names; returns the first argument of `data_class`.
    """
    file = Path(spec.location).expanduser()
    source = f"{spec.scheme}:{spec.location}"
    table = load_table(file, source)
    if not table.rows:
        raise ValueError(f"{source} has a header ({', '.join(table.header)}) but no rows.")

    def column(option: str, known: Sequence[str] = (), one_line: bool = True) -> list[str] | None:
        if (requested := getattr(spec, option)) == "none":
            return None
        return table.column(requested, known, option, one_line=one_line)

    paths = column("image", PATH_NAMES)
    if paths is None:
        raise ValueError(
            f"{source} has no column of paths ({', '.join(PATH_NAMES)}); select it with image=. "
            f"It has {', '.join(name or '(no name)' for name in table.header)}."
        )
    kept = [i for i, path in enumerate(paths) if name_of(path)]
    faults = []
    if gone := len(paths) - len(kept):
        bare = [str(table.rows[i].line) for i in range(len(paths)) if not name_of(paths[i])]
        faults.append(f"{gone:,} rows have no path and are skipped: line {', '.join(bare[:3])}")
    ids, lines = [paths[i] for i in kept], [table.rows[i].line for i in kept]
    located = TablePaths(str(file.parent), ids, lines)
    _refuse_copies(source, ids, located.paths, lines)

    def chosen(values: list[str] | None) -> list[str] | None:
        return values and [values[i] for i in kept]

    labels = classes = groups = None
    if (names := chosen(column("label", LABEL_NAMES))) is not None:
        labels, classes, remarks = number_labels(names, names)
        faults += remarks
    if (names := chosen(column("group"))) is not None:
        groups, remarks = groups_or_ids(names, ids)
        faults += remarks
    captions = chosen(column("caption", CAPTION_NAMES, one_line=False))
    split_of, remarks = table.splits(kept)
    data = data_class(
        files(str(file.parent), located.paths), ids, name=str(spec), labels=labels, classes=classes,
        groups=groups, captions=captions, splits=sort_splits(split_of),
        faults=[*located.faults, *faults, *remarks],
    )  # fmt: skip
    return split_views(data, split_of)


def _refuse_copies(
    source: str, texts: Sequence[str], paths: Sequence[str], lines: Sequence[int]
) -> None:
    """Raise ValueError if two rows name one file, in any spelling."""
    first: dict[str, int] = {}
    for row, path in enumerate(map(os.path.normpath, paths)):
        if (other := first.setdefault(path, row)) != row:
            raise ValueError(
                f"{source} lists {texts[row]!r} twice (lines {lines[other]} and {lines[row]}); "
                "list every image once."
            )


@source("parquet", options=("image", "label", "caption", "group"))
def open_parquet(spec: DataSpec) -> Splits:
    """Open ``parquet:FILES``: a file, a folder of files, a glob or a brace range.

    The image column contains bytes, Hugging Face's ``{bytes, path}``, or paths relative to the
    first file's folder. Files are splits if their names, or those of their folders, say so:
    ``train…``, ``val…``, ``test…``; further files are then splits of their names.
    Columns, of splits too, and ids are as for ``hf:``.

    Raises: see `open_hub`.
    """
    names = expand(spec.location, "parquet")
    split_of = _splits_of(names)
    files: dict[str, list[str]] = {split: [] for split in sort_splits(split_of)}
    for name, split in zip(names, split_of, strict=True):
        files[split].append(name)
    import datasets

    parts = parquet_parts(files)
    try:
        with tables_cache():
            features = united_features(parts)
            tables = datasets.load_dataset("parquet", data_files=files, features=features)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in UNWRITABLE:
            raise
        with reading(names[0] if len(names) == 1 else spec.location, "parquet files"):
            raise
    return open_tables(tables, parts, root=str(Path(names[0]).parent))


def _splits_of(names: Sequence[str]) -> list[str]:
    """Return the split of each file: "train" for all if the names tell of no other."""
    split_of = splits_of_files(names)
    if len(set(split_of)) == 1 and not all(
        canonical_split(re.split("[^A-Za-z]", Path(name).stem)[0]) == split_of[0] for name in names
    ):
        return ["train"] * len(names)  # one split, whatever word is in its names
    others = [name for name, split in zip(names, split_of, strict=True) if not split]
    if set(split_of) <= {"", "train"}:
        if 0 < len(others) < len(names):
            add_warning(f"{some_of(others)} are read as training images, as the other files are")
        return ["train"] * len(names)
    if others:
        add_warning(
            f"{some_of(others)} are in none of the splits {', '.join(sort_splits(split_of))}, and "
            "are splits of their names; move them away, or rename them"
        )
    return [split or _name_of_split(name) for name, split in zip(names, split_of, strict=True)]


def _name_of_split(file: str) -> str:
    """Return the words of a file's name, or of its folder's, that precede a number."""
    for part in (Path(file).stem, Path(file).parent.name):
        if word := re.sub(r"\W+", "_", re.split(r"[-_.]*\d", part)[0]).strip("_"):
            return word
    return "other"
