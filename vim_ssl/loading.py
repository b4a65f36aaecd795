"""Loading and saving encoders: `load_encoder`, `save_encoder`, `verify`.

source -> checkpoint_files.find, read -> released_config, or the file's own config
       -> the encoder asked for -> weights adapted to it -> every key accounted for
"""

import argparse
import difflib
import inspect
import json
import logging
import math
import os
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from vim_ssl import checkpoint_files
from vim_ssl.checkpoint_files import FORMAT, WEIGHT_SUFFIXES, Stored
from vim_ssl.encoder import (
    IMAGENET_DATA,
    PRESETS,
    VimEncoder,
    join_pos_embed,
    split_pos_embed,
)
from vim_ssl.released import RELEASED_FILES, released_config

log = logging.getLogger(__name__)

# Weights we host: "preset.tag" -> Hub id.
TAGS: dict[str, str] = {}
_DEFAULTS = {
    name: parameter.default for name, parameter in inspect.signature(VimEncoder).parameters.items()
}
# What the tensors decide: another value is a mistake, not a wish.
_FIXED = (
    "embed_dim", "depth", "d_state", "d_conv", "expand", "dt_rank", "patch_size",
    "norm_after_scan", "use_pos_embed",
)  # fmt: skip


def load_encoder(
    source: str | os.PathLike,
    *,
    num_classes: int | None = 0,
    img_size: int | tuple[int, int] | None = None,
    in_chans: int | None = None,
    global_pool: str | None = None,
    ema: bool | None = None,
    strict: bool = True,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    **model_args: Any,
) -> VimEncoder:
    """A Vision Mamba encoder in eval mode.

    Args:
        source: the first that fits of
            - a preset (``vim_tiny_patch16_224``): fresh weights;
            - an existing path: a released Vim checkpoint (``.pth``), a file of `save_encoder`
              (``.safetensors`` with its ``.json``), or a run directory;
            - a Hub id: ``owner/name``, ``owner/name/file``, ``hf://owner/name/file``, each with
              ``@revision`` after the name or at the end.
        num_classes: 0 for features only; n for a head of that size, the checkpoint's when it
            fits, else fresh; None for the checkpoint's own head.
        img_size: pixels, or (height, width): the position table is resampled for good. Without it
            other sizes go in too, resampled at every call.
        in_chans: channels; a checkpoint's patch embedding is summed to 1 channel, or repeated in
            turn and rescaled to n, mean and std in ``data_config`` likewise.
        global_pool: "token", "avg" or "token+avg"; another width makes a fresh head.
        ema: take the EMA copy (True) or the weights themselves (False); by default what a file of
            ours says, and the weights themselves of a released file.
        strict: missing or unexpected keys are errors. False fills what is missing with fresh
            weights and leaves out what is unexpected, with a warning; shapes must fit always.
        device, dtype: where the encoder goes, and its floating-point type.
        model_args: any other argument of `VimEncoder`. ``directions="both"`` on a checkpoint of
            one direction starts the other as its copy; one direction of a checkpoint of both drops
            the other; ``use_mask_token`` and ``num_registers`` start fresh where it has none.

    Raises:
        FileNotFoundError: no such path, file or repository. ConnectionError: no Hub.
        TypeError: an argument that `VimEncoder` does not have, with the nearest that it has.
        ValueError: an unknown name; a file that is broken, unsafe, of another architecture, or
            that contradicts the arguments; several files to choose from.
    """
    asked = dict(model_args, img_size=img_size, in_chans=in_chans, global_pool=global_pool)
    _check_arguments(model_args, num_classes, img_size, device, dtype)
    if source in PRESETS:
        if num_classes is None or ema:
            what = "num_classes=None" if num_classes is None else "ema=True"
            raise ValueError(f"{what} asks for a checkpoint's; preset {source!r} is untrained.")
        config = dict(PRESETS[source], num_classes=num_classes)
        encoder = VimEncoder(**_apply(config, asked))
    else:
        stored = checkpoint_files.read(*_find(source), ema=ema)
        encoder, assumed = _build(stored, asked, num_classes, strict)
        for assumption in assumed:
            warnings.warn(assumption, stacklevel=2)
    return encoder.to(device=device, dtype=dtype).eval()


