"""Turn samples into optimiser steps: batches, epochs, learning rate, progress."""

import math
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from vim_ssl.data.content import content_hash
from vim_ssl.data.loading.indexed import SeededSamples, training_loader
from vim_ssl.training.config import TrainConfig
from vim_ssl.training.state import FINISHED, STOPPED_EARLY
from vim_ssl.utils.cores import affinity
from vim_ssl.utils.names import plural


@dataclass
class Progress:
    """Progress of a run, saved with every checkpoint; ``batch`` is the next micro-batch of the
    epoch.

    The counts refer to the same steps only if ``epoch_batches``, ``epoch_steps``, ``data`` (a
    fingerprint), ``content`` (see `content_hash`), ``readers`` (the order of a stream) and
    ``effective_batch`` are the same. Checkpoints of earlier versions have no ``processes``,
    ``effective_batch`` and ``content``.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    samples: int = 0
    seconds: float = 0.0
    bad_steps: int = 0
    bad_in_a_row: int = 0
    epoch_batches: int = 0
    epoch_steps: int = 0
    data: str = ""
    content: str = ""
    readers: str = ""
    processes: int = 0
    effective_batch: int = 0


def fitting_batch(size: int, batch: int) -> int:
    """Return ``batch``, or if an epoch of ``size`` samples would leave out more than 2 % of them, a
    smaller batch that leaves out fewer."""
    batch = min(batch, size)
    if size % batch <= 0.02 * size:
        return batch
    smaller = size // (size // batch + 1)
    return smaller if size % smaller < size % batch else batch


def _processes(count: int) -> str:
    return f"{count} process{'es' * (count != 1)}"


class Schedule:
    """Batches, epochs and steps of a run, and the peak learning rate of its effective batch.

    Args:
        order: name of the order of a stream (``Progress.readers``) that the run started with.
    """

    def __init__(self, samples: SeededSamples, config: TrainConfig, accelerator, order: str = ""):
        self.config, world = config, accelerator.num_processes
        self.processes, self.images = world, len(samples)
        # Limit the batch to the size of the data, so that a few images can be trained on.
        self.batch_size = max(min(config.batch_size, len(samples) // world), 1)
        # Not the container's quota: the order of a stream depends on the number of workers.
        self.workers = min(config.workers, affinity())
        self.batches = samples.batches(
            self.batch_size, rank=accelerator.process_index, world=world, workers=self.workers,
            order=order,
        )  # fmt: skip
        self.loader = training_loader(
            samples, self.batches, num_workers=self.workers,
            pin_memory=accelerator.device.type == "cuda",
        )  # fmt: skip
        self.waited = 0.0  # seconds spent waiting for batches
        self.epoch_batches = self.batches.batches_per_epoch
        self.readers = self.batches.readers
        self.accumulation = min(config.accumulation, self.epoch_batches)
        self.epoch_steps = math.ceil(self.epoch_batches / self.accumulation)
        self.scheduled_steps = self.total_steps = max(round(self.epoch_steps * config.epochs), 1)
        if config.max_steps:
            self.total_steps = min(self.total_steps, config.max_steps)
        # At least one step has the full rate: an epoch of few steps rounds to more.
        self.warmup_steps = min(
            round(self.epoch_steps * config.warmup_epochs), self.scheduled_steps - 1
        )
        self.fingerprint = getattr(samples.data, "fingerprint", "")
        self.content = content_hash(samples.data)
        self.effective_batch = self.batch_size * self.accumulation * world
        self.lr = config.base_lr * self.effective_batch / config.lr_reference_batch
        self.repeats = getattr(self.batches, "repeats", 1)
        self.left_out = self._left_out(len(samples), world)
        self.summary = f"{self._data_line(samples, world)}\n{self._steps_line(world)}"
        if self.lr < config.min_lr and accelerator.is_main_process:
            warnings.warn(
                f"the learning rate, {self.lr:.3g} for a batch of {self.effective_batch}, is below "
                f"min_lr {config.min_lr:g} and would increase in training; raise base_lr or the "
                "batch, or lower --min-lr.",
                stacklevel=2,
            )

    def _data_line(self, samples: SeededSamples, world: int) -> str:
        """Describe the training data and what an epoch leaves out."""
        data, count = samples.data, len(samples)
        kind = {"image": "images", "video": "videos"}.get(getattr(data, "kind", ""), "samples")
        line = f"Data {getattr(data, 'name', '')}: {count:,} {kind}".replace(" :", ":")
        if reasons := getattr(data, "left_out", {}):
            line += f" ({', '.join(f'{n:,} {reason}' for reason, n in reasons.items())})"
        if not (dropped := self.left_out):
            return line
        line += f"; {dropped:,} left out of each epoch, drawn anew: "
        if self.repeats > 1:
            return f"{line}an epoch has {self.repeats} copies of each of the others"
        line += "batches are whole"
        share = count // world
        if (batch := fitting_batch(share, self.batch_size)) == self.batch_size:
            return line
        rest = count - share // batch * batch * world
        return f"{line} (--batch-size {batch} leaves out {rest or 'none'})"

    def _left_out(self, count: int, world: int) -> int:
        """The number of different images, of ``count``, that an epoch does not draw."""
        return count - math.ceil(self.epoch_batches * self.batch_size * world / self.repeats)

    @property
    def plan(self) -> dict[str, Any]:
        """The numbers that the run trains with, for its records."""
        return {
            "batch_size": self.batch_size, "accumulation": self.accumulation,
            "processes": self.processes, "effective_batch": self.effective_batch,
            "peak_lr": self.lr, "epoch_steps": self.epoch_steps, "warmup_steps": self.warmup_steps,
            "scheduled_steps": self.scheduled_steps, "total_steps": self.total_steps,
            "images": self.images, "left_out": self.left_out, "workers": self.workers,
        }  # fmt: skip

    def _steps_line(self, world: int) -> str:
        """Describe steps, batch and learning rate."""
        config, batch = self.config, f"batch {self.batch_size}"
        if self.effective_batch != self.batch_size:
            batch += (
                f" x {self.accumulation} (accumulation) x {world} (processes) = "
                f"{self.effective_batch}"
            )
        lr = f"lr {config.base_lr:g}"
        if self.effective_batch != config.lr_reference_batch:
            lr += f" x {self.effective_batch}/{config.lr_reference_batch} = {self.lr:.3g}"
        epochs = f"{plural(config.epochs, 'epoch')} of {self.epoch_steps:,}"
        if self.total_steps < self.scheduled_steps:
            epochs = f"of {self.scheduled_steps:,} in {epochs}"
        warm_up = min(self.warmup_steps, self.total_steps)
        return (
            f"{plural(self.total_steps, 'step')} ({epochs}), {warm_up:,} of warm-up · {batch} · "
            f"{lr} · {plural(self.workers, 'worker')}"
        )

    def check_resume(self, progress: Progress) -> str:
        """Check that a checkpoint's counts refer to the same steps here; record the new values.

        Returns: a remark if the number of processes differs, with the same effective batch.
        Raises: ValueError for other data, batches or readers.
        """
        remark = ""
        if progress.epoch_batches:
            if progress.data != self.fingerprint:
                raise ValueError(
                    "The images are not those of the checkpoint: their names, sizes or labels "
                    "differ. Resume with the same data, or start a new run in another --output."
                )
            if progress.content and progress.content != self.content:
                raise ValueError(
                    "The images are not those of the checkpoint: their files have the same names, "
                    "sizes and labels, but another content. Restore them, or start a new run in "
                    "another --output."
                )
            self._check_batches(progress)
            if progress.processes not in (0, self.processes):
                remark = (
                    f"The run began with {_processes(progress.processes)}, now "
                    f"{self.processes}: the effective batch is the same, but drop path and dropout "
                    "draw other masks."
                )
        progress.data, progress.content = self.fingerprint, self.content
        progress.readers = self.readers
        progress.epoch_batches, progress.epoch_steps = self.epoch_batches, self.epoch_steps
        progress.processes, progress.effective_batch = self.processes, self.effective_batch
        return remark

    def _check_batches(self, progress: Progress) -> None:
        """Raise ValueError if the steps of a checkpoint had other batches or readers."""
        if progress.readers != self.readers:
            raise ValueError(
                "The checkpoint's data were read in the order of "
                f"{progress.readers or 'an index'}, now it would be that of "
                f"{self.readers or 'an index'}. Resume with the same data and batch_size x "
                "processes (a run of an earlier version: with as many processes and workers), or "
                "start a new run in another --output."
            )
        names = ("epoch_batches", "epoch_steps")
        before, now = ([getattr(source, name) for name in names] for source in (progress, self))
        if before == now and progress.effective_batch in (0, self.effective_batch):
            return
        steps = (
            f"An epoch of the checkpoint has {before[0]} batches in {before[1]} steps, now "
            f"{now[0]} in {now[1]}"
        )
        if progress.processes not in (0, self.processes):
            began = _processes(progress.processes)
            raise ValueError(
                f"The run began with {began}, now {self.processes}, and its effective batch was "
                f"{progress.effective_batch}, now {self.effective_batch}. Resume with {began} "
                f"(accelerate launch --num_processes {progress.processes} …), or start a new run "
                "in another --output."
            )
        raise ValueError(
            f"{steps}. Resume with the same data and the same number of processes, or start a new "
            "run in another --output."
        )

    def outcome(self, progress: Progress) -> tuple[str, str]:
        """Return the state of a run that has ended here, and its reason; see `StateFile`."""
        if progress.step >= self.total_steps:
            return FINISHED, ""
        patience = getattr(self.config, "patience", 0)
        return STOPPED_EARLY, f"no improvement in {patience} evaluations" if patience else ""

    def steps(self, progress: Progress) -> Iterator[list[dict]]:
        """Yield the micro-batches of each remaining optimiser step."""
        while progress.epoch < self.config.epochs:
            self.batches.epoch, self.batches.start = progress.epoch, progress.batch
            group = []
            for batch in self._loaded():
                group.append(batch)
                if len(group) == self.accumulation:
                    yield group
                    group = []
            if group:
                yield group

    def _loaded(self) -> Iterator[dict]:
        """Yield the loader's batches; add the time spent waiting for them to ``waited``."""
        began = time.perf_counter()
        for batch in self.loader:
            self.waited += time.perf_counter() - began
            yield batch
            began = time.perf_counter()

    def advance(self, progress: Progress, batches: int, samples: float, finite: bool) -> None:
        """Count a step. Raises: FloatingPointError after too many consecutive non-finite steps."""
        progress.step += 1
        progress.samples += int(samples)
        progress.batch += batches
        if progress.batch >= self.epoch_batches:
            progress.epoch, progress.batch = progress.epoch + 1, 0
        progress.bad_steps += not finite
        progress.bad_in_a_row = 0 if finite else progress.bad_in_a_row + 1
        if progress.bad_in_a_row >= self.config.max_bad_steps:
            raise FloatingPointError(
                f"{progress.bad_in_a_row} consecutive steps were not finite, the last at step "
                f"{progress.step}. The newest checkpoint is older: lower base_lr or clip_grad and "
                "continue with --resume auto."
            )

    def epoch_float(self, progress: Progress) -> float:
        return progress.step / self.epoch_steps

    def crossed(self, progress: Progress, every: float) -> bool:
        """True when the last step completed a multiple of ``every`` epochs."""
        every = max(round(every * self.epoch_steps), 1)
        return progress.step % every == 0
