"""Transforms, made from what an encoder says it expects."""

from collections.abc import Callable, Mapping
from typing import Any

from PIL import Image
from timm import data as timm_data
from timm.data.transforms import str_to_interp_mode
from torch import Tensor, nn
from torchvision import transforms

from vim_ssl.data.images import clean_image

Transform = Callable[[Image.Image], Tensor]


def create_transform(
    encoder_or_config: nn.Module | Mapping[str, Any], is_training: bool = False, **augment: Any
) -> Transform:
    """The transform an encoder expects: PIL image → float tensor (c, h, w), normalised.

    Any PIL image goes in: it is put upright, laid on white and converted to the encoder's grey or
    colour first. Smaller pictures are enlarged.

    Args:
        encoder_or_config: an encoder, or its ``data_config``: input_size (c, h, w), mean, std,
            interpolation, crop_pct and crop_mode.
        is_training: timm's training augmentation (random crop, flip, colour jitter) instead of
            resize and crop.
        augment: further arguments of `timm.data.create_transform`, such as
            ``auto_augment="rand-m9-mstd0.5-inc1"`` or ``hflip=0``.
    Raises: ValueError for a number of channels that pictures do not have.
    """
    config = _config(encoder_or_config)
    size, mode = tuple(config["input_size"]), channels_mode(config["input_size"][0])
    keys = ("mean", "std", "interpolation", "crop_pct", "crop_mode")
    given = {key: config[key] for key in keys if key in config}
    steps = timm_data.create_transform(input_size=size, is_training=is_training, **given, **augment)
    trim = []
    if not is_training and config.get("crop_mode", "center") == "center":
        trim = [TrimLongSide(size[1:])]
    return transforms.Compose([ToMode(mode), *trim, *_flat(steps)])


def pretrain_transform(
    encoder_or_config: nn.Module | Mapping[str, Any],
    *,
    crop_scale: tuple[float, float] = (0.2, 1.0),
    hflip: float = 0.5,
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Transform:
    """MAE's augmentation: random resized crop and flip. PIL image → float tensor (c, h, w).

    All randomness is drawn from torch's global generator, so seeding that fixes the sample.

    Args:
        encoder_or_config: see `create_transform`; crop_pct and crop_mode are not used.
        crop_scale: range of the crop's share of the picture's area; (1, 1) means no random crop
            but the shorter side resized and the centre taken.
        hflip: probability of mirroring left and right; 0 for digits and text.
        ratio: range of the crop's width / height.
    Raises: ValueError for ranges that are none, or channels that pictures do not have.
    """
    low, high = crop_scale
    if not 0 < low <= high <= 1:
        raise ValueError(f"crop_scale {crop_scale} is no range within 0 < low <= high <= 1.")
    if not 0 < ratio[0] <= ratio[1]:
        raise ValueError(f"ratio {ratio} is no range of positive numbers.")
    config = _config(encoder_or_config)
    flip = [transforms.RandomHorizontalFlip(hflip)] if hflip else []
    if crop_scale == (1, 1):
        to_mode, *steps = _flat(create_transform({**config, "crop_pct": 1, "crop_mode": "center"}))
        return transforms.Compose([to_mode, *flip, *steps])
    crop = transforms.RandomResizedCrop(
        tuple(config["input_size"][1:]),
        scale=crop_scale,
        ratio=ratio,
        interpolation=str_to_interp_mode(config.get("interpolation", "bicubic")),
    )
    return transforms.Compose(
        [
            ToMode(channels_mode(config["input_size"][0])),
            crop,
            *flip,
            transforms.ToTensor(),
            transforms.Normalize(config["mean"], config["std"]),
        ]
    )


class ToMode:
    """Any PIL image to 8-bit "RGB" or "L"; see `clean_image`."""

    def __init__(self, mode: str):
        self.mode = mode

    def __call__(self, image: Image.Image) -> Image.Image:
        if not isinstance(image, Image.Image):
            raise TypeError(
                f"The transform takes a PIL image, not {type(image).__name__}; for a file use "
                "vim_ssl.data.decode_image."
            )
        return clean_image(image, self.mode)

    def __repr__(self) -> str:
        return f"ToMode({self.mode!r})"


class TrimLongSide:
    """Cut what a centre crop discards anyway off very long pictures, before they are enlarged.

    A strip of 2 × 20,000 pixels resized to 224 on its shorter side would take 1.5 GB.
    """

    def __init__(self, size: tuple[int, int]):
        self.max_aspect = 8 * max(size) / min(size)

    def __call__(self, image: Image.Image) -> Image.Image:
        longest = round(min(image.size) * self.max_aspect)
        if max(image.size) <= longest:
            return image
        return transforms.functional.center_crop(
            image, [min(image.height, longest), min(image.width, longest)]
        )

    def __repr__(self) -> str:
        return f"TrimLongSide(max_aspect={self.max_aspect:g})"


def _config(encoder_or_config: nn.Module | Mapping[str, Any]) -> Mapping[str, Any]:
    config = getattr(encoder_or_config, "data_config", encoder_or_config)
    if not isinstance(config, Mapping):
        raise TypeError(
            f"Expected an encoder with a data_config, or such a mapping, not "
            f"{type(encoder_or_config).__name__}."
        )
    if missing := {"input_size", "mean", "std"} - set(config):
        raise ValueError(f"data_config has no {', '.join(sorted(missing))}.")
    return config


def channels_mode(in_chans: int) -> str:
    if in_chans not in (1, 3):
        raise ValueError(
            f"The encoder takes {in_chans} channels; pictures have 1 (grey) or 3 (colour)."
        )
    return "L" if in_chans == 1 else "RGB"


def _flat(steps: Any) -> list[Any]:
    return list(getattr(steps, "transforms", [steps]))
