"""Weights for another shape than they were stored in: another image size or number of channels,
one direction or both, new tokens, another head. Fresh values come in only where asked for.
"""

import logging
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


def adapt_state(
    path: Path, stored: Mapping[str, Tensor], config: Mapping[str, Any], encoder: VimEncoder
) -> dict[str, Tensor]:
    """The stored weights in the form of the encoder asked for.

    Args:
        path: where they come from, for messages.
        stored: the state dict.
        config: all arguments of the encoder that they belong to.
        encoder: the one asked for, with fresh weights.
    Raises: ValueError when the weights do not agree with their own config.
    """
    state = dict(stored)
    wanted, fresh = encoder.config, encoder.state_dict()

    ways = config["directions"], wanted["directions"]
    if ways[0] != ways[1]:  # one of them is "both"
        for key in [key for key in state if _mixer_part(key) in _TWINS]:
            if ways[1] == "both":
                state[_twin(key)] = state[key].clone()
            elif _is_backward(key) == (ways[1] == "forward"):
                del state[key]
    for key, had, has in (
        ("mask_token", config["use_mask_token"], wanted["use_mask_token"]),
        ("register_tokens", config["num_registers"], wanted["num_registers"]),
    ):
        if has and not had:
            state[key] = fresh[key]
        elif had and not has:
            state.pop(key, None)

    if "patch_embed.proj.weight" in state:
        had_bands, has_bands = (band_names(c) for c in (config, wanted))
        if wanted["in_chans"] != config["in_chans"] or had_bands != has_bands:
            state["patch_embed.proj.weight"] = adapt_patch_embed(
                state["patch_embed.proj.weight"], wanted["in_chans"], had_bands, has_bands
            )
    if "pos_embed" in state and config["use_pos_embed"]:
        state["pos_embed"] = _adapt_positions(path, state["pos_embed"], config, encoder)

    _adapt_head(path, state, fresh, config, encoder)
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


def adapt_patch_embed(
    weight: Tensor, in_chans: int, known: Sequence[str] = (), wanted: Sequence[str] = ()
) -> Tensor:
    """A patch embedding (d, c, p, p) for other channels.

    Where the names of the bands have some in common, each of those takes its own kernel and every
    other one the kernels' mean; "B04", "B03" and "B02" (Sentinel-2) are red, green and blue. Else,
    to one channel: the sum, so that a grey image gives what it gave as R = G = B; to n channels:
    the c kernels in turn. To n channels all are then times c / n, so that the response keeps its
    size (timm's rule).

    Args:
        known, wanted: names of the bands, before and after; none where they are not known.
    """
    places = band_positions(known, wanted)
    if places and len(known) == weight.shape[1]:
        mean = weight.float().mean(1).to(weight.dtype)
        kernels = [mean if place is None else weight[:, place] for place in places]
        return torch.stack(kernels, 1) * (len(known) / in_chans)
    chans = weight.shape[1]
    if in_chans == chans:
        return weight
    if in_chans == 1:
        return weight.float().sum(1, keepdim=True).to(weight.dtype)
    turn = torch.arange(in_chans) % chans
    return weight[:, turn] * (chans / in_chans)


def _adapt_positions(
    path: Path, table: Tensor, config: Mapping[str, Any], encoder: VimEncoder
) -> Tensor:
    """The position table on the new grid, the class tokens' own rows kept apart."""
    size = config["img_size"]
    size = (size, size) if isinstance(size, int) else size
    stride = config["stride"] or config["patch_size"]
    rows, columns = ((side - config["patch_size"]) // stride + 1 for side in size)
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


def _is_backward(key: str) -> bool:
    return "_b" in _mixer_part(key)


def _twin(key: str) -> str:
    return key.removesuffix(_mixer_part(key)) + _TWINS[_mixer_part(key)]


def copy_weights(encoder: VimEncoder, model: nn.Module) -> None:
    """Give an encoder's weights to the Vim that another library's model was built around.

    Such as transformers' detectors and segmenters, whose `TimmBackboneConfig` takes a preset's
    name. They keep the blocks up to the last index that they read, and neither norm nor head.
    Raises: ValueError if ``model`` holds no Vim, several, or one of another shape.
    """
    found = [module for module in model.modules() if isinstance(module, VimEncoder)]
    if len(found) != 1:
        raise ValueError(
            f"{type(model).__name__} holds {len(found)} Vim encoders, expected one; build it on "
            "timm's model of a preset's name."
        )
    given = encoder.state_dict()
    for key, value in found[0].state_dict().items():
        if key not in given or given[key].shape != value.shape:
            shape = tuple(given[key].shape) if key in given else "not there"
            raise ValueError(
                f"{key} is {tuple(value.shape)} in {type(model).__name__}, in the encoder {shape}; "
                "name the preset that the encoder was made from."
            )
    found[0].load_state_dict(given, strict=False)  # blocks above the last index are left over
