"""The one walk of folders, for all sources: the files below a folder, and those of a glob.

Passed over, and counted (`vim_ssl.data.passed_over`), are hidden and system files, folders that
this program has written, folders that cannot be read, and files of formats that the source does not
read. Links are followed, except back to a folder above them.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from glob import has_magic
from pathlib import Path

from vim_ssl.data.formats import ending_of, pass_over_others
from vim_ssl.data.images import EXTENSIONS
from vim_ssl.data.passed_over import EXAMPLES, add_warning, counted, pass_over, some_of
from vim_ssl.data.samples.fetch import SAMPLES
from vim_ssl.data.spec import near

HIDDEN = "hidden"
OUTPUTS = "written by vim-ssl"
UNREADABLE = "unreadable"
CIRCLES = "in a circle of links"
SPECIAL = "not a regular file"
EMPTY = "folder without a file to read"

# Files and folders of operating systems, storage systems and archives, in lower case. Plain words
# such as "recycled" are left out: they may be classes.
_SYSTEM = frozenset({
    "$recycle.bin", "system volume information", "thumbs.db", "ehthumbs.db", "desktop.ini",
    "found.000", "__macosx", "icon\r", "network trash folder", "lost+found", "lost.dir", "@eadir",
    "@tmp", "@sharebin", "@recycle", "@recently-snapshot", "#recycle", "#snapshot", "__pycache__",
})  # fmt: skip
# Records in the folders that this program writes.
_RECORDS = ("config.json", "metrics.json", "record.json")


def walk(root: str | Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """Walk the folders below root, except those that are passed over.

    Yields: per folder its path relative to root with a final slash ("" for root itself), and the
        sorted names of its folders and files; folders that are removed from the list are not
        entered.
    Raises: OSError if root cannot be read.
    """
    pending: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset())]
    first: dict[tuple[int, int], str] = {}
    twice: list[str] = []
    while pending:
        prefix, above = pending.pop()
        path = os.path.join(root, prefix)
        try:
            identity = os.stat(path)
            inode = (identity.st_dev, identity.st_ino)
            if identity.st_ino and inode in above:
                pass_over(CIRCLES, 1, [prefix])
                continue
            with os.scandir(path) as entries:
                folders, files = _sorted(entries, prefix)
        except OSError:
            if not prefix:
                raise
            pass_over(UNREADABLE, 1, [prefix])
            continue
        if prefix and is_output(path, files):
            pass_over(OUTPUTS, 1, [prefix])
            continue
        if identity.st_ino and first.setdefault(inode, prefix) != prefix:
            twice.append(f"{prefix} is {first[inode]}")
        yield prefix, folders, files
        pending += [(f"{prefix}{name}/", above | {inode}) for name in reversed(folders)]
    if twice:
        add_warning(
            f"{len(twice):,} folders are read more than once, through links: {some_of(twice)}; "
            "remove the links that are not meant."
        )


def _sorted(entries: Iterator[os.DirEntry[str]], prefix: str) -> tuple[list[str], list[str]]:
    """Return the names of folders and files; pass over the hidden and special ones."""
    folders, files = [], []
    for entry in sorted(entries, key=lambda entry: entry.name):
        name = entry.name
        if is_hidden(name):
            pass_over(HIDDEN, 1, [prefix + name])
            continue
        try:
            if entry.is_dir():
                folders.append(name)
            elif entry.is_file() or entry.is_symlink():  # a broken link fails when it is read
                files.append(name)
            else:
                pass_over(SPECIAL, 1, [prefix + name])
        except OSError:  # a link to itself
            pass_over(CIRCLES, 1, [prefix + name])
    return folders, files


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is hidden, or belongs to a system: ``.x``, ``._x``,
    ``Thumbs.db``, ``@eaDir``, ``__MACOSX`` …"""
    return name.startswith((".", "~$")) or name.lower() in _SYSTEM


def is_output(folder: str, files: Sequence[str]) -> bool:
    """Whether a folder with these files was written by this program: a run, an evaluation,
    predictions or embeddings."""
    for name in set(files).intersection(_RECORDS):
        try:
            with open(os.path.join(folder, name), "rb") as file:
                record = json.load(file)
        except (OSError, ValueError):
            continue
        if isinstance(record, dict) and (
            str(record.get("versions", "")).startswith("vim_ssl ")
            or {"recipe", "seed", "output"} <= record.keys()
        ):
            return True
    return False


def pass_over_empty(root: Path, names: Sequence[str], splits: Sequence[str]) -> None:
    """Count the class folders without a file, where all files are in folders.

    Args:
        names: the files that are read, relative to root.
        splits: the split folders that contain the class folders; empty if root does.
    """
    if any(name.count("/") < (2 if splits else 1) for name in names):
        return
    for top in [f"{split}/" for split in splits] or [""]:
        used = {name[len(top) :].partition("/")[0] for name in names if name.startswith(top)}
        with counted(), os.scandir(root / top) as entries:  # hidden ones are counted already
            folders, _ = _sorted(entries, top)
        for name in folders:
            if name not in used:
                pass_over(EMPTY, 1, [f"{top}{name}/"])


def contents(root: Path) -> str:
    """Describe the content of a folder for messages: "contains a, b", or "does not exist"."""
    if not root.is_dir():
        return "does not exist"
    return f"contains {', '.join(sorted(path.name for path in root.iterdir())[:8]) or 'nothing'}"


def list_files(folder: str | Path, extensions: Sequence[str] = ("",)) -> list[str]:
    """Return the sorted names of the files in a folder, not below it, with these extensions, except
    hidden ones."""
    with os.scandir(folder) as entries:
        _, files = _sorted(entries, "")
    return [name for name in files if name.lower().endswith(tuple(extensions))]


