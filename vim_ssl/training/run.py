"""The run directory: configuration, log, images, checkpoints, the encoder.

config.json  metrics.jsonl  checkpoints/step-N/  encoder.safetensors + encoder.json
images/      report.html    trackers/ (of TensorBoard and the like)
"""

import contextlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from vim_ssl.utils.files import atomic_write, fsync_path

RUNS = Path("runs")
LOCK = ".lock"
# What may differ when a run is taken up again: it changes no step (compile: its rounding), or only
# how long the run goes on.
FREE_TO_CHANGE = {
    "recipe", "output", "resume", "epochs", "workers", "threads", "log_every", "eval_every",
    "save_every", "save_steps", "keep_checkpoints", "max_steps", "max_bad_steps", "trackers",
    "compile", "grad_checkpointing",
}  # fmt: skip


class Run:
    """A run directory that one training writes. Only the main process writes shared files.

    Args:
        folder: the directory.
        main: whether this is the main process.
    """

    def __init__(self, folder: Path, main: bool = True):
        self.folder, self.main = Path(folder), main
        self.skipped: set[str] = set()
        self._trackers: list[Any] = []
        self._lock: Any = None
        self._record: dict = {}

    @classmethod
    def open(cls, recipe: str, config, accelerator) -> "Run":
        """Make or take up the directory that ``config.output`` and ``config.resume`` name.

        Raises: FileExistsError for a directory that holds something else, or a run when
            ``resume`` is "never"; ValueError for settings that differ from the run's own, and
            an unknown tracker; ImportError for one that is not installed; BlockingIOError while
            another process trains there; OSError where nothing can be written.
        """
        from accelerate.utils import broadcast_object_list

        _check_trackers(config.trackers)
        name = config.output or str(RUNS / f"{recipe}-{time.strftime('%Y%m%d-%H%M%S')}")
        (name,) = broadcast_object_list([name])
        run = cls(Path(name), accelerator.is_main_process)
        run._record = {"recipe": recipe, **_plain(config)}
        if run.checkpoints() and config.resume != "auto":
            raise FileExistsError(
                f"{run.folder} already holds a run; go on with --resume auto, or choose another "
                "--output."
            )
        if run.folder.is_dir() and not run._is_new():
            run._check_same(name)
        accelerator.wait_for_everyone()
        if run.main:
            try:
                run._make(name)
            except BlockingIOError:
                raise
            except OSError as error:
                reason = error.strerror or error
                raise OSError(
                    f"{error.filename or name} cannot be written: {reason}. Choose another "
                    "--output, or make it a folder in which this user may write."
                ) from error
            if not run.checkpoints():
                run.write_config()
                (run.folder / "metrics.jsonl").unlink(missing_ok=True)
            run._start_trackers(config.trackers)
            print(f"Run directory: {run.folder}", flush=True)
        accelerator.wait_for_everyone()
        return run

    def _make(self, name: str) -> None:
        """Make the folders, see that files can be made in them, and keep other processes out."""
        parts = [self.folder, self.folder / "checkpoints", self.folder / "images"]
        for part in parts:
            part.mkdir(parents=True, exist_ok=True)
        self._take(name)
        for part in parts:
            with tempfile.TemporaryFile(dir=part) as probe:
                probe.write(b"1")
        for partial in (self.folder / "checkpoints").glob("partial-*"):  # of a killed save
            shutil.rmtree(partial)

    def _take(self, name: str) -> None:
        """Keep other processes out until `release`; the system does it for one that is killed."""
        from filelock import FileLock, Timeout

        self._lock = FileLock(self.folder / LOCK)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise BlockingIOError(
                f"another process is training in {name}; wait for it, or choose another --output."
            ) from None

    def release(self) -> None:
        """Let other processes have the folder; whoever opened the run closes it."""
        if self._lock:
            self._lock.release()

    def _is_new(self) -> bool:
        """Whether there is no more than `_make` makes, as where a disk was full at the start."""
        made = {"checkpoints", "images"}
        return all(
            path.name == LOCK or (path.name in made and path.is_dir() and not any(path.iterdir()))
            for path in self.folder.iterdir()
        )

    def _check_same(self, name: str) -> None:
        """Refuse a folder of something else, and settings that would make it another run."""
        stored = _stored_config(self.folder)
        if stored is None or "recipe" not in stored:  # other programs write config.json too
            raise FileExistsError(
                f"{name} holds something that is no run; choose another --output."
            )
        if not self.checkpoints():
            return
        for key in stored.keys() & self._record.keys() - FREE_TO_CHANGE:
            if stored[key] != self._record[key]:
                raise ValueError(
                    f"{name} was trained with {key} = {stored[key]!r}, not {self._record[key]!r}; "
                    "leave that flag and --preset out to go on, or start anew in another --output."
                )

    # ---------------------------------------------------------------- checkpoints

    def checkpoints(self) -> list[Path]:
        """Whole checkpoints, oldest first. (A broken one never gets its final name.)"""
        found = (self.folder / "checkpoints").glob("step-*")
        return sorted(found, key=lambda p: int(p.name.removeprefix("step-")))

    def save(self, accelerator, progress, keep: int) -> None:
        """Save everything that the next step depends on; whole, or not at all.

        Raises: OSError where the disk does not take it; the checkpoints before stay as they are.
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
        """Let a write that fails say how to go on, and leave no ``partial`` to fill the disk.

        Raises: OSError in place of what the libraries that write raise.
        """
        from safetensors import SafetensorError

        try:
            yield
        except (OSError, RuntimeError, SafetensorError) as error:
            reason = _reason(error, self.folder)
            if partial is not None:
                shutil.rmtree(partial, ignore_errors=True)
            then = "start again; there is no checkpoint yet."
            if found := self.checkpoints():
                then = f"go on from {found[-1].name}: --output {self.folder} --resume auto."
            raise OSError(
                f"{what} cannot be written in {self.folder}: {reason}. Put that right, then {then}"
            ) from error

    def resume(self, accelerator, progress) -> None:
        """Take up the newest checkpoint, if there is one, and cut the log back to its step.

        Raises: ValueError for a checkpoint of another model.
        """
        if not (found := self.checkpoints()):
            return
        try:
            accelerator.load_state(str(found[-1]))
        except RuntimeError as error:
            raise ValueError(
                f"{found[-1]} does not fit: was it made with other settings? "
                f"{self.folder / 'config.json'} holds them. {' '.join(str(error).split())[:200]} …"
            ) from error
        vars(progress).update(json.loads((found[-1] / "progress.json").read_text()))
        log = self.folder / "metrics.jsonl"
        if self.main and log.exists():
            rows = [line for line in log.read_text().splitlines() if _step(line) <= progress.step]
            atomic_write(log, "".join(row + "\n" for row in rows))
        if self.main:
            print(f"Going on at step {progress.step:,} from {found[-1]}", flush=True)

    def write_config(self) -> None:
        """Write config.json; of a resumed run only once its checkpoint is known to fit."""
        if self.main and self._record:
            with self.writing("config.json"):
                atomic_write(self.folder / "config.json", json.dumps(self._record, indent=2) + "\n")

    # ---------------------------------------------------------------- figures and images

    def log(self, progress, epoch: float, figures: dict[str, float]) -> None:
        """Append one line to metrics.jsonl, and tell the trackers."""
        if not self.main:
            return
        row = {"step": progress.step, "epoch": round(epoch, 4), **figures}
        row |= {"seconds": round(progress.seconds, 2), "samples": progress.samples}
        row |= {"bad_steps": progress.bad_steps, "skipped": len(self.skipped)}
        with self.writing("metrics.jsonl"), open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
        self._track(lambda tracker: tracker.log(figures, step=progress.step))

    def save_images(self, name: str, step: int, images: Tensor) -> Path:
        """(n, c, h, w) in [0, 1] -> images/NAME-STEP.png, one row a sample."""
        from torchvision.utils import save_image

        path = self.folder / "images" / f"{name}-{step:07d}.png"
        if images.shape[1] not in (1, 3):
            images = images[:, :1]  # more bands than a PNG holds: show the first
        with self.writing(f"images/{path.name}"):
            save_image(images, path, nrow=1, padding=1, pad_value=1.0)

        def show(tracker) -> None:
            if tracker.name == "tensorboard":
                tracker.writer.add_images(name, images, step)
            elif hasattr(tracker, "log_images"):
                tracker.log_images({name: [np.asarray(Image.open(path))]}, step=step)

        self._track(show)
        return path

    def _track(self, tell: Callable[[Any], None]) -> None:
        """Tell the trackers. One that fails, as a server out of reach, is left out from then on."""
        for tracker in list(self._trackers):
            try:
                tell(tracker)
            except Exception as error:  # anything that a tracker's client may raise
                self._trackers.remove(tracker)
                print(f"\nThe tracker {tracker.name} failed and is left out: {error}", flush=True)

    def count_skipped(self, names: Iterable[str]) -> None:
        """Remember images that could not be read; the first ten are shown."""
        for name in names:
            if name not in self.skipped and len(self.skipped) < 10:
                print(f"\nskipped: {name}", flush=True)
            self.skipped.add(name)

    def _start_trackers(self, names: tuple[str, ...]) -> None:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        for name in _check_trackers(names):
            kind = LOGGER_TYPE_TO_CLASS[name]
            where = [str(self.folder)] if kind.requires_logging_directory else []
            tracker = kind("trackers" if where else "vim_ssl", *where)
            tracker.start()
            self._trackers.append(tracker)

    def close(self) -> None:
        self.release()
        for tracker in self._trackers:
            tracker.finish()


def _check_trackers(names: tuple[str, ...]) -> list[str]:
    """Those to start. Raises: ValueError for an unknown name; ImportError for one that is not
    installed."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    from vim_ssl.utils.names import did_you_mean

    installed = [str(getattr(name, "value", name)) for name in get_available_trackers()]
    if names in (("auto",), ("none",)):
        return [name for name in installed if name == "tensorboard" and names == ("auto",)]
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            known = [*LOGGER_TYPE_TO_CLASS, "auto", "none"]
            raise ValueError(f"trackers: unknown {name!r}. {did_you_mean(name, known)}")
        if name not in installed:
            raise ImportError(f"the tracker {name!r} is not installed; install it with pip.")
    return list(names)


