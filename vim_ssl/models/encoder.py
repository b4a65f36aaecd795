"""The Vision Mamba encoder: patches in raster order, class token in the middle, Vim blocks.

    image -> embed -> tokens (b, m, d) -> forward_tokens -> (b, tokens, d) -> forward_head

Pretraining uses `embed` and `forward_tokens`; the rest is timm's protocol.
Reference: Vision Mamba, arXiv:2401.09417. State-dict keys are those of the released checkpoints.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, cast, overload

import torch
import torch.nn.functional as F
from timm.layers import DropPath, build_rotary_pos_embed, resample_abs_pos_embed_nhwc, trunc_normal_
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vim_ssl.data.config import complete_data_config, timm_cfg
from vim_ssl.models.block import (
    DIRECTIONS,
    MixerState,
    RMSNorm,
    VimBlock,
    is_plain,
)
from vim_ssl.models.presets import PRESETS as PRESETS
from vim_ssl.models.tokens import (
    CLS_TOKENS,
    cls_slots,
    cut_patches,
    insert_tokens,
    register_slots,
    remove_tokens,
    select_tokens,
    split_pos_embed,
)

POOLS = ("token", "avg", "token+avg", "max", "max-logits", "")
# Of an encoder: those of its blocks, or one direction per block, in turn.
DIRECTIONS_OF_BLOCKS = (*DIRECTIONS, "layer")


class PatchEmbed(nn.Module):
    """Cut an image into patches and project them; ``stride`` below ``patch_size`` overlaps them."""

    def __init__(self, patch_size: int, stride: int, in_chans: int, embed_dim: int):
        super().__init__()
        self.patch_size, self.stride = patch_size, stride
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride)
        fan_in = in_chans * patch_size**2
        trunc_normal_(self.proj.weight, std=fan_in**-0.5)  # LeCun normal
        nn.init.zeros_(cast(Tensor, self.proj.bias))

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Return rows and columns of patches. Raises: ValueError for sides that do not fit."""
        p, s = self.patch_size, self.stride
        for side in (height, width):
            if side < p or (side - p) % s:
                below = p + max(side - p, 0) // s * s
                above = below if side < p else below + s
                use = f"{below} or {above}" if below != above else f"at least {below}"
                rule = f"divisible by patch_size {p}" if s == p else f"{p} plus a multiple of {s}"
                raise ValueError(f"img_size {side} is not {rule}; use {use}.")
        return (height - p) // s + 1, (width - p) // s + 1

    def forward(self, x: Tensor, ids_keep: Tensor | None = None) -> Tensor:
        """(b, in_chans, h, w) -> (b, rows * columns, embed_dim), row by row; with ``ids_keep``,
        (b, k) integers, only these patches."""
        proj = self.proj
        if _cuts_into_patches(proj, x):
            # The convolution is a product, whose backward pass is faster.
            patches = select_tokens(cut_patches(x, proj.kernel_size), ids_keep)
            return F.linear(patches, proj.weight.flatten(1), proj.bias)
        return select_tokens(proj(x).flatten(2).mT, ids_keep)


def check_ids(ids: Tensor | None, b: int) -> None:
    """Raise ValueError for indices that are not (b, k)."""
    if ids is not None and (ids.dim() != 2 or ids.shape[0] != b):
        raise ValueError(f"ids_keep has shape {tuple(ids.shape)}; expected ({b}, k).")


def _cuts_into_patches(proj: Any, x: Tensor) -> bool:
    """True if a convolution of images or clips multiplies patches that do not overlap."""
    return (
        is_plain(proj)
        and proj.kernel_size == proj.stride
        and not any(proj.padding)
        and (set(proj.dilation), proj.groups) == ({1}, 1)
        and x.dim() == 2 + len(proj.stride)
        and not any(side % size for side, size in zip(x.shape[2:], proj.stride, strict=True))
    )


