"""What a resumed run must have in common with its beginning.

Settings that change a step have to be the same. A setting that names a path (data, a teacher …)
may name another one with the same content: paths are compared by hashes, which the run recorded
in its checkpoints (the data) and in state.json (everything else outside the checkpoint).
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vim_ssl.training.schedule import Progress, Schedule
from vim_ssl.training.state import recorded
from vim_ssl.utils.environment import environment
from vim_ssl.utils.names import number

# Settings that may differ when a run is resumed: they change no step (compile: its rounding), or
# only the length of the run.
FREE_TO_CHANGE = {
    "recipe", "preset", "output", "resume", "epochs", "workers", "threads", "log_every",
    "eval_every", "save_every", "save_steps", "keep_checkpoints", "max_steps", "max_bad_steps",
    "trackers", "compile", "grad_checkpointing",
}  # fmt: skip
# Setting that names a path → what is recorded of its content.
DATA = "data"
PATHS = {
    "data": DATA, "features": DATA, "encoder": "encoder", "teacher": "teacher", "text": "text",
    "tokenizer": "tokenizer", "val": "validation data", "test_features": "test data",
}  # fmt: skip
# No step depends on these: a change is reported, not refused.
REPORTED = {
    "encoder": "The encoder that the run started from has other weights now; the run continues "
    "with those of its checkpoint.",
    "validation data": "The validation data have changed since the run began; their metrics before "
    "and after this step are not comparable.",
    "test data": "The test data have changed since the run began.",
}
_LOCATION = re.compile(r"(?:\d+ \* )?(?:[a-z]\w*:)?([^?]+)")


def check_settings(
    name: str, stored: Mapping[str, Any], now: Mapping[str, Any], known: Mapping[str, str]
) -> None:
    """Refuse settings that would change the steps of a run.

    Args:
        name: the run, for messages.
        stored, now: its settings, and those of this call.
        known: hashes of what its paths contained; a path without one has to keep its name.
    Raises: ValueError.
    """
    for key in stored.keys() & now.keys() - FREE_TO_CHANGE:
        if stored[key] == now[key] or known.get(PATHS.get(key, "")):
            continue
        if key in ("encoder", "data") and not stored[key]:
            continue  # runs of earlier versions did not record which default they chose
        raise ValueError(
            f"{name} was trained with {key} = {stored[key]!r}, not {now[key]!r}; "
            "resume without that flag and --preset, or start anew in another --output."
        )


def check_dependencies(
    folder: Path, stored: Mapping[str, Any], now: Mapping[str, Any], depends_on: Mapping[str, str]
) -> list[str]:
    """Compare what a run depends on outside its checkpoint with what it recorded in ``folder``.

    Args:
        stored, now: its settings, and those of this call.
        depends_on: content → hash, of this call.
    Returns: sentences about changes that make no difference to a step.
    Raises: ValueError for other changes.
    """
    remarks = []
    for what, before in recorded(folder, "depends_on").items():
        keys = [key for key, content in PATHS.items() if content == what]
        renamed = [key for key in keys if stored.get(key) != now.get(key)]
        after = depends_on.get(what, "")
        if after == before or not (after or renamed):
            continue
        if what == "versions":
            remarks.append(f"The run began with {before}; now {after}.")
        elif what in REPORTED and not renamed:
            remarks.append(REPORTED[what])
        else:
            named = f" ({now[keys[0]]})" if keys and now.get(keys[0]) else ""
            raise ValueError(
                f"the {what}{named} is not that of the run in {folder}: its content has changed. "
                f"Resume with the {what} of its beginning, or start a new run in another --output."
            )
    return remarks


def outside(objective: Any, model: Any, given: Mapping[str, str]) -> dict[str, str]:
    """Return hashes of what a run depends on outside its checkpoint and its data.

    Args:
        objective: its method ``dependencies() -> {what: hash}``, if it has one, adds further ones,
            such as a frozen teacher.
        model: its encoder's ``data_config`` determines the pixels that it reads.
        given: those that the caller knows.
    """
    encoder = getattr(model, "encoder", None) or model
    needed = dict(given) | getattr(objective, "dependencies", dict)()
    if config := getattr(encoder, "data_config", None):
        needed["input of the encoder"] = _text(config)
    return needed | {"versions": environment()["versions"]}


def _text(value: Any) -> str:
    """Write a value with numbers of six digits, because statistics of data differ in rounding."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_text(value[key])}" for key in sorted(value))
    if isinstance(value, list | tuple):
        return f"({' '.join(map(_text, value))})"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def begin(
    run: Any, accelerator: Any, schedule: Schedule, depends_on: Mapping[str, str], rate: Any
) -> Progress:
    """Load the newest checkpoint of a run, if there is one, check that it fits, and record the
    plan.

    Args:
        rate: ``rate(step) -> (before, after)``: the learning rates of the last and the next step.
    Raises: ValueError if the checkpoint was made with other data, batches, models or content.
    """
    progress = Progress()
    remarks = []
    if run.checkpoints():
        remarks = check_dependencies(run.folder, run.stored, run.record, depends_on)
    run.resume(accelerator, progress)
    if remark := schedule.check_resume(progress):
        remarks.append(remark)
    epochs, before = schedule.config.epochs, run.stored.get("epochs", schedule.config.epochs)
    if progress.step and epochs != before and progress.step < schedule.total_steps:
        last, following = rate(progress.step)
        remarks.append(
            f"The schedule has {epochs:g} epochs instead of {before:g}: the learning rate of the "
            f"next step is {number(following, 3)}, that of the last step was {number(last, 3)}."
        )
    if accelerator.is_main_process:
        for remark in remarks:
            print(remark, flush=True)
    # A change that was reported once is not reported again.
    kept = recorded(run.folder, "depends_on") if progress.step else {}
    run.write_config()
    run.state.begin(progress.step, schedule.total_steps, schedule.plan, kept | dict(depends_on))
    return progress


def located(value: Any, folder: str) -> Any:
    """Return a spec or path that a run stored, with each relative location that is not here but
    below ``folder``, where the run was started, as an absolute path."""
    if not isinstance(value, str) or not folder:
        return value
    parts = []
    for part in value.split(" + "):
        location = match[1] if (match := _LOCATION.match(part)) else ""
        if location and not os.path.isabs(location) and _is_there_only(location, folder):
            part = part.replace(location, os.path.normpath(os.path.join(folder, location)), 1)
        parts.append(part)
    return " + ".join(parts)


def _is_there_only(location: str, folder: str) -> bool:
    """True if a relative location exists below ``folder`` and not here. Of a pattern, and of a
    location that exists in neither, as much of its beginning is compared as exists."""
    names = location.split("/")
    for count in range(len(names), 0, -1):
        path = "/".join(names[:count])
        if os.path.exists(path):
            return False
        if os.path.exists(os.path.join(folder, path)):
            return True
    return False
