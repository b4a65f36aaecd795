"""MAE (arXiv:2111.06377): the encoder reads only the visible patches, in scan order; a light Vim
decoder inserts mask tokens and predicts the pixels of the masked patches."""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import build_sincos2d_pos_embed, trunc_normal_
from torch import Tensor, nn

from vim_ssl.models.block import RMSNorm, VimBlock
from vim_ssl.models.encoder import VimEncoder
from vim_ssl.objectives.masking import visible_ids
from vim_ssl.objectives.pixels import PixelObjective


class MAE(PixelObjective):
    """Masked autoencoder with a Vim decoder.

    Args:
        encoder: reads the visible patches in raster order, with the class token in the middle.
        decoder_dim, decoder_depth: width and number of blocks of the decoder.
        norm_pix_loss: normalise each target patch by its mean and deviation.
        keep_order: read the visible patches in raster order. False shuffles them, as the original
            MAE does: attention ignores the order, a scan does not, so this measures its effect.
    Raises: ValueError for a decoder without blocks or with a width not divisible by 4, and for an
        encoder with a head or a mask token (neither would be trained), or overlapping patches.
    Reference: MAE, arXiv:2111.06377; Vim decoder: FastVim, arXiv:2502.00594.
    """

    settings = ("decoder_dim", "decoder_depth", "norm_pix_loss", "keep_order")
    reads_clips = True

    def __init__(
        self,
        encoder: VimEncoder,
        *,
        decoder_dim: int = 512,
        decoder_depth: int = 2,
        norm_pix_loss: bool = True,
        keep_order: bool = True,
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
        self.decoder_embed = nn.Linear(encoder.embed_dim, decoder_dim)
        self.mask_token = nn.Parameter(trunc_normal_(torch.zeros(1, 1, decoder_dim), std=0.02))
        same = {k: encoder.config[k] for k in ("d_state", "norm_after_scan", "scan_backend")}
        self.decoder_layers = nn.ModuleList(
            VimBlock(decoder_dim, depth=decoder_depth, **same) for _ in range(decoder_depth)
        )
        self.decoder_norm = RMSNorm(decoder_dim)
        self.decoder_pred = nn.Linear(decoder_dim, self.pixels)

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
        hidden, residual = (hidden + positions.flatten(0, -2)).to(patches.dtype), None
        for layer in self.decoder_layers:
            hidden, residual = layer(hidden, residual)
        return self.decoder_pred(self.decoder_norm(hidden, residual)[0])
