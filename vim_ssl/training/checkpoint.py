"""The checkpoints of a training run: `Run.save` writes them, `Run.resume` loads the newest one.

checkpoints/step-N/      what accelerate saves (model, optimiser, scaler, random states), and
                         progress.json, with the sizes of these files
checkpoints/damaged-…    one that turned out damaged when the run was resumed
"""

import contextlib
import json
import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vim_ssl.utils.files import atomic_write, fsync_path, read_object

_STEP = re.compile(r"step-(\d+)")


class Checkpoints:
    """The checkpoints in a run directory: whole or absent. `Run` is one of these.

    Args:
        folder: the run directory.
        main: True on the main process, which alone writes shared files.
    """

    def __init__(self, folder: Path, main: bool = True):
        self.folder, self.main = Path(folder), main
        self.skipped: set[str] = set()  # images that could not be read

    def checkpoints(self) -> list[Path]:
        """Checkpoints, oldest first. A partial one never gets its final name; other files and
        folders, such as copies, are passed over."""
        paths = (self.folder / "checkpoints").glob("step-*")
        steps = {path: match for path in paths if (match := _STEP.fullmatch(path.name))}
        return sorted(filter(Path.is_dir, steps), key=lambda path: int(steps[path][1]))

    def progress(self) -> dict[str, Any]:
        """The content of progress.json in the newest checkpoint; {} without one that is whole."""
        for path in reversed(self.checkpoints()):
            with contextlib.suppress(ValueError, OSError):
                return read_progress(path)
        return {}

    def has_step(self, step: int) -> bool:
        """True if there is a whole checkpoint of this step."""
        return (self.folder / "checkpoints" / f"step-{step}").is_dir()

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
                content = {
                    **vars(progress),
                    "skipped": sorted(self.skipped),
                    "files": _sizes(partial),
                }
                (partial / "progress.json").write_text(json.dumps(content))
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
        """Load the newest whole checkpoint, if there is one, and cut the log back to its step. A
        damaged one is reported, and renamed.

        Raises: ValueError for a checkpoint of another model, and if all are damaged.
        """
        newest = self._newest_whole(accelerator)
        if newest is None:
            return
        try:
            accelerator.load_state(str(newest))
        except RuntimeError as error:
            raise ValueError(
                f"{newest} does not fit this model; was it saved with other settings than those of "
                f"{self.folder / 'config.json'}? {' '.join(str(error).split())[:200]} …"
            ) from error
        stored = read_progress(newest)
        self.skipped |= set(stored.get("skipped", ()))
        vars(progress).update({k: v for k, v in stored.items() if k in vars(progress)})
        log = self.folder / "metrics.jsonl"
        if self.main and log.exists():
            lines = log.read_bytes().decode(errors="replace").splitlines()
            rows = [line for line in lines if _step(line) <= progress.step]
            atomic_write(log, "".join(row + "\n" for row in rows))
        if self.main:
            print(f"Resumed at step {progress.step:,} from {newest}", flush=True)

    def _newest_whole(self, accelerator) -> Path | None:
        """Return the newest checkpoint that is whole, for all processes; rename damaged ones."""
        from accelerate.utils import broadcast_object_list

        intact: list[Any] = [None, ""]  # the name of the checkpoint, and what is wrong with others
        for path in reversed(self.checkpoints()) if self.main else ():
            if not (fault := damage(path)):
                intact[0] = path.name
                break
            intact[1] += f"{path} is damaged ({fault}). "
        broadcast_object_list(intact)
        name, faults = intact
        if name is None:
            if faults:
                raise ValueError(
                    f"{faults}There is no older one: restore it from a copy, or start a new run in "
                    "another --output."
                )
            return None
        chosen = self.folder / "checkpoints" / name
        if faults and self.main:
            print(f"{faults}The run continues from the older {name}.", flush=True)
            for path in self.checkpoints():
                if int(path.name[5:]) > int(name[5:]):
                    target = path.with_name(f"damaged-{path.name}")
                    shutil.rmtree(target, ignore_errors=True)
                    path.rename(target)
        return chosen


def _sizes(checkpoint: Path) -> dict[str, int]:
    """The sizes of the files that training needs to continue; random states are drawn anew."""
    files = (path for path in checkpoint.rglob("*") if path.is_file())
    return {
        path.relative_to(checkpoint).as_posix(): path.stat().st_size
        for path in files
        if not path.name.startswith("random_states")
    }


def _expected(checkpoint: Path) -> dict[str, None]:
    """The files, of unknown size, that a checkpoint of an earlier version needs."""
    sharded = any(checkpoint.glob("*fsdp*"))
    return {} if sharded else dict.fromkeys(("model.safetensors", "optimizer.bin"))


def read_progress(checkpoint: Path) -> dict[str, Any]:
    """Return the content of a checkpoint's progress.json. Raises: OSError; ValueError for a file
    with other content."""
    path = checkpoint / "progress.json"
    content = read_object(path, "the progress of a run")
    if not isinstance(content.get("step"), int):
        raise ValueError(f"{path} has no step.")
    return content


def damage(checkpoint: Path) -> str:
    """Return what is wrong with the files of a checkpoint; "" if it is whole."""
    from safetensors import safe_open

    path = checkpoint / "progress.json"
    try:
        sizes = read_progress(checkpoint).get("files")
        for name, size in (sizes if isinstance(sizes, dict) else _expected(checkpoint)).items():
            path = checkpoint / name
            if (now := path.stat().st_size) != size and size is not None:
                return f"{name} has {now:,} bytes instead of {size:,}"
        for path in sorted(p for p in checkpoint.rglob("*") if p.is_file()):
            if path.suffix == ".safetensors":
                with safe_open(path, "pt") as file:
                    file.keys()
            elif path.name == "optimizer.bin":  # torch's archive, with checksums
                with zipfile.ZipFile(path) as archive:
                    if broken := archive.testzip():
                        return f"{path.name}: {broken} is broken"
    except FileNotFoundError:
        return f"{path.name} is missing"
    except Exception as error:  # readers of damaged files raise errors of nearly any type
        reason = " ".join(str(error).split())[:120].rstrip(".")
        return f"{path.name}: {reason}"
    return ""


def _step(line: str) -> int:
    """The step of a line of metrics.jsonl; a large number for a line without one, which a kill in
    the middle of writing has cut off."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        if isinstance(step := json.loads(line)["step"], int):
            return step
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
