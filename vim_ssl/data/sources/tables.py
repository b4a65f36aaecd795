"""Local tables: ``csv:`` files name images, ``parquet:`` files hold or name them."""

import csv
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vim_ssl.data.dataset import ImageData
from vim_ssl.data.registry import Splits, source
from vim_ssl.data.sources.folder import FileImages, sort_classes, split_views
from vim_ssl.data.sources.hub import import_datasets, open_tables
from vim_ssl.data.sources.webdataset import expand
from vim_ssl.data.spec import DataSpec, canonical_split, near
from vim_ssl.utils.files import read_text

PATH_NAMES = (
    "image", "path", "file_name", "filename", "file", "filepath", "image_path", "video",
)  # fmt: skip
LABEL_NAMES = ("label", "class", "target")
CAPTION_NAMES = ("caption", "text")
SPLIT_COLUMN = "split"


@source("csv", options=("image", "label", "caption", "group"))
def open_csv(spec: DataSpec) -> Splits:
    """Open ``csv:FILE.csv`` (or .tsv): a header, then one image a line.

    Paths are relative to the file's own folder. Columns, or else the ones that ``image= label=
    caption= group=`` name: the path ("image", "path", "file_name", "filename" …), a label
    ("label", "class" or "target"), a caption ("caption", "text"), and "split". The sorted values
    of the label, numbers by size, are the classes, over all splits; an empty one is unknown.
    The ids are the paths as written, and must differ.

    Raises: FileNotFoundError; ValueError for columns that do not fit, a path given twice, a line
        of another length than the header, or a table without a line.
    """
    return read_table(spec, ImageData, FileImages)


def read_table(
    spec: DataSpec, data_class: Callable[..., ImageData], files: Callable[[str, list[str]], Any]
) -> Splits:
    """`open_csv` for data of any class.

    Args:
        data_class: called as `ImageData`.
        files: of a root and names below it, makes its first argument.
    """
    file = Path(spec.location).expanduser()
    source = f"{spec.scheme}:{spec.location}"
    if not file.is_file():
        raise FileNotFoundError(f"{source}: there is no such file.")
    text = io.StringIO(read_text(file), newline="")
    lines = csv.reader(text, delimiter="\t" if file.suffix.lower() == ".tsv" else ",")
    header = [name.strip() for name in next(lines, [])]
    rows = [row for row in lines if row]
    for number, row in enumerate(rows, 1):
        if len(row) != len(header):
            raise ValueError(
                f"{source}: row {number} has {len(row)} fields, the header {len(header)}; quote "
                "fields that hold the delimiter."
            )
    columns = dict(zip(header, zip(*rows, strict=True), strict=True)) if rows else {}
    if not columns:
        raise ValueError(f"{source} has no line below its header ({', '.join(header)}).")

    def column(option: str, names: Sequence[str]) -> tuple[str, ...] | None:
        wanted = getattr(spec, option)
        if wanted == "none":
            return None
        if wanted and wanted not in columns:
            raise ValueError(
                f"{source} has no column {wanted!r} for {option}=.{near(wanted, header)} It has "
                f"{', '.join(header)}."
            )
        return columns.get(wanted or next((name for name in names if name in columns), ""))

    paths = column("image", PATH_NAMES)
    if paths is None:
        raise ValueError(
            f"{source} has no column of paths ({', '.join(PATH_NAMES)}); name it with image=. It "
            f"has {', '.join(header)}."
        )
    if len(set(paths)) < len(paths):
        twice = next(path for i, path in enumerate(paths) if path in paths[:i])
        raise ValueError(f"{source} names {twice!r} twice; every image has one line.")
    labels = classes = None
    if written := column("label", LABEL_NAMES):
        classes = sort_classes(set(written) - {""})
        number_of = {name: i for i, name in enumerate(classes)}
        labels = [number_of.get(value, -1) for value in written]
    captions, groups = column("caption", CAPTION_NAMES), column("group", ())
    parts = columns.get(SPLIT_COLUMN)
    splits = sorted(set(parts or ()), key=_split_order)
    data = data_class(
        files(str(file.parent), list(paths)), paths, name=str(spec), labels=labels,
        classes=classes, groups=groups, captions=captions, splits=splits,
    )  # fmt: skip
    return split_views(data, parts or ())


@source("parquet", options=("image", "label", "caption", "group"))
def open_parquet(spec: DataSpec) -> Splits:
    """Open ``parquet:FILES``: a file, a folder of them, a glob or a brace range.

    The image column holds bytes, Hugging Face's ``{bytes, path}`` or paths relative to the first
    file's folder. Files called ``train…``, ``val…`` and ``test…`` (and no others) are splits.
    Columns and ids are as for ``hf:``.

    Raises: see `open_hub`.
    """
    names = expand(spec.location, "parquet")
    starts = {name: canonical_split(Path(name).stem.replace("_", "-").split("-")[0])
              for name in names}  # fmt: skip
    if not set(starts.values()) <= {"train", "validation", "test"}:
        starts = dict.fromkeys(names, "train")
    files = {split: [name for name in names if starts[name] == split]
             for split in sorted(set(starts.values()), key=_split_order)}  # fmt: skip
    tables = import_datasets("parquet:").load_dataset("parquet", data_files=files)
    return open_tables(tables, root=str(Path(names[0]).parent))


def _split_order(name: str) -> tuple[int, str]:
    order = ("train", "validation", "test")
    place = canonical_split(name)
    return (order.index(place) if place in order else len(order), name)
