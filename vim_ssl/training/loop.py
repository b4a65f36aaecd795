"""The training loop. Recipes and downstream scripts build data, model and objective, and call
`fit`, which guarantees:

    exact      the gradient is that of sum(loss_sum) / sum(weight) over micro-batches and processes
    resumable  a run stopped anywhere resumes bit for bit (see `vim_ssl.data.loading.indexed`)
    safe       checkpoints are complete or absent; SIGTERM saves, in a single process at once,
               without the step in progress; a non-finite step is skipped
"""

import contextlib
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from vim_ssl.data.loading.indexed import SeededSamples, stable_hash
from vim_ssl.training.accelerator import Average
from vim_ssl.training.config import TrainConfig
from vim_ssl.training.monitor import Monitor, StepAbandoned
from vim_ssl.training.optim import build_optimizer, build_schedule, use_fused
from vim_ssl.training.resume import begin
from vim_ssl.training.run import Run
from vim_ssl.training.schedule import Schedule


def fit(
    objective: nn.Module,
    samples: SeededSamples,
    config: TrainConfig,
    run: Run,
    accelerator,
    *,
    average: Average | None = None,
    evaluate: Callable[[], dict[str, float]] | None = None,
    should_stop: Callable[[], bool] | None = None,
    on_save: Callable[[], object] | None = None,
    depends_on: Mapping[str, str] | None = None,
) -> dict[str, float]:
    """Train ``objective`` on ``samples`` and return the metrics logged last.

    Args:
        objective: ``forward(batch) -> StepOutput``, and the options of `vim_ssl.objectives.base`.
        samples: the training data with its transform.
        run: the run directory; if it has checkpoints, training resumes from the newest.
        accelerator: from `make_accelerator`.
        average: from `make_average`; saved with every checkpoint.
        evaluate: called every ``eval_every`` epochs on the main process; returns metrics to log.
        should_stop: called on the main process after each evaluation and on resume; True ends the
            training.
        on_save: called before every checkpoint on the main process, to write the encoder.
        depends_on: hashes of what a step depends on outside the checkpoint and the data.
    Raises: ValueError if the checkpoint was made with other data, batches or model;
        FloatingPointError after ``max_bad_steps`` consecutive non-finite steps;
        SystemExit(0) after SIGTERM or SIGINT, once the state is saved; KeyboardInterrupt after a
        second SIGINT.
    """
    schedule = Schedule(samples, config, accelerator, order=run.progress().get("readers", ""))
    optimizer, lr_schedule = prepare_optimizer(objective, config, schedule, accelerator)
    model, optimizer = accelerator.prepare(objective, optimizer)
    if average is not None:  # as a second model, so that checkpoints hold it as safetensors
        accelerator.prepare_model(average.module, evaluation_mode=True)
    metrics: dict[str, float] = {}
    rate = partial(rates_around, optimizer, lr_schedule)
    progress = begin(run, accelerator, schedule, depends_on or {}, rate)
    last = progress.step >= schedule.total_steps

    def save() -> None:
        # Write the encoder first: a run killed in between repeats these steps. In the other order,
        # a run killed after its last checkpoint would never write its encoder.
        if on_save is not None and accelerator.is_main_process:
            on_save()
        run.gather_skipped(accelerator)
        run.save(accelerator, progress, keep=config.keep_checkpoints)
        run.state.reach(progress.step)

    with Monitor(schedule, config, run, accelerator, progress) as monitor:
        if progress.step:
            last = monitor.broadcast_decision(should_stop) or last
        steps = schedule.steps(progress)
        while not last:
            lr_schedule.step_update(progress.step)
            try:
                with monitor.abandonable(model):
                    batches = next(steps)
                    averages = forward_backward(
                        accelerator, model, objective, batches, config, progress
                    )
            except StepAbandoned:
                if progress.step and not run.has_step(progress.step):
                    save()  # the state before this step
                break
            norm, finite = optimise(
                accelerator, model, objective, optimizer, averages["loss"], config
            )
            if finite and average is not None:
                average.update(progress.step + 1)
            samples_seen = averages.pop("samples")
            schedule.advance(progress, len(batches), samples_seen, finite)
            run.count_skipped(name for batch in batches for name in batch["skipped"])
            row = averages | {
                # The largest: layer decay lowers those of earlier blocks.
                "lr": max(group["lr"] for group in optimizer.param_groups),
                "grad_norm": norm,
            }
            row |= monitor.step(averages["loss"], samples_seen)
            last = progress.step >= schedule.total_steps
            evaluated = last or schedule.crossed(progress, config.eval_every)
            if evaluated:
                row |= monitor.evaluate(objective, samples, evaluate)
            if evaluated or progress.step % config.log_every == 0:
                run.gather_skipped(accelerator)
                run.log(progress, schedule.epoch_float(progress), row)
            if evaluated:
                last = monitor.broadcast_decision(should_stop) or last
            metrics |= row
            if monitor.checkpoint_due() or last:
                save()
            if monitor.stop_requested():
                break
        if not last:
            monitor.exit_after_save()
    run.state.outcome = schedule.outcome(progress)
    return metrics