def stored_or(default):
    """For `vim_ssl.utils.config.parse`: a resumed run's own settings, else the default preset.

    With ``eval_only`` of a run: how it held images out, since another draw of the same data would
    judge by images that it has learned from.
    """

    def choose(given: dict):
        if given.get("resume") == "auto":
            if not given.get("output"):
                raise ValueError("--resume auto needs --output RUN: which run is to go on?")
            if (stored := _stored_config(Path(given["output"]))) is not None:
                once = {"recipe", "output", "resume", "max_steps"}
                return {key: value for key, value in stored.items() if key not in once}
        if given.get("eval_only") and given.get("encoder"):
            stored = _stored_config(Path(given["encoder"])) or {}
            if drawn := {key: stored[key] for key in ("test", "seed") if key in stored}:
                return drawn
        return default(given) if callable(default) else default

    return choose


def _stored_config(folder: Path) -> dict | None:
    record = folder / "config.json"
    if not record.is_file():
        return None
    try:
        return json.loads(record.read_text())
    except ValueError as error:
        raise ValueError(f"{record} is broken: {error}. Choose another --output.") from error


def newest_run(root: Path = RUNS, recipe: str = "pretrain") -> Path:
    """The run under ``root`` whose model was written last, of recipes that end in ``recipe``: an
    encoder, or the model of clip_pretrain where that is asked for.

    Raises: FileNotFoundError if there is none.
    """
    model, wanted, script = "encoder", "with an encoder", "mim_pretrain"
    if recipe == "clip_pretrain":  # whose encoder may be timm's, and in the model's file
        model, wanted, script = "clip", "of clip_pretrain, with images and texts,", recipe
    found = [
        path
        for path in root.glob(f"*/{model}.safetensors")
        if (_stored_config(path.parent) or {}).get("recipe", "").endswith(recipe)
    ]
    found.sort(key=lambda path: path.stat().st_mtime)
    if not found:
        raise FileNotFoundError(
            f"No run {wanted} under {root.resolve()}; train one with "
            f"`accelerate launch recipes/{script}.py`, or name one."
        )
    return found[-1].parent


