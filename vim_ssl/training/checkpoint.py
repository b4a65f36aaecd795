"""The checkpoints of a training run: `Run.save` writes them, `Run.resume` loads the newest one.

checkpoints/step-N/   what accelerate saves (model, optimiser, scaler, random states), and
                      progress.json
"""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vim_ssl.utils.files import atomic_write, fsync_path, reading


class Checkpoints:
    """The checkpoints in a run directory: whole or absent. `Run` is one of these.

    Args:
        folder: the run directory.
        main: True on the main process, which alone writes shared files.
    """

    def __init__(self, folder: Path, main: bool = True):
        self.folder, self.main = Path(folder), main

    def checkpoints(self) -> list[Path]:
        """Whole checkpoints, oldest first. (A partial one never gets its final name.)"""
        paths = (self.folder / "checkpoints").glob("step-*")
        return sorted(paths, key=lambda path: int(path.name.removeprefix("step-")))

    def has_step(self, step: int) -> bool:
        """True if there is a whole checkpoint of this step."""
        return (self.folder / "checkpoints" / f"step-{step}").is_dir()

    def progress(self) -> dict[str, Any]:
        """The `Progress` stored in the newest checkpoint; {} without one. Raises: ValueError."""
        if not (checkpoints := self.checkpoints()):
            return {}
        file = checkpoints[-1] / "progress.json"
        with reading(file, "the progress of a run", "delete this checkpoint"):
            return dict(json.loads(file.read_text()))

    def save(self, accelerator, progress, keep: int) -> None:
        """Save everything that the next step depends on, whole or not at all, and delete all but
        the newest ``keep`` checkpoints.

        Raises: OSError if the disk is full; earlier checkpoints are kept.
        """
        final = self.folder / "checkpoints" / f"step-{progress.step}"
        partial = final.with_name(f"partial-{progress.step}")
        accelerator.wait_for_everyone()
        if self.main and partial.exists():
            shutil.rmtree(partial)
        accelerator.wait_for_everyone()
        with self.writing(f"the checkpoint of step {progress.step}", partial):
            accelerator.save_state(str(partial), safe_serialization=True)
        accelerator.wait_for_everyone()
        if self.main and not final.exists():
            with self.writing(f"the checkpoint of step {progress.step}", partial):
                (partial / "progress.json").write_text(json.dumps(vars(progress)))
                for file in partial.rglob("*"):
                    fsync_path(file)
                os.replace(partial, final)
                fsync_path(final.parent)
            for old in self.checkpoints()[:-keep]:
                shutil.rmtree(old)
        accelerator.wait_for_everyone()

    @contextlib.contextmanager
    def writing(self, what: str, partial: Path | None = None) -> Iterator[None]:
        """Turn a failed write of ``what`` into an OSError that says how to resume, and delete
        ``partial``."""
        from safetensors import SafetensorError

        try:
            yield
        except (OSError, RuntimeError, SafetensorError) as error:
            reason = _reason(error, self.folder)
            if partial is not None:
                shutil.rmtree(partial, ignore_errors=True)
            then = "start again; there is no checkpoint yet."
            if checkpoints := self.checkpoints():
                then = f"go on from {checkpoints[-1].name}: --output {self.folder} --resume auto."
            raise OSError(
                f"{what} cannot be written in {self.folder}: {reason}. Fix that, then {then}"
            ) from error

    def resume(self, accelerator, progress) -> None:
        """Load the newest checkpoint, if there is one, and cut the log back to its step.

        Raises: ValueError for a checkpoint of another model.
        """
        if not (checkpoints := self.checkpoints()):
            return
        newest = checkpoints[-1]
        try:
            accelerator.load_state(str(newest))
        except RuntimeError as error:
            raise ValueError(
                f"{newest} does not fit this model; was it saved with other settings than those of "
                f"{self.folder / 'config.json'}? {' '.join(str(error).split())[:200]} …"
            ) from error
        vars(progress).update(self.progress())
        log = self.folder / "metrics.jsonl"
        if self.main and log.exists():
            rows = [line for line in log.read_text().splitlines() if _step(line) <= progress.step]
            atomic_write(log, "".join(row + "\n" for row in rows))
        if self.main:
            print(f"Resumed at step {progress.step:,} from {newest}", flush=True)


def _step(line: str) -> int:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):  # cut off by a kill in the middle of writing
        return 2**62


def _reason(error: BaseException, folder: Path) -> str:
    """The system's message for a failed write in ``folder``."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    try:  # torch drops the message: provoke it again
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(2**20))
    except OSError as again:
        return again.strerror or str(again)
    return " ".join(str(error).split())[:200]
