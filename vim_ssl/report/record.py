"""Read the files that a run has written so far."""

import csv
import itertools
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from safetensors import SafetensorError, safe_open

from vim_ssl.checkpoints.identity import hashes_of_run
from vim_ssl.models.presets import PRESETS
from vim_ssl.training.state import recorded, state_of

# Metrics of an in-training check; in the logs of earlier versions every line repeats them until the
# next check.
EVALUATED = (
    "knn_top1", "linear_top1", "feature_std", "effective_rank",
    "image_to_text_r1", "text_to_image_r1",
)  # fmt: skip
CHECK_PREFIXES = ("val_", "test_")  # of the metrics of other in-training checks
# Folders with results, by the names that `vim_ssl.training.folders` gives: no copies such as
# "linear_probe (1)" or "linear_probe.bak".
PROBES, ZERO_SHOTS = re.compile(r"linear_probe(-[\w-]+)?"), re.compile(r"zero_shot(-[\w-]+)?")
LARGEST = 1e300  # further numbers are treated as damaged: their products are infinite
MAX_BYTES = 256 * 2**20  # of a file that is read whole
MAX_LINES = 50_000  # maximum number of log lines to parse, evenly spread
PREVIEWS = {"pictures": "preview"}  # prefix in earlier runs -> current prefix


class Evaluation:
    """What an evaluation wrote to its folder; absent or broken files give empty attributes.

    Attributes:
        metrics: metrics.json.
        classes: classes.csv, one dict per class.
        predictions: predictions.csv, one dict per image.
        examples: examples/examples.json; its files are in ``images``.
        stale: the run has other weights now than those that were evaluated.
    """

    stale = False

    def __init__(self, folder: Path):
        self.folder, self.images = folder, folder / "examples"
        self.metrics = read_json(folder / "metrics.json")
        self.classes = read_table(folder / "classes.csv") if self.metrics else []
        self.predictions = read_table(folder / "predictions.csv") if self.metrics else []
        self.examples = read_json(self.images / "examples.json") if self.metrics else {}

    def counts(self, train: str, test: str) -> str:
        """Text with the numbers of images, each after a comma."""
        text = ""
        for key, what in (("train", train), ("test", test)):
            if is_number(self.metrics.get(key)):
                text += f", {self.metrics[key]:,} {what}"
        if isinstance(skipped := self.metrics.get("skipped"), list) and skipped:
            text += f", {len(skipped):,} unreadable"
        return text


class Record:
    """The content of a run directory; absent or broken files give empty attributes.

    Args:
        folder: the run directory.
    Raises: FileNotFoundError if it contains neither config.json nor metrics.jsonl.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.name = folder.resolve().name
        if not any((folder / name).is_file() for name in ("config.json", "metrics.jsonl")):
            raise FileNotFoundError(
                f"{folder} is not a run directory (it has neither config.json nor metrics.jsonl); "
                "give the directory that a recipe printed as 'Run directory'."
            )
        self.config = read_json(folder / "config.json")
        self.state, self.plan = state_of(folder), recorded(folder, "plan")
        self.log = _read_log(folder / "metrics.jsonl")
        self.previews = _find_previews(folder / "images")
        # Sorting puts the data of the run first, other data by name.
        self.probes = [Evaluation(path) for path in _folders(folder, PROBES)]
        self.zero_shot = [Evaluation(path) for path in _folders(folder, ZERO_SHOTS)]
        self.result = Evaluation(folder)  # written at the end of supervised runs
        self.predictions = folder / "predictions.png"
        self._mark_stale()
        description = read_json(folder / "encoder.json")
        self.saved = bool(description)
        self.made_by = _as_dict(description.get("made_by"))
        self.version = description.get("vim_ssl")
        self.parameters = _count_parameters(folder / "encoder.safetensors")
        # Before the encoder is saved: its configured settings; {} if it started from a checkpoint.
        preset = PRESETS.get(str(self.config.get("encoder")))
        configured = {} if preset is None else preset | _as_dict(self.config.get("model_args"))
        self.encoder: dict[str, Any] = _as_dict(description.get("config")) or configured
        self.shape_known = self.saved or preset is not None

    def _mark_stale(self) -> None:
        """Compare the weights of every result with those that the run has now."""
        for whole, results in ((False, self.probes), (True, [self.result, *self.zero_shot])):
            hashed = [one for one in results if isinstance(one.metrics.get("weights"), str)]
            if not hashed:
                continue
            try:
                now = hashes_of_run(self.folder, whole)
            except (ValueError, OSError, SafetensorError):  # being written, or damaged
                continue
            for one in hashed:
                one.stale = bool(now) and one.metrics["weights"] not in now

    def missing(self) -> list[str]:
        """What an unfinished or damaged run lacks, for the reader of the page."""
        absent = []
        for name, content in (("config.json", self.config), ("metrics.jsonl", self.log)):
            if not content:
                state = "is empty or damaged" if (self.folder / name).is_file() else "is missing"
                absent.append(f"{name} {state}")
        if not self.saved:
            absent.append("the encoder has not been saved")
        for path in (self.folder / "metrics.json", *self.folder.glob("*/metrics.json")):
            if path.is_file() and not read_json(path):
                absent.append(f"{path.relative_to(self.folder)} is empty or damaged")
        return absent

    def last(self, name: str) -> float:
        """The newest finite value of a logged metric; NaN if there is none."""
        values = self.log.get(name, np.empty(0))
        finite = values[np.isfinite(values)]
        return float(finite[-1]) if len(finite) else math.nan

    def series(self, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Steps, epochs and values of a logged metric, each (n,); for those of an in-training
        check, one entry per check."""
        if name not in self.log:
            return (np.empty(0),) * 3
        values = self.log[name]
        rows = np.isfinite(values) if is_check(name) else np.ones(len(values), bool)
        if name in EVALUATED:
            marks = np.stack([np.nan_to_num(self.log[k]) for k in EVALUATED if k in self.log])
            rows[1:] &= (marks[:, 1:] != marks[:, :-1]).any(0)
        epochs = self.log.get("epoch", np.full(len(values), math.nan))
        return self.log["step"][rows], epochs[rows], values[rows]


