"""The settings in a run's report: model, training and run."""

from typing import Any

import numpy as np

from vim_ssl.report.record import Record, is_number
from vim_ssl.training.state import ENDED, RUNNING
from vim_ssl.utils.names import number


def settings(run: Record) -> dict[str, dict[str, Any]]:
    """Return the settings of each section as name -> value; skips None and ""."""
    config, encoder = run.config, run.encoder
    model: dict[str, Any] = {"Encoder": config.get("encoder")}
    if run.parameters:
        model["Parameters"] = f"{run.parameters:,}"
    if "timm" in encoder:
        model["Architecture"] = f"{encoder['timm']} of timm"
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
    training["Encoder"] = "Frozen" if config.get("frozen") else None
    if is_number(factor := config.get("lr_encoder")) and factor != 1:
        training["Learning rate of the encoder"] = f"{number(factor)} × that of the heads"
    if is_number(count := run.result.metrics.get("trained_parameters")):
        training["Trained parameters"] = f"{count:,}"
    health: dict[str, Any] = {
        "Non-finite steps": _largest(run, "bad_steps"),
        "Images skipped": _largest(run, "skipped"),
    }
    for key, value in run.made_by.items():
        if key not in ("recipe", "data", "classes", "figures", "config", "trainings"):
            health[key[:1].upper() + key[1:].replace("_", " ")] = _flat(value)
    health["vim_ssl"] = run.version
    return {
        title: {key: value for key, value in facts.items() if value not in (None, "")}
        for title, facts in (("Model", model), ("Training", training), ("Run", health))
    }


def planned_steps(run: Record) -> int:
    """Return the number of steps that the run plans.

    Of a run of an earlier version this follows from the settings, and is 0 until the log shows the
    length of an epoch.
    """
    if is_number(total := run.plan.get("total_steps")):
        return int(total)
    step, epoch, epochs = run.last("step"), run.last("epoch"), run.config.get("epochs")
    if not (step > 0 and epoch > 0 and is_number(epochs)):
        return 0
    planned = step / epoch * epochs
    limit = run.config.get("max_steps")
    planned = min(planned, limit) if is_number(limit) and limit else planned
    return round(planned) if is_number(planned) else 0


def is_finished(run: Record) -> bool:
    """True if all steps are done, or early stopping (``patience``) ended the run."""
    if run.state is not None:
        return run.state.name in ENDED
    planned = planned_steps(run)
    early = run.saved and run.config.get("patience")
    return bool(planned) and (run.last("step") >= planned or bool(early))


def state_text(run: Record) -> str:
    """Describe the state of a run, as it recorded it; of a run of an earlier version, as its log
    shows it."""
    if run.state is None:
        return "Finished" if is_finished(run) else "Still running, or stopped early"
    text = str(run.state)
    return "Still running" if run.state.name == RUNNING else text[:1].upper() + text[1:]


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
        image = {"Image": f"{height} × {width} px, {chans} channel" + "s" * (chans != 1)}
        if "timm" in encoder:  # its patches are known to timm
            return image
        rows, columns = (height - patch) // stride + 1, (width - patch) // stride + 1
    except (TypeError, ValueError, ZeroDivisionError):
        return {}
    overlap = f" every {stride} px" if stride != patch else ""
    return image | {
        "Patch": f"{patch} × {patch} px{overlap}",
        "Tokens": f"{rows} × {columns} = {rows * columns:,} per image",
    }


def _schedule(run: Record) -> dict[str, str]:
    """Describe batch, learning rate, epochs and steps."""
    facts = _planned(run) if run.plan else _logged(run)
    step, epoch, seconds = map(run.last, ("step", "epoch", "seconds"))
    if (planned := planned_steps(run)) and step > 0:
        if epoch > 0 and is_number(epochs := run.config.get("epochs")):
            facts["Epochs"] = f"{number(epoch, 3)} of {epochs}"
        facts["Steps"] = f"{step:,.0f} of {planned:,}"
    if seconds > 0:
        facts["Time"] = duration(seconds)
    return facts


def _planned(run: Record) -> dict[str, str]:
    """The numbers that the run recorded before its first step."""
    plan = {key: value for key, value in run.plan.items() if is_number(value)}
    facts = {}
    if (batch := plan.get("effective_batch")) is not None:
        facts["Effective batch"] = f"{batch:,}"
        if {"batch_size", "accumulation", "processes"} <= plan.keys():
            facts["Effective batch"] += _product(*map(plan.get, PRODUCT))
    if "peak_lr" in plan:
        facts["Peak learning rate"] = number(plan["peak_lr"])
    if "images" in plan:
        facts["Images"] = f"{plan['images']:,}"
        if left_out := plan.get("left_out"):
            facts["Images"] += f", {left_out:,} left out of each epoch"
    if "epoch_steps" in plan:
        facts["Steps per epoch"] = f"{plan['epoch_steps']:,}"
    return facts


PRODUCT = ("batch_size", "accumulation", "processes")


def _product(batch: Any, times: Any, processes: Any) -> str:
    return f" = {batch} × {times} (accumulation) × {processes} (processes)"


def _logged(run: Record) -> dict[str, str]:
    """The same of a run of an earlier version, from its log: the means over the steps."""
    config, facts = run.config, {}
    step, samples = run.last("step"), run.last("samples")
    batch, times = config.get("batch_size"), config.get("accumulation", 1)
    if isinstance(batch, int) and isinstance(times, int) and step > 0 and samples > 0:
        effective = round(min(samples / step, 1e15))
        processes, rest = divmod(effective, max(batch * times, 1))
        product = _product(batch, times, processes)
        facts["Effective batch"] = f"{effective:,}{'' if rest else product}"
        base, unit = config.get("base_lr"), config.get("lr_reference_batch")
        if is_number(base) and is_number(unit) and unit > 0:
            facts["Peak learning rate"] = number(base * effective / unit)
    return facts


def _flat(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_flat(v)}" for k, v in value.items())
    return ", ".join(map(_flat, value)) if isinstance(value, list) else str(value)
