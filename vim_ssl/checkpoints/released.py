"""Infer the arguments of a released Vim checkpoint from the shapes of its tensors and, where shapes
are ambiguous (stride, image size, class-token position, division of the sum of directions), from
the name of its model.

Names read like ``vim_tiny_patch16_stride8_224_bimambav2_final_pool_mean_abs_pos_embed_with_
midclstok_div2``. The weights were published with arXiv:2401.09417.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# File name -> (model, top-1 accuracy on ImageNet-1k in %, as published with the file).
RELEASED_FILES = {
    "vim_t_midclstok_76p1acc.pth": ("Vim-Ti", 76.1),
    "vim_t_midclstok_ft_78p3acc.pth": ("Vim-Ti+ (stride 8)", 78.3),
    "vim_s_midclstok_80p5acc.pth": ("Vim-S", 80.5),
    "vim_s_midclstok_ft_81p6acc.pth": ("Vim-S+ (stride 8)", 81.6),
    "vim_b_midclstok_81p9acc.pth": ("Vim-B", 81.9),
}
_FIRST = "layers.0.mixer."
# Keys of other architectures, for error messages.
_FOREIGN = {
    r"blocks\.\d+\.attn\.": "a vision transformer (ViT, DeiT)",
    r"layer1\.0\.(conv|bn)": "a ResNet",
    r"stages\.\d+\.": "a staged network (ConvNeXt, Swin)",
    r"(backbone\.)?layers\.\d+\.mixer\.": "a Mamba model inside another one",
}


def released_config(
    state: Mapping[str, Tensor],
    model_name: str | None,
    training_args: Mapping[str, Any],
    requested: Mapping[str, Any],
) -> tuple[dict[str, Any], list[str]]:
    """Return the encoder's arguments for these weights, and the assumptions made.

    Args:
        requested: the caller's arguments; only img_size, stride, divide_out, cls_position and
            directions are used, where the file is ambiguous.
    Raises: ValueError for another architecture, an unsupported variant, or a position table that
        fits two layouts.
    """
    name = model_name if model_name and re.match(r"vim_.*patch\d+", model_name) else None
    directions = _directions(state, model_name or "", training_args, requested)
    _refuse_others(state, model_name or "", directions)
    back = directions == "backward"

    def shape(key: str, ndim: int) -> torch.Size:
        if key not in state or state[key].ndim != ndim:
            state_of = f"of shape {tuple(state[key].shape)}" if key in state else "missing"
            raise ValueError(f"This Vim checkpoint is incomplete: {key} is {state_of}.")
        return state[key].shape

    two_inner, width = shape(f"{_FIRST}in_proj.weight", 2)
    patch = shape("patch_embed.proj.weight", 4)
    config: dict[str, Any] = {
        "embed_dim": width,
        "depth": 1 + max(int(k.split(".")[1]) for k in state if re.match(r"layers\.\d+\.", k)),
        "expand": two_inner // (2 * width),
        "d_state": shape(f"{_FIRST}A_b_log" if back else f"{_FIRST}A_log", 2)[1],
        "d_conv": shape(f"{_FIRST}conv1d{'_b' * back}.weight", 3)[2],
        "dt_rank": shape(f"{_FIRST}dt_proj{'_b' * back}.weight", 2)[1],
        "patch_size": patch[2],
        "in_chans": patch[1],
        "directions": directions,
        "shared_conv": _shares_conv(state),
        "norm_after_scan": f"{_FIRST}layernorm.weight" in state,
        "use_pos_embed": "pos_embed" in state,
        "use_mask_token": "mask_token" in state,
        "num_registers": state["register_tokens"].shape[1] if "register_tokens" in state else 0,
        "num_classes": state["head.weight"].shape[0] if "head.weight" in state else 0,
    }
    assumed: list[str] = []
    config["cls_position"] = _cls_position(state, name, requested, assumed)
    config["divide_out"] = _divide_out(name, config, requested, assumed)
    config |= _layout(state, config, name, requested)
    pooled = "token" if config["cls_position"] != "none" else _pool_of_patches(name or "", assumed)
    joined = "head.weight" in state and state["head.weight"].shape[1] == 2 * width
    config["global_pool"] = "token+avg" if joined else pooled
    return config, assumed


def _refuse_others(state: Mapping[str, Tensor], name: str, directions: str) -> None:
    if f"{_FIRST}in_proj.weight" not in state or state[f"{_FIRST}in_proj.weight"].ndim != 2:
        kinds = (kind for mark, kind in _FOREIGN.items() if any(re.match(mark, k) for k in state))
        looks = next((f"it looks like {kind}" for kind in kinds), "its architecture is unknown")
        keys = ", ".join(list(state)[:3]) or "none"
        raise ValueError(
            f"These weights are not a Vision Mamba encoder: {looks} (first keys: {keys}; expected "
            f"{_FIRST}in_proj.weight and similar)."
        )
    if "bimambav1" in name and not _shares_conv(state):
        raise ValueError(
            f"The model's name {name!r} says bimambav1, whose directions share a convolution and "
            "projections, but these weights do not have its keys (A_b_log without conv1d_b)."
        )
    if directions == "layer" and f"{_FIRST}A_b_log" in state:
        raise ValueError(
            "These weights are Vim's layer-pair variant (if_bidirectional), but their layers also "
            "have two directions each (A_b_log); only pairs of layers with one direction each are "
            "supported."
        )
    if any(key.startswith("rope.") for key in state) or "_rope" in name:
        raise ValueError(
            "These weights were trained with Vim's rope (rope.freqs_cos), which rotates by wrong "
            "positions when the class token is in the middle. vim_ssl's rope has another "
            "definition, so the weights would give other features here."
        )


def _shares_conv(state: Mapping[str, Tensor]) -> bool:
    """Return True for the v1 block: of the backward direction it has only A."""
    has = (f"{_FIRST}{key}" in state for key in ("conv1d.weight", "A_b_log", "conv1d_b.weight"))
    return tuple(has) == (True, True, False)


def _pool_of_patches(name: str, assumed: list[str]) -> str:
    """Return the pooling of a model without class token, from the model's name."""
    match = re.search(r"final_pool_(mean|max|none|all)", name)
    kind = match[1] if match else "mean"
    if kind in ("none", "all"):
        assumed.append(
            f"The model's name {name!r} says final_pool_{kind} (the last token, or no pooling), "
            "which heads here do not have: assumed global_pool='avg', which gives other logits."
        )
    return "max-logits" if kind == "max" else "avg"


