"""Shared parts of the objectives that predict pixels: patches, targets, loss, preview images."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vim_ssl.data.transforms.image import denormalize
from vim_ssl.models.protocol import Encoder, require_tokens
from vim_ssl.objectives.base import PretrainObjective, StepOutput
from vim_ssl.objectives.masking import checked_mask


class PixelObjective(PretrainObjective):
    """Predict the pixels of hidden patches.

    Batches hold ``image`` (b, c, h, w), normalised, and ``mask`` (b, m) bool, True = masked, with
    the same number of masked patches in every sample. For a video encoder ``image`` is (b, c, t, h,
    w), and patches are tubelets, frame by frame, row by row; see `fold_time`.
    """

    def __init__(self, encoder: Encoder, norm_pix_loss: bool):
        super().__init__()
        require_tokens(encoder, type(self).__name__)
        patch = encoder.patch_embed
        if patch.stride != patch.patch_size:
            raise ValueError(
                f"patches of {patch.patch_size} px at stride {patch.stride} overlap, so a hidden "
                "pixel may be visible in another patch; pretrain with stride = patch_size."
            )
        train_tokens(encoder)
        self.encoder = encoder
        self.norm_pix_loss = norm_pix_loss
        self.tubelet = getattr(encoder, "tubelet", 1)
        self.pixels = encoder.in_chans * self.tubelet * patch.patch_size**2

    def hidden(self, batch: dict[str, Tensor], grid: tuple[int, int]) -> Tensor:
        """Return (b, m) bool, True = hidden and predicted; by default the mask of the batch."""
        return checked_mask(batch["mask"], len(batch["image"]), grid)

    def predict(self, images: Tensor, mask: Tensor) -> Tensor:
        """Predict (b, c, h, w) and (b, m) bool, True = hidden -> (b, m, pixels of a patch)."""
        raise NotImplementedError

    def patch_loss(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Two (b, m, pixels) float32 -> (b, m): the mean squared error, as in MAE."""
        return F.mse_loss(prediction, target, reduction="none").mean(-1)

    def forward(self, batch: dict[str, Tensor]) -> StepOutput:
        """Return the mean loss over each sample's hidden patches, summed over samples."""
        images = fold_time(batch["image"], self.tubelet)
        patch = self.encoder.patch_embed.patch_size
        mask = self.hidden(batch, (images.shape[-2] // patch, images.shape[-1] // patch))
        prediction = self.predict(batch["image"], mask).float()
        pixels = patchify(images.float(), patch)  # float32 targets
        target, mean, std = pixels, pixels.new_zeros(1), pixels.new_ones(1)
        if self.norm_pix_loss:
            target, mean, std = standardize(pixels)
        weights = mask / mask.sum(1, keepdim=True)  # of every patch in its sample's loss
        loss = self.patch_loss(prediction, target) * weights  # (b, m)
        detached = prediction.detach()
        # In the scale of the pixels, as std is that of the true patch.
        error = PixelObjective.patch_loss(self, detached, target) * std.squeeze(-1).square()
        return StepOutput(
            loss_sum=loss.sum(),
            weight=len(images),
            metrics={"pixel_mse": (error * weights).sum()},
            images=lambda: self._images(images[:8], mask[:8], (detached * std + mean)[:8]),
        )

    def _images(self, images: Tensor, mask: Tensor, restored: Tensor) -> Tensor:
        """Return (n, 1 or 3, h, 4 w): original | masked | predictions | original with the masked
        patches predicted. Masked patches are grey in the second image, visible ones, which are not
        predicted in training, in the third. A clip is a column of frames, the first of each
        tubelet."""
        height, width = images.shape[-2:]
        patch = self.encoder.patch_embed.patch_size
        config = self.encoder.data_config
        gaps = unpatchify(mask[..., None].expand_as(restored), patch, (height, width))[:, :1]
        first = slice(None, None, self.tubelet)
        original = denormalize(images[:, first].float(), config)
        restored = denormalize(unpatchify(restored, patch, (height, width))[:, first], config)
        grey = torch.full_like(original, 0.5)
        visible, predicted, pasted = (
            torch.where(gaps, inside, outside)
            for inside, outside in ((grey, original), (restored, grey), (restored, original))
        )
        return torch.cat([original, visible, predicted, pasted], dim=-1).cpu()


def train_tokens(encoder: Any) -> None:
    """Prepare an encoder whose tokens alone are trained: freeze the layers of its pool, if it has
    any. Raises: ValueError for an encoder with a head."""
    refuse_head(encoder)
    if freeze := getattr(encoder, "freeze_pooling", None):
        freeze()


def refuse_head(encoder: Any) -> None:
    """Raise ValueError for an encoder with a head, which pretraining would not train."""
    if classes := getattr(encoder, "num_classes", 0):
        raise ValueError(
            f"the encoder has a head of {classes} classes, which pretraining would not train; "
            "build it with num_classes=0."
        )


def fold_time(images: Tensor, tubelet: int = 1) -> Tensor:
    """Fold clips (b, c, t, h, w) into images (b, c · tubelet, t / tubelet · h, w). Tubelets are
    stacked vertically, and their frames become channels, so that patches are tubelets in token
    order. Images (b, c, h, w) are returned unchanged."""
    if images.dim() == 4:
        return images
    return images.unflatten(2, (-1, tubelet)).transpose(2, 3).flatten(1, 2).flatten(2, 3)


def standardize(patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(…, n) -> the same with mean 0 and deviation 1 over the last dimension, means and deviations
    (…, 1). The variance is unbiased and increased by 1e-6, as in MAE."""
    mean = patches.mean(-1, keepdim=True)
    centred = patches - mean
    variance = torch.linalg.vector_norm(centred, dim=-1, keepdim=True).square() / (
        patches.shape[-1] - 1
    )
    std = (variance + 1e-6).sqrt()
    return centred / std, mean, std


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """(b, c, h, w) -> (b, m, patch_size² c), patches in raster order, pixel by pixel."""
    tiles = images.unflatten(3, (-1, patch_size)).unflatten(2, (-1, patch_size))
    return tiles.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(patches: Tensor, patch_size: int, size: tuple[int, int]) -> Tensor:
    """The inverse of `patchify` for images of ``size`` (height, width)."""
    rows, columns = size[0] // patch_size, size[1] // patch_size
    x = patches.unflatten(2, (patch_size**2, -1)).permute(0, 3, 2, 1)  # (b, c, p², m)
    return F.pixel_shuffle(x.flatten(1, 2).unflatten(2, (rows, columns)), patch_size)
