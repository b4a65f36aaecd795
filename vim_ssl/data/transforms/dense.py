"""Transforms of an image with its mask, or with its boxes and their masks.

All randomness is drawn from torch's global generator, which `SeededSamples` seeds for each sample.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.ops import masks_to_boxes
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from vim_ssl.data.labels import IGNORE
from vim_ssl.data.transforms.image import ToChannels

LONGEST = 4  # the long side is at most so many times the requested short side
ATTEMPTS = 10  # crops drawn until one has more than one class


class DensePixels:
    """An image as an encoder reads it, of any size, without a crop.

    Args:
        config: an encoder's ``data_config``: mean, std and input_size (c, h, w).
        short_side: resize to this, pixels; 0 keeps the size. The long side is at most four times as
            long, so that a thin strip does not become huge.
    """

    def __init__(self, config: Mapping[str, Any], short_side: int = 0):
        self.to_channels = ToChannels(config)
        self.mean, self.std = list(config["mean"]), list(config["std"])
        self.short_side = short_side

    def read(self, image: Image.Image | np.ndarray) -> Tensor:
        """An image, or bands (h, w, bands), in the encoder's channels: (c, h, w), uint8 of an
        image, float32 of bands."""
        pixels = self.to_channels(image)
        return pixels if isinstance(pixels, Tensor) else F.pil_to_tensor(pixels)

    def resized(self, size: tuple[int, int], scale: float = 1.0) -> list[int]:
        """(height, width) -> the same after resizing, times ``scale``."""
        if self.short_side:
            scale *= min(self.short_side / min(size), LONGEST * self.short_side / max(size))
        return [max(round(side * scale), 1) for side in size]

    def normalise(self, image: Tensor) -> Tensor:
        """(c, h, w), see `read` -> float32."""
        return F.normalize(F.to_dtype(image, torch.float32, scale=True), self.mean, self.std)

    def __call__(self, image: Image.Image | np.ndarray) -> Tensor:
        """An image, or bands (h, w, bands) -> float32 (c, h, w), normalised."""
        pixels = self.read(image)
        size = self.resized((pixels.shape[1], pixels.shape[2]))
        return self.normalise(F.resize(pixels, size, antialias=True))


class DenseCrop:
    """An item with an image and its mask -> a random crop of both, augmented.

    Resized, cropped (where smaller: padded with the mean, and `IGNORE`), mirrored, recoloured.

    Args:
        config, short_side: see `DensePixels`.
        crop: side of the crop, pixels.
        scale: range of the factor by which the image is resized, after ``short_side``.
        max_share: a crop is drawn again, ten times at most, while one class fills more than this
            of its labelled pixels.
        hflip: probability of mirroring left and right.
        photometric: change brightness, contrast, saturation and hue, each in half the samples; not
            of bands, whose values are measurements.
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
        self.crops = {
            kind: v2.RandomCrop(
                crop, pad_if_needed=True, fill={tv_tensors.Image: value, tv_tensors.Mask: IGNORE}
            )
            for kind, value in ((torch.uint8, fill), (torch.float32, self.pixels.mean))
        }
        self.flip = v2.RandomHorizontalFlip(hflip)
        changes = [{"brightness": 32 / 255}, {"contrast": 0.5}, {"saturation": 0.5}, {"hue": 0.1}]
        self.recolour = v2.Compose(
            [v2.RandomApply([v2.ColorJitter(**change)]) for change in changes]  # type: ignore[arg-type]
            if photometric
            else [v2.Identity()]
        )

    def __call__(self, item: dict[str, Any]) -> dict[str, Tensor]:
        image = tv_tensors.Image(self.pixels.read(item["image"]))
        mask = tv_tensors.Mask(torch.from_numpy(np.ascontiguousarray(item["mask"])))
        factor = float(torch.empty(()).uniform_(*self.scale))
        size = self.pixels.resized(tuple(mask.shape), factor)
        image, mask = F.resize(image, size, antialias=True), F.resize(mask, size)
        for _ in range(ATTEMPTS):
            crop, truth = self.crops[image.dtype](image, mask)
            if _largest_share(truth) <= self.max_share:
                break
        crop, truth = self.flip(crop, truth)
        if crop.dtype == torch.uint8:
            crop = self.recolour(crop)
        crop = self.pixels.normalise(crop)
        return {"image": crop.as_subclass(Tensor), "mask": truth.as_subclass(Tensor).long()}


