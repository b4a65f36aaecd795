"""The fused residual addition and RMSNorm against its formula in float64."""

import pytest
import torch
from backend_helpers import poison_new_tensors, use
from scan_helpers import relative_error

from vim_ssl.kernels.rms_norm import add_rms_norm

EPS = 1e-5
FAST = ["numba", "triton"]


@pytest.fixture(params=["torch", *FAST])
def device(request, monkeypatch):
    """The device of one implementation, which runs for the test."""
    return use(request.param, monkeypatch)


def by_formula(hidden, residual, weight):
    total = hidden.double() + (0 if residual is None else residual.double())
    root = torch.sqrt((total * total).sum(-1, keepdim=True) / total.shape[-1] + EPS)
    return weight.double() * total / root, total


def inputs(dtype=torch.float32, wide=torch.float32, shape=(2, 7, 12), device="cpu"):
    g = torch.Generator().manual_seed(0)
    hidden, residual = (torch.randn(shape, generator=g, dtype=torch.float64) for _ in "hr")
    weight = 1 + torch.randn(shape[-1], generator=g, dtype=torch.float64) / 4
    return hidden.to(device, dtype), (3 * residual).to(device, wide), weight.to(device, wide)


def results(function, m, used="both"):
    """Both outputs and the gradient of every input that is there."""
    leaves = [None if v is None else v.detach().requires_grad_() for v in m]
    outs = function(*leaves)
    g = torch.Generator().manual_seed(1)
    ways = [torch.randn(o.shape, generator=g).to(o.device) for o in outs]
    loss = sum(
        (o * w.to(o.dtype)).sum()
        for o, w, name in zip(outs, ways, ("normed", "residual"), strict=True)
        if used in (name, "both")
    )
    kept = [v for v in leaves if v is not None]
    grads = torch.autograd.grad(loss, kept, materialize_grads=True)
    return [v.detach() for v in (*outs, *grads)]


