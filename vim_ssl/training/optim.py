"""timm's optimisers and schedules, with parameter groups for state-space models.

>>> optimizer = build_optimizer(objective, lr=1e-3, weight_decay=0.05, layer_decay=0.75)
>>> schedule = build_schedule(optimizer, total_steps=1000, warmup_steps=50)
>>> for step in range(1000):
...     schedule.step_update(step)  # before the step, whose learning rate it sets
...     ...
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

import torch
from timm.optim import (
    create_optimizer_v2,
    list_optimizers,
    param_groups_layer_decay,
    param_groups_weight_decay,
)
from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler, PolyLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import nn

from vim_ssl.utils.names import did_you_mean

# Parameters without weight decay, by the last part of their names: A_log and D define the dynamics
# of a scan, for which zero is not a neutral value; the others are offsets. timm also exempts all
# one-dimensional parameters, such as biases and norms.
NO_DECAY = {
    "A_log", "A_b_log", "D", "D_b",
    "pos_embed", "cls_token", "cls_token_head", "cls_token_tail", "mask_token", "register_tokens",
    "query",
}  # fmt: skip


def _in_steps(optimizer: torch.optim.Optimizer, *, t_initial: int, lr_min: float, **settings):
    """Divide the learning rate by 10 at 8/9 and at 26/27 of all steps, as in ViTDet
    (arXiv:2203.16527) and Vim's detection. Raises: ValueError for a non-zero ``lr_min``."""
    if lr_min:
        raise ValueError(
            f"schedule 'steps' divides the rate by 10 and ignores min_lr; got {lr_min:g}, use 0."
        )
    warmup = settings["warmup_t"]
    # timm counts milestones from the end of the warm-up, one step too early.
    falls = [round(share * (t_initial + warmup)) - warmup + 1 for share in (8 / 9, 26 / 27)]
    return MultiStepLRScheduler(optimizer, decay_t=falls, decay_rate=0.1, **settings)


# Decay of the learning rate after the warm-up. (cycle_decay has no effect within one cycle, but
# silences timm's warning about a run of one step.)
SCHEDULES: dict[str, Callable] = {
    "cosine": partial(CosineLRScheduler, cycle_decay=0.5),
    "steps": _in_steps,
    "linear": partial(PolyLRScheduler, power=1.0, cycle_decay=0.5),  # "poly" of power 1
}


def param_groups(
    model: nn.Module,
    weight_decay: float,
    layer_decay: float | None = None,
    lr_encoder: float = 1.0,
) -> list[dict]:
    """Group the trainable parameters by weight decay; with ``layer_decay`` also by depth, and with
    ``lr_encoder`` by whether they belong to the encoder.

    Args:
        model: an encoder, or a module with an ``encoder`` (an objective, a task model).
        weight_decay: applied to all parameters except `NO_DECAY`, one-dimensional ones, and those
            that a module lists in its ``no_weight_decay()``.
        layer_decay: learning-rate factor from each block to the one below. The patch embedding has
            the lowest rate; the encoder's head and everything outside the encoder have factor 1.
        lr_encoder: learning-rate factor of the encoder except its head; multiplies that of
            ``layer_decay``.
    Only timm's schedulers apply the groups' ``lr_scale``; see `build_schedule`.
    Returns: groups for a torch optimiser, every trainable parameter in exactly one.
    Raises: ValueError for ``layer_decay`` or ``lr_encoder`` without an encoder.
    """
    excluded = _no_weight_decay(model)
    if layer_decay is None:
        groups = param_groups_weight_decay(model, weight_decay, no_weight_decay_list=excluded)
    else:
        view = _LayerView(model)
        groups = param_groups_layer_decay(
            cast(nn.Module, view),  # it has every method that timm uses
            weight_decay,
            no_weight_decay_list={view.rename(name) for name in excluded},
            layer_decay=layer_decay,
        )
    if lr_encoder == 1.0:
        return groups
    encoder = _encoder_of(model, "lr_encoder=1")
    slow = {*encoder.parameters()} - {*encoder.get_classifier().parameters()}
    return [
        group | {"params": params, "lr_scale": group.get("lr_scale", 1.0) * factor}
        for group in groups
        for factor, inside in ((lr_encoder, True), (1.0, False))
        if (params := [p for p in group["params"] if (p in slow) == inside])
    ]


def build_optimizer(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    opt: str = "adamw",
    betas: tuple[float, float] | None = None,
    eps: float | None = None,
    layer_decay: float | None = None,
    lr_encoder: float = 1.0,
) -> torch.optim.Optimizer:
    """Build timm's optimiser named ``opt`` over `param_groups`.

    Args:
        model, weight_decay, layer_decay, lr_encoder: see `param_groups`.
        lr: peak learning rate of a group with ``lr_scale`` 1.
        betas, eps: timm's defaults if None.
    Raises: ValueError for a name that timm does not know.
    """
    check_optimizer(opt)
    given: dict[str, Any] = {"betas": betas, "eps": eps}
    return create_optimizer_v2(
        model, opt, lr=lr, weight_decay=weight_decay,
        param_group_fn=lambda m: param_groups(m, weight_decay, layer_decay, lr_encoder),
        **{name: value for name, value in given.items() if value is not None},
    )  # fmt: skip