def _directions(
    state: Mapping[str, Tensor], name: str, args: Mapping[str, Any], requested: Mapping[str, Any]
) -> str:
    forward, backward = (
        any(_FIRST + key in state for key in keys)
        for keys in (("conv1d.weight",), ("conv1d_b.weight", "A_b_log"))
    )
    one = forward and not backward
    pairs = args.get("if_bidirectional") or "bidirection" in name
    # Upstream's pairs have the keys of one direction; those of `VimEncoder` show it.
    if pairs or (one and "layers.1.mixer.conv1d_b.weight" in state):
        return "layer"
    if one and requested.get("directions") == "layer":
        return "layer"
    if (forward and backward) or (re.match(r"vim_.*patch\d+", name) and "bimambav2" in name):
        return "both"
    return "backward" if backward else "forward"


def _cls_position(
    state: Mapping[str, Tensor], name: str | None, requested: Mapping[str, Any], assumed: list[str]
) -> str:
    if "cls_token_head" in state:
        return "double"
    if "cls_token" not in state:
        return "none"
    if name and re.search(r"mid(dle)?_?cls", name):
        return "middle"
    if requested.get("cls_position") in ("middle", "first"):
        return requested["cls_position"]
    if name and "cls" in name:
        return "first"
    assumed.append(
        "The checkpoint does not name the class token's position: assumed in the middle, as in "
        "all released weights (otherwise pass cls_position='first')."
    )
    return "middle"


