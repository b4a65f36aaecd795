"""The interface between objectives and the trainer, and the registry of pretraining objectives.

`vim_ssl.training.loop.fit` trains any module with an ``encoder`` and

forward(batch) -> StepOutput
after_step()                       optional: called after every optimiser step
accumulate(forward, count)         optional: yields the StepOutput of each of a step's ``count``
                                   micro-batches, for losses that compare samples with one another;
                                   ``forward(i, **more)`` calls the model on the i-th, with the
                                   same random draws every time

A new objective of mim_pretrain is a `PretrainObjective` in a new file and a line in `OBJECTIVES`.
Another package adds one with `register_objective`, called when its entry point of the group
``vim_ssl.plugins`` is loaded.
"""

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from vim_ssl.models.protocol import Encoder
from vim_ssl.utils.names import did_you_mean
from vim_ssl.utils.plugins import load_plugins

MASK_SETTINGS = ("mask", "mask_ratio", "mask_unit")


@dataclass
class StepOutput:
    """Output of one forward pass of an objective.

    The gradient of a step is that of sum(loss_sum) / sum(weight) over its micro-batches and
    processes, so accumulation and data parallelism give exactly the gradient of the large batch.

    Args:
        loss_sum: scalar, the loss summed over the units that ``weight`` counts.
        weight: number of samples (or other units to average over) in ``loss_sum``.
        metrics: scalars, also sums; logged as averages.
        images: called to log images; returns (n, c, h, w) in [0, 1], one row per sample.
    """

    loss_sum: Tensor
    weight: float
    metrics: dict[str, Tensor] = field(default_factory=dict)
    images: Callable[[], Tensor] | None = None


class PretrainObjective(nn.Module):
    """Pretrains an encoder on images without labels.

    Class attributes:
        settings: fields of the recipe's config that the objective uses; ``views = "mask"`` adds
            `MASK_SETTINGS`.
        encoder_args: required arguments of `load_encoder`; the recipe's ``model_args`` override
            them.
        views: content of a batch. "mask": ``image`` (b, c, h, w) and ``mask`` (b, m) bool, True =
            masked; "image": only ``image``; "crops": ``image`` (b, 2, c, h, w), two crops of each
            image.
        reads_clips: video encoders are supported, with ``image`` (b, c, t, h, w).
    """

    settings: ClassVar[tuple[str, ...]] = ()
    encoder_args: ClassVar[dict[str, Any]] = {}
    views: ClassVar[str] = "mask"
    reads_clips: ClassVar[bool] = False

    @classmethod
    def from_config(cls, encoder: Encoder, config: Any) -> Self:
        """Build the objective from a recipe's config: ``settings`` and the entries of
        ``objective_args`` are arguments of the constructor. Override where names differ.

        Raises: ValueError for settings that do not fit the encoder; TypeError for an unknown
            argument.
        """
        args = {name: getattr(config, name) for name in cls.settings}
        return cls(encoder, **args, **config.objective_args)

    @classmethod
    def used_settings(cls, config: Any) -> set[str]:
        """Return the fields of ``config`` that affect this objective."""
        return {*cls.settings, *(MASK_SETTINGS if cls.views == "mask" else ())}


# Name -> class, or "module:Class", which is imported on first use.
OBJECTIVES: dict[str, str | type[PretrainObjective]] = {
    "mae": "vim_ssl.objectives.mae:MAE",
    "simmim": "vim_ssl.objectives.simmim:SimMIM",
    "ar": "vim_ssl.objectives.ar:AutoRegressive",
    "distill": "vim_ssl.objectives.distill:Distill",
}


def register_objective(name: str, objective: str | type[PretrainObjective]) -> None:
    """Add an objective, a class or "module:Class". Raises: ValueError if the name is taken."""
    if OBJECTIVES.setdefault(name, objective) != objective:
        raise ValueError(f"the objective {name!r} already exists: {OBJECTIVES[name]}.")


def get_objective(name: str) -> type[PretrainObjective]:
    """Return the objective of this name, from `OBJECTIVES` or a plugin.

    Raises: ValueError for an unknown name.
    """
    if name not in OBJECTIVES:
        load_plugins()
    if name not in OBJECTIVES:
        raise ValueError(f"unknown objective {name!r}. {did_you_mean(name, OBJECTIVES)}")
    objective = OBJECTIVES[name]
    return pkgutil.resolve_name(objective) if isinstance(objective, str) else objective
