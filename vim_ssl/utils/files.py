"""Files: atomic writes, text, caches."""

import csv
import os
from collections.abc import Iterable, Sequence
from pathlib import Path


def atomic_write(path: Path, content: bytes | str) -> None:
    """Replace a file as a whole: a reader, or a crash, leaves the old content or the new.

    Args:
        content: bytes, or text, which is written as UTF-8.
    Raises: OSError, with the old content kept and nothing left beside it.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with partial.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def fsync_path(path: Path) -> None:
    """Make the disk hold what was written (directories too, where the system allows it)."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cache_dir() -> Path:
    """Where sample sets are kept: VIM_SSL_SAMPLES, else a folder in the user's cache."""
    if given := os.environ.get("VIM_SSL_SAMPLES"):
        return Path(given).expanduser()
    return user_cache() / "samples"


def user_cache() -> Path:
    """This project's folder in the user's cache; VIM_SSL_CACHE puts it elsewhere."""
    if given := os.environ.get("VIM_SSL_CACHE"):
        return Path(given).expanduser()
    if os.name == "nt":
        base = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "vim_ssl"


def read_text(file: Path) -> str:
    """The content of a text file. Raises: ValueError, with the line, if it is not UTF-8."""
    content = file.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{file} is not UTF-8 (line {line}); save it as UTF-8.") from None


def append_rows(path: Path, columns: Sequence[str], rows: Iterable[dict]) -> None:
    """Append to a CSV file, each row at once, so that what was measured survives a cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, columns)
        if new:
            writer.writeheader()
        for row in rows:
            writer.writerow(row)
            file.flush()
