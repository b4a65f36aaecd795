"""Build the models of timm, with errors that name what is wrong."""

from collections.abc import Mapping
from typing import Any

import timm
from torch import nn

from vim_ssl.models.presets import PRESETS
from vim_ssl.utils.names import did_you_mean


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


def has_fixed_size(cfg: Any) -> bool:
    """Whether a description says that the model is built for one size of images."""
    if isinstance(cfg, Mapping):
        return bool(cfg.get("fixed_input_size"))
    return bool(getattr(cfg, "fixed_input_size", False))