class LargeScaleJitter:
    """An item with an image and its boxes -> a square canvas with both, augmented.

    Mirrored, resized to ``scale`` times the size that fits the canvas, and cropped if larger, else
    placed in the upper left corner on the mean, as in evaluation. With masks, an object's box is
    that of the rest of its mask. Objects of less than a pixel are dropped.

    Args:
        config: see `DensePixels`.
        size: side of the canvas, pixels.
        scale: range of the factor.
        hflip: probability of mirroring left and right.
    Returns, when called: ``image``, float32 (c, size, size), normalised, and ``objects``, a dict of
        ``boxes`` float32 (n, 4), left, top, right, bottom in pixels; ``labels`` int64 (n,), class
        numbers from 1, since 0 is the background; and if given ``masks`` uint8 (n, size,
        size), 1 = object.
    Raises: ValueError for an invalid scale.
    Reference: simple copy-paste, arXiv:2012.07177; scale 0.1 to 2 and 1024 pixels are ViTDet's.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        size: int,
        *,
        scale: tuple[float, float] = (0.1, 2.0),
        hflip: float = 0.5,
    ):
        if not 0 < scale[0] <= scale[1]:
            raise ValueError(f"scale {scale} is no range of factors with 0 < low <= high.")
        self.pixels, self.size, self.scale = DensePixels(config), size, scale
        self.flip = v2.RandomHorizontalFlip(hflip)

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        image = tv_tensors.Image(self.pixels.read(item["image"]))
        boxes = tv_tensors.BoundingBoxes(
            torch.from_numpy(item["boxes"]), format="XYXY", canvas_size=image.shape[-2:]
        )  # type: ignore[call-overload]
        masks = tv_tensors.Mask(torch.from_numpy(item["masks"])) if "masks" in item else None
        parts = [image, boxes] if masks is None else [image, boxes, masks]
        parts = self.flip(*parts)
        factor = float(torch.empty(()).uniform_(*self.scale))
        size = fitted(image.shape[-2:], self.size, factor)
        left_over = torch.tensor([max(side - self.size, 0) for side in size])
        top, left = (torch.rand(2) * (left_over + 1)).long().tolist()
        image, boxes, *more = (self._placed(part, size, top, left) for part in parts)
        labels = torch.from_numpy(item["box_labels"]) + 1
        if more:
            seen = more[0].flatten(1).bool().any(1)
            objects = {
                "boxes": around(more[0][seen]),
                "labels": labels[seen],
                "masks": more[0][seen],
            }
        else:
            seen = ((boxes[:, 2:] - boxes[:, :2]) >= 1).all(1)
            objects = {"boxes": boxes[seen], "labels": labels[seen]}
        return {"image": image, "objects": objects}

    def _placed(self, part: Tensor, size: list[int], top: int, left: int) -> Tensor:
        """Resize, crop and place on the canvas; an image is normalised first."""
        if isinstance(part, tv_tensors.Mask) and not len(part):  # resize refuses it
            return torch.zeros(0, self.size, self.size, dtype=torch.uint8)
        height, width = min(size[0] - top, self.size), min(size[1] - left, self.size)
        part = F.crop(F.resize(part, size, antialias=True), top, left, height, width)
        if isinstance(part, tv_tensors.Image):
            part = self.pixels.normalise(part)
        return F.pad(part, [0, 0, self.size - width, self.size - height]).as_subclass(Tensor)


def fitted(size: Sequence[int], side: int, scale: float = 1.0) -> list[int]:
    """(height, width) -> the size whose longer side is ``scale`` times ``side``, pixels."""
    factor = scale * side / max(size)
    return [max(round(old * factor), 1) for old in size]


def on_canvas(pixels: DensePixels, image: Image.Image, side: int) -> tuple[Tensor, list[int]]:
    """An image as a detector reads it: its longer side is ``side``, in the upper left corner.

    Returns: float32 (c, side, side), normalised, on the mean; and the (height, width) of the image
        in it.
    """
    size = fitted((image.height, image.width), side)
    resized = F.resize(pixels.read(image), size, antialias=True)
    return F.pad(pixels.normalise(resized), [0, 0, side - size[1], side - size[0]]), size


def around(masks: Tensor) -> Tensor:
    """Non-empty masks (n, h, w) -> their bounding boxes (n, 4), float32; the right and lower sides
    are behind the last pixel."""
    ends = torch.tensor([0, 0, 1, 1])
    return (masks_to_boxes(masks) + ends).float() if len(masks) else torch.zeros(0, 4)


def _largest_share(mask: Tensor) -> float:
    """The share of the most frequent class among the labelled pixels; 1 if there are none."""
    counts = torch.bincount(mask.flatten(), minlength=IGNORE + 1)[:IGNORE]
    return float(counts.max() / counts.sum()) if counts.any() else 1.0
