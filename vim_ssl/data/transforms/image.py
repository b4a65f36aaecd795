"""Image transforms that follow an encoder's data configuration.

timm and torchvision are imported when a transform is built: opening data takes half the time
without them.
"""

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from vim_ssl.data.config import Configured, band_positions, data_config_of
from vim_ssl.data.images import clean_image
from vim_ssl.data.transforms.clip import ClipTransform

Transform = Callable[[Any], Tensor]  # input: a PIL image, an array (h, w, bands) or a Video


def create_transform(
    encoder_or_config: nn.Module | Configured | Mapping[str, Any],
    is_training: bool = False,
    **augment: Any,
) -> Transform:
    """Return an encoder's input transform: image → normalised float tensor (c, h, w).

    It accepts any PIL image (see `clean_image`), which becomes grey or colour as the encoder needs,
    or an array of the encoder's bands (see `as_tensor`). Smaller images are enlarged. For a video
    encoder it maps a `Video` to (c, t, h, w), or to several clips; see `ClipTransform`.

    Args:
        encoder_or_config: an encoder, or its ``data_config``: input_size (c, h, w), mean, std,
            interpolation, crop_pct and crop_mode.
        is_training: timm's training augmentation (random crop, flip, colour jitter) instead of
            resize and crop.
        augment: further arguments of `timm.data.create_transform`, such as
            ``auto_augment="rand-m9-mstd0.5-inc1"`` or ``hflip=0``.
    Raises: ValueError for color_jitter unless there are 1 or 3 channels.
    """
    from timm import data as timm_data
    from torchvision import transforms

    config = data_config_of(encoder_or_config)
    size = tuple(config["input_size"])
    if size[0] not in (1, 3):
        augment.setdefault("color_jitter", None)  # timm's works only for grey and colour
        if augment["color_jitter"]:
            raise ValueError(
                f"color_jitter works for grey and colour images, not for {size[0]} channels; set "
                "it to 0."
            )
    keys = ("mean", "std", "interpolation", "crop_pct", "crop_mode")
    given = {key: config[key] for key in keys if key in config}
    steps = timm_data.create_transform(input_size=size, is_training=is_training, **given, **augment)
    trim: list[Callable] = []
    if not is_training and config.get("crop_mode", "center") == "center":
        trim = [TrimLongSide(size[1:])]
    steps = map(_keep_a_bit, _with_table(_flat(steps)))
    transform = transforms.Compose([ToChannels(config), *trim, *steps])
    if getattr(encoder_or_config, "reads_clips", False):
        return ClipTransform(transform, is_training)
    return transform


