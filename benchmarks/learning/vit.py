"""The external reference of the studies: timm's ViT by MAE, with the same trainer and probe."""

import torch
from timm.layers import build_sincos2d_pos_embed, trunc_normal_
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from vim_ssl.models.encoder import VimEncoder
from vim_ssl.objectives.masking import visible_ids
from vim_ssl.objectives.pixels import PixelObjective
from vim_ssl.recipes.mim_pretrain import Config


class ViTEncoder(VisionTransformer):
    """timm's ViT with the attributes that objectives and probes need.

    Args:
        data_config: see `VimEncoder`.
        args: of timm's VisionTransformer.
    """

    directions, mask_token = "both", None
    cls_names = ("cls_token",)

    def __init__(self, *, data_config: dict, patch_size: int, **args):
        in_chans, *size = data_config["input_size"]
        super().__init__(
            img_size=tuple(size), patch_size=patch_size, in_chans=in_chans, num_classes=0, **args
        )
        self.data_config, self.in_chans = data_config, in_chans
        self.grid_size = self.patch_embed.grid_size
        # Integers, as in `VimEncoder`; timm reads its pair only for images of other sizes.
        self.patch_embed.patch_size = self.patch_embed.stride = patch_size

    def grid(self, height: int, width: int) -> tuple[int, int]:
        return height // self.patch_embed.patch_size, width // self.patch_embed.patch_size

    def read(self, images: Tensor, keep: Tensor) -> Tensor:
        """(b, c, h, w) and (b, k) visible patches -> (b, k, d) after the final norm."""
        tokens = self.patch_embed(images) + self.pos_embed[:, 1:]
        tokens = tokens.gather(1, keep[..., None].expand(-1, -1, tokens.shape[-1]))
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(len(tokens), -1, -1)
        return self.norm(self.blocks(torch.cat([cls, tokens], dim=1)))[:, 1:]


class ViTMAE(PixelObjective):
    """MAE as published, arXiv:2111.06377: an attention decoder in place of the Vim decoder."""

    def __init__(self, encoder: ViTEncoder, *, decoder_dim: int, decoder_depth: int,
                 norm_pix_loss: bool):  # fmt: skip
        super().__init__(encoder, norm_pix_loss)
        self.decoder_embed = nn.Linear(encoder.embed_dim, decoder_dim)
        self.hidden_token = nn.Parameter(trunc_normal_(torch.zeros(1, 1, decoder_dim), std=0.02))
        self.decoder_layers = nn.Sequential(
            *(Block(decoder_dim, max(decoder_dim // 32, 1), qkv_bias=True)
              for _ in range(decoder_depth))
        )  # fmt: skip
        self.decoder_norm = nn.LayerNorm(decoder_dim)
        self.decoder_pred = nn.Linear(decoder_dim, self.pixels)

    def predict(self, images: Tensor, mask: Tensor) -> Tensor:
        keep = visible_ids(mask)
        patches = self.decoder_embed(self.encoder.read(images, keep))
        b, _, d = patches.shape
        hidden = self.hidden_token.to(patches.dtype).expand(b, mask.shape[1], -1)
        hidden = hidden.scatter(1, keep[..., None].expand(-1, -1, d), patches)
        hidden = hidden + build_sincos2d_pos_embed(list(self.encoder.grid_size), dim=d)
        return self.decoder_pred(self.decoder_norm(self.decoder_layers(hidden)))


def counterpart(vim: VimEncoder, config: Config, **size: int) -> ViTMAE:
    """MAE on a ViT of this ``size`` with the images, patches and settings of a Vim."""
    encoder = ViTEncoder(data_config=vim.data_config, patch_size=vim.patch_embed.patch_size, **size)
    return ViTMAE(
        encoder, decoder_dim=config.decoder_dim, decoder_depth=config.decoder_depth,
        norm_pix_loss=config.norm_pix_loss,
    )  # fmt: skip
