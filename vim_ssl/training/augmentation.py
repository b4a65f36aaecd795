"""timm's training augmentation and its settings."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vim_ssl.data.config import Configured
from vim_ssl.data.transforms.image import Transform, create_transform
from vim_ssl.training.config import TrainConfig
from vim_ssl.utils.config import check_between, opt


@dataclass
class AugmentationConfig(TrainConfig):
    """Settings of the loop and of training augmentation."""

    crop_scale: tuple[float, float] = opt(
        (0.08, 1.0), "range of the random crop's area, as a fraction of the image", "data"
    )
    hflip: float = opt(0.5, "probability of mirroring", "data")
    color_jitter: float = opt(0.0, "strength of colour jitter; unused with auto_augment", "data")
    auto_augment: str = opt("", "timm's policy name, such as rand-m9-mstd0.5-inc1", "data")
    erasing: float = opt(0.0, "probability of erasing a rectangle", "data")

    def __post_init__(self):
        super().__post_init__()
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"crop_scale is {low:g} {high:g}; expected 0 < low <= high <= 1.")
        check_between(self, 0, 1, "hflip", "erasing")
        check_between(self, 0, math.inf, "color_jitter")

    @property
    def augments(self) -> bool:
        """False if training images may have the transform of evaluation."""
        random = self.hflip or self.color_jitter or self.auto_augment or self.erasing
        return bool(random) or tuple(self.crop_scale) != (1, 1)


def training_transform(
    encoder_or_config: Configured | Mapping[str, Any], config: AugmentationConfig
) -> Transform:
    """timm's training augmentation with these settings; see `create_transform`."""
    return create_transform(
        encoder_or_config, is_training=True, scale=config.crop_scale, hflip=config.hflip,
        color_jitter=config.color_jitter or None, auto_augment=config.auto_augment or None,
        re_prob=config.erasing, re_mode="pixel",
    )  # fmt: skip