def save_encoder(
    encoder: VimEncoder,
    folder: str | os.PathLike,
    *,
    ema: VimEncoder | Mapping[str, Tensor] | None = None,
    ema_default: bool = True,
    record: dict[str, Any] | None = None,
) -> Path:
    """Write ``encoder.safetensors`` and ``encoder.json``; `load_encoder` takes the folder.

    Each file appears whole or not at all, and the description last. Keys are those of the released
    checkpoints.

    Args:
        ema: the exponential moving average of the weights, kept beside as
            ``encoder_ema.safetensors``.
        ema_default: `load_encoder` takes the EMA copy unless told otherwise.
        record: JSON-able notes on the training, kept as ``made_by``.
    Returns: the path of encoder.safetensors.
    Raises: TypeError for something that is not a `VimEncoder` or not JSON; ValueError for an EMA
        copy with other keys.
    """
    from safetensors.torch import save

    from vim_ssl import __version__

    if not isinstance(encoder, VimEncoder):
        raise TypeError(f"save_encoder takes a VimEncoder, not a {type(encoder).__name__}; "
                        "unwrap it first (.module of DDP, ._orig_mod of torch.compile).")  # fmt: skip
    state = _plain(encoder.state_dict())
    if ema is not None:
        ema = _plain(ema.state_dict() if isinstance(ema, VimEncoder) else ema)
        if wrong := sorted(set(ema) ^ set(state)):
            raise ValueError(f"The EMA copy and the encoder differ in {_some(wrong)}.")
    # The backend belongs to the machine, not to the weights.
    config = {key: value for key, value in encoder.config.items() if key != "scan_backend"}
    description = {
        "format": FORMAT,
        "vim_ssl": __version__,
        "ema": None if ema is None else "default" if ema_default else "optional",
        "config": config,
        "made_by": record,
    }
    text = json.dumps(description, indent=2) + "\n"  # raises before anything is written
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights, averaged = folder / "encoder.safetensors", folder / "encoder_ema.safetensors"
    if ema is not None:
        _write_whole(averaged, save(ema))
    _write_whole(weights, save(state))
    _write_whole(folder / "encoder.json", text.encode())
    if ema is None:
        averaged.unlink(missing_ok=True)
    return weights


def _plain(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.detach().cpu().contiguous() for key, value in state.items()}


def _write_whole(path: Path, content: bytes) -> None:
    """A reader, or a crash, sees the old file or the new one, never a part."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


# -------------------------------------------------------------------- the arguments


def _check_arguments(
    model_args: Mapping[str, Any],
    num_classes: int | None,
    img_size: int | tuple[int, int] | None,
    device: str | torch.device | None,
    dtype: torch.dtype | None,
) -> None:
    own = list(inspect.signature(load_encoder).parameters)[1:-1]
    for name in model_args:
        if name not in _DEFAULTS:
            near = difflib.get_close_matches(name, [*_DEFAULTS, *own], n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"There are {', '.join(_DEFAULTS)}."
            raise TypeError(f"Unknown argument {name!r}. {hint}")
    whole = isinstance(num_classes, int) and not isinstance(num_classes, bool)
    if num_classes is not None and not (whole and num_classes >= 0):
        raise ValueError(
            f"num_classes is {num_classes!r}; expected 0 (features), a number of classes, or None "
            "(the checkpoint's own head)."
        )
    sides = (img_size, img_size) if isinstance(img_size, int) else img_size
    if sides is not None and not (
        isinstance(sides, tuple | list)
        and len(sides) == 2
        and all(isinstance(side, int) and side > 0 for side in sides)
    ):
        raise ValueError(f"img_size is {img_size!r}; expected pixels or (height, width).")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype is {dtype!r}; expected a floating-point torch.dtype.")
    if device is not None and torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {str(device)!r}, but torch sees no GPU here; use 'cpu'.")


def _find(source: str | os.PathLike) -> tuple[checkpoint_files.Folder, str]:
    """`checkpoint_files.find`, after the names that are ours."""
    if source in TAGS:
        return checkpoint_files.find(TAGS[str(source)])
    if isinstance(source, str) and not Path(source).expanduser().exists():
        name, _, tag = source.partition(".")
        if name in PRESETS and not source.endswith(WEIGHT_SUFFIXES):
            tags = ", ".join(t for t in TAGS if t.startswith(f"{name}.")) or "none yet"
            raise ValueError(f"Preset {name!r} has no weights {tag!r}; weights there are: {tags}.")
        if "/" not in source and os.sep not in source and not source.endswith(WEIGHT_SUFFIXES):
            near = difflib.get_close_matches(source, PRESETS, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"Presets: {', '.join(PRESETS)}."
            raise ValueError(f"Unknown preset {source!r}, and no file or folder here. {hint}")
    return checkpoint_files.find(source)


def _apply(config: Mapping[str, Any], asked: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the encoder asked for: the checkpoint's, and the caller's over them."""
    wished = {key: value for key, value in asked.items() if value is not None}
    target = dict(config) | wished
    chans = config.get("in_chans", _DEFAULTS["in_chans"])
    data = dict(config.get("data_config") or {})
    data.pop("input_size", None)  # follows img_size and in_chans
    if target.get("in_chans", chans) != chans:
        data = _adapt_data(IMAGENET_DATA | data if chans == 3 else data, target["in_chans"])
        data.pop("input_size", None)
    target["data_config"] = data | (asked.get("data_config") or {})
    return target


