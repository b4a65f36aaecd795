"""Folders for outputs: their default names, and that none is overwritten without a word."""

import json
import os
import platform
import re
import tempfile
import time
from collections.abc import Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any

from vim_ssl.data.spec import existing_paths
from vim_ssl.utils.files import atomic_write, writable

RUNS = Path("runs")
MARK = ".evaluation.json"  # in the folder of an evaluation: its task, settings and process
RESULTS = ("metrics.json", "predictions.csv", "classes.csv", "config.json", "checkpoints")
# Settings that change no result, only where or how fast it is computed.
NEUTRAL = {"output", "device", "workers", "threads", "batch_size", "judge_batch", "cache"}


def new_folder(name: str, root: Path = RUNS) -> Path:
    """Create a folder under ``root``, named by the time. Processes that do this in the same second,
    also on several machines, get different ones.

    Raises: OSError, in one line, if it cannot be created.
    """
    first = root / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    with writable(first):
        for folder in _numbered(first):
            try:
                folder.mkdir(parents=True)
            except FileExistsError:
                continue
            return folder
    raise AssertionError


def _numbered(first: Path) -> Iterator[Path]:
    """Yield the path, and the same with -2, -3 …"""
    yield first
    yield from (first.with_name(f"{first.name}-{number}") for number in count(2))


def check_writable(folder: Path) -> None:
    """Create a folder and write to it. Raises: OSError, in one line."""
    with writable(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"1")


def task_folder(task: str, source: str | Path, data: str) -> Path:
    """The default output of a task on an encoder: a folder in its run, named after the data if
    these are not the run's; under ``runs/`` for a preset or Hub id."""
    slug = "-" + re.sub(r"\W+", "-", data).strip("-") if data else ""
    folder = Path(source)
    if folder.is_file():
        folder = folder.parent
    if folder.is_dir():
        return folder / f"{task}{slug}"
    return RUNS / f"{task}-{folder.name}{slug}"


def evaluation_folder(
    output: str = "", task: str = "", settings: Any = None, images: Mapping[str, str] | None = None
) -> Path:
    """Create the folder for an evaluation without training: ``output``, or one under ``runs/``
    named by the time.

    Raises: the errors of `claim`.
    """
    if not output:
        return new_folder("evaluation")
    return claim(Path(output), task, settings, named=True, images=images)


def claim(
    folder: Path,
    task: str,
    settings: Mapping[str, Any] | None,
    *,
    named: bool,
    weights: str = "",
    images: Mapping[str, str] | None = None,
) -> Path:
    """Create the folder of an evaluation before it is computed.

    The same evaluation may be repeated in its folder; one of other settings, or of other images
    under the same name, is never overwritten.

    Args:
        folder: the requested folder, or the default one.
        task, settings: they identify the evaluation, together with the text of its data and
            encoder.
        named: the user chose the folder. If it has other content, this is an error; instead of a
            default folder, the next free one is used: NAME-2, NAME-3 …
        weights: hash of the weights; a result of others that is replaced is reported.
        images: the fingerprint of each split: the same text may mean other images later, or from
            another working directory.
    Raises: FileExistsError for a folder with another result; OSError if nothing can be written.
    """
    identity = {
        "task": task, "settings": _identifying(settings or {}), "images": dict(images or {}),
        "locations": _locations(settings or {}),
    }  # fmt: skip
    why = ""
    for candidate in [folder] if named else _numbered(folder):
        with writable(candidate):
            candidate.parent.mkdir(parents=True, exist_ok=True)
            try:
                candidate.mkdir()
                fresh = True
            except FileExistsError:
                fresh = False
        if fresh or (obstacle := _obstacle(candidate, identity)) is None:
            break
        if named:
            raise FileExistsError(
                f"{candidate} contains {obstacle}; it is not overwritten. Choose another --output."
            )
        why = why or obstacle
    check_writable(candidate)
    before = _read(candidate / "metrics.json").get("weights")
    if before and weights and before != weights:
        print(f"{candidate}: the result of earlier weights will be replaced.", flush=True)
    if candidate != folder:
        print(f"{folder} contains {why}; writing to {candidate}.", flush=True)
    mark = identity | {"process": _process()}
    atomic_write(candidate / MARK, json.dumps(mark, indent=2) + "\n")
    return candidate


def _obstacle(folder: Path, identity: Mapping[str, Any]) -> str | None:
    """Describe the content of an existing folder that this evaluation must not overwrite; None if
    there is none."""
    if not folder.is_dir():
        return "a file of that name"
    if any((folder / name).exists() for name in ("config.json", "checkpoints")):
        return "a run, with the result of its training"
    known, metrics = _read(folder / MARK), _read(folder / "metrics.json")
    if known and not (folder / "metrics.json").exists():
        process = known.get("process")
        # One that was killed, or failed, has left nothing to protect.
        if process == _process() or not _is_running(process):
            return None
        return f"an evaluation in progress (process and machine: {process})"
    if not known:  # of an earlier version
        known = {"task": metrics.get("task"), "settings": _identifying(metrics.get("protocol"))}
        if not metrics:
            there = next((name for name in RESULTS if (folder / name).exists()), None)
            return there and f"{there}, which no evaluation has recorded"
    if known.get("task") != identity["task"]:
        return f"a result of {known.get('task')}"
    if not isinstance(known.get("settings"), dict):
        return "a result of unknown settings"
    if key := _different(known["settings"], identity["settings"]):
        before, now = (content["settings"][key] for content in (known, identity))
        return f"a result with {key} = {before!r}, not {now!r}"
    if key := _different(known.get("locations"), identity["locations"]):
        return f"a result with {key} in {known['locations'][key]}"
    images = known.get("images") or metrics.get("fingerprints")
    if key := _different(images, identity["images"]):
        return f"a result on other {key} images under the same name"
    return None


def _different(before: Any, now: Mapping[str, Any]) -> str:
    """The first key that two mappings share, with another value; "" if there is none."""
    known: Mapping[str, Any] = before if isinstance(before, Mapping) else {}
    return next((key for key in now if key in known and known[key] != now[key]), "")


def _locations(settings: Mapping[str, Any]) -> dict[str, str]:
    """The absolute paths of the data, and of the encoders to compare with, that exist here."""
    locations = {}
    for key in ("data", "test_data", "against"):
        given = settings.get(key) or ()
        specs = [given] if isinstance(given, str) else given
        if paths := sorted(path for spec in specs for path in existing_paths(str(spec))):
            locations[key] = ", ".join(paths)
    return locations


def _process() -> list[Any]:
    return [platform.node(), os.getpid()]


def _is_running(process: Any) -> bool:
    """True if a process of this machine is running, and for one of another machine."""
    import psutil

    if not (isinstance(process, list) and len(process) == 2 and isinstance(process[1], int)):
        return False
    return process[0] != platform.node() or psutil.pid_exists(process[1])


def _identifying(settings: Any) -> dict[str, Any]:
    """The settings that determine a result, as they are read from JSON."""
    if not isinstance(settings, Mapping):
        return {}
    kept = {key: value for key, value in settings.items() if key not in NEUTRAL}
    if encoder := kept.get("encoder"):  # one spelling of a path
        path = Path(encoder)
        path = path.parent if path.name == "encoder.safetensors" else path
        kept["encoder"] = os.path.realpath(path) if path.exists() else encoder
    return json.loads(json.dumps(kept, default=str))


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
