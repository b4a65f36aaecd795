"""Images with captions: files side by side in a folder, or the rows of a table."""

import csv
import os
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path

from vim_ssl.data.dataset import ImageData
from vim_ssl.data.images import BadImage
from vim_ssl.data.registry import source
from vim_ssl.data.sources.folder import FileImages, by_split, find_images
from vim_ssl.data.spec import DataSpec, near, pick_split

TABLES = (".csv", ".tsv")
IMAGE_COLUMNS = ("image", "path", "filepath", "file_name", "filename", "file", "image_path")
CAPTION_COLUMNS = ("caption", "text", "title")
LOOKED_FOR = 20  # first images of a table, of which one must exist


class CaptionFiles:
    """The lines of the text file beside each image."""

    def __init__(self, images: FileImages):
        self.images = images

    def __getitem__(self, row: int) -> list[str]:
        path = caption_file(self.images[row])
        try:
            text = Path(path).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            what = "is not UTF-8" if isinstance(error, UnicodeDecodeError) else error.strerror
            raise BadImage(path, f"its caption file {os.path.basename(path)}: {what}") from error
        return text.splitlines()


class CaptionedImages(FileImages):
    """Image files with a caption file each, whose size counts as theirs does."""

    def sizes(self, row: int) -> str:
        try:
            return f"{super().sizes(row)} {os.path.getsize(caption_file(self[row]))}"
        except OSError:
            return "-1"


def caption_file(file: str) -> str:
    """a/b.jpg → a/b.txt"""
    return os.path.splitext(file)[0] + ".txt"


@source("pairs", options=("image", "caption"))
def open_pairs(spec: DataSpec) -> ImageData:
    """Open ``pairs:FOLDER`` or ``pairs:TABLE.csv``.

    - A folder: images at any depth with a text file of the same name, whose lines are captions
      (a.jpg, a.txt). Folders named train, val and test are splits, as in any folder.
    - A table with a header (.csv, or .tsv): an image's path, from the table's folder on, and a
      caption in each row; ``image=`` and ``caption=`` name their columns. Rows with the same path
      are captions of one image.

    What is left out (images without a text file; rows too long or short, without a path or
    caption, or not UTF-8) is named in ``faults``; a text file without a word is found when read.

    Raises: FileNotFoundError; ValueError for a folder or table without a pair.
    """
    if spec.location.lower().endswith(TABLES):
        return _open_table(spec)
    spec.takes()
    root = Path(spec.location).expanduser()
    found = find_images(root, spec.location)
    names = [name for name in found if os.path.isfile(root / caption_file(name))]
    if not names:
        raise ValueError(
            f"None of the {len(found)} images in {spec.location!r} has a caption: {found[0]} "
            f"would have one in {caption_file(found[0])}."
        )
    splits = [split for split in by_split(names) if split]
    split = pick_split(spec.split, splits, f"The folder {root}")
    if split != "all":
        found, names = ([n for n in part if n.startswith(f"{split}/")] for part in (found, names))
    images = CaptionedImages(str(root), names)
    return ImageData(
        images, names, name=str(spec), captions=CaptionFiles(images), splits=splits,
        split=split,
        faults=[f"{name}: there is no {caption_file(name)}"
                for name in sorted(set(found) - set(names))],
    )  # fmt: skip


def _open_table(spec: DataSpec) -> ImageData:
    spec.takes("image", "caption")
    if spec.split not in (None, "all"):
        raise ValueError(
            f"pairs:{spec.location} has no splits; keep {spec.split!r} in a table of its own."
        )
    path = Path(spec.location).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"pairs:{spec.location}: there is no such table.")
    captions: dict[str, list[str]] = {}
    faults = []
    digest = blake2b(digest_size=8)
    for line, file, caption, fault in _rows(path, spec):
        if fault:
            faults.append(f"{path.name}, line {line}: {fault}")
            continue
        captions.setdefault(file, []).append(caption)
        digest.update(f"{file}\0{caption}\n".encode(errors="surrogateescape"))
    if not captions:
        raise ValueError(f"pairs:{spec.location} holds no pair. {' '.join(faults[:3])}".strip())
    names = list(captions)
    images = FileImages(str(path.parent), names)
    if not any(os.path.exists(images[row]) for row in range(min(LOOKED_FOR, len(names)))):
        raise FileNotFoundError(
            f"pairs:{spec.location}: none of the first images is there, such as {images[0]}; "
            "paths are taken from the table's folder on."
        )
    return ImageData(
        images, names, name=str(spec), captions=list(captions.values()),
        source_fingerprint=digest.hexdigest(), faults=faults,
    )  # fmt: skip


def _rows(path: Path, spec: DataSpec) -> Iterator[tuple[int, str, str, str]]:
    """Line number, path and caption of every row, or what is wrong with it."""
    # What is no UTF-8 is kept in this form: a path may be any bytes, a caption may not.
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        header = file.readline().rstrip("\r\n")
        tabs = "\t" in header
        # Tables with tabs are seldom quoted: a lone quote would swallow the lines after it.
        style = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {
            "delimiter": ";" if ";" in header and "," not in header else ","
        }  # fmt: skip
        columns = next(csv.reader([header], **style), [])  # type: ignore[arg-type]
        columns = [_unquoted(name) if tabs else name.strip() for name in columns]
        image = _column(spec.image, columns, IMAGE_COLUMNS, "image", spec)
        caption = _column(spec.caption, columns, CAPTION_COLUMNS, "caption", spec)
        reader = csv.reader(file, strict=True, **style)  # type: ignore[arg-type]
        while True:
            line = reader.line_num + 2  # where the row begins
            try:
                row = next(reader, None)
            except csv.Error as error:
                end = reader.line_num + 1  # a lone quote takes lines with it
                lost = f"; lost down to line {end}" if end > line else ""
                yield line, "", "", f"{error}{lost}"
                continue
            if row is None:
                return
            if not row:
                continue
            if len(row) != len(columns):
                yield line, "", "", f"{len(row)} fields where the header has {len(columns)}"
                continue
            values = [row[image], row[caption]]
            file, text = (_unquoted(v) if tabs else v.strip() for v in values)
            fault = "no path" if not file else "no caption" if not text else ""
            yield line, file, text, fault or ("" if _is_utf8(text) else "it is not UTF-8")


def _is_utf8(text: str) -> bool:
    try:
        return bool(text.encode())
    except UnicodeEncodeError:
        return False


def _unquoted(value: str) -> str:
    value = value.strip()
    if len(value) > 1 and value[0] == value[-1] == '"':
        return value[1:-1].replace('""', '"')
    return value


def _column(
    wanted: str | None, columns: Sequence[str], known: Sequence[str], key: str, spec: DataSpec
) -> int:
    for name in [wanted] if wanted else known:
        if name in columns:
            return columns.index(name)
    hint = near(wanted, columns) if wanted else ""
    what = repr(wanted) if wanted else f"for {key}s ({', '.join(known)})"
    raise ValueError(
        f"pairs:{spec.location} has no column {what}.{hint} Its first line names "
        f"{', '.join(columns) or 'none'}; say ?{key}=COLUMN."
    )