def _adapt_data(data: Mapping[str, Any], chans: int) -> dict[str, Any]:
    """Statistics for another number of channels, in step with `adapt_patch_embed`."""
    adapted = dict(data)
    for key in ("mean", "std"):
        if key in data:
            known = data[key]
            one = (sum(known) / len(known),)
            adapted[key] = one if chans == 1 else tuple(known[i % len(known)] for i in range(chans))
    adapted["bands"] = {1: ("L",), 3: ("R", "G", "B")}.get(
        chans, tuple(f"band{i}" for i in range(chans))
    )
    return adapted


# -------------------------------------------------------------------- the weights


def _build(
    stored: Stored, asked: Mapping[str, Any], num_classes: int | None, strict: bool
) -> tuple[VimEncoder, list[str]]:
    """The encoder asked for, with the stored weights; and what had to be assumed."""
    config, assumed = _config_of(stored, asked)
    own_classes = config["num_classes"]
    if num_classes is None and not own_classes:
        raise ValueError(
            f"num_classes=None asks for the head of {stored.path}, which has none; say 0 for "
            "features or the number of classes for a fresh head."
        )
    _check_contradictions(stored.path, config, asked)
    target = _apply(config, asked)
    target["num_classes"] = own_classes if num_classes is None else num_classes
    encoder = VimEncoder(**target)
    state = _adapt(stored, config, encoder)
    missing, unexpected, misshapen = compare_keys(encoder, state)
    if misshapen:
        raise ValueError(f"{stored.path} does not fit: {_some(misshapen)}.")
    if missing or unexpected:
        said = "; ".join(
            f"{len(keys)} {kind} ({_some(keys)})"
            for kind, keys in (("missing", missing), ("unexpected", unexpected))
            if keys
        )
        if strict:
            raise ValueError(
                f"{stored.path} does not match its architecture, keys: {said}. `vim-ssl verify` "
                "lists them all; strict=False loads what fits."
            )
        assumed.append(f"{stored.path} was loaded in part, keys: {said}.")
    encoder.load_state_dict(state, strict=False)
    return encoder, assumed


