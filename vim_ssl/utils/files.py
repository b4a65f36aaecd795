"""Atomic file writes, text files, cache folders."""

import codecs
import csv
import json
import os
import re
import secrets
import shutil
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def atomic_write(path: Path, content: bytes | str) -> None:
    """Replace a file atomically: after a crash it has either the old or the new content.

    Args:
        content: bytes, or a string, which is written as UTF-8; bytes of file names that are not
            UTF-8 become backslash escapes.
    Raises: OSError; the old content is kept and no temporary file remains.
    """
    with atomic_path(path) as partial:
        encoded = (
            content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
        )
        partial.write_bytes(encoded)


@contextmanager
def atomic_path(path: Path, *, shared: bool = True) -> Iterator[Path]:
    """Yield a hidden path beside ``path`` for a file or folder, which replaces ``path`` at the end.

        with atomic_path(folder / "model.npy") as partial:
            write(partial)

    After an error, the hidden path is removed. If another process has completed the same folder in
    the meantime, that one is kept.

    Args:
        shared: several processes may write ``path`` at the same time, so each has its own hidden
            path. False: a fixed hidden path, which overwrites the leftovers of a killed process.
    """
    unique = f".{secrets.token_hex(4)}" if shared else ""
    partial = path.with_name(f".{path.name}{unique}.part")
    try:
        yield partial
        if not partial.is_dir():
            fsync_path(partial)
        try:
            partial.replace(path)
        except OSError:
            if not (partial.is_dir() and path.is_dir()):
                raise
    finally:
        if partial.is_dir():
            shutil.rmtree(partial)
        partial.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically, piece by piece to limit memory: ``content`` is an iterator, which
    becomes a list, or a dict whose values may be iterators."""
    with atomic_path(path) as partial, partial.open("w", encoding="utf-8") as file:
        file.writelines(_json(content))


def _json(content: Any) -> Iterator[str]:
    if isinstance(content, dict) and any(isinstance(x, Iterator) for x in content.values()):
        for i, (key, value) in enumerate(content.items()):
            yield f"{',' if i else '{'}\n{json.dumps(key)}: "
            yield from _json(value)
        yield "}\n"
    elif isinstance(content, Iterator):
        yield "["
        for i, value in enumerate(content):
            yield f"{',' if i else ''}\n{json.dumps(value)}"
        yield "]"
    else:
        yield json.dumps(content)


def fsync_path(path: Path) -> None:
    """Flush a file to the disk, or a directory if the system supports it."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cache_dir() -> Path:
    """Return the folder of the sample sets: VIM_SSL_SAMPLES, else one in the user's cache."""
    if given := os.environ.get("VIM_SSL_SAMPLES"):
        return Path(given).expanduser()
    return user_cache() / "samples"


def user_cache() -> Path:
    """Return this project's folder in the user's cache; VIM_SSL_CACHE overrides it."""
    if given := os.environ.get("VIM_SSL_CACHE"):
        return Path(given).expanduser()
    if os.name == "nt":
        base = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "vim_ssl"


@contextmanager
def reading(path: str | os.PathLike, what: str, remedy: str = "") -> Iterator[None]:
    """Report any error of a library that reads a user's file as a ValueError that names the file.

        with reading(path, "a run's log", "delete it"):
            rows = [json.loads(line) for line in open(path)]

    Missing files, missing rights, missing libraries, and errors that name the file pass unchanged.

    Args:
        what: the expected content, with its article.
        remedy: what to do, as a phrase; default: replace the file.
    Raises: ValueError, from the library's error.
    """
    try:
        yield
    except (FileNotFoundError, PermissionError, ImportError, MemoryError):
        raise
    except Exception as error:  # readers of damaged files raise errors of nearly any type
        if str(path) in str(error) and isinstance(error, (ValueError, OSError)):
            raise
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise ValueError(
            f"{path} cannot be read as {what} ({kind}{reason}); "
            f"{remedy or 'replace it by an intact copy'}."
        ) from error


@contextmanager
def optional_output(what: str) -> Iterator[None]:
    """Warn if a part of the results cannot be written, so that the others are.

        with optional_output("predictions.csv"):
            write_csv(…)

    Only for what explains a result; the result itself must not be lost silently.
    """
    try:
        yield
    except Exception as error:  # drawing and writing raise errors of nearly any type
        reason = " ".join(str(error).split())[:200].rstrip(".")
        warnings.warn(
            f"{what} could not be written ({type(error).__name__}: {reason}); the other results "
            "are complete.",
            stacklevel=3,
        )


OTHER_OUTPUT = "Choose another --output, or make it a folder in which this user may write."


@contextmanager
def writable(folder: Path, remedy: str = OTHER_OUTPUT) -> Iterator[None]:
    """Report a failed write in ``folder`` in one line that says what to do. Raises: OSError."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # it has a message of its own
            raise
        raise type(error)(
            f"{error.filename or folder} cannot be written: {error.strerror}. {remedy}"
        ) from error


def read_object(path: Path, what: str, remedy: str = "") -> dict[str, Any]:
    """Read a JSON file with one object. Arguments and errors: see `reading`."""
    with reading(path, what, remedy):
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"it contains a {type(content).__name__}, not an object")
    return content


def encoding_of(start: bytes) -> str:
    """Return the encoding of a text file from its first bytes: UTF-8 unless a byte order mark says
    otherwise."""
    if start.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "utf-32"
    return "utf-16" if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"


def decode_text(content: bytes, name: Any) -> str:
    """Decode a text with or without a byte order mark, which is removed.

    Args:
        name: name of the text, for messages.
    Raises: ValueError naming the line that is not UTF-8, or for NUL bytes.
    """
    try:
        text = content.decode(encoding_of(content[:4]))
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{name} is not UTF-8 (line {line}); save it as UTF-8.") from None
    if "\0" in text:
        raise ValueError(f"{name} contains NUL bytes, so it is not UTF-8 text; save it as UTF-8.")
    return text


def read_text(file: Path) -> str:
    """The content of a text file. Raises: the errors of `decode_text`."""
    return decode_text(file.read_bytes(), file)


def read_json(file: Path) -> Any:
    """The content of a JSON file. Raises: ValueError naming the file, and where known the line, for
    a syntax error, NaN or infinity, and a key that an object has twice."""
    text = read_text(file)

    def refuse(constant: str) -> Any:
        match = re.search(rf"[\[:,\s]{constant}\b", text)
        line = text.count("\n", 0, match.end()) + 1 if match else 1
        raise ValueError(f"{constant} in line {line}; write null")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in content if keys.count(key) > 1)
            raise ValueError(f"the key {twice!r} occurs twice in one object; keep one")
        return content

    try:
        return json.loads(text, parse_constant=refuse, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}.") from error


def read_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file as text; an empty list if there is no such file."""
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def append_rows(path: Path, columns: Sequence[str], rows: Iterable[dict]) -> None:
    """Append rows to a CSV file, flushing each, so that an interrupted benchmark keeps its rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = path.read_bytes() if path.exists() else b""
    with open(path, "a", newline="", encoding="utf-8", errors="backslashreplace") as file:
        if content and not content.endswith(b"\n"):  # a row that a kill has cut
            file.write("\r\n")
        writer = csv.DictWriter(file, columns)
        if not content:
            writer.writeheader()
        for row in rows:
            writer.writerow(row)
            file.flush()
