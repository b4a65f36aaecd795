"""The run directory.

config.json  metrics.jsonl  checkpoints/step-N/  encoder.safetensors + encoder.json
images/      report.html    trackers/ (of TensorBoard and others)
"""

import io
import json
import re
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from vim_ssl.data.spec import same_data, sets_of
from vim_ssl.training.checkpoint import Checkpoints
from vim_ssl.training.state import ENDED, LOCK, StateFile, state_of
from vim_ssl.utils.config import to_dict
from vim_ssl.utils.environment import is_main_rank
from vim_ssl.utils.files import atomic_write
from vim_ssl.utils.names import did_you_mean

RUNS = Path("runs")
# Settings that may differ when a run is resumed: they change no step (compile: its rounding), or
# only the length of the run.
FREE_TO_CHANGE = {
    "recipe", "preset", "output", "resume", "epochs", "workers", "threads", "log_every",
    "eval_every", "save_every", "save_steps", "keep_checkpoints", "max_steps", "max_bad_steps",
    "trackers", "compile", "grad_checkpointing",
}  # fmt: skip


class Run(Checkpoints):
    """A directory that one training writes. Only the main process writes shared files."""

    def __init__(self, folder: Path, main: bool = True):
        super().__init__(folder, main)
        self.state = StateFile(self.folder, main)
        self.recipe = ""
        self.skipped: set[str] = set()
        self._trackers: list[Any] = []
        self._lock: Any = None
        self._record: dict = {}

    @classmethod
    def open(cls, recipe: str, config, accelerator) -> "Run":
        """Create the directory ``config.output``, or open the run there with ``config.resume``.

        Raises: FileExistsError for a directory with other content, or with a run when ``resume`` is
            "never"; ValueError for settings that differ from those of the run, and an unknown
            tracker; ImportError for one that is not installed; BlockingIOError while another
            process trains there; OSError if nothing can be written.
        """
        from accelerate.utils import broadcast_object_list

        _check_trackers(config.trackers)
        name = config.output or str(_new_folder(recipe))
        (name,) = broadcast_object_list([name])
        run = cls(Path(name), accelerator.is_main_process)
        run.recipe, run._record = recipe, {"recipe": recipe, **to_dict(config)}
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
                run._create_folders(name)
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

    def _create_folders(self, name: str) -> None:
        """Create the folders, lock them until `close`, and check that they can be written."""
        from filelock import FileLock, Timeout

        folders = [self.folder, self.folder / "checkpoints", self.folder / "images"]
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.folder / LOCK)  # released by the system after a kill
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise BlockingIOError(
                f"another process is training in {name}; wait for it, or choose another --output."
            ) from None
        for folder in folders:
            with tempfile.TemporaryFile(dir=folder) as probe:
                probe.write(b"1")
        for partial in (self.folder / "checkpoints").glob("partial-*"):  # of a killed save
            shutil.rmtree(partial)

    def _is_new(self) -> bool:
        """True if nothing but empty folders was created, as on a disk that was full."""
        made = {"checkpoints", "images"}
        return all(
            path.name == LOCK or (path.name in made and path.is_dir() and not any(path.iterdir()))
            for path in self.folder.iterdir()
        )

    def _check_same(self, name: str) -> None:
        """Refuse a folder with other content, and settings that would change the run's steps."""
        stored = _stored_config(self.folder)
        if stored is None or "recipe" not in stored:  # other programs write config.json too
            raise FileExistsError(f"{name} holds files, but no run; choose another --output.")
        if not self.checkpoints():
            return
        for key in stored.keys() & self._record.keys() - FREE_TO_CHANGE:
            if stored[key] != self._record[key]:
                raise ValueError(
                    f"{name} was trained with {key} = {stored[key]!r}, not {self._record[key]!r}; "
                    "resume without that flag and --preset, or start anew in another --output."
                )

    def write_config(self) -> None:
        """Write config.json; when resuming, after `resume` has checked that the model fits."""
        if self.main and self._record:
            with self.writing("config.json"):
                atomic_write(self.folder / "config.json", json.dumps(self._record, indent=2) + "\n")

    # ---------------------------------------------------------------- metrics and images

    def log(self, progress, epoch: float, metrics: dict[str, float]) -> None:
        """Append one line to metrics.jsonl, and log it to the trackers."""
        if not self.main:
            return
        row = {"step": progress.step, "epoch": round(epoch, 4), **metrics}
        row |= {"seconds": round(progress.seconds, 2), "samples": progress.samples}
        row |= {"bad_steps": progress.bad_steps, "skipped": len(self.skipped)}
        with self.writing("metrics.jsonl"), open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
        self._track(lambda tracker: tracker.log(metrics, step=progress.step))

    def save_images(self, name: str, step: int, images: Tensor) -> Path:
        """Write images (n, c, h, w) in [0, 1] as images/NAME-STEP.png, one row per sample."""
        from torchvision.utils import save_image

        path, png = self.folder / "images" / f"{name}-{step:07d}.png", io.BytesIO()
        if images.shape[1] not in (1, 3):
            images = images[:, :1]  # a PNG holds no other number of bands: save the first
        save_image(images, png, "png", nrow=1, padding=1, pad_value=1.0)
        with self.writing(f"images/{path.name}"):
            atomic_write(path, png.getvalue())

        def log_images(tracker) -> None:
            if tracker.name == "tensorboard":
                tracker.writer.add_images(name, images, step)
            elif hasattr(tracker, "log_images"):
                tracker.log_images({name: [np.asarray(Image.open(path))]}, step=step)

        self._track(log_images)
        return path

    def _track(self, log: Callable[[Any], None]) -> None:
        """Call ``log`` for each tracker; one that fails, as without a network, is dropped."""
        for tracker in list(self._trackers):
            try:
                log(tracker)
            except Exception as error:  # anything that a tracker's client may raise
                self._trackers.remove(tracker)
                print(f"\nThe tracker {tracker.name} failed and is dropped: {error}", flush=True)

    def count_skipped(self, names: Iterable[str]) -> None:
        """Count images that could not be read, by name; the first ten are printed."""
        for name in names:
            if name not in self.skipped and len(self.skipped) < 10:
                print(f"\nskipped: {name}", flush=True)
            self.skipped.add(name)

    def _start_trackers(self, names: tuple[str, ...]) -> None:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        for name in _check_trackers(names):
            tracker_class = LOGGER_TYPE_TO_CLASS[name]
            folder = [str(self.folder)] if tracker_class.requires_logging_directory else []
            tracker = tracker_class("trackers" if folder else "vim_ssl", *folder)
            tracker.start()
            self._trackers.append(tracker)

    def close(self) -> None:
        """Unlock the directory and finish the trackers."""
        if self._lock:
            self._lock.release()
        for tracker in self._trackers:
            tracker.finish()


