"""The optimiser, its parameter groups and its schedule: timm's, told what a state-space model is.

>>> optimizer = build_optimizer(objective, lr=1e-3, weight_decay=0.05, layer_decay=0.75)
>>> schedule = build_schedule(optimizer, total_steps=1000, warmup_steps=50)
>>> for step in range(1000):
...     schedule.step_update(step)  # before the step: it sets this step's learning rate
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

# Never decayed, wherever in a model they stand: A_log and D define the dynamics of a scan (zero is
# no neutral value for them), the others are offsets. timm adds biases, norms and all else that is
# one-dimensional.
NO_DECAY = {
    "A_log", "A_b_log", "D", "D_b",
    "pos_embed", "cls_token", "cls_token_head", "cls_token_tail", "mask_token", "register_tokens",
    "query",
}  # fmt: skip


def _in_steps(optimizer: torch.optim.Optimizer, *, t_initial: int, lr_min: float, **settings):
    """To a tenth at 8/9 of all steps and to a hundredth at 26/27, as ViTDet (arXiv:2203.16527) and
    Vim's detection have it.

    Raises: ValueError for an ``lr_min``.
    """
    warmup = settings["warmup_t"]
    # timm's milestones are counted from the warm-up's end, and one step too early.
    falls = [round(part * (t_initial + warmup)) - warmup + 1 for part in (8 / 9, 26 / 27)]
    if lr_min:
        raise ValueError(f"schedule 'steps' falls by tenths, not to min_lr {lr_min:g}; use 0.")
    return MultiStepLRScheduler(optimizer, decay_t=falls, decay_rate=0.1, **settings)


# How the learning rate falls after the warm-up. (Ours is timm's first cycle, which cycle_decay does
# not reach: told of one, timm does not warn of a run of one step.)
SCHEDULES: dict[str, Callable] = {
    "cosine": partial(CosineLRScheduler, cycle_decay=0.5),
    "steps": _in_steps,
    "linear": partial(PolyLRScheduler, power=1.0, cycle_decay=0.5),  # "poly" of power 1
}


def param_groups(
    model: nn.Module, weight_decay: float, layer_decay: float | None = None
) -> list[dict]:
    """Group the trainable parameters by weight decay and, if asked, by depth.

    Args:
        model: an encoder, or a module that holds one as ``encoder`` (an objective, a task model).
        weight_decay: for all but `NO_DECAY`, what is one-dimensional, and what any module inside
            names in its ``no_weight_decay()``.
        layer_decay: factor on the learning rate from each block to the one below it, so that the
            patch embedding has the lowest; whatever stands outside the encoder, and its head, has
            1. The groups' ``lr_scale`` is applied by timm's schedulers alone; see
            `build_schedule`.

    Returns: groups for a torch optimiser, every trainable parameter in exactly one.
    Raises: ValueError if ``layer_decay`` is asked for and no encoder is found.
    """
    excluded = _no_weight_decay(model)
    if layer_decay is None:
        return param_groups_weight_decay(model, weight_decay, no_weight_decay_list=excluded)
    view = _LayerView(model)
    return param_groups_layer_decay(
        cast(nn.Module, view),  # timm asks it for no more than it has
        weight_decay,
        no_weight_decay_list={view.rename(name) for name in excluded},
        layer_decay=layer_decay,
    )


def build_optimizer(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    opt: str = "adamw",
    betas: tuple[float, float] | None = None,
    eps: float | None = None,
    layer_decay: float | None = None,
) -> torch.optim.Optimizer:
    """timm's optimiser of that name over `param_groups`.

    Args:
        model, weight_decay, layer_decay: see `param_groups`.
        lr: of a group with ``lr_scale`` 1, at the schedule's peak.
        betas, eps: the optimiser's own by default; left out where it has none.
    Raises: ValueError for a name that timm does not know.
    """
    check_optimizer(opt)
    given: dict[str, Any] = {"betas": betas, "eps": eps}
    return create_optimizer_v2(
        model,
        opt,
        lr=lr,
        weight_decay=weight_decay,
        param_group_fn=lambda m: param_groups(m, weight_decay, layer_decay),
        **{name: value for name, value in given.items() if value is not None},
    )


def check_optimizer(opt: str) -> None:
    """Raises: ValueError for a name that timm does not know."""
    known = cast(list[str], list_optimizers())
    if opt.lower().removeprefix("lookahead_") not in known:
        raise ValueError(f"timm has no optimizer {opt!r}. {did_you_mean(opt.lower(), known)}")


def build_schedule(
    optimizer: torch.optim.Optimizer,
    *,
    total_steps: int,
    warmup_steps: int = 0,
    min_lr: float = 0.0,
    warmup_lr: float = 0.0,
    schedule: str = "cosine",
) -> Scheduler:
    """Linear warm-up from ``warmup_lr`` to the optimiser's lr, then down to ``min_lr``.

    Call ``step_update(step)`` before optimiser step ``step`` = 0, 1, …: the learning rate is a
    function of that number alone, so there is no state to save. ``lr_scale`` multiplies it, which
    torch's own schedulers would not do.

    Args:
        total_steps: optimiser steps of the run; step ``total_steps`` would have ``min_lr``.
        warmup_steps: of these; step ``warmup_steps`` has the full lr.
        schedule: how it falls, by the names in `SCHEDULES`.
    Raises: ValueError if the warm-up leaves no step, or for an unknown schedule.
    """
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(
            f"a warm-up of {warmup_steps} steps does not fit a run of {total_steps}; "
            "warm up for less or train for longer."
        )
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule {schedule!r} is unknown. {did_you_mean(schedule, SCHEDULES)}")
    return SCHEDULES[schedule](
        optimizer,
        t_initial=total_steps - warmup_steps,
        lr_min=min_lr,
        warmup_t=warmup_steps,
        warmup_lr_init=warmup_lr,
        warmup_prefix=True,  # the fall starts at its top, where the warm-up ends
        t_in_epochs=False,
    )


def _no_weight_decay(model: nn.Module) -> set[str]:
    """Full names of the parameters that must not be decayed, beyond what their shapes tell."""
    names = {name for name, _ in model.named_parameters() if name.rsplit(".", 1)[-1] in NO_DECAY}
    for path, module in model.named_modules():
        own = getattr(module, "no_weight_decay", None)
        if callable(own):
            names |= {f"{path}.{name}" if path else name for name in own()}
    return names


class _LayerView:
    """A model as timm's layer decay should see it: the encoder's parameters by the names that its
    ``group_matcher`` knows, all others by names that it does not, which puts them with the head."""

    def __init__(self, model: nn.Module):
        bare = hasattr(model, "group_matcher")
        encoder: Any = model if bare else getattr(model, "encoder", None)
        if not hasattr(encoder, "group_matcher"):
            raise ValueError(
                f"layer_decay needs to know the layers: {type(model).__name__} has no "
                "group_matcher(), nor an `encoder` that has one; pass layer_decay=None."
            )
        self.model, self.prefix = model, "" if bare else "encoder."
        self.group_matcher: Callable = encoder.group_matcher

    def rename(self, name: str) -> str:
        if name.startswith(self.prefix):
            return name.removeprefix(self.prefix)
        return f"outside.{name}"

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, parameter in self.model.named_parameters():
            yield self.rename(name), parameter