def use_fused(optimizer: Any) -> None:
    """Let torch's optimisers that can do so (SGD, Adam, AdamW) update all parameters in one pass.

    Rounding differs from that of separate operators. A checkpoint keeps the setting, so a run
    that began without it resumes without it.
    """
    for group in optimizer.param_groups:
        if "fused" in group:
            group["fused"] = True


def check_optimizer(opt: str) -> None:
    """Raise ValueError for a name that timm does not know."""
    known = cast(list[str], list_optimizers())
    if opt.lower().removeprefix("lookahead_") not in known:
        raise ValueError(f"timm has no optimizer {opt!r}. {did_you_mean(opt.lower(), known)}")


def check_step(config: Any, device: torch.device) -> None:
    """Build the optimiser of a `TrainConfig` and let it make a step on ``device``.

    Raises: ValueError for one that cannot, because it needs second derivatives, a closure, another
        device or a library.
    """
    with torch.random.fork_rng(devices=[]):
        layer = nn.Linear(2, 2).to(device)
    try:
        optimizer = build_optimizer(
            layer, opt=config.optimizer, lr=config.base_lr, weight_decay=config.weight_decay,
            betas=config.betas, eps=config.eps,
        )  # fmt: skip
        for weight in layer.parameters():
            weight.grad = torch.ones_like(weight)
        optimizer.step()
    except Exception as error:  # each library raises another one
        reason = " ".join(str(error).split())[:150].rstrip(".") or type(error).__name__
        raise ValueError(
            f"the optimizer {config.optimizer!r} cannot be used for this training on "
            f"{device.type} ({reason}); choose another, such as adamw."
        ) from error


def build_schedule(
    optimizer: torch.optim.Optimizer,
    *,
    total_steps: int,
    warmup_steps: int = 0,
    min_lr: float = 0.0,
    warmup_lr: float = 0.0,
    schedule: str = "cosine",
) -> Scheduler:
    """Build a schedule: linear warm-up from ``warmup_lr`` to the optimiser's lr, then decay to
    ``min_lr``.

    Call ``step_update(step)`` before optimiser step ``step`` = 0, 1, …: the learning rate depends
    only on that number, so there is no state to save. It is multiplied by a group's ``lr_scale``,
    which torch's schedulers would ignore.

    Args:
        total_steps: optimiser steps of the run; step ``total_steps`` would have ``min_lr``.
        warmup_steps: number of warm-up steps among these; step ``warmup_steps`` has the full lr.
        schedule: a name of `SCHEDULES`.
    Raises: ValueError if the warm-up leaves no step, or for an unknown schedule.
    """
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(
            f"a warm-up of {warmup_steps} steps does not fit a run of {total_steps}; "
            "shorten the warm-up or train for longer."
        )
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule {schedule!r} is unknown. {did_you_mean(schedule, SCHEDULES)}")
    return SCHEDULES[schedule](
        optimizer,
        t_initial=total_steps - warmup_steps,
        lr_min=min_lr,
        warmup_t=warmup_steps,
        warmup_lr_init=warmup_lr,
        warmup_prefix=True,  # the rate falls from its peak at the end of the warm-up
        t_in_epochs=False,
    )


def _no_weight_decay(model: nn.Module) -> set[str]:
    """Return the full names of parameters without weight decay, except one-dimensional ones."""
    names = {name for name, _ in model.named_parameters() if name.rsplit(".", 1)[-1] in NO_DECAY}
    for path, module in model.named_modules():
        declared = getattr(module, "no_weight_decay", None)
        if callable(declared):
            names |= {f"{path}.{name}" if path else name for name in declared()}
    return names


def _encoder_of(model: nn.Module, off: str) -> Any:
    """Return the encoder of a model, or an encoder itself.

    Args:
        off: the argument with which none is needed, for the message.
    """
    encoder = model if hasattr(model, "group_matcher") else getattr(model, "encoder", None)
    if not hasattr(encoder, "group_matcher"):
        raise ValueError(
            f"{off.split('=')[0]} needs a group_matcher(), but {type(model).__name__} has none, "
            f"nor an `encoder` with one; pass {off}."
        )
    return encoder


class _LayerView:
    """A view of a model for timm's layer decay. The encoder's parameters have the names that its
    ``group_matcher`` expects; all others have unknown names, which are grouped with the head."""

    def __init__(self, model: nn.Module):
        encoder = _encoder_of(model, "layer_decay=None")
        self.model, self.prefix = model, "" if encoder is model else "encoder."
        self.group_matcher: Callable = encoder.group_matcher

    def rename(self, name: str) -> str:
        if name.startswith(self.prefix):
            return name.removeprefix(self.prefix)
        return f"outside.{name}"

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, parameter in self.model.named_parameters():
            yield self.rename(name), parameter