class _NoNorm(nn.Module):
    """Replacement for a pruned final norm, so that no parameter is without gradient."""

    def forward(self, hidden: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        residual = hidden if residual is None else residual + hidden
        return residual.to(hidden.dtype), residual


class VimEncoder(nn.Module):
    """Vision Mamba.

    Args:
        img_size: side in pixels, or (height, width), for the position table. Other sizes are also
            accepted: the table is resampled to their grid.
        patch_size, stride: pixels; ``stride`` defaults to ``patch_size``.
        in_chans: channels of the image.
        num_classes: number of outputs of the head; 0: no head.
        global_pool: "token" (mean of the class tokens), "avg" (mean of the patches), "token+avg"
            (both, concatenated), "max" (maximum of each feature over the patches), "max-logits"
            (maximum of each logit: the head is applied to every patch; features are those of
            "max") or "" (all tokens). By default "token", or "avg" without a class token.
        embed_dim, depth, d_state, d_conv, expand, dt_rank, shared_conv, norm_after_scan,
            divide_out: the blocks; see `VimMixer`.
        cls_position: "middle" (before patch m // 2, the paper's choice), "first", "double" (one at
            each end) or "none".
        directions: "both", "forward" or "backward": the directions that have parameters in every
            block. "layer": the blocks form pairs, of which the first reads forward and the second
            backward; both read the same tokens, and their outputs and residual streams are added
            (upstream's ``if_bidirectional``). The residual stream thus doubles in every pair.
        num_registers: number of learned tokens, evenly spaced in the sequence (Mamba-Reg,
            arXiv:2405.14858) and removed from the outputs.
        use_mask_token: add a learned token for masked patches. Without it a masked patch is only
            its position.
        use_pos_embed: use a learned table of absolute positions.
        rope: in every block, rotate each patch by angles from its row and column: axial, base
            10000, coordinates in patches, independent of ``img_size``; other tokens are not
            rotated. (Upstream's rotation differs: it ignores the class token in the middle.)
        drop_path_rate: stochastic depth, rising linearly over the blocks.
        scan_backend: see `vim_ssl.kernels.selective_scan`.
        data_config: mean, std, input_size, interpolation, crop_pct, crop_mode, bands of the
            expected images; ImageNet's by default.

    Attributes:
        classes: class names of a head that `load_encoder` read from a run; otherwise None.
        trainings: which images its weights were trained on; see `vim_ssl.data.identity`.

    Raises: ValueError for values that do not fit together.
    """

    reads_clips: ClassVar[bool] = False  # (b, c, t, h, w), as `VideoEncoder`
    features_by_head: ClassVar[bool] = False  # see `vim_ssl.models.protocol`
    without_tokens: ClassVar[str] = ""
    tubelet: int  # frames per token, of an encoder of clips only

    def __init__(
        self,
        *,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        stride: int | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str | None = None,
        embed_dim: int = 192,
        depth: int = 24,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | None = None,
        cls_position: str = "middle",
        directions: str = "both",
        shared_conv: bool = False,
        divide_out: bool = True,
        norm_after_scan: bool = False,
        num_registers: int = 0,
        use_mask_token: bool = False,
        use_pos_embed: bool = True,
        rope: bool = False,
        drop_path_rate: float = 0.0,
        scan_backend: str = "auto",
        data_config: dict | None = None,
    ):
        args = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        super().__init__()
        _check_choice("cls_position", cls_position, CLS_TOKENS)
        _check_choice("directions", directions, DIRECTIONS_OF_BLOCKS)
        if shared_conv and directions != "both":
            raise ValueError(
                "shared_conv shares one convolution between the two directions of a block, but "
                f"directions is {directions!r}; use directions='both' or shared_conv=False."
            )
        if directions == "layer" and depth % 2:
            raise ValueError(
                f"directions='layer' needs pairs of blocks, but depth is {depth}; use an even one."
            )
        if rope and embed_dim % 4:
            raise ValueError(f"rope needs an embed_dim divisible by 4; embed_dim is {embed_dim}.")
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        self.img_size = (height, width)
        self.data_config = complete_data_config(data_config, in_chans, self.img_size)
        args.pop("data_config")
        self._args = args | {"img_size": self.img_size}
        self.in_chans, self.num_classes = in_chans, num_classes
        self.trainings: list[dict] = []
        self.embed_dim = embed_dim
        self.cls_position, self.directions = cls_position, directions
        self.num_registers, self.rope = num_registers, rope
        self.drop_path_rate = drop_path_rate
        self.grad_checkpointing = False

        self.patch_embed = PatchEmbed(patch_size, stride or patch_size, in_chans, embed_dim)
        self.grid_size = self.patch_embed.grid(*self.img_size)
        patches = self.grid_size[0] * self.grid_size[1]
        self.cls_names = CLS_TOKENS[cls_position]
        for name in self.cls_names:
            self.register_parameter(name, _token(embed_dim))
        rows = patches + len(self.cls_names)
        self.pos_embed = _token(embed_dim, rows) if use_pos_embed else None
        self.register_tokens = _token(embed_dim, num_registers) if num_registers else None
        self.mask_token = _token(embed_dim) if use_mask_token else None

        # Use Python numbers: tensors on the meta device have no values.
        rates = [0.0, *(drop_path_rate * i / max(depth - 1, 1) for i in range(depth))]
        self.layers = nn.ModuleList(
            VimBlock(
                embed_dim, drop_path=rates[i], d_state=d_state, d_conv=d_conv, expand=expand,
                dt_rank=dt_rank, shared_conv=shared_conv, divide_out=divide_out,
                directions=("forward", "backward")[i % 2] if directions == "layer" else directions,
                norm_after_scan=norm_after_scan, depth=depth, scan_backend=scan_backend,
            )
            for i in range(depth)
        )  # fmt: skip
        self.drop_path = DropPath(drop_path_rate) if drop_path_rate else nn.Identity()
        self.norm_f: nn.Module = RMSNorm(embed_dim)
        reduction = stride or patch_size
        self.feature_info = [
            {"module": f"layers.{i}", "num_chs": embed_dim, "reduction": reduction}
            for i in range(depth)
        ]
        # For timm's resolve_model_data_config; timm.create_model replaces it by its own.
        self.pretrained_cfg = timm_cfg(self.data_config, num_classes)
        self.default_cfg = self.pretrained_cfg
        default_pool = "token" if self.cls_names else "avg"
        self.reset_classifier(num_classes, default_pool if global_pool is None else global_pool)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Input shape from `data_config`: (c, h, w) of an image, or (c, t, h, w) of a clip."""
        return tuple(self.data_config["input_size"])

    def for_data(self, data, *, tubelet: int = 1, inflation: str = "centre") -> "VimEncoder":
        """Return this encoder, or a video encoder with its weights if the data are videos.

        Args:
            data: from `vim_ssl.data.open_data`; videos give the number of frames.
            tubelet, inflation: settings of the video encoder; see `vim_ssl.models.video.inflate`.
        Raises: ValueError if the number of frames is not divisible by ``tubelet``.
        """
        if data.kind != "video":
            return self
        from vim_ssl.models.video import inflate  # it imports this module

        frames = data.sampling.frames
        return inflate(self, frames=frames, tubelet=tubelet, how=inflation)

    # ---------------------------------------------------------------- tokens: the core

    def embed(self, x: Tensor, *, ids_keep: Tensor | None = None) -> Tensor:
        """Embed images as patch tokens with positions added.

        Args:
            x: (b, in_chans, h, w), of any size that is a whole number of patches.
            ids_keep: (b, k) integers: indices of the patches to embed; all by default.
        Returns: (b, m, embed_dim) in raster order; the grid is ``grid(h, w)``. With ``ids_keep``
            (b, k, embed_dim) in its order.
        Raises: ValueError that names the nearest sizes that fit; TypeError for an image that is not
            a tensor.
        """
        check_tensor(x)
        if x.dim() != 4 or x.shape[1] != self.in_chans:
            raise ValueError(
                f"images have shape {tuple(x.shape)}; expected (b, {self.in_chans}, h, w)."
            )
        check_ids(ids_keep, x.shape[0])
        grid = self.grid(*x.shape[-2:])
        tokens = self.patch_embed(x, ids_keep)
        pos, _ = self._positions(grid)
        return tokens if pos is None else tokens + select_tokens(pos, ids_keep).to(tokens.dtype)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Return rows and columns of patches for an image of this size in pixels."""
        return self.patch_embed.grid(height, width)

    @overload
    def forward_tokens(
        self, tokens: Tensor, *, ids_keep: Tensor | None = None, mask: Tensor | None = None,
        directions: str | None = None, indices: None = None, grid: tuple[int, int] | None = None,
    ) -> Tensor: ...  # fmt: skip

    @overload
    def forward_tokens(
        self, tokens: Tensor, *, ids_keep: Tensor | None = None, mask: Tensor | None = None,
        directions: str | None = None, indices: Sequence[int], grid: tuple[int, int] | None = None,
    ) -> tuple[Tensor, list[Tensor]]: ...  # fmt: skip

    def forward_tokens(
        self,
        tokens: Tensor,
        *,
        ids_keep: Tensor | None = None,
        mask: Tensor | None = None,
        directions: str | None = None,
        indices: Sequence[int] | None = None,
        grid: tuple[int, int] | None = None,
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Run the blocks over patch tokens, with the class tokens inserted.

        Args:
            tokens: (b, m, embed_dim) from `embed`.
            ids_keep: (b, k) integers: indices of the visible patches, in scan order; all by
                default. A middle class token is inserted in the middle of these k patches.
            mask: (b, m) bool, True = masked: the mask token replaces the content of these patches;
                their positions are kept.
            directions: "both", "forward" or "backward", a subset of the encoder's; only None if
                the encoder's is "layer".
            indices: blocks after which to tap the residual stream; with directions "layer", after
                the pair of this block.
            grid: rows and columns of the m patches; required with ``mask`` or ``rope`` if the grid
                is neither the encoder's nor square.

        Returns: (b, k + class tokens, embed_dim) after the final norm; with ``indices`` also the
            list of taps, same shape, before any norm.
        Raises: ValueError for shapes, directions or indices that do not fit.
        """
        b, m, _ = tokens.shape
        if mask is not None:
            tokens = self._hide(tokens, mask, self._grid_of(m, grid))
        check_ids(ids_keep, b)
        out, taps = self._run(
            select_tokens(tokens, ids_keep), self._rotation(m, grid, ids_keep), directions,
            indices or (),
        )  # fmt: skip
        return out if indices is None else (out, taps)

    def forward_visible(
        self, x: Tensor, ids_keep: Tensor, *, directions: str | None = None,
        indices: Sequence[int] = (),
    ) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
        """Encode the visible patches of images; the others are not even embedded.

        Args:
            x: (b, in_chans, h, w), or clips; see `embed`.
            ids_keep, directions, indices: see `forward_tokens`.
        Returns: (b, k + class tokens, embed_dim) after the final norm, and the list of taps: those
            of ``forward_tokens(embed(x), ids_keep=ids_keep)``.
        """
        tokens, grid = self.embed(x, ids_keep=ids_keep), self.grid(*x.shape[-2:])
        rotation = self._rotation(grid[0] * grid[1], grid, ids_keep)
        return self._run(tokens, rotation, directions, indices)

    def forward_stream(
        self, tokens: Tensor, state: list[MixerState] | None = None
    ) -> tuple[Tensor, list[MixerState]]:
        """Encode a sequence piece by piece, with the same outputs as one pass over the whole.

        Memory is constant if pieces are embedded and encoded under `torch.no_grad`; otherwise the
        state keeps the graph of all earlier pieces, so that gradients flow through it.

        Args:
            tokens: (b, k, embed_dim), the next tokens, with their positions; k is 1 or more.
            state: returned by the previous call; None for the first piece.

        Returns: (b, k, embed_dim) after the final norm, preceded in the first call by the class
            token if there is one; and the state, of constant size.
        Raises: ValueError for an encoder with a backward direction, whose outputs depend on all
            later tokens; if the class token, registers or rotation depend on the length of the
            sequence; and for the state of another encoder or batch.
        """
        if self.directions != "forward":
            raise ValueError(
                f"a stream needs directions='forward'; this encoder scans {self.directions!r}, so "
                "its output for a token depends on all later tokens."
            )
        if self.cls_position not in ("none", "first") or self.num_registers or self.rope:
            raise ValueError(
                "a stream needs cls_position 'none' or 'first', no registers and no rope, because "
                "other positions depend on the length of the sequence; this encoder has "
                f"cls_position {self.cls_position!r}, num_registers {self.num_registers} and rope "
                f"{self.rope}."
            )
        if tokens.dim() != 3 or not tokens.shape[1] or tokens.shape[2] != self.embed_dim:
            raise ValueError(
                f"tokens have shape {tuple(tokens.shape)}; expected (b, k, {self.embed_dim}) with "
                "k 1 or more: the output of embed(), not images."
            )
        if state is not None and {len(m) for pair in state for m in pair} != {len(tokens)}:
            raise ValueError(f"the state does not match a batch of {len(tokens)} sequences.")
        if state is not None and len(state) != len(self.layers):
            raise ValueError(
                f"the state has {len(state)} blocks, but this encoder has {len(self.layers)}."
            )
        hidden = tokens if state is not None else self._insert_extra_tokens(tokens)
        residual, after = None, []
        for i, layer in enumerate(self.layers):
            block: Any = layer
            before = None if state is None else state[i]
            hidden, residual, new = block.forward_stream(hidden, residual, before)
            after.append(new)
        return self.norm_f(self.drop_path(hidden), residual)[0], after

    def _run(self, tokens, rotation, directions, indices, stop_early=False):
        """Like `forward_tokens` for tokens (b, k, d) and their rotation, but always return taps and
        optionally skip the last blocks."""
        _, k, d = tokens.shape
        if directions is not None:
            _check_choice("directions", directions, DIRECTIONS)
            if self.directions not in ("both", directions):
                remedy = "load it with directions='both' to initialise the other"
                if self.directions == "layer":
                    remedy = "its blocks have one direction each; omit the argument"
                raise ValueError(
                    f"directions {directions!r} requested, but the encoder has only "
                    f"{self.directions!r}; {remedy}."
                )
        hidden = self._insert_extra_tokens(tokens)
        if rotation is not None:  # class tokens and registers are not rotated: sin 0, cos 1
            fill = (tokens.new_full((1, 1, d), value) for value in (0.0, 1.0))
            rotation = tuple(
                self._insert_extra(table, value, value)
                for table, value in zip(rotation, fill, strict=True)
            )

        taken = resolve_indices(indices, len(self.layers))
        layers = list(self.layers)
        layers = layers[: self._whole_pairs(max(taken) + 1)] if stop_early and taken else layers
        registers = register_slots(k + len(self.cls_names), self.num_registers)
        residual, taps, step = None, {}, self._whole_pairs(1)
        for i in range(0, len(layers), step):
            outputs = [
                checkpoint(layer, hidden, residual, directions, rotation, use_reentrant=False)
                if self.grad_checkpointing and torch.is_grad_enabled()
                else layer(hidden, residual, directions, rotation)
                for layer in layers[i : i + step]
            ]
            (hidden, residual), *second = outputs
            for more_hidden, more_residual in second:
                hidden, residual = hidden + more_hidden, residual + more_residual
            for j in {*range(i, i + step)}.intersection(taken):
                taps[j] = remove_tokens(residual + hidden, registers)[0]
        normed, _ = self.norm_f(self.drop_path(hidden), residual)
        return remove_tokens(normed, registers)[0], [taps[i] for i in taken]

    def _whole_pairs(self, count: int) -> int:
        """Return the number of blocks to run for ``count``: whole pairs, if blocks form pairs."""
        return count + count % 2 if self.directions == "layer" else count

    def _hide(self, tokens: Tensor, mask: Tensor, grid: tuple[int, int]) -> Tensor:
        """Replace the content of masked patches; keep their positions."""
        b, m, d = tokens.shape
        if mask.shape != (b, m) or mask.dtype != torch.bool:
            raise ValueError(
                f"mask is {mask.dtype} {tuple(mask.shape)}; expected torch.bool ({b}, {m}), "
                "True = masked."
            )
        blank = tokens.new_zeros(1, 1, d) if self.mask_token is None else self.mask_token
        pos = self._patch_positions(m, grid)
        blank = blank if pos is None else blank + pos
        return torch.where(mask[..., None], blank.to(tokens.dtype), tokens)

    def _insert_extra_tokens(self, tokens: Tensor) -> Tensor:
        """Insert the class tokens, with their positions added, and the registers."""
        _, cls_pos = self._positions(self.grid_size)
        # getattr: replicas, wrappers and parametrisations replace the parameter by a plain tensor.
        cls = [tokens.new_zeros(1, 0, self.embed_dim), *(getattr(self, n) for n in self.cls_names)]
        joined = torch.cat(cls, dim=1)
        joined = joined if cls_pos is None else joined + cls_pos
        return self._insert_extra(tokens, joined, self.register_tokens)

    def _insert_extra(self, patches: Tensor, cls: Tensor, registers: Tensor | None) -> Tensor:
        """(b, k, d) -> (b, k + class tokens + registers, d), each in its slot of the scan order.

        ``cls`` and ``registers`` are (1, count, d), or (1, 1, d) for the same value everywhere.
        """
        b, k, _ = patches.shape
        cls = cls.expand(b, len(self.cls_names), -1).to(patches.dtype)
        sequence = insert_tokens(patches, cls, cls_slots(k, self.cls_position))
        if registers is None or not self.num_registers:
            return sequence
        registers = registers.expand(b, self.num_registers, -1).to(patches.dtype)
        return insert_tokens(
            sequence, registers, register_slots(sequence.shape[1], self.num_registers)
        )

    def _positions(self, grid: tuple[int, int]) -> tuple[Tensor | None, Tensor | None]:
        """Return position embeddings of patches (1, m, d) and class tokens (1, c, d)."""
        if self.pos_embed is None:
            return None, None
        patches, cls = split_pos_embed(self.pos_embed, self.cls_position)
        table = patches.unflatten(1, self.grid_size)  # (1, rows, columns, d)
        return resample_abs_pos_embed_nhwc(table, list(grid)).flatten(1, 2), cls

    def _patch_positions(self, m: int, grid: tuple[int, int]) -> Tensor | None:
        """Return the position embeddings of m patches on this grid, (1, m, d)."""
        return self._positions(grid)[0]

    def _rotation(
        self, m: int, grid: tuple[int, int] | None, ids_keep: Tensor | None = None
    ) -> tuple[Tensor, ...] | None:
        """Return sin and cos for the m patches on this grid, (1, m, embed_dim) each, or for those
        of ``ids_keep``, (b, k, embed_dim); None without ``rope``."""
        if not self.rope:
            return None
        tables = build_rotary_pos_embed(
            list(self._grid_of(m, grid)), dim=self.embed_dim, in_pixels=False,
            device=self.patch_embed.proj.weight.device,
        )  # fmt: skip
        return tuple(select_tokens(table[None], ids_keep) for table in tables)

    def _grid_of(self, m: int, grid: tuple[int, int] | None) -> tuple[int, int]:
        side = round(m**0.5)
        if grid is None:
            is_default = self.grid_size[0] * self.grid_size[1] == m
            grid = self.grid_size if is_default else (side, side)
        if grid[0] * grid[1] != m:
            raise ValueError(
                f"{m} tokens do not fill a {grid[0]}x{grid[1]} grid; pass grid=(rows, columns) "
                f"with rows x columns = {m}."
            )
        return grid

    # ---------------------------------------------------------------- timm's protocol

    def forward_features(self, x: Tensor) -> Tensor:
        """(b, in_chans, h, w) -> (b, tokens, embed_dim) after the final norm, in raster order, with
        the class tokens at their positions."""
        return self.forward_tokens(self.embed(x), grid=self.grid(*x.shape[-2:]))

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool (b, tokens, embed_dim) by ``global_pool``; apply the head unless ``pre_logits``."""
        if self.global_pool == "max-logits" and not pre_logits:
            return self.head(self.split_tokens(features)[0]).amax(1)
        pooled = self.pool(features, self.global_pool)
        return pooled if pre_logits else self.head(pooled)

    def forward(self, x: Tensor) -> Tensor:
        """Pooled features (b, num_features), or logits (b, num_classes) with a head."""
        return self.forward_head(self.forward_features(x))

    def pool(self, features: Tensor, global_pool: str) -> Tensor:
        """Pool (b, tokens, embed_dim) to (b, embed_dim), or (b, 2 embed_dim) for token+avg."""
        if global_pool == "":
            return features
        patches, cls = self.split_tokens(features)
        if global_pool == "avg":
            return patches.mean(1)
        if global_pool in ("max", "max-logits"):
            return patches.amax(1)
        token = cls.mean(1)
        return token if global_pool == "token" else torch.cat([token, patches.mean(1)], dim=-1)

    def split_tokens(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Split (b, k + c, d) into the k patches and the c class tokens."""
        slots = cls_slots(features.shape[1] - len(self.cls_names), self.cls_position)
        return remove_tokens(features, slots)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ):
        """Return the residual stream after selected blocks as maps without class tokens, with
        timm's protocol.

        Args:
            x: (b, in_chans, h, w).
            indices: block numbers (negative: from the end), an int n for the last n, None for all.
            return_prefix_tokens: return pairs (map, class tokens (b, c, d)).
            norm: apply the final norm to each map, as dense heads require.
            stop_early: skip the blocks after the last index.
            output_fmt: "NCHW" or "NLC".
            intermediates_only: do not return the final features.
        Returns: list of maps (b, embed_dim, rows, columns), or (final tokens, list).
        """
        _check_choice("output_fmt", output_fmt, ("NCHW", "NLC"))
        check_tensor(x)
        rows, columns = self.grid(*x.shape[-2:])
        taken = resolve_indices(indices, len(self.layers), int_means_last=True)
        rotation = self._rotation(rows * columns, (rows, columns))
        final, taps = self._run(self.embed(x), rotation, None, taken, stop_early)
        maps = []
        for tap in taps:
            tap = (self.norm_f(tap)[0] if norm else tap).to(final.dtype)
            patches, cls = self.split_tokens(tap)
            if output_fmt == "NCHW":
                patches = patches.mT.unflatten(2, (rows, columns)).contiguous()
            maps.append((patches, cls) if return_prefix_tokens else patches)
        return maps if intermediates_only else (final, maps)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the blocks after the last index, and optionally the final norm and the head; return
        the resolved indices."""
        kept = resolve_indices(indices, len(self.layers), int_means_last=True)
        self.layers = self.layers[: self._whole_pairs(max(kept) + 1)]
        if prune_norm:
            self.norm_f = _NoNorm()
        if prune_head:
            self.reset_classifier(0)
        return kept

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Create a fresh head with this many classes (0: none); optionally change the pooling."""
        if global_pool is not None:
            _check_choice("global_pool", global_pool, POOLS)
            if global_pool.startswith("token") and not self.cls_names:
                raise ValueError(f"global_pool {global_pool!r} needs a class token; use 'avg'.")
            self.global_pool = global_pool
        self.num_classes = num_classes
        self.classes: list[str] | None = None
        self.num_features = self.embed_dim * (2 if self.global_pool == "token+avg" else 1)
        self.head_hidden_size = self.num_features
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        if isinstance(self.head, nn.Linear):
            trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)
            weight = self.patch_embed.proj.weight
            self.head.to(weight.device, weight.dtype)

    def no_weight_decay(self) -> set[str]:
        """Return names of parameters without weight decay: A_log and D define the dynamics; biases,
        norms, tokens and positions are offsets. (Upstream decays A_log by accident.)"""
        tokens = ("pos_embed", "register_tokens", "mask_token", *self.cls_names)
        return {
            name
            for name, p in self.named_parameters()
            if p.ndim <= 1
            or name in tokens
            or name.rsplit(".", 1)[-1] in ("A_log", "A_b_log", "D", "D_b", "bias")
        }

    def group_matcher(self, coarse: bool = False) -> dict:
        """Return timm's mapping of parameter names to layers, for layer-wise lr decay."""
        return {
            "stem": r"^pos_embed|^patch_embed|^cls_token|^register_tokens|^mask_token",
            "blocks": r"^layers\.(\d+)"
            if coarse
            else [(r"^layers\.(\d+)", None), (r"^norm_f", (99999,))],
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable

    @property
    def config(self) -> dict:
        """Constructor arguments that rebuild this encoder."""
        return self._args | {
            "num_classes": self.num_classes,
            "global_pool": self.global_pool,
            "depth": len(self.layers),
            "data_config": dict(self.data_config),
        }


def resolve_indices(indices: Any, depth: int, int_means_last: bool = False) -> list[int]:
    """Return block numbers from indices (negative: from the end), a number of last blocks, or None:
    no block, or with ``int_means_last`` all. Raises: ValueError for numbers out of range."""
    if indices is None:
        return list(range(depth)) if int_means_last else []
    if isinstance(indices, int):
        if not 0 < indices <= depth:
            raise ValueError(f"requested the last {indices} blocks; the encoder has {depth}.")
        indices = range(depth - indices, depth)
    resolved = [i + depth if i < 0 else i for i in indices]
    if bad := [i for i in resolved if not 0 <= i < depth]:
        raise ValueError(f"indices {bad} are out of range; the encoder has {depth} blocks.")
    return resolved


def _token(dim: int, count: int = 1) -> nn.Parameter:
    return nn.Parameter(trunc_normal_(torch.zeros(1, count, dim), std=0.02))


def check_tensor(x: Any) -> None:
    """Raise TypeError for an image that is not a tensor yet."""
    if not isinstance(x, Tensor):
        raise TypeError(
            f"The encoder takes a batch of normalised tensors, not {type(x).__name__}; convert an "
            "image first: encoder(vim_ssl.create_transform(encoder)(image)[None])."
        )


def _check_choice(name: str, value, choices) -> None:
    if value not in choices:
        raise ValueError(f"{name} {value!r} is not one of {', '.join(map(repr, choices))}.")
