"""Encoders of timm: by name, with timm's weights or those of a file, and from a run.

    timm:NAME              fresh weights; NAME also hf-hub:OWNER/NAME or local-dir:FOLDER
    timm:NAME?pretrained   the weights that timm publishes, or those of the repository or folder
    timm:NAME?file=PATH    the weights of a local file with timm's keys

Other sizes and channels are adapted by timm's functions.
"""

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from vim_ssl.checkpoints.adapt import adapt_patch_embed, load_checked
from vim_ssl.checkpoints.files import WEIGHT_SUFFIXES, Stored, check_values
from vim_ssl.data.config import band_names, band_positions
from vim_ssl.models.timm_build import check_stored, registered
from vim_ssl.models.timm_encoder import TimmEncoder
from vim_ssl.utils.numbers import require_finite

log = logging.getLogger(__name__)
PREFIX = "timm:"
_FORMS = "timm:NAME, timm:NAME?pretrained or timm:NAME?file=PATH"
# What a stored encoder may be loaded with; its other settings are decided by the weights.
_FREE = {"img_size", "in_chans", "global_pool", "drop_path_rate", "use_mask_token", "data_config"}


@dataclass(frozen=True)
class TimmSource:
    """A parsed source: timm's name of the model, and its weights."""

    name: str
    pretrained: bool = False
    file: str = ""


def is_timm(source: str | os.PathLike) -> bool:
    return str(source).startswith(PREFIX)


def parse_timm(source: str | os.PathLike) -> TimmSource:
    """Parse a source that begins with ``timm:``. Raises: ValueError for an unknown option."""
    text, by_file, file = str(source).removeprefix(PREFIX).partition("?file=")
    name = text if by_file else text.removesuffix("?pretrained")
    pretrained = name != text
    # The folder of weights may have a question mark in its name; any other begins a wrong option.
    strange = "?" in name and (":" not in name or not (pretrained or by_file))
    if not name or strange or bool(by_file) != bool(file):
        raise ValueError(f"{source!r}: expected {_FORMS}.")
    return TimmSource(name, pretrained, file)


def timm_settings(source: str | os.PathLike) -> dict[str, Any]:
    """Return the arguments of the `TimmEncoder` that a source names, without weights.

    ``num_classes`` is that of the weights; 0 for fresh ones.
    Raises: the errors of `load_timm`.
    """
    parsed = parse_timm(source)
    args = _architecture(parsed.name)
    if parsed.file:
        return args | {"num_classes": _overlay(args, _read(parsed.file))["num_classes"]}
    return args | {"num_classes": _described(args)["num_classes"] if parsed.pretrained else 0}


def timm_state(source: str | os.PathLike) -> Mapping[str, Tensor]:
    """Return the weights of a file, folder or repository as they are stored; {} for a name of timm,
    which says what its weights are.

    Raises: FileNotFoundError, ConnectionError and ValueError, as `load_timm`.
    """
    parsed = parse_timm(source)
    if parsed.file:
        return _read(parsed.file)
    if not (parsed.pretrained and ":" in parsed.name):
        return {}
    from timm.models._hub import load_state_dict_from_hf, load_state_dict_from_path

    cfg = _architecture(parsed.name)["pretrained_cfg"]
    with _reading(str(source)):
        if cfg["source"] == "local-dir":
            return load_state_dict_from_path(cfg["file"])
        file = cfg.get("hf_hub_filename")
        return load_state_dict_from_hf(cfg["hf_hub_id"], *([file] if file else []))


def record_beside(source: str | os.PathLike) -> Path | None:
    """Return the file of ``timm:NAME?file=PATH`` if it is one of a run, with its record beside it,
    otherwise None."""
    file = Path(parse_timm(source).file).expanduser()
    of_run = file.name in ("encoder.safetensors", "encoder_ema.safetensors")
    return file if of_run and file.with_name("encoder.json").is_file() else None


def load_timm(
    source: str | os.PathLike, requested: Mapping[str, Any], num_classes: int | None
) -> tuple[TimmEncoder, int]:
    """Load an encoder of timm.

    Args:
        requested, num_classes: arguments of `load_encoder`; None means not given.
    Returns: the encoder, and the number of outputs of the head that its weights have.
    Raises: FileNotFoundError for a missing file; ConnectionError if timm cannot download weights;
        ValueError for an unknown name, or weights that are damaged or do not fit.
    """
    parsed = parse_timm(source)
    given = _without_directions(source, requested)
    args = _architecture(parsed.name)
    if not (parsed.pretrained or parsed.file):
        if num_classes is None:
            raise ValueError(f"num_classes=None requires weights with a head; {source} has none.")
        return TimmEncoder(**args | given, num_classes=num_classes), 0
    if parsed.file:
        overlay = _overlay(args, _read(parsed.file))
        for name, value in overlay["state_dict"].items():
            require_finite(value, f"{parsed.file}: {name}", "these weights cannot be used")
    else:
        overlay = {"num_classes": _described(args)["num_classes"]}
    # The pool is changed after loading: in a new model it decides where the last norm is.
    pool = given.pop("global_pool", None)
    args["global_pool"] = built = _pool_of(overlay, args | given, pool)
    encoder = _filled(str(source), args | given, overlay)
    if given.get("data_config", {}).get("bands"):
        original = {
            key: value for key, value in given.items() if key not in ("in_chans", "data_config")
        }
        _adapt_bands(encoder, _filled(str(source), args | original, overlay), str(source))
    stored = encoder.num_classes
    _set_head(encoder, str(source), num_classes, None if pool == built else pool)
    return encoder, stored


