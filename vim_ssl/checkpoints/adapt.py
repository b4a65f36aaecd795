"""Adapt stored weights to another encoder: image size, channels, directions, tokens or head."""

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from vim_ssl.data.config import band_names, band_positions
from vim_ssl.models.encoder import VimEncoder
from vim_ssl.models.tokens import join_pos_embed, split_pos_embed

log = logging.getLogger(__name__)
# Parameters of the forward direction; the backward ones are A_b_log, D_b, conv1d_b.weight …
_DIRECTED = re.compile(r"(.*\.mixer\.(?:A|D|conv1d|x_proj|dt_proj))(_b)?(_log|\..+|)")


def adapt_state(
    path: Path, stored: Mapping[str, Tensor], config: Mapping[str, Any], encoder: VimEncoder
) -> dict[str, Tensor]:
    """Convert stored weights to the requested encoder; only new parts get fresh values.

    Args:
        path: weights file, for messages.
        stored: the state dict.
        config: all arguments of the encoder that the weights belong to.
        encoder: the requested encoder, with fresh weights.
    Raises: ValueError if the weights contradict their config.
    """
    state = dict(stored)
    target, fresh = encoder.config, encoder.state_dict()

    if config["directions"] == "layer":
        state = {_key_in_pair(key): value for key, value in state.items()}
    elif config["directions"] != target["directions"]:  # one of them is "both"
        for match in filter(None, map(_DIRECTED.fullmatch, list(state))):
            prefix, backward, ending = match.groups()
            if target["directions"] == "both":
                state[f"{prefix}{'' if backward else '_b'}{ending}"] = state[match[0]].clone()
            elif bool(backward) == (target["directions"] == "forward"):
                del state[match[0]]
    for key, had, has in (
        ("mask_token", config["use_mask_token"], target["use_mask_token"]),
        ("register_tokens", config["num_registers"], target["num_registers"]),
    ):
        if has and not had:
            state[key] = fresh[key]
        elif had and not has:
            state.pop(key, None)

    if "patch_embed.proj.weight" in state:
        had_bands, has_bands = (band_names(c) for c in (config, target))
        if target["in_chans"] != config["in_chans"] or had_bands != has_bands:
            state["patch_embed.proj.weight"] = adapt_patch_embed(
                state["patch_embed.proj.weight"], target["in_chans"], had_bands, has_bands
            )
    if "pos_embed" in state and config["use_pos_embed"]:
        state["pos_embed"] = adapt_positions(path, state["pos_embed"], config, encoder)

    _adapt_head(path, state, fresh, config, encoder)
    return state


def _key_in_pair(key: str) -> str:
    """Return a key of an encoder whose blocks form pairs: upstream calls the parameters of the
    second, which reads backward, like those of a forward direction."""
    match = _DIRECTED.fullmatch(key)
    layer = re.match(r"layers\.(\d+)\.", key)
    if match is None or match[2] or layer is None or int(layer[1]) % 2 == 0:
        return key
    return f"{match[1]}_b{match[3]}"


def _adapt_head(
    path: Path,
    state: dict[str, Tensor],
    fresh: Mapping[str, Tensor],
    config: Mapping[str, Any],
    encoder: VimEncoder,
) -> None:
    classes = config["num_classes"]
    if "head.weight" in state and state["head.weight"].shape[0] != classes:
        raise ValueError(
            f"{path} has a head of {state['head.weight'].shape[0]} classes, but its config says "
            f"{classes}; the two files do not belong together."
        )
    was_joined, is_joined = (
        pool == "token+avg" for pool in (config["global_pool"], encoder.global_pool)
    )
    if encoder.num_classes == classes and was_joined == is_joined:
        return
    for key in ("head.weight", "head.bias"):
        state.pop(key, None)
        if encoder.num_classes:
            state[key] = fresh[key]
    if encoder.num_classes:
        reason = f"the checkpoint's has {classes}" if classes else "the checkpoint has none"
        if encoder.num_classes == classes:
            reason = f"global_pool {encoder.global_pool!r} has another width"
        log.warning("using a fresh head of %d classes: %s", encoder.num_classes, reason)


