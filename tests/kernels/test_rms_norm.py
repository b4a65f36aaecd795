"""The fused residual addition and RMSNorm against its formula in float64."""

import pytest
import torch

from vim_ssl.kernels.rms_norm import add_rms_norm

EPS = 1e-5


def by_formula(hidden, residual, weight):
    total = hidden.double() + (0 if residual is None else residual.double())
    root = torch.sqrt((total * total).sum(-1, keepdim=True) / total.shape[-1] + EPS)
    return weight.double() * total / root, total


def inputs(dtype=torch.float32, wide=torch.float32, shape=(2, 7, 12)):
    g = torch.Generator().manual_seed(0)
    hidden, residual = (torch.randn(shape, generator=g, dtype=torch.float64) for _ in "hr")
    weight = 1 + torch.randn(shape[-1], generator=g, dtype=torch.float64) / 4
    return hidden.to(dtype), 3 * residual.to(wide), weight.to(wide)


@pytest.mark.parametrize("shape", [(2, 7, 12), (1, 1, 1), (3, 5, 193)], ids=str)
@pytest.mark.parametrize("with_residual", [True, False], ids=["add", "first-block"])
@pytest.mark.parametrize("used", ["normed", "residual", "both"])
def test_values_and_gradients(with_residual, used, shape):
    m = list(inputs(shape=shape))
    if not with_residual:
        m[1] = None
    g = torch.Generator().manual_seed(1)
    ways = [torch.randn(shape, generator=g, dtype=torch.float64) for _ in "nr"]
    results = []
    for function, dtype in ((add_rms_norm, torch.float32), (by_formula, torch.float64)):
        leaves = [None if v is None else v.detach().to(dtype).requires_grad_() for v in m]
        outs = function(*leaves)
        loss = sum(
            (o * w).sum()
            for o, w, name in zip(outs, ways, ("normed", "residual"), strict=True)
            if used in (name, "both")
        )
        kept = [v for v in leaves if v is not None]
        results.append((*outs, *torch.autograd.grad(loss, kept, materialize_grads=True)))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_residual_stream_is_never_narrower_than_float32(dtype):
    wide = torch.promote_types(dtype, torch.float32)
    hidden, residual, weight = inputs(dtype, wide)
    normed, total = add_rms_norm(hidden, residual, weight)
    assert (normed.dtype, total.dtype) == (dtype, wide)
    expected, expected_total = by_formula(hidden, residual, weight)
    tolerance = 2 * torch.finfo(dtype).eps + (1e-6 if dtype != torch.float64 else 1e-12)
    torch.testing.assert_close(normed.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(total.double(), expected_total, rtol=1e-6, atol=1e-6)


def test_inputs_are_left_alone():
    m = inputs()
    before = [v.clone() for v in m]
    add_rms_norm(*m)
    assert all(torch.equal(a, b) for a, b in zip(m, before, strict=True))


def test_an_all_zero_row_is_finite_with_finite_gradients():
    hidden = torch.zeros(1, 2, 4, requires_grad=True)
    weight = torch.ones(4, requires_grad=True)
    normed, _ = add_rms_norm(hidden, None, weight)
    grads = torch.autograd.grad(normed.sum(), (hidden, weight))
    assert not normed.any()
    assert all(g.isfinite().all() for g in grads)


def test_compiles_in_one_graph():
    m = inputs()
    compiled = torch.compile(add_rms_norm, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*m), add_rms_norm(*m))