def _pool_of(overlay: Mapping[str, Any], args: Mapping[str, Any], pool: str | None) -> str | None:
    """Return the pool whose model has exactly the keys of a file, such as a norm after the pool;
    the architecture's for other weights, which timm converts."""
    usual, state = args.get("global_pool"), overlay.get("state_dict")
    settings = dict(args) | {"num_classes": overlay["num_classes"], "use_mask_token": False}
    if not state:
        return usual
    for choice in dict.fromkeys((usual, pool, "avg", "token")):
        with torch.device("meta"), contextlib.suppress(ValueError):
            encoder = TimmEncoder(**settings | {"global_pool": choice})
            if encoder.state_dict().keys() == state.keys():
                return choice
    return usual


def _adapt_bands(encoder: TimmEncoder, native: TimmEncoder, source: str) -> None:
    """Give bands that have a name of the weights' own bands their kernels, as in a Vim.

    Args:
        native: the encoder of the weights' own bands.
    Raises: ValueError for an architecture whose first layer has no kernel for each band.
    """
    before, after = native.data_config["bands"], encoder.data_config["bands"]
    if before == after or band_positions(before, after) is None:
        return
    model: Any = native.model
    first = model.pretrained_cfg.get("first_conv") or ()
    for name in (first,) if isinstance(first, str) else first:
        old, new = (cast(Any, x.model.get_submodule(name)).weight for x in (native, encoder))
        if old.dim() != 4 or (old.shape[1], new.shape[1]) != (len(before), len(after)):
            first = ()
            break
        with torch.no_grad():
            new.copy_(adapt_patch_embed(old, len(after), before, after))
    if not first:
        raise ValueError(
            f"{source}: the first layer of a {type(model).__name__} has no kernel for each band, "
            f"so bands {', '.join(after)} cannot take those of {', '.join(before)}. Use another "
            "architecture, or leave the names out."
        )


def rebuild(
    stored: Stored, target: Mapping[str, Any], num_classes: int | None, strict: bool
) -> tuple[TimmEncoder, list[str]]:
    """Build the encoder of a run from its file.

    Args:
        target: the stored config, with the values that the caller requests instead.
        num_classes, strict: arguments of `load_encoder`.
    Returns: the encoder, and the assumptions made.
    Raises: ValueError for weights that do not fit their config.
    """
    config, target = dict(stored.config or {}), _without_directions(stored.path, target)
    for name in target.keys() - _FREE:
        if target[name] != config.get(name):
            raise ValueError(
                f"{name}={target[name]!r} was requested, but {stored.path} has "
                f"{name}={config.get(name)!r}; the weights decide it."
            )
    args = target | {"global_pool": config["global_pool"]}
    state = dict(stored.state)
    token = state.pop("mask_token", None)
    bands = band_names(args) if args["in_chans"] == config["in_chans"] else ()
    if bands == band_names(config) and _sides(args) == _sides(config):
        encoder = TimmEncoder(**args)
    else:
        same = TimmEncoder(**config)  # of the stored sizes, to check the file
        check_values(stored.path, state, same.state_dict())
        load_checked(stored.path, same, stored.state, strict)
        overlay = _in_memory(state, config["num_classes"])
        overlay["input_size"] = (config["in_chans"], *_sides(config))
        encoder = _filled(str(stored.path), args, overlay)
        _adapt_bands(encoder, same, str(stored.path))
        state = encoder.state_dict()
        state.pop("mask_token", None)
    if encoder.mask_token is not None:
        state["mask_token"] = encoder.mask_token.detach() if token is None else token
    check_values(stored.path, state, encoder.state_dict())
    assumed = load_checked(stored.path, encoder, state, strict)
    record = stored.made_by or {}
    encoder.trainings = record.get("trainings") or []
    if encoder.num_classes:
        encoder.classes = record.get("classes")
    pool = target.get("global_pool")
    pool = None if pool == config["global_pool"] else pool
    _set_head(encoder, str(stored.path), num_classes, pool)
    return encoder, assumed