def _folders(folder: Path, pattern: re.Pattern[str]) -> list[Path]:
    """The folders with a metrics.json whose names match, sorted."""
    names = (path.parent for path in folder.glob("*/metrics.json"))
    return sorted(path for path in names if pattern.fullmatch(path.name))


def is_number(value: Any) -> TypeGuard[float]:
    """True for finite numbers; False for bools and everything else."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return abs(value) <= LARGEST  # False for NaN; an int may be larger than any float


def is_check(name: str) -> bool:
    """True for a column of metrics.jsonl that an in-training check writes."""
    return name in EVALUATED or name.startswith(CHECK_PREFIXES)


def _as_dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} if it is absent, incomplete or something else."""
    try:
        if path.stat().st_size > MAX_BYTES:
            return {}
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # missing or incomplete
        return {}
    return content if isinstance(content, dict) else {}


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file that have as many cells as its header; [] if it is absent or
    broken."""
    try:
        if path.stat().st_size > MAX_BYTES:
            return []
        with path.open(newline="", encoding="utf-8") as file:
            rows: Iterable[dict] = csv.DictReader(file)
            return [row for row in rows if None not in row and None not in row.values()]
    except (OSError, ValueError, csv.Error):
        return []


def _read_log(path: Path) -> dict[str, np.ndarray]:
    """Read metrics.jsonl as columns (n,) float64, with NaN if a line lacks the key.

    Broken lines are skipped. In a long log, only every k-th line and the last two are read.
    """
    if not path.is_file():
        return {}
    with path.open("rb") as file:
        count = sum(1 for _ in file)
    stride, rows = math.ceil(count / MAX_LINES), []
    with path.open("rb") as file:
        for i, line in enumerate(file):
            if i % stride and i < count - 2:
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):  # incomplete: being written, or of a killed run
                continue
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                rows.append({k: _value(v) for k, v in row.items() if isinstance(v, int | float)})
    names = dict.fromkeys(itertools.chain.from_iterable(rows))
    return {name: np.array([row.get(name, math.nan) for row in rows], float) for name in names}


def _value(number: float) -> float:
    return number if is_number(number) or isinstance(number, bool) else math.nan


def _count_parameters(path: Path) -> int:
    """Number of values in a safetensors file, from its header; 0 without a complete file."""
    if not path.is_file():
        return 0
    try:
        with safe_open(path, "pt") as file:
            shapes = [file.get_slice(key).get_shape() for key in list(file.keys())]
    except (OSError, SafetensorError):
        return 0
    return sum(math.prod(shape) for shape in shapes)


def _find_previews(folder: Path) -> dict[str, list[tuple[int, Path]]]:
    """Find NAME-STEP.png files; return name -> [(step, path)], sorted by step."""
    previews: dict[str, list[tuple[int, Path]]] = {}
    for path in folder.glob("[!.]*-*.png"):
        name, _, step = path.stem.rpartition("-")
        if step.isdecimal():
            previews.setdefault(PREVIEWS.get(name, name), []).append((int(step), path))
    return {name: sorted(previews[name]) for name in sorted(previews)}
