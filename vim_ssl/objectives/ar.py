"""Autoregressive pretraining: read clusters of patches one after another, predict the next one.

A cluster is a square of neighbouring patches; clusters are read in raster order, the patches of one
in raster order within it. The encoder reads forward only, so what it knows at a patch comes from
what was read before; every prediction then looks at whole clusters that precede its own.
Reference: ARM, arXiv:2406.07537, section 3.
"""

import torch
from timm.layers import Mlp, build_sincos2d_pos_embed, trunc_normal_
from torch import Tensor, nn

from vim_ssl.models.encoder import VimEncoder
from vim_ssl.objectives.pixels import PixelObjective


class AutoRegressive(PixelObjective):
    """Predict the pixels of every cluster but the first from the clusters before it.

    What the encoder holds after a quarter, half, three quarters and all of its blocks is normalised
    and joined; each decoder block attends to a projection of that. Masks in a batch are not read.

    Args:
        encoder: of ``directions="forward"``, without a mask token. Loaded with
            ``directions="both"`` afterwards, the other direction begins as a copy of this one.
        cluster: side of a cluster, in patches; divides the grid's rows and columns.
        decoder_dim, decoder_depth: width and cross-attention blocks of the decoder; 64 channels a
            head.
        norm_pix_loss: predict each patch normalised by its own mean and deviation.
    Raises: ValueError for an encoder that reads backward, has a head, a mask token or overlapping
        patches, for a decoder that does not fit, and, when called, for a grid of less than two
        clusters or one that they do not fill.
    """

    def __init__(
        self,
        encoder: VimEncoder,
        *,
        cluster: int = 4,
        decoder_dim: int = 512,
        decoder_depth: int = 4,
        norm_pix_loss: bool = True,
    ):
        super().__init__(encoder, norm_pix_loss)
        if encoder.directions != "forward":
            raise ValueError(
                f"ar predicts what comes next, which an encoder of directions="
                f"{encoder.directions!r} has seen; build it with directions='forward'. "
                "load_encoder(RUN, directions='both') seeds the other direction afterwards."
            )
        if encoder.mask_token is not None:
            raise ValueError("ar reads no mask token; load the encoder with use_mask_token=False.")
        if cluster < 1 or decoder_depth < 1:
            raise ValueError(
                f"cluster {cluster} and decoder_depth {decoder_depth} must be 1 or more."
            )
        heads = max(decoder_dim // 64, 1)
        if decoder_dim < 4 or decoder_dim % 4 or decoder_dim % heads:
            raise ValueError(
                f"decoder_dim {decoder_dim} does not split into {heads} heads and 2-D sine and "
                "cosine positions; use a multiple of 64, or of 4 below that."
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

    def order(self, grid: tuple[int, int], device=None) -> Tensor:
        """The patches in the order they are read, (m,) int64: cluster after cluster.

        Raises: ValueError for a grid that clusters do not fill, or of one cluster only.
        """
        (rows, columns), side = grid, self.cluster
        if rows % side or columns % side or rows * columns < 2 * side**2:
            raise ValueError(
                f"clusters of {side}x{side} patches do not fill a {rows}x{columns} grid at least "
                "twice; choose another --cluster or image size."
            )
        numbers = torch.arange(rows * columns, device=device)
        numbers = numbers.view(rows // side, side, columns // side, side)
        return numbers.transpose(1, 2).flatten()

    def hidden(self, batch: dict[str, Tensor], grid: tuple[int, int]) -> Tensor:
        """(b, m) bool: True for what is predicted, all clusters but the first."""
        images = batch["image"]
        mask = torch.ones(len(images), grid[0] * grid[1], dtype=torch.bool, device=images.device)
        mask[:, self.order(grid, images.device)[: self.cluster**2]] = False
        return mask

    def predict(self, images: Tensor, mask: Tensor) -> Tensor:
        """(b, c, h, w) -> (b, m, pixels of a patch), zeros for the first cluster."""
        grid, size = self.encoder.grid(*images.shape[-2:]), self.cluster**2
        order = self.order(grid, images.device)
        read, asked = order[:-size], order[size:]
        b, m = mask.shape
        last, taps = self.encoder.forward_tokens(
            self.encoder.embed(images), ids_keep=read.expand(b, -1), directions="forward",
            indices=sorted(set(self.taps)), grid=grid,
        )  # fmt: skip
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
        hidden = (self.query.to(streams[0].dtype) + positions[asked]).expand(b, -1, -1)
        cluster = torch.arange(m, device=images.device) // size  # by place in the order
        blocked = cluster[None, :-size] >= cluster[size:, None]  # (asked, read), True = not seen
        for layer, stream in zip(self.decoder_layers, streams, strict=True):
            hidden = layer(hidden, stream, blocked)
        predicted = self.decoder_pred(self.decoder_norm(hidden))
        out = predicted.new_zeros(b, m, self.pixels)
        return out.scatter(1, asked[None, :, None].expand(b, -1, self.pixels), predicted)


class _CrossAttention(nn.Module):
    """Queries look at what was read; the queries do not look at one another."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, x: Tensor, read: Tensor, blocked: Tensor) -> Tensor:
        """x (b, q, d), read (b, k, d), blocked (q, k) bool, True = not seen -> (b, q, d)."""
        x = x + self.attention(self.norm1(x), read, read, attn_mask=blocked, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))
