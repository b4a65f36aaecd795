"""Transforms of a picture and its mask together.

All randomness is drawn from torch's global generator, which `SeededSamples` seeds for each sample.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from vim_ssl.data.images import clean_image
from vim_ssl.data.masks import IGNORE

LONGEST = 4  # a long side is at most so many times the short side asked for
ATTEMPTS = 10  # crops drawn until one has more than one class


class DensePixels:
    """A picture as the encoder reads it, at a size of its own: no crop.

    Args:
        config: an encoder's ``data_config``: mean, std and input_size (c, h, w).
        short_side: pixels; 0 leaves the picture its size. The long side becomes at most four times
            as long, so that a strip of few pixels does not explode.
    """

    def __init__(self, config: Mapping[str, Any], short_side: int = 0):
        self.mode = channels_mode(config["input_size"][0])
        self.mean, self.std = list(config["mean"]), list(config["std"])
        self.short_side = short_side

    def to_mode(self, image: Image.Image) -> Image.Image:
        """In the encoder's channels, 8 bits each."""
        return clean_image(image, self.mode)

    def resized(self, size: tuple[int, int], scale: float = 1.0) -> list[int]:
        """(height, width) -> the same after resizing, times ``scale``."""
        if self.short_side:
            scale *= min(self.short_side / min(size), LONGEST * self.short_side / max(size))
        return [max(round(side * scale), 1) for side in size]

    def normalise(self, image: Tensor) -> Tensor:
        """uint8 (c, h, w) -> float32."""
        return F.normalize(F.to_dtype(image, torch.float32, scale=True), self.mean, self.std)

    def __call__(self, image: Image.Image) -> Tensor:
        """PIL image -> float32 (c, h, w), normalised."""
        pixels = F.pil_to_tensor(self.to_mode(image))
        size = self.resized((image.height, image.width))
        return self.normalise(F.resize(pixels, size, antialias=True))


class DenseCrop:
    """An item with a picture and its mask -> a random crop of both, augmented.

    Resized, cropped (where smaller: padded with the mean, and `IGNORE`), mirrored, recoloured.

    Args:
        config, short_side: see `DensePixels`.
        crop: side of the crop, pixels.
        scale: range of the factor by which the picture is resized, after ``short_side``.
        max_share: a crop is drawn again, ten times at most, while one class fills more than this
            of its labelled pixels.
        hflip: probability of mirroring left and right.
        photometric: brightness, contrast, saturation and hue, each changed in half the samples.
    Returns, when called: ``image``, float32 (c, crop, crop), normalised, and ``mask``, int64
    (crop, crop).
    Reference: the settings of mmsegmentation's ADE20K recipes are scale 0.5 to 2, max_share 0.75.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        crop: int,
        *,
        short_side: int = 0,
        scale: tuple[float, float] = (0.5, 2.0),
        max_share: float = 0.75,
        hflip: float = 0.5,
        photometric: bool = True,
    ):
        if not 0 < scale[0] <= scale[1]:
            raise ValueError(f"scale {scale} is no range of factors with 0 < low <= high.")
        self.pixels, self.scale = DensePixels(config, short_side), scale
        self.max_share = max_share
        grey = round(255 * sum(self.pixels.mean) / len(self.pixels.mean))
        fill = [round(255 * m) for m in self.pixels.mean] if len(self.pixels.mean) == 3 else grey
        self.crop = v2.RandomCrop(
            crop, pad_if_needed=True, fill={tv_tensors.Image: fill, tv_tensors.Mask: IGNORE}
        )
        self.flip = v2.RandomHorizontalFlip(hflip)
        changes = [{"brightness": 32 / 255}, {"contrast": 0.5}, {"saturation": 0.5}, {"hue": 0.1}]
        self.recolour = v2.Compose(
            [v2.RandomApply([v2.ColorJitter(**change)]) for change in changes]  # type: ignore[arg-type]
            if photometric
            else [v2.Identity()]
        )

    def __call__(self, item: dict[str, Any]) -> dict[str, Tensor]:
        image = tv_tensors.Image(F.pil_to_tensor(self.pixels.to_mode(item["image"])))
        mask = tv_tensors.Mask(torch.from_numpy(np.ascontiguousarray(item["mask"])))
        factor = float(torch.empty(()).uniform_(*self.scale))
        size = self.pixels.resized(tuple(mask.shape), factor)
        image, mask = F.resize(image, size, antialias=True), F.resize(mask, size)
        for _ in range(ATTEMPTS):
            picture, truth = self.crop(image, mask)
            if _largest_share(truth) <= self.max_share:
                break
        picture, truth = self.flip(picture, truth)
        picture = self.pixels.normalise(self.recolour(picture))
        return {"image": picture.as_subclass(Tensor), "mask": truth.as_subclass(Tensor).long()}


def _largest_share(mask: Tensor) -> float:
    """Of the labelled pixels, the share of the most frequent class; 1 where none is labelled."""
    counts = torch.bincount(mask.flatten(), minlength=IGNORE + 1)[:IGNORE]
    return float(counts.max() / counts.sum()) if counts.any() else 1.0


def channels_mode(in_chans: int) -> str:
    if in_chans not in (1, 3):
        raise ValueError(
            f"The encoder takes {in_chans} channels; pictures have 1 (grey) or 3 (colour)."
        )
    return "L" if in_chans == 1 else "RGB"
