"""The run directory.

config.json  metrics.jsonl  checkpoints/step-N/  encoder.safetensors + encoder.json
images/      report.html    trackers/ (of TensorBoard and others)
"""

import io
import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from vim_ssl.data.spec import same_data, sets_of
from vim_ssl.training.checkpoint import Checkpoints
from vim_ssl.training.folders import RUNS as RUNS
from vim_ssl.training.folders import check_writable, new_folder
from vim_ssl.training.folders import evaluation_folder as evaluation_folder
from vim_ssl.training.folders import task_folder as task_folder
from vim_ssl.training.resume import DATA, PATHS, check_settings, located
from vim_ssl.training.state import ENDED, LOCK, StateFile, read_state, recorded, state_of
from vim_ssl.utils.config import to_dict
from vim_ssl.utils.environment import is_main_rank
from vim_ssl.utils.files import atomic_write, read_object, reading, writable
from vim_ssl.utils.names import did_you_mean


class Run(Checkpoints):
    """A directory that one training writes. Only the main process writes shared files."""

    def __init__(self, folder: Path, main: bool = True):
        super().__init__(folder, main)
        self.state = StateFile(self.folder, main)
        self.recipe = ""
        self._gathered: set[str] = set()  # of `skipped`: those that every process knows
        self._trackers: list[Any] = []
        self._lock: Any = None
        # The settings of this call with the recipe, and those that the folder had.
        self.record: dict[str, Any] = {}
        self.stored: dict[str, Any] = {}

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
        name = config.output
        if not name and accelerator.is_main_process:
            name = str(new_folder(recipe))
        (name,) = broadcast_object_list([name])
        run = cls(Path(name), accelerator.is_main_process)
        run.recipe, run.record = recipe, {"recipe": recipe, **to_dict(config)}
        if run.checkpoints() and config.resume != "auto":
            raise FileExistsError(
                f"{run.folder} already holds a run; go on with --resume auto, or choose another "
                "--output."
            )
        if run.folder.is_dir() and not run._is_new():
            run._check_same(name)
            if not run.checkpoints() and run._has_model():
                raise FileExistsError(
                    f"{run.folder} contains a trained model, but no checkpoint to resume from; it "
                    "is not overwritten. Choose another --output."
                )
        accelerator.wait_for_everyone()
        if run.main:
            with writable(run.folder):
                run._create_folders(name)
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
            check_writable(folder)
        for partial in (self.folder / "checkpoints").glob("partial-*"):  # of a killed save
            shutil.rmtree(partial)

    def _is_new(self) -> bool:
        """True if nothing but empty folders was created, as on a disk that was full."""
        made = {"checkpoints", "images"}
        return all(
            path.name == LOCK or (path.name in made and path.is_dir() and not any(path.iterdir()))
            for path in self.folder.iterdir()
        )

    def _has_model(self) -> bool:
        """True if weights of a training are there, other than those of a first, failed save."""
        models = [*self.folder.glob("*.safetensors"), *self.folder.glob("metrics.json")]
        return bool(models) and read_state(self.folder).get("step") != 0

    def _check_same(self, name: str) -> None:
        """Refuse a folder with other content, and settings that would change the run's steps."""
        stored = _stored_config(self.folder)
        if stored is None or "recipe" not in stored:  # other programs write config.json too
            raise FileExistsError(f"{name} holds files, but no run; choose another --output.")
        if self.checkpoints():
            self.stored = stored
            known = recorded(self.folder, "depends_on")
            known |= {DATA: self.progress().get("data", "")}
            check_settings(name, stored, self.record, known)

    def write_config(self) -> None:
        """Write config.json; when resuming, after `resume` has checked that the model fits."""
        if self.main and self.record:
            with self.writing("config.json"):
                atomic_write(self.folder / "config.json", json.dumps(self.record, indent=2) + "\n")

    # ---------------------------------------------------------------- metrics and images

    def log(self, progress, epoch: float, metrics: dict[str, float]) -> None:
        """Append one line to metrics.jsonl, and log it to the trackers."""
        if not self.main:
            return
        row = {"step": progress.step, "epoch": round(epoch, 4), **metrics}
        row |= {"seconds": round(progress.seconds, 2), "samples": progress.samples}
        row |= {"bad_steps": progress.bad_steps, "skipped": len(self.skipped)}
        path = self.folder / "metrics.jsonl"
        with self.writing("metrics.jsonl"), path.open("a", encoding="utf-8") as file:
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
        """Count images that could not be read, by name; the main process prints the first ten."""
        for name in names:
            if self.main and name not in self.skipped and len(self.skipped) < 10:
                print(f"\nskipped: {name}", flush=True)
            self.skipped.add(name)

    def gather_skipped(self, accelerator) -> None:
        """Count those of all processes, which all have to call this."""
        from accelerate.utils import gather_object

        if accelerator.num_processes > 1:
            self.count_skipped(gather_object(sorted(self.skipped - self._gathered)))
            self._gathered = set(self.skipped)

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
                began = read_state(given["output"]).get("folder", "")
                return {
                    key: located(value, began) if key in PATHS else value
                    for key, value in stored.items()
                    if key not in once
                }
        if given.get("eval_only") and given.get("encoder"):
            source = Path(given["encoder"])
            stored = _stored_config(source.parent if source.is_file() else source) or {}
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


def _stored_config(folder: Path) -> dict[str, Any] | None:
    record = folder / "config.json"
    if not record.is_file():
        return None
    return read_object(record, "the settings of a run", "restore it, or choose another --output")


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
        if _recipe_of(path.parent).endswith(recipe)
    ]
    if not paths:
        raise FileNotFoundError(
            f"No run {what} under {root.resolve()}; train one with "
            f"`accelerate launch recipes/{script}.py`, or name one."
        )
    return newest_of(paths)


def _recipe_of(folder: Path) -> str:
    """The recipe of a run; "" for other folders, and for a damaged one."""
    try:
        return str((_stored_config(folder) or {}).get("recipe", ""))
    except (ValueError, OSError):
        return ""


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
    progress = Run(folder).progress()
    total = round(progress.get("epoch_steps", 0) * stored.get("epochs", 0))
    total = min(total, stored.get("max_steps") or total)
    step = progress.get("step", total)
    return f"step {step:,} of {total:,}" if step < total else ""


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


def read_metrics(folder: str | os.PathLike) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl. A last line that a kill has cut off is left out.

    Raises: FileNotFoundError; ValueError, naming the line, for other content.
    """
    path, rows = Path(folder) / "metrics.jsonl", []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line or (number == len(lines) and not line.endswith(b"}")):
            continue
        with reading(f"{path}, line {number},", "a row of metrics", "delete that line"):
            row = json.loads(line.decode())
            if not isinstance(row, dict):
                raise ValueError(f"it is a {type(row).__name__}")
            rows.append(row)
    return rows