def load_checked(
    path: Path, encoder: nn.Module, state: Mapping[str, Tensor], strict: bool
) -> list[str]:
    """Load weights whose keys and shapes fit; return the assumptions made.

    Args:
        strict: missing and unexpected keys are errors; otherwise what fits is loaded.
    Raises: ValueError for weights that do not fit.
    """
    assumed = []
    missing, unexpected, misshapen = compare_keys(encoder, state)
    if misshapen:
        raise ValueError(f"{path} does not fit: {some(misshapen)}.")
    if missing or unexpected:
        candidates = "; ".join(
            f"{len(keys)} {kind} ({some(keys)})"
            for kind, keys in (("missing", missing), ("unexpected", unexpected))
            if keys
        )
        if strict:
            raise ValueError(
                f"{path} does not match its architecture, keys: {candidates}. "
                "`vim-ssl verify` lists them all; strict=False loads what fits."
            )
        assumed.append(f"{path} was loaded in part, keys: {candidates}.")
    encoder.load_state_dict(state, strict=False)
    return assumed


def compare_keys(
    encoder: nn.Module, state: Mapping[str, Tensor]
) -> tuple[list[str], list[str], list[str]]:
    """Return missing keys, unexpected keys, and keys with another shape in ``state``."""
    expected = encoder.state_dict()
    missing = [key for key in expected if key not in state]
    unexpected = [key for key in state if key not in expected]
    misshapen = [
        f"{key} is {tuple(state[key].shape)}, expected {tuple(tensor.shape)}"
        for key, tensor in expected.items()
        if key in state and state[key].shape != tensor.shape
    ]
    return missing, unexpected, misshapen


def some(items: list[str], most: int = 5) -> str:
    """Return the first items, and the number of others, for a message."""
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more


def adapt_patch_embed(
    weight: Tensor, in_chans: int, before: Sequence[str] = (), after: Sequence[str] = ()
) -> Tensor:
    """Adapt a patch embedding (d, c, p, p) to other channels.

    If some band names occur both before and after, those bands keep their kernels and the others
    get the mean kernel; "B04", "B03" and "B02" (Sentinel-2) are red, green and blue. Otherwise a
    single channel gets the sum of the kernels, so that a grey image gives the result of R = G = B,
    and n channels get the c kernels in turn. For n channels, all kernels are then multiplied by
    c / n to keep the scale of the response (timm's rule).

    Args:
        before, after: band names; empty if unknown.
    """
    indices = band_positions(before, after)
    if indices and len(before) == weight.shape[1]:
        mean = weight.float().mean(1).to(weight.dtype)
        kernels = [mean if i is None else weight[:, i] for i in indices]
        return torch.stack(kernels, 1) * (len(before) / in_chans)
    chans = weight.shape[1]
    if in_chans == chans:
        return weight
    if in_chans == 1:
        return weight.float().sum(1, keepdim=True).to(weight.dtype)
    return weight[:, torch.arange(in_chans) % chans] * (chans / in_chans)


def grid_of(config: Mapping[str, Any]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return (height, width) in pixels and (rows, columns) in patches for encoder arguments."""
    size, patch = config["img_size"], config["patch_size"]
    height, width = (size, size) if isinstance(size, int) else size
    rows, columns = ((s - patch) // (config["stride"] or patch) + 1 for s in (height, width))
    return (height, width), (rows, columns)


def adapt_positions(
    path: Path, table: Tensor, config: Mapping[str, Any], encoder: VimEncoder
) -> Tensor:
    """Return the position table resampled to the new grid, without rows for class tokens."""
    size, (rows, columns) = grid_of(config)
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


def copy_weights(encoder: VimEncoder, model: nn.Module) -> None:
    """Copy an encoder's weights into the Vim inside another library's model.

    Examples are the detectors and segmenters of `transformers`, whose `TimmBackboneConfig` takes a
    preset's name. They keep the blocks up to the last index that they read, without norm or head.
    Raises: ValueError if ``model`` does not contain exactly one Vim, or one of another shape.
    """
    targets = [module for module in model.modules() if isinstance(module, VimEncoder)]
    if len(targets) != 1:
        raise ValueError(
            f"{type(model).__name__} contains {len(targets)} Vim encoders, expected one; build it "
            "with a preset's name as the timm backbone."
        )
    given = encoder.state_dict()
    for key, value in targets[0].state_dict().items():
        if key not in given or given[key].shape != value.shape:
            shape = tuple(given[key].shape) if key in given else "not there"
            raise ValueError(
                f"{key} is {tuple(value.shape)} in {type(model).__name__}, in the encoder {shape}; "
                "use the preset that the encoder was built from."
            )
    targets[0].load_state_dict(given, strict=False)  # blocks above the last index are unused