def _config_of(stored: Stored, asked: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Every argument of the stored encoder, and what had to be assumed."""
    if stored.config is None:
        config, assumed = released_config(
            stored.state, stored.model_name, stored.training_args, asked
        )
    else:
        config, assumed = stored.config, []
        for name in config:
            if name not in _DEFAULTS:
                near = difflib.get_close_matches(name, _DEFAULTS, n=1)
                hint = f"Did you mean {near[0]!r}?" if near else "Was it written by a newer one?"
                raise ValueError(
                    f"The config of {stored.path} has {name!r}, which this vim_ssl does not know. "
                    f"{hint}"
                )
    config = _DEFAULTS | config
    config["stride"] = config["stride"] or config["patch_size"]
    config["dt_rank"] = config["dt_rank"] or math.ceil(config["embed_dim"] / 16)
    if not isinstance(config["img_size"], int):
        config["img_size"] = tuple(config["img_size"])
    return config, assumed


def _check_contradictions(path: Path, config: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    def refuse(name: str, why: str = "the weights decide it") -> None:
        raise ValueError(
            f"{name}={asked[name]!r} was asked for, but {path} has {name}={config[name]!r}; {why}."
        )

    for name in _FIXED:
        if asked.get(name) is not None and asked[name] != config[name]:
            refuse(name)
    if asked.get("num_registers") and config["num_registers"] not in (0, asked["num_registers"]):
        refuse("num_registers", "give that number, or 0 to drop them")
    places = asked.get("cls_position") or config["cls_position"], config["cls_position"]
    if places[0] != places[1] and not {*places} <= {"middle", "first"}:
        refuse("cls_position")
    ways = asked.get("directions") or config["directions"], config["directions"]
    if ways[0] != ways[1] and "both" not in ways:
        refuse("directions", "directions='both' starts the other direction as its copy")


def _adapt(stored: Stored, config: Mapping[str, Any], encoder: VimEncoder) -> dict[str, Tensor]:
    """The stored weights in the form of the encoder asked for.

    Fresh weights are filled in only where the caller asked for parts that the file lacks.
    """
    state = dict(stored.state)
    wanted, fresh = encoder.config, encoder.state_dict()

    for key in [key for key in state if key.startswith("layers.")]:
        backward = _is_backward(key)
        if wanted["directions"] == ("forward" if backward else "backward") and _has_twin(key):
            del state[key]
        elif wanted["directions"] == "both" != config["directions"] and _has_twin(key):
            state[_twin(key)] = state[key].clone()
    for key, had, has in (
        ("mask_token", config["use_mask_token"], wanted["use_mask_token"]),
        ("register_tokens", config["num_registers"], wanted["num_registers"]),
    ):
        if has and not had:
            state[key] = fresh[key]
        elif had and not has:
            state.pop(key, None)

    if wanted["in_chans"] != config["in_chans"] and "patch_embed.proj.weight" in state:
        state["patch_embed.proj.weight"] = adapt_patch_embed(
            state["patch_embed.proj.weight"], wanted["in_chans"]
        )
    if "pos_embed" in state and config["use_pos_embed"]:
        state["pos_embed"] = _adapt_positions(stored.path, state["pos_embed"], config, encoder)

    _adapt_head(stored.path, state, fresh, config, encoder)
    return state


def _adapt_head(
    path: Path,
    state: dict[str, Tensor],
    fresh: Mapping[str, Tensor],
    config: Mapping[str, Any],
    encoder: VimEncoder,
) -> None:
    own = config["num_classes"]
    if "head.weight" in state and state["head.weight"].shape[0] != own:
        raise ValueError(
            f"{path} has a head of {state['head.weight'].shape[0]} classes, but its config says "
            f"{own}; the two files do not belong together."
        )
    was_joined, is_joined = (
        pool == "token+avg" for pool in (config["global_pool"], encoder.global_pool)
    )
    if encoder.num_classes == own and was_joined == is_joined:
        return
    for key in ("head.weight", "head.bias"):
        state.pop(key, None)
        if encoder.num_classes:
            state[key] = fresh[key]
    if encoder.num_classes:
        kept = f"the checkpoint's has {own}" if own else "the checkpoint has none"
        if encoder.num_classes == own:
            kept = f"global_pool {encoder.global_pool!r} has another width"
        log.warning("a fresh head of %d classes: %s", encoder.num_classes, kept)


def adapt_patch_embed(weight: Tensor, in_chans: int) -> Tensor:
    """A patch embedding (d, c, p, p) for another number of channels.

    To one channel: the sum, so that a grey picture gives what it gave as R = G = B. To n channels:
    the c kernels in turn, times c / n, so that the response keeps its size (timm's rule).
    """
    known = weight.shape[1]
    if in_chans == 1:
        return weight.float().sum(1, keepdim=True).to(weight.dtype)
    turn = torch.arange(in_chans) % known
    return weight[:, turn] * (known / in_chans)


def _adapt_positions(
    path: Path, table: Tensor, config: Mapping[str, Any], encoder: VimEncoder
) -> Tensor:
    """The position table on the new grid, the class tokens' own rows kept apart."""
    size = config["img_size"]
    size = (size, size) if isinstance(size, int) else size
    rows, columns = ((side - config["patch_size"]) // config["stride"] + 1 for side in size)
    patches, cls = split_pos_embed(table, config["cls_position"])
    if patches.shape[1] != rows * columns:
        raise ValueError(
            f"{path} has a position table of {table.shape[1]} rows, which does not fit "
            f"{size[0]}x{size[1]} px, a grid of {rows}x{columns}."
        )
    if (rows, columns) != encoder.grid_size:
        patches = resample_abs_pos_embed(
            patches, list(encoder.grid_size), [rows, columns], num_prefix_tokens=0
        )
    return join_pos_embed(patches, cls, encoder.cls_position)


_TWINS = {
    "A_log": "A_b_log", "D": "D_b", "conv1d.weight": "conv1d_b.weight",
    "conv1d.bias": "conv1d_b.bias", "x_proj.weight": "x_proj_b.weight",
    "dt_proj.weight": "dt_proj_b.weight", "dt_proj.bias": "dt_proj_b.bias",
}  # fmt: skip
_TWINS |= {backward: forward for forward, backward in _TWINS.items()}


def _mixer_part(key: str) -> str:
    return key.partition(".mixer.")[2]


def _has_twin(key: str) -> bool:
    return _mixer_part(key) in _TWINS


def _is_backward(key: str) -> bool:
    return "_b" in _mixer_part(key)


def _twin(key: str) -> str:
    return key.removesuffix(_mixer_part(key)) + _TWINS[_mixer_part(key)]


def compare_keys(
    encoder: VimEncoder, state: Mapping[str, Tensor]
) -> tuple[list[str], list[str], list[str]]:
    """Keys that the encoder has and ``state`` lacks; the reverse; and keys of another shape."""
    own = encoder.state_dict()
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    misshapen = [
        f"{key} is {tuple(state[key].shape)}, expected {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    return missing, unexpected, misshapen


def _some(items: list[str], most: int = 5) -> str:
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more