def _without_directions(source: Any, requested: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that are given, without the directions of a scan."""
    given = {name: value for name, value in requested.items() if value is not None}
    if given.pop("directions", "both") != "both":
        raise ValueError(
            f"directions={requested['directions']!r} was requested, but {source} is an encoder of "
            "timm, which reads all patches at once; only a Vim reads in one direction."
        )
    return given


def same_images(encoder: Any) -> dict[str, Any]:
    """Return the arguments by which a vision transformer of timm gets the images and patches of
    another encoder."""
    data = {key: value for key, value in encoder.data_config.items() if key != "input_size"}
    return {
        "img_size": encoder.img_size, "in_chans": encoder.in_chans, "data_config": data,
        "patch_size": encoder.patch_embed.patch_size,
    }  # fmt: skip


def build_timm(name: str, **args: Any) -> TimmEncoder:
    """Build an encoder with fresh weights by timm's name, which may be of a repository or folder.

    Raises: the errors of `load_timm`.
    """
    return TimmEncoder(**_architecture(name) | args)


def _set_head(
    encoder: TimmEncoder, source: str, num_classes: int | None, global_pool: str | None
) -> None:
    """Keep the head with its classes if it has the requested outputs, else replace it."""
    stored, classes = encoder.num_classes, encoder.classes
    if num_classes is None and not stored:
        raise ValueError(
            f"num_classes=None requests the head of {source}, which has none; use 0 for features "
            "or the number of classes for a fresh head."
        )
    count = stored if num_classes is None else num_classes
    if count == stored and global_pool is None:
        return
    weights = encoder.get_classifier().state_dict()
    encoder.reset_classifier(count, global_pool)
    if count == stored:
        encoder.get_classifier().load_state_dict(weights)
        encoder.classes = classes
    elif count:
        reason = f"the weights have one of {stored}" if stored else "the weights have none"
        log.warning("using a fresh head of %d classes: %s", count, reason)


def _filled(source: str, args: Mapping[str, Any], overlay: dict[str, Any]) -> TimmEncoder:
    """Build an encoder with the weights that timm reads by its description, changed by
    ``overlay``, and with their head."""
    classes = overlay["num_classes"]
    if "state_dict" in overlay:  # timm changes it
        overlay = overlay | {"state_dict": dict(overlay["state_dict"])}
    given = {"pretrained": True, "pretrained_cfg_overlay": overlay, "num_classes": classes}
    with _reading(source):
        return TimmEncoder(**dict(args) | given)


@contextlib.contextmanager
def _reading(source: str) -> Iterator[None]:
    """Turn timm's errors in reading weights into ConnectionError and ValueError."""
    try:
        yield
    except OSError as error:  # also the Hub's errors
        raise ConnectionError(
            f"the weights of {source} cannot be read or downloaded ({error}). Download them on "
            "another machine, and give timm:NAME?file=PATH."
        ) from error
    except RuntimeError as error:  # of load_state_dict: a line for every key
        raise ValueError(f"{source}: {' '.join(str(error).split())[:300]}") from error


def _architecture(name: str) -> dict[str, Any]:
    """Return the arguments of `TimmEncoder` for a name of timm. A repository or folder contains
    the name of the architecture and its arguments."""
    kind, _, location = name.partition(":")
    if not location:
        return {"timm": name}
    if kind not in ("hf-hub", "hf_hub", "local-dir"):
        raise ValueError(f"timm:{name}: {kind!r} is unknown; expected hf-hub: or local-dir:.")
    from timm.models._hub import load_model_config_from_hf, load_model_config_from_path

    try:
        if kind == "local-dir":
            cfg, architecture, args = load_model_config_from_path(location)
        else:
            cfg, architecture, args = load_model_config_from_hf(location)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"timm:{name}: {error}; the folder of a model that timm saved has a config.json."
        ) from error
    except OSError as error:
        raise ConnectionError(f"timm:{name} cannot be read: {error}") from error
    check_stored(args or {}, f"timm:{name}")
    return {"timm": architecture, "pretrained_cfg": cfg, **(args or {})}


def _described(args: Mapping[str, Any]) -> dict[str, Any]:
    """Return timm's description of a model and its weights."""
    cfg = args.get("pretrained_cfg") or registered(args["timm"])
    known = cfg if isinstance(cfg, dict) else vars(cfg) if cfg is not None else {}
    return {"num_classes": 1000} | known


def _overlay(args: Mapping[str, Any], state: dict[str, Tensor]) -> dict[str, Any]:
    """Return what of the description a file's weights change."""
    names = _described(args).get("classifier") or "head"
    first = f"{names if isinstance(names, str) else names[0]}.weight"
    return _in_memory(state, len(state[first]) if first in state else 0)


def _in_memory(state: Mapping[str, Tensor], num_classes: int) -> dict[str, Any]:
    """Return the part of a description by which timm reads weights from memory as they are."""
    return {
        "state_dict": state, "num_classes": num_classes, "custom_load": False, "label_offset": 0,
        "source": None,
    }  # fmt: skip


def _sides(config: Mapping[str, Any]) -> tuple[int, int]:
    size = config["img_size"]
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _read(file: str) -> dict[str, Tensor]:
    """Read a weights file of any form that timm reads."""
    from timm.models import load_state_dict

    path = Path(file).expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no file {file!r} (in {Path.cwd()}); ?file= expects weights with timm's keys "
            f"({' '.join(WEIGHT_SUFFIXES)}). A run is loaded without timm:."
        )
    try:
        return dict(load_state_dict(str(path), weights_only=True))
    except Exception as error:  # each format raises other ones
        raise ValueError(
            f"{path} is damaged or not a file of weights ({' '.join(str(error).split())[:200]})."
        ) from error
