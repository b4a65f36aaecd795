"""Dense heads: sizes at any grid and aspect, a gradient for every parameter, the paper's sizes."""

import pytest
import torch
from timm.layers import LayerNorm2d
from torch import nn

from vim_ssl import VimEncoder
from vim_ssl.models.heads import (
    NORMS,
    FCNHead,
    FeatureUpsampling,
    LinearHead,
    SimpleFeaturePyramid,
    UPerNet,
)

GRIDS = [(4, 4), (2, 6), (5, 3), (1, 1), (1, 7)]


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def level(grid: tuple[int, int], stride: int, target: int) -> tuple[int, ...]:
    return tuple(-(-side * stride // target) for side in grid)  # an odd side is rounded up


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("stride", [4, 8, 16, 32])
def test_upsampling_has_strides_4_to_32(stride, grid):
    maps = [torch.randn(2, 8, *grid) for _ in range(4)]
    found = FeatureUpsampling(8, stride)(maps)
    sides = [level(grid, stride, target) for target in (4, 8, 16, 32)]
    assert [tuple(x.shape) for x in found] == [(2, 8, *side) for side in sides]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("stride", [8, 16])
def test_the_simple_pyramid_has_strides_4_to_64(stride, grid):
    found = SimpleFeaturePyramid(16, stride, 12)(torch.randn(2, 16, *grid))
    assert list(found) == ["0", "1", "2", "3", "pool"]
    sides = [level(grid, stride, target) for target in (4, 8, 16, 32, 64)]
    assert [tuple(x.shape) for x in found.values()] == [(2, 12, *side) for side in sides]


def test_a_pyramid_refuses_what_it_cannot_halve():
    for make in (FeatureUpsampling, SimpleFeaturePyramid):
        with pytest.raises(ValueError, match=r"stride 14 .* linear head"):
            make(16, 14)
    with pytest.raises(ValueError, match="cannot be halved"):
        SimpleFeaturePyramid(6, 16)
    with pytest.raises(ValueError, match="tap four blocks"):
        FeatureUpsampling(8, 16)([torch.randn(1, 8, 2, 2)])


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_upernet_predicts_at_the_finest_size(grid, norm):
    maps = FeatureUpsampling(16, 16, NORMS[norm])([torch.randn(2, 16, *grid)] * 4)
    head = UPerNet([16] * 4, 5, 16, norm=NORMS[norm])
    assert head(maps).shape == (2, 5, 4 * grid[0], 4 * grid[1])
    assert FCNHead(16, 5, 8, norm=NORMS[norm])(maps[2]).shape == (2, 5, *grid)
    assert LinearHead([16, 16], 5)([maps[2], maps[2]]).shape == (2, 5, *grid)


@pytest.mark.parametrize("dim", [192, 384])
def test_the_papers_heads_have_their_number_of_parameters(dim):
    """Counted by hand: k x k convolutions without bias, 2 values a channel for each norm."""
    d, n = dim, 150

    def conv(inner, outer, kernel):
        return inner * outer * kernel**2 + 2 * outer

    pools = 4 * conv(d, d, 1) + conv(5 * d, d, 3)
    pyramid = 3 * (conv(d, d, 1) + conv(d, d, 3)) + conv(4 * d, d, 3)
    assert count(UPerNet([d] * 4, n, d, norm=nn.BatchNorm2d)) == pools + pyramid + (d + 1) * n
    assert count(FCNHead(d, n)) == conv(d, 256, 3) + 257 * n
    doubling = d * d * 4 + d
    assert count(FeatureUpsampling(d, 16)) == 3 * doubling + 2 * d
    assert count(LinearHead([d] * 4, n)) == (4 * d + 1) * n
    widths = (d // 4, d // 2, d, d)
    levels = sum(conv(w, 256, 1) + conv(256, 256, 3) for w in widths)
    doublings = 2 * (4 * d * d // 2 + d // 2) + 4 * (d // 2) * (d // 4) + d // 4 + 2 * (d // 2)
    assert count(SimpleFeaturePyramid(d, 16)) == levels + doublings


@pytest.mark.slow  # to import it takes long
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_upernet_is_that_of_transformers(training):
    """The same weights give the same logits, and the same gradient to all of them."""
    theirs_of = pytest.importorskip("transformers.models.upernet.modeling_upernet")
    from transformers import ResNetConfig, UperNetConfig

    stages = [f"stage{i}" for i in range(1, 5)]
    config = UperNetConfig(
        hidden_size=8, num_labels=5, backbone_config=ResNetConfig(out_features=stages)
    )
    widths = [4, 6, 8, 10]
    theirs, ours = theirs_of.UperNetHead(config, widths), UPerNet(widths, 5, 8, dropout=0.0)
    # Modules in the order of ours.
    parts = [*(list(p.children())[1] for p in theirs.psp_modules.children()), theirs.bottleneck,
             *theirs.lateral_convs, *theirs.fpn_convs, theirs.fpn_bottleneck]  # fmt: skip
    pairs = [(part.conv, part.batch_norm) for part in parts]
    order = [layer for pair in pairs for layer in pair] + [theirs.classifier]
    layers = [m for m in ours.modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d)]
    for mine, other in zip(layers, order, strict=True):
        for parameter in other.parameters():
            nn.init.normal_(parameter, std=0.3)
        mine.load_state_dict(other.state_dict())
    maps = [torch.randn(2, c, 13 // 2**i + 1, 20 // 2**i) for i, c in enumerate(widths)]
    answers = [head.train(training)(maps) for head in (ours, theirs)]
    torch.testing.assert_close(*answers)
    for answer in answers:
        answer.sin().sum().backward()
    for mine, other in zip(layers, order, strict=True):
        torch.testing.assert_close(mine.weight.grad, other.weight.grad, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("head", ["upernet", "pyramid", "linear"])
@pytest.mark.parametrize("size", [(32, 32), (16, 48)], ids=str)
def test_the_gradient_reaches_every_parameter(head, size):
    encoder = VimEncoder(img_size=32, patch_size=8, embed_dim=16, depth=4, num_classes=0)
    taps = [3] if head == "linear" else [0, 1, 2, 3]
    maps = encoder.forward_intermediates(
        torch.randn(2, 3, *size), taps, norm=True, intermediates_only=True
    )
    if head == "upernet":
        modules = [FeatureUpsampling(16, 8, LayerNorm2d), UPerNet([16] * 4, 3, 16), FCNHead(16, 3)]
        levels = modules[0](maps)
        total = modules[1](levels).square().sum() + modules[2](levels[2]).square().sum()
    elif head == "pyramid":
        modules = [SimpleFeaturePyramid(16, 8, 8)]
        total = sum(x.pow(3).sum() for x in modules[0](maps[-1]).values())
    else:
        modules = [LinearHead([16], 3)]
        total = modules[0](maps).square().sum()
    total.backward()
    for module in (encoder, *modules):
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.any(), name
