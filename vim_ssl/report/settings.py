"""The settings in a run's report: model, training and run."""

from typing import Any

import numpy as np

from vim_ssl.report.record import Record, is_number
from vim_ssl.utils.names import number


def settings(run: Record) -> dict[str, dict[str, Any]]:
    """Return the settings of each section as name -> value; skips None and ""."""
    config, encoder = run.config, run.encoder
    model: dict[str, Any] = {"Encoder": config.get("encoder")}
    if run.parameters:
        model["Parameters"] = f"{run.parameters:,}"
    if "embed_dim" in encoder and "depth" in encoder:
        model["Blocks"] = f"{encoder['depth']}, width {encoder['embed_dim']}"
    if run.shape_known:
        model |= _grid(encoder)
    model["Objective"] = config.get("objective")
    if is_number(config.get("mask_ratio")):
        model["Masked"] = f"{100 * config['mask_ratio']:g} % of the patches"
    training = {"Recipe": config.get("recipe"), "Data": config.get("data"), **_schedule(run)}
    for key, title in (("optimizer", "Optimiser"), ("weight_decay", "Weight decay"),
                       ("precision", "Autocast"), ("seed", "Seed")):  # fmt: skip
        training[title] = config.get(key)
    health: dict[str, Any] = {
        "Non-finite steps": _largest(run, "bad_steps"),
        "Images skipped": _largest(run, "skipped"),
    }
    for key, value in run.made_by.items():
        if key not in ("recipe", "data", "classes", "figures", "config"):
            health[key[:1].upper() + key[1:].replace("_", " ")] = _flat(value)
    health["vim_ssl"] = run.version
    return {
        title: {key: value for key, value in facts.items() if value not in (None, "")}
        for title, facts in (("Model", model), ("Training", training), ("Run", health))
    }


def planned_steps(run: Record) -> int:
    """Return the number of steps in the settings; 0 until the log shows the length of an epoch."""
    step, epoch, epochs = run.last("step"), run.last("epoch"), run.config.get("epochs")
    if not (step > 0 and epoch > 0 and is_number(epochs)):
        return 0
    planned = round(step / epoch * epochs)
    limit = run.config.get("max_steps")
    return min(planned, int(limit)) if is_number(limit) and limit else planned


def is_finished(run: Record) -> bool:
    """True if all steps are done, or early stopping (``patience``) ended the run."""
    planned = planned_steps(run)
    early = run.saved and run.config.get("patience")
    return bool(planned) and (run.last("step") >= planned or bool(early))


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"


def _largest(run: Record, counter: str) -> str:
    """Return a counter's largest value, because a resumed run may have restarted it."""
    counts = run.log.get(counter, np.empty(0))
    counts = counts[np.isfinite(counts)]
    return f"{counts.max():,.0f}" if len(counts) else ""


def _grid(encoder: dict[str, Any]) -> dict[str, str]:
    """Describe image, patches and tokens, with the defaults of `VimEncoder`."""
    size, patch = encoder.get("img_size", 224), encoder.get("patch_size", 16)
    stride, chans = encoder.get("stride") or patch, encoder.get("in_chans", 3)
    try:
        height, width = size if isinstance(size, list | tuple) else (size, size)
        rows, columns = (height - patch) // stride + 1, (width - patch) // stride + 1
    except (TypeError, ValueError, ZeroDivisionError):
        return {}
    overlap = f" every {stride} px" if stride != patch else ""
    return {
        "Image": f"{height} × {width} px, {chans} channel" + "s" * (chans != 1),
        "Patch": f"{patch} × {patch} px{overlap}",
        "Tokens": f"{rows} × {columns} = {rows * columns:,} per image",
    }


def _schedule(run: Record) -> dict[str, str]:
    """Describe batch, learning rate, epochs and steps. The log gives the number of processes and
    the length of an epoch."""
    config, facts = run.config, {}
    step, epoch, samples, seconds = map(run.last, ("step", "epoch", "samples", "seconds"))
    batch, times = config.get("batch_size"), config.get("accumulation", 1)
    if isinstance(batch, int) and isinstance(times, int) and step > 0 and samples > 0:
        effective = round(samples / step)  # smaller than configured if there are few images
        processes, rest = divmod(effective, max(batch * times, 1))
        product = f" = {batch} × {times} (accumulation) × {processes} (processes)"
        facts["Effective batch"] = f"{effective:,}{'' if rest else product}"
        base, unit = config.get("base_lr"), config.get("lr_reference_batch")
        if is_number(base) and is_number(unit):
            facts["Peak learning rate"] = number(base * effective / unit)
    if planned := planned_steps(run):
        facts["Epochs"] = f"{number(epoch, 3)} of {config['epochs']}"
        facts["Steps"] = f"{step:,.0f} of {planned:,}"
    if seconds > 0:
        facts["Time"] = duration(seconds)
    return facts


def _flat(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_flat(v)}" for k, v in value.items())
    return ", ".join(map(_flat, value)) if isinstance(value, list) else str(value)
