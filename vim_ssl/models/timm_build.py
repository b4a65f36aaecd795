"""Build the models of timm, with errors that name what is wrong."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import timm
import torch
from torch import Tensor, nn

from vim_ssl.models.presets import PRESETS
from vim_ssl.utils.names import did_you_mean

# Arguments of `timm.create_model` and its builders that read files or repositories, or that JSON
# cannot hold: stored settings must not have them.
_NOT_STORED = {
    "cache_dir", "checkpoint_path", "feature_cfg", "kwargs_filter", "model_cfg", "pretrained",
    "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_filter_fn", "pretrained_model_args",
    "pretrained_strict",
}  # fmt: skip


def create(name: str, **args: Any) -> nn.Module:
    """`timm.create_model`, for images of any size where the model accepts an argument for that."""
    args = {key: value for key, value in args.items() if value is not None}
    try:
        try:
            return timm.create_model(name, **{"dynamic_img_size": True} | args)
        except TypeError as error:
            if "dynamic_img_size" not in str(error):
                raise
        return timm.create_model(name, **args)
    except TypeError as error:
        raise TypeError(f"timm:{name}: {error}") from error
    except AssertionError as error:
        raise ValueError(f"timm:{name}: {error or 'these arguments do not fit'}") from error


def registered(name: str) -> Any:
    """Return timm's description of the weights of a model, by name and tag."""
    check_name(name)
    try:
        return timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        tags = timm.list_pretrained(f"{name.partition('.')[0]}*")
        raise ValueError(f"{error} {did_you_mean(name, tags)}") from error


def check_name(name: str) -> None:
    """Raise ValueError for a name that timm does not know."""
    plain = name.partition(".")[0]
    if plain in PRESETS:
        raise ValueError(f"{name} is a Vim of this package; give it without timm:.")
    if not timm.is_model(plain):
        raise ValueError(f"timm has no model {name!r}. {did_you_mean(plain, timm.list_models())}")


def checked_pool(global_pool: str | None, num_classes: int = 0) -> str | None:
    """Return a pool of timm. Raise ValueError for one that timm, or a head of this many classes,
    does not have."""
    if global_pool is not None and "+" in global_pool:
        raise ValueError(f"timm has no global_pool {global_pool!r}; use token, avg or max.")
    if global_pool == "" and num_classes:
        raise ValueError(
            f"global_pool '' leaves tokens or a map without a pool, which a head of {num_classes} "
            "classes cannot read; use token, avg or max, or num_classes=0."
        )
    return global_pool


def has_fixed_size(cfg: Any) -> bool:
    """Whether a description says that the model is built for one size of images."""
    if isinstance(cfg, Mapping):
        return bool(cfg.get("fixed_input_size"))
    return bool(getattr(cfg, "fixed_input_size", False))


def check_stored(settings: Mapping[str, Any], where: Any) -> None:
    """Raise ValueError for stored settings by which timm would read another file.

    Args:
        where: what contains the settings, for the message.
    """
    if wrong := sorted(_NOT_STORED & settings.keys()):
        raise ValueError(
            f"{where} has the setting {wrong[0]!r}, by which timm would read other weights than "
            "those beside it; settings describe an architecture. Remove it, and name weights as "
            "timm:NAME?file=PATH."
        )


def after_reset(model: nn.Module, pool_changed: bool) -> dict[str, Any]:
    """Return the arguments that rebuild what `reset_classifier` left of a model.

    A new model puts its last norm where its pool expects it; a reset keeps the norm's place. And a
    reset drops the second classifier of RepViT and iFormer, which a new model has.
    """
    reset: Any = model.reset_classifier
    args: dict[str, Any] = {}
    if "distillation" in inspect.signature(reset).parameters:
        args["distillation"] = False
    if pool_changed and (norm := getattr(model, "fc_norm", None)) is not None:
        names = inspect.signature(type(model)).parameters
        name = "use_fc_norm" if "use_fc_norm" in names else "fc_norm"
        args[name] = not isinstance(norm, nn.Identity)
    return args


def freeze_unread(encoder: Any, read: Callable[[Any, Tensor], Iterable[Tensor]]) -> None:
    """Freeze the parameters that ``read(encoder, images)`` does not depend on.

    They would get no gradient, and several processes would wait for it. The outputs are computed by
    a copy without values.
    """
    with torch.device("meta"), torch.enable_grad():
        copied = type(encoder)(**encoder.config).eval()
        names, parameters = zip(*copied.named_parameters(), strict=True)
        sums = [out.sum() for out in read(copied, torch.zeros(1, *copied.input_shape))]
    gradients = torch.autograd.grad(sums, parameters, allow_unused=True)
    unread = {name for name, grad in zip(names, gradients, strict=True) if grad is None}
    for name, parameter in encoder.named_parameters():
        if name in unread:
            parameter.requires_grad_(False)
