"""Autoregressive pretraining (ARM, arXiv:2406.07537, section 3): read clusters of patches in
sequence and predict the next one.

A cluster is a square of neighbouring patches. Clusters are read in raster order, and so are the
patches within one. The encoder reads forward only, so its features at a patch depend on earlier
patches alone; a prediction uses the features of whole clusters before its target.
"""

from typing import Any, ClassVar, Self

import torch
from timm.layers import Mlp, build_sincos2d_pos_embed, trunc_normal_
from torch import Tensor, nn

from vim_ssl.models.protocol import Encoder
from vim_ssl.objectives.pixels import PixelObjective


class AutoRegressive(PixelObjective):
    """Predict the pixels of every cluster but the first from the clusters before it.

    The features after a quarter, half, three quarters and all of the encoder's blocks are
    normalised and concatenated; each decoder block attends to a projection of them.

    Args:
        encoder: an encoder with ``directions="forward"`` and without a mask token. ``load_encoder``
            with ``directions="both"`` initialises the other direction as a copy of this one.
        cluster: side of a cluster, in patches; must divide the grid's rows and columns.
        decoder_dim, decoder_depth: width and number of cross-attention blocks of the decoder; heads
            have 64 channels.
        norm_pix_loss: normalise each target patch by its mean and deviation.
    Raises: ValueError for an encoder with a backward direction, a head, a mask token or overlapping
        patches, for a decoder width that does not fit, and, when called, for a grid that is not
        divided into at least two clusters.
    """

    settings = ("decoder_dim", "decoder_depth", "norm_pix_loss", "cluster")
    encoder_args: ClassVar = {"directions": "forward"}
    views = "image"

    def __init__(
        self,
        encoder: Encoder,
        *,
        cluster: int = 4,
        decoder_dim: int = 512,
        decoder_depth: int = 4,
        norm_pix_loss: bool = True,
    ):
        super().__init__(encoder, norm_pix_loss)
        if encoder.directions != "forward":
            raise ValueError(
                f"ar predicts later patches, which an encoder with directions="
                f"{encoder.directions!r} has already seen; build it with directions='forward'. "
                "load_encoder(RUN, directions='both') adds the other direction afterwards."
            )
        if encoder.mask_token is not None:
            raise ValueError("ar uses no mask token; load the encoder with use_mask_token=False.")
        if cluster < 1 or decoder_depth < 1:
            raise ValueError(
                f"cluster {cluster} and decoder_depth {decoder_depth} must be 1 or more."
            )
        heads = max(decoder_dim // 64, 1)
        if decoder_dim < 4 or decoder_dim % 4 or decoder_dim % heads:
            raise ValueError(
                f"decoder_dim {decoder_dim} does not split into {heads} heads and 2-D sine-cosine "
                "positions; use a multiple of 64, or of 4 below that."
            )
        self.cluster = cluster
        depth = len(encoder.feature_info)
        self.taps = [max(round(depth * q / 4) - 1, 0) for q in (1, 2, 3)]
        self.tap_norms = nn.ModuleList(nn.LayerNorm(encoder.embed_dim) for _ in self.taps)
        self.decoder_embed = nn.Linear(4 * encoder.embed_dim, decoder_dim * decoder_depth)
        self.query = nn.Parameter(trunc_normal_(torch.zeros(1, 1, decoder_dim), std=0.02))
        self.decoder_layers = nn.ModuleList(
            _CrossAttention(decoder_dim, heads) for _ in range(decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(decoder_dim)
        self.decoder_pred = nn.Linear(decoder_dim, self.pixels)

    @classmethod
    def from_config(cls, encoder: Encoder, config: Any) -> Self:
        objective = super().from_config(encoder, config)
        objective.order(encoder.grid_size)  # clusters that do not fit fail before training
        return objective

    def order(self, grid: tuple[int, int], device=None) -> Tensor:
        """Return patch indices in reading order, (m,) int64, cluster by cluster.

        Raises: ValueError for a grid that is not divided into at least two clusters.
        """
        (rows, columns), side = grid, self.cluster
        if rows % side or columns % side or rows * columns < 2 * side**2:
            raise ValueError(
                f"clusters of {side}x{side} patches do not divide the {rows}x{columns} grid into "
                "two or more; choose another --cluster or image size."
            )
        indices = torch.arange(rows * columns, device=device)
        indices = indices.view(rows // side, side, columns // side, side)
        return indices.transpose(1, 2).flatten()

    def hidden(self, batch: dict[str, Tensor], grid: tuple[int, int]) -> Tensor:
        """Return (b, m) bool, True = predicted: all clusters but the first."""
        images = batch["image"]
        mask = torch.ones(len(images), grid[0] * grid[1], dtype=torch.bool, device=images.device)
        mask[:, self.order(grid, images.device)[: self.cluster**2]] = False
        return mask

    def predict(self, images: Tensor, mask: Tensor) -> Tensor:
        """(b, c, h, w) -> (b, m, pixels of a patch), zeros for the first cluster."""
        grid, size = self.encoder.grid(*images.shape[-2:]), self.cluster**2
        order = self.order(grid, images.device)
        context, target = order[:-size], order[size:]
        b, m = mask.shape
        last, taps = self.encoder.forward_visible(
            images, context.expand(b, -1), directions="forward", indices=sorted(set(self.taps))
        )
        levels = dict(zip(sorted(set(self.taps)), taps, strict=True))
        patches = [
            norm(self.encoder.split_tokens(levels[tap])[0])
            for norm, tap in zip(self.tap_norms, self.taps, strict=True)
        ]
        patches.append(self.encoder.split_tokens(last)[0])
        streams = self.decoder_embed(torch.cat(patches, dim=-1)).chunk(len(self.decoder_layers), -1)

        positions = build_sincos2d_pos_embed(
            list(grid), dim=self.query.shape[-1], device=images.device, dtype=streams[0].dtype
        )
        hidden = (self.query.to(streams[0].dtype) + positions[target]).expand(b, -1, -1)
        cluster = torch.arange(m, device=images.device) // size  # of each patch in reading order
        blocked = cluster[None, :-size] >= cluster[size:, None]  # (target, context), True = unseen
        for layer, stream in zip(self.decoder_layers, streams, strict=True):
            hidden = layer(hidden, stream, blocked)
        predicted = self.decoder_pred(self.decoder_norm(hidden))
        out = predicted.new_zeros(b, m, self.pixels)
        return out.scatter(1, target[None, :, None].expand(b, -1, self.pixels), predicted)


class _CrossAttention(nn.Module):
    """Queries attend to the context, not to one another."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, x: Tensor, context: Tensor, blocked: Tensor) -> Tensor:
        """x (b, q, d), context (b, k, d), blocked (q, k) bool, True = unseen -> (b, q, d)."""
        query = self.norm1(x)
        x = x + self.attention(query, context, context, attn_mask=blocked, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))