def trained_on(source: str | Path, *keys: str) -> str:
    """The data spec a run was trained on; with ``keys``, the first of these settings it has.

    Raises: ValueError if ``source`` is no run directory, or its run does not say.
    """
    stored = _stored_config(Path(source)) or {}
    spec = next(filter(None, map(stored.get, keys or ("data",))), None)
    if not spec:
        raise ValueError(
            f"{source} does not say which images it was trained on; give labelled ones by --data."
        )
    return spec


def task_folder(task: str, source: str | Path, data: str) -> Path:
    """Where a task on an encoder writes by default: in its run; on other data than the run's own
    beside that, by name; for a preset or Hub id under ``runs/``."""
    slug = "-" + re.sub(r"\W+", "-", data).strip("-") if data else ""
    folder = Path(source)
    if folder.is_file():
        folder = folder.parent
    if folder.is_dir():
        return folder / f"{task}{slug}"
    return RUNS / f"{task}-{folder.name}{slug}"


def evaluation_folder(output: str = "") -> Path:
    """Where a model is judged as it is: ``output``, or a folder under ``runs/`` named by the time.

    It is made if it is not there.
    """
    folder = Path(output) if output else RUNS / f"evaluation-{time.strftime('%Y%m%d-%H%M%S')}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def read_metrics(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def _step(line: str) -> int:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):  # cut off by a kill in the middle of writing
        return 2**62


def _reason(error: BaseException, folder: Path) -> str:
    """The system's words for why a write in ``folder`` failed."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.strerror:
            return seen.strerror
        seen = seen.__cause__ or seen.__context__
    try:  # torch has dropped them: ask for them again
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(2**20))
    except OSError as again:
        return again.strerror or str(again)
    return " ".join(str(error).split())[:200]


def _plain(config) -> dict:
    from vim_ssl.utils.config import to_dict

    return to_dict(config)
