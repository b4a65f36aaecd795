"""SimMIM (arXiv:2111.09886): the encoder reads all patches, with a mask token for masked ones; a
linear layer predicts their pixels."""

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from vim_ssl.models.protocol import Encoder
from vim_ssl.objectives.pixels import PixelObjective


class SimMIM(PixelObjective):
    """SimMIM: L1 on the pixels of masked patches.

    Args:
        encoder: built with ``use_mask_token=True``.
    Raises: ValueError for an encoder without a mask token, with a head, or with overlapping
        patches.
    """

    settings = ("norm_pix_loss",)
    encoder_args: ClassVar = {"use_mask_token": True}
    reads_clips = True

    def __init__(self, encoder: Encoder, *, norm_pix_loss: bool = False):
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