def find_images(root: Path, given: str) -> list[str]:
    """Return the sorted paths of all images below root, relative to it, with forward slashes."""
    return find_files(root, given, "image", EXTENSIONS)


def find_files(root: Path, given: str, what: str, extensions: Sequence[str]) -> list[str]:
    """Return the sorted paths of all files below root with these extensions, relative to it, with
    forward slashes.

    Args:
        given: the root as the user wrote it.
        what: noun for these files, for messages.
    Raises: FileNotFoundError, NotADirectoryError; ValueError for a folder without such a file
        (naming its content).
    """
    if not root.exists():
        raise FileNotFoundError(f"The folder {given!r} does not exist.{_hint(given)}")
    if not root.is_dir():
        table = Path(given).suffix.lower() in (".csv", ".tsv", ".txt", ".parquet")
        scheme = "parquet" if given.lower().endswith(".parquet") else "csv"
        remedy = f"; a table is read as {scheme}:{given}, with captions as pairs:{given}"
        raise NotADirectoryError(
            f"{given!r} is a file; give the folder that contains the {what}s{remedy * table}."
        )
    names, others = walk_files(root, extensions)
    if not names:
        held = ", ".join(f"{count} × {kind}" for kind, count in others.most_common(5))
        raise ValueError(
            f"The folder {given!r} contains no {what} at any depth; it contains "
            f"{held or 'no files'}. {what.capitalize()}s are files that end in "
            f"{' '.join(extensions)}."
        )
    if odd := [name for name in names if "\\" in name]:
        add_warning(
            f"{len(odd):,} names contain backslashes, such as {odd[0]}: an archive from Windows "
            "was unpacked without its folders, so these files are in no class and no split. Unpack "
            "it with 7z or unzip."
        )
    return names


def walk_files(
    root: str | Path, extensions: Sequence[str] = ("",)
) -> tuple[list[str], Counter[str]]:
    """Find the files below root with these extensions; see `walk`.

    Returns: their sorted relative paths, with forward slashes; the number of other files per
        extension.
    Raises: OSError if root cannot be read.
    """
    names: list[str] = []
    others: Counter[str] = Counter()
    examples: dict[str, list[str]] = {}
    endings = tuple(extensions)
    for prefix, _, files in walk(root):
        for name in files:
            if name.lower().endswith(endings):
                names.append(prefix + name)
                continue
            ending = ending_of(name)
            others[ending] += 1
            if len(few := examples.setdefault(ending, [])) < EXAMPLES:
                few.append(prefix + name)
    pass_over_others(others, examples, str(root))
    return sorted(names), others


def match_files(
    location: str, source: str, what: str, endings: Sequence[str], strict: bool = False
) -> tuple[Path, list[str]]:
    """Find the files that a location names: one file, the files in a folder, or those of a glob.

    Args:
        what: noun for these files, for messages.
        endings: required endings of files in a folder; with ``strict``, of all files.
    Returns: a folder, and the sorted paths relative to it.
    Raises: FileNotFoundError; for a folder, the errors of `find_files`.
    """
    path = Path(location).expanduser()
    if path.is_dir():
        return path, find_files(path, location, what, endings)
    files = [Path(file) for file in match_paths(str(path))]
    files = [f for f in files if not strict or f.name.lower().endswith(tuple(endings))]
    if not files:
        raise FileNotFoundError(
            f"{source} does not match any file; give a file, a folder or a glob of files that end "
            f"in {' or '.join(endings)}."
        )
    root = Path(os.path.commonpath([file.parent for file in files]))
    return root, sorted(file.relative_to(root).as_posix() for file in files)


def match_paths(pattern: str) -> list[str]:
    """Return the sorted files that a path or a glob names; ``**`` is folders at any depth.

    A part of the pattern that exists as it is written, such as ``scans [2020]``, is that file or
    folder and no pattern, except ``*`` and ``*.ending``: a file of such a name is made by mistake,
    and one of those that match. Where a pattern decides, what `walk` passes over is passed over,
    unless the pattern begins with a dot.
    """
    path = Path(pattern)
    parts = path.parts[1:] if path.anchor else path.parts
    return sorted(set(_matching(path.anchor, parts)))


def _matching(base: str, parts: Sequence[str]) -> Iterator[str]:
    """Yield the files below ``base`` whose path matches these parts."""
    if not parts:
        if os.path.isfile(base):
            yield base
        return
    part, *rest = parts
    if part == "**":
        for prefix, _, _ in walk(base or ".") if os.path.isdir(base or ".") else ():
            yield from _matching(os.path.join(base, prefix), rest or ["*"])
        return
    whole = os.path.join(base, part)
    if not has_magic(part) or (os.path.lexists(whole) and not re.fullmatch(r"\*[.\w]*", part)):
        yield from _matching(whole, rest)
        return
    try:
        with os.scandir(base or ".") as entries:
            names = sorted(entry.name for entry in entries if fnmatch(entry.name, part))
    except OSError:
        if os.path.isdir(base):
            pass_over(UNREADABLE, 1, [base])
        return
    for name in names:
        path = os.path.join(base, name)
        if is_hidden(name) and not part.startswith("."):
            pass_over(HIDDEN, 1, [path])
        elif rest and os.path.isdir(path) and is_output(path, _names(path)):
            pass_over(OUTPUTS, 1, [path])
        else:
            yield from _matching(path, rest)


def _names(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _hint(given: str) -> str:
    if guess := near(given, list(SAMPLES)).replace("mean '", "mean 'sample:"):
        return guess
    if given.count("/") == 1 and not given.startswith((".", "~", "/")):
        return f" A data set of the Hugging Face Hub is written 'hf:{given}'."
    return ""
