"""What a run records about itself in state.json: its state, its plan and what it depends on.

    {"state": "running", "step": 40, "total": 400, "reason": "", "host": …, "folder": …,
     "plan": {"effective_batch": 64, "peak_lr": 0.001, …},       # see `Schedule.plan`
     "depends_on": {"teacher": HASH, …}}                         # see `vim_ssl.training.resume`

Runs of earlier versions have no such file; what readers then know comes from the log.
"""

import contextlib
import json
import os
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vim_ssl.utils.files import atomic_write

FILE, LOCK = "state.json", ".lock"
RUNNING, FINISHED, STOPPED_EARLY = "running", "finished", "stopped early"
INTERRUPTED, FAILED = "interrupted", "failed"
STATES = (RUNNING, FINISHED, STOPPED_EARLY, INTERRUPTED, FAILED)
ENDED = (FINISHED, STOPPED_EARLY)  # with nothing left to train


@dataclass(frozen=True)
class State:
    """The state of a run: one of `STATES`, the step and the planned number of steps, and why."""

    name: str
    step: int = 0
    total: int = 0
    reason: str = ""

    def __str__(self) -> str:
        text = self.name
        if self.name != FINISHED and self.total:
            text += f" at step {self.step:,} of {self.total:,}"
        return text + (f": {self.reason}" if self.reason else "")


def read_state(folder: str | os.PathLike) -> dict[str, Any]:
    """Return the content of state.json; {} if it is absent or damaged."""
    try:
        content = json.loads((Path(folder) / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def recorded(folder: str | os.PathLike, key: str) -> dict[str, Any]:
    """Return the dict under ``key`` of state.json; {} if there is none."""
    value = read_state(folder).get(key)
    return value if isinstance(value, dict) else {}


def state_of(folder: str | os.PathLike) -> State | None:
    """Return the state that a run recorded; None for a run of an earlier version.

    A run whose process has ended without recording it, as after a SIGKILL, was interrupted.
    """
    stored = read_state(folder)
    name, reason = stored.get("state"), stored.get("reason")
    if name not in STATES:
        return None
    step, total = (
        value if isinstance(value := stored.get(key), int) else 0 for key in ("step", "total")
    )
    if name == RUNNING and stored.get("host") == platform.node() and not is_locked(folder):
        name, reason = INTERRUPTED, "its process ended without saving"
    return State(name, step, total, reason if isinstance(reason, str) else "")


def is_locked(folder: str | os.PathLike) -> bool:
    """True while a process trains in ``folder``, and if the file system cannot tell."""
    from filelock import FileLock, Timeout

    if not (Path(folder) / LOCK).exists():
        return False
    lock = FileLock(Path(folder) / LOCK)
    try:
        with lock.acquire(timeout=0):
            return False
    except (Timeout, OSError, NotImplementedError):
        return True


class StateFile:
    """state.json of an open run; only the main process writes it."""

    def __init__(self, folder: Path, main: bool = True):
        self.folder, self.main = folder, main
        self.outcome = FINISHED, ""  # once the last step is done: the state and its reason
        self._content: dict[str, Any] = {}

    def begin(
        self, step: int, total: int, plan: Mapping[str, Any], depends_on: Mapping[str, str]
    ) -> None:
        """Record that the run trains from ``step`` on. Raises: OSError."""
        self._content = {
            "state": RUNNING, "step": step, "total": total, "reason": "",
            "host": platform.node(), "folder": os.getcwd(),
            "plan": dict(plan), "depends_on": dict(depends_on),
        }  # fmt: skip
        self._write()

    def reach(self, step: int) -> None:
        """Record the step of a checkpoint. Raises: OSError."""
        self._content["step"] = step
        self._write()

    def end(self, name: str, reason: str = "") -> None:
        """Record the final state; without effect unless `begin` was called. Raises: OSError."""
        if self._content:
            self._content |= {"state": name, "reason": reason}
            self._write()

    def conclude(self) -> None:
        """Record the ``outcome``. Raises: OSError."""
        self.end(*self.outcome)

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Record an error or Ctrl-C that ends the run; `Monitor` records a signal itself."""
        try:
            yield
        except SystemExit:
            raise
        except BaseException as error:
            name = INTERRUPTED if isinstance(error, KeyboardInterrupt) else FAILED
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            with contextlib.suppress(OSError):  # such as a full disk, which is the error
                self.end(name, reason)
            raise

    def _write(self) -> None:
        if self.main:
            atomic_write(self.folder / FILE, json.dumps(self._content, indent=2) + "\n")