def rates_around(optimizer, lr_schedule, step: int) -> tuple[float, float]:
    """Return the learning rate in the optimiser, and that of ``step``, which it has afterwards."""
    before = max(group["lr"] for group in optimizer.param_groups)
    lr_schedule.step_update(step)
    return before, max(group["lr"] for group in optimizer.param_groups)


def prepare_optimizer(objective, config: TrainConfig, schedule: Schedule, accelerator):
    """Return the optimiser and its learning-rate schedule; switch on gradient checkpointing."""
    if config.grad_checkpointing:
        encoder: Any = objective.encoder
        encoder.set_grad_checkpointing()
    optimizer = build_optimizer(
        objective, opt=config.optimizer, lr=schedule.lr, weight_decay=config.weight_decay,
        betas=config.betas, eps=config.eps, layer_decay=config.layer_decay,
        lr_encoder=getattr(config, "lr_encoder", 1.0),
    )  # fmt: skip
    if accelerator.device.type == "cpu":  # on a GPU torch's default is fast
        use_fused(optimizer)
    lr_schedule = build_schedule(
        optimizer, total_steps=schedule.scheduled_steps, min_lr=config.min_lr,
        warmup_steps=schedule.warmup_steps, warmup_lr=config.warmup_lr, schedule=config.schedule,
    )  # fmt: skip
    return optimizer, lr_schedule


def optimise(accelerator, model, objective, optimizer, loss, config) -> tuple[float, bool]:
    """Update the parameters unless the step is not finite; return the gradient's norm, and whether
    it and the loss are finite."""
    norm = float(accelerator.clip_grad_norm_(model.parameters(), config.clip_grad or math.inf))
    finite = math.isfinite(norm + loss)
    scaler = accelerator.scaler  # None unless fp16 is active, whatever the setting says
    # With a gradient that is not finite, the scaler skips the step and lowers its scale.
    if finite or (scaler is not None and not math.isfinite(norm)):
        optimizer.step()
    elif scaler is not None:
        scaler.update()
    optimizer.zero_grad()
    if finite and (after_step := getattr(objective, "after_step", None)):
        after_step()
    return norm, finite


def forward_backward(accelerator, model, objective, batches, config, progress):
    """Accumulate the gradient of one step; return the averages over its samples and processes."""
    from accelerate.utils import send_to_device

    # torch.manual_seed also formats a stack trace for every other type of device.
    generator: Any = torch.default_generator if accelerator.device.type == "cpu" else torch

    def forward(i: int, **more):
        # Seeding here means that checkpoints need no random state for drop path and dropout.
        generator.manual_seed(
            stable_hash("step", config.seed, progress.step, i, accelerator.process_index)
        )
        batch = send_to_device(batches[i], accelerator.device, non_blocking=True)
        return model(batch, **more)

    count = len(batches)
    accumulate = getattr(objective, "accumulate", None)
    outputs = accumulate(forward, count) if accumulate else map(forward, range(count))
    unit = sum(len(batch["index"]) for batch in batches)  # usually equals the weight
    sums = torch.zeros(0)
    for i, batch in enumerate(batches):
        with contextlib.nullcontext() if i + 1 == count else accelerator.no_sync(model):
            out = next(outputs)
            accelerator.backward(out.loss_sum / unit)
        values = [out.loss_sum, *out.metrics.values(), out.weight, len(batch["index"])]
        values = [torch.as_tensor(v, device=out.loss_sum.device).detach().float() for v in values]
        values = torch.stack(values).cpu().double()  # one synchronisation, not one per value
        sums = values if i == 0 else sums + values
    if accelerator.num_processes > 1:
        sums = accelerator.reduce(sums.to(accelerator.device)).cpu()
    *totals, weight, samples = sums.tolist()
    weight = weight or 1.0  # if the weight is 0, all sums are 0
    factor = unit * accelerator.num_processes / weight  # DDP averages over the processes
    if factor != 1.0:
        for p in model.parameters():
            if p.grad is not None:
                p.grad.mul_(factor)
    names = ["loss", *out.metrics]
    averages = {name: total / weight for name, total in zip(names, totals, strict=True)}
    return averages | {"samples": samples}
