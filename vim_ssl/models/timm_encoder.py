"""The encoders of timm behind the protocol of this package, with timm's state-dict keys.

    TimmEncoder("vit_small_patch16_224")      also resnet50, swin_tiny_patch4_window7_224 …

Features, logits and the expected input are timm's, to rounding. Vision transformers of the class
`VisionTransformer` also have the token methods that pretraining by masks needs; for others
``without_tokens`` says why not.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from timm.data import resolve_model_data_config
from timm.layers import PatchEmbed, trunc_normal_
from timm.models import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vim_ssl.data.config import adapt_data, complete_data_config, timm_cfg
from vim_ssl.models.encoder import check_ids, check_tensor, resolve_indices
from vim_ssl.models.timm_build import (
    after_reset,
    checked_pool,
    create,
    freeze_unread,
    has_fixed_size,
    registered,
)
from vim_ssl.models.tokens import select_tokens

_INNER = "model."  # in the names of parameters, not in those of the state dict
_START = re.compile(r"(?<!\[)\^")


@dataclass(frozen=True)
class _Patches:
    patch_size: int
    stride: int


class TimmEncoder(nn.Module):
    """A model of timm as an encoder.

    Args:
        timm: name of the model, also with a tag: vit_base_patch16_224.augreg_in21k.
        num_classes, in_chans, drop_path_rate: see `VimEncoder`.
        global_pool: timm's pooling before the head, such as "token", "avg", "max" or "map"; by
            default that of the model.
        img_size: pixels, or (height, width). A vision transformer resamples its positions for
            images of other sizes; networks without positions accept any size.
        use_mask_token: add a learned token for masked patches, which replaces their content and
            keeps their positions.
        data_config: entries that replace timm's; see `VimEncoder`.
        pretrained, pretrained_cfg, pretrained_cfg_overlay: of `timm.create_model`: the weights.
        model_args: other arguments of `timm.create_model`, such as embed_dim or depth.

    Attributes: see `vim_ssl.models.protocol.Encoder`. ``model`` is timm's.

    Raises: ValueError for a name that timm does not know or values that do not fit together;
        TypeError for an argument that the model does not have.
    """

    reads_clips: ClassVar[bool] = False
    directions: ClassVar[str] = "both"  # attention and convolutions read all positions at once
    feature_info: list[dict[str, Any]]

    def __init__(
        self,
        timm: str,
        *,
        num_classes: int = 0,
        global_pool: str | None = None,
        img_size: int | Sequence[int] | None = None,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        use_mask_token: bool = False,
        data_config: Mapping[str, Any] | None = None,
        pretrained: bool = False,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: dict[str, Any] | None = None,
        **model_args: Any,
    ):
        super().__init__()
        self._args = dict(model_args)
        self._name, self.drop_path_rate = timm, drop_path_rate
        self._pool = checked_pool(global_pool, num_classes)
        size = (img_size, img_size) if isinstance(img_size, int) else img_size
        cfg = pretrained_cfg or registered(timm)
        args = {
            "num_classes": num_classes, "in_chans": in_chans, "global_pool": global_pool,
            "img_size": size if has_fixed_size(cfg) else None,
            "drop_path_rate": drop_path_rate or None,  # some architectures have none
            "pretrained_cfg": pretrained_cfg, "pretrained_cfg_overlay": pretrained_cfg_overlay,
        }  # fmt: skip
        self.model = create(timm, pretrained=pretrained, **args | model_args)
        self.in_chans, self.trainings = in_chans, cast(list[dict], [])
        self.classes: list[str] | None = None
        model: Any = self.model
        model.pretrained_cfg.pop("state_dict", None)  # the weights, if they came from memory

        given = dict(data_config or {})
        data = dict(resolve_model_data_config(model))
        built = getattr(getattr(model, "patch_embed", None), "img_size", None)
        height, width = size or built or data.pop("input_size")[1:]
        self.img_size: tuple[int, int] = (height, width)
        if in_chans != len(data["mean"]) or given.get("bands"):
            data = adapt_data({"bands": ("R", "G", "B")} | data, in_chans, given.get("bands"))
        data.pop("input_size", None)
        self.data_config = complete_data_config(data | given, in_chans, self.img_size)
        self.pretrained_cfg = model.pretrained_cfg | timm_cfg(self.data_config, num_classes)

        info: Any = getattr(model, "feature_info", [])
        info = list(getattr(info, "info", info))
        self.feature_info = info if hasattr(model, "forward_intermediates") else []
        self.embed_dim = int(getattr(model, "embed_dim", 0) if self.is_vit else model.num_features)
        prefix = [name for name in ("cls_token", "dist_token") if _has(model, name)]
        self.cls_names = tuple(prefix if getattr(model, "num_prefix_tokens", 0) else ())
        if use_mask_token and self.without_tokens:
            raise ValueError(f"use_mask_token needs patch tokens: {self.without_tokens}")
        self.mask_token: nn.Parameter | None = None
        if use_mask_token:
            token = trunc_normal_(torch.zeros(1, 1, self.embed_dim), std=0.02)
            self.mask_token = nn.Parameter(token)

    # ---------------------------------------------------------------- what it is

    @property
    def is_vit(self) -> bool:
        """Whether it has the token methods: a `VisionTransformer` with square patches."""
        model: Any = self.model
        if not isinstance(model, VisionTransformer):
            return False
        cut = model.patch_embed
        return (
            isinstance(cut, PatchEmbed) and len({*cut.patch_size}) == 1 and not cut.dynamic_img_pad
        )

    @property
    def without_tokens(self) -> str:
        if self.is_vit:
            return ""
        return (
            f"timm:{self._name} is a {type(self.model).__name__}, whose layers need the whole "
            "image. Use a vision transformer of timm (vit_…, deit_…) or a Vim; "
            "supervised_pretrain, finetune, linear_probe, knn and embed accept any architecture."
        )

    @property
    def num_classes(self) -> int:
        return int(cast(Any, self.model).num_classes)

    @property
    def num_features(self) -> int:
        model: Any = self.model
        return int(getattr(model, "head_hidden_size", None) or model.num_features)

    @property
    def global_pool(self) -> str:
        pool = getattr(self.model, "global_pool", None)
        return self._pool or (pool if isinstance(pool, str) else "avg")

    @property
    def features_by_head(self) -> bool:
        """False for the class token after the final norm, which is a token of the last map."""
        return self.global_pool != "token" or len(self.cls_names) != 1

    @property
    def patch_embed(self) -> _Patches:
        if self.is_vit:
            side = cast(Any, self.model).patch_embed.patch_size[0]
            return _Patches(side, side)
        side = int(self.feature_info[-1]["reduction"]) if self.feature_info else 1
        return _Patches(side, side)

    @property
    def grid_size(self) -> tuple[int, int]:
        return self.grid(*self.img_size)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Return rows and columns of patches, or of the last map, for an image of this size.

        Raises: ValueError for sides that are not a whole number of patches.
        """
        side = self.patch_embed.patch_size
        if not self.is_vit:
            return -(-height // side), -(-width // side)
        for length in (height, width):
            if length < side or length % side:
                below = max(length // side, 1) * side
                raise ValueError(
                    f"img_size {length} is not divisible by patch_size {side}; use {below} or "
                    f"{below + side}."
                )
        return height // side, width // side

    @property
    def input_shape(self) -> tuple[int, ...]:
        return tuple(self.data_config["input_size"])

    @property
    def config(self) -> dict[str, Any]:
        """Constructor arguments that rebuild this encoder, without its weights."""
        return {
            "timm": self._name, "num_classes": self.num_classes, "global_pool": self._pool,
            "img_size": self.img_size, "in_chans": self.in_chans,
            "drop_path_rate": self.drop_path_rate, "use_mask_token": self.mask_token is not None,
            "data_config": dict(self.data_config), **self._args,
        }  # fmt: skip

    def for_data(self, data: Any, *, tubelet: int = 1, inflation: str = "centre") -> "TimmEncoder":
        """Return this encoder. Raises: ValueError for videos."""
        if data.kind == "video":
            raise ValueError(
                f"{data.name} contains videos, and timm:{self._name} reads images; use a Vim, "
                "which is inflated to clips."
            )
        return self

    # ---------------------------------------------------------------- features

    def forward(self, x: Tensor) -> Tensor:
        """Timm's features (b, num_features), or logits (b, num_classes) with a head."""
        check_tensor(x)
        return self.model(x)

    def forward_features(self, x: Tensor) -> Tensor:
        return cast(Any, self.model).forward_features(x)

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        pooled = cast(Any, self.model).forward_head(features, pre_logits=pre_logits)
        return pooled.flatten(1) if pre_logits else pooled

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Return the maps after selected blocks or stages; arguments and result as those of
        `VimEncoder.forward_intermediates`.

        Raises: ValueError for an architecture that gives no maps.
        """
        check_tensor(x)
        if not self.feature_info:
            raise ValueError(
                f"timm:{self._name} gives no maps of its stages (forward_intermediates), which "
                "dense heads and the readout 'layers' need; use another architecture."
            )
        taken = resolve_indices(indices, len(self.feature_info), int_means_last=True)
        blocks = sorted({*taken})  # timm returns each once, in this order
        args: dict[str, Any] = {"norm": norm, "stop_early": stop_early}
        tokens = getattr(self.model, "num_prefix_tokens", None)
        if tokens:
            args |= {"return_prefix_tokens": True, "output_fmt": output_fmt}
        final, taps = cast(Any, self.model).forward_intermediates(x, blocks, **args)
        by_block, maps = dict(zip(blocks, taps, strict=True)), []
        for block in taken:
            patches, prefix = by_block[block] if tokens else (by_block[block], None)
            if output_fmt == "NLC" and not tokens:
                patches = patches.flatten(2).mT
            if prefix is None:
                prefix = x.new_zeros(len(x), 0, patches.shape[-1])
            cls = prefix[:, : len(self.cls_names)]
            maps.append((patches, cls) if return_prefix_tokens else patches)
        return maps if intermediates_only else (final, maps)

    def prune_intermediate_layers(self, indices: int | Sequence[int] = 1) -> list[int]:
        """Drop the head, and the blocks of a vision transformer after the last index; freeze the
        rest that no map reads; return the resolved indices."""
        kept = resolve_indices(indices, len(self.feature_info))
        model: Any = self.model
        self.reset_classifier(0)
        if self.is_vit:
            # What only the features read would have no gradient, and DDP would fail.
            if model.attn_pool is not None:
                self.reset_classifier(0, "avg")
            elif not isinstance(model.fc_norm, nn.Identity):
                model.fc_norm = nn.Identity()
                self._args["final_norm"] = False
            if max(kept) + 1 < len(model.blocks):
                model.blocks = model.blocks[: max(kept) + 1]
                self.feature_info = self.feature_info[: max(kept) + 1]
                self._args["depth"] = len(model.blocks)
        taps: dict[str, Any] = {"norm": True, "intermediates_only": True}
        freeze_unread(self, lambda copied, x: copied.forward_intermediates(x, kept, **taps))
        return kept

    def freeze_pooling(self) -> None:
        """Freeze what only the pooled features read, and no token: a norm or attention after the
        last one. Pretraining by tokens would not train it."""

        def tokens(copied: TimmEncoder, x: Tensor) -> list[Tensor]:
            patches = copied.embed(x)
            mask = torch.zeros(patches.shape[:2], dtype=torch.bool)
            return [copied.forward_tokens(patches, mask=mask)]

        freeze_unread(self, tokens)

    def get_classifier(self) -> nn.Module:
        head = cast(Any, self.model).get_classifier()
        return nn.ModuleList(head) if isinstance(head, tuple) else head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Create a fresh head with this many classes (0: none); optionally change timm's pooling.

        Raises: ValueError for a pooling that the model does not have.
        """
        model: Any = self.model
        checked_pool(self._pool if global_pool is None else global_pool, num_classes)
        try:
            model.reset_classifier(num_classes, *([] if global_pool is None else [global_pool]))
        except (AssertionError, TypeError, ValueError, KeyError) as error:
            raise ValueError(
                f"timm:{self._name} does not accept global_pool {global_pool!r} ({error})."
            ) from error
        self.classes = None
        self._pool = self._pool if global_pool is None else global_pool
        self._args |= after_reset(model, global_pool is not None)
        weight = next(self.parameters())
        self.get_classifier().to(weight.device, weight.dtype)

    # ---------------------------------------------------------------- tokens

    def embed(self, x: Tensor, *, ids_keep: Tensor | None = None) -> Tensor:
        """Embed images as patch tokens with positions added; see `VimEncoder.embed`."""
        check_ids(ids_keep, x.shape[0])
        return select_tokens(self._embed(x)[1], ids_keep)

    def forward_tokens(
        self,
        tokens: Tensor,
        *,
        ids_keep: Tensor | None = None,
        mask: Tensor | None = None,
        directions: str | None = None,
        indices: Sequence[int] | None = None,
        grid: tuple[int, int] | None = None,
    ) -> Any:
        """Run the blocks over patch tokens, after the class tokens; see
        `VimEncoder.forward_tokens`.

        Args:
            tokens, ids_keep, mask, indices: as there.
            directions: only "both".
            grid: rows and columns of the m patches; the encoder's by default.
        Returns: (b, class tokens + registers + k, embed_dim) after the final norm, and with
            ``indices`` the list of taps.
        """
        self._check_tokens(directions)
        b, m, _ = tokens.shape
        rows, columns = grid or self.grid_size
        if rows * columns != m:
            raise ValueError(f"{m} tokens do not fill a {rows}x{columns} grid; pass grid=.")
        # Positions and the tokens before the patches are those of patches without content.
        like = tokens.new_zeros(1, rows, columns, self.embed_dim)
        prefix, positions = self._positions(like)
        if mask is not None:
            if mask.shape != (b, m) or mask.dtype != torch.bool:
                raise ValueError(
                    f"mask is {mask.dtype} {tuple(mask.shape)}; expected torch.bool ({b}, {m}), "
                    "True = masked."
                )
            blank = positions if self.mask_token is None else self.mask_token + positions
            tokens = torch.where(mask[..., None], blank.to(tokens.dtype), tokens)
        check_ids(ids_keep, b)
        prefix = prefix.to(tokens.dtype).expand(b, -1, -1)
        out, taps = self._run(prefix, select_tokens(tokens, ids_keep), indices or ())
        return out if indices is None else (out, taps)

    def forward_visible(
        self, x: Tensor, ids_keep: Tensor, *, directions: str | None = None,
        indices: Sequence[int] = (),
    ) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
        """Encode the visible patches; positions are added before the others are left out. See
        `VimEncoder.forward_visible`."""
        self._check_tokens(directions)
        check_ids(ids_keep, x.shape[0])
        prefix, patches = self._embed(x)
        return self._run(prefix, select_tokens(patches, ids_keep), indices)

    def split_tokens(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Split tokens, class tokens and registers first, into patches and class tokens."""
        first = int(cast(Any, self.model).num_prefix_tokens)
        return features[:, first:], features[:, : len(self.cls_names)]

    def _check_tokens(self, directions: str | None = None) -> None:
        if self.without_tokens:
            raise ValueError(self.without_tokens)
        if directions not in (None, "both"):
            raise ValueError(
                f"directions {directions!r} requested, but timm:{self._name} reads all tokens at "
                "once; only a Vim reads in one direction."
            )

    def _embed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(b, c, h, w) -> the tokens before the patches (b, p, d), and the patches (b, m, d), with
        positions."""
        check_tensor(x)
        self._check_tokens()
        if x.dim() != 4 or x.shape[1] != self.in_chans:
            raise ValueError(
                f"images have shape {tuple(x.shape)}; expected (b, {self.in_chans}, h, w)."
            )
        self.grid(*x.shape[-2:])
        return self._positions(cast(Any, self.model).patch_embed(x))

    def _positions(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Add positions to patches (b, rows, columns, d), or (b, m, d) without resampling."""
        model: Any = self.model
        if not model.dynamic_img_size and patches.dim() == 4:
            patches = patches.flatten(1, 2)
        tokens = model._pos_embed(patches)
        return tokens[:, : model.num_prefix_tokens], tokens[:, model.num_prefix_tokens :]

    def _run(
        self, prefix: Tensor, patches: Tensor, indices: Sequence[int]
    ) -> tuple[Tensor, list[Tensor]]:
        model: Any = self.model
        hidden = model.norm_pre(torch.cat([prefix, patches], dim=1))
        taken, taps = resolve_indices(indices, len(model.blocks)), {}
        for i, block in enumerate(model.blocks):
            if model.grad_checkpointing and torch.is_grad_enabled():
                hidden = checkpoint(block, hidden, use_reentrant=False)
            else:
                hidden = block(hidden)
            if i in taken:
                taps[i] = hidden
        return model.norm(hidden), [taps[i] for i in taken]

    # ---------------------------------------------------------------- training

    def no_weight_decay(self) -> set[str]:
        names: set[str] = getattr(self.model, "no_weight_decay", set)()
        return {"mask_token", *(_INNER + name for name in names)}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return timm's mapping of parameter names to layers.

        Raises: ValueError for an architecture without one.
        """
        matcher: Callable | None = getattr(self.model, "group_matcher", None)
        if matcher is None:
            raise ValueError(f"timm:{self._name} has no layers for a layer_decay; use 1.")

        def inner(pattern: str) -> str:  # timm's patterns match from the start of a name
            return f"{re.escape(_INNER)}(?:{_START.sub('', pattern)})"

        return {
            group: inner(spec) if isinstance(spec, str) else [(inner(p), more) for p, more in spec]
            for group, spec in matcher(coarse=coarse).items()
            if spec is not None
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass. Raises: ValueError if timm does not support it."""
        try:
            cast(Any, self.model).set_grad_checkpointing(enable)
        except (AssertionError, AttributeError) as error:
            raise ValueError(
                f"timm:{self._name} does not support grad_checkpointing; leave it out."
            ) from error

    # ---------------------------------------------------------------- files

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "",
                   keep_vars: bool = False) -> Any:  # fmt: skip
        """Return timm's state dict, and ``mask_token`` if there is one: its keys are timm's."""
        if args:
            raise TypeError("state_dict takes keyword arguments only.")
        state = self.model.state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)
        if self.mask_token is not None:
            token = self.mask_token
            state[f"{prefix}mask_token"] = token if keep_vars else token.detach()
        return state

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """Rename timm's keys to those of the module inside, which torch reads next."""
        inner = f"{prefix}{_INNER}"
        for key in [k for k in state_dict if k.startswith(prefix) and not k.startswith(inner)]:
            if key != f"{prefix}mask_token":
                state_dict[inner + key.removeprefix(prefix)] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _has(model: nn.Module, name: str) -> bool:
    return isinstance(getattr(model, name, None), Tensor)