def _check_trackers(names: tuple[str, ...]) -> list[str]:
    """The trackers to start. Raises: ValueError for an unknown one; ImportError for one that is not
    installed."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

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
    """For `vim_ssl.utils.config.parse`: the settings of the run to resume, else ``default``.

    With ``eval_only``, those by which the run held images out: another draw would test on images
    that it was trained on.
    """

    def choose(given: dict):
        if given.get("resume") == "auto":
            if not given.get("output"):
                raise ValueError("--resume auto needs --output RUN, the run to resume.")
            if (stored := _stored_config(Path(given["output"]))) is not None:
                once = {"recipe", "output", "resume", "max_steps"}
                return {key: value for key, value in stored.items() if key not in once}
        if given.get("eval_only") and given.get("encoder"):
            stored = _stored_config(Path(given["encoder"])) or {}
            if held_out := {key: stored[key] for key in ("test", "seed") if key in stored}:
                return held_out
        return default(given) if callable(default) else default

    return choose


def resume_command(run: Run, processes: int = 1) -> str:
    """The command that resumes a run; for several ``processes`` its launcher's options are open."""
    script, rest = sys.argv[0], f"--output {shlex.quote(str(run.folder))} --resume auto"
    command = f"vim-ssl {run.recipe.replace('_', '-')}"
    if Path(script).name == f"{run.recipe}.py":
        command = f"python {shlex.quote(script)}"
    if processes > 1:
        command = f"accelerate launch (options as before) {command.removeprefix('python ')}"
    return f"{command} {rest}"


