"""Masked image modelling on a Vim encoder: MAE and SimMIM.

    mae      the encoder reads only the visible patches, in scan order; a light Vim decoder puts
             mask tokens in the gaps and predicts the pixels of the hidden patches
    simmim   the encoder reads all patches, hidden ones replaced by a mask token; a linear layer
             predicts their pixels

Batches hold ``image`` (b, c, h, w), normalised, and ``mask`` (b, m) bool, True = masked, with the
same number of masked patches in every sample. Of an encoder of clips ``image`` is (b, c, t, h, w),
and patches are tubelets, frame by frame, row by row; see `as_sheet`.
"""

import torch
import torch.nn.functional as F
from timm.layers import build_sincos2d_pos_embed, trunc_normal_
from torch import Tensor, nn

from vim_ssl.data.transforms.image import as_seen
from vim_ssl.models.block import RMSNorm, VimBlock
from vim_ssl.models.encoder import VimEncoder
from vim_ssl.objectives.base import StepOutput
from vim_ssl.objectives.masking import checked_mask, visible_ids


class PixelObjective(nn.Module):
    """What objectives of pixels share: targets, the loss on hidden patches, pictures."""

    def __init__(self, encoder: VimEncoder, norm_pix_loss: bool):
        super().__init__()
        patch = encoder.patch_embed
        if patch.stride != patch.patch_size:
            raise ValueError(
                f"patches of {patch.patch_size} px at stride {patch.stride} overlap, so their "
                "pixels are no partition of the picture; pretrain with stride = patch_size."
            )
        refuse_head(encoder)
        self.encoder = encoder
        self.norm_pix_loss = norm_pix_loss
        self.tubelet = getattr(encoder, "tubelet", 1)
        self.pixels = encoder.in_chans * self.tubelet * patch.patch_size**2

    def hidden(self, batch: dict[str, Tensor], grid: tuple[int, int]) -> Tensor:
        """(b, m) bool, True = hidden, to be predicted: the batch's own mask."""
        return checked_mask(batch["mask"], len(batch["image"]), grid)

    def predict(self, images: Tensor, mask: Tensor) -> Tensor:
        """(b, c, h, w) and (b, m) bool, True = hidden -> (b, m, pixels of a patch)."""
        raise NotImplementedError

    def patch_loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Two (b, m, pixels) float32 -> (b, m): the mean square, as in MAE."""
        return (prediction - target).square().mean(-1)

    def forward(self, batch: dict[str, Tensor]) -> StepOutput:
        """One pass: the mean loss of each sample's masked patches, summed over samples."""
        images = as_sheet(batch["image"], self.tubelet)
        patch = self.encoder.patch_embed.patch_size
        mask = self.hidden(batch, (images.shape[-2] // patch, images.shape[-1] // patch))
        prediction = self.predict(batch["image"], mask).float()
        pixels = patchify(images.float(), patch)  # float32 targets
        target = pixels
        mean: Tensor | float = 0.0
        std: Tensor | float = 1.0
        if self.norm_pix_loss:
            mean = pixels.mean(-1, keepdim=True)
            std = (pixels.var(-1, keepdim=True) + 1e-6).sqrt()
            target = (pixels - mean) / std
        per_patch = self.patch_loss(prediction, target)
        loss = (per_patch * mask).sum(1) / mask.sum(1)  # (b,)
        with torch.no_grad():
            restored = prediction * std + mean  # undo norm_pix with the true patch's own statistics
            error = ((restored - pixels).square().mean(-1) * mask).sum(1) / mask.sum(1)
        return StepOutput(
            loss_sum=loss.sum(),
            weight=len(images),
            metrics={"pixel_mse": error.sum()},
            pictures=lambda: self._pictures(images[:8], mask[:8], restored[:8]),
        )

    def _pictures(self, images: Tensor, mask: Tensor, restored: Tensor) -> Tensor:
        """original | masked | reconstruction | reconstruction in the gaps: (n, 1 or 3, h, 4 w); of
        clips film strips, of each tubelet the first frame."""
        height, width = images.shape[-2:]
        patch = self.encoder.patch_embed.patch_size
        config = self.encoder.data_config
        gaps = unpatchify(mask[..., None].expand_as(restored), patch, (height, width))[:, :1]
        first = slice(None, None, self.tubelet)
        original = as_seen(images[:, first].float(), config)
        restored = as_seen(unpatchify(restored, patch, (height, width))[:, first], config)
        hidden = torch.where(gaps, torch.full_like(original, 0.5), original)
        pasted = torch.where(gaps, restored, original)
        return torch.cat([original, hidden, restored, pasted], dim=-1).cpu()


class MAE(PixelObjective):
    """Masked autoencoder with a Vim decoder.

    Args:
        encoder: reads the visible patches only, in raster order, its class token in their middle.
        decoder_dim, decoder_depth: width and blocks of the decoder.
        norm_pix_loss: predict each patch normalised by its own mean and deviation.
        keep_order: read the visible patches in raster order. False shuffles them in every picture,
            as a transcription of MAE would: harmless to attention, and here only to measure what
            it costs a scan.
    Raises: ValueError for a decoder without blocks or of a width not divisible by 4, and for an
        encoder with a head or a mask token (neither would learn), or with overlapping patches.
    Reference: MAE, arXiv:2111.06377; a Vim decoder as in FastVim, arXiv:2502.00594.
    """

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
            raise ValueError("mae reads no mask token; load the encoder with use_mask_token=False.")
        if decoder_depth < 1:
            raise ValueError(
                f"decoder_depth {decoder_depth} lets the hidden patches see nothing; use 1 or more."
            )
        if decoder_dim < 4 or decoder_dim % 4:
            raise ValueError(
                f"decoder_dim {decoder_dim} is not divisible by 4, as its 2-D sine and cosine "
                f"positions need; use {max(decoder_dim // 4 * 4, 4)}."
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
        seen = self.encoder.forward_tokens(self.encoder.embed(images), ids_keep=keep, grid=grid)
        patches, _ = self.encoder.split_tokens(seen)
        patches = self.decoder_embed(patches)  # (b, k, decoder_dim)
        b, _, d = patches.shape
        hidden = self.mask_token.to(patches.dtype).expand(b, mask.shape[1], -1)
        hidden = hidden.scatter(1, keep[..., None].expand(-1, -1, d), patches)
        places = build_sincos2d_pos_embed(
            list(grid), dim=d, device=hidden.device, dtype=hidden.dtype
        )
        if (times := mask.shape[1] // len(places)) > 1:  # of clips
            when = build_sincos2d_pos_embed(
                [times, 1], dim=d, device=hidden.device, dtype=hidden.dtype
            )
            places = (when[:, None] + places).flatten(0, 1)
        hidden, residual = hidden + places, None
        for layer in self.decoder_layers:
            hidden, residual = layer(hidden, residual)
        return self.decoder_pred(self.decoder_norm(hidden, residual)[0])


class SimMIM(PixelObjective):
    """SimMIM: mask tokens through the whole encoder, one linear layer, L1 on hidden pixels.

    Args:
        encoder: built with ``use_mask_token=True``.
    Raises: ValueError for an encoder without a mask token, with a head, or with overlapping
        patches.
    Reference: SimMIM, arXiv:2111.09886.
    """

    def __init__(self, encoder: VimEncoder, *, norm_pix_loss: bool = False):
        super().__init__(encoder, norm_pix_loss)
        if encoder.mask_token is None:
            raise ValueError("SimMIM needs an encoder with a mask token: use_mask_token=True.")
        self.decoder_pred = nn.Linear(encoder.embed_dim, self.pixels)

    def predict(self, images: Tensor, mask: Tensor) -> Tensor:
        grid = self.encoder.grid(*images.shape[-2:])
        tokens = self.encoder.forward_tokens(self.encoder.embed(images), mask=mask, grid=grid)
        patches, _ = self.encoder.split_tokens(tokens)
        return self.decoder_pred(patches)

    def patch_loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        return F.l1_loss(prediction, target, reduction="none").mean(-1)


def refuse_head(encoder: nn.Module) -> None:
    """Raises: ValueError for an encoder with a head, which pretraining would not train."""
    if classes := getattr(encoder, "num_classes", 0):
        raise ValueError(
            f"the encoder has a head of {classes} classes, which pretraining would "
            "leave without gradient; build it with num_classes=0."
        )


def as_sheet(images: Tensor, tubelet: int = 1) -> Tensor:
    """Clips (b, c, t, h, w) as pictures (b, c · tubelet, t / tubelet · h, w), one tubelet below the
    other, its frames as channels: patches of that are tubelets in the order of the tokens. Pictures
    (b, c, h, w) stay."""
    if images.dim() == 4:
        return images
    return images.unflatten(2, (-1, tubelet)).transpose(2, 3).flatten(1, 2).flatten(2, 3)


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """(b, c, h, w) -> (b, m, patch_size² c), patches in raster order, pixel by pixel."""
    return F.pixel_unshuffle(images, patch_size).unflatten(1, (images.shape[1], -1)).flatten(
        3
    ).permute(0, 3, 2, 1).flatten(2)  # fmt: skip


def unpatchify(patches: Tensor, patch_size: int, size: tuple[int, int]) -> Tensor:
    """The inverse of `patchify` for pictures of ``size`` (height, width)."""
    rows, columns = size[0] // patch_size, size[1] // patch_size
    x = patches.unflatten(2, (patch_size**2, -1)).permute(0, 3, 2, 1)  # (b, c, p², m)
    return F.pixel_shuffle(x.flatten(1, 2).unflatten(2, (rows, columns)), patch_size)
