"""The short convolution against its definition, one token and one tap at a time."""

import pytest
import torch

from vim_ssl.kernels.causal_conv1d import bi_causal_conv1d, causal_conv1d


def by_definition(x, weight, bias, reverse):
    """silu(bias + sum_j w_j x_{t-(k-1)+j}), mirrored in time with `reverse`; float64."""
    x, weight, bias = x.double(), weight.double(), bias.double()
    k, rows = weight.shape[1], []
    for t in range(x.shape[1]):
        y = bias.expand(x.shape[0], -1)
        for j in range(k):
            source = t + (k - 1 - j) if reverse else t - (k - 1 - j)
            if 0 <= source < x.shape[1]:
                y = y + weight[:, j] * x[:, source]
        rows.append(y * torch.sigmoid(y))
    return torch.stack(rows, dim=1)


def both_by_definition(x, weight, bias):
    return torch.stack([by_definition(x, weight[s], bias[s], s == 1) for s in (0, 1)])


def inputs(b, l, d, k, dtype=torch.float32, directions=2):
    g = torch.Generator().manual_seed(0)
    shapes = (b, l, d), (directions, d, k), (directions, d)
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes]


def grads_of(function, leaves, *args):
    out = function(*leaves, *args)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return out, torch.autograd.grad((out * weights).sum(), leaves)


def assert_same(function, definition, m, *args, tolerance=1e-5):
    leaves = [v.detach().requires_grad_() for v in m]
    out, grads = grads_of(function, leaves, *args)
    exact, exact_grads = grads_of(definition, [v.detach().double().requires_grad_() for v in m],
                                  *args)  # fmt: skip
    assert out.dtype == m[0].dtype
    for got, expected in zip((out, *grads), (exact, *exact_grads), strict=True):
        scale = float(expected.detach().abs().max()) + 1e-30
        torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance * scale)


SHAPES = [(2, 1, 5, 4), (2, 3, 5, 4), (2, 14, 192, 4), (1, 50, 65, 4), (3, 20, 7, 1), (1, 9, 3, 6)]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "b{}-l{}-d{}-k{}".format(*s))
class TestAgainstTheDefinition:
    def test_two_way(self, shape):
        assert_same(bi_causal_conv1d, both_by_definition, inputs(*shape))

    @pytest.mark.parametrize("reverse", [False, True], ids=["ahead", "reverse"])
    def test_one_way(self, shape, reverse):
        x, weight, bias = inputs(*shape, directions=1)
        assert_same(causal_conv1d, by_definition, [x, weight[0], bias[0]], reverse)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_keeps_the_dtype(dtype):
    tolerance = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float64: 1e-12}[dtype]
    assert_same(bi_causal_conv1d, both_by_definition, inputs(2, 10, 8, 4, dtype),
                tolerance=tolerance)  # fmt: skip


def test_takes_a_slice_of_a_wider_tensor():
    """The block hands in one half of a projection's output."""
    x, weight, bias = inputs(2, 12, 8, 4)
    assert_same(
        bi_causal_conv1d, both_by_definition, [torch.cat([x, x], -1)[..., :8], weight, bias]
    )


def test_takes_channels_first_memory():
    x, weight, bias = inputs(2, 12, 8, 4)
    assert_same(bi_causal_conv1d, both_by_definition, [x.mT.contiguous().mT, weight, bias])


def test_a_token_sees_only_its_own_side():
    x, weight, bias = inputs(1, 9, 3, 4)
    changed = x.clone()
    changed[:, 4] += 1
    moved = (bi_causal_conv1d(changed, weight, bias) != bi_causal_conv1d(x, weight, bias))[:, 0]
    assert moved.any(-1).nonzero().tolist() == [[0, t] for t in (4, 5, 6, 7)] + [
        [1, t] for t in (1, 2, 3, 4)
    ]


def test_autocast_and_compile():
    m = inputs(2, 12, 8, 4)
    exact = both_by_definition(*m)
    with torch.autocast("cpu", torch.bfloat16):
        out = bi_causal_conv1d(*m)
    assert (out.double() - exact).norm() < 2e-2 * exact.norm()
    compiled = torch.compile(bi_causal_conv1d, fullgraph=True, backend="aot_eager")
    leaves = [v.requires_grad_() for v in m]
    out, grads = grads_of(compiled, leaves)
    _, plain_grads = grads_of(bi_causal_conv1d, leaves)
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grads, plain_grads)


def test_huge_negative_inputs_stay_finite():
    _, weight, bias = inputs(1, 4, 2, 4)
    x = torch.full((1, 4, 2), -1e4)
    assert_same(bi_causal_conv1d, both_by_definition, [x, weight, bias])