@pytest.mark.parametrize("shape", [(2, 7, 12), (1, 1, 1), (3, 5, 193), (2, 1500)], ids=str)
@pytest.mark.parametrize("with_residual", [True, False], ids=["add", "first-block"])
@pytest.mark.parametrize("used", ["normed", "residual", "both"])
def test_values_and_gradients(device, with_residual, used, shape):
    m = list(inputs(shape=shape, device=device))
    if not with_residual:
        m[1] = None
    got = results(add_rms_norm, m, used)
    exact = results(by_formula, [None if v is None else v.double() for v in m], used)
    for value, expected in zip(got, exact, strict=True):
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_residual_stream_is_never_narrower_than_float32(device, dtype):
    wide = torch.promote_types(dtype, torch.float32)
    hidden, residual, weight = inputs(dtype, wide, device=device)
    normed, total = add_rms_norm(hidden, residual, weight)
    assert (normed.dtype, total.dtype) == (dtype, wide)
    expected, expected_total = by_formula(hidden, residual, weight)
    tolerance = 2 * torch.finfo(dtype).eps + (1e-6 if dtype != torch.float64 else 1e-12)
    torch.testing.assert_close(normed.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(total.double(), expected_total, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("narrow_weight", [False, True], ids=["float32-weight", "narrow-weight"])
@pytest.mark.parametrize("with_residual", [True, False], ids=["add", "first-block"])
def test_half_precision_is_within_twice_the_plain_path(
    backend, dtype, narrow_weight, with_residual, monkeypatch
):
    hidden, residual, weight = inputs(dtype, shape=(4, 65))
    m = [hidden, residual if with_residual else None, weight.to(dtype) if narrow_weight else weight]
    exact = results(by_formula, [None if v is None else v.double() for v in m])
    use("torch", monkeypatch)
    plain = results(add_rms_norm, m)
    device = use(backend, monkeypatch)
    got = results(add_rms_norm, [None if v is None else v.to(device) for v in m])
    for value, reference, expected in zip(got, plain, exact, strict=True):
        assert value.dtype == reference.dtype
        limit = 2 * relative_error(reference, expected) + 1e-5
        assert relative_error(value.cpu(), expected) <= limit


def test_inputs_are_left_alone(device):
    m = inputs(device=device)
    before = [v.clone() for v in m]
    add_rms_norm(*m)
    assert all(torch.equal(a, b) for a, b in zip(m, before, strict=True))


def test_takes_any_memory_layout(device):
    hidden, residual, weight = inputs(device=device)
    strided = hidden.mT.contiguous().mT, residual.mT.contiguous().mT, weight.repeat(2)[::2]
    for got, expected in zip(
        results(add_rms_norm, strided), results(add_rms_norm, [v.clone() for v in strided]),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(got, expected)


def test_a_tensor_that_torch_negates_lazily():
    hidden, residual, weight = inputs()
    with torch.no_grad():
        negated = add_rms_norm(torch._neg_view(hidden), residual, weight)
        for got, expected in zip(negated, add_rms_norm(-hidden, residual, weight), strict=True):
            torch.testing.assert_close(got, expected)


def test_an_all_zero_row_is_finite_with_finite_gradients(device):
    hidden = torch.zeros(1, 2, 4, requires_grad=True, device=device)
    weight = torch.ones(4, requires_grad=True, device=device)
    normed, _ = add_rms_norm(hidden, None, weight)
    grads = torch.autograd.grad(normed.sum(), (hidden, weight))
    assert not normed.any()
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e30], ids=str)
@pytest.mark.parametrize("place", ["hidden", "residual", "weight"])
def test_what_is_not_finite_goes_where_it_goes_in_plain_torch(backend, place, value, monkeypatch):
    """1e30 is finite, but its square is not."""
    finite = []
    for name in ("torch", backend):
        device = use(name, monkeypatch)
        m = dict(zip(("hidden", "residual", "weight"), inputs(device=device), strict=True))
        m[place][(0, 3, 5) if place != "weight" else 5] = value
        finite.append([v.isfinite().cpu() for v in results(add_rms_norm, m.values())])
    for plain, got in zip(*finite, strict=True):
        assert torch.equal(got, plain)


def test_compiles_in_one_graph(device):
    m = inputs(device=device)
    compiled = torch.compile(add_rms_norm, fullgraph=True, backend="aot_eager")
    for got, expected in zip(results(compiled, m), results(add_rms_norm, m), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("shape", [(2, 7, 12), (1, 1, 1), (40, 300)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_a_kernel_writes_every_element_the_same_twice(backend, shape, dtype, monkeypatch):
    device = use(backend, monkeypatch)
    m = inputs(dtype, shape=shape, device=device)
    poison_new_tensors(monkeypatch)
    for one, other in zip(results(add_rms_norm, m), results(add_rms_norm, m), strict=True):
        assert one.isfinite().all()
        assert torch.equal(one, other)


def test_triton_programs_with_several_blocks_of_rows(monkeypatch):
    device = use("triton", monkeypatch)
    m = inputs(shape=(11, 600), device=device)
    backend = pytest.importorskip("vim_ssl.kernels.rms_norm.triton_backend")
    monkeypatch.setattr(backend, "WARPS", 12)  # three programs of four warps
    exact = results(by_formula, [v.double() for v in m])
    for value, expected in zip(results(add_rms_norm, m), exact, strict=True):
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("with_residual", [True, False], ids=["add", "first-block"])
def test_triton_operators_pass_opcheck(with_residual, monkeypatch):
    device = use("triton", monkeypatch)
    hidden, residual, weight = inputs(shape=(3, 5), device=device)
    add_rms_norm(hidden, residual, weight)  # registers the operators
    ops = torch.ops.vim_ssl
    args = [v.requires_grad_() for v in (hidden, residual, weight)]
    if not with_residual:
        args[1] = None
    torch.library.opcheck(ops.triton_rms_norm_forward, (*args, EPS))
    normed, total, rstd = (v.detach() for v in ops.triton_rms_norm_forward(*args, EPS))
    dtotal = torch.ones_like(total) if with_residual else None
    torch.library.opcheck(
        ops.triton_rms_norm_backward,
        (normed.bfloat16(), dtotal, total, rstd, weight.detach(), with_residual),
    )


@pytest.mark.parametrize("with_residual", [True, False], ids=["add", "first-block"])
def test_numba_operators_pass_opcheck(with_residual, monkeypatch):
    use("numba", monkeypatch)
    hidden, residual, weight = inputs(shape=(3, 20))
    add_rms_norm(hidden, residual, weight)  # registers the operators
    ops = torch.ops.vim_ssl
    args = [v.requires_grad_() for v in (hidden, residual, weight)]
    if not with_residual:
        args[1] = None
    torch.library.opcheck(ops.rms_norm_forward, (*args, EPS))
    normed, total, scales = (v.detach() for v in ops.rms_norm_forward(*args, EPS))
    dtotal = torch.ones_like(total) if with_residual else None
    torch.library.opcheck(ops.rms_norm_backward, (normed, dtotal, total, scales, weight.detach()))


def test_numba_gives_the_same_on_any_number_of_threads(monkeypatch):
    use("numba", monkeypatch)
    m, before = inputs(shape=(700, 200)), torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        together = results(add_rms_norm, m)
        torch.set_num_threads(1)
        alone = results(add_rms_norm, m)
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, together, alone))


@pytest.mark.parametrize("backend", FAST)
def test_double_backward_is_refused_with_a_reason(backend, monkeypatch):
    device = use(backend, monkeypatch)
    m = [v.requires_grad_() for v in inputs(device=device)]
    (grad,) = torch.autograd.grad(add_rms_norm(*m)[0].square().sum(), m[0], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        grad.sum().backward()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the mean of no numbers
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 3, 0)], ids=["no-rows", "no-columns"])
def test_takes_empty_tensors(device, shape):
    normed, total, *grads = results(add_rms_norm, inputs(shape=shape, device=device))
    assert normed.shape == total.shape == shape
    assert not grads[-1].any()


def test_shapes_that_do_not_fit_are_refused():
    hidden, residual, weight = inputs()
    with pytest.raises(ValueError, match=r"residual has shape \(2, 1, 12\)"):
        add_rms_norm(hidden, residual[:, :1], weight)
    with pytest.raises(ValueError, match=r"weight has shape \(3,\); expected \(12,\)"):
        add_rms_norm(hidden, residual, weight[:3])


def test_a_narrow_residual_is_widened(device):
    narrow = torch.randn(2, 3, 8, device=device, dtype=torch.bfloat16)
    _, residual = add_rms_norm(narrow, narrow, torch.ones(8, device=device))
    assert residual.dtype == torch.float32
    assert torch.equal(residual, 2 * narrow.float())