def pretrain_transform(
    encoder_or_config: nn.Module | Configured | Mapping[str, Any],
    *,
    crop_scale: tuple[float, float] = (0.2, 1.0),
    hflip: float = 0.5,
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Transform:
    """Return MAE's augmentation, random resized crop and flip: image → float tensor (c, h, w).

    All random numbers come from torch's global generator, so its seed determines the sample.

    Args:
        encoder_or_config: see `create_transform`; crop_pct and crop_mode are not used.
        crop_scale: range of the crop's area, as a fraction of the image; (1, 1) resizes the
            shorter side and takes the centre crop instead.
        hflip: probability of a horizontal flip; use 0 for digits and text.
        ratio: range of the crop's width / height.
    Raises: ValueError for invalid ranges.
    """
    from timm.data.transforms import str_to_interp_mode
    from torchvision import transforms

    low, high = crop_scale
    if not 0 < low <= high <= 1:
        raise ValueError(
            f"crop_scale is {crop_scale}; expected (low, high) with 0 < low <= high <= 1."
        )
    if not 0 < ratio[0] <= ratio[1]:
        raise ValueError(f"ratio is {ratio}; expected (low, high) with 0 < low <= high.")
    config = data_config_of(encoder_or_config)
    flip = [transforms.RandomHorizontalFlip(hflip)] if hflip else []
    if crop_scale == (1, 1):
        whole = {**config, "crop_pct": 1, "crop_mode": "center"}
        to_channels, *steps = _flat(create_transform(whole))
        return transforms.Compose([to_channels, *flip, *steps])
    crop = transforms.RandomResizedCrop(
        tuple(config["input_size"][1:]),
        scale=crop_scale,
        ratio=ratio,
        interpolation=str_to_interp_mode(config.get("interpolation", "bicubic")),
    )
    normalise = ToNormalizedTensor(transforms.Normalize(config["mean"], config["std"]))
    return transforms.Compose([ToChannels(config), crop, *flip, normalise])


def as_tensor(values: np.ndarray) -> Tensor:
    """Convert bands (h, w, bands) to float32 (bands, h, w). uint8 is scaled to 0..1, as for images;
    other dtypes keep their values, in the unit of mean and std. NaN is kept."""
    x = torch.from_numpy(np.array(values.transpose(2, 0, 1), np.float32, order="C"))
    return x.div_(255) if values.dtype == np.uint8 else x


class ToChannels:
    """Convert an image to the encoder's channels; the first step of a transform.

    A PIL image becomes 8-bit "RGB" or "L" (see `clean_image`). An array of bands becomes a tensor,
    in which the band's mean replaces missing values, so that they are 0 after normalisation.

    Raises: TypeError for anything else; ValueError for another number of channels.
    """

    def __init__(self, config: Mapping[str, Any]):
        self.channels, self.mean = config["input_size"][0], tuple(config["mean"])
        self.bands = tuple(config.get("bands", ()))

    def __call__(self, image: Image.Image | np.ndarray) -> Image.Image | Tensor:
        if isinstance(image, np.ndarray) and image.ndim == 3:
            if image.shape[2] != self.channels:
                raise ValueError(self._unlike(f"{image.shape[2]} bands"))
            x = as_tensor(image)
            for band, mean in zip(x, self.mean, strict=True):  # in place: rasters are large
                band.masked_fill_(~band.isfinite(), mean)
            return x
        if not isinstance(image, Image.Image):
            raise TypeError(
                f"The transform takes a PIL image or an array (h, w, bands), not "
                f"{type(image).__name__}; decode a file with vim_ssl.data.decode_image."
            )
        if self.channels not in (1, 3):
            raise ValueError(self._unlike("grey or colour channels"))
        return clean_image(image, "L" if self.channels == 1 else "RGB")

    def _unlike(self, came: str) -> str:
        return (
            f"The encoder takes {self.channels} channels ({', '.join(self.bands)}), but the image "
            f"has {came}; choose bands with ?bands=, or load the encoder with in_chans= and "
            "data_config=vim_ssl.data.band_statistics(data)."
        )

    def __repr__(self) -> str:
        return f"ToChannels({self.channels})"


class TrimLongSide:
    """Crop very long images before resizing, to the part that a centre crop can use.

    A strip of 2 × 20,000 pixels, resized to 224 on its shorter side, would take 1.5 GB.
    """

    def __init__(self, size: tuple[int, int]):
        self.max_aspect = 8 * max(size) / min(size)

    def __call__(self, image: Image.Image | Tensor) -> Image.Image | Tensor:
        from torchvision.transforms import functional

        _, height, width = functional.get_dimensions(image)
        longest = round(min(height, width) * self.max_aspect)
        if max(height, width) <= longest:
            return image
        return functional.center_crop(image, [min(height, longest), min(width, longest)])

    def __repr__(self) -> str:
        return f"TrimLongSide(max_aspect={self.max_aspect:g})"


class ToNormalizedTensor:
    """Convert a PIL image, 8-bit "RGB" or "L", to a normalised float32 tensor (c, h, w), by a table
    of each channel's 256 values. A tensor is only normalised.

    It is equal bit for bit to torchvision's `ToTensor` and ``normalize``, whose passes over the
    image and checks take 1.4 times as long for 224 px and six times for 28 px.
    """

    def __init__(self, normalize: Any):
        self.normalize = normalize

    @cached_property
    def _table(self) -> np.ndarray:
        """The values (c, 256), float32, in the order of torchvision's operations."""
        levels = torch.arange(256, dtype=torch.uint8).to(torch.float32).div(255)
        channels = len(self.normalize.mean)
        return self.normalize(levels.expand(channels, 1, 256)).flatten(1).numpy()

    def __call__(self, image: Image.Image | Tensor) -> Tensor:
        if isinstance(image, Tensor):
            return self.normalize(image)
        pixels = np.atleast_3d(np.asarray(image))  # (h, w, c)
        values = np.empty((pixels.shape[2], *pixels.shape[:2]), np.float32)
        for channel, (row, out) in enumerate(zip(self._table, values, strict=True)):
            np.take(row, pixels[:, :, channel], out=out, mode="clip")  # unlike "raise": no copies
        return torch.from_numpy(values)

    def __repr__(self) -> str:
        # As two steps of a Compose: stored embeddings are of a transform with this text.
        return f"MaybeToTensor()\n    {self.normalize}"


def denormalize(images: Tensor, config: Mapping[str, Any]) -> Tensor:
    """Convert normalised images (b, c, h, w) to grey or colour within 0..1, for display.

    Grey and colour are restored. From other bands, red, green and blue are selected by name, else
    the first three (the first if there are only two); black is two standard deviations below the
    mean, white two above.
    """
    mean, std = (torch.tensor(config[key], device=images.device) for key in ("mean", "std"))
    if len(mean) in (1, 3) and float(mean.abs().max()) <= 1:
        return (images * std[:, None, None] + mean[:, None, None]).clamp(0, 1)
    colours = band_positions(config.get("bands", ()), ("R", "G", "B")) or [None]
    chosen = [position for position in colours if position is not None]
    if len(chosen) < 3:
        chosen = [0, 1, 2] if len(mean) >= 3 else [0]
    return (images[:, chosen] / 4 + 0.5).clamp(0, 1)


def _keep_a_bit(step: Any) -> Any:
    """Make timm's posterize keep at least one bit per colour, and return the step. At its highest
    level timm keeps none, which Pillow 13 does not accept."""
    from timm.data import auto_augment

    ops = [getattr(step, "ops", []), *getattr(step, "policy", [])]
    for op in (op for group in ops for op in group):
        if getattr(op, "aug_fn", None) is auto_augment.posterize:
            op.aug_fn = _posterize
    return step


def _posterize(image: Image.Image, bits: int, **hparams) -> Image.Image:
    from timm.data import auto_augment

    return auto_augment.posterize(image, max(bits, 1), **hparams)


def _with_table(steps: list[Any]) -> list[Any]:
    """Replace timm's conversion to a tensor and the `Normalize` after it."""
    from timm.data.transforms import MaybeToTensor
    from torchvision.transforms import Normalize

    result: list[Any] = []
    for step in steps:
        if isinstance(step, Normalize) and result and isinstance(result[-1], MaybeToTensor):
            result[-1] = ToNormalizedTensor(step)
        else:
            result.append(step)
    return result


def _flat(steps: Any) -> list[Any]:
    return list(getattr(steps, "transforms", [steps]))
