"""Outputs that a killed command continues: a record of their settings, a lock, and a journal."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from vim_ssl.utils.files import atomic_path, read_object, reading, writable

# The times of the image files; the records of earlier versions do not have it.
IMAGE_FILES = "image_files"


def claim_output(
    output: Path,
    record: Path,
    made_of: Mapping[str, Any],
    origin: Mapping[str, Any],
    *,
    what: str,
    lock: Path,
    strangers: Iterable[Path] = (),
) -> Any:
    """Lock an output for this process and write its record, or check the record that is there.

    Args:
        output: the file or folder that is written, for messages.
        record: JSON file with ``made_of``, everything that the content depends on. It must match to
            resume.
        origin: further entries of a new record.
        what: noun for the content, in messages.
        lock: lock file. The system releases the lock after a kill.
        strangers: existing paths that are not part of such an output; without a record they are
            refused.
    Returns: the lock, with ``release()``.
    Raises: ValueError for a record of other settings; FileExistsError for strangers;
        BlockingIOError while another process writes.
    """
    from filelock import FileLock, Timeout

    if record.exists():
        stored = read_record(record).get("made_of")
        stored = stored if isinstance(stored, dict) else {}
        if IMAGE_FILES not in stored:
            stored = stored | {IMAGE_FILES: made_of.get(IMAGE_FILES)}
        differing = [key for key, value in made_of.items() if stored.get(key) != value]
        if differing == [IMAGE_FILES]:
            raise ValueError(
                f"{output} contains {what} of other image files: some were written again since, "
                "though their names and sizes are the same. Choose another --output, or delete it."
            )
        if differing:
            raise ValueError(
                f"{output} contains {what} with different {', '.join(differing)}; use the "
                f"settings in {record.name} to resume, or choose another --output."
            )
    elif stranger := next(iter(strangers), None):
        raise FileExistsError(
            f"{stranger} exists, but no record of {what} ({record.name}); choose another --output."
        )
    with writable(record.parent):
        record.parent.mkdir(parents=True, exist_ok=True)
    held = FileLock(lock)
    try:
        with writable(record.parent):
            held.acquire(timeout=0)
    except Timeout:
        raise BlockingIOError(
            f"another process is writing {output}; wait for it, or choose another --output."
        ) from None
    if not record.exists():
        write_record(record, {**origin, "made_of": made_of, "finished": False})
    return held


def read_record(file: Path) -> dict[str, Any]:
    """Read a record. Raises: ValueError for a damaged one."""
    return read_object(file, "the record of an output", "delete it with its output")


def write_record(file: Path, record: Mapping[str, Any]) -> None:
    """Write a record atomically. Only the process that holds the lock may do this."""
    with atomic_path(file, shared=False) as partial:
        partial.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


class Journal:
    """Finished items, one JSON line each, appended in any order and read in the order of ``index``.

    Lines are flushed one by one, so a kill loses at most the item in progress: a last line without
    an end is dropped. Only the offsets of the lines are kept in memory. An entry with an ``error``
    does not count as finished, and a later entry for the same index replaces it.
    """

    def __init__(self, path: Path):
        self.path = path
        self._offsets: dict[int, int] = {}  # index of an item → start of its line in bytes
        self._failed: set[int] = set()
        self._file = open(path, "a+b")  # noqa: SIM115
        self._file.seek(0)
        end = 0
        for line in self._file:
            if not line.endswith(b"\n"):
                break
            with reading(path, "finished items", "delete it to start anew"):
                self._note(json.loads(line), end)
            end += len(line)
        self._file.truncate(end)

    def _note(self, entry: Mapping[str, Any], offset: int) -> None:
        self._offsets[entry["index"]] = offset
        (self._failed.add if "error" in entry else self._failed.discard)(entry["index"])

    def __contains__(self, index: object) -> bool:
        """Whether the item is finished."""
        return index in self._offsets and index not in self._failed

    def __len__(self) -> int:
        """Number of finished items."""
        return len(self._offsets) - len(self._failed)

    def append(self, index: int, entry: Mapping[str, Any]) -> None:
        """Add an item. ``entry`` must be JSON-serialisable."""
        entry, offset = {"index": index, **entry}, self._file.seek(0, os.SEEK_END)
        self._file.write(json.dumps(entry).encode() + b"\n")
        self._file.flush()
        self._note(entry, offset)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield all entries by ascending index."""
        with open(self.path, "rb") as file:
            for index in sorted(self._offsets):
                file.seek(self._offsets[index])
                yield json.loads(file.readline())

    def close(self) -> None:
        self._file.close()
