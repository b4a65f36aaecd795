"""The one training loop. Recipes and downstream scripts build data, model and objective, and call
`fit`; everything that a long run must be able to rely on happens here.

    exact      the gradient is that of sum(loss_sum) / sum(weight) over micro-batches and processes
    resumable  a run stopped anywhere goes on bit for bit (see `vim_ssl.data.loader`)
    safe       checkpoints are whole or absent; SIGTERM saves; a non-finite step is skipped
"""

import contextlib
import math
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import nn
from tqdm import tqdm

from vim_ssl.config import opt
from vim_ssl.data.loader import (
    SeededSamples,
    collate,
    stable_hash,
    training_loader,
)
from vim_ssl.objective import StepOutput
from vim_ssl.optim import SCHEDULES, build_optimizer, build_schedule, check_optimizer
from vim_ssl.processes import cores
from vim_ssl.report.curve import number
from vim_ssl.runs import Run

PATIENCE = timedelta(hours=2)  # the others wait while the first process evaluates; NCCL's is 10 min


@dataclass
class TrainConfig:
    """Settings of the loop; every recipe's configuration extends these."""

    epochs: float = opt(300, "passes over the data; 0.5: half of one", group="optimiser")
    batch_size: int = opt(64, "samples a process and micro-batch", group="optimiser")
    accumulation: int = opt(1, "micro-batches an optimiser step", group="optimiser")
    optimizer: str = opt("adamw", "by timm's name: adamw, lamb, lars …", group="optimiser")
    base_lr: float = opt(1.5e-4, "learning rate per lr_reference_batch samples", group="optimiser")
    lr_reference_batch: int = opt(256, "samples that base_lr is meant for", group="optimiser")
    min_lr: float = opt(0.0, "learning rate at the end, not scaled", group="optimiser")
    schedule: str = opt(
        "cosine", "how the rate falls to min_lr", group="optimiser", choices=SCHEDULES
    )
    warmup_epochs: float = opt(40.0, "linear warm-up", group="optimiser")
    warmup_lr: float = opt(0.0, "learning rate it starts from, not scaled", group="optimiser")
    weight_decay: float = opt(0.05, "not on A_log, D, biases, norms, tokens", group="optimiser")
    betas: tuple[float, float] = opt((0.9, 0.95), "of AdamW", group="optimiser")
    eps: float | None = opt(None, "of AdamW; none: its own, 1e-8", group="optimiser")
    clip_grad: float | None = opt(1.0, "largest gradient norm; none: off", group="optimiser")
    layer_decay: float | None = opt(
        None, "lr factor from a block to the one below", group="optimiser"
    )
    ema: float = opt(
        0.0, "decay of the encoder's moving average, kept beside it; 0: none", group="optimiser"
    )
    precision: str = opt("no", "autocast", group="run", choices=("no", "bf16", "fp16"))
    compile: bool = opt(False, "torch.compile the model", group="run")
    grad_checkpointing: bool = opt(
        False, "recompute the blocks in backward: a third slower, less memory", group="run"
    )
    workers: int = opt(2, "data loading processes a rank", group="run")
    threads: int = opt(0, "CPU threads a process; 0: the cores, shared out", group="run")
    seed: int = opt(0, "of everything random", group="run")
    output: str = opt("", "run directory; default: a new one under runs/", group="run")
    resume: str = opt(
        "never",
        "auto: go on from the newest whole checkpoint in output",
        group="run",
        choices=("never", "auto"),
    )
    log_every: int = opt(10, "optimiser steps between lines of metrics.jsonl", group="run")
    eval_every: float = opt(20.0, "epochs between evaluations and pictures", group="run")
    save_every: float = opt(15.0, "minutes between checkpoints", group="run")
    save_steps: int = opt(0, "optimiser steps between checkpoints; 0: by save_every", group="run")
    keep_checkpoints: int = opt(2, "older ones are deleted", group="run")
    max_steps: int = opt(0, "stop after so many optimiser steps; 0: never", group="run")
    max_bad_steps: int = opt(20, "give up after so many non-finite steps in a row", group="run")
    trackers: tuple[str, ...] = opt(
        ("auto",), "by accelerate's names; auto: tensorboard where installed; none", group="run"
    )

    @classmethod
    def follow(cls, defaults: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
        """For `vim_ssl.config.parse`: a run made shorter keeps its share of warm-up."""
        share = given.get("epochs", math.inf) / defaults["epochs"]
        if "warmup_epochs" in given or not 0 < share < 1:
            return defaults
        return defaults | {"warmup_epochs": share * defaults["warmup_epochs"]}

    def __post_init__(self):
        for name in ("batch_size", "accumulation", "log_every", "keep_checkpoints",
                     "max_bad_steps", "lr_reference_batch"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more.")
        for name in ("workers", "threads", "max_steps", "save_steps", "weight_decay", "min_lr",
                     "warmup_lr", "base_lr", "clip_grad"):  # fmt: skip
            if not 0 <= (getattr(self, name) or 0) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 0 or more.")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas are {self.betas}; each must be at least 0 and below 1.")
        if self.layer_decay is not None and not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay is {self.layer_decay}; it must be above 0, at most 1.")
        if not 0 < self.epochs < math.inf:
            raise ValueError(f"epochs is {self.epochs}; it must be above 0.")
        if not 0 <= self.warmup_epochs < self.epochs:
            raise ValueError(
                f"warmup_epochs {self.warmup_epochs:g} does not fit into {self.epochs:g} epochs; "
                f"try --warmup-epochs {self.epochs / 20:g}."
            )
        check_optimizer(self.optimizer)
        if self.eval_every <= 0:
            raise ValueError(f"eval_every is {self.eval_every:g} epochs; it must be above 0.")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema is {self.ema:g}; expected 0 (none) or a decay below 1.")


def make_accelerator(config: TrainConfig):
    """accelerate's Accelerator, or an error if the launcher's processes do not know one another, or
    have nothing to share: a model is judged as it is by one."""
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs, TorchDynamoPlugin

    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and getattr(config, "eval_only", False):
        raise ValueError(
            f"--eval-only judges in one process, and the launcher started {world}; start it "
            "without a launcher."
        )
    # Launchers set OMP_NUM_THREADS=1, which would leave a single process on one core.
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    torch.set_num_threads(config.threads or max(cores() // local, 1))
    if world > 1 and not torch.cuda.is_available():
        # Otherwise accelerate looks for GPUs and, finding none, lets every process believe that
        # it is alone.
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")
    patience = InitProcessGroupKwargs(timeout=PATIENCE)
    accelerator = Accelerator(mixed_precision=config.precision, kwargs_handlers=[patience])
    # A second Accelerator in a process keeps what the first one was told.
    backend = "inductor" if config.compile else None
    accelerator.state.dynamo_plugin = TorchDynamoPlugin(backend=backend)
    if world != accelerator.num_processes:
        raise ValueError(
            f"The launcher started {world} processes but accelerate sees "
            f"{accelerator.num_processes}: each would train alone and write the same files. "
            "Check `accelerate env` and the launcher's flags."
        )
    if config.ema and accelerator.distributed_type == "FSDP":
        raise ValueError(
            "ema keeps a whole copy of the encoder, which FSDP has in shards; use --ema 0, or DDP."
        )
    return accelerator


def make_average(model: nn.Module, config: TrainConfig) -> ModelEmaV3 | None:
    """The moving average that ``config.ema`` asks for, of an encoder, or of a whole objective where
    heads belong to it; its ``module`` is what is averaged.

    The decay rises over the steps, 1 - (1 + step)^(-2/3), until it is ``config.ema``.
    """
    if not config.ema:
        return None
    average = ModelEmaV3(model, config.ema, use_warmup=True)
    average.requires_grad_(False)
    return average


@dataclass
class Progress:
    """Where a run is, saved with every checkpoint; ``batch`` is the epoch's next micro-batch.

    ``epoch_batches``, ``epoch_steps``, ``data`` (a fingerprint) and ``readers`` (of a stream) say
    what the counts mean.
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
    readers: str = ""


def fit(  # noqa: C901 -- one loop, read from top to bottom, is clearer than its parts
    objective: nn.Module,
    samples: SeededSamples,
    config: TrainConfig,
    run: Run,
    accelerator,
    *,
    average: ModelEmaV3 | None = None,
    evaluate: Callable[[], dict[str, float]] | None = None,
    enough: Callable[[], bool] | None = None,
    on_save: Callable[[], object] | None = None,
) -> dict[str, float]:
    """Train ``objective`` on ``samples``; returns the last figures logged.

    Args:
        objective: ``forward(batch) -> StepOutput``, and what else `vim_ssl.objective` tells of.
        samples: the training data with its transform.
        run: the run directory; if it holds a checkpoint, training goes on from the newest.
        accelerator: from `make_accelerator`.
        average: from `make_average`, of ``objective`` or of its encoder; a part of every
            checkpoint.
        evaluate: called every ``eval_every`` epochs on the main process; its figures are logged.
        enough: asked on the main process after each evaluation, and when a run is taken up; True
            ends the training.
        on_save: called with every checkpoint on the main process, to write the encoder.
    Raises: ValueError if the checkpoint was made with other data, batches or model;
        FloatingPointError after ``max_bad_steps`` non-finite steps in a row;
        SystemExit(0) after SIGTERM or SIGINT, once the state is saved.
    """
    plan = _Plan(samples, config, accelerator)
    if config.grad_checkpointing:
        encoder: Any = objective.encoder
        encoder.set_grad_checkpointing()
    optimizer = build_optimizer(
        objective, opt=config.optimizer, lr=plan.lr, weight_decay=config.weight_decay,
        betas=config.betas, eps=config.eps, layer_decay=config.layer_decay,
    )  # fmt: skip
    schedule = build_schedule(
        optimizer, total_steps=plan.scheduled_steps, min_lr=config.min_lr,
        warmup_steps=plan.warmup_steps, warmup_lr=config.warmup_lr,
        schedule=config.schedule,
    )  # fmt: skip
    model, optimizer = accelerator.prepare(objective, optimizer)
    averaged: Any = objective
    if average is not None:
        if type(average.module) is not type(objective):
            averaged = objective.encoder
        # As a second model, so that checkpoints hold it, as safetensors.
        accelerator.prepare_model(average.module, evaluation_mode=True)
    progress = Progress()
    figures: dict[str, float] = {}
    run.resume(accelerator, progress)
    plan.take_up(progress)
    run.write_config()
    last = progress.step >= plan.total_steps
    with _Watch(plan, config, run, accelerator, progress) as watch:
        if progress.step and enough is not None:
            last = watch.agreed(enough) or last
        for batches in () if last else plan.steps(progress):
            schedule.step_update(progress.step)
            averages = _forward_backward(accelerator, model, objective, batches, config, progress)
            norm = float(
                accelerator.clip_grad_norm_(model.parameters(), config.clip_grad or math.inf)
            )
            finite = math.isfinite(norm + averages["loss"])
            if finite or config.precision == "fp16":  # fp16's scaler skips by itself
                optimizer.step()
            optimizer.zero_grad()
            if finite and (after_step := getattr(objective, "after_step", None)):
                after_step()
            if finite and average is not None:
                average.update(averaged, progress.step + 1)
            samples_seen = averages.pop("samples")
            plan.advance(progress, len(batches), samples_seen, finite)
            run.count_skipped(name for batch in batches for name in batch["skipped"])
            row = averages | {"lr": optimizer.param_groups[0]["lr"], "grad_norm": norm}
            row |= watch.step(averages["loss"], samples_seen)
            last = progress.step >= plan.total_steps
            evaluated = last or plan.crossed(progress, config.eval_every)
            if evaluated:
                row |= watch.evaluate(objective, samples, evaluate)
            if evaluated or progress.step % config.log_every == 0:
                run.log(progress, plan.epoch_float(progress), row)
            if evaluated and enough is not None:
                last = watch.agreed(enough) or last
            figures |= row
            if watch.time_to_save() or last:
                # The encoder first: a run killed in between takes these steps again. With its last
                # checkpoint it has ended and would leave no encoder, or an older one.
                if on_save is not None and accelerator.is_main_process:
                    on_save()
                run.save(accelerator, progress, keep=config.keep_checkpoints)
            if last or watch.asked_to_stop():
                break
        if not last:
            watch.leave()
    return figures


class _Plan:
    """How the samples become steps: batches, epochs, the learning rate that follows from them."""

    def __init__(self, samples: SeededSamples, config: TrainConfig, accelerator):
        self.config, world = config, accelerator.num_processes
        # A handful of pictures trains too: the batch is never larger than the data.
        self.batch_size = max(min(config.batch_size, len(samples) // world), 1)
        self.workers = min(config.workers, cores())
        self.batches = samples.batches(
            self.batch_size, rank=accelerator.process_index, world=world, workers=self.workers
        )
        self.loader = training_loader(
            samples, self.batches, num_workers=self.workers,
            pin_memory=accelerator.device.type == "cuda",
        )  # fmt: skip
        self.waited = 0.0  # seconds for batches, since the start
        self.epoch_batches = self.batches.batches_per_epoch
        self.readers = self.batches.readers
        self.accumulation = min(config.accumulation, self.epoch_batches)
        self.epoch_steps = math.ceil(self.epoch_batches / self.accumulation)
        self.scheduled_steps = self.total_steps = max(round(self.epoch_steps * config.epochs), 1)
        if config.max_steps:
            self.total_steps = min(self.total_steps, config.max_steps)
        self.warmup_steps = round(self.epoch_steps * config.warmup_epochs)
        self.fingerprint = getattr(samples.data, "fingerprint", "")
        self.effective_batch = self.batch_size * self.accumulation * world
        self.lr = config.base_lr * self.effective_batch / config.lr_reference_batch
        left_out = len(samples) - self.epoch_batches * self.batch_size * world
        self.summary = (
            f"{len(samples):,} samples ({left_out:,} left out of each epoch) · batch "
            f"{self.batch_size} x {self.accumulation} (accumulation) x {world} (processes) = "
            f"{self.effective_batch} · lr "
            f"{config.base_lr:g} x {self.effective_batch}/{config.lr_reference_batch} = "
            f"{self.lr:.3g} · {self.total_steps:,} steps of {self.epoch_steps:,} an epoch, "
            f"{min(self.warmup_steps, self.total_steps):,} of them warm-up"
        )

        if self.lr < config.min_lr and accelerator.is_main_process:
            warnings.warn(
                f"the learning rate, {self.lr:.3g} for a batch of {self.effective_batch}, is below "
                f"min_lr {config.min_lr:g} and will rise: raise base_lr or the batch, or set "
                "--min-lr.",
                stacklevel=2,
            )

    def take_up(self, progress: Progress) -> None:
        """Check that a resumed run's counts mean the same steps here."""
        if progress.epoch_batches and progress.readers != self.readers:
            raise ValueError(
                f"The checkpoint's stream was read by {progress.readers}, here it would be by "
                f"{self.readers} and come in another order. Resume with the same number of both, "
                "or start anew in another --output."
            )
        names = ("epoch_batches", "epoch_steps")
        before, now = ([getattr(source, name) for name in names] for source in (progress, self))
        if progress.epoch_batches and before != now:
            raise ValueError(
                f"The checkpoint's epochs have {before[0]} batches in {before[1]} steps, here "
                f"{now[0]} in {now[1]}. Resume with the same data, accumulation and batch_size x "
                "processes, or start anew in another --output."
            )
        if progress.epoch_batches and progress.data != self.fingerprint:
            raise ValueError(
                "The pictures are not those of the checkpoint: their list, sizes or labels differ. "
                "Resume with the same data, or start anew in another --output."
            )
        progress.data, progress.readers = self.fingerprint, self.readers
        progress.epoch_batches, progress.epoch_steps = self.epoch_batches, self.epoch_steps

    def steps(self, progress: Progress) -> Iterator[list[dict]]:
        """The micro-batches of each optimiser step, from where ``progress`` stands."""
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
        """The loader's batches; what they are waited for adds up."""
        began = time.perf_counter()
        for batch in self.loader:
            self.waited += time.perf_counter() - began
            yield batch
            began = time.perf_counter()

    def advance(self, progress: Progress, batches: int, samples: float, finite: bool) -> None:
        """Count a step. Raises FloatingPointError when too many in a row were not finite."""
        progress.step += 1
        progress.samples += int(samples)
        progress.batch += batches
        if progress.batch >= self.epoch_batches:
            progress.epoch, progress.batch = progress.epoch + 1, 0
        progress.bad_steps += not finite
        progress.bad_in_a_row = 0 if finite else progress.bad_in_a_row + 1
        if progress.bad_in_a_row >= self.config.max_bad_steps:
            raise FloatingPointError(
                f"{progress.bad_in_a_row} steps in a row were not finite, the last at step "
                f"{progress.step}. The newest checkpoint is from before: lower base_lr or "
                "clip_grad and go on with --resume auto."
            )

    def epoch_float(self, progress: Progress) -> float:
        return progress.step / self.epoch_steps

    def crossed(self, progress: Progress, every: float) -> bool:
        """Whether the last step passed a multiple of ``every`` epochs."""
        every = max(round(every * self.epoch_steps), 1)
        return progress.step % every == 0


def _forward_backward(accelerator, model, objective, batches, config, progress):
    """Add up the gradient of one step; returns the averages over everything that went into it."""

    def forward(i: int, **more):
        # Seeding here leaves drop path and dropout no history that a checkpoint would have to hold.
        torch.manual_seed(
            stable_hash("step", config.seed, progress.step, i, accelerator.process_index)
        )
        return model(_to(batches[i], accelerator.device), **more)

    count = len(batches)
    accumulate = getattr(objective, "accumulate", None)
    outputs = accumulate(forward, count) if accumulate else map(forward, range(count))
    unit = sum(len(batch["index"]) for batch in batches)  # what the weight usually is
    sums = torch.zeros(0)
    for i, batch in enumerate(batches):
        with contextlib.nullcontext() if i + 1 == count else accelerator.no_sync(model):
            out = next(outputs)
            accelerator.backward(out.loss_sum / unit)
        values = [out.loss_sum, *out.metrics.values(), out.weight, len(batch["index"])]
        values = [torch.as_tensor(v, device=out.loss_sum.device).detach().float() for v in values]
        values = torch.stack(values).cpu().double()  # one wait for the device, not one a figure
        sums = values if i == 0 else sums + values
    if accelerator.num_processes > 1:
        sums = accelerator.reduce(sums.to(accelerator.device)).cpu()
    *totals, weight, samples = sums.tolist()
    weight = weight or 1.0  # nothing in the step counted, so every sum is zero
    factor = unit * accelerator.num_processes / weight  # DDP has averaged over the processes
    if factor != 1.0:
        for p in model.parameters():
            if p.grad is not None:
                p.grad.mul_(factor)
    names = ["loss", *out.metrics]
    averages = {name: total / weight for name, total in zip(names, totals, strict=True)}
    return averages | {"samples": samples}


def _to(value: Any, device: torch.device) -> Any:
    """The same with all tensors on the device, those in dicts and lists too."""
    if isinstance(value, dict):
        return {k: _to(v, device) for k, v in value.items()}
    if isinstance(value, list):
        return [_to(v, device) for v in value]
    return value.to(device, non_blocking=True) if torch.is_tensor(value) else value


def bottleneck(images: float, seconds: float, waited: float, workers: int) -> str:
    """Whether the data or the model set the pace, and what to do about it."""
    share = waited / seconds
    rate = number(images / seconds, 2)
    text = f"{rate} images/s, {100 * share:.0f} % of the time waiting for data: "
    if share < 0.2:  # what one core loads and trains by turns, small pictures wait for
        return text + "the model sets the pace, the data keep up."
    text += "the data set the pace" if share > 0.5 else "the data hold the model up"
    if workers < cores():
        return f"{text}; more --workers than {workers} may help."
    return f"{text}, with a worker on every core; smaller pictures may help."


class _Watch:
    """What goes on beside the arithmetic: progress bar, clock, signals, evaluations."""

    def __init__(self, plan, config, run, accelerator, progress):
        self.plan, self.config, self.run, self.accelerator = plan, config, run, accelerator
        self.progress, self.main = progress, accelerator.is_main_process
        self.stop = self.handlers = None

    def __enter__(self):
        self.stop = False
        self.handlers = {}
        for signum in (signal.SIGTERM, signal.SIGINT):
            with contextlib.suppress(ValueError):  # not in the main thread: no handlers there
                self.handlers[signum] = signal.signal(signum, self._on_signal)
        if self.main:
            print(self.plan.summary, flush=True)
        self.bar = tqdm(
            total=self.plan.total_steps, initial=self.progress.step, unit="step",
            disable=not self.main, smoothing=0.05, mininterval=0.5,
        )  # fmt: skip
        self.since_step = self.since_save = time.perf_counter()
        self.seconds = self.waited = self.images = 0.0
        self.first = True
        return self

    def __exit__(self, kind, *exc):
        self.bar.close()
        if self.main and self.seconds and kind in (None, SystemExit):
            print(bottleneck(self.images, self.seconds, self.waited, self.plan.workers), flush=True)
        for signum, handler in self.handlers.items():
            signal.signal(signum, handler)

    def _on_signal(self, signum, frame):
        if self.stop and signum == signal.SIGINT:
            raise KeyboardInterrupt  # asked twice: do not wait for the step
        self.stop = True

    def step(self, loss: float, samples: float) -> dict[str, float]:
        """Move the bar; returns the step's images per second, over all processes, and the share
        of its time that this one waited for batches."""
        now = time.perf_counter()
        seconds, self.since_step = now - self.since_step, now
        self.progress.seconds += seconds
        rate = samples / seconds
        waited, self.plan.waited = self.plan.waited, 0.0
        shown = f"loss {loss:.4f}"
        if not self.first:  # which starts workers and compiles: it tells no pace
            shown += f", {number(rate, 2)} img/s"
            self.seconds, self.waited = self.seconds + seconds, self.waited + waited
            self.images += samples
        self.first = False
        self.bar.set_postfix_str(shown, refresh=False)
        self.bar.update()
        return {"images_per_second": round(rate, 1), "data_wait": round(waited / seconds, 3)}

    def evaluate(self, objective, samples, evaluate) -> dict[str, float]:
        """Pictures and figures on the main process while the others wait."""
        figures = {}
        if self.main:
            # Always the same eight samples, so that progress can be seen.
            preview = _to(collate(samples.preview(8)), self.accelerator.device)
            was_training = objective.training
            objective.eval()
            with torch.no_grad(), self.accelerator.autocast():
                out: StepOutput = objective(preview)
            objective.train(was_training)
            if out.pictures is not None:
                self.run.save_pictures("pictures", self.progress.step, out.pictures())
            if evaluate is not None:
                figures = evaluate()
                text = ", ".join(f"{k} {v:.4g}" for k, v in figures.items())
                self.bar.write(f"epoch {self.plan.epoch_float(self.progress):.1f}: {text}")
        self.accelerator.wait_for_everyone()
        self.since_step = time.perf_counter()
        return figures

    def agreed(self, question: Callable[[], bool]) -> bool:
        """The main process's answer, on every process."""
        answer = float(self.main and question())
        flag = torch.tensor(answer, device=self.accelerator.device)
        return self.accelerator.reduce(flag).item() > 0

    def time_to_save(self) -> bool:
        """Whether to save now; the same answer on every process."""
        due = self.stop or (
            self.progress.step % self.config.save_steps == 0
            if self.config.save_steps
            else time.perf_counter() - self.since_save > 60 * self.config.save_every
        )
        if self.accelerator.num_processes > 1:
            flags = torch.tensor([float(due), float(self.stop)], device=self.accelerator.device)
            flags = self.accelerator.reduce(flags).tolist()
            due, self.stop = flags[0] > 0, flags[1] > 0
        if due:
            self.since_save = time.perf_counter()
        return due

    def asked_to_stop(self) -> bool:
        return self.stop

    def leave(self) -> None:
        if self.main:
            self.bar.write(f"Stopped at step {self.progress.step}; go on with --resume auto.")
        sys.exit(0)