def _divide_out(
    name: str | None, config: Mapping[str, Any], requested: Mapping[str, Any], assumed: list[str]
) -> bool:
    """Return True if the directions are averaged. Shapes do not show it, and a wrong value gives
    wrong features without any error."""
    if config["shared_conv"]:  # upstream divides only in the v2 block
        return bool(requested.get("divide_out"))
    if config["norm_after_scan"] or (name and "bimamba" in name and "div2" in name):
        return True  # the variant with a norm always divides
    if requested.get("divide_out") is not None:
        return requested["divide_out"]
    if name and "bimamba" in name:
        assumed.append(
            f"The model's name {name!r} has no div2: assumed divide_out=False. Some versions of "
            "the original code divided anyway; in that case pass divide_out=True."
        )
        return False
    if config["directions"] == "both":
        assumed.append(
            "The checkpoint does not name its model: assumed divide_out=True, as in all released "
            "weights (otherwise pass divide_out=False)."
        )
    elif name is None and config["directions"] != "layer":
        assumed.append(
            "The checkpoint has parameters for one direction: assumed one scan per layer. Vim's "
            "layer-pair variant (if_bidirectional) has the same keys; for that one pass "
            "directions='layer'."
        )
    return True


def _layout(
    state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    name: str | None,
    requested: Mapping[str, Any],
) -> dict[str, Any]:
    """Return img_size (height, width) and stride of the position table."""
    patch: int = config["patch_size"]
    match = re.search(r"patch\d+(?:_stride(\d+))?_(\d+)", name or "")
    named = (int(match[1]) if match[1] else patch) if match else None
    size = requested.get("img_size")
    size = (size, size) if isinstance(size, int) else size and tuple(size)
    if not config["use_pos_embed"]:
        side = int(match[2]) if match else 224
        return {
            "img_size": size or (side, side),
            "stride": named or requested.get("stride") or patch,
        }

    table = state["pos_embed"]
    if table.ndim != 3:
        raise ValueError(f"pos_embed has shape {tuple(table.shape)}; expected (1, rows, d).")
    rows = table.shape[1]
    m = rows - {"double": 2, "none": 0}.get(config["cls_position"], 1)
    side = math.isqrt(max(m, 0))
    if m > 0 and side * side == m:
        layouts = _square_layouts(side, patch, named)
        if len(layouts) > 1:
            layouts = _choose_layout(layouts, rows, side, size, requested.get("stride"))
    else:
        known = named or requested.get("stride")
        layouts = {
            stride: size
            for stride in ((known,) if known else (patch, patch // 2))
            if size and stride and math.prod((x - patch) // stride + 1 for x in size) == m
        }
        if not layouts:
            given = f" {size} gives another number of patches." if size else ""
            raise ValueError(
                f"The position table has {rows} rows, {m} of them patches, not a square grid."
                f"{given} Pass img_size=(height, width) of the training images."
            )
    stride, img_size = next(iter(layouts.items()))
    return {"img_size": img_size, "stride": stride}


def _square_layouts(side: int, patch: int, named: int | None) -> dict[int, tuple[int, int]]:
    """Return the strides, with their image sizes, that give side x side patches.

    Half-overlapping patches could give any grid, but only odd grids correspond to an image size
    divisible by the patch size (27x27: stride 8 at 224 px); other grids are not considered.
    """
    odd = side > 1 and side % 2 == 1 and patch % 2 == 0
    strides = [named] if named else [patch, patch // 2] if odd else [patch]
    return {stride: ((side - 1) * stride + patch,) * 2 for stride in strides}


def _choose_layout(
    layouts: Mapping[int, tuple[int, int]],
    rows: int,
    side: int,
    size: tuple[int, int] | None,
    stride: int | None,
) -> dict[int, tuple[int, int]]:
    """Return the layout with the requested stride or size. Raises: ValueError if ambiguous."""
    chosen = {
        s: fits for s, fits in layouts.items() if stride == s or (stride is None and size == fits)
    }
    if not chosen:
        both = " and ".join(f"stride {s} at {fits[0]} px" for s, fits in sorted(layouts.items()))
        raise ValueError(
            f"The position table has {rows} rows, a {side}x{side} grid that fits {both}; the file "
            f"does not name one. Pass stride={min(layouts)} or stride={max(layouts)}."
        )
    return chosen
