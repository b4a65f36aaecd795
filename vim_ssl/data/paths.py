"""Paths in people's tables: of Windows, with ``~`` or ``file://``, relative to the table or not."""

import os
import re
import unicodedata
from collections import defaultdict
from functools import lru_cache
from urllib.parse import urlparse
from urllib.request import url2pathname

from vim_ssl.data.images import EXTENSIONS


def find_path(root: str, text: str) -> tuple[str, bool]:
    """Return the path of a file that a table in the folder ``root`` names, and whether it exists.

    ``file://`` and ``~`` are resolved. Without a file of the literal name, a backslash separates
    folders. Relative paths are relative to ``root``; if the file is not there, to the working
    directory. At last a file below ``root`` matches whose name is another spelling; see
    `find_spelling`.

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
    for path in candidates:
        if (near := find_spelling(root, path)) is not None:
            return near, True
    return candidates[-1], False


def find_spelling(root: str, path: str) -> str | None:
    """Return the only path in the folder ``root`` that another spelling of ``path`` names.

    Each part of a path matches the name with the same accents, composed or not (macOS separates
    them); else the only name that differs in letter case; else, if the last part has no ending of
    an image, the only file of this name with an ending.

    Returns: None if there is none, or if several match.
    """
    here, parts = (
        ("/", path.lstrip("/").split("/")) if path.startswith("/") else (root, path.split("/"))
    )
    matched: list[str] = []
    for i, part in enumerate(parts):
        name = part if part in ("", ".", "..") else _spelling(here, part, i == len(parts) - 1)
        if name is None:
            return None
        matched.append(name)
        here = os.path.join(here, name)
    return ("/" if path.startswith("/") else "") + "/".join(matched)


def _spelling(folder: str, name: str, last: bool) -> str | None:
    if name in _names_in(folder):
        return name
    same, alike, of_stem = _spellings_in(folder)
    composed = unicodedata.normalize("NFC", name)
    matches = same.get(composed) or alike.get(composed.casefold()) or ()
    if not matches and last and not composed.lower().endswith(EXTENSIONS):
        matches = of_stem.get(composed.casefold(), ())
        images = [match for match in matches if match.lower().endswith(EXTENSIONS)]
        matches = images or matches
    return matches[0] if len(matches) == 1 else None


@lru_cache(maxsize=4096)
def _spellings_in(folder: str) -> tuple[dict[str, list[str]], ...]:
    """Return the names in a folder by their composed form, without letter case, and without
    ending."""
    same, alike, of_stem = defaultdict(list), defaultdict(list), defaultdict(list)
    for name in sorted(_names_in(folder)):
        composed = unicodedata.normalize("NFC", name)
        same[composed].append(name)
        alike[composed.casefold()].append(name)
        if not name.startswith("."):
            of_stem[os.path.splitext(composed)[0].casefold()].append(name)
    return dict(same), dict(alike), dict(of_stem)


def differs_in_case(given: str, path: str) -> bool:
    """Whether the file name of a path has the letters of the given one in another case."""
    names = [unicodedata.normalize("NFC", re.split(r"[/\\]", text)[-1]) for text in (given, path)]
    return names[0] != names[1] and names[0].casefold() == names[1].casefold()


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
        forget_names()
        self.paths, missing, elsewhere, both, cased = [], [], [], [], []
        here = os.getcwd()
        other = os.path.realpath(here) != os.path.realpath(root)
        for text, line in zip(texts, lines, strict=True):
            path, exists = find_path(root, text)
            self.paths.append(path)
            if exists and differs_in_case(text, path):
                cased.append(f"{text} (line {line}) is {path}")
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
                f"{', '.join(missing[:3])}; paths are relative to {root}."
                f"{_hint(missing[0]) or _near(root, missing[0])}"
            )
        if cased:
            self.faults.append(
                f"the names of {len(cased):,} files are in another letter case than in the table, "
                f"for example {cased[0]}; other systems do not find them so"
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


def forget_names() -> None:
    """Forget the folders that were listed, so that new files are seen."""
    _names_in.cache_clear()
    _spellings_in.cache_clear()


def _near(root: str, text: str) -> str:
    """Return a sentence that says which files have the name of a missing one, in another case or
    with another ending; "" without any."""
    text = _local(text.rpartition(" (line")[0]).replace("\\", "/")
    folder, _, name = text.rpartition("/")
    key = os.path.splitext(unicodedata.normalize("NFC", name).casefold())[0]
    here = find_spelling(root, folder) if folder else ""
    matches = [] if here is None else _spellings_in(os.path.join(root, here))[2].get(key, [])
    return f" There is {' and '.join(matches[:3])}." if matches else ""


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
