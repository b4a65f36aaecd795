"""Segmentation heads: UPerNet, its auxiliary head, and a linear layer."""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation

from vim_ssl.models.heads.pyramid import Norm

# "batch" is the paper's choice and learns fastest. "layer" normalises each pixel separately, so a
# batch size of one works, and accumulation and data parallelism match one large batch.
NORMS: dict[str, Norm] = {"batch": nn.BatchNorm2d, "layer": LayerNorm2d}


def _conv(inner: int, outer: int, kernel: int, norm: Norm) -> nn.Module:
    return Conv2dNormActivation(inner, outer, kernel, norm_layer=norm)


def _resize(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, like.shape[-2:], mode="bilinear", align_corners=False)


def _classifier(channels: int, num_classes: int, dropout: float) -> nn.Sequential:
    layer = nn.Conv2d(channels, num_classes, 1)
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return nn.Sequential(nn.Dropout2d(dropout), layer)


class UPerNet(nn.Module):
    """Pyramid pooling on the coarsest map and a feature pyramid over all maps.

    Args:
        in_channels: channels of each map, finest first.
        num_classes: number of predicted classes.
        channels: width of the head.
        pool_scales: sides of the pooled grids.
        dropout: dropout of whole channels before the last layer.
        norm: channels -> module; see `NORMS`.
    Reference: arXiv:1807.10221; sizes as in Vim's segmentation.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        channels: int,
        *,
        pool_scales: Sequence[int] = (1, 2, 3, 6),
        dropout: float = 0.1,
        norm: Norm = nn.BatchNorm2d,
    ):
        super().__init__()
        *finer, coarsest = in_channels
        conv = partial(_conv, norm=norm)
        self.pools = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(side), conv(coarsest, channels, 1))
            for side in pool_scales
        )
        self.pooled = conv(coarsest + len(pool_scales) * channels, channels, 3)
        self.laterals = nn.ModuleList(conv(c, channels, 1) for c in finer)
        self.smooth = nn.ModuleList(conv(channels, channels, 3) for _ in finer)
        self.fuse = conv(len(in_channels) * channels, channels, 3)
        self.classify = _classifier(channels, num_classes, dropout)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps (b, c, h, w), finest first -> logits (b, num_classes, h, w) at the finest size."""
        *finer, coarsest = maps
        pooled = [_resize(pool(coarsest), coarsest) for pool in self.pools]
        top = self.pooled(torch.cat([coarsest, *pooled], 1))
        levels = [top]
        for lateral, x in zip(reversed(self.laterals), reversed(finer), strict=True):
            top = lateral(x) + _resize(top, x)
            levels.append(top)
        smoothed = [smooth(x) for smooth, x in zip(self.smooth, levels[:0:-1], strict=True)]
        same = [_resize(x, smoothed[0]) for x in [*smoothed, levels[0]]]
        return self.classify(self.fuse(torch.cat(same, 1)))


class FCNHead(nn.Module):
    """One 3x3 convolution and a classifier: the auxiliary head of UPerNet.

    Args:
        in_channels: channels of the map.
        num_classes, channels, dropout, norm: see `UPerNet`.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        channels: int = 256,
        *,
        dropout: float = 0.1,
        norm: Norm = nn.BatchNorm2d,
    ):
        super().__init__()
        self.conv = _conv(in_channels, channels, 3, norm)
        self.classify = _classifier(channels, num_classes, dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(b, in_channels, h, w) -> logits (b, num_classes, h, w)."""
        return self.classify(self.conv(x))


class LinearHead(nn.Module):
    """Linear probe on the features of every patch.

    Args:
        in_channels: channels of each map; the maps are concatenated.
        num_classes: number of predicted classes.
    """

    def __init__(self, in_channels: Sequence[int], num_classes: int):
        super().__init__()
        self.classify = _classifier(sum(in_channels), num_classes, dropout=0.0)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps (b, c, h, w) of one size -> logits (b, num_classes, h, w)."""
        return self.classify(torch.cat(list(maps), 1))