def _stored_config(folder: Path) -> dict | None:
    record = folder / "config.json"
    if not record.is_file():
        return None
    try:
        return json.loads(record.read_text())
    except ValueError as error:
        raise ValueError(f"{record} is broken: {error}. Choose another --output.") from error


def newest_run(root: Path = RUNS, recipe: str = "pretrain") -> Path:
    """The run under ``root`` whose encoder was written last, of recipes that end in ``recipe``;
    for "clip_pretrain" the run whose image-text model was. If it is unfinished, this is printed.

    Raises: FileNotFoundError if there is none.
    """
    model, what, script = "encoder", "with an encoder", "mim_pretrain"
    if recipe == "clip_pretrain":  # its encoder may be timm's, without a file of its own
        model, what, script = "clip", "of clip_pretrain", recipe
    paths = [
        path
        for path in root.glob(f"*/{model}.safetensors")
        if (_stored_config(path.parent) or {}).get("recipe", "").endswith(recipe)
    ]
    if not paths:
        raise FileNotFoundError(
            f"No run {what} under {root.resolve()}; train one with "
            f"`accelerate launch recipes/{script}.py`, or name one."
        )
    return newest_of(paths)


def newest_of(files: Iterable[Path]) -> Path:
    """Return the run of the file that was written last. If it is unfinished, this is printed."""
    newest = max(files, key=lambda path: path.stat().st_mtime).parent
    if (state := unfinished(newest)) and is_main_rank():
        print(f"The newest run, {newest}, is unfinished: {state}.", flush=True)
    return newest


def unfinished(folder: Path) -> str:
    """Describe how far an unfinished run got ("step 40 of 400"); "" for a finished run, and if this
    is unknown."""
    if state := state_of(folder):
        return "" if state.name in ENDED else str(state)
    stored, checkpoints = _stored_config(folder) or {}, Run(folder).checkpoints()
    if not checkpoints or (folder / "metrics.json").exists():
        return ""
    progress = json.loads((checkpoints[-1] / "progress.json").read_text())
    total = round(progress.get("epoch_steps", 0) * stored.get("epochs", 0))
    total = min(total, stored.get("max_steps") or total)
    return f"step {progress['step']:,} of {total:,}" if progress["step"] < total else ""


def trained_on(source: str | Path, *keys: str) -> str:
    """The data spec of a run, or the first of its settings ``keys`` that is not empty.

    Raises: ValueError if ``source`` is no run directory, or has no such setting.
    """
    stored = _stored_config(Path(source)) or {}
    spec = next(filter(None, map(stored.get, keys or ("data",))), None)
    if not spec:
        raise ValueError(
            f"{source} does not say which images it was trained on; give labelled ones by --data."
        )
    return spec


def pretrained_on(source: str | Path, spec: str, split: str) -> bool:
    """True if the run in ``source`` was pretrained without labels on test images.

    Args:
        spec: the data that are tested on; "" for those of the run.
        split: their split, or "held out" for images drawn from data without splits.
    """
    stored = _stored_config(Path(source)) or {}
    trained = stored.get("data", "")
    if stored.get("recipe") not in ("mim_pretrain", "clip_pretrain") or not trained:
        return False
    if not same_data(trained, spec or trained):
        return False
    return split == "held out" or any(one.split in (split, "all") for _, one in sets_of(trained))


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


def evaluation_folder(output: str = "") -> Path:
    """The folder for an evaluation without training: ``output``, or one under ``runs/`` named by
    the time. It is created if needed."""
    folder = Path(output) if output else _new_folder("evaluation")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _new_folder(name: str) -> Path:
    """A folder under ``runs/`` named by the time, which does not exist."""
    first = folder = RUNS / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    number = 1
    while folder.exists():  # of the same second
        number += 1
        folder = first.with_name(f"{first.name}-{number}")
    return folder


def read_metrics(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
