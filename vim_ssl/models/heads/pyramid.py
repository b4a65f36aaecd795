"""Multi-scale pyramids from an encoder with single-stride maps."""

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation

Norm = Callable[[int], nn.Module]


def doublings(stride: int, target: int) -> int:
    """Return the number of doublings from ``stride`` to ``target``; negative for halvings.

    Raises: ValueError for a stride that is not a power of two times ``target``.
    """
    times = math.log2(stride / target)
    if not times.is_integer():
        raise ValueError(
            f"a map of stride {stride} cannot be doubled or halved to stride {target}; a pyramid "
            "needs patches of 4, 8, 16 … pixels. The linear head accepts any size."
        )
    return int(times)


class FeatureUpsampling(nn.Module):
    """Resize four tapped maps to strides 4, 8, 16, 32, from the shallowest block's to the deepest.

    Transposed convolutions double the size, max-pooling halves it (odd sides are rounded up).

    Args:
        dim: input and output channels of every map.
        stride: stride of the maps in pixels.
        norm: constructor of the norm between two transposed convolutions: channels -> module.
    Raises: ValueError for a stride that is not a power of two.
    Reference: BEiT's segmentation, arXiv:2106.08254, which Vim uses.
    """

    strides = (4, 8, 16, 32)

    def __init__(self, dim: int, stride: int, norm: Norm = nn.BatchNorm2d):
        super().__init__()
        self.levels = nn.ModuleList(
            _resized(dim, doublings(stride, target), norm) for target in self.strides
        )

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Four maps (b, dim, h, w) -> four, stride 4 first."""
        if len(maps) != len(self.levels):
            raise ValueError(f"{len(maps)} maps for {len(self.levels)} levels; tap four blocks.")
        return [level(x) for level, x in zip(self.levels, maps, strict=True)]


def _resized(dim: int, times: int, norm: Norm) -> nn.Module:
    if times <= 0:
        factor = 2**-times
        return nn.MaxPool2d(factor, ceil_mode=True) if times else nn.Identity()
    steps: list[nn.Module] = [nn.ConvTranspose2d(dim, dim, 2, 2)]
    for _ in range(times - 1):
        steps += [norm(dim), nn.GELU(), nn.ConvTranspose2d(dim, dim, 2, 2)]
    return nn.Sequential(*steps)


class SimpleFeaturePyramid(nn.Module):
    """The last map at strides 4, 8, 16, 32 and 64, for detectors.

    Each doubling halves the channels. Each level then has a 1x1 and a 3x3 convolution with
    LayerNorm over channels; stride 64 is every second pixel of stride 32.

    Args:
        dim: channels of the map.
        stride: stride of the map in pixels.
        out_channels: channels of every level.
    Raises: ValueError for a stride that is not a power of two, or channels that cannot be halved.
    Reference: ViTDet, arXiv:2203.16527.
    """

    names = ("0", "1", "2", "3", "pool")

    def __init__(self, dim: int, stride: int, out_channels: int = 256):
        super().__init__()
        self.out_channels = out_channels
        self.levels = nn.ModuleList()
        for target in (4, 8, 16, 32):
            times = doublings(stride, target)
            steps: list[nn.Module] = []
            width = dim
            if times < 0:
                steps.append(nn.MaxPool2d(2**-times, ceil_mode=True))
            for i in range(times):
                if width % 2:
                    raise ValueError(f"{dim} channels cannot be halved {times} times.")
                steps += [LayerNorm2d(width), nn.GELU()] if i else []
                steps.append(nn.ConvTranspose2d(width, width // 2, 2, 2))
                width //= 2
            for inner, kernel in ((width, 1), (out_channels, 3)):
                steps.append(
                    Conv2dNormActivation(
                        inner, out_channels, kernel, norm_layer=LayerNorm2d, activation_layer=None
                    )
                )
            self.levels.append(nn.Sequential(*steps))

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        """(b, dim, h, w) -> five maps (b, out_channels, ·, ·) by `names`, finest first."""
        maps = [level(x) for level in self.levels]
        maps.append(F.max_pool2d(maps[-1], kernel_size=1, stride=2))
        return OrderedDict(zip(self.names, maps, strict=True))
