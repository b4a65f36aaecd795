"""Training steps of recipe presets through the trainer, also beside other work (`cpu.py`)."""

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import numpy as np
from turns import Values

from vim_ssl import register_data
from vim_ssl.data import open_data
from vim_ssl.recipes import mim_pretrain
from vim_ssl.training.accelerator import make_accelerator
from vim_ssl.training.config import NEVER
from vim_ssl.training.loop import fit
from vim_ssl.training.run import Run

WARM_UP = 3  # steps that are not counted: they compile and allocate
STEPS = 400  # at most


class TimeIsUpError(Exception):
    """Ends a training after the seconds to measure."""


def training_steps(
    preset: str, threads: int, seconds: float, clock: Callable[[], float], **changes
) -> tuple[list[float], int]:
    """Train a preset of mim_pretrain on random images for ``seconds`` of ``clock``.

    Args:
        changes: settings that replace those of the preset.
    Returns: the duration of each step, data loading included, and the images in a step.
    """
    config = mim_pretrain.PRESETS[preset]()
    config = replace(config, threads=threads, workers=0, epochs=STEPS, max_steps=STEPS,
                     eval_every=NEVER, trackers=("none",), **changes)  # fmt: skip
    encoder = mim_pretrain.build_model(config)
    side, channels = encoder.data_config["input_size"][-1], encoder.in_chans
    rng = np.random.default_rng(0)
    shape = (4 * config.batch_size, side, side, *([channels] if channels > 1 else []))
    images = rng.integers(0, 256, shape).astype(np.uint8)
    data = open_data(register_data(list(images)))
    moments: list[float] = []

    def note(module, _) -> None:
        if not module.training:
            return  # the evaluation after the last step
        moments.append(clock())
        if len(moments) > WARM_UP + 2 and moments[-1] - moments[WARM_UP] > seconds:
            raise TimeIsUpError

    with tempfile.TemporaryDirectory() as folder:
        config = replace(config, output=folder + "/run")
        accelerator = make_accelerator(config)
        objective = mim_pretrain.build_objective(config, encoder).train()
        objective.register_forward_pre_hook(note)
        _, samples = mim_pretrain.build_data(config, encoder, data)
        run = Run.open("mim_pretrain", config, accelerator)
        try:
            fit(objective, samples, config, run, accelerator)
        except TimeIsUpError:
            pass
        finally:
            run.close()
    steps = [after - before for before, after in pairwise(moments[WARM_UP:])]
    return steps, config.batch_size


def images_per_second(preset: str, threads: int, seconds: float) -> Values:
    """Measure the speed of a training by the clock."""
    steps, batch = training_steps(preset, threads, seconds, time.perf_counter)
    return {"speed": (round(batch * len(steps) / sum(steps), 1), "images/s")}


def step_seconds(preset: str, seconds: float) -> Values:
    """Measure the CPU time of a step of a training on one thread."""
    steps, _ = training_steps(preset, 1, seconds, time.process_time)
    return {"step": (round(1e3 * statistics.median(steps), 2), "ms")}
