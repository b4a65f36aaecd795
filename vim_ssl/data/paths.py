"""Paths in people's tables: of Windows, with ``~`` or ``file://``, relative to the table or not."""

import os
from functools import lru_cache
from urllib.parse import urlparse
from urllib.request import url2pathname


def find_path(root: str, text: str) -> tuple[str, bool]:
    """Return the path of a file that a table in the folder ``root`` names, and whether it exists.

    ``file://`` and ``~`` are resolved. Without a file of the literal name, a backslash separates
    folders. Relative paths are relative to ``root``; if the file is not there, to the working
    directory.

    Returns: a path relative to ``root`` as it is written, or an absolute path.
    """
    candidates = [_local(text)]
    if "\\" in candidates[0] and os.sep == "/":
        candidates.append(candidates[0].replace("\\", "/"))
    for path in candidates:
        if _exists(os.path.join(root, path)):
            return path, True
    for path in candidates:
        if not os.path.isabs(path) and _exists(os.path.join(os.getcwd(), path)):
            return os.path.join(os.getcwd(), path), True
    return candidates[-1], False


class TablePaths:
    """The files that a table names.

    Args:
        root: the table's folder.
        texts: the paths as the table has them.
        lines: the line of each.
    Attributes:
        paths: see `find_path`.
        faults: counts and examples of files that do not exist, of files that are relative to the
            working directory, and of those that are in both places.
    """

    def __init__(self, root: str, texts: list[str], lines: list[int]):
        _names_in.cache_clear()
        self.paths, missing, elsewhere, both = [], [], [], []
        here = os.getcwd()
        other = os.path.realpath(here) != os.path.realpath(root)
        for text, line in zip(texts, lines, strict=True):
            path, exists = find_path(root, text)
            self.paths.append(path)
            if not exists:
                missing.append(f"{text} (line {line})")
            elif other and not os.path.isabs(_local(text)):
                if os.path.isabs(path):
                    elsewhere.append(text)
                elif _is_listed(os.path.join(here, path)):
                    both.append(text)
        self.faults = []
        if missing:
            self.faults.append(
                f"{len(missing):,} of {len(texts):,} files do not exist, for example "
                f"{', '.join(missing[:3])}; paths are relative to {root}.{_hint(missing[0])}"
            )
        if elsewhere:
            self.faults.append(
                f"{len(elsewhere):,} files are not in the table's folder {root} but in the working "
                f"directory, and are read from there, for example {elsewhere[0]}"
            )
        if both:
            self.faults.append(
                f"{len(both):,} files are in the table's folder {root} and in the working "
                f"directory; the former are read, for example {both[0]}"
            )


def _local(text: str) -> str:
    if text.lower().startswith("file:"):
        return url2pathname(urlparse(text).path) or text
    return os.path.expanduser(text) if text.startswith("~") else text


def _exists(path: str) -> bool:
    """Whether a file or folder exists; each folder is listed once, which is fast on any disk."""
    return _is_listed(path) or os.path.exists(path)


def _is_listed(path: str) -> bool:
    folder, name = os.path.split(path)
    return name in _names_in(folder)


@lru_cache(maxsize=4096)
def _names_in(folder: str) -> frozenset[str]:
    try:
        return frozenset(os.listdir(folder or "."))
    except OSError:
        return frozenset()


def _hint(text: str) -> str:
    if "://" in text:
        return " URLs are not read; download the files."
    if text[1:3] in (":\\", ":/"):
        return " Paths with a drive letter are of another computer; make them relative."
    return ""
