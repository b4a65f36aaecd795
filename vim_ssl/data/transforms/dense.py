"""Transforms of an image with its mask, or with its boxes and their masks.

All random numbers come from torch's global generator, which `SeededSamples` seeds per sample.
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

LONGEST = 4  # maximum of long side / requested short side
ATTEMPTS = 10  # maximum number of crops drawn to satisfy max_share


class DensePixels:
    """Convert an image of any size to an encoder's input, without cropping.

    Args:
        config: an encoder's ``data_config``: mean, std and input_size (c, h, w).
        short_side: resize the shorter side to this, in pixels; 0 keeps the size. The longer side is
            limited to four times this, so that a thin strip does not become huge.
    """

    def __init__(self, config: Mapping[str, Any], short_side: int = 0):
        self.to_channels = ToChannels(config)
        self.mean, self.std = list(config["mean"]), list(config["std"])
        self.short_side = short_side

    def read(self, image: Image.Image | np.ndarray) -> Tensor:
        """Convert an image, or bands (h, w, bands), to the encoder's channels (c, h, w): uint8 for
        an image, float32 for bands."""
        pixels = self.to_channels(image)
        return pixels if isinstance(pixels, Tensor) else F.pil_to_tensor(pixels)

    def resized(self, size: tuple[int, int], scale: float = 1.0) -> list[int]:
        """Return (height, width) after resizing, multiplied by ``scale``."""
        if self.short_side:
            scale *= min(self.short_side / min(size), LONGEST * self.short_side / max(size))
        return [max(round(side * scale), 1) for side in size]

    def normalise(self, image: Tensor) -> Tensor:
        """Normalise (…, c, h, w) from `read` to float32."""
        return F.normalize(F.to_dtype(image, torch.float32, scale=True), self.mean, self.std)

    def read_resized(self, image: Image.Image | np.ndarray) -> Tensor:
        """Return the channels of `read`, resized to ``short_side``; not normalised, so that a large
        image stays uint8."""
        pixels = self.read(image)
        size = self.resized((pixels.shape[1], pixels.shape[2]))
        return F.resize(pixels, size, antialias=True)

    def __call__(self, image: Image.Image | np.ndarray) -> Tensor:
        """Transform an image, or bands (h, w, bands), to normalised float32 (c, h, w)."""
        return self.normalise(self.read_resized(image))

    def __repr__(self) -> str:
        return f"DensePixels({self.to_channels}, {self.mean}, {self.std}, {self.short_side})"


class DenseCrop:
    """Augment an item with an image and its mask: take a random crop of both.

    Both are resized, cropped (padded with the mean and `IGNORE` if smaller) and flipped; then the
    colours of the image are jittered.

    Args:
        config, short_side: see `DensePixels`.
        crop: side of the crop in pixels.
        scale: range of the factor by which the image is resized, after ``short_side``.
        max_share: maximum share of one class among a crop's labelled pixels; a crop above it is
            redrawn, up to ten draws in total.
        hflip: probability of a horizontal flip.
        photometric: change brightness, contrast, saturation and hue, each in half the samples;
            never for bands, whose values are measurements.
    A call returns ``image``, float32 (c, crop, crop), normalised, and ``mask``, int64 (crop, crop).

    Reference: mmsegmentation's ADE20K recipes use scale 0.5 to 2 and max_share 0.75.
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
            raise ValueError(f"scale is {scale}; expected (low, high) with 0 < low <= high.")
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
    """Augment an item with an image and its boxes: place both on a square canvas.

    The image is flipped and resized to ``scale`` times the size that fits the canvas. A larger one
    is cropped, a smaller one is placed in the upper left corner and padded with the mean, as in
    evaluation. With masks, an object's box encloses the remaining part of its mask. Objects smaller
    than a pixel are dropped.

    Args:
        config: see `DensePixels`.
        size: side of the canvas in pixels.
        scale: range of the factor.
        hflip: probability of a horizontal flip.
    A call returns ``image``, float32 (c, size, size), normalised, and ``objects``, a dict with
    ``boxes`` float32 (n, 4): left, top, right, bottom in pixels; ``labels`` int64 (n,): classes
    from 1, since 0 is the background; and, if the item has them, ``masks`` uint8 (n, size, size),
    1 = object.
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
            raise ValueError(f"scale is {scale}; expected (low, high) with 0 < low <= high.")
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
        """Resize, crop and place on the canvas; normalise an image before padding."""
        if isinstance(part, tv_tensors.Mask) and not len(part):  # resize does not accept it
            return torch.zeros(0, self.size, self.size, dtype=torch.uint8)
        height, width = min(size[0] - top, self.size), min(size[1] - left, self.size)
        part = F.crop(F.resize(part, size, antialias=True), top, left, height, width)
        if isinstance(part, tv_tensors.Image):
            part = self.pixels.normalise(part)
        return F.pad(part, [0, 0, self.size - width, self.size - height]).as_subclass(Tensor)


def fitted(size: Sequence[int], side: int, scale: float = 1.0) -> list[int]:
    """Scale (height, width) so that the longer side is ``scale`` times ``side`` pixels."""
    factor = scale * side / max(size)
    return [max(round(old * factor), 1) for old in size]


def on_canvas(pixels: DensePixels, image: Tensor, side: int) -> tuple[Tensor, list[int]]:
    """Resize an image of `DensePixels.read` so that its longer side is ``side``, normalise it and
    pad it at the bottom and right to float32 (c, side, side). The padding is 0, i.e. the mean
    colour. Also return the resized (height, width)."""
    size = fitted(image.shape[1:], side)
    resized = F.resize(image, size, antialias=True)
    return F.pad(pixels.normalise(resized), [0, 0, side - size[1], side - size[0]]), size


def around(masks: Tensor) -> Tensor:
    """Return the bounding boxes (n, 4), float32, of non-empty masks (n, h, w). Right and bottom are
    exclusive: one pixel past the last."""
    ends = torch.tensor([0, 0, 1, 1])
    return (masks_to_boxes(masks) + ends).float() if len(masks) else torch.zeros(0, 4)


def _largest_share(mask: Tensor) -> float:
    """Share of the most frequent class among the labelled pixels; 1 without labelled pixels."""
    counts = torch.bincount(mask.flatten(), minlength=IGNORE + 1)[:IGNORE]
    return float(counts.max() / counts.sum()) if counts.any() else 1.0
