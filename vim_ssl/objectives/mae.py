"""MAE (arXiv:2111.06377): the encoder reads only the visible patches, in scan order; a light
decoder inserts mask tokens and predicts the pixels of the masked patches."""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import build_sincos2d_pos_embed, trunc_normal_
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from vim_ssl.models.block import RMSNorm, VimBlock
from vim_ssl.models.encoder import VimEncoder
from vim_ssl.models.protocol import Encoder
from vim_ssl.objectives.masking import visible_ids
from vim_ssl.objectives.pixels import PixelObjective

DECODERS = ("vim", "vit")


class MAE(PixelObjective):
    """Masked autoencoder.

    Args:
        encoder: reads the visible patches in raster order, with its class token.
        decoder_dim, decoder_depth: width and number of blocks of the decoder.
        norm_pix_loss: normalise each target patch by its mean and deviation.
        keep_order: read the visible patches in raster order. False shuffles them, as the original
            MAE does: attention ignores the order, a scan does not, so this measures its effect.
        decoder: "vim", or "vit" for blocks with attention, as published, with heads of 32 channels;
            by default that of the encoder's kind.
    Raises: ValueError for an unknown decoder, one without blocks or with a width not divisible by
        4, and for an encoder with a head or a mask token (neither would be trained), or overlapping
        patches.
    Reference: MAE, arXiv:2111.06377; Vim decoder: FastVim, arXiv:2502.00594.
    """

    settings = ("decoder_dim", "decoder_depth", "norm_pix_loss", "keep_order")
    reads_clips = True

    def __init__(
        self,
        encoder: Encoder,
        *,
        decoder_dim: int = 512,
        decoder_depth: int = 2,
        norm_pix_loss: bool = True,
        keep_order: bool = True,
        decoder: str = "",
    ):
        super().__init__(encoder, norm_pix_loss)
        self.keep_order = keep_order
        if encoder.mask_token is not None:
            raise ValueError("mae uses no mask token; load the encoder with use_mask_token=False.")
        if decoder_depth < 1:
            raise ValueError(
                f"decoder_depth {decoder_depth} would predict without any context; use 1 or more."
            )
        if decoder_dim < 4 or decoder_dim % 4:
            raise ValueError(
                f"decoder_dim {decoder_dim} is not divisible by 4, which 2-D sine-cosine positions "
                f"need; use {max(decoder_dim // 4 * 4, 4)}."
            )
        self.decoder = decoder or ("vim" if isinstance(encoder, VimEncoder) else "vit")
        if self.decoder not in DECODERS:
            raise ValueError(f"decoder is {decoder!r}; expected one of {', '.join(DECODERS)}.")
        self.decoder_embed = nn.Linear(encoder.embed_dim, decoder_dim)
        self.mask_token = nn.Parameter(trunc_normal_(torch.zeros(1, 1, decoder_dim), std=0.02))
        self.decoder_layers = nn.ModuleList(
            self._block(encoder.config, decoder_dim, decoder_depth) for _ in range(decoder_depth)
        )
        norm = RMSNorm if self.decoder == "vim" else nn.LayerNorm
        self.decoder_norm = norm(decoder_dim)
        self.decoder_pred = nn.Linear(decoder_dim, self.pixels)

    def _block(self, config: dict[str, Any], dim: int, depth: int) -> nn.Module:
        if self.decoder == "vit":
            return Block(dim, max(dim // 32, 1), qkv_bias=True)
        names = ("d_state", "norm_after_scan", "scan_backend")
        return VimBlock(dim, depth=depth, **{k: config[k] for k in names if k in config})

    def _decode(self, hidden: Tensor) -> Tensor:
        """(b, m, decoder_dim) -> the same after the blocks and the norm."""
        residual = None
        for layer in self.decoder_layers:
            if self.decoder == "vit":
                hidden = layer(hidden)
            else:
                hidden, residual = layer(hidden, residual)
        if self.decoder == "vit":
            return self.decoder_norm(hidden)
        return self.decoder_norm(hidden, residual)[0]

    def predict(self, images: Tensor, mask: Tensor) -> Tensor:
        grid = self.encoder.grid(*images.shape[-2:])
        keep = visible_ids(mask)
        if not self.keep_order:
            keep = keep.gather(1, torch.rand(keep.shape, device=keep.device).argsort(1))
        tokens, _ = self.encoder.forward_visible(images, keep)
        patches, _ = self.encoder.split_tokens(tokens)
        patches = self.decoder_embed(patches)  # (b, k, decoder_dim)
        b, k, d = patches.shape
        # Look up every patch in a table of the visible ones, with the mask token as its last row.
        numbers = torch.arange(b * k, device=keep.device).view(b, k)
        rows = torch.full_like(mask, b * k, dtype=torch.long).scatter(1, keep, numbers)
        hidden = F.embedding(rows, torch.cat([patches.flatten(0, 1), self.mask_token[0]]))
        like: dict[str, Any] = {"dim": d, "device": hidden.device, "dtype": hidden.dtype}
        positions = build_sincos2d_pos_embed(list(grid), **like)
        if (times := mask.shape[1] // len(positions)) > 1:  # clips
            positions = build_sincos2d_pos_embed([times, 1], **like)[:, None] + positions
        hidden = (hidden + positions.flatten(0, -2)).to(patches.dtype)
        return self.decoder_pred(self._decode(hidden))
