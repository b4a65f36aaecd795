"""Local tables: ``csv:`` files list image paths, ``parquet:`` files contain images or paths."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vim_ssl.data.dataset import ImageData
from vim_ssl.data.registry import Splits, source
from vim_ssl.data.sources.folder import FileImages, sort_classes, split_views
from vim_ssl.data.sources.hub import open_tables
from vim_ssl.data.sources.webdataset import expand
from vim_ssl.data.spec import SPLIT_NAMES, DataSpec, canonical_split
from vim_ssl.data.tables import find_column, read_columns

PATH_NAMES = (
    "image", "path", "file_name", "filename", "file", "filepath", "image_path", "video",
)  # fmt: skip
LABEL_NAMES = ("label", "class", "target")
CAPTION_NAMES = ("caption", "text")
SPLIT_COLUMN = "split"


@source("csv", options=("image", "label", "caption", "group"))
def open_csv(spec: DataSpec) -> Splits:
    """Open ``csv:FILE.csv`` (or .tsv): a header, then one image per row.

    Paths are relative to the table's folder. Columns are recognised by name, or selected with
    ``image= label= caption= group=``: the path ("image", "path", "file_name", "filename" …), a
    label ("label", "class" or "target"), a caption ("caption", "text"), and "split". The classes
    are the sorted labels of all splits, with integers in numeric order; an empty label is unknown.
    The ids are the paths as written, and must be unique.

    Raises: FileNotFoundError; ValueError for columns that do not fit, a duplicate path, a row whose
        length differs from the header's, or a table without rows.
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
    columns = read_columns(file, source)
    if not any(columns.values()):
        raise ValueError(f"{source} has a header ({', '.join(columns)}) but no rows.")

    def column(option: str, known: Sequence[str] = ()) -> tuple[str, ...] | None:
        if (requested := getattr(spec, option)) == "none":
            return None
        name = find_column(requested, known, columns, option, source)
        return columns[name] if name else None

    paths = column("image", PATH_NAMES)
    if paths is None:
        raise ValueError(
            f"{source} has no column of paths ({', '.join(PATH_NAMES)}); select it with image=. "
            f"It has {', '.join(columns)}."
        )
    path, count = Counter(paths).most_common(1)[0]
    if count > 1:
        raise ValueError(f"{source} lists {path!r} twice; list every image once.")
    labels = classes = None
    if names := column("label", LABEL_NAMES):
        classes = sort_classes(set(names) - {""})
        number_of = {name: i for i, name in enumerate(classes)}
        labels = [number_of.get(name, -1) for name in names]
    split_of = columns.get(SPLIT_COLUMN, ())
    data = data_class(
        files(str(file.parent), list(paths)), paths, name=str(spec), labels=labels,
        classes=classes, groups=column("group"), captions=column("caption", CAPTION_NAMES),
        splits=sorted(set(split_of), key=_split_order),
    )  # fmt: skip
    return split_views(data, split_of)


@source("parquet", options=("image", "label", "caption", "group"))
def open_parquet(spec: DataSpec) -> Splits:
    """Open ``parquet:FILES``: a file, a folder of files, a glob or a brace range.

    The image column contains bytes, Hugging Face's ``{bytes, path}``, or paths relative to the
    first file's folder. Files are splits if all are named ``train…``, ``val…`` or ``test…``.
    Columns and ids are as for ``hf:``.

    Raises: see `open_hub`.
    """
    names = expand(spec.location, "parquet")
    split_of = [canonical_split(Path(name).stem.replace("_", "-").split("-")[0]) for name in names]
    if not set(split_of) <= set(SPLIT_NAMES):
        split_of = ["train"] * len(names)
    files: dict[str, list[str]] = {split: [] for split in SPLIT_NAMES if split in split_of}
    for name, split in zip(names, split_of, strict=True):
        files[split].append(name)
    import datasets

    tables = datasets.load_dataset("parquet", data_files=files)
    return open_tables(tables, root=str(Path(names[0]).parent))


def _split_order(name: str) -> tuple[int, str]:
    order = list(SPLIT_NAMES)
    split = canonical_split(name)
    return (order.index(split) if split in order else len(order), name)
