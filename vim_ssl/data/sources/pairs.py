"""``pairs:``: images with captions, as files side by side in a folder or as rows of a table."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from vim_ssl.data.dataset import ImageData
from vim_ssl.data.images import BadImage
from vim_ssl.data.paths import TablePaths
from vim_ssl.data.registry import Splits, source
from vim_ssl.data.sources.folder import FileImages, split_folders, split_views
from vim_ssl.data.spec import DataSpec, pick_split
from vim_ssl.data.tables import (
    SPLIT_COLUMN,
    TABLES,
    Row,
    find_column,
    is_text,
    read_rows,
    read_splits,
    sort_splits,
    unread_splits,
)
from vim_ssl.data.values import name_of
from vim_ssl.data.walk import find_images
from vim_ssl.utils.files import read_text

IMAGE_COLUMNS = ("image", "path", "filepath", "file_name", "filename", "file", "image_path")
CAPTION_COLUMNS = ("caption", "text", "title")
PROBED = 20  # at least one of this many first images of a table must exist


@dataclass
class CaptionFiles:
    """The lines of the text file beside each image."""

    images: FileImages

    def __getitem__(self, row: int) -> list[str]:
        path = caption_file(self.images[row])
        try:
            text = read_text(Path(path))
        except (OSError, ValueError) as error:
            what = (
                str(error).replace(path, "it", 1)
                if isinstance(error, ValueError)
                else (error.strerror)
            )
            raise BadImage(path, f"its caption file {os.path.basename(path)}: {what}") from error
        return text.splitlines()


class CaptionedImages(FileImages):
    """Image files that each have a caption file; sizes include both."""

    def sizes(self, row: int) -> str:
        try:
            return f"{super().sizes(row)} {os.path.getsize(caption_file(self[row]))}"
        except OSError:
            return "-1"


def caption_file(file: str) -> str:
    """Return the caption file of an image: a/b.jpg → a/b.txt."""
    return os.path.splitext(file)[0] + ".txt"


@source("pairs", options=("image", "caption"))
def open_pairs(spec: DataSpec) -> ImageData | Splits:
    """Open ``pairs:FOLDER`` or ``pairs:TABLE.csv``.

    - A folder: images at any depth, each with a text file of the same name (a.jpg, a.txt) that
      contains one caption per line. Folders named train, val and test are splits, as in any folder.
    - A table with a header (.csv, .tsv or another text file): each row has an image's path,
      relative to the table's folder, and a caption; ``image=`` and ``caption=`` name their columns.
      Rows with the same path are captions of one image. A column named "split" has the split of
      each image.
    Skipped are: images without a text file, and rows that are too long or too short, have no path
    or caption, or are not UTF-8; ``faults`` names them. An empty text file is reported when read.

    Raises: FileNotFoundError; ValueError for a folder or table without image-caption pairs.
    """
    root = Path(spec.location).expanduser()
    if spec.location.lower().endswith(TABLES) or root.is_file():
        return _open_table(spec)
    spec.takes()
    every = find_images(root, spec.location)
    names = [name for name in every if os.path.isfile(root / caption_file(name))]
    if not names:
        raise ValueError(
            f"None of the {len(every)} images in {spec.location!r} has a caption; expected for "
            f"example {caption_file(every[0])} for {every[0]}."
        )
    splits = split_folders(names)

    def choose(spec: DataSpec) -> ImageData:
        split = pick_split(spec.split, splits, f"The folder {root}")
        files, chosen = (
            [name for name in of if split == "all" or name.startswith(f"{split}/")]
            for of in (every, names)
        )
        images = CaptionedImages(str(root), chosen)
        return ImageData(
            images, chosen, name=str(spec), captions=CaptionFiles(images), splits=splits,
            split=split,
            faults=[f"{name}: {caption_file(name)} does not exist"
                    for name in sorted(set(files) - set(chosen))],
        )  # fmt: skip

    return Splits(splits, choose)


def _open_table(spec: DataSpec) -> Splits:
    spec.takes("image", "caption")
    source = f"pairs:{spec.location}"
    path = Path(spec.location).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{source}: the table does not exist.")
    captions: dict[str, list[str]] = {}
    line_of: dict[str, int] = {}
    split_of: dict[str, str] = {}
    faults = []
    digest = blake2b(digest_size=8)
    header, rows = read_rows(path, source)
    for line, name, caption, split, fault in _pairs(header, rows, spec, source):
        if not fault and split_of.get(name, split) != split:
            fault = f"{name} is in the splits {split_of[name]!r} and {split!r}; the first is used"
        if fault:
            faults.append(f"{path.name}, line {line}: {fault}")
            continue
        captions.setdefault(name, []).append(caption)
        line_of.setdefault(name, line)
        split_of.setdefault(name, split)
        digest.update(f"{name}\0{caption}\n".encode(errors="surrogateescape"))
    if not captions:
        raise ValueError(f"{source} has no image-caption pairs. {' '.join(faults[:3])}".strip())
    files = TablePaths(str(path.parent), list(captions), list(line_of.values()))
    first: dict[str, str] = {}  # path → its first spelling
    for name, file in zip(list(captions), files.paths, strict=True):
        if (other := first.setdefault(os.path.normpath(file), name)) != name:
            captions[other] += captions.pop(name)
    images = FileImages(str(path.parent), list(first))
    if not any(os.path.exists(images[row]) for row in range(min(PROBED, len(images)))):
        raise FileNotFoundError(
            f"{source}: none of the first images exists, for example {images[0]}; paths are "
            "relative to the table's folder."
        )
    splits, remarks = _splits(path, source, header, split_of, captions)
    data = ImageData(
        images, list(captions), name=str(spec), captions=list(captions.values()),
        source_fingerprint=digest.hexdigest(), faults=[*faults, *files.faults, *remarks],
        splits=sort_splits(splits),
    )  # fmt: skip
    return split_views(data, splits)


def _splits(
    path: Path, source: str, header: list[str], split_of: dict[str, str], names: Iterable[str]
) -> tuple[list[str], list[str]]:
    """Return the splits of images, and remarks, as for ``csv:``."""
    if find_column(None, (SPLIT_COLUMN,), header, "split", source):
        return read_splits([split_of[name] for name in names], list(names))

    def column(position: int) -> Iterator[str]:
        rows = read_rows(path, source)[1]
        return (row.fields[position] for row in rows if not row.fault)

    return [], list(unread_splits((name, column(i)) for i, name in enumerate(header)))


def _pairs(
    header: list[str], rows: Iterable[Row], spec: DataSpec, source: str
) -> Iterator[tuple[int, str, str, str, str]]:
    """Yield line number, image path, caption, split and fault ("" if none) of every row."""
    columns = []
    for option, known in (("image", IMAGE_COLUMNS), ("caption", CAPTION_COLUMNS)):
        name = find_column(getattr(spec, option), known, header, option, source)
        if name is None:
            raise ValueError(
                f"{source} has no column for {option}s ({', '.join(known)}). Its header is "
                f"{', '.join(header) or 'empty'}; select one with ?{option}=COLUMN."
            )
        columns.append(header.index(name))
    divided = find_column(None, (SPLIT_COLUMN,), header, "split", source)
    for row in rows:
        name = caption = split = ""
        fault = row.fault
        if not fault:
            name, caption = (row.fields[column] for column in columns)
            split = row.fields[header.index(divided)] if divided else ""
            fault = _fault(name, caption)
        yield row.line, name, caption, split, fault


def _fault(name: str, caption: str) -> str:
    if not name_of(name) or not name_of(caption):
        return "no caption" if name_of(name) else "no path"
    if "\n" in name or "\r" in name:
        return "the path has a line break; is a quote not closed?"
    return "" if is_text([caption]) else "it is not UTF-8"
